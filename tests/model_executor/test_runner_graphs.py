"""Whole videos by graphs, on the stand-in for a device that records: bit for bit those without, alone and in packs,
with every approximation; and graphs that make room when memory is short."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.host_graphs import HostRecorder
from helios_serve.config import ModelConfig
from helios_serve.model_executor import cuda_graph
from helios_serve.model_executor.model import HeliosModel, load_model, load_transformer, open_checkpoint
from helios_serve.model_executor.packing import PackedBatch, PackedText
from helios_serve.types import VideoRequest
from tests.model_executor.graph_stand_in import host_recorders, poison  # noqa: F401
from tests.model_executor.test_runner import Bench, alone, assert_same, request


@pytest.fixture(scope="module")
def models(tiny_base: Path, tiny_mid: Path, tiny_distilled: Path) -> dict[str, HeliosModel]:
    paths = {"base": tiny_base, "mid": tiny_mid, "distilled": tiny_distilled}
    return {name: load_model(ModelConfig(model=str(path))) for name, path in paths.items()}


@pytest.fixture
def recorders(models: dict[str, HeliosModel], host_recorders: list[HostRecorder]) -> Iterator[list[HostRecorder]]:  # noqa: F811
    """Those of the runners that a test makes, which run by graphs."""
    for model in models.values():
        model.transformer.has_graphs = True
    yield host_recorders
    for model in models.values():
        model.transformer.has_graphs = False


def without_graphs(model: HeliosModel, video: VideoRequest) -> Tensor:
    model.transformer.has_graphs = False
    try:
        return alone(model, video)
    finally:
        model.transformer.has_graphs = True


VIDEOS = {
    "distilled": ("distilled", request("fox", steps=(2, 2, 2), num_frames=99)),
    "image": ("distilled", request("owl", task="i2v", steps=(1, 2, 1), num_frames=66, amplify_first_chunk=True)),
    "mid": ("mid", request("elk", steps=(3, 2, 2), guidance_scale=4.0, use_zero_init=True, num_frames=66)),
    "base": ("base", request("cod", width=48, height=32, steps=(6,), guidance_scale=5.0)),
    "history_reuse": (
        "distilled",
        request("fox", steps=(2, 2, 2), num_frames=99, approximations=("history_reuse",)),
    ),
    "both": (
        "mid",
        request("ant", steps=(4, 3, 3), guidance_scale=3.0, approximations=("history_reuse", "step_cache")),
    ),
}


@pytest.mark.parametrize("name", VIDEOS)
def test_videos_have_the_same_bits(name: str, models: dict[str, HeliosModel], recorders: list[HostRecorder]) -> None:
    variant, video = VIDEOS[name]
    model = models[variant]
    bench = Bench(model)
    bench.begin(video)
    while bench.runner.active:
        bench.step()
        assert bench.runner._graphs is not None
        poison(bench.runner._graphs)
    (ours,) = bench.finish().values()
    assert torch.equal(ours, without_graphs(model, video))
    (recorder,) = recorders
    assert recorder.num_replays >= 2


def test_packs_equal_their_solo_runs(models: dict[str, HeliosModel], recorders: list[HostRecorder]) -> None:
    """Requests that come and go at different stages, so that packs are in all orders."""
    model = models["distilled"]
    videos = [
        request("fox", steps=(1, 2, 1), num_frames=99),
        request("owl", steps=(2, 1, 2), num_frames=99, seed=5),
        request("elk", steps=(2, 2, 1), num_frames=66, seed=6, guidance_scale=3.0),
    ]
    bench = Bench(model)
    for video in videos:
        bench.begin(video)
        bench.step()
    made = bench.finish()
    (recorder,) = recorders
    assert recorder.num_replays > 0
    for video in videos:
        assert_same(made[video.request_id], without_graphs(model, video))


def test_want_of_memory_ends_all_graphs(
    models: dict[str, HeliosModel], recorders: list[HostRecorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is done again without them, and the video is what it would have been."""
    model, video = models["distilled"], request("fox", steps=(3, 1, 1), num_frames=66)
    bench = Bench(model)
    bench.begin(video)
    for _ in range(3):
        bench.step()
    graphs = bench.runner._graphs
    assert graphs is not None
    assert len(graphs) == 1
    with monkeypatch.context() as patch:
        patch.setattr(cuda_graph.ForwardGraphs, "__call__", _out_of_memory_once(cuda_graph.ForwardGraphs.__call__))
        bench.step()
    assert len(graphs) == 0
    assert all(recording.is_released for recording in recorders[0].recordings)
    (ours,) = bench.finish().values()
    assert torch.equal(ours, without_graphs(model, video))


def _out_of_memory_once(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    calls: list[int] = []

    def fail_first(graphs: cuda_graph.ForwardGraphs, batch: PackedBatch, text: PackedText) -> Tensor:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("no memory")
        return forward(graphs, batch, text)

    return fail_first


def test_there_are_none_unless_asked_for(models: dict[str, HeliosModel], tiny_distilled: Path) -> None:
    assert Bench(models["distilled"]).runner._graphs is None
    checkpoint = open_checkpoint(ModelConfig(model=str(tiny_distilled)))
    assert not load_transformer(checkpoint).has_graphs
    assert load_transformer(replace(checkpoint, has_graphs=True)).has_graphs
