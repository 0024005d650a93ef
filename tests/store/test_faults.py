"""Databases and disks that fail under a running server: told apart, nothing acknowledged, over when they are well."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import sqlite3
import time
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from helios_serve.errors import HeliosError
from helios_serve.faults import Fault, FaultPlan
from helios_serve.store.connect import DATABASE_FILE, StoreConfig, open_stores
from helios_serve.store.errors import BlobMissingError, StorageFullError, StorageUnavailableError
from helios_serve.store.records import LatentsCommit
from tests.postgres import restart
from tests.store.conftest import OpenStores
from tests.store.helpers import both, latents, latents_of, media_of, new_job, running, segment


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ENOSPC, StorageFullError), (errno.EROFS, StorageUnavailableError), (errno.EIO, StorageUnavailableError)],
)
def test_a_commit_that_fails_is_not_acknowledged(opened: OpenStores, number: int, kind: type[HeliosError]) -> None:
    async def run() -> None:
        fault = Fault(
            point="db.commit",
            action="raise",
            where={"verb": "commit_latents", "moment": "before"},
            error=OSError(number, "injected"),
        )
        stores = opened(faults=FaultPlan(fault))
        job = await running(stores)
        with pytest.raises(kind):
            await latents(stores, job.lease, 0)
        assert (await stores.jobs.get("a", job.id)).next_chunk == 0
        assert await both(stores, job.lease, 0)
        last = await both(stores, job.lease, 1)
        assert last is not None
        assert last.is_finished

    asyncio.run(run())


def test_a_commit_whose_answer_is_lost_is_found_again(opened: OpenStores) -> None:
    async def run() -> None:
        faults = [
            Fault(
                point="db.commit",
                action="raise",
                where={"verb": verb, "moment": "after"},
                skip=1,
                error=OSError(errno.EIO, "x"),
            )
            for verb in ("commit_latents", "commit_segment")
        ]
        stores = opened(faults=FaultPlan(*faults))
        job = await running(stores)
        assert await both(stores, job.lease, 0)
        with pytest.raises(StorageUnavailableError):
            await latents(stores, job.lease, 1)
        assert await latents(stores, job.lease, 1)
        with pytest.raises(StorageUnavailableError):
            await segment(stores, job.lease, 1)
        last = await segment(stores, job.lease, 1)
        assert last is not None
        assert last.is_finished

    asyncio.run(run())


def test_a_full_sqlite_file(tmp_path: Path) -> None:
    async def run() -> None:
        with contextlib.closing(open_stores(StoreConfig(data_dir=tmp_path))) as stores:
            job = await running(stores)

            def limit(connection: sa.Connection, pages: int) -> int:
                return int(connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}").scalar_one())

            used = stores.database.write_now(limit, 1)  # it cannot go below what is used
            blob = await stores.blobs.put(b"x")
            commit = LatentsCommit(chunk=0, latents=blob, rng=bytes(100_000))
            with pytest.raises(StorageFullError):
                await stores.chunks.commit_latents(job.lease, commit)
            stores.database.write_now(limit, used + 1000)
            assert await both(stores, job.lease, 0)

    asyncio.run(run())


def test_a_locked_sqlite_file_does_not_stop_readers(tmp_path: Path) -> None:
    """The event loop and readers go on while a write waits."""

    async def run() -> None:
        with contextlib.closing(open_stores(StoreConfig(data_dir=tmp_path))) as stores:
            job = await running(stores)
            with contextlib.closing(sqlite3.connect(tmp_path / DATABASE_FILE, isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                writing = asyncio.create_task(stores.jobs.create(new_job()))
                longest = 0.0
                for _ in range(20):
                    before = time.monotonic()
                    await stores.jobs.get("a", job.id)
                    longest = max(longest, time.monotonic() - before)
                assert not writing.done()
                assert longest < 2.0
                other.execute("ROLLBACK")
            await writing

    asyncio.run(run())


def test_damaged_blobs_are_remade_or_given_up(opened: OpenStores, tmp_path: Path) -> None:
    async def run() -> None:
        stores = opened()
        job = await running(stores, num_chunks=3)
        await both(stores, job.lease, 0)
        await latents(stores, job.lease, 1)
        row = await stores.chunks.chunk(job.id, 1)
        assert row is not None
        path = tmp_path / "blobs" / str(row.lat_blob)
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(BlobMissingError, match="damaged"):
            await stores.blobs.get(str(row.lat_blob))
        assert await stores.chunks.step_back(job.lease, 1)
        await both(stores, job.lease, 1)

        shown = (await stores.chunks.segments("a", job.id, 0)).chunks[0]
        (tmp_path / "blobs" / str(shown.seg_blob)).unlink()
        with pytest.raises(BlobMissingError):
            await stores.blobs.get(str(shown.seg_blob))
        assert not await stores.chunks.step_back(job.lease, 0)  # it was published
        remade = await stores.blobs.put(media_of(job.id, 0))
        assert remade.key == shown.seg_blob
        assert await stores.blobs.get(remade.key) == media_of(job.id, 0)
        last = await both(stores, job.lease, 2)
        assert last is not None
        assert last.is_finished

    asyncio.run(run())


def test_connections_that_are_cut_cost_one_answer(postgres_url: str, tmp_path: Path) -> None:
    async def run() -> None:
        with contextlib.closing(open_stores(StoreConfig(data_dir=tmp_path, database_url=postgres_url))) as stores:
            job = await running(stores)
            for chunk in range(2):
                with psycopg.connect(postgres_url, autocommit=True) as admin:
                    admin.execute(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                        " WHERE application_name = 'helios-serve' AND datname = current_database()"
                    )
                last = await both(stores, job.lease, chunk)  # the pool tries a connection before it gives it out
            assert last is not None
            assert last.is_finished

    asyncio.run(run())


def test_a_statement_that_waits_too_long_is_given_up(postgres_url: str, tmp_path: Path) -> None:
    async def run() -> None:
        with contextlib.closing(open_stores(StoreConfig(data_dir=tmp_path, database_url=postgres_url))) as stores:
            job = await running(stores)
            with psycopg.connect(postgres_url) as other:
                other.execute("SELECT * FROM job FOR UPDATE")
                before = time.monotonic()
                with pytest.raises(StorageUnavailableError):
                    await latents(stores, job.lease, 0)
                assert 4 < time.monotonic() - before < 9
            assert await latents(stores, job.lease, 0)

    asyncio.run(run())


def test_a_postgres_that_restarts(tmp_path: Path, postgres_cluster: Path, postgres_url: str) -> None:
    async def run() -> None:
        with contextlib.closing(open_stores(StoreConfig(data_dir=tmp_path, database_url=postgres_url))) as stores:
            job = await running(stores)
            await both(stores, job.lease, 0)
            with restart(postgres_cluster), pytest.raises(StorageUnavailableError):
                await latents(stores, job.lease, 1)
            last = await both(stores, job.lease, 1)
            assert last is not None
            assert last.is_finished
            assert await stores.blobs.get((await stores.blobs.put(latents_of(job.id, 1))).key)

    asyncio.run(run())
