"""What the driver of a Ray cluster and its actors say to each other, and the order in which it is heard.

Data only: no ray, no torch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

from helios_serve.config import GivenDegrees, ModelConfig
from helios_serve.faults import FaultPlan
from helios_serve.types import ExecutorEvent, Role
from helios_serve.workers.processes import Process

VERSION = version("helios-serve")


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSpec:
    """One worker process: a rank of a group, and how it is to run."""

    model: ModelConfig
    group: str
    role: Role
    rank: int
    num_ranks: int
    degrees: GivenDegrees
    num_threads: int
    cache_bytes: int
    faults: FaultPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """Where a worker lives, and the version of its code."""

    process: Process
    node_id: str
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Events of a worker, in their order; `number` counts its batches."""

    number: int
    events: tuple[ExecutorEvent, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BeatReply:
    """`progress` grows with every step or task; `task_ids` are the tasks that the worker has."""

    progress: int
    task_ids: tuple[str, ...]
    batch: Batch


class Outbox:
    """Events that wait in a worker for the next reply that leaves it. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events: list[ExecutorEvent] = []
        self._num_batches = 0

    def put(self, event: ExecutorEvent) -> None:
        with self._lock:
            self._events.append(event)

    def take(self, *last: ExecutorEvent) -> Batch:
        """All that waits, and then `last`."""
        with self._lock:
            batch = Batch(number=self._num_batches, events=(*self._events, *last))
            self._num_batches += 1
            self._events.clear()
            return batch


class Inbox:
    """Hands on batches in the order in which they left the worker, whichever reply was here first."""

    def __init__(self, emit: Callable[[ExecutorEvent], None]) -> None:
        self._emit = emit
        self._waiting: dict[int, Batch] = {}
        self._next = 0

    def add(self, batch: Batch) -> None:
        self._waiting[batch.number] = batch
        while (due := self._waiting.pop(self._next, None)) is not None:
            self._next += 1
            for event in due.events:
                self._emit(event)
