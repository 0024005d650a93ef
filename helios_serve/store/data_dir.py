"""The data directory: one owning process, on a local disk. Knows locks and mounts; knows nothing of what is stored."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from helios_serve.store.errors import StoreStartError

NETWORK_FILE_SYSTEMS = frozenset(
    ("nfs", "nfs3", "nfs4", "cifs", "smb2", "smb3", "smbfs", "afs", "ceph", "glusterfs", "lustre", "gpfs", "beegfs")
) | {f"fuse.{name}" for name in ("sshfs", "glusterfs", "ceph", "s3fs", "gcsfuse", "rclone", "juicefs")}
"""Types whose locks or shared memory SQLite cannot rely on, as /proc/self/mountinfo writes them."""


class DataDir:
    """Creates the directory and, with `exclusive`, holds its lock until `close` or the end of the process.

    Raises: StoreStartError when another process holds the lock, or the directory is on a network file system.
    """

    def __init__(self, path: Path, *, exclusive: bool) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreStartError(f"data directory {path}: {error.strerror}") from error
        self._lock_fd = _lock(path) if exclusive else None

    def close(self) -> None:
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None


def sync_dir(path: Path) -> None:
    """Makes the entries of a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def file_system_of(path: Path, mountinfo: str) -> str:
    """The type of the file system that holds `path`, from the text of /proc/self/mountinfo; empty when unknown."""
    best, kind = "", ""
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        if not after:
            continue
        mount = before.split()[4].encode().decode("unicode_escape")  # spaces are written as \040
        if path.is_relative_to(mount) and len(mount) >= len(best):
            best, kind = mount, after.split()[0]
    return kind


def _lock(path: Path) -> int:
    mountinfo = Path("/proc/self/mountinfo")
    kind = file_system_of(path.resolve(), mountinfo.read_text()) if mountinfo.exists() else ""
    if kind in NETWORK_FILE_SYSTEMS:
        raise StoreStartError(
            f"data directory {path} is on a network file system ({kind}), where SQLite can lose data: use a local disk,"
            " or Postgres with --database-url"
        )
    try:
        fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StoreStartError(f"data directory {path}: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(fd, 32).decode(errors="replace").strip()
        os.close(fd)
        raise StoreStartError(
            f"data directory {path} is in use by process {holder or 'unknown'}: one server owns it; give this one"
            " another --data-dir, or run several servers on Postgres with --database-url"
        ) from None
    with contextlib.suppress(OSError):  # a full disk does not keep the server from starting
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd
