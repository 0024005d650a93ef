"""Webhooks: real jobs end in a real store, and real receivers verify what they are sent with other people's code."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from helios_serve.api.outgoing import Outgoing, OutgoingPolicy
from helios_serve.api.signed_urls import SigningKey, SigningKeys
from helios_serve.api.webhooks import (
    RETRY_LADDER_S,
    ROTATION_S,
    SenderSettings,
    WebhookSender,
    derived_secret,
    new_secret,
)
from helios_serve.store import schema
from helios_serve.store.connect import StoreConfig, Stores, open_stores
from helios_serve.store.paging import PageRequest
from helios_serve.store.records import Delivery, WebhookEndpoint
from helios_serve.telemetry import Metrics
from tests.api.test_http_access import KEYS, run
from tests.api.test_outgoing import Receiver, Seen
from tests.store.helpers import finished, running
from tests.store.test_jobs import shift

FAST = SenderSettings(ladder_s=(0.02,) * 8, poll_s=0.02, timeout_s=2.0)
PRIVATE = OutgoingPolicy(allow_private=True)


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[Stores]:
    found = open_stores(StoreConfig(data_dir=tmp_path / "data"))
    yield found
    found.close()


def sender_of(
    stores: Stores,
    settings: SenderSettings = FAST,
    *,
    policy: OutgoingPolicy = PRIVATE,
    keys: SigningKeys = KEYS,
    metrics: Metrics | None = None,
    now: Callable[[], float] = time.time,
) -> WebhookSender:
    return WebhookSender(stores.access, Outgoing(policy), keys, settings=settings, metrics=metrics, now=now)


@contextlib.asynccontextmanager
async def sending(sender: WebhookSender) -> AsyncIterator[None]:
    task = asyncio.create_task(sender.run())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def statuses(*codes: int) -> Callable[[Seen], bytes]:
    """Answers with these in turn, the last one for ever."""
    left = list(codes)

    def answer(_: Seen) -> bytes:
        code = left.pop(0) if len(left) > 1 else left[0]
        return f"HTTP/1.1 {code} X\r\ncontent-length: 0\r\nlocation: http://127.0.0.1/\r\n\r\n".encode()

    return answer


async def endpoint(stores: Stores, url: str, **changes: Any) -> WebhookEndpoint:
    given = {"endpoint_id": "we_1", "tenant_id": "a", "url": url, "secret": new_secret(), **changes}
    return await stores.access.add_endpoint(**given)


async def deliveries(stores: Stores, tenant: str = "a") -> Sequence[Delivery]:
    return (await stores.access.deliveries(tenant, PageRequest(limit=100))).items


async def until_settled(stores: Stores, count: int = 1) -> Sequence[Delivery]:
    async with asyncio.timeout(20):
        while True:
            found = await deliveries(stores)
            if len(found) == count and all(one.state != "pending" for one in found):
                return found
            await asyncio.sleep(0.01)


def verified(seen: Seen, secret: str) -> dict[str, Any]:
    """The event, if two implementations that are not ours accept it."""
    event = Webhook(secret).verify(seen.body, seen.headers)
    unwrapped: Any = openai.OpenAI(api_key="x", webhook_secret=secret).webhooks.unwrap(seen.body, seen.headers)
    assert (unwrapped.id, unwrapped.type, unwrapped.data.id) == (event["id"], event["type"], event["data"]["id"])
    assert isinstance(event, dict)
    return event


def refuted(seen: Seen, secret: str) -> None:
    with pytest.raises(WebhookVerificationError):
        Webhook(secret).verify(seen.body, seen.headers)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        openai.OpenAI(api_key="x", webhook_secret=secret).webhooks.unwrap(seen.body, seen.headers)


def test_an_ended_job_is_announced_to_its_endpoints_and_its_own_url(stores: Stores) -> None:
    async def work() -> None:
        receiver = Receiver()
        async with receiver.running() as base:
            mine = await endpoint(stores, f"{base}/endpoint")
            await endpoint(stores, f"{base}/failures", endpoint_id="we_2", event_types=["video.failed"])
            await endpoint(stores, f"{base}/other", endpoint_id="we_3", tenant_id="b")
            job = await finished(stores, webhook_url=f"{base}/own?x=1", key_id="k1")
            metrics = Metrics("helios")
            async with sending(sender_of(stores, metrics=metrics)):
                settled = await until_settled(stores, 2)
            assert {(one.state, one.attempt, one.last_status) for one in settled} == {("delivered", 1, 200)}
            by_target = {seen.target: seen for seen in receiver.seen}
            assert set(by_target) == {"/endpoint", "/own?x=1"}
            own_secret = derived_secret(KEYS.current, "k1")
            for target, secret in (("/endpoint", mine.secret), ("/own?x=1", own_secret)):
                seen = by_target[target]
                event = verified(seen, secret)
                assert event == {
                    "id": seen.headers["webhook-id"],
                    "object": "event",
                    "type": "video.completed",
                    "created_at": int(settled[0].created_at),
                    "data": {"id": job.id},
                }
                assert event["id"].startswith("evt_")
                assert (seen.method, seen.headers["content-type"]) == ("POST", "application/json")
                refuted(seen, new_secret())
            refuted(by_target["/own?x=1"], mine.secret)
            text, _ = metrics.render(openmetrics=False)
            (counted,) = [line for line in text.decode().splitlines() if 'outcome="delivered"' in line]
            assert "webhook_deliveries_total" in counted
            assert counted.endswith(" 2.0")

    run(work)


def test_failed_jobs_are_announced_too(stores: Stores) -> None:
    async def work() -> None:
        receiver = Receiver()
        async with receiver.running() as base:
            mine = await endpoint(stores, base)
            job = await running(stores)
            await stores.jobs.cancel("a", job.id)
            async with sending(sender_of(stores)):
                await until_settled(stores)
            assert verified(receiver.seen[0], mine.secret)["type"] == "video.failed"

    run(work)


def test_a_receiver_that_is_down_for_two_attempts_still_gets_it(stores: Stores) -> None:
    async def work() -> None:
        receiver = Receiver()
        async with receiver.running():
            pass  # the port is known now, and closed
        mine = await endpoint(stores, f"http://127.0.0.1:{receiver.port}/")
        await finished(stores)
        async with sending(sender_of(stores, SenderSettings(ladder_s=(0.02, 0.5, *[0.02] * 6), poll_s=0.02))):
            async with asyncio.timeout(20):
                while not _has_failed(await deliveries(stores), attempts=2):
                    await asyncio.sleep(0.005)
            async with receiver.running():
                (settled,) = await until_settled(stores)
        assert (settled.state, settled.last_status) == ("delivered", 200)
        assert settled.attempt >= 3
        assert len(receiver.seen) == 1
        verified(receiver.seen[0], mine.secret)

    run(work)


def _has_failed(rows: Sequence[Delivery], attempts: int) -> bool:
    """Whether so many attempts were made, and the last one is settled: an open one is held for a minute."""
    return rows[0].attempt >= attempts and rows[0].next_at < time.time() + 30


def test_every_attempt_has_the_same_id_and_body_and_its_own_time(stores: Stores) -> None:
    async def work() -> None:
        receiver = Receiver(statuses(500, 302, 404, 204))
        async with receiver.running() as base:
            mine = await endpoint(stores, base)
            await finished(stores)
            times = iter(range(int(time.time()) - 100, int(time.time())))
            sender = sender_of(stores, now=lambda: float(next(times)))
            async with sending(sender):
                (settled,) = await until_settled(stores)
            assert (settled.state, settled.attempt, settled.last_status) == ("delivered", 4, 204)
            assert len(receiver.seen) == 4
            assert len({(seen.body, seen.headers["webhook-id"]) for seen in receiver.seen}) == 1
            assert len({seen.headers["webhook-timestamp"] for seen in receiver.seen}) == 4
            for seen in receiver.seen:
                verified(seen, mine.secret)

    run(work)


def test_the_ladder_ends_in_a_dead_letter_that_can_be_sent_again(stores: Stores) -> None:
    async def work() -> None:
        receiver = Receiver(statuses(*[503] * 9, 200))
        async with receiver.running() as base:
            mine = await endpoint(stores, base)
            await finished(stores)
            sender = sender_of(stores)
            async with sending(sender):
                (dead,) = await until_settled(stores)
                assert (dead.state, dead.attempt, dead.last_status) == ("dead", 9, 503)
                assert len(receiver.seen) == 9
                await asyncio.sleep(0.1)
                assert len(receiver.seen) == 9
                again = await stores.access.resend("a", dead.id)
                assert (again.state, again.event_id) == ("pending", dead.event_id)
                sender.wake()
                (settled,) = await until_settled(stores)
            assert settled.state == "delivered"
            assert verified(receiver.seen[9], mine.secret)["id"] == dead.event_id

    run(work)


def test_the_waits_are_those_of_the_ladder_and_a_little_more(stores: Stores) -> None:
    expected = (5, 30, 300, 1800, 7200, 21_600, 43_200, 86_400)
    assert expected == RETRY_LADDER_S

    async def work() -> None:
        await endpoint(stores, "http://127.0.0.1:9/")
        await finished(stores)
        sender = sender_of(stores, SenderSettings(poll_s=0.02))
        for number, wait_s in enumerate(expected, start=1):
            async with sending(sender), asyncio.timeout(20):
                while True:
                    (row,) = await deliveries(stores)
                    left_s = row.next_at - time.time()
                    if row.attempt == number and not 55 < left_s < 60.1:  # a minute: the claim, not the wait
                        break
                    await asyncio.sleep(0.005)
            assert row.state == "pending"
            assert wait_s - 3 < left_s <= 1.2 * wait_s
            shift(stores, schema.delivery, "next_at", -2 * wait_s)
        async with sending(sender):
            (row,) = await until_settled(stores)
        assert (row.state, row.attempt) == ("dead", 9)

    run(work)


def test_gone_disables_the_endpoint_and_buries_what_waits_for_it(stores: Stores) -> None:
    async def work() -> None:
        receiver = Receiver(statuses(410))
        async with receiver.running() as base:
            await endpoint(stores, base)
            await finished(stores)
            await finished(stores, webhook_url=f"{base}/own")
            settings = SenderSettings(ladder_s=FAST.ladder_s, poll_s=0.02, max_parallel=1)
            async with sending(sender_of(stores, settings)):
                settled = await until_settled(stores, 3)
            assert {one.state for one in settled} == {"dead"}
            assert [one.attempt for one in settled] == [1, 1, 1]
            assert len(receiver.seen) == 2
            assert (await stores.access.endpoint("a", "we_1")).is_disabled
            await finished(stores)
            assert len(await deliveries(stores)) == 3

    run(work)


@pytest.mark.parametrize(
    "url", ["https://127.0.0.1/", "https://169.254.169.254/", "https://localhost/", "http://example.com/", "file:///x"]
)
def test_private_receivers_are_never_asked(stores: Stores, url: str) -> None:
    async def work() -> None:
        await finished(stores, webhook_url=url)
        async with sending(sender_of(stores, policy=OutgoingPolicy())):
            (settled,) = await until_settled(stores)
        assert (settled.state, settled.attempt, settled.last_status) == ("dead", 1, None)

    run(work)


def test_a_slow_receiver_holds_nobody_up(stores: Stores) -> None:
    async def work() -> None:
        released = asyncio.Event()

        async def stall(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await released.wait()
            writer.close()

        slow = await asyncio.start_server(stall, "127.0.0.1", 0)
        receiver = Receiver()
        async with slow, receiver.running() as base:
            await finished(stores, webhook_url=f"http://127.0.0.1:{slow.sockets[0].getsockname()[1]}/")
            await endpoint(stores, base)
            await finished(stores)
            settings = SenderSettings(ladder_s=(3600.0,), poll_s=0.02, timeout_s=0.5, max_parallel=2)
            async with sending(sender_of(stores, settings)), asyncio.timeout(20):
                while not receiver.seen:
                    await asyncio.sleep(0.01)
                while (await deliveries(stores))[1].next_at < time.time() + 3000:
                    await asyncio.sleep(0.01)
            slow_one = (await deliveries(stores))[1]
            assert (slow_one.state, slow_one.attempt, slow_one.last_status) == ("pending", 1, None)
            released.set()

    run(work)


def test_attempts_at_once_are_bounded_and_all_are_made(stores: Stores) -> None:
    async def work() -> None:
        open_now = most = 0

        async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal open_now, most
            open_now += 1
            most = max(most, open_now)
            await reader.readuntil(b"\r\n\r\n")
            await asyncio.sleep(0.03)
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
            await writer.drain()
            open_now -= 1
            writer.close()

        server = await asyncio.start_server(count, "127.0.0.1", 0)
        async with server:
            for _ in range(9):
                await finished(stores, webhook_url=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/")
            settings = SenderSettings(poll_s=60.0, max_parallel=3)
            async with sending(sender_of(stores, settings)):
                settled = await until_settled(stores, 9)
            assert {one.state for one in settled} == {"delivered"}
            assert most == 3

    run(work)


def test_waking_beats_the_next_look(stores: Stores) -> None:
    async def work() -> None:
        receiver = Receiver()
        async with receiver.running() as base:
            sender = sender_of(stores, SenderSettings(poll_s=3600.0))
            async with sending(sender):
                await asyncio.sleep(0.1)
                await finished(stores, webhook_url=base)
                sender.wake()
                (settled,) = await until_settled(stores)
            assert settled.state == "delivered"

    run(work)


def test_an_attempt_that_was_cut_off_is_made_again(stores: Stores) -> None:
    async def work() -> None:
        receiver = Receiver()
        async with receiver.running() as base:
            await finished(stores, webhook_url=base)
            assert len(await stores.access.due_deliveries(10, hold_s=0.2)) == 1  # by a process that then vanished
            async with sending(sender_of(stores)):
                (settled,) = await until_settled(stores)
            assert (settled.state, settled.attempt) == ("delivered", 2)

    run(work)


def test_two_secrets_sign_while_a_rotation_is_young(stores: Stores) -> None:
    async def work() -> None:
        receiver = Receiver()
        async with receiver.running() as base:
            old = await endpoint(stores, base)
            new = await stores.access.rotate_secret("a", old.id, new_secret())
            await finished(stores)
            async with sending(sender_of(stores)):
                await until_settled(stores)
            (seen,) = receiver.seen
            assert len(seen.headers["webhook-signature"].split(" ")) == 2
            for secret in (old.secret, new.secret):
                verified(seen, secret)
            shift(stores, schema.webhook_endpoint, "rotated_at", -ROTATION_S - 1)
            await finished(stores)
            async with sending(sender_of(stores)):
                await until_settled(stores, 2)
            verified(receiver.seen[1], new.secret)
            refuted(receiver.seen[1], old.secret)

    run(work)


def test_the_secret_of_a_key_in_the_store_signs_for_its_jobs(stores: Stores) -> None:
    async def work() -> None:
        secret = new_secret()
        await stores.access.add_key(key_id="dbkey", secret="x", tenant_id="a", webhook_secret=secret)
        receiver = Receiver()
        async with receiver.running() as base:
            await finished(stores, webhook_url=base, key_id="dbkey")
            async with sending(sender_of(stores)):
                await until_settled(stores)
        verified(receiver.seen[0], secret)

    run(work)


def test_other_secrets_follow_from_the_signing_keys(stores: Stores) -> None:
    async def work() -> None:
        only = SigningKeys(current=SigningKey(secret=b"a" * 32))
        rotated = SigningKeys(current=SigningKey(secret=b"b" * 32), previous=only.current)
        before = await sender_of(stores, keys=only).secrets_of_key("k1")
        after = await sender_of(stores, keys=rotated).secrets_of_key("k1")
        assert len(before) == 1
        assert after == [derived_secret(rotated.current, "k1"), *before]
        different = {
            derived_secret(key, key_id) for key in (only.current, rotated.current) for key_id in ("k1", "k2", None)
        }
        assert len(different) == 6
        assert all(len(base64.b64decode(secret.removeprefix("whsec_"))) == 32 for secret in different)

    run(work)
