"""Runs jobs on stores until it is killed; says on standard output, one line each, what was acknowledged to it.

python -m tests.store.crash_writer DATA_DIR FAULT ; FAULT is JSON, the fields of a `Fault`, or null.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from helios_serve.faults import Fault, FaultPlan
from helios_serve.store.connect import StoreConfig, open_stores
from helios_serve.store.records import Job
from tests.store.helpers import latents, new_job, segment

NUM_CHUNKS = 4


def say(*words: object) -> None:
    print(*words, flush=True)


async def run_job(stores, job: Job) -> None:  # type: ignore[no-untyped-def]
    point = await stores.chunks.resume_point(job.lease)
    assert point is not None
    assert await stores.leases.start(job.lease)
    for chunk in point.undecoded:
        assert await stores.blobs.get(chunk.lat_blob)
        await finish_segment(stores, job, chunk.idx)
    for idx in range(point.next_chunk, NUM_CHUNKS):
        assert await latents(stores, job.lease, idx)
        say("latents", job.id, idx, job.epoch)
        await finish_segment(stores, job, idx)


async def finish_segment(stores, job: Job, idx: int) -> None:  # type: ignore[no-untyped-def]
    committed = await segment(stores, job.lease, idx)
    assert committed is not None
    assert stores.leases.may_publish(job.lease)
    say("segment", job.id, idx, job.epoch)


async def main() -> None:
    fault = json.loads(sys.argv[2])
    plan = FaultPlan() if fault is None else FaultPlan(Fault(**fault))
    stores = open_stores(StoreConfig(data_dir=Path(sys.argv[1])), faults=plan)
    say("ready", stores.store_id)
    first = int(sys.argv[3])
    for number in range(first, first + 100):
        for job in await stores.leases.claim(100):
            await run_job(stores, job)
        new = new_job(id=f"video_{number:06d}", num_chunks=NUM_CHUNKS)
        await stores.jobs.create(new, idempotency_key=f"key {number}")
        say("created", new.id)
    stores.close()


if __name__ == "__main__":
    asyncio.run(main())
