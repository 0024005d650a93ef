"""A benchmark as tables on a terminal.

Knows rich and what a reader looks for first; measures nothing.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from helios_serve.bench.arrivals import ClosedLoad
from helios_serve.bench.campaign import Campaign, Found, Point, spread
from helios_serve.bench.metrics import Summary, by_kind, flat
from helios_serve.bench.observed import Observed

_DISTRIBUTIONS = (
    ("time to first segment, s", "time_to_first_segment_s"),
    ("between segments, s", "inter_segment_s"),
    ("end to end, s", "end_to_end_s"),
    ("realtime factor", "realtime_factor"),
    ("underruns per stream", "underruns"),
    ("  stalled, s", "stalled_s"),
    ("underruns with pre-roll", "underruns_with_preroll"),
    ("  stalled, s", "stalled_with_preroll_s"),
    ("pre-roll needed, s", "needed_preroll_s"),
    ("sent late by, s", "send_lag_s"),
    ("server: queued, ms", "server_timing_ms.queue_ms"),
    ("server: in all, ms", "server_timing_ms.total_ms"),
    ("server: model, ms", "server_timing_ms.inference_ms"),
)
_RATES = (
    ("requests/s", "requests_per_s"),
    ("chunks/s", "chunks_per_s"),
    ("generated frames/s", "frames_per_s"),
    ("good requests/s", "goodput_per_s"),
    ("good share", "good_share"),
    ("streams without underrun", "smooth_share"),
    ("  with pre-roll", "smooth_share_with_preroll"),
)
_OF_A_KIND = (
    ("first p50", "time_to_first_segment_s.p50"),
    ("p99", "time_to_first_segment_s.p99"),
    ("end p50", "end_to_end_s.p50"),
    ("p99", "end_to_end_s.p99"),
    ("smooth", "smooth_share"),
    ("good", "good_share"),
)
_COLUMNS = ("mean", "p50", "p90", "p99", "high")
_LATE_S = 0.05
_BUSY_SHARE = 0.7
_LEAST = 5e-4
"""Of what is shown: a half of a millisecond."""
_PIPED_WIDTH = 120
_NUMBER = re.compile(r"\d+(\.\d+)?")


def wide_console(piped_width: int = _PIPED_WIDTH) -> Console:
    """Of stdout; where nobody gives it a width it takes one that all columns fit in."""
    console = Console()
    return console if console.is_terminal else Console(width=piped_width)


def print_point(console: Console, campaign: Campaign, point: Point) -> None:
    """One table of a load; with repeats each number is the median, behind it how far the farthest repeat lies."""
    spreads = _spreads(point.summaries)
    sent = sum(summary.num_sent for summary in point.summaries)
    done = sum(summary.num_completed for summary in point.summaries)
    table = plain_table(
        f"{point.load.label}: {done} of {sent} completed", ["max" if one == "high" else one for one in _COLUMNS]
    )
    for label, name in _RATES:
        if name in spreads:
            table.add_row(label, cell(spreads[name]))
    for label, name in _DISTRIBUTIONS:
        if f"{name}.mean" in spreads:
            table.add_row(label, *(cell(spreads[f"{name}.{column}"]) for column in _COLUMNS))
    console.print(table)
    _print_kinds(console, campaign, point)
    for line in _remarks(point):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def print_found(console: Console, campaign: Campaign, found: Found) -> None:
    """Where the search ended."""
    assert campaign.search is not None
    unit = "in flight" if isinstance(campaign.loads[0], ClosedLoad) else "requests/s"
    share = f"{campaign.search.share:.0%} of the requests meet the SLO"
    if found.highest is None:
        text = f"no load was met at which {share}"
    elif found.lowest_failing is None:
        text = f"{share} at {found.highest:g} {unit} and at all that were tried"
    else:
        text = f"{share} up to {found.highest:.3g} {unit}, not at {found.lowest_failing:.3g}"
    console.print(text, highlight=False)


def plain_table(title: str, columns: Sequence[str]) -> Table:
    """Labels on the left, numbers on the right of their columns."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def cell(spread_of: Mapping[str, float]) -> str:
    """The median of the repeats, and how far the farthest lies."""
    middle = spread_of["median"]
    away = max(spread_of["high"] - middle, middle - spread_of["low"])
    return _number(middle) if away < _LEAST else f"{_number(middle)}±{_number(away, 2)}"


def _print_kinds(console: Console, campaign: Campaign, point: Point) -> None:
    """A row for each kind of a mix: first segment and end in seconds, and shares."""
    runs = [by_kind(run, campaign.slo) for run in point.runs]
    names = dict.fromkeys(name for run in runs for name in run)
    if len(names) < 2:
        return
    table = plain_table("by kind", ["done", *(label for label, _ in _OF_A_KIND)])
    for name in names:
        summaries = [run[name] for run in runs if name in run]
        spreads = _spreads(summaries)
        done = f"{sum(one.num_completed for one in summaries)}/{sum(one.num_sent for one in summaries)}"
        table.add_row(name, done, *(cell(spreads[key]) if key in spreads else "" for _, key in _OF_A_KIND))
    console.print(table)


def _remarks(point: Point) -> list[str]:
    seen = [one for run in point.runs for one in run]
    return [
        *_errors(seen),
        *(f"made as {text}" for text in dict.fromkeys(one.made_as for one in seen if one.made_as is not None)),
        *_warnings(seen),
        *_doubts(point),
    ]


def _errors(seen: Sequence[Observed]) -> list[str]:
    """One line for each code, with the first message of its kind."""
    failed: dict[str, list[Observed]] = {}
    for one in seen:
        if one.error is not None:
            failed.setdefault(one.error, []).append(one)
    return [f"error {code}, {len(all_of_it)} times: {all_of_it[0].message}" for code, all_of_it in failed.items()]


def _warnings(seen: Sequence[Observed]) -> list[str]:
    """Those that differ in numbers only are told once."""
    alike: dict[str, list[str]] = {}
    for one in seen:
        for text in one.warnings:
            alike.setdefault(_NUMBER.sub("#", text), []).append(text)
    return [f"the server warns, {len(texts)} times: {texts[0]}" for texts in alike.values()]


def _doubts(point: Point) -> list[str]:
    """Whether the client, not the server, may be what was measured."""
    doubts = []
    if any(one.send_lag_s is not None and one.send_lag_s.p99 > _LATE_S for one in point.summaries):
        doubts.append("this client sent late: it, not the server, may be what limits the load")
    if (busiest := max(point.client_cpu_shares)) > _BUSY_SHARE:
        doubts.append(f"this client used {busiest:.0%} of a core: run it on another machine, or several of it")
    return doubts


def _spreads(summaries: Sequence[Summary]) -> dict[str, dict[str, float]]:
    return spread([flat(dataclasses.asdict(summary)) for summary in summaries])


def _number(value: float, digits: int = 3) -> str:
    """Three digits; all of them in front of the point."""
    if 0 < abs(value) < _LEAST:
        return "<0.001"
    return f"{value:.0f}" if value == int(value) or abs(value) >= 100 else f"{value:.{digits}g}"
