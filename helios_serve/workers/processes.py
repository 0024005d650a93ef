"""Processes of this machine as /proc shows them, each known by pid and start. Knows Linux; knows nothing of what they
do."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A process that cannot be mistaken for a later one with the same pid. `started` is in clock ticks since boot."""

    pid: int
    started: int

    def kill(self) -> bool:
        """SIGKILL; False if it is gone already."""
        now = find_process(self.pid)
        if now != self:
            return False
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True


def find_process(pid: int) -> Process | None:
    """The process that has this pid now."""
    fields = _stat(pid)
    return None if fields is None else Process(pid=pid, started=int(fields[19]))


def descendants(pid: int) -> list[Process]:
    """All processes below one, parents before their children."""
    children: dict[int, list[Process]] = {}
    for entry in Path("/proc").iterdir():
        fields = _stat(int(entry.name)) if entry.name.isdecimal() else None
        if fields is not None:
            own = Process(pid=int(entry.name), started=int(fields[19]))
            children.setdefault(int(fields[1]), []).append(own)
    found = list(children.get(pid, []))
    for process in found:  # grows as it goes
        found += children.get(process.pid, [])
    return found


def command(pid: int) -> str:
    """The command line of a process; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the third on, the state; the second, a name in brackets, may hold spaces."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return stat.rpartition(")")[2].split()
