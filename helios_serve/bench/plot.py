"""A result as a picture: time to first segment and goodput, against load.

Knows a result's numbers and SVG; measures nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

_WIDTH, _HEIGHT, _LEFT, _RIGHT = 760, 640, 78, 24
_PANELS = ((56, 300), (368, 590))
"""Top and bottom of each panel, in pixels."""
_BLUE, _ORANGE, _GREY, _GREEN, _RED = "#2563eb", "#ea580c", "#64748b", "#15803d", "#dc2626"
_LETTER = 7.2
"""Width of a letter, about, in pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scale:
    """A linear axis from 0."""

    high: float
    start: float
    stop: float

    def place(self, value: float) -> float:
        return self.start + value / self.high * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Four to nine round numbers."""
        raw = self.high / 5
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw)
        return [index * step for index in range(math.floor(self.high / step + 1e-9) + 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Series:
    """One line: (load, median, lowest, highest) over the repeats."""

    label: str
    colour: str
    points: Sequence[tuple[float, float, float, float]]
    dashes: str = ""


def load_plot(result: Mapping[str, Any]) -> str:
    """The picture of a result that `report.result_of` made, as SVG."""
    points = result["points"]
    is_closed = "concurrency" in points[0]["load"]
    x_label = "requests in flight" if is_closed else "offered load [requests/s]"
    x = _Scale(high=1.06 * max(point["load"]["level"] for point in points), start=_LEFT, stop=_WIDTH - _RIGHT)
    has_segments = any("time_to_first_segment_s.p50" in point["spread"] for point in points)
    measure, title, limit = (
        ("time_to_first_segment_s", "Time to first segment [s]", "ttfs")
        if has_segments
        else ("end_to_end_s", "End to end [s]", "e2e")
    )
    latency = [
        _series(points, f"{measure}.p50", "p50", _BLUE),
        _series(points, f"{measure}.p90", "p90", _BLUE, "6 3"),
        _series(points, f"{measure}.p99", "p99", _BLUE, "2 3"),
    ]
    rates = [
        _series(points, "goodput_per_s", "goodput: met the SLO", _GREEN),
        _series(points, "requests_per_s", "completed", _ORANGE, "6 3"),
    ]
    if not is_closed:
        rates.append(_offered(points))
    limits = (result["campaign"]["slo"] or {"limits": {}})["limits"]
    drawn = [
        *_panel(x, _PANELS[0], title, [one for one in latency if one.points], limits.get(limit)),
        *_panel(x, _PANELS[1], "Requests per second", [one for one in rates if one.points], None),
        _text(_WIDTH / 2, _HEIGHT - 10, x_label, "middle"),
        _text(_LEFT - 40, 22, _heading(result), weight="bold"),
    ]
    highest = (result["search"] or {"highest": None})["highest"]
    if highest is not None:
        drawn += [_line([(x.place(highest), top), (x.place(highest), base)], _GREY, "4 4") for top, base in _PANELS]
        drawn.append(_text(x.place(highest) - 6, _PANELS[1][1] - 8, f"SLO holds up to {highest:.3g}", "end"))
    return _svg(drawn)


def _heading(result: Mapping[str, Any]) -> str:
    models = result["server"]["models"]
    named = [str(model["id"]) for model in models["data"][:1]] if isinstance(models, dict) and "data" in models else []
    kinds = result["points"][0]["by_kind"][0]
    first = next(iter(kinds), "")
    more = f" and {len(kinds) - 1} more" if len(kinds) > 1 else ""
    return ": ".join([*named, first + more])


def _series(points: Sequence[Mapping[str, Any]], name: str, label: str, colour: str, dashes: str = "") -> _Series:
    found = [(point["load"]["level"], point["spread"][name]) for point in points if name in point["spread"]]
    rows = [(level, one["median"], one["low"], one["high"]) for level, one in found]
    return _Series(label=label, colour=colour, points=sorted(rows), dashes=dashes)


def _offered(points: Sequence[Mapping[str, Any]]) -> _Series:
    """What would be completed by a server that is never behind."""
    levels = sorted(point["load"]["level"] for point in points)
    return _Series(label="offered", colour=_GREY, points=[(at, at, at, at) for at in levels], dashes="1 3")


def _panel(x: _Scale, place: tuple[int, int], title: str, series: Sequence[_Series], limit: float | None) -> list[str]:
    top, base = place
    highest = max([high for one in series for *_, high in one.points] + ([] if limit is None else [limit]), default=1.0)
    y = _Scale(high=1.08 * highest if highest > 0 else 1.0, start=base, stop=top)
    drawn = [_text(_LEFT - 40, top - 12, title)]
    for tick in x.ticks():
        drawn += [_line([(x.place(tick), top), (x.place(tick), base)], "#eef2f7")]
        drawn += [_text(x.place(tick), base + 17, f"{tick:.4g}", "middle")]
    for tick in y.ticks():
        drawn += [_line([(_LEFT, y.place(tick)), (_WIDTH - _RIGHT, y.place(tick))], "#e2e8f0")]
        drawn += [_text(_LEFT - 8, y.place(tick) + 4, f"{tick:.4g}", "end")]
    if limit is not None:
        drawn += [_line([(_LEFT, y.place(limit)), (_WIDTH - _RIGHT, y.place(limit))], _RED, "4 4")]
        drawn += [_text(_LEFT + 6, y.place(limit) - 5, f"SLO {limit:g}", colour=_RED)]
    for index, one in enumerate(series):
        drawn += _curve(x, y, one, 3.0 * (index - (len(series) - 1) / 2))
    return [*drawn, *_legend(series, top - 12)]


def _curve(x: _Scale, y: _Scale, one: _Series, aside: float) -> list[str]:
    """`aside`: pixels by which the ranges of several lines stand beside each other."""
    drawn = [_line([(x.place(load), y.place(value)) for load, value, _, _ in one.points], one.colour, one.dashes, 2)]
    for load, value, low, high in one.points:
        if low < high:
            left = x.place(load) + aside
            drawn.append(_line([(left, y.place(low)), (left, y.place(high))], one.colour))
        drawn.append(
            f'<circle cx="{x.place(load):.1f}" cy="{y.place(value):.1f}" r="3.5" fill="{one.colour}">'
            f"<title>{escape(one.label)} at {load:.4g}: {value:.4g} ({low:.4g} to {high:.4g})</title></circle>"
        )
    return drawn


def _legend(series: Sequence[_Series], base: float) -> list[str]:
    drawn: list[str] = []
    right = float(_WIDTH - _RIGHT)
    for one in reversed(series):
        drawn.append(_line([(right - 24, base - 4), (right, base - 4)], one.colour, one.dashes, 2))
        drawn.append(_text(right - 30, base, one.label, "end"))
        right -= 48 + _LETTER * len(one.label)
    return drawn


def _line(points: Sequence[tuple[float, float]], colour: str, dashes: str = "", width: int = 1) -> str:
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{dashed}/>'


def _text(
    left: float, base: float, text: str, anchor: str = "start", *, weight: str = "normal", colour: str = "#0f172a"
) -> str:
    return (
        f'<text x="{left:.1f}" y="{base:.1f}" text-anchor="{anchor}" font-weight="{weight}" fill="{colour}">'
        f"{escape(text)}</text>"
    )


def _svg(parts: Iterable[str]) -> str:
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'font-family="system-ui, sans-serif" font-size="13">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )
