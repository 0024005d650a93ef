"""Host work around a forward under pytest-benchmark: packs of sequences and their shards, of the 14B model's shapes.

    pytest benchmarks/packing.py

Tensors have no memory, so that only what the host does is timed: between two forwards it keeps a GPU waiting.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.step_trace import CONFIG, NOISY, NUM_HISTORY, sequence_at, served_transformer
from helios_serve.model_executor.packing import pack, unpack
from helios_serve.parallel.shards import shard

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark")

PACKS = [(0,), (2,), (0, 1, 2), (2,) * 8]
"""Stages of the sequences in a pack."""


@pytest.mark.parametrize("stages", PACKS, ids=str)
def test_pack(benchmark: Any, stages: tuple[int, ...]) -> None:
    sequences = [sequence_at(stage) for stage in stages]
    with torch.inference_mode():
        benchmark(pack, sequences, CONFIG.patch_size)


@pytest.mark.parametrize("stages", PACKS, ids=str)
def test_unpack(benchmark: Any, stages: tuple[int, ...]) -> None:
    with torch.inference_mode():
        batch, text = pack([sequence_at(stage) for stage in stages], CONFIG.patch_size)
        flow = served_transformer()(batch, text)
        benchmark(unpack, flow, batch, CONFIG.patch_size)


@pytest.mark.parametrize("degree", [2, 8])
@pytest.mark.parametrize("num_sequences", [1, 8])
def test_shard(benchmark: Any, degree: int, num_sequences: int) -> None:
    uncached = shard.__wrapped__
    benchmark(uncached, ((NUM_HISTORY, NOISY[2]),) * num_sequences, degree)
