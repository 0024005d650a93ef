"""Figures that must not rise, the baseline that they are held against, and the verdict on each.

Knows names, numbers and margins; measures nothing.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

FORMAT = 1

State = Literal["same", "within", "fell", "rose", "new", "gone", "not here"]
"""rose and gone fail a check. fell and new ask for a new baseline, as the old one would let the gain be lost again. not
here: what it is measured with is not on this machine."""

_FAILS: tuple[State, ...] = ("rose", "gone")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One number of which less is better.

    margin: by which share of the baseline it may rise. slack: by how much it may rise beside that, in its unit, for
    numbers near 0. needs: a program without which it is not measured; empty for none.
    """

    name: str
    value: float
    unit: str
    margin: float = 0.0
    slack: float = 0.0
    needs: str = ""

    def __post_init__(self) -> None:
        assert math.isfinite(self.value), f"{self.name}: {self.value}"
        assert self.margin >= 0
        assert self.slack >= 0

    @property
    def section(self) -> str:
        """The part of the check that it belongs to: its name up to the first slash."""
        return self.name.partition("/")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a figure is beside the baseline's value of that name. figure: None where it was not found any more."""

    name: str
    figure: Figure | None
    before: float | None
    state: State

    @property
    def is_bad(self) -> bool:
        return self.state in _FAILS

    @property
    def change(self) -> float | None:
        """Relative; None where there is nothing to compare, or it was 0."""
        if self.figure is None or not self.before:
            return None
        return self.figure.value / self.before - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Before:
    """A value of the baseline, and the program that it needs; empty for none."""

    value: float
    needs: str = ""


def compare(figures: Sequence[Figure], before: Mapping[str, Before], sections: Sequence[str]) -> list[Verdict]:
    """A verdict on each figure, and on each value of `before` in `sections` that no figure has any more."""
    assert len({figure.name for figure in figures}) == len(figures)
    known = {name: one.value for name, one in before.items()}
    found = [
        Verdict(name=one.name, figure=one, before=known.get(one.name), state=_state(one, known.get(one.name)))
        for one in figures
    ]
    names = {figure.name for figure in figures}
    lost = [name for name in before if name not in names and name.partition("/")[0] in sections]
    return found + [
        Verdict(name=name, figure=None, before=known[name], state=_why_lost(before[name].needs)) for name in lost
    ]


def _why_lost(needs: str) -> State:
    return "not here" if needs and shutil.which(needs) is None else "gone"


def _state(figure: Figure, before: float | None) -> State:
    if before is None:
        return "new"
    room = figure.margin * abs(before) + figure.slack + 1e-9 * abs(before)
    if figure.value > before + room:
        return "rose"
    if figure.value < before - room:
        return "fell"
    return "same" if figure.value == before else "within"


def read_baseline(path: Path) -> dict[str, Any]:
    """The file's content; one without figures where there is no file.

    Raises: ValueError for a file of another format.
    """
    if not path.exists():
        return {"format": FORMAT, "environment": {}, "figures": {}}
    content: dict[str, Any] = json.loads(path.read_text())
    if content.get("format") != FORMAT:
        raise ValueError(f"{path}: is of format {content.get('format')}, not {FORMAT}; write it anew with --update")
    return content


def values_of(baseline: Mapping[str, Any]) -> dict[str, Before]:
    """What each figure was, by name."""
    return {name: Before(value=float(kept["value"]), needs=kept["needs"]) for name, kept in baseline["figures"].items()}


def write_baseline(
    path: Path, figures: Sequence[Figure], environment: Mapping[str, str], sections: Sequence[str]
) -> None:
    """Replaces the figures of these sections; those of others stay."""
    others = {
        name: kept for name, kept in read_baseline(path)["figures"].items() if name.partition("/")[0] not in sections
    }
    own = {
        one.name: {key: value for key, value in asdict(one).items() if key != "name"} | {"value": _rounded(one.value)}
        for one in figures
    }
    content = {"format": FORMAT, "environment": dict(environment), "figures": dict(sorted((others | own).items()))}
    path.write_text(json.dumps(content, indent=1) + "\n")


def _rounded(value: float) -> float:
    """Counts exactly, measurements to five digits."""
    return int(value) if value == int(value) else float(f"{value:.5g}")
