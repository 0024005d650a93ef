"""Blobs: durable before they are named, whole or missing, swept only when nobody can want them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import obstore
import pytest
from obstore.store import MemoryStore

from helios_serve.faults import NO_FAULTS, Fault, FaultPlan
from helios_serve.store.blob_cache import BlobCache
from helios_serve.store.blob_key import key_of
from helios_serve.store.blobs import BlobStore, local_blobs
from helios_serve.store.errors import BlobMissingError, StorageFullError, StorageUnavailableError, StoreStartError
from helios_serve.store.records import BlobRef

DATA = bytes(range(256)) * 64


def bucket(tmp_path: Path, *, cache: BlobCache | None = None, faults: FaultPlan = NO_FAULTS) -> BlobStore:
    """obstore's in-memory store: the code path of S3, with create-only puts."""
    return BlobStore(MemoryStore(), local=None, staging=tmp_path / "staging", cache=cache, faults=faults)


@pytest.fixture(params=["directory", "bucket"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BlobStore]:
    store = local_blobs(tmp_path / "blobs") if request.param == "directory" else bucket(tmp_path)
    with contextlib.closing(store):
        yield store


def left_over(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if "#" in path.name]


def test_a_blob_is_read_as_it_was_put(blobs: BlobStore) -> None:
    async def run() -> None:
        ref = await blobs.put(DATA)
        assert ref.key == key_of(DATA)
        assert ref.key[:3] == ref.key[3:5] + "/"
        assert ref.num_bytes == len(DATA)
        assert await blobs.put(DATA) == ref
        assert await blobs.get(ref.key) == DATA
        assert await blobs.verify(ref.key) == len(DATA)
        assert b"".join([piece async for piece in blobs.stream(ref.key)]) == DATA
        assert b"".join([piece async for piece in blobs.stream(ref.key, 10, 300)]) == DATA[10:300]
        assert b"".join([piece async for piece in blobs.stream(ref.key, 16_000)]) == DATA[16_000:]
        assert await blobs.presign(ref.key, 60) is None
        empty = await blobs.put(b"")
        assert await blobs.get(empty.key) == b""
        assert await blobs.get_all([empty.key, ref.key, empty.key]) == [b"", DATA, b""]
        with pytest.raises(BlobMissingError) as missing:
            await blobs.get_all([ref.key, "ab/absent", "cd/absent"])
        assert missing.value.key == "ab/absent"

    asyncio.run(run())


def test_work_behind_a_put_begins_with_the_durable_blob(blobs: BlobStore) -> None:
    """An error of any of the three parts is the answer, and nothing after it runs."""
    pool = ThreadPoolExecutor(1)

    def failing() -> NoReturn:
        raise OSError(errno.ENOSPC, "full")

    async def run() -> None:
        size = await blobs.put_then(lambda: DATA, lambda ref: pool.submit(lambda: ref.num_bytes))
        assert size == len(DATA)
        assert await blobs.get(key_of(DATA)) == DATA
        begun: list[object] = []
        for make, raised in ((failing, OSError), (lambda: 1 / 0, ZeroDivisionError)):
            with pytest.raises(raised):
                await blobs.put_then(make, begun.append)  # type: ignore[arg-type]
        assert begun == []
        with pytest.raises(KeyError):
            await blobs.put_then(lambda: DATA, lambda ref: pool.submit({}.__getitem__, ref.key))
        with pytest.raises(ZeroDivisionError):
            await blobs.put_then(lambda: DATA, lambda ref: 1 / 0)  # type: ignore[arg-type, return-value]

    with pool:
        asyncio.run(run())


def test_a_caller_that_leaves_stops_no_work_behind_a_put(blobs: BlobStore) -> None:
    done, may_end = threading.Event(), threading.Event()

    def commit() -> None:
        assert may_end.wait(30)
        done.set()

    async def run() -> None:
        begun = asyncio.Event()
        loop = asyncio.get_running_loop()

        def begin(_: BlobRef) -> Future[None]:
            committing = pool.submit(commit)
            loop.call_soon_threadsafe(begun.set)
            return committing

        keeping = asyncio.create_task(blobs.put_then(lambda: DATA, begin))
        await begun.wait()
        keeping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await keeping
        may_end.set()

    with ThreadPoolExecutor(1) as pool:
        asyncio.run(run())
    assert done.is_set()


def test_a_file_is_put_as_its_content(blobs: BlobStore) -> None:
    async def run() -> None:
        with blobs.staging_file(".mp4") as path:
            path.write_bytes(DATA)
            ref = await blobs.put_file(path)
            assert not path.exists()
        assert await blobs.get(ref.key) == DATA
        with blobs.staging_file(".mp4") as path:
            path.write_bytes(DATA)
            assert await blobs.put_file(path) == ref
        with blobs.staging_file(".mp4") as path:
            path.write_bytes(b"given up")
        assert not path.exists()

    asyncio.run(run())


def test_a_missing_blob_is_named(blobs: BlobStore) -> None:
    async def run() -> None:
        key = key_of(b"nobody put this")
        for call in (blobs.get(key), blobs.verify(key), anext(blobs.stream(key))):
            with pytest.raises(BlobMissingError, match=key):
                await call

    asyncio.run(run())


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_is_found_and_mended_by_the_same_content(tmp_path: Path, damage: str) -> None:
    async def run() -> None:
        with contextlib.closing(local_blobs(tmp_path)) as blobs:
            ref = await blobs.put(DATA)
            for look in (blobs.get, blobs.verify, None):
                path = tmp_path / ref.key
                if damage == "flip":
                    path.write_bytes(DATA[:100] + bytes([DATA[100] ^ 1]) + DATA[101:])
                elif damage == "truncate":
                    path.write_bytes(DATA[:-1])
                else:
                    path.unlink()
                if look is not None:
                    with pytest.raises(BlobMissingError):
                        await look(ref.key)
                    assert not path.exists()
                assert await blobs.put(DATA) == ref
                assert await blobs.get(ref.key) == DATA
            assert (tmp_path / "quarantine").exists() == (damage != "delete")

    asyncio.run(run())


def test_a_failed_sync_writes_a_new_file(tmp_path: Path) -> None:
    async def run() -> None:
        inodes: list[int] = []
        fault = Fault(
            point="blob.fsync", action="raise", where={"moment": "before"}, error=OSError(errno.EIO, "I/O error")
        )

        class Watch(FaultPlan):
            def at(self, point: str, **facts: object) -> bool:
                if point == "blob.fsync" and facts["moment"] == "before":
                    inodes.extend(path.stat().st_ino for path in left_over(tmp_path))
                return super().at(point, **facts)

        with contextlib.closing(local_blobs(tmp_path, faults=Watch(fault))) as blobs:
            ref = await blobs.put(DATA)
            assert len(inodes) == 2
            assert await blobs.get(ref.key) == DATA
            assert left_over(tmp_path) == []

    asyncio.run(run())


def test_a_disk_that_cannot_sync_acknowledges_nothing(tmp_path: Path) -> None:
    async def run() -> None:
        fault = Fault(
            point="blob.fsync",
            action="raise",
            where={"moment": "before"},
            times=2,
            error=OSError(errno.EIO, "I/O error"),
        )
        with contextlib.closing(local_blobs(tmp_path, faults=FaultPlan(fault))) as blobs:
            with pytest.raises(StorageUnavailableError) as caught:
                await blobs.put(DATA)
            assert (caught.value.status, caught.value.code) == (503, "storage_unavailable")
            assert not (tmp_path / key_of(DATA)).exists()
            assert left_over(tmp_path) == []
            assert await blobs.get((await blobs.put(DATA)).key) == DATA

    asyncio.run(run())


@pytest.mark.parametrize(
    ("number", "kind", "status"),
    [
        (errno.ENOSPC, StorageFullError, 507),
        (errno.EDQUOT, StorageFullError, 507),
        (errno.EROFS, StorageUnavailableError, 503),
    ],
)
def test_no_space_is_told_and_passes(blobs: BlobStore, number: int, kind: type[StorageFullError], status: int) -> None:
    async def run() -> None:
        kept = await blobs.put(b"before")
        blobs._faults = FaultPlan(Fault(point="blob.write", action="raise", error=OSError(number, os.strerror(number))))
        with pytest.raises(kind) as caught:
            await blobs.put(DATA)
        assert caught.value.status == status
        assert caught.value.retryable
        assert await blobs.get(kept.key) == b"before"
        assert await blobs.get((await blobs.put(DATA)).key) == DATA

    asyncio.run(run())


def test_a_full_disk(tmp_path: Path) -> None:
    """A real ENOSPC, where a small tmpfs can be mounted."""
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(mount)], capture_output=True, check=False
    )
    if made.returncode != 0:
        pytest.skip("a tmpfs cannot be mounted here")

    async def run() -> None:
        with contextlib.closing(local_blobs(mount)) as blobs:
            kept = await blobs.put(DATA)
            with pytest.raises(StorageFullError):
                await blobs.put(bytes(200_000))
            assert left_over(mount) == []
            assert await blobs.get(kept.key) == DATA
            assert await blobs.put(b"small") is not None

    try:
        asyncio.run(run())
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_blobs_belong_to_one_store(blobs: BlobStore) -> None:
    blobs.bind("one")
    blobs.bind("one")
    with pytest.raises(StoreStartError, match="belong to store one, the database is store two"):
        blobs.bind("two")


def test_discard_spares_the_young_and_what_is_put_again(blobs: BlobStore) -> None:
    async def run() -> None:
        ref = await blobs.put(DATA)
        assert await blobs.older_than(60, ref.key[:2]) == {}
        assert not await blobs.discard(ref.key, 60)
        assert await blobs.older_than(0, ref.key[:2]) == {ref.key: len(DATA)}
        assert not await blobs.discard(key_of(b"none"), 0)
        assert await blobs.discard(ref.key, 0)
        with pytest.raises(BlobMissingError):
            await blobs.get(ref.key)

    asyncio.run(run())


def test_an_old_orphan_that_is_put_again_is_young(tmp_path: Path) -> None:
    async def run() -> None:
        with contextlib.closing(local_blobs(tmp_path)) as first:
            ref = await first.put(DATA)
        os.utime(tmp_path / ref.key, (0, 0))
        with contextlib.closing(local_blobs(tmp_path)) as second:
            assert ref.key in await second.older_than(3600, ref.key[:2])
            await second.put(DATA)
            assert await second.older_than(3600, ref.key[:2]) == {}
            os.utime(tmp_path / ref.key, (0, 0))  # as after a jump of the wall clock
            assert not await second.discard(ref.key, 3600)
        with contextlib.closing(local_blobs(tmp_path)) as third:
            assert await third.discard(ref.key, 3600)

    asyncio.run(run())


def test_what_a_crash_left_is_swept(tmp_path: Path) -> None:
    async def run() -> None:
        with contextlib.closing(local_blobs(tmp_path)) as blobs:
            ref = await blobs.put(DATA)
            old = [tmp_path / f"{ref.key}#17", tmp_path / "staging" / "x.mp4"]
            young = tmp_path / f"{ref.key}#18"
            for path in (*old, young):
                path.write_bytes(b"half")
            for path in old:
                os.utime(path, (0, 0))
            assert await blobs.older_than(0, ref.key[:2]) == {ref.key: len(DATA)}
            with blobs.staging_file(".mp4") as mine:
                mine.touch()
                os.utime(mine, (0, 0))  # as after a jump of the wall clock
                assert await blobs.sweep_staging(3600) == 2
                assert mine.exists()
            assert young.exists()
            assert not any(path.exists() for path in old)

    asyncio.run(run())


def test_the_cache_keeps_the_recent_and_trusts_no_copy(tmp_path: Path) -> None:
    async def run() -> None:
        cache = BlobCache(tmp_path / "cache", max_bytes=40_000)
        with contextlib.closing(bucket(tmp_path, cache=cache)) as blobs:
            refs = [await blobs.put(bytes([number]) * 9_000) for number in range(4)]
            assert await blobs.get(refs[0].key) == bytes(9_000)
            await blobs.put(b"new" * 3_000)
            held = {path.name for path in (tmp_path / "cache").iterdir()}
            assert refs[0].key[3:] in held
            assert refs[1].key[3:] not in held
            (tmp_path / "cache" / refs[0].key[3:]).write_bytes(b"rotten")
            assert await blobs.get(refs[0].key) == bytes(9_000)
            assert await blobs.get(refs[1].key) == bytes([1]) * 9_000
        again = BlobCache(tmp_path / "cache", max_bytes=40_000)
        assert again.get(refs[1].key) == bytes([1]) * 9_000
        again.add("x", bytes(20_000))
        assert again.get("x") is None  # it would push out everything else

    asyncio.run(run())


def test_writers_of_the_same_content_do_not_hurt_each_other(tmp_path: Path) -> None:
    async def run() -> None:
        with contextlib.closing(local_blobs(tmp_path)) as blobs:
            refs = await asyncio.gather(*(blobs.put(bytes([number % 3]) * 50_000) for number in range(30)))
            for ref in set(refs):
                assert len(await blobs.get(ref.key)) == 50_000
            assert len(set(refs)) == 3
            assert left_over(tmp_path) == []

    asyncio.run(run())


def test_damage_in_a_bucket_is_found(tmp_path: Path) -> None:
    async def run() -> None:
        with contextlib.closing(bucket(tmp_path)) as blobs:
            for look in (blobs.get, blobs.verify):
                ref = await blobs.put(DATA)
                obstore.put(blobs._root, ref.key, DATA[:-1])
                with pytest.raises(BlobMissingError, match="quarantine"):
                    await look(ref.key)
                with pytest.raises(BlobMissingError, match="not found"):
                    await look(ref.key)
            assert obstore.head(blobs._root, f"quarantine/{ref.key.replace('/', '-')}")

    asyncio.run(run())
