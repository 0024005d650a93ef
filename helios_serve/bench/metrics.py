"""From what was seen to what is reported: distributions, rates, playback and goodput.

Pure arithmetic on `Observed`; every quantity says its unit in its name.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from helios_serve.bench.observed import Observed
from helios_serve.bench.playback import Playback, needed_preroll_s, play
from helios_serve.errors import InvalidRequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Of at least one value; percentiles interpolate linearly between the nearest two."""

    count: int
    mean: float
    low: float
    p50: float
    p90: float
    p99: float
    high: float


def distribution(values: Sequence[float]) -> Distribution | None:
    """None of no values."""
    if not values:
        return None
    ordered = sorted(values)
    return Distribution(
        count=len(ordered),
        mean=math.fsum(ordered) / len(ordered),
        low=ordered[0],
        p50=percentile(ordered, 50),
        p90=percentile(ordered, 90),
        p99=percentile(ordered, 99),
        high=ordered[-1],
    )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of values that rise; position percent / 100 x (n - 1), interpolated linearly."""
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def time_to_first_segment_s(seen: Observed) -> float | None:
    """From when the request was due; None of a job, whose segments its client does not see."""
    return seen.segments[0].at_s - seen.due_s if seen.segments else None


def inter_segment_s(seen: Observed) -> list[float]:
    times = [segment.at_s for segment in seen.segments]
    return [later - earlier for earlier, later in pairwise(times)]


def end_to_end_s(seen: Observed) -> float:
    return seen.ended_s - seen.due_s


def realtime_factor(seen: Observed) -> float | None:
    """Seconds from due to the end, per second of video at the target rate; below 1 is faster than playback."""
    return None if seen.playback_s is None else end_to_end_s(seen) / seen.playback_s


def playback(seen: Observed, preroll_s: float) -> Playback | None:
    return play(*_played(seen), preroll_s) if seen.segments else None


def preroll_needed_s(seen: Observed) -> float | None:
    return needed_preroll_s(*_played(seen)) if seen.segments else None


def _played(seen: Observed) -> tuple[list[float], list[float]]:
    fps = seen.planned.kind.fps
    return [segment.at_s for segment in seen.segments], [segment.num_frames / fps for segment in seen.segments]


def _stall_s(seen: Observed) -> float | None:
    played = playback(seen, 0.0)
    return None if played is None else played.stalled_s


def _stall_with_preroll_s(seen: Observed) -> float | None:
    played = None if seen.preroll_s is None else playback(seen, seen.preroll_s)
    return None if played is None else played.stalled_s


def _largest_gap_s(seen: Observed) -> float | None:
    return max(inter_segment_s(seen), default=0.0) if seen.segments else None


_SLO_MEASURES: Mapping[str, Callable[[Observed], float | None]] = {
    "ttfs": time_to_first_segment_s,
    "gap": _largest_gap_s,
    "stall": _stall_s,
    "stall_preroll": _stall_with_preroll_s,
    "e2e": end_to_end_s,
    "rtf": realtime_factor,
}
STREAM_ONLY = frozenset({"ttfs", "gap", "stall", "stall_preroll"})
"""What nobody can see of a job that is polled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """What makes a completed request a good one. Limits that a job's client cannot see do not bind jobs; one that was
    not seen of a stream (no pre-roll was recommended, frames could not be read) is not met."""

    limits: Mapping[str, float]

    def is_met(self, seen: Observed) -> bool:
        return seen.is_completed and all(
            self._holds(seen, name, limit)
            for name, limit in self.limits.items()
            if seen.planned.kind.is_stream or name not in STREAM_ONLY
        )

    @staticmethod
    def _holds(seen: Observed, name: str, limit: float) -> bool:
        value = _SLO_MEASURES[name](seen)
        return value is not None and value <= limit


def parse_slo(texts: Sequence[str]) -> Slo | None:
    """`ttfs=2` (seconds) and its kin; None of none. Raises InvalidRequestError."""
    limits = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            limits[name] = float(value)
        except ValueError:
            limits[name] = math.nan
        if name not in _SLO_MEASURES or not limits[name] >= 0:
            names = ", ".join(_SLO_MEASURES)
            raise InvalidRequestError(f"slo {text!r}: must be name=number, the name one of {names}", param="slo")
    return Slo(limits=limits) if limits else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Of one run, or of the requests of one kind in it. Rates are over `duration_s`, from the first request's due time
    to the last one's end; distributions are over completed requests, None where nothing was seen."""

    duration_s: float
    num_sent: int
    num_completed: int
    errors: Mapping[str, int]
    requests_per_s: float
    chunks_per_s: float | None
    frames_per_s: float | None
    """Generated frames of completed requests, counted in the bytes that came."""
    time_to_first_segment_s: Distribution | None
    inter_segment_s: Distribution | None
    end_to_end_s: Distribution | None
    realtime_factor: Distribution | None
    underruns: Distribution | None
    """Per stream, when playback begins with the first segment."""
    stalled_s: Distribution | None
    underruns_with_preroll: Distribution | None
    stalled_with_preroll_s: Distribution | None
    needed_preroll_s: Distribution | None
    smooth_share: float | None
    """Of completed streams: without any underrun and any pre-roll."""
    smooth_share_with_preroll: float | None
    goodput_per_s: float | None
    """Requests per second that met the SLO; None without one."""
    good_share: float | None
    """Of all requests sent."""
    send_lag_s: Distribution | None
    """How late this client sent them: large values make it the bottleneck."""
    server_timing_ms: Mapping[str, Distribution]
    """What the server says of completed requests, by its names."""
    warnings: Mapping[str, int]


def summarize(run: Sequence[Observed], slo: Slo | None) -> Summary:
    """Raises: nothing; an empty run has duration 0 and rates 0."""
    completed = [seen for seen in run if seen.is_completed]
    duration_s = max((seen.ended_s for seen in run), default=0.0) - min((seen.due_s for seen in run), default=0.0)
    plain = [played for seen in completed if (played := playback(seen, 0.0)) is not None]
    waited = [
        played
        for seen in completed
        if seen.preroll_s is not None and (played := playback(seen, seen.preroll_s)) is not None
    ]
    num_good = None if slo is None else sum(slo.is_met(seen) for seen in run)
    return Summary(
        duration_s=duration_s,
        num_sent=len(run),
        num_completed=len(completed),
        errors=dict(Counter(seen.error for seen in run if seen.error is not None).most_common()),
        requests_per_s=_rate(len(completed), duration_s),
        chunks_per_s=_total_rate([seen.num_chunks for seen in completed], duration_s),
        frames_per_s=_total_rate([seen.num_frames for seen in completed], duration_s),
        time_to_first_segment_s=_over(completed, time_to_first_segment_s),
        inter_segment_s=distribution([gap for seen in completed for gap in inter_segment_s(seen)]),
        end_to_end_s=_over(completed, end_to_end_s),
        realtime_factor=_over(completed, realtime_factor),
        underruns=distribution([float(played.num_underruns) for played in plain]),
        stalled_s=distribution([played.stalled_s for played in plain]),
        underruns_with_preroll=distribution([float(played.num_underruns) for played in waited]),
        stalled_with_preroll_s=distribution([played.stalled_s for played in waited]),
        needed_preroll_s=_over(completed, preroll_needed_s),
        smooth_share=_smooth(plain),
        smooth_share_with_preroll=_smooth(waited),
        goodput_per_s=None if num_good is None else _rate(num_good, duration_s),
        good_share=None if num_good is None or not run else num_good / len(run),
        send_lag_s=_over(run, lambda seen: seen.sent_s - seen.due_s),
        server_timing_ms=_server_timing_ms(completed),
        warnings=dict(Counter(message for seen in run for message in seen.warnings).most_common()),
    )


def by_kind(run: Sequence[Observed], slo: Slo | None) -> dict[str, Summary]:
    """A summary of each kind of request, by its name; rates are over that kind's own time."""
    names = dict.fromkeys(seen.planned.kind.name for seen in run)
    return {name: summarize([seen for seen in run if seen.planned.kind.name == name], slo) for name in names}


def _over(run: Sequence[Observed], measure: Callable[[Observed], float | None]) -> Distribution | None:
    return distribution([value for seen in run if (value := measure(seen)) is not None])


def _server_timing_ms(completed: Sequence[Observed]) -> dict[str, Distribution]:
    values: dict[str, list[float]] = {}
    for seen in completed:
        for name, ms in seen.server_timing_ms.items():
            values.setdefault(name, []).append(ms)
    return {name: found for name, one in values.items() if (found := distribution(one)) is not None}


def _smooth(played: Sequence[Playback]) -> float | None:
    return sum(one.num_underruns == 0 for one in played) / len(played) if played else None


def _rate(count: int, duration_s: float) -> float:
    return count / duration_s if duration_s > 0 else 0.0


def _total_rate(counts: Sequence[int | None], duration_s: float) -> float | None:
    """None when one of them is not known: a sum without it would be too small."""
    known = [count for count in counts if count is not None]
    return _rate(sum(known), duration_s) if len(known) == len(counts) else None


def flat(summary: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Every number of a summary as a dictionary, by dotted name."""
    numbers: dict[str, float] = {}
    for name, value in summary.items():
        if isinstance(value, Mapping):
            numbers |= flat(value, f"{prefix}{name}.")
        elif isinstance(value, int | float):
            numbers[prefix + name] = float(value)
    return numbers
