"""A scaling result as an SVG picture: frames per second against ranks, one line for each batch and precision.

Knows a result's numbers and SVG; measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BASE = 760, 420, 70, 20, 70, 360
_COLOURS = ("#2563eb", "#ea580c", "#15803d", "#9333ea", "#0f766e", "#be123c")


def scaling_plot(result: Mapping[str, Any]) -> str:
    """Of the forwards alone; of whole videos in a file that has nothing else. Dotted: the first point times its
    ranks."""
    has_steps = any(point["dit_fps"] is not None for point in result["points"])
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for point in result["points"]:
        rate = point["dit_fps" if has_steps else "video_fps"]
        if rate is not None:
            lines.setdefault(_label(point["cell"]), []).append({"cell": point["cell"], "fps": rate})
    points = [point for line in lines.values() for point in line]
    most_ranks = max(point["cell"]["ranks"] for point in points)
    highest = 1.05 * max(*(max(point["fps"]) for point in points), *(_ideal(line)[1][1] for line in lines.values()))
    params = result["params"]
    heading = f"{result['model']['name']} on {result['device']}, {params['size']}, steps {params['steps']}"
    parts = [
        _text(_LEFT - 40, 24, heading, weight="bold"),
        _text(
            _LEFT - 40,
            46,
            "DiT frames per second of all streams" if has_steps else "frames per second of whole videos, all streams",
        ),
        _text(_WIDTH / 2, _HEIGHT - 16, "ranks", anchor="middle"),
    ]
    frame = _Frame(most_ranks, highest)
    ranks = sorted({point["cell"]["ranks"] for point in points})
    parts += [_text(frame.x(rank), _BASE + 18, str(rank), anchor="middle") for rank in ranks]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = frame.y(share * highest)
        parts += [_line([(_LEFT, y), (_WIDTH - _RIGHT, y)], "#e2e8f0")]
        parts += [_text(_LEFT - 8, y + 4, f"{share * highest:.3g}", anchor="end")]
    for index, (label, line) in enumerate(lines.items()):
        parts += _drawn(frame, label, line, index)
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'font-family="system-ui, sans-serif" font-size="13">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


class _Frame:
    """Places of ranks and rates, in pixels; both axes begin at 0."""

    def __init__(self, most_ranks: int, highest: float) -> None:
        self._most_ranks = most_ranks
        self._highest = highest

    def x(self, ranks: float) -> float:
        return _LEFT + (_WIDTH - _RIGHT - _LEFT) * ranks / (self._most_ranks * 1.05)

    def y(self, fps: float) -> float:
        return _BASE - (_BASE - _TOP) * fps / self._highest


def _ideal(line: Sequence[Mapping[str, Any]]) -> tuple[tuple[int, float], tuple[int, float]]:
    """Ranks and rate of the line's first point, and what its last one would have if every rank gave as much."""
    ranks = [point["cell"]["ranks"] for point in line]
    start = min(line, key=lambda point: int(point["cell"]["ranks"]))["fps"][0]
    return (min(ranks), start), (max(ranks), start * max(ranks) / min(ranks))


def _label(cell: Mapping[str, Any]) -> str:
    return f"{cell['engine']}, batch {cell['batch']}, {cell['precision']}"


def _drawn(frame: _Frame, label: str, line: Sequence[Mapping[str, Any]], index: int) -> list[str]:
    colour = _COLOURS[index % len(_COLOURS)]
    ordered = sorted(line, key=lambda point: int(point["cell"]["ranks"]))
    best = {point["cell"]["ranks"]: point for point in sorted(line, key=lambda point: float(point["fps"][0]))}
    places = [(frame.x(ranks), frame.y(best[ranks]["fps"][0])) for ranks in sorted(best)]
    parts = [_line(places, colour, width=2)]
    parts.append(_line([(frame.x(ranks), frame.y(fps)) for ranks, fps in _ideal(line)], colour, dashes="2 4"))
    for point in ordered:
        middle, low, high = point["fps"]
        x = frame.x(point["cell"]["ranks"])
        told = f"{label}, {point['cell']['degrees']}: {middle:.3g} ({low:.3g} to {high:.3g})"
        parts.append(_line([(x, frame.y(low)), (x, frame.y(high))], colour))
        place = f'cx="{x:.1f}" cy="{frame.y(middle):.1f}" r="4"'
        parts.append(f'<circle {place} fill="{colour}"><title>{escape(told)}</title></circle>')
    top = _TOP + 16 + 18 * index
    return [
        *parts,
        _line([(_LEFT + 12, top - 4), (_LEFT + 36, top - 4)], colour, width=2),
        _text(_LEFT + 42, top, label),
    ]


def _line(points: Sequence[tuple[float, float]], colour: str, *, dashes: str = "", width: int = 1) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{dashed}/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" fill="#0f172a">'
        f"{escape(text)}</text>"
    )
