"""Older schemas are brought up, newer ones refused, and both roads lead to the same tables."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from helios_serve.store import schema
from helios_serve.store.connect import DATABASE_FILE, StoreConfig, open_stores
from helios_serve.store.database import Database, postgres_engine, sqlite_engine
from helios_serve.store.errors import StoreStartError
from helios_serve.store.migrations import STEPS, migrate
from tests.store.helpers import both

FIXTURES = Path(__file__).parent / "fixtures"


def load_old(database_url: str | None, data_dir: Path) -> None:
    """The store as schema 1 made it."""
    data_dir.mkdir(exist_ok=True)
    kind = "sqlite" if database_url is None else "postgres"
    script = (FIXTURES / f"schema_1.{kind}.sql").read_text()
    if database_url is None:
        with contextlib.closing(sqlite3.connect(data_dir / DATABASE_FILE)) as connection:
            connection.executescript(script)
    else:
        with psycopg.connect(database_url) as connection:
            connection.execute(script.encode())


def engine_of(database_url: str | None, data_dir: Path) -> sa.Engine:
    if database_url is None:
        return sqlite_engine(data_dir / DATABASE_FILE)
    return postgres_engine(sa.make_url(database_url))


def shape(engine: sa.Engine) -> dict[str, Any]:
    """Tables as the database describes them."""
    inspected = sa.inspect(engine)
    tables = {}
    for name in inspected.get_table_names():
        columns = {
            column["name"]: (str(column["type"]), column["nullable"], str(column["default"]).strip("()'"))
            for column in inspected.get_columns(name)
        }
        indexes = {
            index["name"]: (
                index["column_names"],
                index["unique"],
                [str(option).strip("()") for option in index.get("dialect_options", {}).values()],
            )
            for index in inspected.get_indexes(name)
        }
        foreign = [
            (key["constrained_columns"], key["referred_table"], key["options"])
            for key in inspected.get_foreign_keys(name)
        ]
        tables[name] = (columns, indexes, inspected.get_pk_constraint(name)["constrained_columns"], foreign)
    return tables


def set_version(connection: sa.Connection, version: int) -> None:
    connection.execute(sa.update(schema.meta).where(schema.meta.c.key == "schema_version").values(value=str(version)))


def test_every_version_has_a_step() -> None:
    assert sorted(STEPS) == list(range(2, schema.VERSION + 1))


def test_a_migrated_store_equals_a_new_one(database_url: str | None, tmp_path: Path) -> None:
    load_old(database_url, tmp_path)
    migrated = engine_of(database_url, tmp_path)
    assert migrate(migrated) == "old-store"
    found = shape(migrated)
    with migrated.begin() as connection:
        schema.metadata.drop_all(connection)
    migrate(migrated)
    assert found == shape(migrated)
    migrated.dispose()


def test_old_jobs_go_on_after_a_migration(database_url: str | None, tmp_path: Path) -> None:
    async def run() -> None:
        load_old(database_url, tmp_path)
        with contextlib.closing(open_stores(StoreConfig(data_dir=tmp_path, database_url=database_url))) as stores:
            assert stores.store_id == "old-store"
            done = await stores.jobs.get("a", "video_done")
            assert (done.state, done.solo_crashes, done.is_pruned, done.purged_at) == ("finished", 0, False, None)
            (job,) = await stores.leases.claim(10)
            assert (job.id, job.epoch, job.next_chunk) == ("video_half", 4, 1)
            point = await stores.chunks.resume_point(job.lease)
            assert point is not None
            assert (point.rng, point.num_published) == (b"\x01\x02", 1)
            last = await both(stores, job.lease, 1)
            assert last is not None
            assert last.is_finished
        if database_url is None:
            copy = sqlite3.connect(tmp_path / f"{DATABASE_FILE}.schema1")
            assert copy.execute("SELECT value FROM meta WHERE key = 'schema_version'").fetchone() == ("1",)
            assert copy.execute("SELECT count(*) FROM job").fetchone() == (2,)
            copy.close()

    asyncio.run(run())


def test_a_newer_store_is_refused_with_both_versions(database_url: str | None, tmp_path: Path) -> None:
    config = StoreConfig(data_dir=tmp_path, database_url=database_url)
    with contextlib.closing(open_stores(config)) as stores:
        stores.database.write_now(set_version, schema.VERSION + 1)
    with pytest.raises(
        StoreStartError, match=f"has schema {schema.VERSION + 1}, .* up to {schema.VERSION}: start the newer"
    ):
        open_stores(config)
    engine = engine_of(database_url, tmp_path)
    with contextlib.closing(Database(engine)) as database:
        database.write_now(set_version, schema.VERSION)
    open_stores(config).close()


def test_a_failed_step_changes_nothing(
    database_url: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_old(database_url, tmp_path)
    engine = engine_of(database_url, tmp_path)
    before = shape(engine)
    monkeypatch.setitem(STEPS, 2, (*STEPS[2], "ALTER TABLE nothing ADD COLUMN x TEXT"))
    with pytest.raises(sa.exc.DBAPIError, match="nothing"):
        migrate(engine)
    assert shape(engine) == before
    engine.dispose()


def test_other_peoples_tables_are_left_alone(database_url: str | None, tmp_path: Path) -> None:
    engine = engine_of(database_url, tmp_path)
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE job (id INTEGER)"))
    with pytest.raises(StoreStartError, match="not ours"):
        migrate(engine)
    engine.dispose()


def test_servers_that_start_together_make_one_store(postgres_url: str, tmp_path: Path) -> None:
    async def run() -> None:
        def start(number: int) -> str:
            config = StoreConfig(data_dir=tmp_path / str(number), database_url=postgres_url)
            with contextlib.closing(open_stores(config)) as stores:
                return stores.store_id

        ids = await asyncio.gather(*(asyncio.to_thread(start, number) for number in range(4)))
        assert len(set(ids)) == 1

    asyncio.run(run())


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://host/name", "only postgresql:// is served"),
        ("nonsense", "not a URL"),
        ("postgresql://helios@127.0.0.1:1/none", "does not answer"),
    ],
)
def test_a_database_that_cannot_be_used_is_named(url: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(StoreStartError, match=message):
        open_stores(StoreConfig(data_dir=tmp_path, database_url=url))


def test_passwords_are_not_shown(tmp_path: Path) -> None:
    with pytest.raises(StoreStartError) as caught:
        open_stores(StoreConfig(data_dir=tmp_path, database_url="postgresql://u:geheim@127.0.0.1:1/none"))
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize("damage", ["header", "page", "cut"])
def test_a_damaged_database_is_refused(damage: str, tmp_path: Path) -> None:
    config = StoreConfig(data_dir=tmp_path)
    open_stores(config).close()
    path = tmp_path / DATABASE_FILE
    data = bytearray(path.read_bytes())
    if damage == "header":
        data[:16] = bytes(16)
    elif damage == "page":
        data[4096 * 3 : 4096 * 3 + 200] = b"\xff" * 200
    else:
        del data[4096 * 4 :]
    path.write_bytes(data)
    with pytest.raises(StoreStartError, match=r"is damaged .* restore it from a backup"):
        open_stores(config)


def test_network_file_systems_are_recognised() -> None:
    from helios_serve.store.data_dir import NETWORK_FILE_SYSTEMS, file_system_of

    mountinfo = (
        "22 1 254:0 / / rw shared:1 - ext4 /dev/vda rw\n"
        "40 22 0:50 / /mnt/a\\040b rw shared:2 - nfs4 host:/x rw\n"
        "41 22 0:51 / /mnt/fuse rw - fuse.sshfs host: rw\n"
    )
    assert file_system_of(Path("/mnt/a b/data"), mountinfo) == "nfs4"
    assert file_system_of(Path("/mnt/a"), mountinfo) == "ext4"
    assert file_system_of(Path("/mnt/fuse"), mountinfo) in NETWORK_FILE_SYSTEMS
