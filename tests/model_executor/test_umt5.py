"""The lean encoder makes what transformers' own makes, by a few operations a layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import UMT5Config, UMT5EncoderModel

from helios_serve.model_executor.umt5 import _buckets_by_offset, encode_tokens, is_supported

SIZES: dict[str, Any] = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": 3, "vocab_size": 64}
VIEWS = ("unsqueeze", "unflatten", "transpose", "slice", "flatten", "aten.select.", "aten.t.", "detach")


def make_model(**changes: Any) -> UMT5EncoderModel:
    torch.manual_seed(0)
    model = UMT5EncoderModel(UMT5Config(**SIZES | {"feed_forward_proj": "gated-gelu"} | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


def by_library(model: UMT5EncoderModel, embeds: Tensor) -> Tensor:
    mask = torch.ones(1, len(embeds), dtype=torch.int64)
    hidden: Tensor = model(inputs_embeds=embeds[None], attention_mask=mask).last_hidden_state[0]
    return hidden


@pytest.mark.parametrize("num_tokens", [1, 2, 15, 16, 17, 130, 512])
def test_states_equal_the_librarys(num_tokens: int) -> None:
    model = make_model()
    embeds = torch.randn(num_tokens, 32, generator=torch.Generator().manual_seed(num_tokens))
    kept = embeds.clone()
    with torch.inference_mode():
        torch.testing.assert_close(encode_tokens(model, embeds), by_library(model, embeds), atol=2e-6, rtol=2e-6)
    assert torch.equal(embeds, kept)


def test_in_bfloat16_it_is_as_near_to_float32_as_the_library() -> None:
    model = make_model()
    embeds = torch.randn(100, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        exact = by_library(model, embeds)
        model.bfloat16()
        errors = [
            float((run(model, embeds.bfloat16()).float() - exact).norm() / exact.norm())
            for run in (encode_tokens, by_library)
        ]
    assert errors[0] < 1.1 * errors[1]
    assert errors[0] > 0


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (64, 1000)])
def test_positions_go_into_the_librarys_buckets(num_buckets: int, max_distance: int) -> None:
    model = make_model(relative_attention_num_buckets=num_buckets, relative_attention_max_distance=max_distance)
    attention: Any = model.encoder.block[0].layer[0].SelfAttention
    theirs = attention._relative_position_bucket(torch.arange(-1500, 1501))
    assert torch.equal(_buckets_by_offset(num_buckets, max_distance, 1500), theirs)


def test_a_layer_takes_thirteen_operations() -> None:
    class Recorder(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.counts: Counter[str] = Counter()

        def __torch_dispatch__(
            self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if not any(view in str(func) for view in VIEWS):
                self.counts[str(func)] += 1
            return func(*args, **(kwargs or {}))

    totals = []
    for num_layers in (1, 2):
        model = make_model(num_layers=num_layers).bfloat16()
        with torch.inference_mode(), Recorder() as recorder:
            encode_tokens(model, torch.zeros(17, 32, dtype=torch.bfloat16))
        totals.append(recorder.counts)
    assert (totals[1] - totals[0]).total() == 13, totals[1] - totals[0]


def test_other_activations_are_left_to_the_library() -> None:
    assert is_supported(make_model().config)
    for name in ("relu", "gated-relu", "gelu"):
        assert not is_supported(UMT5Config(**SIZES, feed_forward_proj=name))
