"""Keys of blobs: BLAKE2b-128 of the content, `ab/abcd...`."""

from __future__ import annotations

import hashlib
from pathlib import Path


def new_digest(data: bytes = b"") -> hashlib.blake2b:
    """Of content that begins with `data`."""
    return hashlib.blake2b(data, digest_size=16)


def key_of_digest(digest: str) -> str:
    """The key of a blob whose content has this digest, in hexadecimal."""
    return f"{digest[:2]}/{digest}"


def key_of(data: bytes) -> str:
    """The key of a blob with this content."""
    return key_of_digest(new_digest(data).hexdigest())


def key_of_file(path: Path) -> str:
    """The key of a blob with the content of this file."""
    with path.open("rb") as file:
        return key_of_digest(hashlib.file_digest(file, new_digest).hexdigest())
