"""Ownership: who may run a job, and when a process must doubt that it is the one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from helios_serve.faults import Fault, FaultPlan
from helios_serve.store import schema
from helios_serve.store.connect import StoreConfig, Stores, open_stores
from helios_serve.store.errors import StoreStartError
from tests.store.conftest import OpenStores
from tests.store.helpers import both, latents, new_job, running, segment
from tests.store.test_jobs import shift


def test_realtime_and_older_jobs_are_claimed_first(stores: Stores) -> None:
    async def run() -> None:
        made = [new_job(service_class=kind) for kind in ("offline", "realtime", "offline", "realtime")]
        for new in made:
            await stores.jobs.create(new)
        first = await stores.leases.claim(3)
        assert [job.id for job in first] == [made[1].id, made[3].id, made[0].id]
        assert [job.id for job in await stores.leases.claim(10)] == [made[2].id]
        assert await stores.leases.claim(10) == []

    asyncio.run(run())


def test_released_jobs_are_free_at_once(opened: OpenStores) -> None:
    async def run() -> None:
        stores = opened()
        job = await running(stores)
        await both(stores, job.lease, 0)
        assert await stores.leases.dispatched([job.lease]) == {job.lease}
        await stores.leases.release([job.lease])
        assert stores.leases.held == ()
        assert not stores.leases.may_publish(job.lease)
        (again,) = await stores.leases.claim(1)
        assert (again.epoch, again.state, again.attempts, again.is_suspect) == (2, "running", 0, False)
        assert not await latents(stores, job.lease, 1)

    asyncio.run(run())


def test_jobs_of_a_crash_are_suspects_until_they_commit(tmp_path: Path) -> None:
    async def run() -> None:
        config = StoreConfig(data_dir=tmp_path)
        with contextlib.closing(open_stores(config)) as first:
            jobs = [await running(first) for _ in range(2)]
            idle = await running(first)
            await first.leases.dispatched([job.lease for job in jobs])
        with contextlib.closing(open_stores(config)) as second:
            claimed = {job.id: job for job in await second.leases.claim(10)}
            assert [claimed[job.id].is_suspect for job in (*jobs, idle)] == [True, True, False]
            assert [claimed[job.id].solo_crashes for job in jobs] == [0, 0]
            alone = claimed[jobs[0].id]
            await second.leases.dispatched([alone.lease])
        with contextlib.closing(open_stores(config)) as third:
            (again,) = await third.leases.claim(10, job_id=alone.id)
            assert (again.solo_crashes, again.attempts, again.epoch) == (1, 2, 3)
            assert await latents(third, again.lease, 0)
            calm = await third.jobs.get("a", alone.id)
            assert (calm.is_suspect, calm.solo_crashes, calm.attempts) == (False, 0, 0)

    asyncio.run(run())


def test_a_second_server_on_one_data_directory_is_refused(tmp_path: Path) -> None:
    config = StoreConfig(data_dir=tmp_path)
    with (
        contextlib.closing(open_stores(config)),
        pytest.raises(StoreStartError, match=rf"in use by process {os.getpid()}: .*Postgres with --database-url"),
    ):
        open_stores(config)
    open_stores(config).close()


def test_publishing_stops_before_the_lease_ends(postgres_url: str, tmp_path: Path) -> None:
    async def run() -> None:
        plan = FaultPlan(Fault(point="publish", action="raise", skip=6, error=RuntimeError("published")))
        with contextlib.closing(
            open_stores(StoreConfig(data_dir=tmp_path, database_url=postgres_url), faults=plan)
        ) as stores:
            now = [100.0]
            stores.leases._clock = lambda: now[0]
            job = await running(stores)
            assert stores.leases.may_publish(job.lease, chunk=0)
            now[0] += 7.9
            assert stores.leases.may_publish(job.lease)
            now[0] += 0.2
            assert not stores.leases.may_publish(job.lease)
            assert await stores.leases.renew() == []
            assert stores.leases.may_publish(job.lease)
            now[0] += 7.0
            assert await latents(stores, job.lease, 0)  # a commit renews
            now[0] += 7.0
            assert stores.leases.may_publish(job.lease)
            now[0] += 3600.0
            assert not stores.leases.may_publish(job.lease)
            with pytest.raises(RuntimeError, match="published"):
                stores.leases.may_publish(job.lease)

    asyncio.run(run())


def test_two_engines_never_own_one_job(postgres_url: str, tmp_path: Path) -> None:
    async def run() -> None:
        engines = [
            open_stores(StoreConfig(data_dir=tmp_path / str(number), database_url=postgres_url)) for number in range(3)
        ]
        try:
            for _ in range(60):
                await engines[0].jobs.create(new_job())

            async def claim_all(stores: Stores) -> list[str]:
                mine: list[str] = []
                while claimed := await stores.leases.claim(4):
                    assert len(claimed) <= 4
                    mine += [job.id for job in claimed]
                    await asyncio.sleep(0)
                return mine

            owned = await asyncio.gather(*(claim_all(stores) for stores in engines for _ in range(2)))
            ids = [job_id for mine in owned for job_id in mine]
            # A transaction that skips locked rows may come back empty while others still hold them.
            ids += list(await claim_all(engines[0]))
            assert sorted(ids) == sorted(set(ids))
            assert len(ids) == 60
        finally:
            for stores in engines:
                stores.close()

    asyncio.run(run())


def test_an_expired_lease_goes_to_another_engine(postgres_url: str, tmp_path: Path) -> None:
    async def run() -> None:
        config: dict[str, Any] = {"database_url": postgres_url, "blob_url": f"file://{tmp_path}/blobs"}
        with (
            contextlib.closing(open_stores(StoreConfig(data_dir=tmp_path / "a", lease_s=0.5, **config))) as slow,
            contextlib.closing(open_stores(StoreConfig(data_dir=tmp_path / "b", **config))) as fast,
        ):
            job = await running(slow)
            await latents(slow, job.lease, 0)
            assert await fast.leases.claim(10) == []
            await asyncio.sleep(0.6)
            (taken,) = await fast.leases.claim(10)
            assert (taken.epoch, taken.next_chunk) == (2, 1)
            assert await slow.leases.renew() == [job.lease]
            assert not await latents(slow, job.lease, 1)
            assert await segment(slow, job.lease, 0) is None
            assert await segment(fast, taken.lease, 0)
            await both(fast, taken.lease, 1)
            assert (await slow.jobs.get("a", job.id)).state == "finished"

    asyncio.run(run())


OWNER = """
import asyncio, sys
from pathlib import Path
from typing import Any
from helios_serve.store.connect import StoreConfig, open_stores
from helios_serve.store.records import LatentsCommit

async def main():
    stores = open_stores(
        StoreConfig(data_dir=Path(sys.argv[1]), database_url=sys.argv[2], blob_url=sys.argv[3], lease_s=1.0)
    )
    (job,) = await stores.leases.claim(1)
    await stores.leases.start(job.lease)
    blob = await stores.blobs.put(b"late")
    print("owned", flush=True)
    sys.stdin.readline()
    may = stores.leases.may_publish(job.lease)
    late = await stores.chunks.commit_latents(job.lease, LatentsCommit(chunk=0, latents=blob, rng=b""))
    print(f"may publish {may}, committed {late}, lost {len(await stores.leases.renew())}", flush=True)
    stores.close()

asyncio.run(main())
"""


def test_a_paused_owner_is_fenced(postgres_url: str, tmp_path: Path) -> None:
    async def run() -> None:
        blob_url = f"file://{tmp_path}/blobs"
        config = StoreConfig(data_dir=tmp_path / "b", database_url=postgres_url, blob_url=blob_url)
        with contextlib.closing(open_stores(config)) as stores:
            new = new_job()
            await stores.jobs.create(new)
            command = [sys.executable, "-c", OWNER, str(tmp_path / "a"), postgres_url, blob_url]
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
                assert owner.stdout is not None
                assert owner.stdout.readline() == "owned\n"
                owner.send_signal(signal.SIGSTOP)
                deadline = time.monotonic() + 20
                while not (claimed := await stores.leases.claim(1)):
                    assert time.monotonic() < deadline
                    await asyncio.sleep(0.1)
                await both(stores, claimed[0].lease, 0)
                owner.send_signal(signal.SIGCONT)
                answer, _ = owner.communicate("\n", timeout=30)
            assert answer == "may publish False, committed False, lost 1\n"
            last = await both(stores, claimed[0].lease, 1)
            assert last is not None
            assert last.is_finished
            rows = (await stores.chunks.segments("a", new.id, 0)).chunks
            assert [row.epoch for row in rows] == [2, 2]

    asyncio.run(run())


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_wall_clock_that_jumps_changes_nothing(stores: Stores, monkeypatch: pytest.MonkeyPatch, hours: int) -> None:
    async def run() -> None:
        job = await running(stores)
        await latents(stores, job.lease, 0)
        wall = time.time
        monkeypatch.setattr(time, "time", lambda: wall() + 3600 * hours)
        if not stores.database.is_postgres:  # its clock is this machine's: the row looks as after such a jump
            shift(stores, schema.job, "lease_until", -3600 * hours)
        assert await stores.leases.claim(10) == []
        assert stores.leases.may_publish(job.lease)
        assert await stores.leases.renew() == []
        assert await segment(stores, job.lease, 0)
        swept = await stores.retention.sweep(grace_s=1800)  # what is not committed yet must survive
        orphan = await stores.blobs.put(b"about to be committed")
        assert await stores.blobs.get(orphan.key)
        assert swept.num_blobs == 0
        assert (await stores.retention.sweep(grace_s=1800)).num_blobs == 0
        last = await both(stores, job.lease, 1)
        assert last is not None
        assert last.is_finished

    asyncio.run(run())
