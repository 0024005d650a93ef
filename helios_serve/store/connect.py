"""Opens the stores of one process as configured. Knows URLs and directories; knows no table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import sqlalchemy as sa
from obstore.exceptions import BaseError as ObjectStoreError
from obstore.store import LocalStore, ObjectStore, S3Store, from_url

from helios_serve.faults import NO_FAULTS, FaultPlan
from helios_serve.store import schema
from helios_serve.store.access import Access
from helios_serve.store.blob_cache import BlobCache
from helios_serve.store.blobs import BlobStore
from helios_serve.store.chunks import Chunks
from helios_serve.store.data_dir import DataDir, sync_dir
from helios_serve.store.database import Database, postgres_engine, sqlite_engine
from helios_serve.store.errors import StoreStartError
from helios_serve.store.jobs import JobStore
from helios_serve.store.leases import LEASE_S, Leases
from helios_serve.store.migrations import migrate, version_of
from helios_serve.store.retention import Retention

if TYPE_CHECKING:
    from obstore.store import ClientConfig

DATABASE_FILE = "helios.db"
CLIENT: ClientConfig = {"timeout": "30s", "connect_timeout": "5s", "allow_http": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig:
    """Where jobs and blobs are.

    data_dir: of SQLite, blobs and caches. database_url: None for SQLite in the data directory; else
    `postgresql://...`. blob_url: None for a directory in the data directory; else `s3://bucket/prefix`, `file:///path`
    or another that obstore knows. lease_s: how long a job stays with a server that says nothing. keep_latents: whether
    finished jobs keep all latents, not only what extending them needs. cache_bytes: local copies of a bucket's blobs.
    """

    data_dir: Path
    database_url: str | None = None
    blob_url: str | None = None
    lease_s: float = LEASE_S
    keep_latents: bool = False
    cache_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        if self.lease_s <= 0:
            raise ValueError(f"lease_s {self.lease_s}: must be above 0")
        if self.cache_bytes < 0:
            raise ValueError(f"cache_bytes {self.cache_bytes}: must be at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stores:
    """Everything durable of one process; `close` when nothing uses it any more."""

    store_id: str
    jobs: JobStore
    leases: Leases
    chunks: Chunks
    blobs: BlobStore
    retention: Retention
    access: Access
    database: Database
    data_dir: DataDir

    def close(self) -> None:
        """Waits for what runs, then lets go of the data directory."""
        self.blobs.close()
        self.database.close()
        self.data_dir.close()


def open_stores(config: StoreConfig, *, faults: FaultPlan = NO_FAULTS) -> Stores:
    """Opens, migrates and checks; blocks, so call it before the event loop runs or in a thread.

    Raises: StoreStartError, with what to do.
    """
    url = None if config.database_url is None else _database_url(config.database_url)
    data_dir = DataDir(config.data_dir, exclusive=url is None)
    engine: sa.Engine | None = None
    try:
        engine = _engine(config, url)
        store_id = migrate(engine)
        sync_dir(config.data_dir)
        blobs = _blobs(config, store_id, faults)
    except BaseException:
        if engine is not None:
            engine.dispose()
        data_dir.close()
        raise
    database = Database(engine, faults=faults)
    leases = Leases(database, lease_s=config.lease_s, faults=faults)
    return Stores(
        store_id=store_id,
        jobs=JobStore(database),
        leases=leases,
        chunks=Chunks(database, leases, blobs),
        blobs=blobs,
        retention=Retention(database, blobs, keep_latents=config.keep_latents),
        access=Access(database),
        database=database,
        data_dir=data_dir,
    )


@contextmanager
def open_access(config: StoreConfig) -> Iterator[Access]:
    """The keys and receivers of a database alone: for a command beside the servers of a Postgres database, or while no
    server uses the data directory.

    Raises: StoreStartError, with what to do; also for an older schema, because servers that know no other may run.
    """
    url = None if config.database_url is None else _database_url(config.database_url)
    with ExitStack() as opened:
        if url is None:
            opened.enter_context(closing(DataDir(config.data_dir, exclusive=True)))
        engine = _engine(config, url)
        opened.callback(engine.dispose)
        with engine.connect() as connection:
            found = version_of(connection)
        if found not in (None, schema.VERSION):
            raise StoreStartError(
                f"the store has schema {found}, and this helios-serve writes schema {schema.VERSION}: start a server of"
                " this version once, which brings the store up"
            )
        migrate(engine)
        yield Access(opened.enter_context(closing(Database(engine))))


def _engine(config: StoreConfig, url: sa.URL | None) -> sa.Engine:
    return sqlite_engine(config.data_dir / DATABASE_FILE) if url is None else postgres_engine(url)


def _database_url(text: str) -> sa.URL:
    try:
        url = sa.make_url(text)
    except sa.exc.ArgumentError:
        raise StoreStartError("--database-url: not a URL; it looks like postgresql://user@host/name") from None
    if url.drivername not in ("postgres", "postgresql", "postgresql+psycopg"):
        raise StoreStartError(
            f"--database-url {url.drivername}://...: only postgresql:// is served; leave it out for SQLite"
        )
    return url


def _blobs(config: StoreConfig, store_id: str, faults: FaultPlan) -> BlobStore:
    local = _local_path(config)
    try:
        if local is not None:
            local.mkdir(parents=True, exist_ok=True)
            blobs = BlobStore(LocalStore(local), local=local, staging=local / "staging", faults=faults)
        else:
            root, staging = _bucket(str(config.blob_url)), config.data_dir / "staging"
            cache = BlobCache(config.data_dir / "cache", max_bytes=config.cache_bytes)
            blobs = BlobStore(root, local=None, staging=staging, cache=cache, faults=faults)
        blobs.bind(store_id)
    except (ObjectStoreError, OSError, ValueError) as error:
        raise StoreStartError(f"blob store {config.blob_url or local}: {error}") from error
    return blobs


def _bucket(url: str) -> ObjectStore:
    if url.startswith("s3://"):
        return S3Store.from_url(url, client_options=CLIENT)
    return from_url(url)


def _local_path(config: StoreConfig) -> Path | None:
    if config.blob_url is None:
        return config.data_dir / "blobs"
    parts = urlsplit(config.blob_url)
    return Path(unquote(parts.path)) if parts.scheme == "file" else None
