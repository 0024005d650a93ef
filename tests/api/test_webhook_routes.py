"""The routes of webhooks: the unmodified SDK, other tenants, and what is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from fastapi import FastAPI

from helios_serve.api.auth import ANONYMOUS
from helios_serve.api.outgoing import OutgoingPolicy
from helios_serve.api.webhook_routes import DELIVERIES, ENDPOINTS, MAX_ENDPOINTS, webhook_router
from helios_serve.api.webhooks import SenderSettings, WebhookSender, derived_secret
from helios_serve.errors import InvalidRequestError
from helios_serve.store.connect import StoreConfig, open_stores
from tests.api.test_files import sdk
from tests.api.test_http_access import KEYS, World, assert_refused, calling, run, serve
from tests.api.test_outgoing import Receiver
from tests.api.test_webhooks import deliveries, endpoint, sender_of, sending, statuses, until_settled, verified
from tests.store.helpers import finished


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    stores = open_stores(StoreConfig(data_dir=tmp_path / "data"))
    yield World(stores)
    stores.close()


def app_of(world: World, sender: WebhookSender) -> FastAPI:
    return serve(world, webhook_router(world.stores.access, sender, world.access()))


def test_a_receiver_without_a_name_is_called_by_its_host(world: World) -> None:
    bearer = world.key("a")

    async def work() -> None:
        async with calling(app_of(world, sender_of(world.stores))) as client:
            body = {"url": "https://hooks.example.com/a"}
            answer = await client.post(ENDPOINTS, json=body, headers={"authorization": bearer})
            assert (answer.status_code, answer.json()["name"]) == (200, "hooks.example.com")

    run(work)


def test_the_sdk_manages_endpoints(world: World) -> None:
    bearer = world.key("a")

    async def work() -> None:
        receiver = Receiver(statuses(200, 410))
        async with receiver.running() as base, sdk(app_of(world, sender_of(world.stores)), bearer) as client:
            webhooks = client.webhooks
            assert (await webhooks.event_types.list()).data == ["video.completed", "video.failed"]
            made = await webhooks.create(url=f"{base}/a", event_types=["video.failed"], name="mine")
            assert made.object == "webhook_endpoint"
            assert made.event_types == ["video.failed"]
            assert made.signing_secret.startswith("whsec_")
            assert made.signing_secret_hint == f"whsec_...{made.signing_secret[-4:]}"
            assert made.name == "mine"
            found = await webhooks.retrieve(made.id)
            assert (found.id, found.url, found.name) == (made.id, f"{base}/a", "mine")
            assert made.signing_secret not in found.model_dump_json()
            changed = await webhooks.update(made.id, url=f"{base}/b", event_types=["video.completed"])
            assert (changed.url, changed.event_types, changed.name) == (f"{base}/b", ["video.completed"], "mine")
            assert (await webhooks.update(made.id, name="ours")).name == "ours"
            second = await webhooks.create(url=f"{base}/c", event_types=["video.completed"], name="x")
            assert [one.id async for one in webhooks.list(limit=1)] == [second.id, made.id]

            tested = await webhooks.test(made.id, event_type="video.failed")
            assert (tested.status_code, tested.success, tested.webhook_endpoint_id) == (200, True, made.id)
            event = verified(receiver.seen[0], made.signing_secret)
            assert (receiver.seen[0].target, event["type"]) == ("/b", "video.failed")
            assert (await webhooks.test(made.id, event_type="video.failed")).status_code == 410
            assert not (await world.stores.access.endpoint("a", made.id)).is_disabled

            kept = await webhooks.rotate_secret(made.id)
            assert kept.signing_secret != made.signing_secret
            assert (await world.stores.access.endpoint("a", made.id)).previous_secret == made.signing_secret
            await webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=False)
            assert (await world.stores.access.endpoint("a", made.id)).previous_secret is None

            gone = await webhooks.delete(made.id)
            assert (gone.id, gone.object, gone.deleted) == (made.id, "webhook_endpoint.deleted", True)
            with pytest.raises(openai.NotFoundError):
                await webhooks.retrieve(made.id)

    run(work)


def test_another_tenants_endpoints_and_deliveries_are_not_found(world: World) -> None:
    stranger, no_scope = world.key("b"), world.key("a", scopes=["read", "generate"])
    app = app_of(world, sender_of(world.stores))

    async def work() -> None:
        await endpoint(world.stores, "https://hooks.example/")
        await finished(world.stores)
        (row,) = await deliveries(world.stores)
        one = f"{ENDPOINTS}/we_1"
        calls = [
            ("GET", one),
            ("POST", one),
            ("DELETE", one),
            ("POST", f"{one}/rotate_secret"),
            ("POST", f"{one}/test"),
            ("POST", f"{DELIVERIES}/{row.id}/resend"),
        ]
        async with calling(app, stranger) as client, calling(app) as nobody, calling(app, no_scope) as reader:
            for method, path in calls:
                answer = await client.request(method, path, json={} if method == "POST" else None)
                unknown = await client.request(
                    method, path.replace("we_1", "we_9").replace(row.id, "dlv_9"), json={} if method == "POST" else None
                )
                assert (answer.status_code, unknown.status_code) == (404, 404), path
                assert answer.json()["error"]["code"] == unknown.json()["error"]["code"]
                assert_refused(await nobody.request(method, path), 401, "invalid_api_key")
                assert_refused(await reader.request(method, path), 403, "insufficient_scope")
            for path in (ENDPOINTS, DELIVERIES):
                assert (await client.get(path)).json()["data"] == []
            assert (await client.get(DELIVERIES, params={"after": row.id})).status_code == 404
        assert (await world.stores.access.endpoint("a", "we_1")).url == "https://hooks.example/"

    run(work)


def test_deliveries_are_listed_and_sent_again(world: World) -> None:
    bearer = world.key("a")

    async def work() -> None:
        receiver = Receiver(statuses(410, 200))
        async with receiver.running() as base:
            job = await finished(world.stores, webhook_url=base)
            sender = sender_of(world.stores, SenderSettings(poll_s=3600.0))
            async with sending(sender), calling(app_of(world, sender), bearer) as client:
                await until_settled(world.stores)
                (row,) = (await client.get(DELIVERIES)).json()["data"]
                assert (row["object"], row["state"], row["attempts"]) == ("webhook_delivery", "dead", 1)
                assert (row["video_id"], row["url"], row["last_status"]) == (job.id, base, 410)
                assert row["next_attempt_at"] is None
                again = (await client.post(f"{DELIVERIES}/{row['id']}/resend")).json()
                assert (again["state"], again["event_id"]) == ("pending", row["event_id"])
                (settled,) = await until_settled(world.stores)
                assert settled.state == "delivered"
                secret = (await client.get("/v1/webhook_secret")).json()["signing_secret"]
                assert verified(receiver.seen[1], derived_secret(KEYS.current, None))["id"] == row["event_id"]
                assert secret == derived_secret(KEYS.current, world.keys[0].id)
                for path in (ENDPOINTS, DELIVERIES, "/v1/webhook_event_types", "/v1/webhook_secret"):
                    assert (await client.head(path)).status_code == 200

    run(work)


def test_a_disabled_endpoint_is_enabled_by_its_owner(world: World) -> None:
    bearer = world.key("a")

    async def work() -> None:
        await endpoint(world.stores, "https://hooks.example/")
        await world.stores.access.change_endpoint("a", "we_1", {"is_disabled": True})
        async with calling(app_of(world, sender_of(world.stores)), bearer) as client:
            assert (await client.get(f"{ENDPOINTS}/we_1")).json()["helios"]["disabled"] is True
            answer = await client.post(f"{ENDPOINTS}/we_1", json={"helios": {"disabled": False}})
            assert answer.json()["helios"]["disabled"] is False
            assert not (await world.stores.access.endpoint("a", "we_1")).is_disabled

    run(work)


def test_bodies_that_are_refused(world: World) -> None:
    bearer = world.key("a")
    app = app_of(world, sender_of(world.stores, policy=OutgoingPolicy()))
    good = {"url": "https://hooks.example/x", "event_types": ["video.failed"]}
    cases: list[tuple[dict[str, Any], str, str | None]] = [
        ({}, "missing_required_parameter", "url"),
        ({**good, "ulr": 1}, "unknown_parameter", "ulr"),
        ({**good, "event_types": []}, "invalid_value", "event_types"),
        ({**good, "event_types": ["video.started"]}, "invalid_value", "event_types.0"),
        ({**good, "name": 5}, "invalid_value", "name"),
        ({**good, "name": ""}, "invalid_value", "name"),
        ({**good, "name": "n" * 65}, "invalid_value", "name"),
        *(
            ({**good, "url": url}, "invalid_value", "url")
            for url in (
                "http://hooks.example/",
                "https://127.0.0.1/",
                "https://[::ffff:10.0.0.1]/",
                "https://hooks.example:8443/",
                "https://u:p@hooks.example/",
                "file:///etc/passwd",
                "hooks.example",
                "",
                "https://x/" + "y" * 3000,
                7,
            )
        ),
    ]

    async def work() -> None:
        async with calling(app, bearer) as client:
            for body, code, param in cases:
                answer = await client.post(ENDPOINTS, json=body)
                assert_refused(answer, 400, code)
                assert answer.json()["error"]["param"] == param, answer.text
            assert_refused(await client.post(ENDPOINTS, content=b"{"), 415, "unsupported_media_type")
            json_type = {"content-type": "application/json"}
            assert_refused(await client.post(ENDPOINTS, content=b"[", headers=json_type), 400, "malformed_body")
            made = (await client.post(ENDPOINTS, json=good)).json()
            assert made["url"] == good["url"]
            bad_change = await client.post(f"{ENDPOINTS}/{made['id']}", json={"url": "https://10.0.0.1/"})
            assert_refused(bad_change, 400, "invalid_value")
            assert (await client.get(f"{ENDPOINTS}/{made['id']}")).json()["url"] == good["url"]
            for _ in range(MAX_ENDPOINTS - 1):
                assert (await client.post(ENDPOINTS, json=good)).status_code == 200
            assert_refused(await client.post(ENDPOINTS, json=good), 429, "quota_exceeded")

    run(work)


def test_a_test_of_a_receiver_that_is_down_says_so(world: World) -> None:
    bearer = world.key("a")

    async def work() -> None:
        receiver = Receiver()
        async with receiver.running():
            pass
        await endpoint(world.stores, f"http://127.0.0.1:{receiver.port}/")
        async with calling(app_of(world, sender_of(world.stores)), bearer) as client:
            answer = await client.post(f"{ENDPOINTS}/we_1/test")
            assert_refused(answer, 400, "invalid_value")
            assert "takes no connection" in answer.json()["error"]["message"]
            assert await deliveries(world.stores) == ()

    run(work)


def test_urls_of_jobs_are_checked_by_the_same_rule(world: World) -> None:
    sender = sender_of(world.stores, policy=OutgoingPolicy())
    sender.check("https://hooks.example/x", "webhook_url")
    with pytest.raises(InvalidRequestError) as caught:
        sender.check("http://hooks.example/x", "callback_url")
    assert (caught.value.param, caught.value.code) == ("callback_url", "invalid_value")


def test_a_server_without_keys_signs_too(world: World) -> None:
    world.is_keyless = True

    async def work() -> None:
        receiver = Receiver()
        sender = sender_of(world.stores)
        async with receiver.running() as base, calling(app_of(world, sender)) as client:
            await finished(world.stores, tenant=ANONYMOUS.tenant, webhook_url=base)
            secret = (await client.get("/v1/webhook_secret")).json()["signing_secret"]
            async with sending(sender), asyncio.timeout(20):
                while not receiver.seen:
                    await asyncio.sleep(0.01)
            verified(receiver.seen[0], secret)

    run(work)


def test_the_document_holds_no_loose_references(world: World) -> None:
    document = app_of(world, sender_of(world.stores)).openapi()
    text = json.dumps(document)
    assert "$defs" not in text
    body = document["paths"]["/v1/webhook_endpoints/{endpoint_id}"]["post"]["requestBody"]
    assert body["required"] is False
    assert "disabled" in json.dumps(body)
