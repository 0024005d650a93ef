"""Commits: in order, once, fenced by the epoch, published without gaps."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa

from helios_serve.store.connect import Stores
from helios_serve.store.errors import DataLossError
from helios_serve.store.paging import PageRequest
from helios_serve.store.records import LatentsCommit, Lease, SegmentCommit
from tests.store.conftest import OpenStores
from tests.store.helpers import INIT, both, finished, latents, media_of, new_job, running, segment


def test_a_job_from_creation_to_its_last_segment(stores: Stores) -> None:
    async def run() -> None:
        await stores.access.add_endpoint(endpoint_id="we_1", tenant_id="a", url="https://x", secret="s")
        await stores.access.add_endpoint(
            endpoint_id="we_2", tenant_id="a", url="https://y", secret="s", event_types=["video.failed"]
        )
        new = new_job(webhook_url="https://hook", key_id="key_1")
        await stores.jobs.create(new)
        (job,) = await stores.leases.claim(1)
        assert (job.state, job.epoch, job.owner) == ("queued", 1, stores.leases.owner)
        assert not await latents(stores, job.lease, 0)  # not running yet
        assert await stores.leases.start(job.lease)
        assert await both(stores, job.lease, 0)
        assert (await stores.access.deliveries("a", PageRequest())).items == ()
        last = await both(stores, job.lease, 1)
        assert last is not None
        assert (last.num_published, last.is_finished) == (2, True)

        ended = await stores.jobs.get("a", job.id)
        assert (ended.state, ended.owner, ended.lease_until, ended.error) == ("finished", None, None, None)
        assert ended.ended_at is not None
        assert ended.expires_at == pytest.approx(ended.ended_at + 86_400, abs=1)
        deliveries = (await stores.access.deliveries("a", PageRequest())).items
        assert {(one.event_type, one.url, one.key_id) for one in deliveries} == {
            ("video.completed", "https://x", None),
            ("video.completed", "https://hook", "key_1"),
        }
        assert len({one.event_id for one in deliveries}) == 1
        assert stores.leases.held == ()

    asyncio.run(run())


def test_commits_come_in_order_and_once(stores: Stores) -> None:
    async def run() -> None:
        job = await running(stores, num_chunks=3)
        assert not await latents(stores, job.lease, 1)
        assert await latents(stores, job.lease, 0)
        other = await stores.blobs.put(b"other latents")
        assert not await stores.chunks.commit_latents(job.lease, LatentsCommit(chunk=0, latents=other, rng=b""))
        assert await segment(stores, job.lease, 1) is None  # its DiT half is missing
        assert await segment(stores, job.lease, 0)
        init = await stores.blobs.put(INIT)
        changed = SegmentCommit(chunk=0, segment=other, init=init, num_frames=33)
        assert await stores.chunks.commit_segment(job.lease, changed) is None
        (row,) = (await stores.chunks.segments("a", job.id, 0)).chunks
        assert await stores.blobs.get(str(row.seg_blob)) == media_of(job.id, 0)

    asyncio.run(run())


def test_a_commit_sent_twice_is_one_commit(stores: Stores) -> None:
    async def run() -> None:
        job = await running(stores)
        for chunk in range(2):
            assert await latents(stores, job.lease, chunk)
            assert await latents(stores, job.lease, chunk)
            first = await segment(stores, job.lease, chunk)
            assert first is not None
            again = await segment(stores, job.lease, chunk)
            assert again is not None
            assert (again.num_published, again.is_finished) == (first.num_published, first.is_finished)
        deliveries = await stores.access.deliveries("a", PageRequest())
        row = await stores.jobs.get("a", job.id)
        held = (await stores.chunks.segments("a", job.id, 0)).chunks
        assert deliveries.items == ()
        assert row.bytes_stored == sum(chunk.lat_bytes + chunk.seg_bytes for chunk in held) + len(INIT)

    asyncio.run(run())


def test_segments_show_without_gaps(stores: Stores) -> None:
    async def run() -> None:
        job = await running(stores, num_chunks=4)
        for chunk in range(3):
            await latents(stores, job.lease, chunk)
        for chunk, num_published in ((2, 0), (0, 1), (1, 3)):
            committed = await segment(stores, job.lease, chunk)
            assert committed is not None
            assert committed.num_published == num_published
            shown = (await stores.chunks.segments("a", job.id, 0)).chunks
            assert [row.idx for row in shown] == list(range(num_published))
        assert [row.idx for row in (await stores.chunks.segments("a", job.id, 2)).chunks] == [2]
        assert [row.idx for row in (await stores.chunks.segments("a", job.id, 0, limit=2)).chunks] == [0, 1]

    asyncio.run(run())


def test_another_epoch_changes_nothing(stores: Stores) -> None:
    async def run() -> None:
        job = await running(stores)
        stale = replace(job.lease, epoch=job.epoch - 1)
        leases = stores.leases
        blob = await stores.blobs.put(b"x")
        assert not await latents(stores, stale, 0)
        assert not await leases.start(stale)
        assert not await leases.attach(stale, "seed", blob)
        assert not await leases.paused(stale)
        assert await leases.dispatched([stale]) == set()
        assert not await stores.chunks.step_back(stale, 0)
        assert await stores.chunks.resume_point(stale) is None
        assert not leases.may_publish(stale)
        assert await latents(stores, job.lease, 0)
        assert await segment(stores, stale, 0) is None

    asyncio.run(run())


def test_the_initialisation_segment_must_not_change(stores: Stores) -> None:
    async def run() -> None:
        job = await running(stores)
        await both(stores, job.lease, 0)
        await latents(stores, job.lease, 1)
        other, media = await stores.blobs.put(b"other init"), await stores.blobs.put(b"media")
        with pytest.raises(DataLossError, match="initialisation segment of chunk 1"):
            await stores.chunks.commit_segment(
                job.lease, SegmentCommit(chunk=1, segment=media, init=other, num_frames=33)
            )

    asyncio.run(run())


def test_step_back_only_over_unpublished_chunks(stores: Stores) -> None:
    async def run() -> None:
        job = await running(stores, num_chunks=4)
        await both(stores, job.lease, 0)
        await latents(stores, job.lease, 1)
        await latents(stores, job.lease, 2)
        await segment(stores, job.lease, 2)
        before = await stores.jobs.get("a", job.id)
        assert not await stores.chunks.step_back(job.lease, 0)
        assert not await stores.chunks.step_back(job.lease, 3)
        assert await stores.chunks.step_back(job.lease, 1)
        after = await stores.jobs.get("a", job.id)
        assert (after.next_chunk, (await stores.chunks.chunk(job.id, 2))) == (1, None)
        assert after.bytes_stored < before.bytes_stored
        point = await stores.chunks.resume_point(job.lease)
        assert point is not None
        assert (point.next_chunk, point.rng) == (1, b"rng 0")
        for chunk in (1, 2, 3):
            last = await both(stores, job.lease, chunk)
        assert last is not None
        assert last.is_finished

    asyncio.run(run())


def test_what_a_new_owner_needs(opened: OpenStores) -> None:
    async def run() -> None:
        first = opened()
        job = await running(first, num_chunks=8)
        seed = await first.blobs.put(b"seed latents")
        assert await first.leases.attach(job.lease, "seed", seed, rng=b"rng of the seed")
        point = await first.chunks.resume_point(job.lease)
        assert point is not None
        assert (point.next_chunk, point.rng, point.trail, point.pinned) == (0, b"rng of the seed", (), None)
        for chunk in range(5):
            await latents(first, job.lease, chunk)
        for chunk in (0, 1, 3):
            await segment(first, job.lease, chunk)
        point = await first.chunks.resume_point(job.lease)
        assert point is not None
        assert (point.next_chunk, point.rng, point.num_published) == (5, b"rng 4", 2)
        assert [chunk.idx for chunk in point.trail] == [2, 3, 4]
        assert [chunk.idx for chunk in point.undecoded] == [2, 4]
        assert point.pinned is not None
        assert point.pinned.idx == 0

    asyncio.run(run())


def test_followers_see_every_segment_and_the_end(opened: OpenStores, database_url: str | None) -> None:
    async def run() -> None:
        owner = opened("one")
        reader = owner if database_url is None else opened("two")
        job = await running(owner, num_chunks=70)
        seen: list[int] = []

        async def follow() -> str:
            async for page in reader.chunks.follow("a", job.id, 1):
                seen.extend(chunk.idx for chunk in page.chunks)
                state = page.job.state
            return state

        async def make() -> None:
            for chunk in range(70):
                await both(owner, job.lease, chunk)

        state, _ = await asyncio.gather(follow(), make())
        assert (state, seen) == ("finished", list(range(1, 70)))
        async with asyncio.timeout(5):
            assert [page async for page in reader.chunks.follow("a", job.id, 70)][-1].job.state == "finished"

    asyncio.run(run())


def test_finished_data_can_be_declared_lost(stores: Stores) -> None:
    async def run() -> None:
        job = await finished(stores)
        video = await stores.blobs.put(b"mp4")
        await stores.jobs.attach_video(job.id, video)
        await stores.jobs.attach_video(job.id, await stores.blobs.put(b"another"))
        assert (await stores.jobs.get("a", job.id)).video_blob == video.key
        assert await stores.leases.lose_data(job.id, "segment 0 is damaged")
        lost = await stores.jobs.get("a", job.id)
        assert (lost.state, lost.error_code, lost.error) == ("failed", "data_loss", "segment 0 is damaged")
        assert not await stores.leases.lose_data(job.id, "again")

    asyncio.run(run())


def test_an_unknown_job_has_no_chunks(stores: Stores) -> None:
    async def run() -> None:
        nobody = Lease(job_id="video_none", epoch=1)
        assert not await latents(stores, nobody, 0)
        assert await segment(stores, nobody, 0) is None

    asyncio.run(run())


@contextmanager
def statements(stores: Stores) -> Iterator[list[tuple[str, Any]]]:
    """What is sent to the database meanwhile, with its parameters; not where transactions begin."""
    sent: list[tuple[str, Any]] = []

    def note(connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if not statement.startswith("BEGIN"):
            sent.append((statement, parameters))

    engine = stores.database._engine
    sa.event.listen(engine, "before_cursor_execute", note)
    yield sent
    sa.event.remove(engine, "before_cursor_execute", note)


def test_a_segment_costs_the_database_three_statements(stores: Stores) -> None:
    """Each is a round trip, before which nobody is shown the segment."""

    async def run() -> None:
        job = await running(stores, num_chunks=3)
        await both(stores, job.lease, 0)
        assert await latents(stores, job.lease, 1)
        with statements(stores) as sent:
            committed = await segment(stores, job.lease, 1)
        assert [statement.split()[0] for statement, _ in sent] == ["UPDATE", "UPDATE", "SELECT"]
        assert committed is not None
        assert committed.standing == await stores.chunks.standing("a", job.id)

    asyncio.run(run())


def test_a_segment_that_closes_a_gap_publishes_all_behind_it(stores: Stores) -> None:
    async def run() -> None:
        job = await running(stores, num_chunks=4)
        for chunk in range(3):
            assert await latents(stores, job.lease, chunk)
        for chunk, num_published in ((2, 0), (0, 1), (1, 3)):
            committed = await segment(stores, job.lease, chunk)
            assert committed is not None
            assert committed.num_published == num_published
            assert committed.standing == await stores.chunks.standing("a", job.id)

    asyncio.run(run())


def test_a_job_with_segments_has_an_init_at_every_moment(stores: Stores) -> None:
    """A first segment that is committed while another process looks is seen whole or not at all."""

    async def run() -> None:
        job, loop = await running(stores), asyncio.get_running_loop()
        assert await latents(stores, job.lease, 0)
        commits: list[Any] = []

        def commit(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
            if not commits and not statement.startswith("BEGIN"):
                commits.append(None)  # before its own statements come here
                commits.append(asyncio.run_coroutine_threadsafe(segment(stores, job.lease, 0), loop).result(10))

        engine = stores.database._engine
        sa.event.listen(engine, "after_cursor_execute", commit)
        page = await stores.chunks.segments("a", job.id, 0)
        sa.event.remove(engine, "after_cursor_execute", commit)
        assert commits[1].num_published == 1
        assert (page.job.init_blob is None) == (page.chunks == ())

    asyncio.run(run())


def test_how_far_a_job_is_published_takes_no_look_at_each_of_its_chunks(opened: OpenStores) -> None:
    stores = opened()
    if stores.database.is_postgres:
        pytest.skip("Postgres reads a table of a few rows whole, whatever its indexes")

    async def run() -> list[str]:
        job = await running(stores)
        await both(stores, job.lease, 0)
        with statements(stores) as sent:
            await stores.chunks.standing("a", job.id)
        (asked,) = [one for one in sent if "min(" in one[0]]

        def plan(connection: sa.Connection) -> list[str]:
            return [row.detail for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {asked[0]}", asked[1])]

        return await stores.database.read(plan)

    searches = [line for line in asyncio.run(run()) if "chunk" in line]
    assert ["ix_chunk_undecoded" in line for line in searches] == [True, False]
    assert all(line.startswith("SEARCH") for line in searches)
