"""Figures that are counted, equal at each run: the work of the 14B model without memory, what ranks send to each other,
and the scheduler's days under a virtual clock.

Knows what is counted and under which name; the instruments are its neighbours'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import torch

from benchmarks.check_figures import Figure
from benchmarks.memory_table import WHOLE, decode_bytes, forward_bytes
from benchmarks.scheduler_sim import Metrics, Setup, score, setup, simulate
from benchmarks.step_trace import count_flops, sequence_at, served_transformer, trace_forward
from benchmarks.vae_trace import trace_decode
from helios_serve.model_executor.spread import predict
from helios_serve.model_executor.transformer import HeliosTransformer
from helios_serve.model_executor.vae import VaeOptions
from helios_serve.parallel.mesh import Degrees
from tests.parallel.counted import counted_mesh, sent_by

STAGES = (0, 1, 2)
DEGREES = (Degrees(ulysses=2), Degrees(ulysses=4), Degrees(ulysses=8), Degrees(ring=2), Degrees(ring=2, ulysses=8))
"""Groups whose exchanges are counted, at the last stage; in one node and, last, over two."""

_DAYS = {
    "busy": setup(4),
    "overload": setup(4, 1.5),
    "single_gpus": setup(1, steps=(1, 1, 1)),
}
"""Short versions of the scheduler benchmark's scenarios."""
_DAY_S = 900.0


def model_figures(stages: Sequence[int] = STAGES, transformer: HeliosTransformer | None = None) -> list[Figure]:
    """Of one forward at each stage: operations, launches, and the bytes that all but products move."""
    model = served_transformer() if transformer is None else transformer
    return list(chain.from_iterable(_forward_figures(model, stage) for stage in stages))


def _forward_figures(model: HeliosTransformer, stage: int) -> list[Figure]:
    trace = trace_forward(model, (stage,))
    return [
        Figure(name=f"model/stage{stage}/flops", value=count_flops(model, (stage,)), unit="FLOP"),
        Figure(name=f"model/stage{stage}/launches", value=trace.num_launches, unit="launches"),
        Figure(name=f"model/stage{stage}/elementwise", value=trace.num_bytes, unit="B"),
    ]


def vae_figures() -> list[Figure]:
    """Of the decode of one chunk as a GPU does it."""
    trace = trace_decode(VaeOptions.on(torch.device("cuda")))
    return [
        Figure(name="vae/decode/flops", value=trace.flops, unit="FLOP"),
        Figure(name="vae/decode/launches", value=trace.calls.total(), unit="launches"),
        Figure(name="vae/decode/traffic", value=trace.traffic_bytes.total(), unit="B"),
    ]


def memory_figures() -> list[Figure]:
    """Workspaces at their largest, beside weights."""
    return [
        Figure(name="memory/forward_stage2", value=forward_bytes((2,)), unit="B"),
        Figure(name="memory/forward_stage2_x4", value=forward_bytes((2,) * 4), unit="B"),
        Figure(name="memory/decode", value=decode_bytes(WHOLE), unit="B"),
    ]


def wire_figures(degrees: Sequence[Degrees] = DEGREES) -> list[Figure]:
    """What one rank sends in one forward of stage 2, and in how many calls."""
    return list(chain.from_iterable(_sent_figures(each) for each in degrees))


@torch.inference_mode()
def _sent_figures(degrees: Degrees) -> list[Figure]:
    mesh = counted_mesh(degrees)
    predict(served_transformer(), [sequence_at(2)], mesh)
    sent = [num_bytes for axis in (mesh.cfg, mesh.ring, mesh.ulysses, mesh.tokens) for num_bytes in sent_by(axis)]
    place = f"wire/ring{degrees.ring}_ulysses{degrees.ulysses}"
    return [
        Figure(name=f"{place}/bytes", value=sum(sent), unit="B"),
        Figure(name=f"{place}/exchanges", value=len(sent), unit="calls"),
    ]


def scheduler_figures() -> list[Figure]:
    """Shares of streams that were refused or came late, and times, of days of one seed."""
    return list(chain.from_iterable(_day_figures(name, cell) for name, cell in _DAYS.items()))


def _day_figures(name: str, cell: Setup) -> list[Figure]:
    found: Metrics = score(simulate(replace(cell, world=replace(cell.world, run_s=_DAY_S)), seed=0))
    return [
        Figure(name=f"scheduler/{name}/out_of_slo", value=100 - found["in_slo"], unit="%", slack=0.5),
        Figure(name=f"scheduler/{name}/refused", value=found["rejected"], unit="%", slack=1.0),
        Figure(name=f"scheduler/{name}/first_chunk_p99", value=found["ttfc_p99"], unit="s", margin=0.02),
        Figure(name=f"scheduler/{name}/offline_mean", value=found["offline_mean"], unit="s", margin=0.02),
        Figure(name=f"scheduler/{name}/s_per_chunk", value=1 / found["chunks_per_s"], unit="s", margin=0.01),
        Figure(name=f"scheduler/{name}/plans", value=found["plans"], unit="plans", margin=0.02),
    ]
