"""What a forward of the 14B model launches, reads and writes, counted on tensors without memory.

Knows operators and their arguments, and the shapes of a served chunk; knows no time.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.random_model import empty_transformer
from helios_serve.model_executor.history import HistoryTokens
from helios_serve.model_executor.model_config import TransformerConfig
from helios_serve.model_executor.packing import TextKV, TokenSequence, pack
from helios_serve.model_executor.transformer import HeliosTransformer, Shortcuts

CONFIG = TransformerConfig()
NUM_HISTORY, NUM_TEXT = 2400, 512
NOISY = (540, 2160, 8640)
"""Current tokens of 9 latent frames at 640x384, by stage."""

MATRIX_OPERATORS = ("linear", "mm", "addmm", "_addmm_activation", "bmm", "attend", "cross_attend")
VIEWS = ("view", "flatten", "unflatten", "unbind", "select", "slice", "split", "chunk", "unsqueeze", "t")
ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
IN_A_PRODUCT = "gelu"
"""A GPU applies it in the product before it."""

FUSED_PASSES: dict[str, tuple[str, float]] = {
    "layer_norm_modulate": ("x", 2),
    "rms_norm": ("x", 2),
    "norm_rope": ("x", 2),
    "qk_norm_rope_": ("qkv", 2 * 2 / 3),  # v stays as it is
    "gated_residual_norm": ("x", 4),
    "gated_residual_split_norm": ("x", 4),  # each row is written to one of the two results
    "residual_scatter_norm": ("y", 4),  # only the rows of y are touched
}
"""What a fused kernel reads and writes, in passes over one of its arguments. Tables are read from caches."""


class Trace(TorchDispatchMode):
    """Counts what is launched and the bytes that all but matrix products read and write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().partition("::")[2].partition(".")[0]
        if name in VIEWS or name in ALLOCATIONS:
            return result
        self.launches[name] += 1
        if name not in MATRIX_OPERATORS:
            self.bytes[name] += round(_traffic(func, args, result))
        return result

    @property
    def num_launches(self) -> int:
        """As a GPU has them."""
        return sum(count for name, count in self.launches.items() if name != IN_A_PRODUCT)

    @property
    def num_bytes(self) -> int:
        """As a GPU moves them beside its products."""
        return sum(count for name, count in self.bytes.items() if name != IN_A_PRODUCT)


def _traffic(func: Any, args: Any, result: Any) -> float:
    name = func.name().partition("::")[2].partition(".")[0]
    if name in FUSED_PASSES:
        argument, passes = FUSED_PASSES[name]
        names = [one.name for one in func._schema.arguments]
        return passes * float(args[names.index(argument)].nbytes)
    tensors = [value for value in (*tree_leaves(args), *tree_leaves(result)) if isinstance(value, Tensor)]
    return sum(value.nbytes for value in tensors)


@cache
def served_transformer() -> HeliosTransformer:
    """The 14B model as a GPU runs it, without memory."""
    made = empty_transformer(CONFIG, torch.bfloat16, Shortcuts(last_block_skips_history=True))
    return made.requires_grad_(False).eval()


def sequence_at(stage: int) -> TokenSequence:
    """A sequence of a chunk in the middle of a video; the values mean nothing."""
    heads, head_dim = CONFIG.num_attention_heads, CONFIG.attention_head_dim
    with torch.device("meta"):
        text = torch.empty(CONFIG.num_layers, NUM_TEXT, heads, head_dim, dtype=torch.bfloat16)
        return TokenSequence(
            history=HistoryTokens(
                tokens=torch.empty(NUM_HISTORY, CONFIG.dim, dtype=torch.bfloat16),
                rotary=torch.empty(NUM_HISTORY, 2, head_dim // 2),
            ),
            x=torch.empty(CONFIG.in_channels, 9, 12 << stage, 20 << stage, dtype=torch.bfloat16),
            rotary=torch.empty(NOISY[stage], 2, head_dim // 2),
            timestep=500.0,
            text=TextKV(keys=text, values=text),
        )


@torch.inference_mode()
def trace_forward(transformer: HeliosTransformer, stages: tuple[int, ...]) -> Trace:
    """Of one pack of sequences at those stages."""
    batch, text = pack([sequence_at(stage) for stage in stages], CONFIG.patch_size)
    trace = Trace()
    with trace:
        transformer(batch, text)
    return trace


@torch.inference_mode()
def count_flops(transformer: HeliosTransformer, stages: tuple[int, ...]) -> int:
    """Operations of the matrix products and the attention of one pack."""
    batch, text = pack([sequence_at(stage) for stage in stages], CONFIG.patch_size)
    with FlopCounterMode(display=False) as counter:
        transformer(batch, text)
    return int(counter.get_total_flops())
