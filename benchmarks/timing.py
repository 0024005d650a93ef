"""How time is taken: events of the device around queued work, or the host's clock, and what is said of the samples.

Knows devices and clocks; knows no kernel, no model and no target.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

L2_BYTES = 128 << 20
"""Inputs of a measurement are spread over more than this, twice the largest cache of a device we know."""
_MAX_SLEEP_S = 0.05
_CYCLES_PER_S = 1.6e9  # of a device that runs no faster than 2 GHz
_WARM_UPS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Repeated readings of one quantity, in the unit of whoever holds them."""

    values: tuple[float, ...]

    @property
    def count(self) -> int:
        return len(self.values)

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    @property
    def p10(self) -> float:
        return self.quantile(0.1)

    @property
    def p90(self) -> float:
        return self.quantile(0.9)

    def quantile(self, share: float) -> float:
        """By linear interpolation between neighbours."""
        ordered = sorted(self.values)
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    def per_second(self, amount: float) -> Samples:
        """`amount` of work over each reading in milliseconds, per second; p10 is then the slowest tenth."""
        return Samples(values=tuple(amount / (value * 1e-3) for value in self.values))


class Clock(Protocol):
    """Times what runs on one device. `run` gets the number of the call, so that it can rotate its inputs."""

    def measure(self, run: Callable[[int], object], *, repetitions: int, calls: int = 1) -> Samples:
        """Milliseconds of one call; each reading is the mean over `calls` calls that the device runs back to back.
        Work is queued before the first starts, so that launching is hidden. Warms up first."""

    def measure_for(self, run: Callable[[int], object], *, duration_s: float, calls: int = 1) -> Samples:
        """The same, for about so long instead of so often; at least three readings."""

    def wall(self, run: Callable[[int], object], *, repetitions: int, warm_ups: int = 1) -> Samples:
        """Milliseconds of the host's clock from the start of a call until the device has finished it."""

    def synchronize(self) -> None:
        """Waits until the device has finished all."""


class HostClock:
    """For devices whose work is finished when a call returns."""

    def measure(self, run: Callable[[int], object], *, repetitions: int, calls: int = 1) -> Samples:
        run(0)
        return Samples(values=tuple(self._reading(run, repetition * calls, calls) for repetition in range(repetitions)))

    def measure_for(self, run: Callable[[int], object], *, duration_s: float, calls: int = 1) -> Samples:
        run(0)
        return _until(lambda number: self._reading(run, number * calls, calls), duration_s)

    def wall(self, run: Callable[[int], object], *, repetitions: int, warm_ups: int = 1) -> Samples:
        for number in range(warm_ups):
            run(number)
        return Samples(values=tuple(self._reading(run, warm_ups + number, 1) for number in range(repetitions)))

    def synchronize(self) -> None:
        return

    def _reading(self, run: Callable[[int], object], first: int, calls: int) -> float:
        start = time.perf_counter()
        for number in range(first, first + calls):
            run(number)
        return (time.perf_counter() - start) * 1e3 / calls


class CudaClock:
    """For CUDA devices: pairs of events, behind a pause of the device during which the host queues the calls."""

    def measure(self, run: Callable[[int], object], *, repetitions: int, calls: int = 1) -> Samples:
        pause_s = self._warm_up(run, calls)
        pairs = [self._reading(run, number * calls, calls, pause_s) for number in range(repetitions)]
        torch.cuda.synchronize()
        return Samples(values=tuple(start.elapsed_time(end) / calls for start, end in pairs))

    def measure_for(self, run: Callable[[int], object], *, duration_s: float, calls: int = 1) -> Samples:
        pause_s = self._warm_up(run, calls)

        def reading(number: int) -> float:
            start, end = self._reading(run, number * calls, calls, pause_s)
            end.synchronize()
            return float(start.elapsed_time(end)) / calls

        return _until(reading, duration_s)

    def wall(self, run: Callable[[int], object], *, repetitions: int, warm_ups: int = 1) -> Samples:
        for number in range(warm_ups):
            run(number)
        torch.cuda.synchronize()
        readings = []
        for number in range(warm_ups, warm_ups + repetitions):
            start = time.perf_counter()
            run(number)
            torch.cuda.synchronize()
            readings.append((time.perf_counter() - start) * 1e3)
        return Samples(values=tuple(readings))

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def _warm_up(self, run: Callable[[int], object], calls: int) -> float:
        """Seconds for which the device is to pause before a reading: what the host takes to queue it."""
        for number in range(_WARM_UPS):
            run(number)
        torch.cuda.synchronize()
        start = time.perf_counter()
        run(_WARM_UPS)
        queued_s = time.perf_counter() - start
        torch.cuda.synchronize()
        return min(_MAX_SLEEP_S, 1.5 * queued_s * calls + 1e-4)

    def _reading(self, run: Callable[[int], object], first: int, calls: int, pause_s: float) -> tuple[Any, Any]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(int(pause_s * _CYCLES_PER_S))
        start.record()
        for number in range(first, first + calls):
            run(number)
        end.record()
        return start, end


def clock_of(device: torch.device) -> Clock:
    """The clock that fits the device."""
    return CudaClock() if device.type == "cuda" else HostClock()


def twice(measure: Callable[[], Samples]) -> tuple[Samples, float]:
    """The readings of two rounds, and by which share their medians differ: a smaller difference means nothing."""
    first, second = measure(), measure()
    joined = Samples(values=first.values + second.values)
    return joined, abs(first.median - second.median) / joined.median


def num_sets(bytes_per_set: int, *, limit: int = 64) -> int:
    """How many sets of inputs are more than the caches hold, within the limit."""
    return min(limit, 1 + L2_BYTES // max(1, bytes_per_set))


def num_bytes(*tensors: Tensor | None) -> int:
    """What the tensors' elements occupy; views of one memory count each."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def poison(*tensors: Tensor) -> None:
    """NaN, or 77 in integers: what is not written afterwards shows."""
    for tensor in tensors:
        if tensor.dtype.is_floating_point and tensor.element_size() == 1:
            tensor.view(torch.uint8).fill_(0x7F)  # NaN of both 8-bit formats
        else:
            tensor.fill_(math.nan if tensor.dtype.is_floating_point else 77)


def is_lost(device: torch.device) -> bool:
    """Whether an error has broken the process's access to its device for good."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


@contextmanager
def spent() -> Iterator[list[float]]:
    """A list that holds the seconds of the block once it is left."""
    taken: list[float] = []
    start = time.perf_counter()
    try:
        yield taken
    finally:
        taken.append(time.perf_counter() - start)


def _until(reading: Callable[[int], float], duration_s: float) -> Samples:
    stop = time.perf_counter() + duration_s
    values: list[float] = []
    while len(values) < 3 or time.perf_counter() < stop:
        values.append(reading(len(values)))
    return Samples(values=tuple(values))
