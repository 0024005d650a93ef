"""Copies of blobs of a bucket on the local disk, least recently used out first. Knows keys and sizes; a lost or damaged
copy is only a miss."""

from __future__ import annotations

import contextlib
import os
import threading
import uuid
from pathlib import Path


class BlobCache:
    """Any thread may use it.

    Args:
        root: a directory of its own.
        max_bytes: what the copies may take together.
    """

    def __init__(self, root: Path, *, max_bytes: int) -> None:
        self._root = root
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        root.mkdir(parents=True, exist_ok=True)
        for part in root.glob("*.part"):
            part.unlink(missing_ok=True)
        found = sorted((path.stat().st_mtime, path.name, path.stat().st_size) for path in root.iterdir())
        self._sizes = {name: size for _, name, size in found}  # oldest use first
        self._num_bytes = sum(self._sizes.values())

    def get(self, key: str) -> bytes | None:
        """The copy, not verified; None when there is none."""
        path = self._root / _name(key)
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        with self._lock:
            self._sizes[path.name] = self._sizes.pop(path.name, len(data))
        return data

    def add(self, key: str, data: bytes) -> None:
        """Keeps a copy; a full disk only means that there is none."""
        if len(data) > self._max_bytes // 4:
            return
        path = self._root / _name(key)
        part = self._root / f"{uuid.uuid4().hex}.part"
        try:
            part.write_bytes(data)
            part.replace(path)
        except OSError:
            part.unlink(missing_ok=True)
            return
        with self._lock:
            self._num_bytes += len(data) - self._sizes.pop(path.name, 0)
            self._sizes[path.name] = len(data)
            while self._num_bytes > self._max_bytes:
                oldest = next(iter(self._sizes))
                self._num_bytes -= self._sizes.pop(oldest)
                with contextlib.suppress(FileNotFoundError):
                    (self._root / oldest).unlink()


def _name(key: str) -> str:
    return key.rpartition("/")[2]
