"""The playground's files, ready to be sent. Knows their bytes, media types and headers; knows nothing of routes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import MappingProxyType

_MEDIA_TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaygroundFile:
    """One file: its bytes, its media type and its strong entity tag, quotes included."""

    body: bytes
    media_type: str
    etag: str


@cache
def playground_files() -> Mapping[str, PlaygroundFile]:
    """Every file by its path on the server: the page at "/", the rest at "/playground/NAME"."""
    files = {}
    for entry in resources.files(__name__).iterdir():
        media_type = _MEDIA_TYPES.get(entry.name.rpartition(".")[2])
        if media_type is None:
            continue
        body = entry.read_bytes()
        path = "/" if entry.name == "index.html" else f"/playground/{entry.name}"
        files[path] = PlaygroundFile(
            body=body, media_type=media_type, etag=f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        )
    return MappingProxyType(files)


def playground_headers(media_origins: tuple[str, ...] = ()) -> dict[str, str]:
    """Headers for every file of the playground; the caller adds media type and entity tag.

    `media_origins` are those to which `content` redirects (presigned blob addresses); none when bytes are proxied.
    """
    media = " ".join(("'self'", *media_origins))
    policy = {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "connect-src": media,
        "img-src": f"{media} blob:",
        "media-src": f"{media} blob:",
        "form-action": "'none'",
        "base-uri": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
    }
    return {
        "content-security-policy": "; ".join(f"{name} {sources}" for name, sources in policy.items()),
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }
