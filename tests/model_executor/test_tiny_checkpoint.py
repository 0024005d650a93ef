"""What make-tiny writes: diffusers loads and runs it, it is small and reproducible, and its inputs show."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import HeliosPipeline, HeliosPyramidPipeline
from torch import Tensor
from transformers import AutoTokenizer

from helios_serve.errors import CheckpointError
from helios_serve.model_executor.checkpoint import load_module, read_config
from helios_serve.model_executor.tiny_checkpoint import write_tiny_checkpoint
from helios_serve.model_executor.vae import WanVAE

MakeCheckpoint = Callable[..., Path]
PIPELINES = {"base": HeliosPipeline, "mid": HeliosPyramidPipeline, "distilled": HeliosPyramidPipeline}
CPU = torch.device("cpu")


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("amplify_history", [False, True])
@pytest.mark.parametrize("variant", PIPELINES)
def test_diffusers_loads_and_runs_it(make_checkpoint: MakeCheckpoint, variant: str, amplify_history: bool) -> None:
    pipeline_class = PIPELINES[variant]
    path = make_checkpoint(variant, amplify_history=amplify_history)
    pipeline = pipeline_class.from_pretrained(path, local_files_only=True)
    assert pipeline.transformer.config.is_amplify_history == amplify_history
    transformer, info = type(pipeline.transformer).from_pretrained(path / "transformer", output_loading_info=True)
    assert info["missing_keys"] == info["unexpected_keys"] == info["mismatched_keys"] == []
    assert ("blocks.0.attn1.history_key_scale" in transformer.state_dict()) == amplify_history

    pipeline.set_progress_bar_config(disable=True)
    steps = {"num_inference_steps": 1} if variant == "base" else {"pyramid_num_inference_steps_list": [1, 1, 1]}
    video = pipeline(
        prompt="a fox in the snow",
        height=64,
        width=64,
        num_frames=33,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        **steps,
    ).frames
    assert tuple(video.shape) == (1, 33, 3, 64, 64)
    assert torch.isfinite(video).all()
    assert 0.05 < video.std() < 0.35  # of pixels in [0, 1]


def test_auto_tokenizer_loads_it(tiny_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base / "tokenizer", local_files_only=True)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    text = "cat 猫 고양이 Кот قطة 🐈 γάτα חתול ¿ñ? ½ ∑ Ａ"
    assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_it_is_small_and_served_at_a_tiny_size(make_checkpoint: MakeCheckpoint) -> None:
    for variant in PIPELINES:
        path = make_checkpoint(variant, amplify_history=True)
        assert sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) < 40e6
        info = read_config(path).info("tiny")
        assert info.variant == variant
        assert info.default_size == (128, 64)


def test_equal_seeds_give_equal_bytes(tmp_path: Path, tiny_base: Path) -> None:
    write_tiny_checkpoint("base", tmp_path / "again")
    write_tiny_checkpoint("base", tmp_path / "other", seed=1)
    first, again, other = digests(tiny_base), digests(tmp_path / "again"), digests(tmp_path / "other")
    assert first == again
    assert {name for name in first if first[name] != other[name]} == {
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "other"]  # no scratch left


def test_it_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="give a new or an empty directory"):
        write_tiny_checkpoint("base", tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_it_is_made_without_diffusers(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "sys.modules['diffusers'] = None\n"
        "from helios_serve.model_executor.tiny_checkpoint import write_tiny_checkpoint\n"
        f"write_tiny_checkpoint('mid', Path({str(tmp_path / 'mid')!r}))\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, timeout=120)
    assert read_config(tmp_path / "mid").variant == "mid"


@pytest.mark.parametrize("amplify_history", [False, True])
def test_prompt_history_and_timestep_show(make_checkpoint: MakeCheckpoint, amplify_history: bool) -> None:
    pipeline = HeliosPipeline.from_pretrained(
        make_checkpoint("base", amplify_history=amplify_history), local_files_only=True
    )
    latents = torch.randn(1, 16, 9, 8, 16, generator=torch.Generator().manual_seed(0))

    @torch.inference_mode()
    def flow(prompt: str = "a red fox", timestep: int = 500, changed: str = "") -> Tensor:
        embeds = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=512)[0]
        windows = {}
        for seed, (name, frames) in enumerate({"short": [0, 19], "mid": [17, 18], "long": range(1, 17)}.items()):
            generator = torch.Generator().manual_seed(seed + 10 * (name == changed))
            windows[f"latents_history_{name}"] = torch.randn(1, 16, len(frames), 8, 16, generator=generator)
            windows[f"indices_latents_history_{name}"] = torch.tensor([list(frames)])
        return pipeline.transformer(
            hidden_states=latents,
            timestep=torch.tensor([timestep]),
            encoder_hidden_states=embeds,
            indices_hidden_states=torch.arange(20, 29)[None],
            return_dict=False,
            **windows,
        )[0]

    usual = flow()
    assert 0.3 < usual.std() < 2.0

    def change(other: Tensor) -> float:
        return float((other - usual).norm() / usual.norm())

    assert change(flow(prompt="two blue birds over the sea")) > 0.15
    assert change(flow(prompt="")) > 0.15
    assert change(flow(timestep=510)) > 0.1
    for window in ("short", "mid", "long"):
        assert change(flow(changed=window)) > 0.03, window


def test_decoded_pixels_spread_without_clipping(tiny_base: Path) -> None:
    vae = load_module(lambda: WanVAE(read_config(tiny_base).vae), tiny_base / "vae", CPU, torch.float32)
    latents = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        frames = vae.decode(vae.denormalize(latents))
        mean, logvar = vae.encode(frames)
        normalized = vae.normalize(mean)
    assert 0.2 < frames.std() < 0.6
    assert (frames.abs() == 1).float().mean() < 0.03
    assert 0.3 < normalized.std() < 2.0
    assert -6 < logvar.mean() < -2
