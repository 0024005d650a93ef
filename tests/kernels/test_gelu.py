"""GELU and the product that ends in it, against the formula in float64, and what a CUDA device would be asked to do."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from helios_serve import kernels

LIMITS = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.03}


def _gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(("rows", "inner", "outer"), [(1, 40, 24), (67, 24, 40), (541, 13, 7)])
def test_product_ends_in_gelu(rows: int, inner: int, outer: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(rows, inner).to(dtype), (torch.randn(outer, inner) / inner**0.5).to(dtype)
    bias = torch.randn(outer).to(dtype)
    expected = _gelu(x.double() @ weight.double().T + bias.double())
    actual = kernels.linear_gelu(x, weight, bias)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=LIMITS[dtype], atol=LIMITS[dtype])


def test_gelu_is_the_tanh_form() -> None:
    x = torch.linspace(-6, 6, 541, dtype=torch.float64)
    torch.testing.assert_close(kernels.gelu_tanh(x), _gelu(x), rtol=0, atol=1e-13)
    assert not torch.allclose(kernels.gelu_tanh(x), torch.nn.functional.gelu(x), rtol=0, atol=1e-5)


class _Trace(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((str(func.overloadpacket), kwargs))
        return func(*args, **(kwargs or {}))


def test_cuda_device_gets_one_product_with_the_activation() -> None:
    with FakeTensorMode(), _Trace() as trace:
        x, weight, bias = (torch.empty(shape, device="cuda") for shape in ((67, 40), (24, 40), (24,)))
        trace.calls.clear()
        result = kernels.linear_gelu(x, weight, bias)
    products = [call for call in trace.calls if call[0] not in ("aten.t", "prim.device")]
    assert products == [("aten._addmm_activation", {"use_gelu": True})]
    assert (result.shape, result.device.type) == ((67, 24), "cuda")
