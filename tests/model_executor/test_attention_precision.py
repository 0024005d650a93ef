"""Self-attention in FP8 as a setting: where it runs, what it does to a forward and a video, and that it is off."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helios_serve.config import ModelConfig
from helios_serve.kernels.attention import AttentionBackendError
from helios_serve.model_executor import model as models
from helios_serve.model_executor.graph_inputs import GraphKey
from helios_serve.model_executor.history_reuse import HistoryKV
from helios_serve.model_executor.model import load_model, load_transformer, open_checkpoint
from tests.model_executor.small_transformer import flows_of, later, sequence, small_transformer
from tests.model_executor.test_attention_setting import _Backends
from tests.model_executor.test_cuda_graph import packed
from tests.model_executor.test_runner import alone, request


@pytest.mark.parametrize("skips", [False, True])
def test_every_layer_runs_in_it(skips: bool) -> None:
    transformer = small_transformer(last_block_skips_history=skips)
    transformer.attention = "math_fp8"
    given = sequence(transformer, 3, (21, 3, 4, 6), 900.0)
    with _Backends() as found:
        flows_of(transformer, given)
    assert found.names.count("math_fp8") == transformer.config.num_layers


def test_a_forward_stays_near_the_plain_one() -> None:
    """In packs, with amplified history and with kept history too. Random weights make large logits."""
    transformer = small_transformer(last_block_skips_history=True)
    sizes = ((21, 3, 4, 6), (37, 3, 6, 10))
    sequences = [sequence(transformer, place, size, 900.0) for place, size in enumerate(sizes)]
    steps = []
    for attention in ("math", "math_fp8"):
        transformer.attention = attention
        kept = [replace(each, history_kv=HistoryKV(transformer.config.num_layers)) for each in sequences]
        first = flows_of(transformer, *kept)
        for each in kept:
            assert each.history_kv is not None
            each.history_kv.seal()
        steps.append([*first, *flows_of(transformer, *(later(each, 5) for each in kept))])
    for plain, rounded in zip(*steps, strict=True):
        assert 1e-4 < (rounded - plain).norm() / plain.norm() < 0.2


def test_it_has_graphs_of_its_own() -> None:
    transformer = small_transformer(last_block_skips_history=True)
    pack = packed([sequence(transformer, 3, (21, 3, 4, 6), 900.0)])
    plain = GraphKey.of(transformer, *pack)
    transformer.attention = "math_fp8"
    key = GraphKey.of(transformer, *pack)
    assert key != plain
    assert key.is_recordable
    assert str(key).endswith("attention math_fp8")


def test_a_video_is_another_one_but_near(tiny_distilled: Path) -> None:
    video = request("fox", steps=(1, 1, 1), num_frames=66)
    plain = alone(load_model(ModelConfig(model=str(tiny_distilled))), video)
    rounded = alone(load_model(ModelConfig(model=str(tiny_distilled), attention_precision="fp8")), video)
    assert 1e-4 < (rounded - plain).norm() / plain.norm() < 0.1


def test_load_names_what_runs_or_refuses(tiny_distilled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = open_checkpoint(ModelConfig(model=str(tiny_distilled)))
    assert plain.attention == "auto"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = ModelConfig(model=str(tiny_distilled), device="cuda", attention_precision="fp8")
    on_gpu = open_checkpoint(config)
    assert (on_gpu.attention, on_gpu.device.type) == ("fa3_fp8", "cuda")
    with pytest.raises(AttentionBackendError, match="attention 'fa3_fp8' needs a CUDA device") as caught:
        load_transformer(replace(plain, attention="fa3_fp8"))
    assert caught.value.param == "attention_precision"
    assert models.fp8_backend(plain.device) == "math_fp8"


@pytest.mark.parametrize("attention", ["cudnn", "flash", "triton", "flashinfer", "math"])
def test_other_libraries_do_not_have_it(attention: str) -> None:
    with pytest.raises(ValueError, match=f"attention_precision fp8: fa3 alone has it, not attention {attention}"):
        ModelConfig(model="m", attention=attention, attention_precision="fp8")  # type: ignore[arg-type]
