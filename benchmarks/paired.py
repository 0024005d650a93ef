"""CPU time, and a fixed piece of Python that never changes and stands for the speed of the machine at that moment.

Knows clocks of this process and of others; knows nothing of what is measured. A ratio holds on a faster or busier
machine, seconds do not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

_ROUNDS = 20_000


@dataclass(frozen=True, slots=True)
class _Point:
    x: int
    label: str


def yardstick() -> int:
    """Objects, calls, dictionaries and strings, as an engine or a service is made of; about 30 ms.

    Part of every ratio that was ever written down: never change it.
    """
    seen: dict[str, int] = {}
    points = [_Point(index, f"point {index % 97}") for index in range(_ROUNDS)]
    for point in points:
        seen[point.label] = seen.get(point.label, 0) + _folded(point)
    ordered = sorted(seen.items(), key=lambda pair: pair[1])
    return sum(value for _, value in ordered)


def _folded(point: _Point) -> int:
    return (point.x * 31 + len(point.label)) % 1009


def thread_cpu_s(run: Callable[[], object]) -> float:
    """CPU seconds of the calling thread."""
    began = time.thread_time()
    run()
    return time.thread_time() - began


def process_cpu_s(pid: int) -> float:
    """CPU seconds of all threads of a process so far, to the nanosecond; Linux."""
    return time.clock_gettime((~pid << 3) | 2)  # as clock_getcpuclockid makes it


def main_thread_cpu_s(pid: int) -> float:
    """CPU seconds of the first thread of a process so far: of the one that runs its event loop; Linux."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Readings of one quantity."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def lowest(self) -> float:
        return min(self.values)

    @property
    def highest(self) -> float:
        return max(self.values)

    def quantile(self, share: float) -> float:
        """By linear interpolation between neighbours."""
        ordered = sorted(self.values)
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread(values: Sequence[float]) -> Spread:
    return Spread(values=tuple(values))
