"""Small jobs and their commits."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

from helios_serve.store.connect import Stores
from helios_serve.store.jobs import canonical_hash
from helios_serve.store.records import Committed, Job, LatentsCommit, Lease, NewJob, SegmentCommit

_numbers = itertools.count()

INIT = b"ftyp moov"


def new_job(**changes: Any) -> NewJob:
    """A job of two chunks with a prompt of its own."""
    number = next(_numbers)
    spec = changes.pop("spec", {"prompt": f"prompt {number}"})
    job = NewJob(
        id=f"video_{number:08d}",
        tenant="a",
        route="create",
        service_class="offline",
        spec=spec,
        spec_hash=canonical_hash(spec),
        pinned={"dtype": "float32"},
        num_chunks=2,
        pinned_chunk=0,
    )
    return replace(job, **changes)


async def running(stores: Stores, **changes: Any) -> Job:
    """A job that these stores own and have started."""
    new = new_job(**changes)
    await stores.jobs.create(new)
    (job,) = await stores.leases.claim(1, job_id=new.id)
    assert await stores.leases.start(job.lease)
    return job


def latents_of(job_id: str, chunk: int) -> bytes:
    return f"latents {job_id} {chunk} ".encode() * 500


def media_of(job_id: str, chunk: int) -> bytes:
    return f"media {job_id} {chunk} ".encode() * 100


async def latents(stores: Stores, lease: Lease, chunk: int, **changes: Any) -> bool:
    """Puts and commits the DiT half."""
    blob = await stores.blobs.put(latents_of(lease.job_id, chunk))
    commit = LatentsCommit(chunk=chunk, latents=blob, rng=f"rng {chunk}".encode())
    return await stores.chunks.commit_latents(lease, replace(commit, **changes))


async def segment(stores: Stores, lease: Lease, chunk: int) -> Committed | None:
    """Puts and commits the VAE half."""
    init = await stores.blobs.put(INIT)
    blob = await stores.blobs.put(media_of(lease.job_id, chunk))
    commit = SegmentCommit(chunk=chunk, segment=blob, init=init, num_frames=33)
    return await stores.chunks.commit_segment(lease, commit)


async def both(stores: Stores, lease: Lease, chunk: int) -> Committed | None:
    assert await latents(stores, lease, chunk)
    return await segment(stores, lease, chunk)


async def finished(stores: Stores, **changes: Any) -> Job:
    """A job whose chunks are all committed."""
    job = await running(stores, **changes)
    for chunk in range(job.num_chunks or 1):
        await both(stores, job.lease, chunk)
    return await stores.jobs.get(job.tenant, job.id)
