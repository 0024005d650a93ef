"""Numbered, forward-only steps from each older schema to the next. Knows table definitions as they were; runs before
anything else touches the store.

A step is text, so that later changes of `schema` cannot change it. {double}, {false}: as the dialect writes them.
"""

from __future__ import annotations

import logging
import uuid
from pathlib import Path

import sqlalchemy as sa

from helios_serve.store import schema
from helios_serve.store.data_dir import sync_dir
from helios_serve.store.errors import StoreStartError

logger = logging.getLogger(__name__)

STEPS: dict[int, tuple[str, ...]] = {
    2: (
        "ALTER TABLE job ADD COLUMN first_blob TEXT",
        "ALTER TABLE job ADD COLUMN purged_at {double}",
        "ALTER TABLE job ADD COLUMN in_flight BIGINT",
        "ALTER TABLE job ADD COLUMN solo_crashes BIGINT DEFAULT '0' NOT NULL",
        "ALTER TABLE job ADD COLUMN pruned BOOLEAN DEFAULT {false} NOT NULL",
        "CREATE INDEX ix_job_expires_at ON job (expires_at)",
    ),
    3: ("ALTER TABLE webhook_endpoint ADD COLUMN name TEXT",),
    4: ("CREATE INDEX ix_chunk_undecoded ON chunk (job, idx) WHERE seg_blob IS NULL",),
}
"""Version -> the statements that lead to it from the one before."""

LOCK = 0x48656C696F73
"""Postgres advisory lock: one server at a time migrates."""


def migrate(engine: sa.Engine) -> str:
    """Makes the tables, or brings them to `schema.VERSION`; returns the store's id. A SQLite file is copied first.

    Raises: StoreStartError for a schema newer than this code.
    """
    _back_up(engine)
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
        found = version_of(connection)
        if found is None:
            return _create(connection)
        for version in range(found + 1, schema.VERSION + 1):
            for statement in STEPS[version]:
                connection.execute(sa.text(statement.format(**_types(connection))))
            logger.info("store migrated to schema %d", version)
        connection.execute(_meta("schema_version").values(value=str(schema.VERSION)))
        store_id = connection.scalar(sa.select(schema.meta.c.value).where(schema.meta.c.key == "store_id"))
        assert isinstance(store_id, str)
        return store_id


def version_of(connection: sa.Connection) -> int | None:
    """The schema of the store; None when there is none yet.

    Raises: StoreStartError when it is newer than this code, or not a store of ours.
    """
    tables = set(sa.inspect(connection).get_table_names())
    if "meta" not in tables:
        if "job" in tables:
            raise StoreStartError("the database has a table `job` that is not ours: give helios-serve its own database")
        return None
    value = connection.scalar(sa.select(schema.meta.c.value).where(schema.meta.c.key == "schema_version"))
    if value is None:
        raise StoreStartError("the database has a table `meta` without a schema version: it is not ours")
    if int(value) > schema.VERSION:
        raise StoreStartError(
            f"the store has schema {value}, and this helios-serve reads schemas up to {schema.VERSION}: start the newer"
            " version that wrote it, or restore the copy made before its upgrade"
        )
    return int(value)


def _create(connection: sa.Connection) -> str:
    schema.metadata.create_all(connection)
    store_id = uuid.uuid4().hex
    rows = [{"key": "schema_version", "value": str(schema.VERSION)}, {"key": "store_id", "value": store_id}]
    connection.execute(schema.meta.insert(), rows)
    return store_id


def _back_up(engine: sa.Engine) -> None:
    """Copies a SQLite file of an older schema to FILE.schemaN, once."""
    if engine.dialect.name != "sqlite":
        return
    with engine.connect() as connection:
        found = version_of(connection)
    if found is None or found == schema.VERSION:
        return
    path = Path(f"{engine.url.database}.schema{found}")
    if not path.exists():
        part = path.with_name(path.name + ".part")
        part.unlink(missing_ok=True)
        raw = engine.raw_connection()
        try:
            raw.cursor().execute("VACUUM INTO ?", (str(part),))
        finally:
            raw.close()
        part.rename(path)
        sync_dir(path.parent)
        logger.info("store with schema %d copied to %s", found, path)


def _meta(key: str) -> sa.Update:
    return sa.update(schema.meta).where(schema.meta.c.key == key)


def _types(connection: sa.Connection) -> dict[str, str]:
    if connection.dialect.name == "postgresql":
        return {"double": "DOUBLE PRECISION", "false": "false"}
    return {"double": "DOUBLE", "false": "0"}
