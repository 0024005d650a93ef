"""Self-attention in FP8: alone at the model's lengths, with its rounding and without, and in forwards of each stage.

Knows backends by name and the transformer; on a CPU its own stand-in runs, whose times mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from benchmarks import random_model
from benchmarks.model import STAGES, Inputs, few, forward_of, packed_inputs, quantised, require_fp8
from benchmarks.plan import Bench, Measurement, Section, UnavailableError, single
from benchmarks.timing import Samples, num_bytes, num_sets
from helios_serve import kernels
from helios_serve.kernels.attention import AUTO, AttentionBackendError, Segments, backend_for, fp8_backend
from helios_serve.kernels.attention.quantize_heads import quantize_heads
from helios_serve.model_executor.quantize import NUM_EDGE_BLOCKS
from helios_serve.model_executor.transformer import HeliosTransformer

_LENGTHS = (2940, 4560, 11040)
_SPEED_UP_LIMIT = 1.57
"""Of FP8 in blocks and attention over bf16."""


def measure_fp8_attention(bench: Bench) -> list[Measurement]:
    """Raises: UnavailableError, where no backend has it."""
    name = fp8_backend(bench.device)
    measurements = []
    for tokens in _LENGTHS if bench.sizes.is_full else (32,):
        measurements += _alone(bench, tokens, name)
    return [*measurements, *_forwards(bench, name)]


def _alone(bench: Bench, tokens: int, name: str) -> list[Measurement]:
    """Of one sequence, beside attention in the model's dtype and the rounding alone."""
    config = bench.sizes.transformer
    shape = (tokens, 3, config.num_attention_heads, config.attention_head_dim)
    dtype = torch.bfloat16 if bench.sizes.is_full else bench.sizes.dtype
    first = torch.randn(shape, dtype=dtype, device=bench.device)
    sets = [first, *(torch.randn_like(first) for _ in range(num_sets(num_bytes(first), limit=4) - 1))]
    bounds = (0, tokens)
    rounded, plain = (
        Segments(cu_q=bounds, cu_k=bounds, scale=shape[-1] ** -0.5, backend=backend) for backend in (name, AUTO)
    )
    try:
        backend_for(first[:, 0], rounded)
    except AttentionBackendError as error:
        raise UnavailableError(str(error)) from error
    attend = partial(_rotating, bench, sets)
    taken, plain_ms = attend(partial(_attend, rounded)), attend(partial(_attend, plain)).median
    operations = 4 * tokens**2 * shape[2] * shape[3]
    details = {
        "ms": taken.median,
        "plain_ms": plain_ms,
        "rounding_ms": attend(partial(_round, bounds)).median,
        "speed_up": plain_ms / taken.median,
        "error": _distance(_attend(rounded, first), _attend(plain, first)),
        "backend": name,
    }
    return [
        Measurement(
            name=f"micro/attention/{name}/S{tokens}",
            unit="TFLOP/s",
            samples=taken.per_second(operations / 1e12),
            is_better_high=True,
            details=details,
        )
    ]


def _rotating(bench: Bench, sets: Sequence[Tensor], run: Callable[[Tensor], object]) -> Samples:
    return bench.clock.measure(lambda number: run(sets[number % len(sets)]), repetitions=few(bench), calls=4)


def _attend(segments: Segments, projections: Tensor) -> Tensor:
    return kernels.attend(*projections.unbind(1), segments)[0]


def _round(bounds: tuple[int, ...], projections: Tensor) -> None:
    for one in projections.unbind(1):
        quantize_heads(one, bounds)


def _forwards(bench: Bench, name: str) -> list[Measurement]:
    """With FP8 in the attention alone, and in the blocks too; against the model's dtype, in the same run."""
    require_fp8(bench)
    transformer = random_model.transformer_of(bench)
    inputs = {stage: [packed_inputs(bench, (stage,), number) for number in range(2)] for stage in STAGES}
    plain_ms = _times(bench, inputs)
    with torch.inference_mode():
        wanted = transformer(*inputs[0][0])
    measurements = []
    with _attention(transformer, name):
        error = _error(transformer, inputs[0][0], wanted)
        for stage, ms in _times(bench, inputs).items():
            details = {"plain_ms": plain_ms[stage], "speed_up": plain_ms[stage] / ms, "relative_error": error}
            measurements.append(single(f"dit/forward_fp8_attention_ms/stage{stage}", "ms", ms, details=details))
        with quantised(transformer, NUM_EDGE_BLOCKS if bench.sizes.is_full else 1):
            both_ms = _times(bench, inputs)
            details = {"ms": both_ms, "relative_error": _error(transformer, inputs[0][0], wanted)}
    speed_up = sum(plain_ms.values()) / sum(both_ms.values())
    name = "dit/fp8_with_attention_speed_up/1-1-1"
    return [
        *measurements,
        single(name, "x", speed_up, limit=_SPEED_UP_LIMIT, is_better_high=True, details=details),
    ]


def _times(bench: Bench, inputs: dict[int, list[Inputs]]) -> dict[int, float]:
    """Milliseconds of a forward, by stage."""
    return {
        stage: bench.clock.measure(forward_of(bench, own), repetitions=few(bench)).median
        for stage, own in inputs.items()
    }


@contextmanager
def _attention(transformer: HeliosTransformer, name: str) -> Iterator[None]:
    with mock.patch.object(transformer, "attention", name):
        yield


@torch.inference_mode()
def _error(transformer: HeliosTransformer, inputs: Inputs, wanted: Tensor) -> float:
    return _distance(transformer(*inputs), wanted)


def _distance(actual: Tensor, wanted: Tensor) -> float:
    return float((actual - wanted).float().norm() / wanted.float().norm())


SECTIONS = (Section(name="fp8_attention", value_rank=26, expected_s=24, run=measure_fp8_attention),)
