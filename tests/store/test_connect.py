"""Stores as configured: where things are, what is refused, and a bucket where one is given."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import uuid
from pathlib import Path

import pytest
import sqlalchemy as sa

from helios_serve.store.blob_key import key_of
from helios_serve.store.connect import StoreConfig, open_stores
from helios_serve.store.errors import BlobMissingError, StoreStartError
from tests.store.helpers import finished, latents_of


def test_the_default_is_one_directory(tmp_path: Path) -> None:
    async def run() -> None:
        with contextlib.closing(open_stores(StoreConfig(data_dir=tmp_path / "new" / "data"))) as stores:
            await finished(stores)

            def pragmas(connection: sa.Connection) -> list[object]:
                names = ("journal_mode", "synchronous", "foreign_keys")
                return [connection.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in names]

            assert stores.database.write_now(pragmas) == ["wal", 2, 1]
            assert stores.database.read_now(pragmas) == ["wal", 2, 1]
        names = {path.name for path in (tmp_path / "new" / "data").iterdir()}
        assert names == {"blobs", "helios.db", "lock"}

    asyncio.run(run())


def test_postgres_commits_are_synchronous(postgres_url: str, tmp_path: Path) -> None:
    with contextlib.closing(open_stores(StoreConfig(data_dir=tmp_path, database_url=postgres_url))) as stores:

        def show(connection: sa.Connection) -> list[object]:
            names = ("synchronous_commit", "statement_timeout", "transaction_isolation")
            return [connection.exec_driver_sql(f"SHOW {name}").scalar_one() for name in names]

        assert stores.database.read_now(show) == ["on", "5s", "read committed"]


def test_blobs_of_another_database_are_refused(tmp_path: Path) -> None:
    shared = f"file://{tmp_path}/blobs"
    open_stores(StoreConfig(data_dir=tmp_path / "a", blob_url=shared)).close()
    with pytest.raises(StoreStartError, match="own blob directory or bucket prefix"):
        open_stores(StoreConfig(data_dir=tmp_path / "b", blob_url=shared))
    open_stores(StoreConfig(data_dir=tmp_path / "b")).close()  # the refusal let go of the lock


def test_psycopg_is_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(StoreStartError, match=r"pip install 'helios-serve\[postgres\]'"):
        open_stores(StoreConfig(data_dir=tmp_path, database_url="postgres://localhost/none"))


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreStartError, match=r"data directory .*/file/data"):
        open_stores(StoreConfig(data_dir=tmp_path / "file" / "data"))
    with pytest.raises(StoreStartError, match="blob store gopher://x"):
        open_stores(StoreConfig(data_dir=tmp_path / "data", blob_url="gopher://x"))


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="lease_s 0"):
        StoreConfig(data_dir=Path("x"), lease_s=0)
    with pytest.raises(ValueError, match="cache_bytes -1"):
        StoreConfig(data_dir=Path("x"), cache_bytes=-1)


def test_a_real_bucket(tmp_path: Path) -> None:
    """Against any S3-compatible server, with the AWS_* variables that it needs."""
    url = os.environ.get("HELIOS_TEST_S3_URL")
    if url is None:
        pytest.skip("HELIOS_TEST_S3_URL is not set to a bucket, s3://name, that tests may write to")

    async def run() -> None:
        config = StoreConfig(data_dir=tmp_path, blob_url=f"{url}/{uuid.uuid4().hex}", cache_bytes=0)
        with contextlib.closing(open_stores(config)) as stores:
            job = await finished(stores)
            row = await stores.chunks.chunk(job.id, 0)
            data = latents_of(job.id, 0)
            assert row is not None
            assert row.lat_blob == key_of(data)
            assert await stores.blobs.get(row.lat_blob) == data
            assert (await stores.blobs.put(data)).key == row.lat_blob
            assert await stores.blobs.verify(row.lat_blob) == len(data)
            assert b"".join([piece async for piece in stores.blobs.stream(row.lat_blob, 5, 50)]) == data[5:50]
            with stores.blobs.staging_file(".mp4") as path:
                path.write_bytes(data * 1000)
                ref = await stores.blobs.put_file(path)
            assert await stores.blobs.verify(ref.key) == 1000 * len(data)
            signed = await stores.blobs.presign(ref.key, 60)
            assert signed is not None
            assert ref.key in signed
            stores.blobs._put_at.clear()
            await asyncio.sleep(1.1)  # S3 dates objects by the second
            assert (await stores.retention.sweep(grace_s=0)).num_blobs == 1
            with pytest.raises(BlobMissingError):
                await stores.blobs.get(ref.key)
            assert await stores.blobs.get(row.lat_blob) == data
        open_stores(config).close()

    asyncio.run(run())
