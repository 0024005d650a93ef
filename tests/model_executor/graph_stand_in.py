"""Forwards by graphs without a GPU, and how their memory is spoiled."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from benchmarks.host_graphs import HostRecorder, recording_on_host
from helios_serve.model_executor.cuda_graph import ForwardGraphs


@pytest.fixture
def host_recorders() -> Iterator[list[HostRecorder]]:
    """Those of the runners that a test makes."""
    with recording_on_host() as made:
        yield made


@torch.inference_mode()
def poison(graphs: ForwardGraphs) -> None:
    """Spoils all static memory: what is not copied before a replay, or is not copied out behind it, shows."""
    for graph in graphs._graphs.values():
        batch, text = graph.inputs.batch, graph.inputs.text
        kept = () if batch.history_kv is None else batch.history_kv.kept
        memories = [memory for each in kept if each is not None for memory in each._stored or ()]
        cached = [cache._computed for cache in batch.step_caches if cache is not None and cache._computed is not None]
        for tensor in (batch.history, batch.patches, batch.rotary, batch.timesteps, graph.recording.out):
            tensor.fill_(math.nan)
        for tensor in (*memories, *cached):
            tensor.fill_(math.nan)
        assert text.places is not None
        text.places.zero_()
