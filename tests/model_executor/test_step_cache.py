"""Cached steps: when a forward is left out, what stands in its place, what it saves, and that it is off by default."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from benchmarks.approximations import distance
from helios_serve.config import ModelConfig
from helios_serve.faults import Fault, FaultPlan
from helios_serve.model_executor.cached_forward import predict_cached
from helios_serve.model_executor.history_reuse import HistoryKV
from helios_serve.model_executor.model import HeliosModel, load_model
from helios_serve.model_executor.packing import TokenSequence, patchify, split_flows
from helios_serve.model_executor.step_cache import StepCache
from helios_serve.model_executor.transformer import HeliosTransformer
from helios_serve.types import VideoRequest
from tests.model_executor.small_transformer import assert_equal, flows_of, later, sequence, small_transformer
from tests.model_executor.test_runner import Bench, alone, assert_same, request

SIGNALS = ((1.0, 2.0), (1.0, 2.3), (1.0, 2.6), (1.0, 2.6), (5.0, 2.6))
"""Changes of 0.1, 0.0909, 0 and 1.11."""


def run(cache: StepCache, signals: Sequence[tuple[float, ...]]) -> list[bool]:
    """Which steps are left out."""
    reused = []
    for index, values in enumerate(signals):
        cache.plan(float(cache.change_of(torch.tensor(values)[:, None])))
        reused.append(cache.is_reused)
        if not cache.is_reused:
            cache.write(torch.full((2, 1), float(index)))
        cache.commit()
    return reused


# When


@pytest.mark.parametrize(
    ("threshold", "reused"),
    [
        (0.0, [False] * 5),
        (0.05, [False, False, False, True, False]),  # no change at all is below any threshold
        (0.15, [False, True, False, True, False]),  # 0.1, then 0.19 in all
        (0.2, [False, True, True, True, False]),
        (9.0, [False, True, True, True, True]),
    ],
)
def test_changes_are_summed_until_there_is_a_forward(threshold: float, reused: list[bool]) -> None:
    assert run(StepCache(threshold), SIGNALS) == reused


def test_the_residual_is_that_of_the_last_forward() -> None:
    cache = StepCache(0.15)
    run(cache, SIGNALS[:2])
    assert cache.residual.tolist() == [[0.0], [0.0]]
    run(cache, SIGNALS[2:4])
    assert cache.residual.tolist() == [[0.0], [0.0]]


def test_a_first_step_is_never_left_out() -> None:
    assert run(StepCache(math.inf), SIGNALS[:1]) == [False]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_computed(value: float) -> None:
    assert run(StepCache(9.0), ((1.0, 2.0), (value, 2.0), (1.0, 2.0))) == [False, False, False]


def test_a_step_that_is_planned_again_counts_once() -> None:
    once, twice = StepCache(0.15), StepCache(0.15)
    run(once, SIGNALS[:1])
    run(twice, SIGNALS[:1])
    for values in (SIGNALS[1], SIGNALS[1]):
        twice.plan(float(twice.change_of(torch.tensor(values)[:, None])))
    twice.commit()
    run(once, SIGNALS[1:2])
    assert run(once, SIGNALS[2:]) == run(twice, SIGNALS[2:])


# What stands in its place


@pytest.fixture(scope="module", params=[False, True], ids=["full", "skip"])
def small(request: pytest.FixtureRequest) -> HeliosTransformer:
    return small_transformer(last_block_skips_history=request.param)


def cached(given: TokenSequence, threshold: float = 1e9) -> TokenSequence:
    return replace(given, step_cache=StepCache(threshold))


def commit(*sequences: TokenSequence) -> None:
    for each in sequences:
        if each.step_cache is not None:
            each.step_cache.commit()


class Forwards:
    """A transformer's forwards, counted by sequences."""

    def __init__(self, transformer: HeliosTransformer) -> None:
        self._transformer = transformer
        self.sizes: list[int] = []

    def __call__(self, sequences: Sequence[TokenSequence]) -> list[Tensor]:
        self.sizes.append(len(sequences))
        return flows_of(self._transformer, *sequences) if sequences else []


def test_at_the_same_input_the_flow_is_the_same(small: HeliosTransformer) -> None:
    given, forwards = cached(sequence(small, 3, (21, 3, 4, 6), 900.0)), Forwards(small)
    (first,) = predict_cached(small, [given], forwards)
    commit(given)
    (again,) = predict_cached(small, [given], forwards)
    assert forwards.sizes == [1, 0]
    assert_equal(again, first)


def test_the_ends_follow_the_step_at_hand(small: HeliosTransformer) -> None:
    """Written out: what goes into the blocks now, and what they added then, through the norm of the output."""
    first, forwards = cached(sequence(small, 3, (21, 3, 4, 6), 900.0)), Forwards(small)
    second = later(first, 4)
    predict_cached(small, [first], forwards)
    commit(first)
    (flow,) = predict_cached(small, [second], forwards)
    assert forwards.sizes == [1, 0]

    assert first.step_cache is not None
    x = small.embed_current(patchify(second.x, small.patch)) + first.step_cache.residual
    shift, scale = small.norm_out(small.condition_embedder.embed_time(torch.tensor([second.timestep])).hidden)
    normed = layer_norm(x, x.shape[-1:], eps=small.config.eps) * (1 + scale) + shift
    (right,) = split_flows(small.proj_out(normed), [(3, 2, 3)], small.patch)
    assert (flow - right).abs().max() <= 1e-6 * right.abs().max()  # embeddings of time are in float32


def test_a_pack_holds_those_who_are_not_left_out(small: HeliosTransformer) -> None:
    sizes = [(21, 3, 4, 6), (37, 3, 6, 10), (21, 1, 2, 4)]
    drawn = [sequence(small, 10 + index, size, 900.0) for index, size in enumerate(sizes)]
    idle, busy, plain = cached(drawn[0]), cached(drawn[1], threshold=0.0), drawn[2]
    forwards = Forwards(small)
    firsts = predict_cached(small, [idle, busy, plain], forwards)
    commit(idle, busy)
    busy, plain = later(busy, 20), later(plain, 21)
    flows = predict_cached(small, [idle, busy, plain], forwards)
    assert forwards.sizes == [3, 2]
    for ours, right in zip(flows, (firsts[0], *flows_of(small, uncached(busy), plain)), strict=True):
        assert_equal(ours, right)


def uncached(given: TokenSequence) -> TokenSequence:
    return replace(given, step_cache=None)


def test_kept_history_and_kept_steps_go_together(small: HeliosTransformer) -> None:
    history = HistoryKV(small.config.num_layers)
    given = replace(cached(sequence(small, 3, (21, 3, 4, 6), 900.0)), history_kv=history)
    forwards = Forwards(small)
    (first,) = predict_cached(small, [given], forwards)
    commit(given)
    history.seal()
    (again,) = predict_cached(small, [given], forwards)
    (whole,) = flows_of(small, given)
    for ours in (again, whole):
        assert_equal(ours, first)


# Whole videos


def caching(video: VideoRequest) -> VideoRequest:
    return replace(video, params=replace(video.params, approximations=("step_cache",)))


def at(model: HeliosModel, threshold: float) -> HeliosModel:
    return replace(model, step_cache_threshold=threshold)


@pytest.fixture(scope="module")
def models(tiny_base: Path, tiny_mid: Path) -> dict[str, HeliosModel]:
    paths = {"base": tiny_base, "mid": tiny_mid}
    return {name: load_model(ModelConfig(model=str(path))) for name, path in paths.items()}


VIDEOS = {
    "base": request("fox", width=48, height=32, steps=(12,), guidance_scale=5.0, num_frames=66),
    "mid": request("fox", steps=(6, 5, 4), guidance_scale=5.0, use_zero_init=True, num_frames=66),
}


@pytest.mark.parametrize("variant", list(VIDEOS))
def test_forwards_are_saved_and_the_video_moves_with_the_threshold(
    models: dict[str, HeliosModel], variant: str
) -> None:
    """At threshold 0 there is a forward for each step, and no bit changes."""
    video, model = VIDEOS[variant], models[variant]
    lossless = alone(model, video)
    num_forwards, distances = [], []
    for threshold in (0.0, 0.3, 1e9):
        bench = Bench(at(model, threshold))
        bench.begin(caching(video))
        (ours,) = bench.finish().values()
        assert set(bench.pack_sizes) == {2}  # guidance's two sequences go together
        num_forwards.append(len(bench.pack_sizes))
        distances.append(distance(ours, lossless))
    num_zeroed, num_stages = 2 if variant == "mid" else 0, len(video.params.steps)
    all_steps, ends = 2 * (sum(video.params.steps) - num_zeroed), 2 * 2 * num_stages
    assert all_steps == num_forwards[0] > num_forwards[1] >= num_forwards[2] == ends
    assert distances[0] == 0.0 < distances[1] <= distances[2]


def test_packed_is_like_alone(models: dict[str, HeliosModel]) -> None:
    model = at(models["mid"], 0.3)
    videos = [caching(request(name, steps=(6, 5, 4), seed=seed)) for seed, name in enumerate(("fox", "owl", "elk"))]
    bench = Bench(model)
    for video in videos:
        bench.begin(video)
        bench.step()
    made = bench.finish()
    assert sum(bench.pack_sizes) < 3 * 15
    for video in videos:
        assert_same(made[video.request_id], alone(model, video))


def test_running_out_of_memory_changes_nothing(models: dict[str, HeliosModel]) -> None:
    model, passing = at(models["mid"], 0.3), torch.OutOfMemoryError("for once")
    bench = Bench(model, faults=FaultPlan(Fault(point="dit.step", action="raise", error=passing, skip=3)))
    video = caching(VIDEOS["mid"])
    bench.begin(video)
    assert torch.equal(bench.finish()["fox"], alone(model, video))


def test_it_is_off_by_default(models: dict[str, HeliosModel]) -> None:
    bench = Bench(models["mid"])
    bench.begin(request("fox", steps=(2, 1, 1)))
    (state,) = bench.runner._chunks.values()
    assert [each.step_cache for each in state.sequences()] == [None]
