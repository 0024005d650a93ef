"""API keys: what one is and may do, how it is written, and where it is looked up.

A key reads `hs_<id>_<secret>`. Only the SHA-256 of the secret is kept, which is enough for 256 random bits. Knows files
and environment variables; knows no protocol, and asks a database only through `KeySource`.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import logging
import math
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal, Protocol, get_args

import yaml

from helios_serve.api.private_file import locked, write_private

logger = logging.getLogger(__name__)

Scope = Literal["generate", "read", "realtime", "webhooks", "raw", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
DEFAULT_SCOPES: frozenset[Scope] = frozenset({"generate", "read", "realtime", "webhooks"})
DEFAULT_TENANT = "default"

_ID = re.compile(r"[a-z0-9]{4,32}")
_PLAIN = re.compile(r"hs_([a-z0-9]{4,32})_([0-9a-f]{64})")
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAY_BE_ZERO = frozenset({"max_sessions", "max_concurrent_streams", "media_bytes_per_hour", "max_stored_bytes"})
_FILE_CHECK_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyLimits:
    """What the holder of a key may use. Use is summed over all keys of a tenant, so that more keys give nothing more.

    Jobs beyond `max_running_jobs` wait; what else is over a limit is refused. max_session_seconds and
    max_expires_after: seconds. min_priority: the most urgent one; lower numbers run first. weight: share of the devices
    against other tenants. may_use_realtime: whether jobs and sessions may ask for the realtime class.
    """

    frames_per_minute: int = 20_000
    requests_per_second: int = 50
    max_running_jobs: int = 4
    max_queued_jobs: int = 100
    max_sessions: int = 1
    max_session_seconds: int = 600
    max_frames_per_job: int = 7260
    min_priority: int = 0
    max_expires_after: int = 7 * 86_400
    max_concurrent_streams: int = 32
    media_bytes_per_hour: int = 2 << 30
    max_stored_bytes: int = 50 << 30
    weight: float = 1.0
    may_use_realtime: bool = True

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name == "may_use_realtime":
                if not isinstance(value, bool):
                    raise ValueError(f"limits.{name} {value!r}: must be true or false")
            elif name == "weight":
                if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                    raise ValueError(f"limits.weight {value!r}: must be a number above 0")
            elif isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"limits.{name} {value!r}: must be a whole number")
            elif name != "min_priority" and value < (0 if name in _MAY_BE_ZERO else 1):
                raise ValueError(f"limits.{name} {value}: must be at least {0 if name in _MAY_BE_ZERO else 1}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One API key without its secret. `name` is for people; `expires_at`, `created_at`: seconds of the Unix clock, None
    never expires."""

    id: str
    name: str = ""
    tenant: str = DEFAULT_TENANT
    secret_sha256: str = field(repr=False)
    scopes: frozenset[Scope] = DEFAULT_SCOPES
    limits: KeyLimits = field(default_factory=KeyLimits)
    expires_at: float | None = None
    created_at: float | None = None

    def __post_init__(self) -> None:
        if _ID.fullmatch(self.id) is None:
            raise ValueError(f"id {self.id[:64]!r}: must be 4 to 32 lower-case letters and digits")
        if _TENANT.fullmatch(self.tenant) is None:
            raise ValueError(f"tenant {self.tenant[:80]!r}: must be 1 to 64 letters, digits, dots, dashes, underscores")
        if _SHA256.fullmatch(self.secret_sha256) is None:
            raise ValueError(f"key {self.id}: secret_sha256 must be 64 hexadecimal digits in lower case")

    @property
    def weight(self) -> float:
        return self.limits.weight

    @property
    def min_priority(self) -> int:
        return self.limits.min_priority

    def is_expired(self, now: float) -> bool:
        return self.expires_at is not None and now >= self.expires_at


class KeySource(Protocol):
    """Where keys are looked up; a database is one. Asynchronous, because HTTP and gRPC share one event loop."""

    async def find(self, key_id: str) -> Key | None: ...


def new_key(
    *,
    name: str = "",
    tenant: str = DEFAULT_TENANT,
    scopes: Iterable[Scope] = DEFAULT_SCOPES,
    limits: KeyLimits | None = None,
    expires_at: float | None = None,
) -> tuple[str, Key]:
    """A new key as its holder gets it, to be shown once, and as it is kept."""
    key_id, secret = secrets.token_hex(6), secrets.token_hex(32)
    key = Key(
        id=key_id,
        name=name,
        tenant=tenant,
        secret_sha256=hashlib.sha256(secret.encode()).hexdigest(),
        scopes=frozenset(scopes),
        limits=limits or KeyLimits(),
        expires_at=expires_at,
        created_at=float(round(time.time())),
    )
    return f"hs_{key_id}_{secret}", key


def split_key(plain: str) -> tuple[str, str] | None:
    """The id and the secret of a key as its holder has it; None when it is not written like one."""
    match = _PLAIN.fullmatch(plain)
    return None if match is None else (match[1], match[2])


def key_from(row: Mapping[str, object]) -> Key:
    """A key from an entry of a file or a row of a table, where the hash may be bytes; `scopes` and `limits` are already
    a list and a mapping.

    Raises:
        ValueError: unknown fields, wrong types, values out of range; says which and what would be right.
    """
    _check_names(row, [each.name for each in fields(Key)], "key")
    where = f"key {row.get('id')!r}"
    try:
        given = {name: _text(row, name) for name in ("id", "name", "tenant", "secret_sha256") if name in row}
        if "id" not in given or "secret_sha256" not in given:
            raise ValueError("id and secret_sha256 are needed")
        return Key(
            **given,
            scopes=DEFAULT_SCOPES if row.get("scopes") is None else _scopes(row["scopes"]),
            limits=limits_from(row.get("limits")),
            expires_at=_seconds(row, "expires_at"),
            created_at=_seconds(row, "created_at"),
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def limits_from(given: object) -> KeyLimits:
    """Limits from a mapping; what it leaves out, or None, has its default. Raises ValueError as `key_from` does."""
    if given is None:
        return KeyLimits()
    if not isinstance(given, Mapping):
        raise ValueError("limits: must be a mapping of names to numbers")
    _check_names(given, [each.name for each in fields(KeyLimits)], "limits")
    return KeyLimits(**given)


def key_to_dict(key: Key) -> dict[str, object]:
    """The plain form that `key_from` reads; limits at their default are left out."""
    defaults = asdict(KeyLimits())
    return {
        "id": key.id,
        "name": key.name,
        "tenant": key.tenant,
        "secret_sha256": key.secret_sha256,
        "scopes": [scope for scope in SCOPES if scope in key.scopes],
        "limits": {name: value for name, value in asdict(key.limits).items() if value != defaults[name]},
        "expires_at": key.expires_at,
        "created_at": key.created_at,
    }


def parse_keys(text: str) -> list[Key]:
    """Keys from YAML or JSON: `{"keys": [...]}`, or the list alone.

    Raises: ValueError when it is neither, an entry is wrong, or two have the same id.
    """
    document = _document(text)
    if isinstance(document, Mapping):
        _check_names(document, ["keys"], "keys file")
        document = document.get("keys")
    if document is None:
        return []
    if not isinstance(document, list) or not all(isinstance(row, Mapping) for row in document):
        raise ValueError("keys: must be a list of mappings with id, tenant, secret_sha256, scopes, limits, expires_at")
    keys = [key_from(row) for row in document]
    _check_unique(keys)
    return keys


def keys_from_env(value: str) -> list[Key]:
    """Keys from an environment variable: plain keys with commas or blanks between them, which get the default tenant,
    scopes and limits; or what `parse_keys` reads. Raises ValueError, without quoting a secret."""
    if not value.lstrip().startswith("hs_"):
        return parse_keys(value)
    keys = []
    for number, plain in enumerate(re.split(r"[\s,]+", value.strip(" \t\r\n,")), start=1):
        parts = split_key(plain)
        if parts is None:
            raise ValueError(f"key {number}: must read hs_<id>_<64 hexadecimal digits>, as `keys create` prints it")
        keys.append(Key(id=parts[0], secret_sha256=hashlib.sha256(parts[1].encode()).hexdigest()))
    _check_unique(keys)
    return keys


def read_keys(path: Path) -> list[Key]:
    """Keys of a file. Raises ValueError when it cannot be read or holds something else."""
    try:
        return parse_keys(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"keys file {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"keys file {path}: {error}") from error


def change_keys(path: Path, change: Callable[[list[Key]], list[Key]]) -> None:
    """Rewrites a keys file in one step, mode 0600, as JSON if it is called so, else as YAML. Comments are lost.

    The file may be absent. Two processes that change it at once do not lose each other's keys.
    """
    with locked(path):
        keys = change(read_keys(path) if path.exists() else [])
        _check_unique(keys)
        document = {"keys": [key_to_dict(key) for key in keys]}
        if path.suffix == ".json":
            write_private(path, json.dumps(document, indent=2) + "\n")
        else:
            write_private(path, yaml.safe_dump(document, sort_keys=False))


class KeyRing:
    """Keys that do not change while the process runs."""

    def __init__(self, keys: Iterable[Key]) -> None:
        keys = list(keys)
        _check_unique(keys)
        self._by_id = {key.id: key for key in keys}

    def __len__(self) -> int:
        return len(self._by_id)

    async def find(self, key_id: str) -> Key | None:
        return self._by_id.get(key_id)


class KeyFile:
    """The keys of a file, read again within a second of a change, so that a revoked key ends without a restart.

    A changed file that cannot be read is logged, and the keys read before stay in force.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._lock = threading.Lock()
        self._version = _version(path)
        self._checked_s = clock()
        self._ring = KeyRing(read_keys(path))

    def __len__(self) -> int:
        return len(self._ring)

    async def find(self, key_id: str) -> Key | None:
        with self._lock:
            now = self._clock()
            if now - self._checked_s >= _FILE_CHECK_S:
                self._checked_s = now
                self._reload()
            ring = self._ring
        return await ring.find(key_id)

    def _reload(self) -> None:
        version = _version(self._path)
        if version == self._version:
            return
        self._version = version
        try:
            self._ring = KeyRing(read_keys(self._path))
        except ValueError as error:
            logger.error("%s; the %d keys read before stay in force", error, len(self._ring))
        else:
            logger.info("keys file %s changed; it holds %d keys", self._path, len(self._ring))


def _document(text: str) -> object:
    """JSON is tried first: YAML reads most of it, but other numbers and other characters out of some."""
    with contextlib.suppress(ValueError):
        return json.loads(text)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        where = "" if mark is None else f" at line {mark.line + 1}"
        raise ValueError(f"neither YAML nor JSON{where}") from None  # the error's own text quotes the file


def _version(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _check_unique(keys: Iterable[Key]) -> None:
    seen: set[str] = set()
    for key in keys:
        if key.id in seen:
            raise ValueError(f"key {key.id!r}: there are two with this id")
        seen.add(key.id)


def _check_names(given: Mapping[str, object], known: list[str], where: str) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
            raise ValueError(f"{where}: {str(name)[:64]}: unknown field{hint}")


def _text(row: Mapping[str, object], name: str) -> str:
    value = row[name]
    if name == "secret_sha256" and isinstance(value, bytes):
        return value.hex()
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string; put it in quotes")
    return value


def _seconds(row: Mapping[str, object], name: str) -> float | None:
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} {value}: must be seconds of the Unix clock, or null")
    return float(value)


def _scopes(given: object) -> frozenset[Scope]:
    if not isinstance(given, list | tuple | set | frozenset):
        raise ValueError("scopes: must be a list")
    for scope in given:
        if scope not in SCOPES:
            raise ValueError(f"scopes: {scope}: unknown; known: {', '.join(SCOPES)}")
    return frozenset(given)
