"""When requests are sent: offsets in seconds from the start of a run, from a seed or from a file.

Knows time and chance; knows nothing of what is sent.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, islice, takewhile
from itertools import count as count_up

from helios_serve.errors import InvalidRequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenLoad:
    """Requests that come whether or not earlier ones are done.

    The gaps follow a gamma distribution with mean 1 / `rate` and shape `burstiness`: 1 is a Poisson process, less comes
    in bursts, more is steadier, infinity is a metronome.
    """

    rate: float
    """Requests per second."""
    burstiness: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.rate < float("inf"):
            raise InvalidRequestError(f"rate {self.rate:g}: must be above 0, in requests per second", param="rate")
        if not self.burstiness > 0:
            raise InvalidRequestError(
                f"burstiness {self.burstiness:g}: must be above 0; 1 is Poisson, less is burstier", param="burstiness"
            )

    @property
    def label(self) -> str:
        return f"{self.rate:.4g} requests/s"

    def offsets(self, count: int, seed: int) -> list[float]:
        """Seconds of `count` arrivals, rising, the first at 0; equal for equal seeds."""
        return list(islice(self._times(seed), count))

    def count_within(self, duration_s: float, seed: int) -> int:
        """How many arrivals there are before `duration_s`, the first included."""
        return sum(1 for _ in takewhile(lambda time: time < duration_s, self._times(seed)))

    def _times(self, seed: int) -> Iterator[float]:
        if self.burstiness == float("inf"):
            return (index / self.rate for index in count_up())
        draw = random.Random(seed)
        scale = 1.0 / (self.rate * self.burstiness)
        return accumulate((draw.gammavariate(self.burstiness, scale) for _ in count_up()), initial=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedLoad:
    """As many requests in flight as `concurrency` says: the next is sent when one has ended."""

    concurrency: int

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise InvalidRequestError(f"concurrency {self.concurrency}: must be at least 1", param="concurrency")

    @property
    def label(self) -> str:
        return f"{self.concurrency} in flight"


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceLoad:
    """Arrivals that were recorded: seconds from the start of the run, rising."""

    times: tuple[float, ...]
    speed: float = 1.0
    """2 replays twice as fast."""

    def __post_init__(self) -> None:
        if not self.speed > 0:
            raise InvalidRequestError(f"trace speed {self.speed:g}: must be above 0", param="trace_speed")
        if not self.times:
            raise InvalidRequestError("trace: holds no arrival", param="trace")

    @property
    def rate(self) -> float:
        """Mean requests per second over the trace; of a single arrival 1."""
        span = (self.times[-1] - self.times[0]) / self.speed
        return (len(self.times) - 1) / span if span > 0 else float(len(self.times))

    @property
    def label(self) -> str:
        return f"trace, {self.rate:.3g} requests/s"

    def offsets(self, count: int, seed: int) -> list[float]:
        """The first `count` arrivals of the trace, the first at 0; the seed changes nothing."""
        return [(time - self.times[0]) / self.speed for time in self.times[:count]]

    def count_within(self, duration_s: float, seed: int) -> int:
        """How many arrivals there are before `duration_s`, the first included."""
        return sum(time < duration_s for time in self.offsets(len(self.times), seed))


Load = OpenLoad | ClosedLoad | TraceLoad
