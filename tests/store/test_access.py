"""Keys, files, receivers and deliveries."""

from __future__ import annotations

import asyncio

import pytest
import sqlalchemy as sa

from helios_serve.errors import NotFoundError
from helios_serve.store import schema
from helios_serve.store.connect import Stores
from helios_serve.store.paging import PageRequest
from tests.store.conftest import OpenStores
from tests.store.helpers import finished, new_job
from tests.store.test_jobs import shift


def test_a_key_is_known_by_its_secret_alone(stores: Stores) -> None:
    async def run() -> None:
        access = stores.access
        key = await access.add_key(
            key_id="k1", secret="s3cret", tenant_id="a", scopes=["read"], limits={"max_sessions": 1}, ttl_s=60
        )
        assert (key.tenant, key.scopes, key.limits) == ("a", ("read",), {"max_sessions": 1})
        assert await access.check_key("k1", "s3cret") == key
        assert await access.check_key("k1", "other") is None
        assert await access.check_key("k1", "") is None
        assert await access.check_key("k2", "s3cret") is None
        assert await access.check_key("k2", "") is None
        shift(stores, schema.api_key, "expires_at", -61)
        assert await access.check_key("k1", "s3cret") is None
        await access.add_key(key_id="k3", secret="x", tenant_id="a")
        assert await access.check_key("k3", "x")
        assert await access.revoke_key("k3")
        assert not await access.revoke_key("none")
        assert await access.check_key("k3", "x") is None
        assert [one.id for one in await access.keys()] == ["k1", "k3"]

        def secrets(connection: sa.Connection) -> str:
            return str(connection.execute(sa.select(schema.api_key)).all())

        assert "s3cret" not in stores.database.read_now(secrets)

    asyncio.run(run())


def test_files_belong_to_a_tenant_and_expire(stores: Stores) -> None:
    async def run() -> None:
        new = {"filename": "x.png", "purpose": "input", "content_type": "image/png", "num_bytes": 7, "blob": "ab/ab"}
        made = await stores.access.add_file({**new, "id": "f1", "tenant": "a"}, ttl_s=60)
        await stores.access.add_file({**new, "id": "f2", "tenant": "b"}, ttl_s=60)
        assert await stores.access.file("a", "f1") == made
        assert await stores.jobs.bytes_stored("a") == 7
        assert [one.id for one in (await stores.access.files("a", PageRequest())).items] == ["f1"]
        for call in (stores.access.file("a", "f2"), stores.access.delete_file("a", "f2")):
            with pytest.raises(NotFoundError) as caught:
                await call
            assert caught.value.code == "file_not_found"
        await stores.access.delete_file("b", "f2")
        shift(stores, schema.file, "expires_at", -61)
        with pytest.raises(NotFoundError):
            await stores.access.file("a", "f1")
        assert (await stores.access.files("a", PageRequest())).items == ()

    asyncio.run(run())


def test_endpoints(stores: Stores) -> None:
    async def run() -> None:
        access = stores.access
        for number in range(3):
            await access.add_endpoint(
                endpoint_id=f"we_{number}", tenant_id="a", url="https://x", secret="old", event_types=["video.failed"]
            )
        page = await access.endpoints("a", PageRequest(limit=2))
        assert page.has_more
        assert len(page.items) == 2
        changed = await access.change_endpoint("a", "we_1", {"url": "https://y", "is_disabled": True})
        assert (changed.url, changed.is_disabled, changed.event_types) == ("https://y", True, ("video.failed",))
        rotated = await access.rotate_secret("a", "we_1", "new")
        assert (rotated.secret, rotated.previous_secret) == ("new", "old")
        assert rotated.rotated_at
        await access.delete_endpoint("a", "we_1")
        calls = [
            access.endpoint("a", "we_1"),
            access.endpoint("b", "we_0"),
            access.change_endpoint("b", "we_0", {"is_disabled": True}),
            access.rotate_secret("b", "we_0", "x"),
            access.delete_endpoint("b", "we_0"),
        ]
        for call in calls:
            with pytest.raises(NotFoundError):
                await call
        assert not (await access.endpoint("a", "we_0")).is_disabled

    asyncio.run(run())


def test_deliveries_are_tried_until_they_arrive_or_die(stores: Stores) -> None:
    async def run() -> None:
        access = stores.access
        await access.add_endpoint(endpoint_id="we", tenant_id="a", url="https://x", secret="s")
        off = await access.add_endpoint(endpoint_id="we_off", tenant_id="a", url="https://z", secret="s")
        await access.change_endpoint("a", off.id, {"is_disabled": True})
        await finished(stores)
        cancelled = new_job()
        await stores.jobs.create(cancelled)
        await stores.jobs.cancel("a", cancelled.id)
        first, second = await access.due_deliveries(10, hold_s=60)
        assert {first.event_type, second.event_type} == {"video.completed", "video.failed"}
        assert (first.attempt, first.state, first.endpoint_id) == (1, "pending", "we")
        assert await access.due_deliveries(10, hold_s=60) == []
        await access.delivered(first.id, 204)
        await access.undelivered(second.id, status=500, retry_in_s=-1)
        (again,) = await access.due_deliveries(10, hold_s=60)
        assert (again.id, again.attempt, again.last_status, again.event_id) == (second.id, 2, 500, second.event_id)
        await access.undelivered(second.id, status=None, retry_in_s=None)
        states = {one.id: one.state for one in (await access.deliveries("a", PageRequest())).items}
        assert states == {first.id: "delivered", second.id: "dead"}
        resent = await access.resend("a", second.id)
        assert (resent.state, resent.attempt, resent.event_id) == ("pending", 0, second.event_id)
        assert [one.id for one in await access.due_deliveries(10, hold_s=60)] == [second.id]
        with pytest.raises(NotFoundError):
            await access.resend("b", second.id)

    asyncio.run(run())


def test_senders_share_deliveries(opened: OpenStores, database_url: str | None) -> None:
    async def run() -> None:
        one = opened("one")
        two = one if database_url is None else opened("two")
        for _ in range(20):
            new = new_job(webhook_url="https://x")
            await one.jobs.create(new)
            await one.jobs.cancel("a", new.id)
        taken = await asyncio.gather(*(stores.access.due_deliveries(5, hold_s=60) for stores in (one, two, one, two)))
        taken += [await one.access.due_deliveries(20, hold_s=60)]
        ids = [delivery.id for some in taken for delivery in some]
        assert len(ids) == len(set(ids)) == 20

    asyncio.run(run())


def test_tenants_and_cost_factors_outlive_the_process(stores: Stores) -> None:
    async def run() -> None:
        access = stores.access
        await stores.jobs.create(new_job(tenant="b"))
        await access.set_tenant("a", weight=2.0, limits={"max_running_jobs": 3})
        await access.set_tenant("a", weight=3.0)
        await access.save_tenants({"a": 1.5, "b": 2.5, "unknown": 1.0})
        rows = [(one.id, one.weight, one.vtime) for one in await access.tenants()]
        assert rows == [("a", 3.0, 1.5), ("b", 1.0, 2.5)]
        assert await access.cost_factors() is None
        await access.save_cost_factors('{"f": 1}')
        await access.save_cost_factors('{"f": 2}')
        assert await access.cost_factors() == '{"f": 2}'

    asyncio.run(run())
