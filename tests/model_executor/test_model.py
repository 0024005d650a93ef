"""Loading by role: each role reads the modules that it needs and no other's weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helios_serve.config import ModelConfig
from helios_serve.errors import CheckpointError
from helios_serve.model_executor.history import empty_history
from helios_serve.model_executor.model import (
    Checkpoint,
    load_model,
    load_text_encoder,
    load_transformer,
    load_vae,
    open_checkpoint,
)
from helios_serve.model_executor.packing import TokenSequence, pack

LOADERS: dict[str, Callable[[Checkpoint], object]] = {
    "transformer": load_transformer,
    "vae": load_vae,
    "text_encoder": load_text_encoder,
}


@pytest.mark.parametrize("part", list(LOADERS))
def test_a_role_reads_no_weights_but_its_own(tiny_mid: Path, tmp_path: Path, part: str) -> None:
    path = tmp_path / "mid"
    shutil.copytree(tiny_mid, path)
    for other in LOADERS:
        if other != part:
            for file in (path / other).glob("*.safetensors"):
                file.unlink()
    checkpoint = open_checkpoint(ModelConfig(model=str(path)))
    for name, load in LOADERS.items():
        if name == part:
            load(checkpoint)
        else:
            with pytest.raises(CheckpointError):
                load(checkpoint)


def test_a_whole_model_is_its_parts(tiny_mid: Path) -> None:
    config = ModelConfig(model=str(tiny_mid), dtype="bfloat16")
    whole, checkpoint = load_model(config), open_checkpoint(config)
    assert whole.config == checkpoint.config
    assert whole.rules == checkpoint.rules
    for ours, right in ((whole.transformer, load_transformer(checkpoint)), (whole.vae, load_vae(checkpoint))):
        assert ours.state_dict().keys() == right.state_dict().keys()
        assert all(torch.equal(value, right.state_dict()[name]) for name, value in ours.state_dict().items())
    assert whole.transformer.dtype == torch.bfloat16
    assert next(whole.vae.parameters()).dtype == torch.float32


@torch.inference_mode()
def test_what_visits_the_device_gives_the_same(tiny_distilled: Path) -> None:
    home, away = (load_model(ModelConfig(model=str(tiny_distilled), offload=where)) for where in ("none", "all"))
    embeds = home.text_encoder.encode("a lake at dawn")
    assert torch.equal(away.text_encoder.encode("a lake at dawn"), embeds)
    flows = []
    for transformer in (home.transformer, away.transformer):
        channels = transformer.config.in_channels
        generator = torch.Generator().manual_seed(0)
        sequence = TokenSequence(
            history=transformer.embed_history(empty_history(channels, 8, 8, torch.device("cpu"))),
            x=torch.randn(channels, 9, 8, 8, generator=generator),
            rotary=transformer.current_rotary((9, 4, 4)),
            timestep=500.0,
            text=transformer.project_text(embeds),
        )
        flows.append(transformer(*pack([sequence], transformer.patch)))
    assert torch.equal(*flows)
