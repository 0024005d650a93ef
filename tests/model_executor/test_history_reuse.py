"""Kept history: what it computes, what it saves, that it is off by default, and how far it takes a video."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.approximations import CASES, distance, render
from helios_serve.config import ModelConfig
from helios_serve.faults import Fault, FaultPlan
from helios_serve.model_executor import layers
from helios_serve.model_executor.history import HistoryTokens
from helios_serve.model_executor.history_reuse import HistoryKV
from helios_serve.model_executor.model import HeliosModel, load_model
from helios_serve.model_executor.model_config import TransformerConfig
from helios_serve.model_executor.packing import TextKV, TokenSequence, pack
from helios_serve.model_executor.transformer import HeliosTransformer, Shortcuts
from helios_serve.parallel.context_parallel import attend_sharded
from helios_serve.types import VideoRequest
from tests.model_executor.small_transformer import (
    SMALL,
    assert_equal,
    flows_of,
    later,
    sequence,
    small_transformer,
)
from tests.model_executor.test_runner import PARKED, Bench, alone, assert_same, request

META = torch.device("meta")


def reusing(video: VideoRequest) -> VideoRequest:
    return replace(video, params=replace(video.params, approximations=("history_reuse",)))


@pytest.fixture(scope="module")
def models(tiny_base: Path, tiny_mid: Path, tiny_distilled: Path) -> dict[str, HeliosModel]:
    paths = {"base": tiny_base, "mid": tiny_mid, "distilled": tiny_distilled}
    return {name: load_model(ModelConfig(model=str(path))) for name, path in paths.items()}


@pytest.fixture(scope="module", params=[False, True], ids=["full", "skip"])
def small(request: pytest.FixtureRequest) -> HeliosTransformer:
    return small_transformer(last_block_skips_history=request.param)


def keeping(given: TokenSequence) -> TokenSequence:
    return replace(given, history_kv=HistoryKV(SMALL.num_layers))


# What it computes


def test_the_first_forward_is_the_one_without_it(small: HeliosTransformer) -> None:
    given = sequence(small, 3, (21, 3, 4, 6), 900.0)
    assert torch.equal(flows_of(small, keeping(given))[0], flows_of(small, given)[0])


def test_at_the_same_step_nothing_changes(small: HeliosTransformer) -> None:
    """Then what is kept is what would be computed."""
    given = keeping(sequence(small, 3, (21, 3, 4, 6), 900.0))
    (first,) = flows_of(small, given)
    assert given.history_kv is not None
    given.history_kv.seal()
    assert given.num_history == 0
    (again,) = flows_of(small, given)
    assert_equal(again, first)


def test_later_forwards_are_whole_ones_whose_history_was_exchanged(
    small: HeliosTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a forward with all tokens, in which each layer has the first one's history keys and values."""
    first = sequence(small, 3, (21, 3, 4, 6), 900.0)
    second = later(first, 4)
    seen: list[tuple[Tensor, Tensor]] = []

    def note(q: Tensor, k: Tensor, v: Tensor, segments: Any) -> Tensor:
        seen.append((k[:21].clone(), v[:21].clone()))
        return attend_sharded(q, k, v, segments)

    def exchange(q: Tensor, k: Tensor, v: Tensor, segments: Any) -> Tensor:
        old_k, old_v = seen.pop(0)
        return attend_sharded(q, torch.cat((old_k, k[21:])), torch.cat((old_v, v[21:])), segments)

    with monkeypatch.context() as patch:
        patch.setattr(layers, "attend_sharded", note)
        flows_of(small, first)
    assert len(seen) == SMALL.num_layers
    with monkeypatch.context() as patch:
        patch.setattr(layers, "attend_sharded", exchange)
        (right,) = flows_of(small, second)
    kept = keeping(first)
    flows_of(small, kept)
    assert kept.history_kv is not None
    kept.history_kv.seal()
    (ours,) = flows_of(small, replace(second, history_kv=kept.history_kv))
    assert_equal(ours, right)
    (lossless,) = flows_of(small, second)
    assert (ours - lossless).abs().max() > 1e-4 * lossless.abs().max()  # an approximation


def test_a_pack_mixes_those_that_write_read_and_neither(small: HeliosTransformer) -> None:
    sizes = [(21, 3, 4, 6), (37, 3, 6, 10), (21, 1, 2, 4), (9, 3, 4, 6)]
    sequences = [sequence(small, 10 + index, size, 900.0 - 100 * index) for index, size in enumerate(sizes)]
    reads, writes, plain, reads_too = keeping(sequences[0]), keeping(sequences[1]), sequences[2], keeping(sequences[3])
    for each in (reads, reads_too):
        flows_of(small, each)
        assert each.history_kv is not None
        each.history_kv.seal()
    reads, reads_too = later(reads, 20), later(reads_too, 21)
    packed = flows_of(small, reads, writes, plain, reads_too)
    for ours, each in zip(packed, (reads, sequences[1], plain, reads_too), strict=True):
        assert_equal(ours, flows_of(small, each)[0])
    fresh = keeping(sequences[1])
    flows_of(small, fresh)
    assert writes.history_kv is not None
    assert fresh.history_kv is not None
    writes.history_kv.seal()
    fresh.history_kv.seal()
    for layer in range(SMALL.num_layers):
        for ours, right in zip(writes.history_kv.read(layer), fresh.history_kv.read(layer), strict=True):
            assert_equal(ours, right)


def test_a_forward_that_failed_half_way_leaves_nothing_behind(small: HeliosTransformer) -> None:
    first, second = sequence(small, 3, (21, 3, 4, 6), 900.0), sequence(small, 4, (21, 3, 4, 6), 500.0)
    kept = keeping(first)
    flows_of(small, replace(second, history_kv=kept.history_kv))  # what it wrote is not sealed
    flows_of(small, kept)
    assert kept.history_kv is not None
    kept.history_kv.seal()
    fresh = keeping(first)
    flows_of(small, fresh)
    assert fresh.history_kv is not None
    fresh.history_kv.seal()
    assert all(torch.equal(kept.history_kv.read(n)[0], fresh.history_kv.read(n)[0]) for n in range(SMALL.num_layers))


# What it saves


@pytest.fixture(scope="module")
def flops() -> tuple[list[int], list[int]]:
    """Of a forward of the 14B model at 640x384 at each stage: with the history, and with kept keys and values."""
    config, kept = TransformerConfig(), HistoryKV(TransformerConfig().num_layers)
    with META:
        transformer = HeliosTransformer(config, Shortcuts(last_block_skips_history=True)).to(torch.bfloat16)
    with torch.inference_mode():
        whole = [count_flops(transformer, full_size(config, stage)) for stage in range(3)]
        assert count_flops(transformer, replace(full_size(config, 0), history_kv=kept)) == whole[0]
        kept.seal()
        assert kept.num_bytes == 1_966_080_000
        later = [count_flops(transformer, replace(full_size(config, stage), history_kv=kept)) for stage in range(3)]
    return whole, later


def full_size(config: TransformerConfig, stage: int) -> TokenSequence:
    num_tokens, half = 540 << 2 * stage, config.attention_head_dim // 2
    empty = partial(torch.empty, dtype=torch.bfloat16, device=META)
    text = empty(config.num_layers, 512, config.num_attention_heads, 2 * half)
    return TokenSequence(
        history=HistoryTokens(tokens=empty(2400, config.dim), rotary=torch.empty(2400, 2, half, device=META)),
        x=empty(config.in_channels, 9, 12 << stage, 20 << stage),
        rotary=torch.empty(num_tokens, 2, half, device=META),
        timestep=500.0,
        text=TextKV(keys=text, values=text),
    )


def count_flops(transformer: HeliosTransformer, given: TokenSequence) -> int:
    batch, text = pack([given], transformer.patch)
    with FlopCounterMode(display=False) as counter:
        transformer(batch, text)
    return int(counter.get_total_flops())


@pytest.mark.parametrize(("steps", "saving"), [((1, 1, 1), 1.30), ((2, 2, 2), 1.39), ((20, 20, 20), 1.48)])
def test_work_of_a_chunk_is_that_of_the_performance_plan(
    flops: tuple[list[int], list[int]], steps: tuple[int, ...], saving: float
) -> None:
    whole, later = flops
    lossless = sum(count * each for count, each in zip(steps, whole, strict=True))
    reused = whole[0] - later[0] + sum(count * each for count, each in zip(steps, later, strict=True))
    assert lossless / reused == pytest.approx(saving, abs=0.01)


# Whole videos


def test_it_is_off_by_default(models: dict[str, HeliosModel]) -> None:
    assert ModelConfig(model="m").approximations == ()
    bench = Bench(models["distilled"])
    bench.begin(request("fox"))
    (state,) = bench.runner._chunks.values()
    assert [each.history_kv for each in state.sequences()] == [None]
    batch, _ = pack(state.sequences(), bench.runner.transformer.patch)
    k, v = torch.empty(2), torch.empty(2)
    assert batch.history_kv is None
    assert all(ours is right for ours, right in zip(batch.with_kept(k, v, 0), (k, v), strict=True))


@pytest.mark.parametrize("variant", list(PARKED))
def test_a_video_on_the_same_seed(models: dict[str, HeliosModel], variant: str) -> None:
    """The same again, and another one than without."""
    model, video = models[variant], PARKED[variant]
    lossless = alone(model, video)
    ours = alone(model, reusing(video))
    assert torch.equal(ours, alone(model, reusing(video)))
    assert 0 < distance(ours, lossless) < 1


def test_the_page_says_what_was_measured() -> None:
    """The rows that are made quickly."""
    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text()
    rows = [line for line in render(CASES[:2]).splitlines() if "`history_reuse`" in line]
    assert len(rows) == 2
    assert all(row in page for row in rows)


def test_one_step_for_each_chunk_loses_nothing(models: dict[str, HeliosModel]) -> None:
    video = request("fox", width=48, height=32, steps=(1,), guidance_scale=5.0, num_frames=99)
    assert torch.equal(alone(models["base"], reusing(video)), alone(models["base"], video))


def test_tokens_of_the_steps(models: dict[str, HeliosModel]) -> None:
    """Only the first forward of each chunk has the history; each sequence of guidance keeps its own."""
    bench = Bench(models["mid"])
    video = request("fox", steps=(3, 1, 1), num_frames=66, guidance_scale=5.0, use_zero_init=True, zero_steps=0)
    bench.begin(reusing(video))
    tokens = []
    while bench.runner.active:
        (state,) = bench.runner._chunks.values()
        tokens.append(state.num_tokens)
        bench.step()
    history, current = len(state._history.tokens), 9
    chunk = [0, 2 * (history + current), 2 * current, 2 * 4 * current, 2 * 16 * current]
    assert tokens == 2 * chunk


def test_packed_is_like_alone(models: dict[str, HeliosModel]) -> None:
    model, names = models["distilled"], ("fox", "owl", "elk")
    videos = [reusing(request(name, steps=(2, 2, 2), seed=seed, num_frames=66)) for seed, name in enumerate(names)]
    bench = Bench(model)
    bench.begin(videos[0])
    bench.step()
    bench.begin(videos[1])
    bench.step()
    bench.step()
    bench.begin(videos[2])
    made = bench.finish()
    for video in videos:
        assert_same(made[video.request_id], alone(model, video))


def test_running_out_of_memory_changes_nothing(models: dict[str, HeliosModel]) -> None:
    model, video = models["distilled"], reusing(request("fox", steps=(2, 2, 2)))
    passing = torch.OutOfMemoryError("for once")
    plan = FaultPlan(Fault(point="dit.step", action="raise", error=passing))
    bench = Bench(model, faults=plan)
    bench.begin(video)
    assert torch.equal(bench.finish()["fox"], alone(model, video))
    assert bench.failed == {}


def test_a_parked_chunk_begins_to_keep_anew(models: dict[str, HeliosModel]) -> None:
    """Gigabytes do not travel with it: its next forward has the whole history again, and the video is another one."""
    bench = Bench(models["distilled"])
    chunk = bench.encode(reusing(request("fox", steps=(2, 2, 2))))
    bench.runner.join(chunk)
    whole = bench.runner._chunks["fox"].num_tokens
    bench.step()
    assert bench.runner._chunks["fox"].num_tokens < whole
    parked = bench.runner.park("fox")
    bench.runner.join(chunk, parked)
    assert bench.runner._chunks["fox"].num_tokens == whole
    assert torch.isfinite(bench.finish()["fox"]).all()
