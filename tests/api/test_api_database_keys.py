"""API keys in the database: made by the command, known to every server, and ended everywhere soon after."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner, Result

from helios_serve.api.auth import AuthenticationError, Authenticator
from helios_serve.api.database_keys import CACHE_S, MAX_CACHED, DatabaseKeys
from helios_serve.api.keys import KeyLimits, new_key, split_key
from helios_serve.api.keys_cli import keys_app
from helios_serve.store import schema
from helios_serve.store.connect import StoreConfig, Stores, open_access, open_stores
from helios_serve.store.errors import StoreStartError
from tests.api.test_keys import Clock
from tests.postgres import postgres_cluster, postgres_url

__all__ = ["postgres_cluster", "postgres_url"]

NOW = 1.0
"""Before any key of these tests expires."""


@pytest.fixture
def place(tmp_path: Path) -> list[str]:
    """The flags that lead to a SQLite database of its own."""
    return ["--keys", "db", "--data-dir", str(tmp_path / "data")]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(keys_app, list(arguments), env={"HELIOS_KEYS_FILE": None, "HELIOS_DATA_DIR": None})


def made(place: list[str], *flags: str) -> str:
    result = run("create", *place, *flags)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout.strip()


def known(stores: Stores, plain: str, keys: DatabaseKeys | None = None) -> str | None:
    """The tenant that a server takes the holder of a key for."""
    source = DatabaseKeys(stores.access) if keys is None else keys
    try:
        return asyncio.run(Authenticator([source]).authenticate(f"Bearer {plain}", "10.0.0.1", NOW)).tenant
    except AuthenticationError:
        return None


def test_the_commands_and_the_server_know_the_same_keys(place: list[str], tmp_path: Path) -> None:
    flags = ["--scope", "read", "--limit", "frames_per_minute=5000", "--tenant", "studio", "--name", "render farm"]
    plain = made(place, *flags, "--expires-in-days", "30")
    other = made(place)
    parts = split_key(plain)
    assert parts is not None
    first, second = run("list", *place).stdout.splitlines()
    for part in (parts[0], "studio", "read", "frames_per_minute=5000", "render farm", "expires 20"):
        assert part in first
    assert "never expires  default limits" in second
    stores = open_stores(StoreConfig(data_dir=tmp_path / "data"))
    assert known(stores, plain) == "studio"
    assert known(stores, plain[:-1] + ("0" if plain[-1] != "0" else "1")) is None
    key = asyncio.run(DatabaseKeys(stores.access).find(parts[0]))
    assert key is not None
    assert (key.scopes, key.limits) == (frozenset({"read"}), KeyLimits(frames_per_minute=5000))
    assert key.expires_at is not None
    assert key.created_at is not None
    assert key.expires_at - key.created_at == pytest.approx(30 * 86_400, abs=5)
    with stores.database._engine.connect() as connection:
        assert parts[1] not in str(connection.execute(sa.select(schema.api_key)).all())
    stores.close()
    assert run("revoke", parts[0], *place).exit_code == 0
    assert parts[0] not in run("list", *place).stdout
    assert "not in the database" in str(run("revoke", parts[0], *place).exception)
    stores = open_stores(StoreConfig(data_dir=tmp_path / "data"))
    assert (known(stores, plain), known(stores, other)) == (None, "default")
    stores.close()


def test_a_key_revoked_beside_running_servers_ends_at_each_of_them(postgres_url: str, tmp_path: Path) -> None:
    clock = Clock()
    place = ["--database-url", postgres_url]
    plain = made(place, "--tenant", "studio")
    key_id = plain.split("_")[1]
    servers = [open_stores(StoreConfig(data_dir=tmp_path / name, database_url=postgres_url)) for name in "ab"]
    sources = [DatabaseKeys(stores.access, clock=clock) for stores in servers]

    def known_to_all() -> list[str | None]:
        return [known(stores, plain, source) for stores, source in zip(servers, sources, strict=True)]

    assert known_to_all() == ["studio", "studio"]
    assert run("revoke", key_id, *place).exit_code == 0
    assert known_to_all() == ["studio", "studio"], "remembered"
    clock.now += CACHE_S
    assert known_to_all() == [None, None]
    late = made(place, "--tenant", "late")
    assert known(servers[0], late, sources[0]) == "late"
    for stores in servers:
        stores.close()


def test_a_row_is_read_once_in_a_while_and_guesses_take_bounded_memory() -> None:
    clock, reads = Clock(), []

    class NoRows:
        async def key(self, key_id: str) -> None:
            reads.append(key_id)

    source = DatabaseKeys(NoRows(), clock=clock)  # type: ignore[arg-type]

    async def work() -> None:
        for _ in range(3):
            assert await source.find("none") is None
        assert reads == ["none"]
        clock.now += CACHE_S
        await source.find("none")
        assert reads == ["none", "none"]
        for number in range(MAX_CACHED + 5):
            await source.find(f"guess{number}")
        assert len(source._read) == MAX_CACHED

    asyncio.run(work())


@pytest.mark.parametrize("column", ["expires_at", "scopes"])
def test_what_has_expired_or_cannot_be_read_opens_nothing(
    tmp_path: Path, column: str, caplog: pytest.LogCaptureFixture
) -> None:
    with open_access(StoreConfig(data_dir=tmp_path)) as rows:
        plain, key = new_key()
        secret = plain.rpartition("_")[2]
        scopes = ["read", "of a later version"] if column == "scopes" else ["read"]
        ttl_s = -1.0 if column == "expires_at" else None
        asyncio.run(rows.add_key(key_id=key.id, secret=secret, tenant_id="a", scopes=scopes, ttl_s=ttl_s))
    stores = open_stores(StoreConfig(data_dir=tmp_path))
    assert known(stores, plain) is None
    assert ("cannot be used" in caplog.text) == (column == "scopes")
    stores.close()


def test_a_directory_that_a_server_uses_is_refused(place: list[str], tmp_path: Path) -> None:
    stores = open_stores(StoreConfig(data_dir=tmp_path / "data"))
    result = run("create", *place)
    assert isinstance(result.exception, StoreStartError)
    assert "is in use by process" in str(result.exception)
    stores.close()
    made(place)


def test_a_store_of_another_version_is_not_changed(tmp_path: Path) -> None:
    stores = open_stores(StoreConfig(data_dir=tmp_path))
    with stores.database._engine.begin() as connection:
        connection.execute(sa.update(schema.meta).where(schema.meta.c.key == "schema_version").values(value="1"))
    stores.close()
    with pytest.raises(StoreStartError, match="the store has schema 1"), open_access(StoreConfig(data_dir=tmp_path)):
        pass


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--keys-file: needed; or --database-url"),
        (["--keys", "file"], "--keys-file: needed"),
        (["--keys", "db"], "needs --database-url, or --data-dir"),
        (["--keys-file", "k", "--database-url", "postgresql://x"], "say --keys file or --keys db"),
    ],
)
def test_one_place_is_named(flags: list[str], message: str) -> None:
    for command in (["create"], ["list"], ["revoke", "abcd"]):
        assert message in str(run(*command, *flags).exception)
