"""CUDA graphs: forwards of each stage by graphs against the same ones launched one by one, and chunks from end to end.

Knows the transformer and its graphs. Both are timed by the host's clock, as what graphs save is time of the host.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from benchmarks import chunks, random_model, yardsticks
from benchmarks.device_trace import trace
from benchmarks.host_graphs import HostRecorder, recording_on_host, with_places
from benchmarks.model import STAGES, Inputs, packed_inputs
from benchmarks.plan import Bench, Measurement, Section, single
from benchmarks.timing import Samples, is_lost
from helios_serve.model_executor.cuda_graph import CudaRecorder, ForwardGraphs
from helios_serve.model_executor.transformer import HeliosTransformer

_NUM_INPUTS = 3
_IN_A_ROW, _IN_A_ROW_OF_LAST = 4, 2
"""Forwards of one reading: what is launched while the device works costs nothing. Those of the last stage are long."""
_CHUNKS = 8


def measure_graphs(bench: Bench) -> list[Measurement]:
    """Each stage, with the same bits or not at all; then chunks."""
    with nullcontext() if bench.device.type == "cuda" else recording_on_host():
        measurements = [
            one for stage in STAGES for one in _by_itself(bench, f"stage{stage}", partial(_of_stage, bench, stage))
        ]
        if bench.remaining_s > 8 or not bench.sizes.is_full:
            measurements += _by_itself(bench, "chunks", partial(_chunks, bench))
        if not measurements:
            raise RuntimeError("; ".join(f"{name}: {why}" for name, why in bench.notes.items()))
        return measurements


def _by_itself(bench: Bench, name: str, measure: Callable[[], list[Measurement]]) -> list[Measurement]:
    """Nothing and a note, if it fails: what else was measured stays.

    Raises: what `measure` raised, if the device cannot be used any more.
    """
    try:
        return measure()
    except Exception as error:
        if is_lost(bench.device):
            raise
        bench.notes[name] = f"{type(error).__name__}: {error}"[:300]
        return []


def _of_stage(bench: Bench, stage: int) -> list[Measurement]:
    """Milliseconds of a forward in a row of several, launched and by a graph, and the share of it without a kernel.

    Raises: ArithmeticError, if a graph gives other bits; RuntimeError, if there is none.
    """
    transformer = random_model.transformer_of(bench)
    is_cuda = bench.device.type == "cuda"
    graphs = ForwardGraphs(transformer, CudaRecorder(bench.device) if is_cuda else HostRecorder())
    inputs = [_with_places(packed_inputs(bench, (stage,), number)) for number in range(_NUM_INPUTS)]
    with torch.inference_mode():
        record_ms = _record(bench, transformer, graphs, inputs)
        launched = _in_a_row(bench, transformer, inputs, stage)
        replayed = _in_a_row(bench, graphs, inputs, stage)
        details = {
            "launched_ms": launched[0].median,
            "speed_up": launched[0].median / replayed[0].median,
            "idle_share_launched": launched[1],
            "record_ms": record_ms,
            "held_gb": graphs.num_bytes * 1e-9,
        }
    name = f"dit/graphs/forward_ms/stage{stage}"
    return [
        Measurement(name=name, unit="ms", samples=replayed[0], details=details),
        single(f"dit/graphs/idle_share/stage{stage}", "share", replayed[1], limit=0.0),
    ]


def _with_places(inputs: Inputs) -> Inputs:
    batch, text = inputs
    return inputs if text.places is not None else (batch, with_places(text))


def _record(bench: Bench, transformer: HeliosTransformer, graphs: ForwardGraphs, inputs: list[Inputs]) -> float:
    """Milliseconds that it takes to record and run a forward; checks what graphs give for other inputs."""
    graphs(*inputs[0])
    bench.clock.synchronize()
    start = time.perf_counter()
    graphs(*inputs[0])
    bench.clock.synchronize()
    record_ms = (time.perf_counter() - start) * 1e3
    if len(graphs) == 0:
        raise RuntimeError("the device recorded no graph of a forward")
    num_unequal = sum(yardsticks.num_unequal(graphs(*each), transformer(*each)) for each in inputs)
    if num_unequal:
        raise ArithmeticError(f"{num_unequal} values of a graph differ from those of the same launches")
    return record_ms


def _in_a_row(bench: Bench, forward: Any, inputs: list[Inputs], stage: int) -> tuple[Samples, float]:
    """Milliseconds of one forward, and the share of the time in which no kernel runs."""
    count = _IN_A_ROW if stage < STAGES[-1] else _IN_A_ROW_OF_LAST

    def run(number: int) -> None:
        for place in range(count):
            forward(*inputs[(number + place) % len(inputs)])

    taken = bench.clock.wall(run, repetitions=max(2, bench.sizes.repetitions // (4 if stage < STAGES[-1] else 6)))
    samples = Samples(values=tuple(value / count for value in taken.values))
    seen = trace(bench.device, lambda: run(0))
    return samples, 1 - seen.busy_ms / taken.median if seen.kernels else 0.0


def _chunks(bench: Bench) -> list[Measurement]:
    """Of a runner whose transformer has graphs."""
    transformer = random_model.transformer_of(bench)
    transformer.has_graphs = True
    try:
        count = min(_CHUNKS, bench.sizes.chunks_111)
        return chunks.measure_fps(bench, "1-1-1/graphs", (1, 1, 1), count, {})
    finally:
        transformer.has_graphs = False


SECTIONS = (Section(name="graphs", value_rank=25, expected_s=45, run=measure_graphs),)
