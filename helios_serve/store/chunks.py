"""The chunks of a job: committed in two halves, in order, exactly once; read by whoever shows or resumes the job.

Put the blobs first, then commit, then publish. A commit that is sent twice, because its first answer was lost, is the
same commit.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import sqlalchemy as sa

from helios_serve.store.blobs import BlobStore
from helios_serve.store.database import Database, fields_of
from helios_serve.store.ending import end_job
from helios_serve.store.errors import DataLossError
from helios_serve.store.jobs import is_owned, job_record, missing, num_undecoded
from helios_serve.store.leases import Leases, fence
from helios_serve.store.records import (
    RUNNABLE,
    BlobRef,
    Chunk,
    Committed,
    Control,
    Job,
    LatentsCommit,
    Lease,
    ResumePoint,
    SegmentCommit,
    Segments,
    Standing,
)
from helios_serve.store.schema import chunk, control, db_now, job
from helios_serve.types import NUM_TRAIL_CHUNKS

POLL_S = (0.1, 0.25)
"""How long a reader waits, at least and at most, before it looks for what another process committed."""

PAGE_CHUNKS = 64


class Chunks:
    """One for each process. Commits prolong the job's lease."""

    def __init__(self, database: Database, leases: Leases, blobs: BlobStore) -> None:
        self._db = database
        self._leases = leases
        self._blobs = blobs
        self._readers: defaultdict[str, set[asyncio.Event]] = defaultdict(set)

    async def commit_latents(self, lease: Lease, commit: LatentsCommit) -> bool:
        """The DiT half of the next chunk; applies the controls up to `ctl_seq`. False: fenced, drop the result."""
        return await self._latents_committed(
            lease, self._db.write(_commit_latents, lease, commit, self._leases.lease_s)
        )

    async def keep_latents(
        self, lease: Lease, make: Callable[[], bytes], commit: Callable[[BlobRef], LatentsCommit]
    ) -> bool:
        """Puts the blob that `make` returns, in a thread, and commits it. Raises: as `BlobStore.put_then`."""
        begin, lease_s = self._db.begin_write, self._leases.lease_s
        kept = self._blobs.put_then(make, lambda blob: begin(_commit_latents, lease, commit(blob), lease_s))
        return await self._latents_committed(lease, kept)

    async def _latents_committed(self, lease: Lease, committing: Awaitable[bool]) -> bool:
        sent_at = self._leases.now()
        is_committed = await committing
        if is_committed:
            self._leases.renewed(lease, sent_at)
        return is_committed

    async def commit_segment(self, lease: Lease, commit: SegmentCommit) -> Committed | None:
        """The VAE half of a chunk whose DiT half is committed; the last one finishes the job and writes its webhook
        deliveries. None: fenced, drop the result.

        Raises: DataLossError when the initialisation segment differs from the job's.
        """
        return await self._segment_committed(
            lease, self._db.write(_commit_segment, lease, commit, self._leases.lease_s)
        )

    async def keep_segment(
        self, lease: Lease, media: bytes, commit: Callable[[BlobRef], SegmentCommit]
    ) -> Committed | None:
        """Puts the blob and commits it. Raises: as `commit_segment` and `BlobStore.put_then`."""
        begin, lease_s = self._db.begin_write, self._leases.lease_s
        kept = self._blobs.put_then(lambda: media, lambda blob: begin(_commit_segment, lease, commit(blob), lease_s))
        return await self._segment_committed(lease, kept)

    async def _segment_committed(self, lease: Lease, committing: Awaitable[Committed | None]) -> Committed | None:
        sent_at = self._leases.now()
        committed = await committing
        if committed is not None:
            self._leases.renewed(lease, sent_at)
            if committed.is_finished:
                self._leases.finished(lease)
            self.wake(lease.job_id)
        return committed

    async def step_back(self, lease: Lease, idx: int) -> bool:
        """The latents of chunk `idx` are lost: forgets it and those after it, to be made again. Controls keep the
        chunks that they were applied to. False: fenced, or the segment was published."""
        return await self._db.write(_step_back, lease, idx)

    async def resume_point(self, lease: Lease) -> ResumePoint | None:
        """What a new owner needs to go on; None: fenced."""
        return await self._db.read(_resume_point, lease)

    async def chunk(self, job_id: str, idx: int) -> Chunk | None:
        """A chunk's row; None when it is not committed."""
        return await self._db.read(_chunk, job_id, idx)

    async def standing(self, tenant_id: str, job_id: str) -> Standing:
        """The job and how far it is published, at one moment.

        Raises: NotFoundError.
        """
        return await self._db.read(_standing, tenant_id, job_id)

    async def standings(self, jobs: Sequence[Job]) -> list[Standing]:
        """How far these jobs are published."""
        return await self._db.read(_standings, jobs)

    async def segments(self, tenant_id: str, job_id: str, start: int, *, limit: int = PAGE_CHUNKS) -> Segments:
        """Published segments from `start` on: of 0 to k only when all of these are committed.

        Raises: NotFoundError.
        """
        return await self._db.read(_segments, tenant_id, job_id, start, limit)

    async def follow(self, tenant_id: str, job_id: str, start: int = 0) -> AsyncIterator[Segments]:
        """Segments from `start` on as they are published, by any process; the last answer shows the ended job.

        Raises: NotFoundError, also when the job is deleted meanwhile.
        """
        event = asyncio.Event()
        self._readers[job_id].add(event)
        try:
            while True:
                event.clear()
                page = await self.segments(tenant_id, job_id, start)
                start += len(page.chunks)
                has_ended = page.job.state not in (*RUNNABLE, "paused")
                if page.chunks or has_ended:
                    yield page
                if has_ended and len(page.chunks) < PAGE_CHUNKS:
                    return
                if not page.chunks:
                    await self._wait(event)
        finally:
            self._readers[job_id].discard(event)
            if not self._readers[job_id]:
                del self._readers[job_id]

    def wake(self, job_id: str) -> None:
        """Readers of the job in this process look again at once; call it when a verb changed the job's state."""
        for event in self._readers.get(job_id, ()):
            event.set()

    async def controls(self, job_id: str) -> list[Control]:
        """All messages to a session, in order."""
        return await self._db.read(_controls, job_id)

    async def _wait(self, event: asyncio.Event) -> None:
        try:
            async with asyncio.timeout(random.uniform(*POLL_S)):
                await event.wait()
        except TimeoutError:
            return


def chunk_record(row: sa.Row[Any]) -> Chunk:
    return Chunk(**fields_of(chunk, row))


def _commit_latents(connection: sa.Connection, lease: Lease, commit: LatentsCommit, lease_s: float) -> bool:
    k = commit.chunk
    moved = connection.execute(
        sa.update(job)
        .where(
            job.c.id == lease.job_id,
            job.c.epoch == lease.epoch,
            job.c.next_chunk == k,
            job.c.state == "running",
            sa.or_(job.c.num_chunks.is_(None), job.c.num_chunks > k),
        )
        .values(
            next_chunk=k + 1,
            lease_until=_prolonged(lease_s),
            attempts=0,
            in_flight=None,
            is_suspect=False,
            solo_crashes=0,
            bytes_stored=job.c.bytes_stored + commit.latents.num_bytes,
            **({} if commit.pinned_chunk is None else {"pinned_chunk": commit.pinned_chunk}),
        )
    )
    if moved.rowcount == 0:
        return _is_done(connection, lease, k, "lat_blob", commit.latents.key)
    connection.execute(
        sa.insert(chunk).values(
            job_id=lease.job_id,
            idx=k,
            epoch=lease.epoch,
            attempt=commit.attempt,
            lat_blob=commit.latents.key,
            lat_bytes=commit.latents.num_bytes,
            rng=commit.rng,
            ctl_seq=commit.ctl_seq,
            dit_stats=commit.stats,
        )
    )
    if commit.ctl_seq > 0:
        pending = (control.c.job_id == lease.job_id, control.c.seq <= commit.ctl_seq, control.c.applied_chunk.is_(None))
        connection.execute(sa.update(control).where(*pending).values(applied_chunk=k))
    return True


def _commit_segment(connection: sa.Connection, lease: Lease, commit: SegmentCommit, lease_s: float) -> Committed | None:
    init, segment = commit.init, commit.segment
    row = connection.execute(
        sa.update(job)
        .where(job.c.id == lease.job_id, job.c.epoch == lease.epoch, job.c.state == "running")
        .values(
            lease_until=_prolonged(lease_s),
            init_blob=sa.func.coalesce(job.c.init_blob, init.key),
            bytes_stored=job.c.bytes_stored
            + segment.num_bytes
            + sa.case((job.c.init_blob.is_(None), init.num_bytes), else_=0),
        )
        .returning(job)
    ).one_or_none()
    if row is None:  # after the last segment the job is no longer running
        is_done = _is_done(connection, lease, commit.chunk, "seg_blob", segment.key)
        return _progress(connection, lease.job_id) if is_done else None
    owned = job_record(row)
    if owned.init_blob != init.key:
        raise DataLossError(f"video {lease.job_id}: the initialisation segment of chunk {commit.chunk} is another one")
    placed = connection.execute(
        sa.update(chunk)
        .where(chunk.c.job_id == lease.job_id, chunk.c.idx == commit.chunk, chunk.c.seg_blob.is_(None))
        .values(
            seg_blob=segment.key,
            seg_bytes=segment.num_bytes,
            seg_frames=commit.num_frames,
            vae_stats=commit.stats,
        )
        .returning(chunk)
    ).one_or_none()
    if placed is None:
        returned = {"bytes_stored": job.c.bytes_stored - segment.num_bytes}
        connection.execute(sa.update(job).where(job.c.id == lease.job_id).values(**returned))
        is_done = _is_done(connection, lease, commit.chunk, "seg_blob", segment.key)
        return _progress(connection, lease.job_id) if is_done else None
    if owned.num_chunks == owned.next_chunk and num_undecoded(connection, lease.job_id) == 0:
        end_job(connection, lease.job_id, old="running", epoch=lease.epoch, new="finished")
        return _progress(connection, lease.job_id)
    num_published = _num_published(connection, owned.id)
    return Committed(standing=_standing_of(connection, owned, num_published, chunk_record(placed)))


def _prolonged(lease_s: float) -> sa.ColumnElement[Any]:
    """A job that was given back while its commit was under way stays free."""
    return sa.case((job.c.owner.is_not(None), db_now() + lease_s), else_=sa.null())


def _is_done(connection: sa.Connection, lease: Lease, idx: int, half: str, key: str) -> bool:
    """Whether an earlier sending of this very commit succeeded."""
    epoch = connection.scalar(sa.select(job.c.epoch).where(job.c.id == lease.job_id))
    found = connection.scalar(sa.select(chunk.c[half]).where(chunk.c.job_id == lease.job_id, chunk.c.idx == idx))
    return bool(epoch == lease.epoch and found == key)


def _progress(connection: sa.Connection, job_id: str) -> Committed:
    row = connection.execute(sa.select(job).where(job.c.id == job_id)).one()
    return Committed(standing=_standing_of(connection, job_record(row), _num_published(connection, job_id)))


def _published(job_id: Any) -> sa.ColumnElement[int]:
    """How many segments of a job are published: k + 1 when both halves of chunks 0 to k are committed and those of
    k + 1 are not. Rows have no gaps."""
    rows = chunk.c.job_id == job_id
    first_open = sa.select(sa.func.min(chunk.c.idx)).where(rows, chunk.c.seg_blob.is_(None)).scalar_subquery()
    last = sa.select(sa.func.max(chunk.c.idx)).where(rows).scalar_subquery()
    return sa.func.coalesce(first_open, last + 1, 0)


def _num_published(connection: sa.Connection, job_id: str) -> int:
    return connection.execute(sa.select(_published(job_id))).scalar_one()


def _owned(connection: sa.Connection, tenant_id: str, job_id: str) -> tuple[Job, int]:
    """The tenant's job and how many of its segments are published, in one statement: on Postgres each sees another
    moment, and a job without an init must not have segments, nor one that has ended lack any.

    Raises: NotFoundError.
    """
    query = sa.select(job, _published(job.c.id)).where(is_owned(tenant_id, job_id))
    row = connection.execute(query).one_or_none()
    if row is None:
        raise missing(job_id)
    *columns, num_published = row
    return Job(**fields_of(job, columns)), num_published


def _step_back(connection: sa.Connection, lease: Lease, idx: int) -> bool:
    owned = connection.execute(sa.select(job.c.next_chunk).where(fence(lease)).with_for_update()).one_or_none()
    if owned is None or idx >= owned.next_chunk or _num_published(connection, lease.job_id) > idx:
        return False
    rows = sa.and_(chunk.c.job_id == lease.job_id, chunk.c.idx >= idx)
    num_bytes = connection.scalar(sa.select(sa.func.sum(chunk.c.lat_bytes + chunk.c.seg_bytes)).where(rows))
    connection.execute(sa.delete(chunk).where(rows))
    values = {"next_chunk": idx, "bytes_stored": job.c.bytes_stored - int(num_bytes or 0)}
    connection.execute(sa.update(job).where(fence(lease)).values(**values))
    return True


def _resume_point(connection: sa.Connection, lease: Lease) -> ResumePoint | None:
    row = connection.execute(sa.select(job).where(fence(lease))).one_or_none()
    if row is None:
        return None
    owned = job_record(row)
    rows = sa.select(chunk).where(chunk.c.job_id == owned.id).order_by(chunk.c.idx)
    trail = connection.execute(rows.where(chunk.c.idx >= owned.next_chunk - NUM_TRAIL_CHUNKS)).all()
    pinned = None
    if owned.pinned_chunk is not None and owned.pinned_chunk < owned.next_chunk:
        pinned = connection.execute(rows.where(chunk.c.idx == owned.pinned_chunk)).one_or_none()
    undecoded = connection.execute(rows.where(chunk.c.seg_blob.is_(None))).all()
    return ResumePoint(
        next_chunk=owned.next_chunk,
        rng=trail[-1].rng if trail else owned.seed_rng,
        trail=tuple(chunk_record(found) for found in trail),
        pinned=None if pinned is None else chunk_record(pinned),
        undecoded=tuple(chunk_record(found) for found in undecoded),
        num_published=_num_published(connection, owned.id),
        controls=tuple(_controls(connection, owned.id)),
    )


def _chunk(connection: sa.Connection, job_id: str, idx: int) -> Chunk | None:
    row = connection.execute(sa.select(chunk).where(chunk.c.job_id == job_id, chunk.c.idx == idx)).one_or_none()
    return None if row is None else chunk_record(row)


def _standing(connection: sa.Connection, tenant_id: str, job_id: str) -> Standing:
    return _standing_of(connection, *_owned(connection, tenant_id, job_id))


def _standings(connection: sa.Connection, jobs: Sequence[Job]) -> list[Standing]:
    return [_standing_of(connection, found, _num_published(connection, found.id)) for found in jobs]


def _standing_of(connection: sa.Connection, found: Job, num_published: int, known: Chunk | None = None) -> Standing:
    """known: a chunk that need not be read when it is the last one."""
    if num_published == 0:
        last = None
    elif known is not None and known.idx == num_published - 1:
        last = known
    else:
        last = _chunk(connection, found.id, num_published - 1)
    return Standing(job=found, num_published=num_published, last=last)


def _segments(connection: sa.Connection, tenant_id: str, job_id: str, start: int, limit: int) -> Segments:
    found, num_published = _owned(connection, tenant_id, job_id)
    window = (chunk.c.job_id == job_id, chunk.c.idx >= start, chunk.c.idx < min(num_published, start + limit))
    rows = connection.execute(sa.select(chunk).where(*window).order_by(chunk.c.idx))
    return Segments(job=found, chunks=tuple(chunk_record(row) for row in rows))


def _controls(connection: sa.Connection, job_id: str) -> list[Control]:
    rows = connection.execute(sa.select(control).where(control.c.job_id == job_id).order_by(control.c.seq))
    return [Control(**fields_of(control, row)) for row in rows]
