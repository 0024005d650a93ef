"""Percentiles against numpy, playback against a player in small steps, SLOs, rates, searches: no clock, no network."""

from __future__ import annotations

import asyncio
import dataclasses
import random

import numpy as np
import pytest

from helios_serve.bench.arrivals import ClosedLoad, OpenLoad, TraceLoad
from helios_serve.bench.campaign import Found, at_level, level_of, search, spread
from helios_serve.bench.metrics import (
    Slo,
    by_kind,
    distribution,
    flat,
    inter_segment_s,
    parse_slo,
    summarize,
    time_to_first_segment_s,
)
from helios_serve.bench.observed import Observed, SeenSegment
from helios_serve.bench.playback import needed_preroll_s, play
from helios_serve.bench.workload import Kind, Planned
from helios_serve.errors import InvalidRequestError

STREAM = Kind(num_frames=72, fps=24)
JOB = Kind(service_class="offline", via="jobs", num_frames=48, fps=24)


def seen(
    due_s: float, arrivals_s: tuple[float, ...], ended_s: float, *, kind: Kind = STREAM, **more: object
) -> Observed:
    """A request whose segments of 24 frames, a second each, came at `arrivals_s`."""
    segments = tuple(SeenSegment(at_s=at_s, num_frames=24, num_bytes=100) for at_s in arrivals_s)
    fields: dict[str, object] = {"num_frames": 24 * len(segments), "num_chunks": len(segments), **more}
    planned = Planned(index=0, kind=kind, prompt="a fox", seed=1)
    return Observed(planned=planned, due_s=due_s, sent_s=due_s + 0.01, ended_s=ended_s, segments=segments, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101])
def test_percentiles_are_numpys(count: int) -> None:
    draw = random.Random(count)
    values = [draw.expovariate(1) for _ in range(count)]
    found = distribution(values)
    assert found is not None
    assert found.count == count
    expected = np.percentile(values, [0, 50, 90, 99, 100])
    assert np.allclose([found.low, found.p50, found.p90, found.p99, found.high], expected, rtol=1e-12)
    assert found.mean == pytest.approx(np.mean(values), rel=1e-12)
    assert distribution([]) is None


def stand_still_ms(arrivals_ms: list[int], durations_ms: list[int], preroll_ms: int) -> tuple[int, int]:
    """A player that looks every millisecond: how often it stood still, and for how many of them."""
    now, shown, underruns, stalled = arrivals_ms[0] + preroll_ms, 0, 0, 0
    is_still = False
    while shown < sum(durations_ms):
        arrived = sum(length for at, length in zip(arrivals_ms, durations_ms, strict=True) if at <= now)
        if shown < arrived:
            shown, is_still = shown + 1, False
        else:
            underruns += not is_still
            is_still, stalled = True, stalled + 1
        now += 1
    return underruns, stalled


@pytest.mark.parametrize("seed", range(20))
def test_playback_is_that_of_a_player_in_small_steps(seed: int) -> None:
    draw = random.Random(seed)
    arrivals = sorted(draw.randrange(0, 4000) for _ in range(6))
    durations = [draw.randrange(100, 900) for _ in arrivals]
    preroll = draw.choice([0, 250, 1500])
    underruns, stalled = stand_still_ms(arrivals, durations, preroll)
    played = play([at / 1000 for at in arrivals], [length / 1000 for length in durations], preroll / 1000)
    assert (played.num_underruns, round(1000 * played.stalled_s)) == (underruns, stalled)


@pytest.mark.parametrize("seed", range(20))
def test_the_needed_preroll_is_enough_and_no_more(seed: int) -> None:
    draw = random.Random(seed)
    arrivals = sorted(draw.uniform(0, 4) for _ in range(6))
    durations = [draw.uniform(0.1, 0.9) for _ in arrivals]
    needed = needed_preroll_s(arrivals, durations)
    assert play(arrivals, durations, needed).num_underruns == 0
    if needed > 0:
        assert play(arrivals, durations, needed - 1e-3).stalled_s == pytest.approx(1e-3)


def test_nothing_to_play() -> None:
    assert play([], []).num_underruns == 0
    assert needed_preroll_s([], []) == 0


def test_a_run_by_hand() -> None:
    run = [
        seen(0.0, (1.0, 2.5, 3.0), 3.1, preroll_s=0.5),  # stands still from 2 to 2.5
        seen(1.0, (2.0, 2.5, 3.0), 3.2, preroll_s=0.0),
        seen(2.0, (4.0,), 4.5, error="cut"),
        seen(3.0, (), 10.0, kind=JOB, num_frames=48, num_chunks=2),
        seen(3.5, (), 3.6, error="http_429", status=429),
    ]
    summary = summarize(run, Slo(limits={"ttfs": 1.5, "stall": 0.2, "e2e": 8}))
    assert (summary.duration_s, summary.num_sent, summary.num_completed) == (10.0, 5, 3)
    assert summary.errors == {"cut": 1, "http_429": 1}
    assert (summary.requests_per_s, summary.chunks_per_s) == (0.3, 0.8)
    assert summary.frames_per_s == pytest.approx((72 + 72 + 48) / 10)
    assert summary.time_to_first_segment_s is not None
    assert (summary.time_to_first_segment_s.count, summary.time_to_first_segment_s.mean) == (2, 1.0)
    assert summary.inter_segment_s is not None
    assert (summary.inter_segment_s.count, summary.inter_segment_s.high) == (4, 1.5)
    assert summary.realtime_factor is not None
    assert (summary.realtime_factor.count, summary.realtime_factor.high) == (3, 3.5)
    assert summary.underruns is not None
    assert (summary.underruns.mean, summary.smooth_share) == (0.5, 0.5)
    assert summary.stalled_s is not None
    assert summary.stalled_s.high == 0.5
    assert summary.underruns_with_preroll is not None
    assert (summary.underruns_with_preroll.high, summary.smooth_share_with_preroll) == (0, 1.0)
    assert summary.needed_preroll_s is not None
    assert summary.needed_preroll_s.high == 0.5
    # Good: the second stream, and the job, which only e2e binds.
    assert (summary.goodput_per_s, summary.good_share) == (0.2, 0.4)
    assert summary.send_lag_s is not None
    assert summary.send_lag_s.p99 == pytest.approx(0.01)


def test_latency_counts_from_when_the_request_was_due() -> None:
    late = dataclasses.replace(seen(1.0, (3.0,), 3.0), sent_s=2.5)
    assert time_to_first_segment_s(late) == 2.0
    assert inter_segment_s(late) == []


def test_unknown_frames_make_the_sum_unknown() -> None:
    run = [seen(0.0, (), 1.0, kind=JOB, num_frames=None, num_chunks=None), seen(0.0, (), 1.0, kind=JOB, num_frames=48)]
    summary = summarize(run, None)
    assert (summary.frames_per_s, summary.goodput_per_s, summary.good_share) == (None, None, None)
    assert not Slo(limits={"rtf": 99}).is_met(run[0])


def test_an_empty_run_and_each_kind_of_a_mixed_one() -> None:
    assert summarize([], Slo(limits={"e2e": 1})).requests_per_s == 0
    run = [seen(0.0, (1.0,), 1.0), seen(0.0, (), 4.0, kind=JOB, num_frames=48)]
    kinds = by_kind(run, None)
    assert {name: summary.duration_s for name, summary in kinds.items()} == {
        "realtime t2v 72f sse": 1.0,
        "offline t2v 48f jobs": 4.0,
    }


def test_slos_are_read_or_refused() -> None:
    assert parse_slo([]) is None
    assert parse_slo(["ttfs=2", "rtf=1"]) == Slo(limits={"ttfs": 2.0, "rtf": 1.0})
    for bad in ("ttfs", "ttfs=x", "latency=1", "ttfs=-1", "ttfs=nan"):
        with pytest.raises(InvalidRequestError, match="slo"):
            parse_slo([bad])


def test_spread_is_over_the_repeats_that_have_the_number() -> None:
    numbers = [flat({"a": 1, "b": {"p50": 4.0}}), flat({"a": 3, "b": None}), flat({"a": 2, "b": {"p50": 6.0}})]
    assert spread(numbers) == {
        "a": {"median": 2, "low": 1, "high": 3},
        "b.p50": {"median": 5.0, "low": 4.0, "high": 6.0},
    }


@pytest.mark.parametrize(
    ("capacity", "first", "is_whole", "highest"),
    [
        (5.3, 1.0, False, 5.3),
        (5.3, 64.0, False, 5.3),
        (7.0, 1.0, True, 7),
        (1.0, 16.0, True, 1),
        (0.0, 4.0, True, None),
    ],
)
def test_a_search_finds_the_highest_load(capacity: float, first: float, is_whole: bool, highest: float | None) -> None:
    tried: list[float] = []

    async def holds(level: float) -> bool:
        tried.append(level)
        return level <= capacity

    found = asyncio.run(search(holds, first, 6, is_whole=is_whole))
    if highest is None:
        assert found == Found(highest=None, lowest_failing=1.0)
        return
    assert found.highest is not None
    assert found.lowest_failing is not None
    assert found.highest <= capacity < found.lowest_failing
    if is_whole:
        assert (found.highest, found.lowest_failing) == (highest, highest + 1)
    else:
        assert found.lowest_failing / found.highest < 1.02
    assert len(tried) == len(set(tried))


def test_a_search_without_an_end_says_so() -> None:
    async def holds(_: float) -> bool:
        return True

    found = asyncio.run(search(holds, 1.0, 3, is_whole=False))
    assert found == Found(highest=2.0**11, lowest_failing=None)


def test_loads_can_be_made_heavier() -> None:
    for load in (OpenLoad(rate=2, burstiness=0.5), ClosedLoad(concurrency=2), TraceLoad(times=(3.0, 4.0, 9.0))):
        assert level_of(at_level(load, 4.0)) == pytest.approx(4.0)
        assert type(at_level(load, 4.0)) is type(load)
