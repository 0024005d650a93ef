"""What a new job begins with: chunks of another job, or segments of its caller's own video.

Works in the transaction of whoever makes the job.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from helios_serve.errors import ConflictError
from helios_serve.store.records import Given, Job, Source
from helios_serve.store.schema import chunk, job
from helios_serve.types import FRAMES_PER_CHUNK


def copy_source(connection: sa.Connection, job_id: str, source: Source, old: Job) -> None:
    """The new job begins with the chunks of `old`, locked: the rows are copied, the blobs shared.

    Raises: ConflictError when `old` is not finished, or has expired.
    """
    if old.state != "finished" or old.is_expired or old.next_chunk < source.num_chunks:
        raise ConflictError(f"video {old.id}: only a finished video that has not expired can be extended")
    taken: dict[str, sa.ColumnElement[Any]] = {name: chunk.c[name] for name in set(chunk.c.keys()) - {"job_id"}}
    for name, empty in (("seg_blob", None), ("seg_bytes", 0), ("seg_frames", 0), ("vae_stats", None)):
        kept = sa.case((chunk.c.idx < source.num_segments, chunk.c[name]), else_=sa.literal(empty, chunk.c[name].type))
        taken[name] = kept.label(name)
    rows = sa.select(sa.literal(job_id).label("job_id"), *taken.values()).where(
        chunk.c.job_id == old.id, chunk.c.idx < source.num_chunks
    )
    connection.execute(sa.insert(chunk).from_select(["job_id", *taken], rows))
    mine = chunk.c.job_id == job_id
    num_bytes = sa.select(sa.func.sum(chunk.c.lat_bytes + chunk.c.seg_bytes)).where(mine).scalar_subquery()
    connection.execute(
        sa.update(job)
        .where(job.c.id == job_id)
        .values(
            next_chunk=source.num_chunks,
            bytes_stored=job.c.bytes_stored + sa.func.coalesce(num_bytes, 0),
            init_blob=old.init_blob,
            seed_blob=old.seed_blob,
            seed_rng=old.seed_rng,
            first_blob=old.first_blob,
        )
    )


def add_given(connection: sa.Connection, job_id: str, given: Given) -> None:
    """The new job begins with segments that are there already; no latents belong to them."""
    rows = [
        {
            "job_id": job_id,
            "idx": idx,
            "seg_blob": segment.key,
            "seg_bytes": segment.num_bytes,
            "seg_frames": FRAMES_PER_CHUNK,
        }
        for idx, segment in enumerate(given.segments)
    ]
    connection.execute(sa.insert(chunk), rows)
    num_bytes = given.init.num_bytes + sum(segment.num_bytes for segment in given.segments)
    connection.execute(
        sa.update(job)
        .where(job.c.id == job_id)
        .values(next_chunk=len(rows), init_blob=given.init.key, bytes_stored=job.c.bytes_stored + num_bytes)
    )
