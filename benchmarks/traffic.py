"""The fewest bytes that an operator can move: every input read once, every output written once.

Knows the arguments of the operators in the case lists; measures nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from benchmarks.timing import num_bytes
from helios_serve.kernels.op_case import OpCase


def traffic(case: OpCase, arguments: Sequence[Any]) -> int:
    """Bytes of one call with these arguments, which come fresh from the case; makes the call."""
    special = _SPECIAL.get(case.name.removesuffix("_fp8"))
    if special is not None:
        return special(arguments)
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    in_place = [arguments[index] for index in case.written if not is_unwritten(arguments[index])]
    returned = case.operator(*arguments)
    results = () if returned is None else returned if isinstance(returned, tuple) else (returned,)
    return num_bytes(*tensors, *in_place, *results)


def is_unwritten(tensor: Tensor) -> bool:
    """Whether it holds NaN only, by the values of its first row."""
    if not tensor.dtype.is_floating_point:
        return False
    return bool(tensor[(0,) * (tensor.dim() - 1)].float().isnan().all())


def _rotation_in_place(arguments: Sequence[Any]) -> int:
    """q and k of [N, 3, H, Dh] are read and written, v is not touched."""
    qkv, *others = arguments
    return num_bytes(qkv) * 4 // 3 + num_bytes(*(one for one in others if isinstance(one, Tensor)))


def _split(arguments: Sequence[Any]) -> int:
    """x [N, D] is read and written, y read; each token's norm goes to one of the two results."""
    x, y, _, row, place = arguments[:5]
    results = [one for one in arguments[10:] if isinstance(one, Tensor)]
    normed, *scales = (one for one in results if one.shape[0] == x.shape[0])
    return num_bytes(x, x, y, row, place, normed, *scales)


def _scatter(arguments: Sequence[Any]) -> int:
    """As many rows of x are read and written as y [M, D] has, and as many norms written."""
    x, y, index, *_ = arguments
    normed = arguments[7]
    per_row = 2 * x.element_size() + y.element_size() + normed.element_size()
    return int(y.numel() * per_row) + num_bytes(index)


_SPECIAL: dict[str, Callable[[Sequence[Any]], int]] = {
    "qk_norm_rope": _rotation_in_place,
    "gated_residual_split_norm": _split,
    "residual_scatter_norm": _scatter,
}
