"""What is kept after a job's end and for how long, and the sweep of blobs that no row names.

Call `tidy` every minute and `sweep` every ten; any process may, at any time. Rows go first: a blob is deleted only
when it is old and nothing names it, so a crash in between leaves garbage and never a hole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import sqlalchemy as sa

from helios_serve.store.blobs import GRACE_S, BlobStore
from helios_serve.store.database import Database
from helios_serve.store.records import ENDED
from helios_serve.store.schema import chunk, control, db_now, delivery, file, idem, job
from helios_serve.types import NUM_TRAIL_CHUNKS

ROW_KEPT_S = 7 * 86_400.0
"""How long the row of an expired job stays."""

TOMBSTONE_S = 86_400.0
"""How long a deleted job's id stays known, for idempotency keys that name it."""

DELIVERY_KEPT_S = 7 * 86_400.0
BATCH = 100
KEYS_IN_MEMORY = 500_000

JOB_BLOBS = (job.c.input_blob, job.c.seed_blob, job.c.init_blob, job.c.first_blob, job.c.video_blob)
BLOB_COLUMNS = (*JOB_BLOBS, chunk.c.lat_blob, chunk.c.seg_blob, control.c.payload_blob, file.c.blob)
"""Every column that names a blob."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Swept:
    num_blobs: int
    num_bytes: int
    num_unfinished: int


class Retention:
    """Args:
    keep_latents: keep all latents of ended jobs, not only what extending them needs.
    """

    def __init__(self, database: Database, blobs: BlobStore, *, keep_latents: bool = False) -> None:
        self._db = database
        self._blobs = blobs
        self._keep_latents = keep_latents

    async def tidy(self) -> int:
        """Prunes ended jobs, empties expired ones, forgets old rows; returns how many jobs were touched."""
        total = 0
        if not self._keep_latents:
            total += await self._drained(_prune)
        total += await self._drained(_expire)
        await self._db.write(_forget)
        return total

    async def sweep(self, *, grace_s: float = GRACE_S) -> Swept:
        """Deletes blobs and unfinished files that are older than `grace_s` and that nothing names."""
        num_keys = await self._db.read(_num_keys)
        width = 256 // min(256, max(1, math.ceil(num_keys / KEYS_IN_MEMORY)))
        num_blobs = num_bytes = 0
        for low in range(0, 256, width):
            prefixes = [f"{number:02x}" for number in range(low, min(256, low + width))]
            old: dict[str, int] = {}
            for prefix in prefixes:
                old |= await self._blobs.older_than(grace_s, prefix)
            named = await self._db.read(_named, prefixes[0], prefixes[-1]) if old else set()
            for key, size in old.items():
                if key not in named and await self._blobs.discard(key, grace_s):
                    num_blobs, num_bytes = num_blobs + 1, num_bytes + size
        return Swept(num_blobs=num_blobs, num_bytes=num_bytes, num_unfinished=await self._blobs.sweep_staging(grace_s))

    async def _drained(self, step: Callable[[sa.Connection], int]) -> int:
        """Repeats a step, a batch in each transaction, until there is nothing left to do."""
        total = 0
        while True:
            done = await self._db.write(step)
            total += done
            if done < BATCH:
                return total


def _prune(connection: sa.Connection) -> int:
    """A finished job keeps its last three latents, the pinned chunk's or the first frame's blob, and the generator
    state; a failed or cancelled one, which cannot be extended, keeps none."""
    columns = (job.c.id, job.c.state, job.c.next_chunk, job.c.pinned_chunk, job.c.first_blob)
    query = sa.select(*columns).where(job.c.state.in_(ENDED), job.c.is_pruned.is_(False), job.c.purged_at.is_(None))
    rows = connection.execute(query.limit(BATCH).with_for_update(skip_locked=True)).all()
    for row in rows:
        gone = sa.and_(chunk.c.job_id == row.id, chunk.c.lat_blob.is_not(None))
        if row.state == "finished":
            gone = sa.and_(gone, chunk.c.idx < row.next_chunk - NUM_TRAIL_CHUNKS)
            if row.pinned_chunk is not None and row.first_blob is None:
                gone = sa.and_(gone, chunk.c.idx != row.pinned_chunk)
        num_bytes = connection.scalar(sa.select(sa.func.sum(chunk.c.lat_bytes)).where(gone))
        connection.execute(sa.update(chunk).where(gone).values(lat_blob=None, lat_bytes=0, rng=None))
        values = {"is_pruned": True, "bytes_stored": job.c.bytes_stored - int(num_bytes or 0)}
        connection.execute(sa.update(job).where(job.c.id == row.id).values(**values))
    return len(rows)


def _expire(connection: sa.Connection) -> int:
    """The outputs of a job past its time are gone; the row stays, with its state."""
    query = sa.select(job.c.id).where(job.c.state.in_(ENDED), job.c.purged_at.is_(None), job.c.expires_at < db_now())
    ids = connection.scalars(query.limit(BATCH).with_for_update(skip_locked=True)).all()
    connection.execute(sa.delete(chunk).where(chunk.c.job_id.in_(ids)))
    connection.execute(sa.delete(control).where(control.c.job_id.in_(ids)))
    nothing = {column.key: None for column in JOB_BLOBS} | {"seed_rng": None, "bytes_stored": 0}
    connection.execute(sa.update(job).where(job.c.id.in_(ids)).values(**nothing, purged_at=db_now()))
    return len(ids)


def _forget(connection: sa.Connection) -> None:
    """Rows that nobody may ask for any more. Keys of jobs go with them."""
    now = db_now()
    connection.execute(sa.delete(idem).where(idem.c.expires_at < now))
    connection.execute(sa.delete(file).where(file.c.expires_at < now))
    connection.execute(sa.delete(delivery).where(delivery.c.created_at < now - DELIVERY_KEPT_S))
    connection.execute(sa.delete(job).where(job.c.state != "deleted", job.c.purged_at < now - ROW_KEPT_S))
    connection.execute(sa.delete(job).where(job.c.state == "deleted", job.c.purged_at < now - TOMBSTONE_S))


def _num_keys(connection: sa.Connection) -> int:
    chunks = connection.scalar(sa.select(sa.func.count()).select_from(chunk)) or 0
    jobs = connection.scalar(sa.select(sa.func.count()).select_from(job)) or 0
    return 2 * chunks + len(JOB_BLOBS) * jobs


def _named(connection: sa.Connection, first: str, last: str) -> set[str]:
    """All blobs that rows name, of those whose keys begin with `first` to `last`."""
    named: set[str] = set()
    for column in BLOB_COLUMNS:
        query = sa.select(column).where(column.is_not(None))
        if (first, last) != ("00", "ff"):
            query = query.where(sa.func.substr(column, 1, 2).between(first, last))
        named.update(connection.execution_options(yield_per=10_000).scalars(query))
    return named
