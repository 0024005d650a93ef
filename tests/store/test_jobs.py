"""Jobs as clients see them: made once, listed in order, ended by whoever may."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import sqlalchemy as sa

from helios_serve.errors import ConflictError, NotFoundError, QuotaError
from helios_serve.store import schema
from helios_serve.store.connect import Stores
from helios_serve.store.ending import JobError
from helios_serve.store.errors import EventIdConflictError, IdempotencyKeyReusedError
from helios_serve.store.jobs import canonical_hash
from helios_serve.store.paging import PageRequest
from helios_serve.store.records import Given, Source
from tests.store.helpers import INIT, both, finished, latents, new_job, running, segment

SAME: dict[str, Any] = {"spec": {"prompt": "the same"}}


def shift(stores: Stores, table: sa.Table, column: str, seconds: float) -> None:
    """Moves a time in all rows, as if the clock had moved the other way."""

    def work(connection: sa.Connection) -> None:
        connection.execute(sa.update(table).values({column: table.c[column] + seconds}))

    stores.database.write_now(work)


def test_a_hundred_creates_with_one_key_make_one_job(stores: Stores) -> None:
    async def run() -> None:
        makes = [stores.jobs.create(new_job(**SAME), idempotency_key="k") for _ in range(100)]
        made = await asyncio.gather(*makes)
        assert len({one.job.id for one in made}) == 1
        assert sum(not one.is_replayed for one in made) == 1
        assert len((await stores.jobs.list("a", PageRequest(limit=100))).items) == 1

    asyncio.run(run())


def test_a_key_with_another_body_is_refused(stores: Stores) -> None:
    async def run() -> None:
        await stores.jobs.create(new_job(), idempotency_key="k")
        with pytest.raises(IdempotencyKeyReusedError) as caught:
            await stores.jobs.create(new_job(), idempotency_key="k")
        assert (caught.value.status, caught.value.code) == (422, "idempotency_key_reused")
        other_route = await stores.jobs.create(new_job(route="extend"), idempotency_key="k")
        other_tenant = await stores.jobs.create(new_job(tenant="b"), idempotency_key="k")
        assert not other_route.is_replayed
        assert not other_tenant.is_replayed
        assert len((await stores.jobs.list("a", PageRequest())).items) == 2

    asyncio.run(run())


def test_a_key_answers_with_its_job_for_a_day(stores: Stores) -> None:
    async def run() -> None:
        first = await stores.jobs.create(new_job(**SAME), idempotency_key="k")
        await stores.jobs.cancel("a", first.job.id)
        again = await stores.jobs.create(new_job(**SAME), idempotency_key="k")
        assert again.is_replayed
        assert again.job.state == "cancelled"
        shift(stores, schema.idem, "expires_at", -86_401)
        assert not (await stores.jobs.create(new_job(**SAME), idempotency_key="k")).is_replayed

    asyncio.run(run())


def test_canonical_hash() -> None:
    assert canonical_hash({"a": 1, "b": {"c": [1, 2], "d": "é"}}) == canonical_hash(
        {"b": {"d": "é", "c": [1, 2]}, "a": 1}
    )
    assert canonical_hash({"a": [1, 2]}) != canonical_hash({"a": [2, 1]})
    with pytest.raises(ValueError, match="Out of range float"):
        canonical_hash({"a": float("nan")})


def test_a_retry_joins_a_job_that_runs_or_ended_well(stores: Stores) -> None:
    async def run() -> None:
        async def retry() -> bool:
            made = await stores.jobs.create(new_job(**SAME), is_retry=True)
            if not made.is_replayed:
                await stores.jobs.delete("a", made.job.id)
            return made.is_replayed

        assert not await retry()
        done = await finished(stores, **SAME)
        assert await retry()
        assert not (await stores.jobs.create(new_job(**SAME, tenant="b"), is_retry=True)).is_replayed
        shift(stores, schema.job, "created_at", -61)
        assert not await retry()

        bad = await running(stores, **SAME)
        assert await retry()
        await stores.leases.fail(bad.lease, JobError(code="generation_failed", message="no"))
        assert not await retry()

        gone = await running(stores, **SAME)
        await stores.jobs.cancel("a", gone.id)
        assert not await retry()
        assert done.state == "finished"

    asyncio.run(run())


def test_many_retries_at_once_make_one_job(stores: Stores) -> None:
    async def run() -> None:
        made = await asyncio.gather(*(stores.jobs.create(new_job(**SAME), is_retry=True) for _ in range(30)))
        assert len({one.job.id for one in made}) == 1

    asyncio.run(run())


def test_without_key_and_retry_every_request_is_its_own(stores: Stores) -> None:
    async def run() -> None:
        made = [await stores.jobs.create(new_job(**SAME)) for _ in range(3)]
        assert len({one.job.id for one in made}) == 3

    asyncio.run(run())


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_pages_hold_every_job_once(stores: Stores, order: Any) -> None:
    async def run() -> None:
        made = [(await stores.jobs.create(new_job(id=f"video_{7 * n % 11:02}"))).job.id for n in range(11)]
        await stores.jobs.create(new_job(tenant="b"))

        def tie(connection: sa.Connection) -> None:
            connection.execute(sa.update(schema.job).where(schema.job.c.id.in_(made[3:7])).values(created_at=1.0))

        stores.database.write_now(tie)
        seen, sizes, after = list[str](), list[int](), None
        while True:
            page = await stores.jobs.list("a", PageRequest(after=after, limit=3, order=order))
            seen += [job.id for job in page.items]
            sizes.append(len(page.items))
            if not page.has_more:
                break
            after = seen[-1]
        expected = sorted(made[3:7]) + made[:3] + made[7:]
        assert seen == (expected if order == "asc" else expected[::-1])
        assert sizes == [3, 3, 3, 2]

    asyncio.run(run())


def test_list_by_state_and_after(stores: Stores) -> None:
    async def run() -> None:
        first = (await stores.jobs.create(new_job())).job
        second = (await stores.jobs.create(new_job())).job
        await stores.jobs.cancel("a", first.id)
        cancelled = await stores.jobs.list("a", PageRequest(), states=["cancelled"])
        assert [job.id for job in cancelled.items] == [first.id]
        assert await stores.jobs.counts("a") == {"queued": 1}
        with pytest.raises(NotFoundError, match="after video_x"):
            await stores.jobs.list("a", PageRequest(after="video_x"))
        with pytest.raises(NotFoundError):
            await stores.jobs.list("b", PageRequest(after=second.id))

    asyncio.run(run())


def test_another_tenants_job_is_not_found_by_any_verb(stores: Stores) -> None:
    async def run() -> None:
        job = await running(stores)
        jobs, chunks = stores.jobs, stores.chunks
        calls = [
            jobs.get("b", job.id),
            jobs.cancel("b", job.id),
            jobs.delete("b", job.id),
            jobs.pause("b", job.id),
            jobs.resume("b", job.id),
            jobs.stop("b", job.id),
            jobs.add_control("b", job.id, kind="prompt", payload={}),
            chunks.segments("b", job.id, 0),
            anext(chunks.follow("b", job.id)),
            jobs.create(new_job(tenant="b", source=Source(job_id=job.id, num_chunks=1, num_segments=1))),
        ]
        for call in calls:
            with pytest.raises(NotFoundError):
                await call
        assert (await jobs.get("a", job.id)).state == "running"

    asyncio.run(run())


def test_cancel_fences_the_owner_and_is_final(stores: Stores) -> None:
    async def run() -> None:
        job = await running(stores)
        assert await latents(stores, job.lease, 0)
        cancelled = await stores.jobs.cancel("a", job.id)
        assert (cancelled.state, cancelled.error_code, cancelled.owner) == ("cancelled", "cancelled", None)
        assert await stores.jobs.cancel("a", job.id) == cancelled
        assert not await latents(stores, job.lease, 1)
        assert await segment(stores, job.lease, 0) is None
        assert not await stores.leases.fail(job.lease, JobError(code="x", message="x"))
        assert [notice.why for notice in await stores.leases.notices()] == []  # `fail` let go of it

    asyncio.run(run())


def test_delete_hides_the_job_and_keeps_its_id_for_the_key(stores: Stores) -> None:
    async def run() -> None:
        made = await stores.jobs.create(new_job(**SAME), idempotency_key="k")
        (job,) = await stores.leases.claim(1)
        await stores.leases.start(job.lease)
        await both(stores, job.lease, 0)
        await stores.jobs.delete("a", job.id)
        with pytest.raises(NotFoundError):
            await stores.jobs.get("a", job.id)
        with pytest.raises(NotFoundError):
            await stores.jobs.delete("a", job.id)
        assert (await stores.jobs.list("a", PageRequest())).items == ()
        assert not await latents(stores, job.lease, 1)
        assert [notice.why for notice in await stores.leases.notices()] == ["lost"]
        again = await stores.jobs.create(new_job(**SAME), idempotency_key="k")
        assert (again.is_replayed, again.job.id, again.job.state) == (True, made.job.id, "deleted")
        assert again.job.spec == {}

    asyncio.run(run())


def test_pause_waits_for_the_owner(stores: Stores) -> None:
    async def run() -> None:
        job = await running(stores, num_chunks=None)
        assert (await stores.jobs.pause("a", job.id)).is_pause_requested
        assert [notice.why for notice in await stores.leases.notices()] == ["pause"]
        assert await latents(stores, job.lease, 0)
        assert await stores.leases.paused(job.lease)
        assert (await stores.jobs.get("a", job.id)).state == "paused"
        assert await stores.leases.claim(10) == []
        assert (await stores.jobs.resume("a", job.id)).state == "queued"
        (again,) = await stores.leases.claim(10)
        assert (again.epoch, again.next_chunk) == (2, 1)

    asyncio.run(run())


def test_pause_is_immediate_without_an_owner_and_can_be_taken_back(stores: Stores) -> None:
    async def run() -> None:
        job = (await stores.jobs.create(new_job())).job
        assert (await stores.jobs.pause("a", job.id)).state == "paused"
        assert (await stores.jobs.resume("a", job.id)).state == "queued"
        owned = await running(stores)
        await stores.jobs.pause("a", owned.id)
        assert not (await stores.jobs.resume("a", owned.id)).is_pause_requested
        assert await latents(stores, owned.lease, 0)

    asyncio.run(run())


def test_stop_ends_an_open_job_with_what_it_has(stores: Stores) -> None:
    async def run() -> None:
        job = await running(stores, num_chunks=None)
        assert await both(stores, job.lease, 0)
        assert await latents(stores, job.lease, 1)
        assert (await stores.jobs.stop("a", job.id)).state == "running"
        assert not await latents(stores, job.lease, 2)  # the chunk in flight is not part of the video
        ended = await segment(stores, job.lease, 1)
        assert ended is not None
        assert ended.is_finished

        whole = await running(stores, num_chunks=None)
        await both(stores, whole.lease, 0)
        assert (await stores.jobs.stop("a", whole.id)).state == "finished"
        assert (await stores.jobs.stop("a", whole.id)).state == "finished"
        empty = await running(stores, num_chunks=None)
        assert (await stores.jobs.stop("a", empty.id)).state == "cancelled"

    asyncio.run(run())


def test_controls_are_durable_once_and_applied_once(stores: Stores) -> None:
    async def run() -> None:
        job = await running(stores, num_chunks=None, is_interactive=True)
        add = stores.jobs.add_control
        first = await add("a", job.id, kind="prompt", payload={"prompt": "x"}, event_id="e1")
        assert await add("a", job.id, kind="prompt", payload={"prompt": "x"}, event_id="e1") == first
        with pytest.raises(EventIdConflictError) as caught:
            await add("a", job.id, kind="prompt", payload={"prompt": "y"}, event_id="e1")
        assert caught.value.code == "event_id_conflict"
        second = await add("a", job.id, kind="prompt", payload={"prompt": "z"})
        assert (first.seq, second.seq) == (1, 2)

        assert await latents(stores, job.lease, 0, ctl_seq=1)
        assert [control.applied_chunk for control in await stores.chunks.controls(job.id)] == [0, None]
        assert await latents(stores, job.lease, 1, ctl_seq=2)
        assert [control.applied_chunk for control in await stores.chunks.controls(job.id)] == [0, 1]
        assert await stores.chunks.step_back(job.lease, 0)
        assert await latents(stores, job.lease, 0, ctl_seq=1)
        assert [control.applied_chunk for control in await stores.chunks.controls(job.id)] == [0, 1]

    asyncio.run(run())


def test_a_session_takes_64_pending_messages(stores: Stores) -> None:
    async def run() -> None:
        job = await running(stores, num_chunks=None)
        for _ in range(64):
            await stores.jobs.add_control("a", job.id, kind="prompt", payload={})
        with pytest.raises(QuotaError) as caught:
            await stores.jobs.add_control("a", job.id, kind="prompt", payload={})
        assert caught.value.code == "interaction_queue_full"
        await stores.jobs.cancel("a", job.id)
        with pytest.raises(ConflictError):
            await stores.jobs.add_control("a", job.id, kind="prompt", payload={})

    asyncio.run(run())


def test_an_extension_begins_with_the_chunks_of_its_source(stores: Stores) -> None:
    async def run() -> None:
        old = await finished(stores, num_chunks=3)
        new = new_job(num_chunks=4, source=Source(job_id=old.id, num_chunks=3, num_segments=2))
        made = (await stores.jobs.create(new)).job
        assert (made.next_chunk, made.init_blob, made.pinned_chunk) == (3, old.init_blob, 0)
        (job,) = await stores.leases.claim(1)
        point = await stores.chunks.resume_point(job.lease)
        assert point is not None
        assert (point.num_published, [chunk.idx for chunk in point.undecoded], point.rng) == (2, [2], b"rng 2")
        sources = [await stores.chunks.chunk(old.id, idx) for idx in range(3)]
        assert [chunk.lat_blob for chunk in point.trail] == [chunk.lat_blob for chunk in sources if chunk is not None]
        await stores.leases.start(job.lease)
        await segment(stores, job.lease, 2)
        ended = await both(stores, job.lease, 3)
        assert ended is not None
        assert ended.is_finished
        running_one = await running(stores)
        with pytest.raises(ConflictError):
            await stores.jobs.create(new_job(source=Source(job_id=running_one.id, num_chunks=0, num_segments=0)))

    asyncio.run(run())


def test_a_job_begins_with_segments_of_its_callers(stores: Stores) -> None:
    async def run() -> None:
        init, *media = [await stores.blobs.put(data) for data in (INIT, b"given 0", b"given 1")]
        job = await running(stores, num_chunks=3, pinned_chunk=None, given=Given(init=init, segments=tuple(media)))
        assert (job.next_chunk, job.init_blob, job.bytes_stored) == (2, init.key, len(INIT) + 14)
        point = await stores.chunks.resume_point(job.lease)
        assert point is not None
        assert (point.next_chunk, point.num_published, point.rng, point.undecoded) == (2, 2, None, ())
        shown = (await stores.chunks.segments("a", job.id, 0)).chunks
        assert [(chunk.seg_blob, chunk.seg_frames, chunk.lat_blob) for chunk in shown] == [
            (blob.key, 33, None) for blob in media
        ]
        ended = await both(stores, job.lease, 2)
        assert ended is not None
        assert (ended.is_finished, ended.num_published) == (True, 3)
        await stores.retention.tidy()
        again = new_job(num_chunks=4, pinned_chunk=None, source=Source(job_id=job.id, num_chunks=3, num_segments=3))
        await stores.jobs.create(again)
        (job,) = await stores.leases.claim(1, job_id=again.id)
        point = await stores.chunks.resume_point(job.lease)
        assert point is not None
        assert [chunk.lat_blob is None for chunk in point.trail] == [True, True, False]

    asyncio.run(run())


def test_bytes_stored_follow_what_is_kept(stores: Stores) -> None:
    async def run() -> None:
        job = await finished(stores)
        held = await stores.jobs.bytes_stored("a")
        rows = (await stores.chunks.segments("a", job.id, 0)).chunks
        assert held == sum(row.lat_bytes + row.seg_bytes for row in rows) + len(b"ftyp moov")
        await stores.jobs.delete("a", job.id)
        assert await stores.jobs.bytes_stored("a") == 0

    asyncio.run(run())
