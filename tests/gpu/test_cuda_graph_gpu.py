"""CUDA graphs of the transformer's forward on the GPU that is there: the bits of the launches that they stand for, for
other prompts than those that they were recorded with, and nothing that waits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.random_model import random_transformer
from helios_serve.model_executor.batch import ChunkInput, ChunkOutput, SamplingRules
from helios_serve.model_executor.conditioning import fresh_generator_state
from helios_serve.model_executor.cuda_graph import CudaRecorder, ForwardGraphs, GraphLimits
from helios_serve.model_executor.history import History, empty_history
from helios_serve.model_executor.history_reuse import HistoryKV
from helios_serve.model_executor.model_config import SchedulerConfig, TransformerConfig
from helios_serve.model_executor.packing import PackedBatch, PackedText, TokenSequence, pack
from helios_serve.model_executor.prompt_schedule import PromptEmbedding
from helios_serve.model_executor.runner import Runner
from helios_serve.model_executor.step_cache import StepCache
from helios_serve.model_executor.transformer import HeliosTransformer
from helios_serve.types import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing records graphs"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: kernels do not compile"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]
DEVICE = torch.device("cuda", 0)
CONFIG = TransformerConfig(
    num_attention_heads=8, attention_head_dim=128, text_dim=64, ffn_dim=2048, num_layers=3, is_amplify_history=True
)
SIZES = ((8, 8), (16, 16), (8, 16), (8, 8))
"""h, w of the latents of each sequence."""


@pytest.fixture(scope="module")
def transformer() -> Iterator[HeliosTransformer]:
    yield random_transformer(CONFIG, torch.bfloat16, DEVICE)
    torch.cuda.empty_cache()


def _sequences(transformer: HeliosTransformer, seed: int, num_sequences: int) -> list[TokenSequence]:
    """Of those sizes; histories, prompts and their lengths, latents and timesteps are the seed's."""
    torch.manual_seed(seed)
    sequences = []
    for place, (height, width) in enumerate(SIZES[:num_sequences]):
        history = History(frames=torch.randn(16, 19, height, width, device=DEVICE), first=None)
        embeds = torch.randn(5 + 31 * seed + place, CONFIG.text_dim, device=DEVICE)
        sequences.append(
            TokenSequence(
                history=transformer.embed_history(history),
                x=torch.randn(16, 9, height, width, device=DEVICE).bfloat16(),
                rotary=transformer.current_rotary((9, height // 2, width // 2)),
                timestep=900.0 - 100 * seed - place,
                text=transformer.project_text(embeds),
            )
        )
    return sequences


def _packed(sequences: list[TokenSequence]) -> tuple[PackedBatch, PackedText]:
    return pack(sequences, CONFIG.patch_size)


def _graphs(transformer: HeliosTransformer, **limits: Any) -> ForwardGraphs:
    return ForwardGraphs(transformer, CudaRecorder(DEVICE), GraphLimits(**limits))


@pytest.mark.parametrize("num_sequences", [1, 2, 4])
@torch.inference_mode()
def test_replays_equal_launches_for_other_prompts(transformer: HeliosTransformer, num_sequences: int) -> None:
    graphs = _graphs(transformer)
    results: list[tuple[Tensor, Tensor]] = []
    for seed in range(5):
        sequences = _sequences(transformer, seed, num_sequences)
        results.append((graphs(*_packed(sequences)), transformer(*_packed(sequences))))
    assert len(graphs) == 1
    assert all(torch.equal(ours, right) for ours, right in results)
    assert len({right.float().sum().item() for _, right in results}) == 5


@torch.inference_mode()
def test_graphs_share_memory_and_take_turns(transformer: HeliosTransformer) -> None:
    graphs = _graphs(transformer)
    packs = [_packed(_sequences(transformer, seed, 1 + seed % 3)) for seed in range(9)]
    results = []
    for pack_ in packs:
        graphs.begin_step()
        results.append((graphs(*pack_), transformer(*pack_)))
    assert len(graphs) == 3
    assert all(torch.equal(ours, right) for ours, right in results)
    assert 0 < graphs.num_bytes < 1 << 30


@torch.inference_mode()
def test_kept_history_and_step_caches(transformer: HeliosTransformer) -> None:
    graphs = _graphs(transformer)
    for seed in range(4):
        plain, keeps = _sequences(transformer, seed, 2)
        results: list[list[Tensor]] = []
        for forward in (graphs, transformer):
            kept, cache = HistoryKV(CONFIG.num_layers), StepCache(0.1)
            made = []
            for timestep in (700.0, 400.0):
                graphs.begin_step()
                sequences = [
                    replace(plain, step_cache=cache),
                    replace(keeps, history_kv=kept, timestep=timestep),
                ]
                made.append(forward(*_packed(sequences)))
                assert cache._computed is not None
                made.append(cache._computed)
                if not kept.is_sealed:
                    kept.seal()
            results.append([*made, *(rows for layer in range(CONFIG.num_layers) for rows in kept.read(layer))])
        assert all(map(torch.equal, *results))
    assert len(graphs) == 2


@torch.inference_mode()
def test_a_replay_is_not_waited_for(transformer: HeliosTransformer) -> None:
    graphs = _graphs(transformer)
    packs = [_packed(_sequences(transformer, seed, 2)) for seed in range(3)]
    graphs(*packs[0])
    graphs(*packs[1])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows = graphs(*packs[2])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(rows, transformer(*packs[2]))


@torch.inference_mode()
def test_memory_comes_back(transformer: HeliosTransformer) -> None:
    """After a release, and where graphs take more than they may."""
    pack_ = _packed(_sequences(transformer, 1, 4))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    graphs = _graphs(transformer)
    for _ in range(2):
        graphs(*pack_)
    held = torch.cuda.memory_reserved(DEVICE)
    graphs.release()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved(DEVICE) < held
    small = _graphs(transformer, num_bytes=1 << 16)
    for _ in range(3):
        small.begin_step()
        assert torch.equal(small(*pack_), transformer(*pack_))
    assert len(small) == 0


@torch.inference_mode()
def test_what_cannot_be_recorded_runs_as_usual(
    transformer: HeliosTransformer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Something that waits, in the middle of a forward; afterwards the device records other graphs."""
    pack_ = _packed(_sequences(transformer, 1, 1))
    expected = transformer(*pack_)
    graphs = _graphs(transformer)
    project = transformer.proj_out.forward

    def waits(rows: Tensor) -> Tensor:
        torch.cuda.synchronize()
        return project(rows)

    with monkeypatch.context() as patch:
        patch.setattr(transformer.proj_out, "forward", waits)
        for _ in range(3):
            graphs.begin_step()
            assert torch.equal(graphs(*pack_), expected)
    assert len(graphs) == 0
    assert caplog.text.count("no CUDA graph for") == 1
    others = _graphs(transformer)
    for _ in range(3):
        assert torch.equal(others(*pack_), expected)
    assert len(others) == 1


@torch.inference_mode()
def test_a_failed_recording_leaves_the_allocator_at_work() -> None:
    """Memory that another stream used comes back once that stream is done with it."""

    def waits() -> Tensor:
        torch.cuda.synchronize()
        return torch.zeros(1, device=DEVICE)

    with pytest.raises(RuntimeError):
        CudaRecorder(DEVICE).record(waits)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats(DEVICE)["active_bytes.all.current"]
    used = torch.zeros(1 << 24, device=DEVICE)
    used.record_stream(torch.cuda.Stream(DEVICE))
    del used
    torch.cuda.synchronize()
    small = torch.zeros(1, device=DEVICE)
    assert torch.cuda.memory_stats(DEVICE)["active_bytes.all.current"] <= before + (1 << 20)
    del small


def test_a_video_has_the_same_bits(transformer: HeliosTransformer) -> None:
    launched, by_graphs = _chunk(transformer), None
    transformer.has_graphs = True
    try:
        by_graphs = _chunk(transformer)
    finally:
        transformer.has_graphs = False
    assert torch.equal(by_graphs, launched)


def _chunk(transformer: HeliosTransformer) -> Tensor:
    """The latents of one chunk of two steps at each stage."""
    rules = SamplingRules(
        scheduler=SchedulerConfig(solver="dmd", use_dynamic_shifting=True, time_shift_type="linear"), guidance="cfg"
    )
    runner = Runner(transformer, rules)
    torch.manual_seed(3)
    runner.join(
        ChunkInput(
            task_id="t",
            request_id="r",
            chunk=0,
            params=SamplingParams(
                width=256, height=128, num_frames=33, fps=24, seed=1, steps=(3, 3, 3), guidance_scale=1.0
            ),
            prompt=PromptEmbedding(key="p", embeds=torch.randn(20, CONFIG.text_dim)),
            negative=None,
            history=empty_history(16, 16, 32, DEVICE),
            generator_state=fresh_generator_state(1),
        )
    )
    finished: tuple[ChunkOutput, ...] = ()
    while not finished:
        result = runner.step()
        assert not result.failed
        finished = result.finished
    return finished[0].latents
