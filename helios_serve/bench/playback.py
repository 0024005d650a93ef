"""What a viewer of a stream would have seen: when playback runs dry, and what wait at the start would avoid it.

Knows arrival times and durations in seconds; knows nothing of networks. A player plays each segment when it is there
and the one before it has ended; while the next is missing, it stands still.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_CLOCK_S = 1e-9
"""Below this, late is rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Playback:
    """How often a player stood still after its start, and for how long in all."""

    num_underruns: int
    stalled_s: float


def play(arrivals_s: Sequence[float], durations_s: Sequence[float], preroll_s: float = 0.0) -> Playback:
    """Plays segments that came at `arrivals_s`, beginning `preroll_s` after the first of them."""
    assert len(arrivals_s) == len(durations_s)
    if not arrivals_s:
        return Playback(num_underruns=0, stalled_s=0.0)
    num_underruns, stalled_s = 0, 0.0
    dry_s = arrivals_s[0] + preroll_s  # when everything that came so far has been shown
    for index, (arrival_s, duration_s) in enumerate(zip(arrivals_s, durations_s, strict=True)):
        late_s = arrival_s - dry_s
        if index and late_s > _CLOCK_S:
            num_underruns += 1
            stalled_s += late_s
            dry_s = arrival_s
        dry_s += duration_s
    return Playback(num_underruns=num_underruns, stalled_s=stalled_s)


def needed_preroll_s(arrivals_s: Sequence[float], durations_s: Sequence[float]) -> float:
    """The shortest wait after the first segment with which `play` never stands still."""
    needed_s, shown_s = 0.0, 0.0
    for arrival_s, duration_s in zip(arrivals_s, durations_s, strict=True):
        needed_s = max(needed_s, arrival_s - arrivals_s[0] - shown_s)
        shown_s += duration_s
    return needed_s
