"""kill -9 of the owner, over and over: what was acknowledged is there, whole, once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from helios_serve.store.connect import StoreConfig, open_stores
from helios_serve.store.paging import PageRequest
from tests.store.crash_writer import NUM_CHUNKS
from tests.store.helpers import latents_of, media_of

SEEDS = 18
POINTS = ("blob.write", "blob.fsync", "db.commit", "publish")


def fault_of(seed: int) -> dict[str, object] | None:
    """A kill at a random visit of a named point; every fourth time none: then it comes from outside at any moment."""
    rng = random.Random(seed)
    if seed % 4 == 3:
        return None
    point = POINTS[(seed // 4 + seed) % len(POINTS)]
    where = {} if point == "publish" else {"moment": rng.choice(("before", "after"))}
    return {"point": point, "action": "kill", "where": where, "skip": rng.randrange(40)}


def crash(data_dir: Path, seed: int) -> list[list[str]]:
    """Runs a writer until it is killed; what it said."""
    command = [
        sys.executable,
        "-m",
        "tests.store.crash_writer",
        str(data_dir),
        json.dumps(fault_of(seed)),
        str(1000 * seed),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        said = [writer.stdout.readline().split()]
        if fault_of(seed) is None:
            time.sleep(random.Random(seed).uniform(0.0, 0.4))
            writer.kill()
        said += [line.split() for line in writer.stdout]
        assert writer.wait(timeout=60) == -signal.SIGKILL, f"seed {seed}"
    return said


def test_nothing_acknowledged_is_lost(tmp_path: Path) -> None:
    said: list[list[str]] = []
    for seed in range(SEEDS):
        said += crash(tmp_path, seed)
    asyncio.run(_check(tmp_path, said))


async def _check(data_dir: Path, said: list[list[str]]) -> None:
    with contextlib.closing(open_stores(StoreConfig(data_dir=data_dir))) as stores:
        assert len({line[1] for line in said if line[0] == "ready"}) == 1  # one store id throughout
        created = [line[1] for line in said if line[0] == "created"]
        acknowledged = {
            (line[0], line[1], int(line[2])): int(line[3]) for line in said if line[0] in ("latents", "segment")
        }
        assert len(created) >= SEEDS
        assert len(acknowledged) >= 4 * SEEDS
        for job in await stores.leases.claim(1000):  # as the next server would: the rest is made
            await stores.leases.start(job.lease)

        jobs = {job.id: job for job in (await stores.jobs.list("a", PageRequest(limit=1000))).items}
        assert set(created) <= set(jobs)
        for job in jobs.values():
            rows = [await stores.chunks.chunk(job.id, idx) for idx in range(job.next_chunk)]
            epochs = [row.epoch for row in rows if row is not None]
            assert len(epochs) == job.next_chunk <= NUM_CHUNKS
            assert epochs == sorted(epochs)
            assert all(epoch <= job.epoch for epoch in epochs)
            for row in rows:
                assert row is not None
                assert row.lat_blob is not None
                assert await stores.blobs.get(row.lat_blob) == latents_of(job.id, row.idx)
                if row.seg_blob is not None:
                    assert await stores.blobs.get(row.seg_blob) == media_of(job.id, row.idx)
                if ("segment", job.id, row.idx) in acknowledged:
                    assert row.seg_blob is not None
                if ("latents", job.id, row.idx) in acknowledged:
                    assert row.epoch == acknowledged["latents", job.id, row.idx]
            assert (job.state == "finished") == (
                job.next_chunk == NUM_CHUNKS and all(row is not None and row.seg_blob for row in rows)
            )
        for _, job_id, idx in acknowledged:
            assert idx < jobs[job_id].next_chunk

        await stores.retention.sweep(grace_s=0)  # nothing is being written now
        root = data_dir / "blobs"
        assert [path for path in root.rglob("*") if "#" in path.name] == []
        named = {
            key
            for job in jobs.values()
            for idx in range(job.next_chunk)
            if (row := await stores.chunks.chunk(job.id, idx)) is not None
            for key in (row.lat_blob, row.seg_blob, job.init_blob)
            if key is not None
        }
        assert {str(path.relative_to(root)) for path in root.glob("??/*")} == named
