"""The text encoder on a GPU: the lean passes of UMT5 give what transformers gives there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from helios_serve.model_executor.umt5 import encode_tokens  # noqa: E402  # behind the check for transformers

SIZES: dict[str, Any] = {"d_model": 512, "d_ff": 1024, "d_kv": 64, "num_heads": 8, "num_layers": 4, "vocab_size": 64}


@pytest.mark.parametrize("num_tokens", [1, 7, 120, 512])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_states_equal_the_librarys(num_tokens: int, dtype: torch.dtype, most: float) -> None:
    torch.manual_seed(0)
    model = transformers.UMT5EncoderModel(transformers.UMT5Config(**SIZES, feed_forward_proj="gated-gelu"))
    model = model.eval().to("cuda", dtype)
    embeds = torch.randn(num_tokens, 512, device="cuda").to(dtype)
    mask = torch.ones(1, num_tokens, dtype=torch.int64, device="cuda")
    with torch.inference_mode():
        theirs = model(inputs_embeds=embeds[None], attention_mask=mask).last_hidden_state[0].float()
        ours = encode_tokens(model, embeds).float()
    assert float((ours - theirs).norm() / theirs.norm()) < most
