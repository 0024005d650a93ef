"""The setting that names a backend of attention: checked at load, and what the layers run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helios_serve.config import Attention, ModelConfig
from helios_serve.kernels.attention import NAMES, AttentionBackendError
from helios_serve.model_executor.history import HistoryTokens
from helios_serve.model_executor.model import load_transformer, open_checkpoint
from helios_serve.model_executor.packing import TokenSequence, pack
from helios_serve.model_executor.transformer import Shortcuts


class _Backends(TorchDispatchMode):
    """Collects what each self-attention is told to run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func) == "helios.attend.default":
            self.names.append(args[-1] if isinstance(args[-1], str) else "auto")
        return func(*args, **(kwargs or {}))


def test_setting_knows_every_backend() -> None:
    assert get_args(Attention) == NAMES


@torch.inference_mode()
def test_named_backend_computes_self_attention_in_every_layer(tiny_distilled: Path) -> None:
    checkpoint = open_checkpoint(ModelConfig(model=str(tiny_distilled), attention="math"))
    transformer = load_transformer(checkpoint)
    config, x = transformer.config, torch.randn(16, 1, 4, 4)
    for skips in (False, True):
        transformer.shortcuts = Shortcuts(last_block_skips_history=skips)
        sequence = TokenSequence(
            history=HistoryTokens(
                tokens=torch.randn(3, config.dim), rotary=torch.randn(3, 2, config.attention_head_dim // 2)
            ),
            x=x,
            rotary=transformer.current_rotary((1, 2, 2)),
            timestep=500.0,
            text=transformer.project_text(torch.randn(5, config.text_dim)),
        )
        with _Backends() as found:
            transformer(*pack([sequence], transformer.patch))
        assert found.names.count("math") == config.num_layers


def test_load_refuses_what_cannot_run(tiny_distilled: Path) -> None:
    checkpoint = open_checkpoint(ModelConfig(model=str(tiny_distilled), attention="fa3"))
    with pytest.raises(AttentionBackendError, match="attention 'fa3' needs a CUDA device"):
        load_transformer(checkpoint)
    assert load_transformer(replace(checkpoint, attention="auto")).attention == "auto"
