"""A whole benchmark: warm-up, every load as often as asked, and the search for the highest load that meets an SLO.

Knows in which order runs happen; measures through `load.drive`.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

from helios_serve.bench.arrivals import ClosedLoad, Load, OpenLoad, TraceLoad
from helios_serve.bench.load import Caller, Watcher, drive
from helios_serve.bench.metrics import Slo, Summary, summarize
from helios_serve.bench.observed import Observed
from helios_serve.bench.workload import Kind, Prompt, plan_each, plan_requests
from helios_serve.errors import InvalidRequestError

_LARGEST_GROWTH = 12
"""Doublings or halvings in search of a first bound: four thousand times the first load."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One load, measured once or more."""

    load: Load
    runs: tuple[tuple[Observed, ...], ...]
    summaries: tuple[Summary, ...]
    client_cpu_shares: tuple[float, ...]
    """Of each run: seconds of a core that this process used, per second. Near 1 it measures itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """Of the highest load at which at least `share` of the requests are good, in every repeat.

    Doubles or halves from the first load until one holds and one does not, then halves the ratio between them
    `num_refinements` times. Loads in flight are whole numbers.
    """

    share: float
    num_refinements: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """`highest` holds and `lowest_failing` does not; None where no such load was met."""

    highest: float | None
    lowest_failing: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Campaign:
    """What is measured. `loads` are measured in order; with a `search` the first of them is where it begins.

    A run has `num_requests`, or those that are due within `duration_s`.
    """

    kinds: tuple[Kind, ...]
    prompts: tuple[Prompt, ...]
    loads: tuple[Load, ...]
    num_requests: int
    num_warmup: int
    """Requests of each kind, one after another, before all."""
    num_repeats: int
    seed: int
    duration_s: float | None = None
    slo: Slo | None = None
    search: Search | None = None


class View(Watcher, Protocol):
    """Is also told which run is next."""

    def begin(self, title: str, num_requests: int) -> None: ...


async def run_campaign(campaign: Campaign, caller: Caller, view: View, points: list[Point]) -> Found | None:
    """Adds each load to `points` when it has been measured, so that what was seen outlives an interrupt.

    Raises: InvalidRequestError when not one request of the warm-up succeeds.
    """
    await _warm_up(campaign, caller, view)
    if campaign.search is None:
        for load in campaign.loads:
            point = await _measure(campaign, load, caller, view)
            points.append(point)
        return None
    first, rule = campaign.loads[0], campaign.search

    async def holds(level: float) -> bool:
        points.append(await _measure(campaign, at_level(first, level), caller, view))
        return all(meets(summary, rule) for summary in points[-1].summaries)

    return await search(holds, level_of(first), rule.num_refinements, is_whole=isinstance(first, ClosedLoad))


def meets(summary: Summary, rule: Search) -> bool:
    return summary.good_share is not None and summary.good_share >= rule.share


async def search(
    holds: Callable[[float], Awaitable[bool]], first: float, num_refinements: int, *, is_whole: bool
) -> Found:
    """The highest level at which `holds`, taking it to hold at all lower ones."""
    highest: float | None = None
    failing: float | None = None
    level = first
    for _ in range(_LARGEST_GROWTH):
        if await holds(level):
            highest = level
            if failing is not None:
                break
            level *= 2
        else:
            failing = level
            if highest is not None or (is_whole and level <= 1):
                break
            level = level // 2 if is_whole else level / 2
    if highest is None or failing is None:
        return Found(highest=highest, lowest_failing=failing)
    for _ in range(num_refinements):
        level = (highest + failing) // 2 if is_whole else (highest * failing) ** 0.5
        if level == highest:
            break
        if await holds(level):
            highest = level
        else:
            failing = level
    return Found(highest=highest, lowest_failing=failing)


def level_of(load: Load) -> float:
    """Requests per second, or in flight: what a plot has on its axis."""
    return float(load.concurrency) if isinstance(load, ClosedLoad) else load.rate


def at_level(load: Load, level: float) -> Load:
    """The same kind of load, heavier or lighter; a trace is replayed faster or slower."""
    if isinstance(load, ClosedLoad):
        return ClosedLoad(concurrency=int(level))
    if isinstance(load, TraceLoad):
        return TraceLoad(times=load.times, speed=load.speed * level / load.rate)
    return OpenLoad(rate=level, burstiness=load.burstiness)


def spread(summaries: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Median, lowest and highest of each number over the repeats that have it."""
    names = dict.fromkeys(name for summary in summaries for name in summary)
    found = {}
    for name in names:
        values = [summary[name] for summary in summaries if name in summary]
        found[name] = {"median": median(values), "low": min(values), "high": max(values)}
    return found


async def _measure(campaign: Campaign, load: Load, caller: Caller, view: View) -> Point:
    runs: list[tuple[Observed, ...]] = []
    cpu_shares: list[float] = []
    for repeat in range(campaign.num_repeats):
        seed = campaign.seed + repeat
        planned = plan_requests(campaign.kinds, campaign.prompts, _num_requests(campaign, load, seed), seed)
        view.begin(_title(load, repeat, campaign.num_repeats), len(planned))
        started_s, used_s = time.perf_counter(), time.process_time()
        runs.append(tuple(await drive(caller, planned, load, seed, view)))
        cpu_shares.append((time.process_time() - used_s) / (time.perf_counter() - started_s))
    summaries = tuple(summarize(run, campaign.slo) for run in runs)
    return Point(load=load, runs=tuple(runs), summaries=summaries, client_cpu_shares=tuple(cpu_shares))


def _num_requests(campaign: Campaign, load: Load, seed: int) -> int:
    if campaign.duration_s is not None:
        assert not isinstance(load, ClosedLoad)
        return load.count_within(campaign.duration_s, seed)
    return min(campaign.num_requests, len(load.times)) if isinstance(load, TraceLoad) else campaign.num_requests


def _title(load: Load, repeat: int, num_repeats: int) -> str:
    return load.label if num_repeats == 1 else f"{load.label}, repeat {repeat + 1} of {num_repeats}"


async def _warm_up(campaign: Campaign, caller: Caller, view: View) -> None:
    """One after another; what they show is not kept."""
    if campaign.num_warmup == 0:
        return
    planned = plan_each(campaign.kinds, campaign.prompts, campaign.num_warmup, campaign.seed - 1)
    view.begin("warm-up", len(planned))
    seen = await drive(caller, planned, ClosedLoad(concurrency=1), campaign.seed, view)
    if not any(one.is_completed for one in seen):
        first = seen[0]
        raise InvalidRequestError(f"warm-up: no request succeeded; the first ended with {first.error}: {first.message}")
