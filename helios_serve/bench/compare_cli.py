"""`helios-serve bench compare`: results of `bench serve` side by side, one line for each load of each file.

Knows the result file; measures nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from helios_serve.errors import InvalidRequestError

_COLUMNS = (
    ("requests/s", "requests_per_s"),
    ("frames/s", "frames_per_s"),
    ("first p50", "time_to_first_segment_s.p50"),
    ("p99", "time_to_first_segment_s.p99"),
    ("end p50", "end_to_end_s.p50"),
    ("p99", "end_to_end_s.p99"),
    ("smooth", "smooth_share"),
    ("good", "good_share"),
)

_PIPED_WIDTH = 160


def bench_compare(
    results: Annotated[list[Path], typer.Argument(help="Files that `bench serve` wrote.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="As a table for a page.")] = False,
) -> None:
    """Put results of `bench serve` side by side: medians of the repeats and how far the farthest lies, in seconds."""
    from rich.console import Console

    from helios_serve.bench.tables import plain_table, wide_console

    rows = [row for path in results for row in _rows(path)]
    kept = [index for index in range(len(rows[0])) if index < 3 or any(row[index] for row in rows)]
    header = ["result", "load", "done", *(label for label, _ in _COLUMNS)]
    shown = [[row[index] for index in kept] for row in [header, *rows]]
    if markdown:
        lines = [f"| {' | '.join(row)} |" for row in shown]
        lines.insert(1, "| --- " * len(kept) + "|")
        Console(soft_wrap=True).print("\n".join(lines), highlight=False, markup=False)
        return
    table = plain_table("", shown[0][1:])
    for row in shown[1:]:
        table.add_row(*row)
    wide_console(_PIPED_WIDTH).print(table)


def _rows(path: Path) -> list[list[str]]:
    """Raises: InvalidRequestError for a file that is no result."""
    from helios_serve.bench.result_file import FORMAT

    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidRequestError(f"results {path}: {error}", param="results") from error
    if not isinstance(result, dict) or result.get("format") != FORMAT or "points" not in result:
        raise InvalidRequestError(f"results {path}: is no result of this version's `bench serve`", param="results")
    return [[path.stem, *_cells(point)] for point in result["points"]]


def _cells(point: Mapping[str, Any]) -> list[str]:
    from helios_serve.bench.tables import cell

    sent = sum(summary["num_sent"] for summary in point["summaries"])
    done = sum(summary["num_completed"] for summary in point["summaries"])
    spreads = point["spread"]
    numbers = [cell(spreads[name]) if name in spreads else "" for _, name in _COLUMNS]
    return [point["load"]["label"], f"{done}/{sent}", *numbers]
