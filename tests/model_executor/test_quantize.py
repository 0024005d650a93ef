"""FP8 weights: close to what they were rounded from, the same when saved and loaded, and off unless asked for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from helios_serve import kernels
from helios_serve.config import ModelConfig
from helios_serve.errors import CheckpointError
from helios_serve.model_executor.history import History
from helios_serve.model_executor.model import load_transformer, open_checkpoint
from helios_serve.model_executor.packing import TokenSequence, pack
from helios_serve.model_executor.quantize import Fp8Linear
from helios_serve.model_executor.quantized_checkpoint import save_quantized
from helios_serve.model_executor.transformer import HeliosTransformer


def test_rows_keep_their_largest_entry() -> None:
    x = torch.randn(67, 48) * torch.logspace(-4, 4, 67)[:, None]
    x[5] = 0
    rows, scale = kernels.quantize_rows(x)
    assert rows.dtype == kernels.FP8
    back = rows.float() * scale
    torch.testing.assert_close(back.abs().amax(1), x.abs().amax(1), rtol=1e-6, atol=0)
    # three bits of mantissa: at most 1/16 of an entry, or of the smallest normal number where the scale is coarse
    assert ((back - x).abs() <= x.abs() / 16 + scale * 2**-10).all()
    assert torch.equal(back[5], torch.zeros(48))


@torch.inference_mode()
def test_a_linear_layer_is_near_what_it_was() -> None:
    linear = nn.Linear(256, 96).to(torch.bfloat16).requires_grad_(False)
    x = torch.randn(41, 256).to(torch.bfloat16)
    exact = nn.functional.linear(x.float(), linear.weight.float(), linear.bias.float())
    error = (Fp8Linear.quantized(linear)(x).float() - exact).norm() / exact.norm()
    assert 1e-3 < error < 0.05


@torch.inference_mode()
def test_rows_that_are_quantised_already_are_taken_as_they_are() -> None:
    linear = Fp8Linear.quantized(nn.Linear(256, 96).to(torch.bfloat16).requires_grad_(False))
    x = torch.randn(41, 256).to(torch.bfloat16)
    assert torch.equal(linear(kernels.quantize_rows(x)), linear(x))
    assert torch.equal(linear(kernels.gelu_quantize_rows(x)), linear(kernels.gelu_tanh(x)))


@torch.inference_mode()
def _flow(transformer: HeliosTransformer) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    channels, dtype = transformer.config.in_channels, transformer.dtype
    history = History(frames=torch.randn(channels, 19, 8, 8, generator=generator), first=None)
    sequence = TokenSequence(
        history=transformer.embed_history(history),
        x=torch.randn(channels, 9, 8, 8, generator=generator).to(dtype),
        rotary=transformer.current_rotary((9, 4, 4)),
        timestep=500.0,
        text=transformer.project_text(torch.randn(7, transformer.config.text_dim, generator=generator)),
    )
    return transformer(*pack([sequence], transformer.patch)).float()


class _Trace(TorchDispatchMode):
    """Counts the operators of `helios_serve.kernels`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        self.calls[name] += namespace == "helios"
        return func(*args, **(kwargs or {}))


def test_rows_are_quantised_in_the_pass_that_makes_them(tiny_distilled: Path) -> None:
    transformer = load_transformer(open_checkpoint(ModelConfig(model=str(tiny_distilled), dtype="bfloat16")))
    transformer.quantize(num_edge_blocks=1)
    with _Trace() as trace:
        _flow(transformer)
    fused = {name: count for name, count in trace.calls.items() if count and ("fp8" in name or "quantize" in name)}
    assert fused == {
        "gated_residual_norm_fp8": 1,
        "gated_residual_split_norm_fp8": 1,
        "residual_scatter_norm_fp8": 1,
        "gelu_quantize_rows": 1,
        "quantize_rows": 2,  # what the two attentions give
    }


def test_a_saved_checkpoint_is_what_was_quantised_at_load(tiny_distilled: Path, tmp_path: Path) -> None:
    bf16 = load_transformer(open_checkpoint(ModelConfig(model=str(tiny_distilled), dtype="bfloat16")))
    exact = _flow(bf16)
    with pytest.raises(AssertionError):
        bf16.quantize(num_edge_blocks=0)
    bf16.quantize(num_edge_blocks=1)
    rounded = _flow(bf16)
    assert 1e-3 < (rounded - exact).norm() / exact.norm() < 0.2

    save_quantized(tiny_distilled, tmp_path / "fp8", num_edge_blocks=1)
    for offload in ("none", "all"):
        config = ModelConfig(model=str(tmp_path / "fp8"), dtype="bfloat16", offload=offload)
        loaded = load_transformer(open_checkpoint(config))
        assert [loaded.config.is_fp8(index) for index in range(3)] == [False, True, False]
        assert torch.equal(_flow(loaded), rounded)
    files = [
        path / "transformer" / "diffusion_pytorch_model.safetensors" for path in (tiny_distilled, tmp_path / "fp8")
    ]
    assert files[1].stat().st_size < 0.5 * files[0].stat().st_size  # float32 before


def test_it_is_off_unless_asked_for(tiny_distilled: Path) -> None:
    kinds = {}
    for quantize in ("none", "fp8"):
        config = ModelConfig(model=str(tiny_distilled), dtype="bfloat16", quantize=quantize)
        kinds[quantize] = load_transformer(open_checkpoint(config)).config.fp8_edge_blocks
    assert kinds == {"none": None, "fp8": 3}


def test_what_cannot_be_quantised_is_refused(tiny_distilled: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="3 blocks, of which 3"):
        save_quantized(tiny_distilled, tmp_path / "new")
    with pytest.raises(CheckpointError, match="exists"):
        save_quantized(tiny_distilled, tmp_path, num_edge_blocks=1)
    with pytest.raises(CheckpointError, match="at least 1"):
        save_quantized(tiny_distilled, tmp_path / "new", num_edge_blocks=0)
    save_quantized(tiny_distilled, tmp_path / "fp8", num_edge_blocks=1)
    with pytest.raises(CheckpointError, match="in FP8 already"):
        save_quantized(tmp_path / "fp8", tmp_path / "again", num_edge_blocks=1)
