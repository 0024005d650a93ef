"""What an approximation, or another precision, does to prompts being followed and to drift over 20 chunks, on the
shipped small checkpoint: the table in docs/tiny-checkpoint.md.

    python -m benchmarks.quality docs/tiny-checkpoint.md

Every row is scored on the same held-back prompts and seeds (see `tools.tiny_checkpoint.evaluate`). Knows configurations
and scores; knows no pixels.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from helios_serve.config import EMBEDDED_MODEL, ModelConfig
from helios_serve.model_executor.quantized_checkpoint import save_quantized
from helios_serve.offline import Helios
from tools.tiny_checkpoint.evaluate import evaluate, shares

_BEGIN, _END = "<!-- quality table: begin -->", "<!-- quality table: end -->"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A way to run the checkpoint. settings: those of ModelConfig that differ from lossless float32.

    fp8_edge_blocks: all blocks but so many at either end are in FP8; the server's choice, three, would leave none.
    """

    name: str
    steps: tuple[int, ...] = (1, 1, 1)
    fp8_edge_blocks: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)


ROWS = (
    Row(name="float32"),
    Row(name="bfloat16", settings={"dtype": "bfloat16"}),
    Row(name="`quantize: fp8`, two of four blocks", fp8_edge_blocks=1),
    Row(name="`attention_precision: fp8`", settings={"attention_precision": "fp8"}),
    Row(name="`history_reuse`", settings={"approximations": ("history_reuse",)}),
    Row(name="float32", steps=(2, 2, 2)),
    Row(name="`history_reuse`", steps=(2, 2, 2), settings={"approximations": ("history_reuse",)}),
)


def render(count: int, long_count: int, rows: Sequence[Row] = ROWS, model: Path = EMBEDDED_MODEL) -> str:
    """The table, between its marks: shares of `count` prompts and of `long_count` videos of 20 chunks."""
    head = ("run as", "steps", "colour", "shape", "direction", "drift of colours", "of brightness")
    lines = [head, ("---", "---", *["---:"] * 5)]
    for row in rows:
        helios = _helios(row, model)
        text = shares(evaluate(helios, "text", count, row.steps))
        long = shares(evaluate(helios, "long", long_count, row.steps))
        followed = (f"{text[name]:.0%}" for name in ("colour", "shape", "direction"))
        drift = (f"{long[name]:.1%}" for name in ("colour_drift", "brightness_drift"))
        lines.append((row.name, str(list(row.steps)), *followed, *drift))
        Console(stderr=True).print(lines[-1])
    table = ["| " + " | ".join(line) + " |" for line in lines]
    said = f"{count} prompts of 66 frames a row, and {long_count} of 660 for the drift."
    return "\n".join((_BEGIN, "", said, "", *table, "", _END))


def _helios(row: Row, model: Path) -> Helios:
    if row.fp8_edge_blocks is None:
        return Helios.configured(ModelConfig(model=str(model), **row.settings))
    with TemporaryDirectory() as folder:
        quantized = Path(folder) / model.name
        save_quantized(model, quantized, row.fp8_edge_blocks)
        return Helios.configured(ModelConfig(model=str(quantized), **row.settings))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Writes the table of what approximations do to quality.")
    parser.add_argument("page", type=Path, help="a page with the table's marks")
    parser.add_argument("--count", type=int, default=100, help="prompts a row")
    parser.add_argument("--long-count", type=int, default=3)
    told = parser.parse_args()
    text = told.page.read_text(encoding="utf-8")
    begin, end = text.index(_BEGIN), text.index(_END) + len(_END)
    table = render(told.count, told.long_count)
    told.page.write_text(text[:begin] + table + text[end:], encoding="utf-8")


if __name__ == "__main__":
    main()
