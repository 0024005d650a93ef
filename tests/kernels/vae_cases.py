"""Runs a case of the VAE's operators by its kernel and by its definition, and compares the two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from helios_serve.kernels.cases_vae import CASES
from helios_serve.kernels.op_case import MARGIN, OpCase, Shape

# Allowed error: a share of the value itself, and a share of the largest value of its row.
LIMITS = {torch.float64: (0.0, 1e-13), torch.float32: (0.0, 1e-6), torch.bfloat16: (2.0**-7, 1e-6)}


def case_of(name: str) -> OpCase:
    (case,) = (case for case in CASES if case.name == name)
    return case


def runs_of(*names: str) -> list[tuple[str, Shape, torch.dtype]]:
    return [(name, shape, dtype) for name in names for shape in case_of(name).odd for dtype in LIMITS]


def arguments_of(case: OpCase, shape: Shape, dtype: torch.dtype) -> list[Any]:
    """The same ones in each call."""
    torch.manual_seed(sum(shape))
    return case.inputs(shape, dtype)


def outcome(case: OpCase, run: Callable[..., Any], arguments: list[Any]) -> Tensor:
    (result,) = case.outcome(run, arguments)
    return result


def assert_agrees(case: OpCase, actual: Tensor, expected: Tensor) -> None:
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    if case.is_exact:
        assert torch.equal(actual, expected), "other bits"
        return
    share, share_of_row = LIMITS[expected.dtype]
    wide, size = expected.double(), expected.double().abs()
    assert wide.isfinite().all()
    excess = (actual.double() - wide).abs() - share * size - share_of_row * size.amax(-1, keepdim=True)
    assert excess.max() <= 0, f"over the limit by {excess.max()}"


def assert_only_read(case: OpCase, arguments: list[Any], before: list[Any]) -> None:
    """Nothing around the tensors was written, and nothing in those that are read."""
    for index, (argument, old) in enumerate(zip(arguments, before, strict=True)):
        if not isinstance(argument, Tensor):
            continue
        if index not in case.written:
            assert torch.equal(argument, old)
        memory = argument.as_strided((argument.untyped_storage().nbytes() // argument.itemsize,), (1,), 0)
        if len(memory) == argument.numel() + 2 * MARGIN:
            assert memory[:MARGIN].isnan().all()
            assert memory[-MARGIN:].isnan().all()
