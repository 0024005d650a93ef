"""The configuration of the 14B model in a directory, for servers and offline runs on random weights:

    python -m benchmarks.full_size DIRECTORY
    helios-serve serve --model DIRECTORY --weights random

Knows sizes; writes no weights. The tokenizer is that of the tiny checkpoint, whose ids are below any vocabulary's size.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from helios_serve.model_executor.model_config import MODEL_INDEX_FILE, TEXT_ENCODER_FILE, TRANSFORMER_FILE
from helios_serve.model_executor.recommendations import RECOMMENDATIONS_KEY
from helios_serve.model_executor.tiny_checkpoint import Variant, write_tiny_checkpoint

_VAE_FILE = "vae/config.json"
_SIZES: dict[str, dict[str, Any]] = {
    TRANSFORMER_FILE: {
        "num_attention_heads": 40,
        "attention_head_dim": 128,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": 13824,
        "num_layers": 40,
        "rope_dim": [44, 42, 42],
    },
    _VAE_FILE: {"base_dim": 96, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2},
    TEXT_ENCODER_FILE: {
        "d_model": 4096,
        "d_ff": 10240,
        "d_kv": 64,
        "num_heads": 64,
        "num_layers": 24,
        "vocab_size": 256384,
    },
}
"""What differs from the tiny checkpoint. Sources: the defaults of the reference's classes, UMT5-XXL."""


def write_full_size(out: Path, variant: Variant = "distilled") -> None:
    """Writes everything of a checkpoint but its weights."""
    write_tiny_checkpoint(variant, out)
    for weights in out.glob("*/*.safetensors"):
        weights.unlink()
    for name, sizes in _SIZES.items():
        path = out / name
        path.write_text(json.dumps(json.loads(path.read_text()) | sizes, indent=2))
    index = json.loads((out / MODEL_INDEX_FILE).read_text())
    del index[RECOMMENDATIONS_KEY]  # recommends the tiny checkpoint's sizes
    (out / MODEL_INDEX_FILE).write_text(json.dumps(index, indent=2))


if __name__ == "__main__":
    write_full_size(Path(sys.argv[1]))
