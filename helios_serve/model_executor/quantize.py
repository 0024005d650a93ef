"""FP8 for the linear layers of the transformer's blocks: e4m3 weights with a scale per output channel, activations with
a scale per row.

Knows linear layers and their scales; knows no architecture. An approximation, off by default. Source of the layout:
PyTorch's row-wise scaled matrix product.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from helios_serve import kernels
from helios_serve.kernels import FP8

NUM_EDGE_BLOCKS = 3
"""Blocks at either end of the transformer that stay as they are: they are the most sensitive ones."""


QuantizedRows = tuple[Tensor, Tensor]
"""Rows [N, D] in e4m3 and their scales [N, 1] float32, as the fused kernels of `helios_serve.kernels` leave them."""


class Fp8Linear(nn.Module):
    """A linear layer whose weight is stored and multiplied in e4m3. Its parameters have no values before they are
    loaded or `quantized` makes them.

    Args:
        in_features, out_features: multiples of 16.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=FP8), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.empty(out_features, 1, dtype=torch.float32), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False)

    @classmethod
    def quantized(cls, linear: nn.Linear) -> Fp8Linear:
        """The same layer with rounded weights."""
        with torch.device("meta"):
            made = cls(linear.in_features, linear.out_features)
        weight, scale = kernels.quantize_rows(linear.weight)
        made.weight = nn.Parameter(weight, requires_grad=False)
        made.weight_scale = nn.Parameter(scale, requires_grad=False)
        made.bias = linear.bias
        return made

    def forward(self, x: Tensor | QuantizedRows) -> Tensor:
        """[N, in] -> [N, out] bfloat16; rows in bfloat16 are quantised here."""
        rows, scale = kernels.quantize_rows(x) if isinstance(x, Tensor) else x
        return kernels.scaled_linear(rows, scale, self.weight, self.weight_scale, self.bias)


Linear = nn.Linear | Fp8Linear


def make_linear(in_features: int, out_features: int, *, is_fp8: bool) -> Linear:
    """An empty layer of either kind."""
    return Fp8Linear(in_features, out_features) if is_fp8 else nn.Linear(in_features, out_features)


def quantize_linears(module: nn.Module, names: tuple[str, ...]) -> None:
    """Replaces the linear layers of those names within `module`."""
    for name in names:
        owner_name, _, own_name = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        linear = owner.get_submodule(own_name)
        assert isinstance(linear, nn.Linear)
        owner.register_module(own_name, Fp8Linear.quantized(linear))
