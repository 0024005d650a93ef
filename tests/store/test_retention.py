"""What stays after the end, and what is swept."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from helios_serve.errors import NotFoundError
from helios_serve.store import retention, schema
from helios_serve.store.connect import Stores
from helios_serve.store.ending import JobError
from helios_serve.store.errors import BlobMissingError
from helios_serve.store.paging import PageRequest
from helios_serve.store.records import Job
from tests.store.conftest import OpenStores
from tests.store.helpers import both, finished, latents_of, media_of, new_job, running
from tests.store.test_jobs import shift

DAY = 86_400


def age(root: Path) -> None:
    """Makes all blobs look old, as the next process sees them."""
    for path in root.rglob("*"):
        os.utime(path, (0, 0))


async def kept_latents(stores: Stores, job: Job) -> list[int]:
    rows = [await stores.chunks.chunk(job.id, idx) for idx in range(job.next_chunk)]
    return [row.idx for row in rows if row is not None and row.lat_blob is not None]


def test_a_finished_job_keeps_what_extending_it_needs(stores: Stores) -> None:
    async def run() -> None:
        job = await finished(stores, num_chunks=7)
        skipping = await finished(stores, num_chunks=7, pinned_chunk=1)
        from_image = await finished(stores, num_chunks=7, pinned_chunk=None)
        live = await running(stores, num_chunks=7)
        await both(stores, live.lease, 0)
        assert await stores.retention.tidy() == 3
        assert await kept_latents(stores, job) == [0, 4, 5, 6]
        assert await kept_latents(stores, skipping) == [1, 4, 5, 6]
        assert await kept_latents(stores, from_image) == [4, 5, 6]
        assert (await stores.chunks.chunk(live.id, 0)) is not None
        last = await stores.chunks.chunk(job.id, 6)
        assert last is not None
        assert last.rng == b"rng 6"
        shown = (await stores.chunks.segments("a", job.id, 0)).chunks
        assert len(shown) == 7
        assert all(row.seg_blob for row in shown)
        after = await stores.jobs.get("a", job.id)
        assert after.bytes_stored == 9 + sum(row.lat_bytes + row.seg_bytes for row in shown)
        assert await stores.retention.tidy() == 0

    asyncio.run(run())


def test_a_first_frame_of_its_own_replaces_the_pinned_chunk(stores: Stores) -> None:
    async def run() -> None:
        job = await running(stores, num_chunks=5)
        first = await stores.blobs.put(b"first frame")
        await both(stores, job.lease, 0)
        assert await stores.leases.attach(job.lease, "first", first)
        for chunk in range(1, 5):
            await both(stores, job.lease, chunk)
        await stores.retention.tidy()
        ended = await stores.jobs.get("a", job.id)
        assert ended.first_blob == first.key
        assert await kept_latents(stores, ended) == [2, 3, 4]

    asyncio.run(run())


def test_a_failed_job_keeps_its_segments_only(stores: Stores) -> None:
    async def run() -> None:
        job = await running(stores)
        await both(stores, job.lease, 0)
        await stores.leases.fail(job.lease, JobError(code="generation_failed", message="no"))
        await stores.retention.tidy()
        ended = await stores.jobs.get("a", job.id)
        assert await kept_latents(stores, ended) == []
        assert len((await stores.chunks.segments("a", job.id, 0)).chunks) == 1

    asyncio.run(run())


def test_keep_latents(opened: OpenStores) -> None:
    async def run() -> None:
        stores = opened(keep_latents=True)
        job = await finished(stores, num_chunks=5)
        assert await stores.retention.tidy() == 0
        assert await kept_latents(stores, job) == [0, 1, 2, 3, 4]

    asyncio.run(run())


def test_outputs_expire_and_the_row_stays_a_week(stores: Stores) -> None:
    async def run() -> None:
        job = await finished(stores)
        await stores.jobs.attach_video(job.id, await stores.blobs.put(b"mp4"))
        young = await finished(stores, ttl_s=2 * DAY)
        shift(stores, schema.job, "expires_at", -DAY - 1)
        await stores.retention.tidy()
        gone = await stores.jobs.get("a", job.id)
        assert (gone.state, gone.is_expired, gone.video_blob, gone.bytes_stored) == ("finished", True, None, 0)
        assert gone.next_chunk == 2
        assert (await stores.chunks.segments("a", job.id, 0)).chunks == ()
        assert not (await stores.jobs.get("a", young.id)).is_expired

        shift(stores, schema.job, "purged_at", -7 * DAY + 60)
        await stores.retention.tidy()
        assert await stores.jobs.get("a", job.id)
        shift(stores, schema.job, "purged_at", -120)
        await stores.retention.tidy()
        with pytest.raises(NotFoundError):
            await stores.jobs.get("a", job.id)
        assert [one.id for one in (await stores.jobs.list("a", PageRequest())).items] == [young.id]

    asyncio.run(run())


def test_deleted_jobs_and_old_keys_are_forgotten(stores: Stores) -> None:
    async def run() -> None:
        made = await stores.jobs.create(new_job(), idempotency_key="k")
        await stores.jobs.delete("a", made.job.id)
        await stores.retention.tidy()
        assert _count(stores, schema.job) == 1
        assert _count(stores, schema.idem) == 1
        shift(stores, schema.job, "purged_at", -DAY - 1)
        await stores.retention.tidy()
        assert _count(stores, schema.job) == 0
        assert _count(stores, schema.idem) == 0

    asyncio.run(run())


@pytest.mark.parametrize("in_memory", [500_000, 1])
def test_the_sweep_deletes_what_no_row_names(
    opened: OpenStores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: int
) -> None:
    monkeypatch.setattr(retention, "KEYS_IN_MEMORY", in_memory)

    async def run() -> None:
        stores = opened()
        kept, dropped = await finished(stores), await finished(stores)
        live = await running(stores)
        await both(stores, live.lease, 0)
        stored = await stores.blobs.put(b"an upload")
        new = {"id": "file_1", "tenant": "a", "filename": "x.png", "purpose": "input", "content_type": "image/png"}
        await stores.access.add_file({**new, "num_bytes": stored.num_bytes, "blob": stored.key}, ttl_s=60)
        orphan = await stores.blobs.put(b"put, and the process died before the commit")
        await stores.jobs.delete("a", dropped.id)

        assert (await stores.retention.sweep()).num_blobs == 0  # all are young
        age(tmp_path / "blobs")
        assert (await stores.retention.sweep()).num_blobs == 0  # and this process knows that they are
        stores.blobs._put_at.clear()
        swept = await stores.retention.sweep()
        gone = [latents_of(dropped.id, 0), media_of(dropped.id, 0), latents_of(dropped.id, 1), media_of(dropped.id, 1)]
        assert swept.num_blobs == 5
        assert swept.num_bytes == sum(map(len, gone)) + orphan.num_bytes
        for job, chunks in ((kept, 2), (live, 1)):
            for row in (await stores.chunks.segments("a", job.id, 0)).chunks:
                assert await stores.blobs.get(str(row.lat_blob)) == latents_of(job.id, row.idx)
                assert await stores.blobs.get(str(row.seg_blob)) == media_of(job.id, row.idx)
                assert row.idx < chunks
        assert await stores.blobs.get(stored.key) == b"an upload"
        with pytest.raises(BlobMissingError):
            await stores.blobs.get(orphan.key)
        assert (await stores.retention.sweep()).num_blobs == 0
        last = await both(stores, live.lease, 1)
        assert last is not None
        assert last.is_finished

    asyncio.run(run())


def test_every_blob_column_is_known_to_the_sweep() -> None:
    named = {str(column) for column in retention.BLOB_COLUMNS}
    tables = schema.metadata.tables.values()
    holding = {str(column) for table in tables for column in table.c if column.name.endswith("blob")}
    assert named == holding


def _count(stores: Stores, table: sa.Table) -> int:
    def work(connection: sa.Connection) -> Any:
        return connection.scalar(sa.select(sa.func.count()).select_from(table))

    return int(stores.database.read_now(work))
