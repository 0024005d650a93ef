"""The fused operators under pytest-benchmark, for working on one of them.

    pytest benchmarks/kernels.py -k qk_norm_rope

On a CUDA device at the served shapes, elsewhere at small odd ones. The times by pytest-benchmark are the host's, with
the wait for the device; those by the device's events, and the share of a copy, are in the extra columns.
"""

from __future__ import annotations

import math
import time
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks import micro, micro_fused
from benchmarks.plan import FULL, TINY, Bench
from benchmarks.timing import clock_of
from helios_serve.kernels.op_case import OpCase, Shape

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark")

_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_SIZES = FULL if _DEVICE.type == "cuda" else TINY
_PAIRS = [
    (case, shape) for case in micro_fused.all_cases() for shape in (case.served if _SIZES.is_full else case.odd[-1:])
]


@pytest.fixture(scope="module")
def bench() -> Bench:
    """With the device's copy bandwidth measured."""
    made = Bench(device=_DEVICE, clock=clock_of(_DEVICE), sizes=_SIZES, deadline=time.monotonic() + math.inf)
    micro.copy_bandwidth(made)
    return made


@pytest.mark.parametrize(("case", "shape"), _PAIRS, ids=lambda one: one.name if isinstance(one, OpCase) else str(one))
def test_operator(benchmark: Any, bench: Bench, case: OpCase, shape: Shape) -> None:
    with torch.no_grad():
        measured = micro_fused.one(bench, case, shape, case.name)
        benchmark.extra_info.update(measured.details, **{measured.unit: measured.value})
        benchmark(partial(_finished, bench, case, micro_fused.arguments_of(case, shape, bench)))


def _finished(bench: Bench, case: OpCase, arguments: Any) -> None:
    case.operator(*arguments)
    bench.clock.synchronize()
