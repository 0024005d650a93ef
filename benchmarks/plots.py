"""Kept results as SVG pictures: a roofline of products and fused operators, and a chunk's time by its parts.

Knows results and how to draw; measures nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from benchmarks.outcome import Result
from benchmarks.plan import Measurement
from benchmarks.titles import title_of

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 760, 420, 70, 50, 30, 20
_NAMES_WIDTH = 270.0
_COLOURS = ("#2563eb", "#dc2626", "#16a34a", "#9333ea", "#ea580c", "#475569")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Axis:
    """A logarithmic axis between two pixels."""

    low: float
    high: float
    start: float
    stop: float

    def place(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Powers of ten inside."""
        first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
        return [10.0**power for power in range(first, last + 1)]


def pictures(result: Result) -> list[tuple[str, str]]:
    """Kind and SVG text of each picture that the result has numbers for."""
    made = []
    measured = {one.name for one in result.measurements}
    if "micro/copy" in measured and any(_point(one) for one in result.measurements):
        made.append(("roofline", roofline(result)))
    rows = {one.name: dict(one.details["ms_by_kind"]) for one in result.measurements if one.details.get("ms_by_kind")}
    if rows:
        made.append(("parts", stacked("Kernel time by kind", "ms", rows)))
    return made


def roofline(result: Result) -> str:
    """Operations per byte against TFLOP/s; the roofs are the copy and the fastest product of the same run."""
    copy = [one.value for one in result.measurements if one.name == "micro/copy"]
    points = [point for one in result.measurements for point in _point(one)]
    peak = max(rate for _, _, rate in points)
    x = _Axis(low=0.1, high=1e4, start=_LEFT, stop=_WIDTH - _RIGHT)
    y = _Axis(low=0.1, high=2e3, start=_HEIGHT - _BOTTOM, stop=_TOP)
    ridge = peak * 1e12 / (copy[0] * 1e9)
    roof = [(x.low, max(y.low, x.low * copy[0] / 1e3)), (ridge, peak), (x.high, peak)]
    parts = [*_axes(x, y, "operations per byte", "TFLOP/s"), _line([(x.place(a), y.place(b)) for a, b in roof])]
    for name, intensity, rate in points:
        colour = _COLOURS[0] if name.startswith("micro/gemm") else _COLOURS[1]
        title = f"{name}: {rate:.0f} TFLOP/s"
        parts.append(
            f'<circle cx="{x.place(intensity):.1f}" cy="{y.place(max(rate, y.low)):.1f}" r="4" fill="{colour}">'
            f"<title>{escape(title)}</title></circle>"
        )
    heading = f"{result.environment['device']}: copy {copy[0]:.0f} GB/s, products up to {peak:.0f} TFLOP/s"
    return _svg([*parts, _text(_LEFT, 18, heading)])


def _point(one: Measurement) -> list[tuple[str, float, float]]:
    """Name, operations per byte and TFLOP/s of a measurement whose details hold both; else nothing."""
    operations, moved = one.details.get("operations"), one.details.get("bytes")
    if not operations or not moved or one.unit != "TFLOP/s":
        return []
    return [(one.name, operations / moved, one.value)]


def stacked(title: str, unit: str, rows: Mapping[str, Mapping[str, float]]) -> str:
    """One bar for each row, of its parts side by side, such as the milliseconds of a chunk."""
    names = sorted({part for parts in rows.values() for part in parts})
    longest = max(sum(parts.values()) for parts in rows.values())
    step = (_HEIGHT - _TOP - _BOTTOM) / max(1, len(rows))
    parts_drawn = [_text(_LEFT, 18, f"{title} [{unit}]")]
    for index, (row, parts) in enumerate(rows.items()):
        top, left = _TOP + index * step, _NAMES_WIDTH
        parts_drawn.append(_text(10, top + step / 2, title_of(row).removesuffix(": idle share of the GPU")))
        for name in names:
            width = parts.get(name, 0.0) / longest * (_WIDTH - _NAMES_WIDTH - 80)
            colour = _COLOURS[names.index(name) % len(_COLOURS)]
            parts_drawn.append(
                f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{step * 0.7:.1f}" fill="{colour}">'
                f"<title>{escape(name)}: {parts.get(name, 0.0):.4g} {escape(unit)}</title></rect>"
            )
            left += width
        parts_drawn.append(_text(left + 6, top + step / 2, f"{sum(parts.values()):.4g}"))
    return _svg([*parts_drawn, *_legend(names)])


def _legend(names: Sequence[str]) -> list[str]:
    drawn = []
    for index, name in enumerate(names):
        left = 10 + index * (_WIDTH - 20) / max(1, len(names))
        colour = _COLOURS[index % len(_COLOURS)]
        drawn.append(f'<rect x="{left:.1f}" y="{_HEIGHT - 24}" width="12" height="12" fill="{colour}"/>')
        drawn.append(_text(left + 16, _HEIGHT - 14, name))
    return drawn


def _axes(x: _Axis, y: _Axis, x_label: str, y_label: str) -> list[str]:
    drawn = []
    for tick in x.ticks():
        place = x.place(tick)
        drawn.append(_line([(place, y.start), (place, y.stop)], "#e5e7eb", 1))
        drawn.append(_text(place - 8, y.start + 16, f"{tick:g}"))
    for tick in y.ticks():
        place = y.place(tick)
        drawn.append(_line([(x.start, place), (x.stop, place)], "#e5e7eb", 1))
        drawn.append(_text(20, place + 4, f"{tick:g}"))
    return [*drawn, _text(_WIDTH / 2 - 60, _HEIGHT - 12, x_label), _text(6, _TOP - 4, y_label)]


def _line(points: Sequence[tuple[float, float]], colour: str = "#111827", width: int = 2) -> str:
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>'


def _text(left: float, base: float, text: str) -> str:
    return f'<text x="{left:.1f}" y="{base:.1f}" font-size="12" font-family="sans-serif">{escape(text)}</text>'


def _svg(parts: Iterable[str]) -> str:
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}">\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )
