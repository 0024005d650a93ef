"""Transactions on SQLite or Postgres from an event loop. Knows connections, threads and retries; knows no table.

SQLite: one writer thread, two readers, WAL, every commit on disk before it returns. Postgres: a pool of connections,
one thread for each. A transaction whose caller was cancelled still runs to its end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from helios_serve.faults import NO_FAULTS, FaultPlan
from helios_serve.store.errors import StoreStartError, sqlstate, storage_error
from helios_serve.store.in_thread import in_thread

P = ParamSpec("P")
T = TypeVar("T")
Insert = postgresql.Insert | sqlite.Insert

NUM_READERS = 2
NUM_POSTGRES_CONNECTIONS = 8
STATEMENT_TIMEOUT_S = 5
MIN_POSTGRES = 140_000
RETRIED = ("40001", "40P01")
"""Serialization failure and deadlock: nothing was changed, so the transaction is run again."""

READ_ONLY = {"helios_read_only": True}


class Database:
    """Runs functions of a connection, each in a transaction of its own, off the event loop.

    Args:
        engine: from `sqlite_engine` or `postgres_engine`.
        faults: visited at `db.commit`, `moment` before and after, with the transaction's `verb`.
    """

    def __init__(self, engine: sa.Engine, *, faults: FaultPlan = NO_FAULTS) -> None:
        self._engine = engine
        self._faults = faults
        self.is_postgres = engine.dialect.name == "postgresql"
        threads = NUM_POSTGRES_CONNECTIONS if self.is_postgres else 1
        self._writers = ThreadPoolExecutor(threads, thread_name_prefix="store-writer")
        self._readers = (
            self._writers if self.is_postgres else ThreadPoolExecutor(NUM_READERS, thread_name_prefix="store-reader")
        )

    async def read(self, work: Callable[Concatenate[sa.Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of `work(connection, ...)` on one snapshot of SQLite, or read-committed on Postgres.

        Raises: StorageUnavailableError, and whatever `work` raises.
        """
        call = self._call(self.read_now, work, *args, **kwargs)
        return await in_thread(self._readers, call)

    async def write(self, work: Callable[Concatenate[sa.Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of `work(connection, ...)` once it is durable. After an error of the commit itself the outcome is
        unknown: verbs that are called again find what they did.

        Raises: StorageUnavailableError, StorageFullError, and whatever `work` raises.
        """
        return await in_thread(self._writers, self._call(self.write_now, work, *args, **kwargs))

    def begin_write(
        self, work: Callable[Concatenate[sa.Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> Future[T]:
        """`write`, begun in any thread."""
        return self._writers.submit(self._call(self.write_now, work, *args, **kwargs))

    def read_now(self, work: Callable[Concatenate[sa.Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`read` in the calling thread."""
        with _translated(), self._engine.connect().execution_options(**READ_ONLY) as connection, connection.begin():
            return work(connection, *args, **kwargs)

    def write_now(self, work: Callable[Concatenate[sa.Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`write` in the calling thread."""
        verb = work.__name__.strip("_")
        with _translated():
            for tries_left in (2, 1, 0):
                try:
                    with self._engine.begin() as connection:
                        result = work(connection, *args, **kwargs)
                        self._faults.at("db.commit", moment="before", verb=verb)
                    self._faults.at("db.commit", moment="after", verb=verb)
                    return result
                except sa.exc.DBAPIError as error:
                    if tries_left == 0 or sqlstate(error) not in RETRIED:
                        raise
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Waits for what runs."""
        self._writers.shutdown()
        self._readers.shutdown()
        self._engine.dispose()

    def _call(self, run: Callable[..., T], *args: Any, **kwargs: Any) -> Callable[[], T]:
        return lambda: run(*args, **kwargs)


def fields_of(table: sa.Table, row: Sequence[Any]) -> dict[str, Any]:
    """The values of a whole row of `table` by the keys of its columns."""
    return dict(zip(table.c.keys(), row, strict=True))


def insert_into(connection: sa.Connection, table: sa.Table) -> Insert:
    """An INSERT that knows ON CONFLICT."""
    return postgresql.insert(table) if connection.dialect.name == "postgresql" else sqlite.insert(table)


def sqlite_engine(path: Path) -> sa.Engine:
    """The file is made when it does not exist.

    Raises: StoreStartError when it is damaged.
    """
    engine = sa.create_engine(
        sa.URL.create("sqlite+pysqlite", database=str(path)),
        poolclass=sa.QueuePool,
        pool_size=1 + NUM_READERS,
        max_overflow=0,
        connect_args={"check_same_thread": False, "timeout": STATEMENT_TIMEOUT_S},
    )
    sa.event.listen(engine, "connect", _prepare_sqlite)
    sa.event.listen(engine, "begin", _begin_sqlite)
    try:
        with engine.connect() as connection:
            problems = [row[0] for row in connection.exec_driver_sql("PRAGMA integrity_check(3)")]
    except sa.exc.DatabaseError as error:
        problems = [str(error.orig)]
    if problems != ["ok"]:
        engine.dispose()
        raise StoreStartError(f"database {path} is damaged ({'; '.join(problems)}): restore it from a backup")
    return engine


def postgres_engine(url: sa.URL) -> sa.Engine:
    """Raises: StoreStartError when psycopg is missing, the server does not answer, or it is too old."""
    options = (
        f"-c statement_timeout={1000 * STATEMENT_TIMEOUT_S} -c lock_timeout={1000 * STATEMENT_TIMEOUT_S}"
        " -c idle_in_transaction_session_timeout=10000 -c synchronous_commit=on -c timezone=UTC"
    )
    try:
        engine = sa.create_engine(
            url.set(drivername="postgresql+psycopg"),
            pool_size=NUM_POSTGRES_CONNECTIONS,
            max_overflow=0,
            pool_timeout=STATEMENT_TIMEOUT_S,
            pool_pre_ping=True,
            isolation_level="READ COMMITTED",
            connect_args={
                "options": options,
                "connect_timeout": STATEMENT_TIMEOUT_S,
                "application_name": "helios-serve",
            },
        )
    except ModuleNotFoundError as error:
        raise StoreStartError("Postgres needs psycopg: pip install 'helios-serve[postgres]'") from error
    try:
        with engine.connect() as connection:
            number = int(connection.exec_driver_sql("SHOW server_version_num").scalar_one())
    except sa.exc.DBAPIError as error:
        engine.dispose()
        shown = url.render_as_string(hide_password=True)
        raise StoreStartError(f"database {shown} does not answer: {str(error.orig).strip()}") from error
    if number < MIN_POSTGRES:
        engine.dispose()
        raise StoreStartError(f"Postgres {number // 10_000} is too old; {MIN_POSTGRES // 10_000} or newer is needed")
    return engine


def _prepare_sqlite(connection: Any, record: object) -> None:
    connection.isolation_level = None  # the driver begins no transaction of its own: `_begin_sqlite` does
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: sa.Connection) -> None:
    read_only = "helios_read_only" in connection.get_execution_options()
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


class _translated:  # noqa: N801  # reads as a statement
    """Turns errors of the driver into those of the API."""

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        answer = storage_error(error) if isinstance(error, Exception) else None
        if answer is not None:
            raise answer from error
