"""Tokens in addresses: `<video>`, `EventSource` and browsers' WebSockets cannot send a header.

A token is a JWT (HS256) that names one video and one use, or, for the realtime session, the key that it was made with.
Secrets rotate: the previous one still verifies. Knows no framework and no jobs: who may sign for a video is decided
before.
"""

from __future__ import annotations

import hmac
import json
import logging
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jwt

from helios_serve.api.auth import AuthenticationError, Caller
from helios_serve.api.private_file import locked, write_private
from helios_serve.errors import InvalidRequestError

logger = logging.getLogger(__name__)

Use = Literal["content", "stream", "events", "hls"]
URL_TTL_S = 3600
CLIENT_SECRET_TTL_S = 600
SIGNING_FILE = "signing_keys.json"
_MAX_TOKEN = 1024  # characters; ours have about 250
_MIN_SECRET = 32  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SigningKey:
    """One secret. Its `kid` follows from it, so that replicas which share a secret understand each other."""

    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.secret) < _MIN_SECRET:
            raise ValueError(f"signing secret: {len(self.secret)} bytes; at least {_MIN_SECRET} are needed")

    @property
    def kid(self) -> str:
        return hmac.digest(self.secret, b"helios_serve key id", "sha256").hex()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class SigningKeys:
    """`current` signs; all verify. `previous` signs webhooks beside it, for receivers that know no other yet."""

    current: SigningKey
    previous: SigningKey | None = None
    older: tuple[SigningKey, ...] = ()

    @property
    def in_order(self) -> tuple[SigningKey, ...]:
        """All of them, the one that signs first."""
        return (self.current, *(() if self.previous is None else (self.previous,)), *self.older)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """What a token in an address allows: one use of one video, until `expires_at` (Unix seconds)."""

    video_id: str
    use: Use
    expires_at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSecret:
    """A token for a browser's realtime session, as the API answers it."""

    value: str = field(repr=False)
    expires_at: int


class UrlSigner:
    """Signs and verifies. `now` is in seconds of the Unix clock everywhere."""

    def __init__(self, keys: SigningKeys) -> None:
        self._current = keys.current
        self._by_header = {_header(key): key for key in keys.in_order}

    def sign(self, video_id: str, use: Use, now: float, *, ttl_s: int = URL_TTL_S) -> str:
        """A token for one use of one video, at most an hour."""
        assert 0 < ttl_s <= URL_TTL_S
        return _encode({"sub": video_id, "use": use, "exp": int(now) + ttl_s}, self._current)

    def verify(self, token: str, video_id: str, use: Use, now: float) -> Grant:
        """Raises AuthenticationError, the same whether the token is forged, expired, or for another video or use."""
        claims = self._claims(token)
        if claims is None or (claims["sub"], claims["use"]) != (video_id, use) or now >= claims["exp"]:
            raise _refusal()
        return Grant(video_id=video_id, use=use, expires_at=claims["exp"])

    def sign_client_secret(self, caller: Caller, now: float, *, ttl_s: int = CLIENT_SECRET_TTL_S) -> ClientSecret:
        """A token that opens realtime sessions in the caller's name.

        Raises: InvalidRequestError when `ttl_s` is not 1 to 600.
        """
        if not 1 <= ttl_s <= CLIENT_SECRET_TTL_S:
            raise InvalidRequestError(
                f"expires_after {ttl_s}: 1 to {CLIENT_SECRET_TTL_S} seconds", param="expires_after"
            )
        expires_at = int(now) + ttl_s
        value = _encode({"sub": caller.key_id or "", "use": "realtime", "exp": expires_at}, self._current)
        return ClientSecret(value=value, expires_at=expires_at)

    def verify_client_secret(self, token: str, now: float) -> str | None:
        """The id of the key that the secret was made with, for `Authenticator.caller_by_id`; None: without a key.

        Raises: AuthenticationError when it is forged, expired or a token for something else.
        """
        claims = self._claims(token)
        if claims is None or claims["use"] != "realtime" or now >= claims["exp"]:
            raise _refusal()
        return claims["sub"] or None

    def _claims(self, token: str) -> dict[str, Any] | None:
        """What a token says that was signed here, None for any other.

        Nothing a stranger wrote is parsed: the header must be one of ours to the letter, and the signature stands
        before the claims.
        """
        if len(token) > _MAX_TOKEN or not token.isascii():
            return None
        key = self._by_header.get(token.partition(".")[0])
        if key is None:
            return None
        try:
            claims = jwt.decode(token, key.secret, algorithms=["HS256"], options={"verify_exp": False})
        except jwt.PyJWTError:
            return None
        # Base64 has several spellings of the same bytes; only ours is a token.
        return claims if hmac.compare_digest(_encode(claims, key), token) else None


def load_signing_keys(data_dir: Path) -> SigningKeys:
    """The secrets of this data directory, made on first use; the file is for its owner only.

    Raises: ValueError when the file is damaged.
    """
    path = data_dir / SIGNING_FILE
    with locked(path):
        if not path.exists():
            _write(path, [secrets.token_bytes(_MIN_SECRET)])
        return _read(path)


def rotate_signing_keys(data_dir: Path) -> SigningKeys:
    """A new current secret; the current one becomes the previous one, and what the previous one signed ends. Rotate
    twice to end all tokens. A running server reads the file at its start."""
    path = data_dir / SIGNING_FILE
    with locked(path):
        kept = [_read(path).current.secret] if path.exists() else []
        _write(path, [secrets.token_bytes(_MIN_SECRET), *kept])
        return _read(path)


def signing_keys_from(current: str, *others: str) -> SigningKeys:
    """Secrets that several replicas are given, each as text of at least 32 bytes. The first signs, all verify.

    Raises: ValueError for a shorter one, or one that is there twice.
    """
    first, *rest = (SigningKey(secret=text.encode()) for text in (current, *others))
    if len({first.secret, *(key.secret for key in rest)}) <= len(rest):
        raise ValueError("signing secret: one is there twice")
    return SigningKeys(current=first, previous=rest[0] if rest else None, older=tuple(rest[1:]))


def read_signing_keys(text: str) -> SigningKeys:
    """Secrets as a setting or a file has them: separated by white space or commas, `#` begins a comment.

    Raises: ValueError when there is none; else as `signing_keys_from`.
    """
    lines = (line.partition("#")[0] for line in text.splitlines())
    found = [word for line in lines for word in line.replace(",", " ").split()]
    if not found:
        raise ValueError("signing secret: none is given")
    return signing_keys_from(*found)


def signing_keys_file(path: Path) -> SigningKeys:
    """The secrets of a file that several replicas are given.

    Raises: ValueError, which names the file.
    """
    try:
        _warn_if_open(path)
        return read_signing_keys(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"signing_keys_file {path}: {error.strerror}") from error
    except ValueError as error:  # no text of the file: it is a secret
        problem = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
        raise ValueError(f"signing_keys_file {path}: {problem}") from None


def _refusal() -> AuthenticationError:
    return AuthenticationError("the token is not valid here, or has expired")


def _encode(claims: dict[str, Any], key: SigningKey) -> str:
    return jwt.encode(claims, key.secret, algorithm="HS256", headers={"kid": key.kid})


def _header(key: SigningKey) -> str:
    return _encode({}, key).partition(".")[0]


def _write(path: Path, both: list[bytes]) -> None:
    write_private(path, json.dumps({"secrets": [secret.hex() for secret in both]}) + "\n")


def _read(path: Path) -> SigningKeys:
    _warn_if_open(path)
    try:
        found = [SigningKey(secret=bytes.fromhex(text)) for text in json.loads(path.read_text())["secrets"]]
        current, previous = (*found, None)[:2] if found else (None, None)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged; delete it, and signed addresses made so far end") from error
    if current is None:
        raise ValueError(f"{path}: holds no secret; delete it, and signed addresses made so far end")
    return SigningKeys(current=current, previous=previous)


def _warn_if_open(path: Path) -> None:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        logger.warning("%s: mode %04o lets others read it, and forge tokens; chmod 600 it, and rotate", path, mode)
