"""SGLang's worker in this process: every variant and task, alone and in groups, equal to this package's engine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sglang.multimodal_gen.registry import get_model_info
from sglang.multimodal_gen.runtime.server_args import ServerArgs
from sglang.multimodal_gen.runtime.warmup_request_builder import build_warmup_reqs

from helios_serve.errors import UnsupportedOperationError
from helios_serve.model_executor.runtimes.sglang_classes import HeliosServeConfig, HeliosServePipeline
from helios_serve.model_executor.runtimes.sglang_requests import model_info, read_sampling
from helios_serve.model_executor.runtimes.sglang_settings import model_config
from tests.conftest import MakeCheckpoint
from tests.runtimes.direct import first_chunk
from tests.runtimes.in_sglang.conftest import STEPS, Native
from tests.runtimes.in_sglang.started import PIXELS, Runtime, forwards

VARIANTS = ["base", "mid", "distilled"]


@pytest.fixture(scope="module")
def runtime(make_checkpoint: MakeCheckpoint) -> Callable[[str], Runtime]:
    """`runtime(variant)`, started once."""
    started: dict[str, Runtime] = {}

    def start(variant: str) -> Runtime:
        if variant not in started:
            started[variant] = Runtime(make_checkpoint(variant))
        return started[variant]

    return start


@pytest.fixture
def distilled(runtime: Callable[[str], Runtime]) -> Runtime:
    return runtime("distilled")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("task", ["t2v", "i2v", "v2v"])
def test_every_variant_and_task_is_that_of_the_engine(
    variant: str,
    task: str,
    runtime: Callable[[str], Runtime],
    make_checkpoint: MakeCheckpoint,
    native: Native,
    tmp_path: Path,
) -> None:
    Image.fromarray(PIXELS[0]).save(tmp_path / "first.png")
    np.save(tmp_path / "clip.npy", PIXELS)
    media = {"t2v": {}, "i2v": {"image": tmp_path / "first.png"}, "v2v": {"video": tmp_path / "clip.npy"}}[task]
    theirs = {f"{kind}_path": str(path) for kind, path in media.items()}
    ours = {kind: str(path) for kind, path in media.items()}
    frames = runtime(variant).generate(**theirs, api_fields={"steps": STEPS[variant]})
    expected = native(make_checkpoint(variant), "a fox", num_frames=40, steps=STEPS[variant], **ours)
    assert np.array_equal(frames, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_not_said_is_the_checkpoint_s_own(
    variant: str, runtime: Callable[[str], Runtime], make_checkpoint: MakeCheckpoint
) -> None:
    served = runtime(variant)
    request = served.request(width=None, height=None, num_frames=33)
    sampling = request.sampling_params
    assert (sampling.width, sampling.height) == (128, 64)
    default_steps = {"base": 50, "mid": 60, "distilled": 12}[variant]  # Distilled doubles those of its first chunk
    assert sampling.num_inference_steps == default_steps
    assert sampling.guidance_scale == (1.0 if variant == "distilled" else 5.0)


@pytest.mark.parametrize("name", ["helios", "helios-base", "my-Helios-Mid-finetune", "distilled", "model"])
def test_a_folder_s_name_decides_nothing(name: str, tiny_distilled: Path, native: Native, tmp_path: Path) -> None:
    shutil.copytree(tiny_distilled, tmp_path / name)
    served = Runtime(tmp_path / name)
    assert isinstance(served.worker.pipeline, HeliosServePipeline)
    assert np.array_equal(served.generate(num_frames=33), native(tiny_distilled, "a fox", num_frames=33))


def test_a_folder_that_is_called_like_another_model_is_told_how_to_be_served(
    tiny_distilled: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "Wan2.1-T2V-1.3B-Diffusers"
    shutil.copytree(tiny_distilled, checkpoint)
    with pytest.raises(UnsupportedOperationError, match="--model-id Helios-Base"):
        Runtime(checkpoint)
    assert Runtime(checkpoint, model_id="Helios-Base").generate(num_frames=33).shape == (33, 64, 64, 3)


def test_flags_of_the_checkpoint_are_honoured(tiny_distilled: Path, native: Native, tmp_path: Path) -> None:
    """A Mid-like file name with Distilled flags, and the other guidance."""
    changed = tmp_path / "changed"
    shutil.copytree(tiny_distilled, changed)
    index = json.loads((changed / "model_index.json").read_text())
    (changed / "model_index.json").write_text(json.dumps({**index, "is_cfg_zero_star": True}))
    fields: dict[str, Any] = {"guidance_scale": 3.0, "num_frames": 33}
    frames = Runtime(changed).generate(**fields, api_fields={"steps": [1, 2, 1]})
    assert np.array_equal(frames, native(changed, "a fox", steps=[1, 2, 1], **fields))


def test_thirty_prompts_in_sequence_are_thirty_videos(distilled: Runtime, tiny_distilled: Path, native: Native) -> None:
    for prompt in (f"animal number {number}" for number in range(30)):
        frames = distilled.generate(prompt, num_frames=33, api_fields={"steps": [1, 1, 1]})
        assert np.array_equal(frames, native(tiny_distilled, prompt, num_frames=33, steps=[1, 1, 1])), prompt


@pytest.mark.parametrize("num_frames", [1, 33, 34, 66, 70])
def test_frames_are_trimmed(num_frames: int, distilled: Runtime) -> None:
    assert len(distilled.generate(num_frames=num_frames, api_fields={"steps": [1, 1, 1]})) == num_frames


def test_a_group_shares_forwards_whatever_each_asks_for(
    distilled: Runtime, tiny_distilled: Path, native: Native
) -> None:
    asked: list[dict[str, Any]] = [
        {"prompt": "a fox", "num_frames": 66},
        {"prompt": "a dog", "num_frames": 40, "width": 128, "seed": 9},
        {"prompt": "a cat", "num_frames": 33, "guidance_scale": 3.0, "negative_prompt": "rain"},
    ]
    with forwards() as shared:
        videos = distilled.run(*(distilled.request(**fields) for fields in asked))
    assert shared == [4] * 12 + [2] * 6
    for frames, fields in zip(videos, asked, strict=True):
        size = f"{fields.pop('width', 64)}x64"
        expected = native(tiny_distilled, **{"size": size, **fields})
        assert np.abs(frames.astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("variant", "fields"),
    [
        ("base", {}),
        ("base", {"guidance_scale": 1.0}),
        ("base", {"steps": [3], "use_zero_init": True}),
        ("mid", {}),
        ("distilled", {}),
        ("distilled", {"guidance_scale": 3.0}),
    ],
)
def test_as_many_forwards_as_the_engine_s(
    variant: str,
    fields: dict[str, Any],
    runtime: Callable[[str], Runtime],
    make_checkpoint: MakeCheckpoint,
    native: Native,
) -> None:
    served = runtime(variant)
    asked = {"steps": STEPS[variant], **fields}
    with forwards() as theirs:
        served.generate(num_frames=66, api_fields=asked)
    with forwards() as ours:
        native(make_checkpoint(variant), "a fox", num_frames=66, **asked)
    assert theirs == ours
    assert theirs


def test_several_outputs_are_videos_of_the_seeds_that_follow(
    distilled: Runtime, tiny_distilled: Path, native: Native
) -> None:
    request = distilled.request(num_outputs_per_prompt=3, num_frames=33)
    expanded = request.sampling_params.expand_video_request_outputs_for_queue(request)
    assert expanded is not None
    for number, frames in enumerate(distilled.run(*expanded)):
        expected = native(tiny_distilled, "a fox", num_frames=33, seed=7 + number)
        assert np.abs(frames.astype(int) - expected).max() <= 1


def test_the_same_seed_is_the_same_video_and_another_another(distilled: Runtime) -> None:
    once, again, other = (distilled.generate(seed=seed, num_frames=33) for seed in (1, 1, 2))
    assert np.array_equal(once, again)
    assert not np.array_equal(once, other)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"width": 65}, "nearest: 64x64"),
        ({"height": None}, "height: required beside width"),
        ({"api_fields": {"steps": [1]}}, "needs 3 numbers"),
        ({"api_fields": {"colour": "red"}}, "colour: unknown parameter"),
        ({"num_inference_steps": 5}, "3 stages"),
        ({"num_frames": 100_000}, "at most 7260"),
        ({"enable_teacache": True}, "enable_teacache: not with Helios"),
        ({"flow_shift": 3.0}, "flow_shift: not with Helios"),
        ({"image_path": "/nowhere.png"}, "No such file"),
        ({"image_path": ["/a.png", "/b.png"]}, "one is what a video begins from"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(fields: dict[str, Any], said: str, distilled: Runtime) -> None:
    with pytest.raises(ValueError, match=said):
        distilled.request(**fields)


def test_a_picture_that_is_none_is_refused_at_once(distilled: Runtime, tmp_path: Path) -> None:
    (tmp_path / "first.png").write_text("no picture")
    with pytest.raises(ValueError, match="image"):
        distilled.request(image_path=str(tmp_path / "first.png"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tp_size": 2}, "--tp-size: not with helios-serve"),
        ({"lora_path": "somewhere"}, "--lora-path: not with helios-serve"),
        ({"vae_cpu_offload": True}, "--vae-cpu-offload: not with helios-serve"),
        ({"attention_backend": "torch_sdpa"}, "--attention-backend: not with helios-serve"),
        ({"component_paths": {"vae": "somewhere"}}, "--component-paths: not with helios-serve"),
        ({"dit_precision": "fp16"}, "bf16 or fp32"),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused_at_launch(
    settings: dict[str, Any], said: str, tiny_distilled: Path
) -> None:
    with pytest.raises(UnsupportedOperationError, match=said):
        ServerArgs.from_kwargs(model_path=str(tiny_distilled), **settings)


@pytest.mark.parametrize("settings", [{"dit_cpu_offload": True}, {"text_encoder_cpu_offload": True}])
def test_offload_is_this_package_s_own(settings: dict[str, Any], tiny_distilled: Path, native: Native) -> None:
    frames = Runtime(tiny_distilled, **settings).generate(num_frames=33)
    assert np.array_equal(frames, native(tiny_distilled, "a fox", num_frames=33))


@pytest.mark.parametrize("quantization", [None, "fp8"])
def test_bfloat16_and_fp8_are_this_package_s(quantization: str | None, tiny_distilled: Path) -> None:
    """The same model, driven without the runtime, makes the same frames: the runtime has changed nothing in it."""
    served = Runtime(tiny_distilled, dit_precision="bf16", quantization=quantization)
    config = model_config(served.args)
    assert (config.dtype, config.quantize) == ("bfloat16", "none" if quantization is None else "fp8")
    request = served.request(num_frames=33)
    expected = first_chunk(config, read_sampling(request.sampling_params, model_info(str(tiny_distilled))))
    (frames,) = served.run(request)
    assert np.array_equal(frames, expected)


def test_a_warm_up_is_a_chunk_of_the_size_and_steps_that_are_served(distilled: Runtime) -> None:
    (request,) = build_warmup_reqs(distilled.args, warmup_resolutions=["128x64"])
    assert request.is_warmup
    request.save_output, request.return_frames, request.return_file_paths_only = False, True, False
    (frames,) = distilled.run(request)
    assert frames.shape == (33, 64, 128, 3)


def test_a_session_that_goes_away_leaves_nothing(distilled: Runtime) -> None:
    request = distilled.request(num_frames=99)
    request.realtime_session_id, request.block_idx, request.return_raw_frames = "s", 0, True
    assert distilled.worker.execute_forward([request]).error is None
    assert distilled.worker.release_realtime_session("s").output["released"]
    steps = distilled.worker.pipeline.get_stage("helios_denoise")._steps
    assert len(steps._runs) == 0
    assert steps._runner.active == ()


def test_the_registry_gives_this_package_s_classes(tiny_distilled: Path) -> None:
    info = get_model_info(str(tiny_distilled))
    assert info is not None
    assert issubclass(info.pipeline_cls, HeliosServePipeline)
    assert info.pipeline_config_cls is HeliosServeConfig
