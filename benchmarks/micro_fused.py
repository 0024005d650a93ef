"""Every fused operator of the case lists at the model's shapes, as a share of what a copy reaches.

Knows case lists and targets; knows no operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.plan import Bench, Measurement, Section
from benchmarks.timing import num_sets, twice
from benchmarks.traffic import traffic
from helios_serve.kernels import cases, cases_attention
from helios_serve.kernels.op_case import OpCase, Shape

_NORMS = ("layer_norm_modulate", "gated_residual_norm", "gated_residual_split_norm", "residual_scatter_norm")
_ROTATIONS = ("qk_norm_rope",)
_VAE = ("norm_rows", "norm_windows", "add_bias", "place_with_bias")
_PRODUCTS = ("linear_gelu",)


def all_cases() -> tuple[OpCase, ...]:
    """Those that move memory; products and attention are timed by their operations elsewhere."""
    return tuple(case for case in (*cases.CASES, cases_attention.MERGE) if case.name not in _PRODUCTS)


def fused(bench: Bench) -> list[Measurement]:
    """One case after the other at each served shape."""
    made: list[Measurement] = []
    for case in all_cases():
        for shape in case.served if bench.sizes.is_full else case.odd[-1:]:
            name = f"micro/fused/{case.name}/{'x'.join(map(str, shape))}"
            made += bench.attempt(name, partial(one, bench, case, shape, name))
    return made


def one(bench: Bench, case: OpCase, shape: Shape, name: str) -> Measurement:
    """A reading is a mean over several calls; inputs rotate over more than the caches."""
    first = arguments_of(case, shape, bench)
    moved = traffic(case, first)
    sets = [first, *(arguments_of(case, shape, bench) for _ in range(num_sets(moved, limit=16) - 1))]
    taken, spread = twice(
        lambda: bench.clock.measure(
            lambda number: case.operator(*sets[number % len(sets)]),
            repetitions=bench.sizes.repetitions,
            calls=2 * len(sets),
        )
    )
    copy = bench.cache.get("copy_gb_per_s")
    rate = taken.per_second(moved / 1e9)
    details = {"us": 1e3 * taken.median, "gb_per_s": rate.median, "bytes": moved, "spread": spread}
    if copy is None:
        return Measurement(name=name, unit="GB/s", samples=rate, is_better_high=True, details=details)
    gate, goal = targets(case.name, shape)
    share = taken.per_second(100 * moved / 1e9 / copy)
    return Measurement(
        name=name,
        unit="% of copy",
        samples=share,
        gate=gate,
        goal=goal,
        limit=None if gate is None else 100,
        is_better_high=True,
        details=details,
    )


def arguments_of(case: OpCase, shape: Shape, bench: Bench) -> Sequence[Any]:
    """Fresh ones on the device."""
    with torch.device(bench.device):
        return case.inputs(shape, bench.sizes.dtype)


def targets(name: str, shape: Shape) -> tuple[float | None, float | None]:
    """Gate and goal in percent."""
    plain = name.removesuffix("_fp8")
    if plain in _NORMS:
        return (65, 75) if sum(shape[:2]) < 4560 else (75, 85)
    if plain in _ROTATIONS:
        return 70, 80
    return (75, 85) if plain in _VAE else (None, None)


SECTIONS = (Section(name="micro/fused", value_rank=14, expected_s=20, run=fused),)
