"""Self-attention at the model's shapes by every backend that this machine has, one request and a pack of two.

Knows backends by name and targets; knows no model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import mul

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.plan import Bench, Measurement, Section
from benchmarks.timing import num_bytes, num_sets, twice
from helios_serve import kernels
from helios_serve.kernels import cases_cross
from helios_serve.kernels.attention import AUTO, NAMES, AttentionBackendError, backend_for
from helios_serve.kernels.op_case import OpCase, Shape

_TARGETS = {2940: (520.0, 570.0), 4560: (560.0, 600.0), 11040: (590.0, 620.0)}
_LIMIT = 650.0
_DURATION_S = 0.25
_TOO_SLOW = ("cpu", "math")
_SLOW_TO_START = ("flashinfer", "xformers")
Attend = Callable[[Tensor, Tensor, Tensor], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Problem:
    """Fused projections [N, 3, H, Dh] that are used in turn, of equal requests."""

    num_requests: int
    tokens: int
    projections: list[Tensor]

    @property
    def size(self) -> str:
        return f"S{self.tokens}" if self.num_requests == 1 else f"{self.num_requests}xS{self.tokens}"

    @property
    def bounds(self) -> tuple[int, ...]:
        return tuple(self.tokens * index for index in range(self.num_requests + 1))

    @property
    def operations(self) -> int:
        _, _, heads, head_dim = self.projections[0].shape
        return 4 * self.num_requests * self.tokens**2 * heads * head_dim


def attention(bench: Bench) -> list[Measurement]:
    """One backend after the other, each at all sizes; those that may have to be compiled first come last."""
    problems = [
        _problem(bench, tokens, num_requests)
        for tokens in (_TARGETS if bench.sizes.is_full else (32,))
        for num_requests in (1, 2)
    ]
    made: list[Measurement] = []
    for backend in sorted(NAMES, key=_SLOW_TO_START.__contains__):
        if not (backend in _TOO_SLOW and bench.sizes.is_full):
            for problem in problems:
                made += _by_backend(bench, backend, problem)
    for kind in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        for problem in problems:
            if bench.device.type == "cuda" and problem.num_requests == 1:
                name = f"micro/attention/sdpa_{kind.name.lower()}/{problem.size}"
                made += bench.attempt(name, partial(_one, bench, name, problem, partial(_dense, kind), "torch"))
    return made


def _problem(bench: Bench, tokens: int, num_requests: int) -> _Problem:
    config = bench.sizes.transformer
    shape = (num_requests * tokens, 3, config.num_attention_heads, config.attention_head_dim)
    first = torch.randn(shape, dtype=bench.sizes.dtype, device=bench.device)
    others = [torch.randn_like(first) for _ in range(num_sets(num_bytes(first), limit=4) - 1)]
    return _Problem(num_requests=num_requests, tokens=tokens, projections=[first, *others])


def _by_backend(bench: Bench, backend: str, problem: _Problem) -> list[Measurement]:
    """Nothing, and a note, where the backend says that it cannot."""
    q = problem.projections[0][:, 0]
    scale = kernels.attention_scale(q.shape[2])
    segments = kernels.Segments(cu_q=problem.bounds, cu_k=problem.bounds, scale=scale, backend=backend)
    try:
        runs = backend_for(q, segments)
    except AttentionBackendError as error:
        bench.notes[f"micro/attention/{backend}"] = str(error)
        return []
    name = f"micro/attention/{backend}/{problem.size}"
    return bench.attempt(name, partial(_one, bench, name, problem, partial(_attend, segments), runs))


def _one(bench: Bench, name: str, problem: _Problem, attend: Attend, runs: str) -> Measurement:
    """runs: the name of what `attend` really takes."""
    is_goal = name.split("/")[2] == AUTO and problem.num_requests == 1
    gate, goal = _TARGETS.get(problem.tokens, (None, None)) if is_goal else (None, None)
    duration_s = _DURATION_S / 2 if bench.sizes.is_full else 0.0

    def call(number: int) -> object:
        return attend(*problem.projections[number % len(problem.projections)].unbind(1))

    taken, spread = twice(lambda: bench.clock.measure_for(call, duration_s=duration_s, calls=4))
    return Measurement(
        name=name,
        unit="TFLOP/s",
        samples=taken.per_second(problem.operations / 1e12),
        gate=gate,
        goal=goal,
        limit=None if gate is None else _LIMIT,
        is_better_high=True,
        details={"ms": taken.median, "spread": spread, "backend": runs},
    )


def _attend(segments: kernels.Segments, q: Tensor, k: Tensor, v: Tensor) -> object:
    return kernels.attend(q, k, v, segments)


def _dense(kind: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(kind):
        query, key, value = (one.transpose(0, 1)[None] for one in (q, k, v))  # (1, H, N, Dh)
        return F.scaled_dot_product_attention(query, key, value)


def cross_attention(bench: Bench) -> list[Measurement]:
    """Of current rows to a short prompt and its pads, at the served shapes."""
    made: list[Measurement] = []
    for case in cases_cross.CASES:
        for shape in case.served if bench.sizes.is_full else case.odd[-1:]:
            name = f"micro/{case.name}/{'+'.join(map(str, cases_cross.segments_of(shape)[0]))}"
            made += bench.attempt(name, partial(_cross, bench, case, shape, name))
    return made


def _cross(bench: Bench, case: OpCase, shape: Shape, name: str) -> Measurement:
    queries, keys, _ = cases_cross.segments_of(shape)
    operations = 4 * shape[1] * shape[2] * sum(map(mul, queries, keys))
    with torch.device(bench.device):
        sets = [case.inputs(shape, bench.sizes.dtype) for _ in range(4)]

    def call(number: int) -> object:
        return case.operator(*sets[number % len(sets)])

    taken, spread = twice(lambda: bench.clock.measure(call, repetitions=bench.sizes.repetitions, calls=8))
    return Measurement(
        name=name,
        unit="TFLOP/s",
        samples=taken.per_second(operations / 1e12),
        is_better_high=True,
        details={"us": 1e3 * taken.median, "spread": spread},
    )


SECTIONS = (
    Section(name="micro/attention", value_rank=23, expected_s=25, run=attention),
    Section(name="micro/cross_attention", value_rank=19, expected_s=3, run=cross_attention),
)
