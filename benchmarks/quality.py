"""What an approximation, another precision or a planted bug does to prompts being followed and to drift over 20
chunks, on the shipped small checkpoint: the table in docs/tiny-checkpoint.md.

    python -m benchmarks.quality docs/tiny-checkpoint.md

Every row is scored on the same held-back prompts and seeds (see `tools.tiny_checkpoint.evaluate`). Knows configurations
and scores; knows no pixels.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console

from helios_serve.config import EMBEDDED_MODEL, ModelConfig
from helios_serve.model_executor import rope
from helios_serve.model_executor.history import FIRST_CURRENT_FRAME, History
from helios_serve.model_executor.quantized_checkpoint import save_quantized
from helios_serve.model_executor.transformer import HeliosTransformer
from helios_serve.offline import Helios
from tools.tiny_checkpoint.evaluate import evaluate, shares

_BEGIN, _END = "<!-- quality table: begin -->", "<!-- quality table: end -->"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A way to run the checkpoint. settings: those of ModelConfig that differ from lossless float32.

    fp8_edge_blocks: all blocks but so many at either end are in FP8; the server's choice, three, would leave none.
    bug: planted in the transformer once it is loaded.
    """

    name: str
    steps: tuple[int, ...] = (1, 1, 1)
    fp8_edge_blocks: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    bug: Callable[[HeliosTransformer], None] | None = None


def forget_the_first_frame(transformer: HeliosTransformer) -> None:
    """The frame that stays in view for a whole video is left out."""
    embed = transformer.embed_history
    transformer.embed_history = lambda history: embed(replace(history, first=None))  # type: ignore[method-assign]


def swap_the_last_frames(transformer: HeliosTransformer) -> None:
    """The three newest frames of the history are in the wrong order."""
    embed = transformer.embed_history

    def swapped(history: History) -> History:
        older, newest = history.frames[:, :-3], history.frames[:, -3:]
        return replace(history, frames=torch.cat((older, newest.flip(1)), dim=1))

    transformer.embed_history = lambda history: embed(swapped(history))  # type: ignore[method-assign]


def move_the_chunk(transformer: HeliosTransformer) -> None:
    """The chunk is told that it stands one frame later in time than it does."""
    config = transformer.config

    def moved(grid: tuple[int, int, int]) -> torch.Tensor:
        return rope.rotary_rows(FIRST_CURRENT_FRAME + 1, grid, config.rope_dim, config.rope_theta)

    transformer.current_rotary = moved  # type: ignore[method-assign]


def mask_the_padding(transformer: HeliosTransformer) -> None:
    """Of the text only the prompt's own words are attended to, as other models do it."""
    project = transformer.project_text
    transformer.project_text = lambda embeds: project(embeds[embeds.any(-1)])  # type: ignore[method-assign]


ROWS = (
    Row(name="float32"),
    Row(name="bfloat16", settings={"dtype": "bfloat16"}),
    Row(name="`quantize: fp8`, two of four blocks", fp8_edge_blocks=1),
    Row(name="`attention_precision: fp8`", settings={"attention_precision": "fp8"}),
    Row(name="`history_reuse`", settings={"approximations": ("history_reuse",)}),
    Row(name="float32", steps=(2, 2, 2)),
    Row(name="`history_reuse`", steps=(2, 2, 2), settings={"approximations": ("history_reuse",)}),
    Row(name="bug: the first frame is forgotten", bug=forget_the_first_frame),
    Row(name="bug: the history's last frames are swapped", bug=swap_the_last_frames),
    Row(name="bug: rotary positions one frame late", bug=move_the_chunk),
    Row(name="bug: the text's padding is masked", bug=mask_the_padding),
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
        helios = Helios.configured(ModelConfig(model=str(model), **row.settings))
        if row.bug is not None:
            row.bug(helios.transformer)
        return helios
    with TemporaryDirectory() as folder:
        quantized = Path(folder) / model.name
        save_quantized(model, quantized, row.fp8_edge_blocks)
        return Helios.configured(ModelConfig(model=str(quantized), **row.settings))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Writes the table of what approximations and bugs do to quality.")
    parser.add_argument("page", type=Path, help="a page with the table's marks")
    parser.add_argument("--count", type=int, default=100, help="prompts a row")
    parser.add_argument("--long-count", type=int, default=3)
    told = parser.parse_args()
    table = render(told.count, told.long_count)
    text = told.page.read_text(encoding="utf-8")  # only now: the table takes minutes
    begin, end = text.index(_BEGIN), text.index(_END) + len(_END)
    told.page.write_text(text[:begin] + table + text[end:], encoding="utf-8")


if __name__ == "__main__":
    main()
