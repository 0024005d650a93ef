"""Whether anything costs more than it did: counts, sizes and CPU ratios against the committed baseline.

    python -m benchmarks.check                      all sections; status 1 when a figure rose or is gone
    python -m benchmarks.check --only model --only wire
    python -m benchmarks.check --update             write the figures found now as the baseline

Knows sections, the command line and the table; the figures are made by its neighbours.
"""

from __future__ import annotations

import argparse
import pkgutil
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.check_figures import (
    Figure,
    State,
    Verdict,
    compare,
    read_baseline,
    values_of,
    write_baseline,
)

BASELINE = Path(__file__).parent / "baseline.json"
_COLOURS: dict[State, str] = {
    "same": "dim",
    "within": "dim",
    "fell": "green",
    "rose": "bold red",
    "new": "yellow",
    "gone": "bold red",
    "not here": "dim",
}
_SCALES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


SECTIONS = {
    "model": "benchmarks.check_counts:model_figures",
    "vae": "benchmarks.check_counts:vae_figures",
    "memory": "benchmarks.check_counts:memory_figures",
    "wire": "benchmarks.check_counts:wire_figures",
    "scheduler": "benchmarks.check_counts:scheduler_figures",
    "import": "benchmarks.check_process:import_figures",
    "start": "benchmarks.check_process:start_figures",
    "overhead": "benchmarks.overhead:overhead_figures",
}
"""What makes the figures whose names begin so; imported when it is asked for, as a check of imports needs no torch."""


def environment() -> dict[str, str]:
    """What counts and ratios may depend on beside the source."""
    packages = ("torch", "fastapi", "sqlalchemy", "uvicorn", "pydantic")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def check(figures: Sequence[Figure], baseline: Mapping[str, object], sections: Sequence[str], console: Console) -> bool:
    """Prints the table; whether nothing rose and nothing is gone."""
    verdicts = compare(figures, values_of(baseline), sections)
    console.print(table_of(verdicts))
    bad = [verdict for verdict in verdicts if verdict.is_bad]
    for verdict in bad:
        console.print(f"{verdict.name}: {explain(verdict)}", style="red", highlight=False)
    better = sum(verdict.state in ("fell", "new") for verdict in verdicts)
    if better and not bad:
        console.print(f"{better} figures are new or fell: keep the gain with --update", highlight=False)
    return not bad


def explain(verdict: Verdict) -> str:
    """Why a verdict is what it is, in a few words."""
    figure = verdict.figure
    if figure is None:
        return "is in the baseline and was not found; if that is meant, --update"
    if verdict.before is None:
        return "is not in the baseline"
    allowed = verdict.before * (1 + figure.margin) + figure.slack
    return (
        f"{verdict.state} from {verdict.before:.10g} to {figure.value:.10g} {figure.unit}, "
        f"at most {allowed:.10g} is allowed; if that is meant, --update and say why in the commit"
    )


def table_of(verdicts: Sequence[Verdict]) -> Table:
    """One line for each figure."""
    table = Table(title="Costs against the baseline", title_justify="left")
    for title in ("figure", "baseline", "now", "change", "may rise by", "verdict"):
        table.add_column(title, justify="left" if title in ("figure", "verdict") else "right", no_wrap=True)
    for one in verdicts:
        figure, change = one.figure, one.change
        table.add_row(
            one.name,
            "" if one.before is None else _shown(one.before),
            "" if figure is None else f"{_shown(figure.value)} {figure.unit}",
            "" if change is None else "0" if change == 0 else f"{change:+.2%}",
            "" if figure is None else _room(figure),
            f"[{_COLOURS[one.state]}]{one.state}[/]",
        )
    return table


def _shown(value: float) -> str:
    scale, letter = next(((scale, letter) for scale, letter in _SCALES if abs(value) >= 10 * scale), (1.0, ""))
    return f"{value / scale:.6g}{letter}"


def _room(figure: Figure) -> str:
    parts = [f"{figure.margin:.0%}"] if figure.margin else []
    parts += [f"{figure.slack:g}"] if figure.slack else []
    return " + ".join(parts) or "0"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare what things cost with the committed baseline.")
    parser.add_argument("--only", action="append", choices=sorted(SECTIONS), help="repeatable; default: all sections")
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    parser.add_argument("--update", action="store_true", help="write what is found now as the baseline")
    options = parser.parse_args(arguments)
    sections = options.only or list(SECTIONS)
    console = Console(width=130)
    baseline = read_baseline(options.baseline)
    figures: list[Figure] = []
    for name in sections:
        began = time.monotonic()
        figures += pkgutil.resolve_name(SECTIONS[name])()
        console.print(f"{name}: {time.monotonic() - began:.0f} s", style="dim", highlight=False)
    is_well = check(figures, baseline, sections, console)
    if options.update:
        write_baseline(options.baseline, figures, environment(), sections)
        console.print(f"wrote {options.baseline}", highlight=False)
        return 0
    _note_differences(baseline["environment"], console)
    return 0 if is_well else 1


def _note_differences(before: Mapping[str, str], console: Console) -> None:
    """Other versions than the baseline's may explain a change."""
    now = environment()
    different = [f"{name} {before[name]} -> {now.get(name)}" for name in before if before[name] != now.get(name)]
    if different:
        console.print(f"other versions than the baseline's: {', '.join(different)}", style="yellow", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
