"""What tests and benchmarks need to know of an operator, and how they draw tensors for it.

Knows no operator; measures and compares nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]
MARGIN = 64  # values of NaN before and behind each tensor: 16 bytes of alignment stay


@dataclass(frozen=True, slots=True, kw_only=True)
class OpCase:
    """One operator, its kernel and its definition, which are called with the same arguments.

    inputs: makes the arguments on the default device from a shape and a dtype; what is only written is NaN. written:
    indices of the arguments that are changed. is_exact: kernel and reference agree in every bit. odd: shapes for tests.
    few: a few rows as wide as the 14B model's, for tests on a GPU. served: shapes of a 640x384 chunk of that model.
    """

    name: str
    operator: Callable[..., Any]
    launch: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: Callable[[Shape, torch.dtype], list[Any]]
    written: tuple[int, ...] = ()
    is_exact: bool = False
    odd: tuple[Shape, ...]
    few: tuple[Shape, ...] = ()
    served: tuple[Shape, ...]

    def outcome(self, run: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Tensor, ...]:
        """What `run`, one of the three, returns for these arguments, then what it changed."""
        returned = run(*arguments)
        results = () if returned is None else returned if isinstance(returned, tuple) else (returned,)
        return (*results, *(arguments[index] for index in self.written))


def poisoned(values: Tensor) -> Tensor:
    """A copy that lies between NaN, or between the value 77 for integers."""
    poison = torch.nan if values.is_floating_point() else 77
    memory = torch.full((values.numel() + 2 * MARGIN,), poison, dtype=values.dtype, device=values.device)
    memory[MARGIN:-MARGIN] = values.flatten()
    return memory[MARGIN:-MARGIN].view(values.shape)


def draw(shape: Shape, dtype: torch.dtype) -> Tensor:
    """Normal values; quarters up to 2 in bfloat16: sums of three are exact, whether a machine rounds or cuts off."""
    if dtype == torch.bfloat16:
        return poisoned((torch.randint(-8, 9, shape) / 4).to(dtype))
    return poisoned(torch.randn(shape, dtype=dtype))


def unwritten(shape: Shape, dtype: torch.dtype) -> Tensor:
    """NaN only."""
    return poisoned(torch.full(shape, torch.nan).to(dtype))
