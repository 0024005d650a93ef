"""Speed-up against degree as an SVG picture, panels side by side. Knows how to draw; predicts nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT, _TOP, _BOTTOM, _GAP = 860, 430, 70, 90, 60
_COLOURS = ("#2563eb", "#dc2626", "#16a34a")
_GREY, _LIGHT, _DARK = "#9ca3af", "#e5e7eb", "#111827"


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """points: degree and speed-up. colour: a number; lines of one colour share the name in the legend."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    is_dashed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    title: str
    lines: Sequence[Line]


def draw(title: str, mark: str, panels: Sequence[Panel]) -> str:
    """All panels on one scale, from nothing to the largest degree; `mark` says what kind of numbers these are."""
    highest = max(degree for panel in panels for line in panel.lines for degree, _ in line.points)
    width = (_WIDTH - _GAP * (len(panels) + 1)) / len(panels)
    parts = [_text(20, 22, title, size=14), _text(20, 42, f"{mark}; links assumed", size=14, colour=_COLOURS[1])]
    for index, panel in enumerate(panels):
        frame = _Frame(left=_GAP + index * (width + _GAP), width=width, highest=highest)
        parts += _panel(panel, frame, is_first=index == 0)
    parts += _legend(panels[0].lines)
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}">\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    """Where a panel's numbers stand, in pixels; both axes end at `highest`."""

    left: float
    width: float
    highest: float

    def place(self, degree: float, speed_up: float) -> tuple[float, float]:
        height = _HEIGHT - _TOP - _BOTTOM
        return self.left + self.width * degree / self.highest, _TOP + height * (1 - speed_up / self.highest)


def _panel(panel: Panel, frame: _Frame, *, is_first: bool) -> list[str]:
    drawn = []
    ticks = sorted({degree for line in panel.lines for degree, _ in line.points})
    for tick in ticks:
        drawn.append(_path([frame.place(0, tick), frame.place(frame.highest, tick)], _LIGHT))
        drawn.append(_path([frame.place(tick, 0), frame.place(tick, frame.highest)], _LIGHT))
        x, y = frame.place(tick, 0)
        drawn.append(_text(x - 4, y + 18, f"{tick:g}"))
        x, y = frame.place(0, tick)
        drawn.append(_text(x - 28, y + 4, f"{tick:g}x"))
    drawn.append(_path([frame.place(0, 0), frame.place(frame.highest, frame.highest)], _GREY, dashes="2 4"))
    for line in panel.lines:
        dashes = "7 4" if line.is_dashed else None
        places = [frame.place(*point) for point in line.points]
        drawn.append(_path(places, _COLOURS[line.colour], dashes=dashes, width=2))
        drawn += [_dot(place, line, point) for place, point in zip(places, line.points, strict=True)]
    x, y = frame.place(0, frame.highest)
    drawn.append(_text(x, y - 8, panel.title if not is_first else f"{panel.title}: speed-up by number of GPUs"))
    return drawn


def _dot(place: tuple[float, float], line: Line, point: tuple[float, float]) -> str:
    title = f"{line.name}, {point[0]:g} GPUs: {point[1]:.2f}x"
    fill = "white" if line.is_dashed else _COLOURS[line.colour]
    return (
        f'<circle cx="{place[0]:.1f}" cy="{place[1]:.1f}" r="3.5" fill="{fill}" stroke="{_COLOURS[line.colour]}">'
        f"<title>{escape(title)}</title></circle>"
    )


def _legend(lines: Sequence[Line]) -> list[str]:
    base, left = _HEIGHT - 24, float(_GAP)
    entries: list[tuple[str, str, str | None]]
    entries = [(line.name, _COLOURS[line.colour], None) for line in lines if not line.is_dashed]
    entries += [("overlapped", _DARK, None), ("one by one", _DARK, "7 4"), ("ideal", _GREY, "2 4")]
    drawn = []
    for name, colour, dashes in entries:
        drawn.append(_path([(left, base - 4), (left + 26, base - 4)], colour, dashes=dashes, width=2))
        drawn.append(_text(left + 32, base, name))
        left += 122
    return drawn


def _path(points: Sequence[tuple[float, float]], colour: str, *, dashes: str | None = None, width: int = 1) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    pattern = "" if dashes is None else f' stroke-dasharray="{dashes}"'
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{pattern}/>'


def _text(left: float, base: float, text: str, *, size: int = 12, colour: str = _DARK) -> str:
    font = f'font-size="{size}" font-family="sans-serif" fill="{colour}"'
    return f'<text x="{left:.1f}" y="{base:.1f}" {font}>{escape(text)}</text>'
