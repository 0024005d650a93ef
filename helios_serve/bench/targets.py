"""What load is driven at, and what it raises when a video does not come.

Knows no protocol: `helios_target`, `grpc_target` and `openai_target` each speak one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from helios_serve.bench.observed import Recording
from helios_serve.bench.workload import Planned, Via


class FailedError(Exception):
    """No video, and why: the server's code, `http_<status>` or `grpc_<status>` where it gives none, or one of `connect`
    (nobody listens), `timeout`, `cut` (a connection or stream broke), `empty_video` and `unreadable_answer`."""

    def __init__(self, code: str, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.status = status
        """Of HTTP."""


class Target(Protocol):
    """One way of asking for a video and receiving it."""

    async def make(self, planned: Planned, recording: Recording) -> None:
        """Returns when the last byte of the video is here. Raises: FailedError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetByVia:
    """Each request goes to the target of its `via`."""

    targets: Mapping[Via, Target]

    async def make(self, planned: Planned, recording: Recording) -> None:
        await self.targets[planned.kind.via].make(planned, recording)
