"""`helios-serve quantize`: a checkpoint in, the same with its transformer in FP8 out.

Knows flags; the work is done in `model_executor.quantized_checkpoint`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def quantize(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint directory or hub id.")],
    out: Annotated[Path, typer.Argument(help="Directory to write; must not exist.")],
    edge_blocks: Annotated[
        int, typer.Option(help="Blocks at either end that stay bfloat16, as the most sensitive ones.", min=1)
    ] = 3,
) -> None:
    """Write a checkpoint again with its transformer in FP8: half the bytes. An approximation."""
    from helios_serve.model_executor.checkpoint import resolve_checkpoint
    from helios_serve.model_executor.quantized_checkpoint import save_quantized

    save_quantized(resolve_checkpoint(checkpoint), out, edge_blocks)
    print(f"wrote {checkpoint} with its transformer in FP8 to {out}")
