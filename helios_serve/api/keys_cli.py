"""`helios-serve keys create | list | revoke`: changes a file of API keys. A running server notices within a second."""

from __future__ import annotations

import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
import yaml

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
)

keys_app = typer.Typer(help="Make, list and revoke API keys in a file.", no_args_is_help=True)

KeysFile = Annotated[
    Path, typer.Option("--keys-file", envvar="HELIOS_KEYS_FILE", help="YAML, or JSON if its name ends so.")
]


@keys_app.command("create")
def create(
    keys_file: KeysFile,
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
    if expires_in_days is not None and not expires_in_days > 0:
        raise ValueError(f"expires-in-days {expires_in_days:g}: must be above 0")
    plain, key = new_key(
        name=name,
        tenant=tenant,
        scopes=DEFAULT_SCOPES if scope is None else [_scope(each) for each in scope],
        limits=limits_from(dict(_limit(each) for each in limit or [])),
        expires_at=None if expires_in_days is None else float(round(time.time() + 86_400 * expires_in_days)),
    )
    change_keys(keys_file, lambda keys: [*keys, key])
    print(f"added key {key.id} of tenant {key.tenant} to {keys_file}; it is shown only now:", file=sys.stderr)
    print(plain)


@keys_app.command("list")
def list_keys(keys_file: KeysFile) -> None:
    """List the keys of a file, without secrets."""
    for key in read_keys(keys_file):
        print(_line(key))


@keys_app.command("revoke")
def revoke(
    key_id: Annotated[str, typer.Argument(help="The part between hs_ and the next _.")], keys_file: KeysFile
) -> None:
    """Remove a key."""

    def without(keys: list[Key]) -> list[Key]:
        kept = [key for key in keys if key.id != key_id]
        if len(kept) == len(keys):
            raise ValueError(f"key {key_id[:64]}: not in {keys_file}; `keys list` shows those that are")
        return kept

    if not keys_file.exists():
        raise ValueError(f"keys file {keys_file}: does not exist")
    change_keys(keys_file, without)
    print(f"revoked key {key_id}", file=sys.stderr)


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
