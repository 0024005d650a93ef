"""Sends the requests of a run when they are due, and has each written down.

Knows arrivals and timeouts; knows nothing of what a target sends.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from helios_serve.bench.arrivals import ClosedLoad, Load
from helios_serve.bench.observed import Observed, Recording
from helios_serve.bench.targets import FailedError, Target
from helios_serve.bench.workload import Planned


class Watcher(Protocol):
    """Is told of everything while it happens."""

    def sent(self) -> None: ...

    def segment(self, num_frames: int) -> None: ...

    def ended(self, seen: Observed) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who sends: what it talks to, and how long it waits for one video."""

    target: Target
    timeout_s: float
    preroll_s: float | None = None
    """In place of what the server recommends."""


async def drive(caller: Caller, planned: Sequence[Planned], load: Load, seed: int, watcher: Watcher) -> list[Observed]:
    """Sends all, waits for all, and returns them in the order of `planned`."""
    origin = time.perf_counter()
    if isinstance(load, ClosedLoad):
        return await _drive_closed(caller, planned, load.concurrency, origin, watcher)
    tasks = []
    async with asyncio.TaskGroup() as group:
        for request, due_s in zip(planned, load.offsets(len(planned), seed), strict=True):
            await asyncio.sleep(max(0.0, origin + due_s - time.perf_counter()))
            tasks.append(group.create_task(observe(caller, request, origin, due_s, watcher)))
    return [task.result() for task in tasks]


async def _drive_closed(
    caller: Caller, planned: Sequence[Planned], concurrency: int, origin: float, watcher: Watcher
) -> list[Observed]:
    waiting = iter(planned)
    seen: list[Observed] = []

    async def one_after_another() -> None:
        for request in waiting:
            ended = await observe(caller, request, origin, time.perf_counter() - origin, watcher)
            seen.append(ended)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(planned))):
            group.create_task(one_after_another())
    return sorted(seen, key=lambda one: one.planned.index)


async def observe(caller: Caller, planned: Planned, origin: float, due_s: float, watcher: Watcher) -> Observed:
    """One request to its end, good or bad."""
    recording = Recording(
        planned=planned, origin=origin, due_s=due_s, preroll_s=caller.preroll_s, on_segment=watcher.segment
    )
    watcher.sent()
    try:
        async with asyncio.timeout(caller.timeout_s):
            await caller.target.make(planned, recording)
    except FailedError as error:
        recording.fail(error.code, error.message, error.status)
    except TimeoutError:
        recording.fail("timeout", f"no end within {caller.timeout_s:g} s")
    seen = recording.finish(recording.now_s())
    watcher.ended(seen)
    return seen
