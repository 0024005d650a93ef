"""Content-addressed blobs in a directory or an S3-compatible bucket: durable before they are named, verified when they
are read. Knows bytes and keys; knows nothing of jobs.

A local file is written beside its place, synced, renamed and its directory synced, so that a file under a key is always
whole: obstore renames without syncing, hence only its reads are used there.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError
from obstore.store import LocalStore, ObjectStore, S3Store

from helios_serve.faults import NO_FAULTS, FaultPlan
from helios_serve.store.blob_cache import BlobCache
from helios_serve.store.blob_key import key_of, key_of_digest, key_of_file, new_digest
from helios_serve.store.data_dir import sync_dir
from helios_serve.store.errors import BlobMissingError, StoreStartError, storage_error
from helios_serve.store.in_thread import in_thread, in_turn
from helios_serve.store.records import BlobRef

if TYPE_CHECKING:
    from obstore import GetOptions

P = ParamSpec("P")
T = TypeVar("T")

GRACE_S = 3600.0
"""Age from which an unreferenced blob is garbage: a younger one may be about to be committed."""

NUM_THREADS = 8
PIECE_BYTES = 1 << 20
STORE_ID = "store-id"
CLOCK = "gc-clock"


class BlobStore:
    """One for each process.

    Args:
        root: obstore's view of the directory or bucket.
        local: the directory, when it is one.
        staging: a local directory for files that are being made.
        cache: of whole blobs read from a bucket.
        faults: visited at `blob.write` and `blob.fsync`, `moment` before and after, with `key`.
    """

    def __init__(
        self,
        root: ObjectStore,
        *,
        local: Path | None,
        staging: Path,
        cache: BlobCache | None = None,
        faults: FaultPlan = NO_FAULTS,
    ) -> None:
        self._root = root
        self._local = local
        self._staging = staging
        self._cache = cache
        self._faults = faults
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="store-blobs")
        # What is kept may come from another machine first, which must not hold readers up.
        self._keepers = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="store-keepers")
        self._lock = threading.Lock()
        self._put_at: dict[str, float] = {}
        self._verified: dict[str, int] = {}
        self._synced: set[str] = set()
        self._staged: set[Path] = set()
        self._numbers = itertools.count(1)
        staging.mkdir(parents=True, exist_ok=True)
        if local is not None:
            local.mkdir(parents=True, exist_ok=True)

    async def put(self, data: bytes) -> BlobRef:
        """Stores bytes; when this returns they are durable.

        Raises: StorageFullError, StorageUnavailableError: nothing is acknowledged, try again later.
        """
        return await self._run(self._put, data)

    async def put_then(self, make: Callable[[], bytes], then: Callable[[BlobRef], Future[T]]) -> T:
        """Stores what `make` returns, and gives what the work gives that `then` begins with the durable blob, as
        `in_turn` does.

        Raises: as `put`; whatever `make`, `then` and its work raise.
        """
        return await in_turn(self._keepers, lambda: _answered(self._put, make()), then)

    async def put_file(self, path: Path) -> BlobRef:
        """Stores a file of `staging_file`, and removes it there. Raises: as `put`."""
        return await self._run(self._put_file, path)

    async def get(self, key: str) -> bytes:
        """The whole blob, verified.

        Raises: BlobMissingError when there is none or it was damaged; StorageUnavailableError.
        """
        return await self._run(self._get, key)

    async def get_all(self, keys: Sequence[str]) -> list[bytes]:
        """Several whole blobs, one after the other. Raises: as `get`, for the first that fails."""
        return await self._run(lambda: [self._get(key) for key in keys])

    async def verify(self, key: str) -> int:
        """The size of an intact blob, read whole once in each process. Raises: as `get`."""
        return await self._run(self._verify, key)

    async def stream(self, key: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """Bytes `start` to `end` - 1 in pieces of about 1 MiB. Call `verify` first: this does not check the content."""
        options: GetOptions = {"range": {"offset": start} if end is None else (start, end)}
        try:
            found = await obstore.get_async(self._root, key, options=options)
            async for piece in found.stream(min_chunk_size=PIECE_BYTES):
                yield bytes(piece)
        except FileNotFoundError:
            raise BlobMissingError(key) from None
        except Exception as error:
            answer = storage_error(error)
            if answer is None:
                raise
            raise answer from error

    async def presign(self, key: str, seconds: float) -> str | None:
        """A URL that a client can read the blob from; None for a directory."""
        if not isinstance(self._root, S3Store):
            return None
        return await obstore.sign_async(self._root, "GET", key, timedelta(seconds=seconds))

    @contextlib.contextmanager
    def staging_file(self, suffix: str) -> Iterator[Path]:
        """A name for a file to be made, on the same disk as a local store; removed at the end if it still exists."""
        path = self._staging / f"{uuid.uuid4().hex}{suffix}"
        self._staged.add(path)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)
            self._staged.discard(path)

    def bind(self, store_id: str) -> None:
        """Marks the blobs as those of one job store: sweeping with another one's rows would delete them.

        Raises: StoreStartError when they belong to another, and errors of obstore and of the system as they are.
        """
        try:
            obstore.put(self._root, STORE_ID, store_id.encode(), mode="create", use_multipart=False)
            if self._local is not None:
                self._sync(self._local / STORE_ID, STORE_ID)
                sync_dir(self._local)
        except AlreadyExistsError:
            found = bytes(obstore.get(self._root, STORE_ID).bytes()).decode(errors="replace")
            if found != store_id:
                raise StoreStartError(
                    f"the blobs belong to store {found[:40]}, the database is store {store_id}: give each database its"
                    " own blob directory or bucket prefix, or restore both from the same backup"
                ) from None

    async def older_than(self, grace_s: float, prefix: str) -> dict[str, int]:
        """Size of each blob under `prefix` (two characters) that is older, by the store's own clock."""
        return await self._run(self._older_than, grace_s, prefix)

    async def discard(self, key: str, grace_s: float) -> bool:
        """Deletes a blob that no row names, unless it was put again meanwhile."""
        return await self._run(self._discard, key, grace_s)

    async def sweep_staging(self, grace_s: float) -> int:
        """Deletes files that a crash left unfinished; returns how many."""
        return await self._run(self._sweep_staging, grace_s)

    def close(self) -> None:
        """Waits for what runs."""
        self._keepers.shutdown()
        self._threads.shutdown()

    async def _run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await in_thread(self._threads, lambda: _answered(work, *args, **kwargs))

    def _put(self, data: bytes) -> BlobRef:
        key = key_of(data)
        self._note_put(key)
        self._faults.at("blob.write", moment="before", key=key)
        if self._local is None:
            self._put_remote(key, data)
        elif not self._is_whole(key):
            self._write_local(key, data)
        self._faults.at("blob.write", moment="after", key=key)
        if self._cache is not None:
            self._cache.add(key, data)
        return BlobRef(key=key, num_bytes=len(data))

    def _put_file(self, path: Path) -> BlobRef:
        key, num_bytes = key_of_file(path), path.stat().st_size
        self._note_put(key)
        self._faults.at("blob.write", moment="before", key=key)
        if self._local is None:
            self._put_remote(key, path)
        elif not self._is_whole(key):
            self._install(path, key)
        self._faults.at("blob.write", moment="after", key=key)
        path.unlink(missing_ok=True)
        return BlobRef(key=key, num_bytes=num_bytes)

    def _put_remote(self, key: str, data: bytes | Path) -> None:
        """An existing object is written again when it is old enough for a sweep to have its eye on it."""
        try:
            obstore.put(self._root, key, data, mode="create", use_multipart=False)
        except AlreadyExistsError:
            age = self._now() - obstore.head(self._root, key)["last_modified"].timestamp()
            if age > GRACE_S / 2:
                obstore.put(self._root, key, data, mode="overwrite")

    def _write_local(self, key: str, data: bytes) -> None:
        """Writes a new file; after a failed sync once more, since the kernel may call lost pages clean."""
        for tries_left in (1, 0):
            part = self._part(key)
            try:
                with part.open("xb") as file:
                    file.write(data)
                self._install(part, key)
            except OSError:
                part.unlink(missing_ok=True)
                if tries_left == 0:
                    raise
            else:
                return

    def _install(self, part: Path, key: str) -> None:
        """Makes a finished file durable under its key."""
        path = self._path(key)
        path.parent.mkdir(exist_ok=True)
        self._sync(part, key)
        part.replace(path)
        self._sync_dirs(path.parent)

    def _is_whole(self, key: str) -> bool:
        """Whether the blob exists, intact; then it is made young and durable. "Exists" alone is not durable."""
        path = self._path(key)
        if not path.exists():
            return False
        if key_of_file(path) != key:
            self._quarantine(key)
            return False
        os.utime(path)
        self._sync(path, key)
        self._sync_dirs(path.parent)
        return True

    def _sync(self, path: Path, key: str) -> None:
        fd = os.open(path, os.O_RDONLY)
        try:
            self._faults.at("blob.fsync", moment="before", key=key)
            os.fsync(fd)
            self._faults.at("blob.fsync", moment="after", key=key)
        finally:
            os.close(fd)

    def _sync_dirs(self, folder: Path) -> None:
        """Makes a new name durable, and that of its folder, which may be new too."""
        sync_dir(folder)
        if folder.name not in self._synced:
            sync_dir(folder.parent)
            self._synced.add(folder.name)

    def _get(self, key: str) -> bytes:
        cached = None if self._cache is None else self._cache.get(key)
        if cached is not None and key_of(cached) == key:
            return cached
        try:
            data = bytes(obstore.get(self._root, key).bytes())
        except FileNotFoundError:
            raise BlobMissingError(key) from None
        if key_of(data) != key:
            self._quarantine(key)
            raise BlobMissingError(key, "damaged; moved to quarantine")
        if self._cache is not None:
            self._cache.add(key, data)
        return data

    def _verify(self, key: str) -> int:
        """Remembers what was intact; a file that has changed its size since is read again."""
        try:
            size = int(obstore.head(self._root, key)["size"])
            if self._verified.get(key) == size:
                return size
            digest = new_digest()
            for piece in obstore.get(self._root, key).stream(min_chunk_size=PIECE_BYTES):
                digest.update(piece)
        except FileNotFoundError:
            raise BlobMissingError(key) from None
        if key_of_digest(digest.hexdigest()) != key:
            self._quarantine(key)
            raise BlobMissingError(key, "damaged; moved to quarantine")
        with self._lock:
            if len(self._verified) > 100_000:
                self._verified.clear()
            self._verified[key] = size
        return size

    def _quarantine(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # another reader was faster
            obstore.rename(self._root, key, f"quarantine/{key.replace('/', '-')}")

    def _older_than(self, grace_s: float, prefix: str) -> dict[str, int]:
        limit = self._now() - grace_s
        found = (meta for batch in obstore.list(self._root, prefix) for meta in batch)
        return {meta["path"]: meta["size"] for meta in found if meta["last_modified"].timestamp() < limit}

    def _discard(self, key: str, grace_s: float) -> bool:
        try:
            if self._local is None:
                return self._discard_old(key, grace_s)
            with self._lock:  # a put of this process comes before or after
                return self._discard_old(key, grace_s)
        except FileNotFoundError:
            return False

    def _discard_old(self, key: str, grace_s: float) -> bool:
        put_at = self._put_at.get(key)
        if put_at is not None and time.monotonic() - put_at < grace_s:
            return False
        if self._now() - obstore.head(self._root, key)["last_modified"].timestamp() < grace_s:
            return False
        obstore.delete(self._root, key)
        self._verified.pop(key, None)
        return True

    def _sweep_staging(self, grace_s: float) -> int:
        limit, num_deleted = time.time() - grace_s, 0
        places = [self._staging.iterdir()]
        if self._local is not None:
            places.append(self._local.glob("??/*#*"))
        for path in itertools.chain(*places):
            with contextlib.suppress(FileNotFoundError):
                if path not in self._staged and path.stat().st_mtime <= limit:
                    path.unlink()
                    num_deleted += 1
        return num_deleted

    def _note_put(self, key: str) -> None:
        """From here on, for a while, no sweep of this process deletes the blob, whatever the wall clock does."""
        now = time.monotonic()
        with self._lock:
            self._put_at.pop(key, None)
            self._put_at[key] = now
            while self._put_at and now - next(iter(self._put_at.values())) > GRACE_S:
                del self._put_at[next(iter(self._put_at))]

    def _now(self) -> float:
        """The clock that dates the blobs."""
        if self._local is not None:
            return time.time()
        obstore.put(self._root, CLOCK, b"", mode="overwrite")
        return obstore.head(self._root, CLOCK)["last_modified"].timestamp()

    def _path(self, key: str) -> Path:
        assert self._local is not None
        return self._local / key

    def _part(self, key: str) -> Path:
        path = self._path(key)
        path.parent.mkdir(exist_ok=True)
        return path.with_name(f"{path.name}#{os.getpid()}{next(self._numbers)}")


def local_blobs(path: Path, *, faults: FaultPlan = NO_FAULTS) -> BlobStore:
    """Blobs in a directory."""
    path.mkdir(parents=True, exist_ok=True)
    return BlobStore(LocalStore(path), local=path, staging=path / "staging", faults=faults)


def _answered(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Its result, with errors of obstore and of the system turned into those of the API."""
    try:
        return work(*args, **kwargs)
    except Exception as error:
        answer = storage_error(error)
        if answer is None:
            raise
        raise answer from error
