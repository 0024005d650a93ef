"""Random weights in the place of a checkpoint's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helios_serve.config import ModelConfig
from helios_serve.errors import CheckpointError
from helios_serve.model_executor.model import load_model, load_transformer, open_checkpoint
from helios_serve.model_executor.quantized_checkpoint import save_quantized


@pytest.fixture
def bare(tiny_distilled: Path, tmp_path: Path) -> Path:
    """A checkpoint without weights."""
    for path in tiny_distilled.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            copy = tmp_path / "bare" / path.relative_to(tiny_distilled)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return tmp_path / "bare"


def test_a_model_is_drawn_from_its_configuration(bare: Path) -> None:
    config = ModelConfig(model=str(bare), weights="random", dtype="bfloat16")
    model, again = load_model(config), load_model(config)
    assert model.transformer.dtype == torch.bfloat16
    assert model.transformer.scale_shift_tables.dtype == torch.float32
    parts = (
        (model.transformer, again.transformer),
        (model.vae, again.vae),
    )
    for one, other in parts:
        for (name, parameter), same in zip(one.named_parameters(), other.parameters(), strict=True):
            assert parameter.isfinite().all(), name
            assert parameter.numel() == 1 or parameter.float().std() > 0, name
            assert torch.equal(parameter, same), name
    embeds = model.text_encoder.encode("a lake")
    assert embeds[:3].float().std() > 0.1
    frames = model.vae.decode(torch.randn(1, 16, 1, 4, 4))
    assert 0.02 < frames.std() < 0.9


def test_without_the_option_weights_must_be_there(bare: Path) -> None:
    with pytest.raises(CheckpointError, match="has no weights"):
        load_model(ModelConfig(model=str(bare)))


def test_quantized_configurations_are_refused(tiny_distilled: Path, tmp_path: Path) -> None:
    save_quantized(tiny_distilled, tmp_path / "fp8", num_edge_blocks=1)
    config = ModelConfig(model=str(tmp_path / "fp8"), weights="random")
    with pytest.raises(CheckpointError, match="drawn in float"):
        load_transformer(open_checkpoint(config))
