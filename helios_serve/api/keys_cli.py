"""`helios-serve keys create | list | revoke`: API keys in a file or in the database.

A running server notices a change of its file within a second, and one of its database within two.
"""

from __future__ import annotations

import asyncio
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, Protocol

import typer
import yaml

from helios_serve.api.database_keys import key_of
from helios_serve.api.keys import (
    DEFAULT_SCOPES,
    DEFAULT_TENANT,
    SCOPES,
    Key,
    Scope,
    change_keys,
    key_to_dict,
    limits_from,
    new_key,
    read_keys,
    split_key,
)
from helios_serve.store.connect import StoreConfig, open_access

keys_app = typer.Typer(help="Make, list and revoke API keys in a file or in the database.", no_args_is_help=True)

KeysFile = Annotated[
    Path | None, typer.Option("--keys-file", envvar="HELIOS_KEYS_FILE", help="YAML, or JSON if its name ends so.")
]
DatabaseUrl = Annotated[
    str | None,
    typer.Option(
        "--database-url",
        envvar="HELIOS_STORE_DATABASE_URL",
        help="postgresql://..., that of the servers.",
        metavar="URL",
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir", envvar="HELIOS_DATA_DIR", help="Holds the database when it is SQLite; no server may be using it."
    ),
]
Kind = Annotated[
    Literal["file", "db"] | None,
    typer.Option("--keys", help="Where the keys are, if a file and a database are both known."),
]


@keys_app.command("create")
def create(
    keys_file: KeysFile = None,
    database_url: DatabaseUrl = None,
    data_dir: DataDir = None,
    kind: Kind = None,
    tenant: Annotated[
        str, typer.Option(help="Owner of the videos; keys of one tenant see each other's.")
    ] = DEFAULT_TENANT,
    name: Annotated[str, typer.Option(help="A note for people.")] = "",
    scope: Annotated[
        list[str] | None, typer.Option(help="Repeat for several: " + ", ".join(SCOPES) + "; all but raw and admin.")
    ] = None,
    limit: Annotated[list[str] | None, typer.Option(help="Such as frames_per_minute=5000; repeat for several.")] = None,
    expires_in_days: Annotated[float | None, typer.Option(help="Never, when absent.")] = None,
) -> None:
    """Make a key and print it, once: only its hash is kept."""
    place = _place(keys_file, database_url, data_dir, kind)
    if expires_in_days is not None and not expires_in_days > 0:
        raise ValueError(f"expires-in-days {expires_in_days:g}: must be above 0")
    plain, key = new_key(
        name=name,
        tenant=tenant,
        scopes=DEFAULT_SCOPES if scope is None else [_scope(each) for each in scope],
        limits=limits_from(dict(_limit(each) for each in limit or [])),
        expires_at=None if expires_in_days is None else float(round(time.time() + 86_400 * expires_in_days)),
    )
    place.add(plain, key)
    print(f"added key {key.id} of tenant {key.tenant} to {place.name}; it is shown only now:", file=sys.stderr)
    print(plain)


@keys_app.command("list")
def list_keys(
    keys_file: KeysFile = None, database_url: DatabaseUrl = None, data_dir: DataDir = None, kind: Kind = None
) -> None:
    """List the keys, without secrets."""
    for key in _place(keys_file, database_url, data_dir, kind).listed():
        print(_line(key))


@keys_app.command("revoke")
def revoke(
    key_id: Annotated[str, typer.Argument(help="The part between hs_ and the next _.")],
    keys_file: KeysFile = None,
    database_url: DatabaseUrl = None,
    data_dir: DataDir = None,
    kind: Kind = None,
) -> None:
    """Remove a key."""
    place = _place(keys_file, database_url, data_dir, kind)
    if not place.remove(key_id):
        raise ValueError(f"key {key_id[:64]}: not in {place.name}; `keys list` shows those that are")
    print(f"revoked key {key_id}", file=sys.stderr)


class _Place(Protocol):
    """Where keys are kept."""

    @property
    def name(self) -> str: ...

    def add(self, plain: str, key: Key) -> None: ...

    def listed(self) -> list[Key]: ...

    def remove(self, key_id: str) -> bool:
        """False when there is no such key."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    def add(self, plain: str, key: Key) -> None:
        change_keys(self.path, lambda keys: [*keys, key])

    def listed(self) -> list[Key]:
        return read_keys(self.path)

    def remove(self, key_id: str) -> bool:
        if not self.path.exists():
            raise ValueError(f"keys file {self.path}: does not exist")
        found: list[Key] = []

        def without(keys: list[Key]) -> list[Key]:
            found.extend(key for key in keys if key.id == key_id)
            return [key for key in keys if key.id != key_id]

        change_keys(self.path, without)
        return bool(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    config: StoreConfig

    @property
    def name(self) -> str:
        """Without the address, which may hold a password."""
        return "the database"

    def add(self, plain: str, key: Key) -> None:
        parts = split_key(plain)
        assert parts is not None
        limits = key_to_dict(key)["limits"]
        assert isinstance(limits, dict)
        with open_access(self.config) as rows:
            asyncio.run(
                rows.add_key(
                    key_id=key.id,
                    secret=parts[1],
                    tenant_id=key.tenant,
                    name=key.name,
                    scopes=sorted(key.scopes),
                    limits=limits,
                    ttl_s=None if key.expires_at is None else key.expires_at - time.time(),
                )
            )

    def listed(self) -> list[Key]:
        with open_access(self.config) as rows:
            return [key_of(row) for row in asyncio.run(rows.keys()) if row.revoked_at is None]

    def remove(self, key_id: str) -> bool:
        with open_access(self.config) as rows:
            found = asyncio.run(rows.keys())
            if all(row.id != key_id or row.revoked_at is not None for row in found):
                return False
            return asyncio.run(rows.revoke_key(key_id))


def _place(
    keys_file: Path | None, database_url: str | None, data_dir: Path | None, kind: Literal["file", "db"] | None
) -> _Place:
    """Raises ValueError when nothing, or not one thing, is named."""
    if kind is None:
        if keys_file is not None and database_url is not None:
            raise ValueError("--keys-file and --database-url are both known: say --keys file or --keys db")
        kind = "file" if keys_file is not None or database_url is None else "db"
    if kind == "file":
        if keys_file is None:
            raise ValueError("--keys-file: needed; or --database-url, for keys in the database")
        return _File(path=keys_file)
    if database_url is None and data_dir is None:
        raise ValueError("--keys db: needs --database-url, or --data-dir for SQLite")
    # With a URL the directory is not looked at.
    return _Rows(config=StoreConfig(data_dir=Path() if data_dir is None else data_dir, database_url=database_url))


def _line(key: Key) -> str:
    until = "never expires"
    if key.expires_at is not None:
        word = "expired" if key.is_expired(time.time()) else "expires"
        until = f"{word} {datetime.fromtimestamp(key.expires_at, UTC):%Y-%m-%d %H:%M} UTC"
    scopes = ",".join(scope for scope in SCOPES if scope in key.scopes)
    limits = key_to_dict(key)["limits"]
    assert isinstance(limits, dict)
    changed = " ".join(f"{name}={value}" for name, value in limits.items()) or "default limits"
    return "  ".join([key.id, key.tenant, scopes, until, changed, *([key.name] if key.name else [])])


def _scope(text: str) -> Scope:
    for scope in SCOPES:
        if text == scope:
            return scope
    raise ValueError(f"scope {text}: unknown; known: {', '.join(SCOPES)}")


def _limit(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"limit {text}: must read name=value, such as frames_per_minute=5000")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError:
        raise ValueError(f"limit {text}: must be a number") from None
