"""How long steps take on their device, read without holding the device up. Knows clocks; knows nothing of steps."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

import torch

Timing = tuple[tuple[str, ...], float]
"""The tasks of a step, and its milliseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Span:
    task_ids: tuple[str, ...]
    begun: torch.cuda.Event
    ended: torch.cuda.Event


class StepTimer:
    """Times what is called between `begin` and `end`: by the wall clock on a CPU, by events on a GPU.

    On a GPU it also keeps the host from running ahead by more than one step, so that what is asked for at a boundary
    takes effect within two steps: `end` waits for the step before. The device has the new one to go on with.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._done: list[Timing] = []
        self._spans: deque[_Span] = deque()
        self._begun_s = 0.0
        self._begun: torch.cuda.Event | None = None

    def begin(self) -> None:
        self._begun_s = time.perf_counter()
        if self._device.type == "cuda":
            self._begun = self._mark()

    def end(self, task_ids: tuple[str, ...]) -> None:
        if self._begun is None:
            self._done.append((task_ids, 1000 * (time.perf_counter() - self._begun_s)))
            return
        self._spans.append(_Span(task_ids=task_ids, begun=self._begun, ended=self._mark()))
        self._collect(keep=1)

    def read(self, *, flush: bool) -> list[Timing]:
        """Timings of the steps known to be done, each once, in order; `flush` waits for all."""
        if flush:
            self._collect(keep=0)
        done, self._done = self._done, []
        return done

    def _collect(self, keep: int) -> None:
        while len(self._spans) > keep:
            span = self._spans.popleft()
            span.ended.synchronize()
            self._done.append((span.task_ids, span.begun.elapsed_time(span.ended)))

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
