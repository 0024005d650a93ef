"""Settings of the runtime: honoured, or refused at start with what to do."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm_omni.diffusion.data import OmniDiffusionConfig

from helios_serve.config import ModelConfig
from helios_serve.errors import UnsupportedOperationError
from helios_serve.model_executor.model import HeliosModel, load_model
from helios_serve.model_executor.packing import PackedBatch
from helios_serve.model_executor.rope import Grid
from helios_serve.model_executor.runtimes import vllm_pipeline
from helios_serve.model_executor.runtimes.videos import VideoRun, Videos
from helios_serve.model_executor.runtimes.vllm_settings import model_config
from helios_serve.model_executor.transformer import HeliosTransformer
from helios_serve.types import VideoRequest
from tests.conftest import MakeCheckpoint
from tests.runtimes.direct import first_chunk
from tests.runtimes.in_vllm.conftest import Frames
from tests.runtimes.in_vllm.omni import frames_of, omni, sampling

STEPS = [1, 1, 1]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ModelConfig, HeliosModel]]:
    """What the pipeline loads."""
    models: list[tuple[ModelConfig, HeliosModel]] = []

    def load(config: ModelConfig) -> HeliosModel:
        models.append((config, load_model(config)))
        return models[-1][1]

    monkeypatch.setattr(vllm_pipeline, "load_model", load)
    return models


@pytest.mark.parametrize(
    ("flag", "offload"), [("enable_cpu_offload", "text_encoder"), ("enable_layerwise_offload", "all")]
)
def test_layers_that_wait_in_host_memory_make_the_same_video(
    flag: str,
    offload: str,
    tiny_distilled: Path,
    loaded: list[tuple[ModelConfig, HeliosModel]],
    native: Callable[..., list[Frames]],
) -> None:
    with omni(tiny_distilled, **{flag: True}) as started:
        (output,) = started.generate("a fox", sampling(num_frames=33, extra_args={"steps": STEPS}))
    ((config, _),) = loaded
    assert config.offload == offload
    (expected,) = native(tiny_distilled, "a fox", num_frames=33, steps=STEPS)
    assert np.array_equal(frames_of(output), expected)


@pytest.mark.parametrize("quantization", [None, "fp8"])
def test_bfloat16_and_fp8_are_this_package_s(
    quantization: str | None, tiny_distilled: Path, loaded: list[tuple[ModelConfig, HeliosModel]]
) -> None:
    """The same model, driven without the runtime, makes the same frames: the runtime has changed nothing in it."""
    admitted: list[VideoRequest] = []
    encode = Videos.encode

    def noted(videos: Videos, request: VideoRequest) -> VideoRun:
        admitted.append(request)
        return encode(videos, request)

    settings = {} if quantization is None else {"quantization": quantization}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Videos, "encode", noted)
        with omni(tiny_distilled, dtype="bfloat16", **settings) as started:
            (output,) = started.generate("a fox", sampling(num_frames=33, extra_args={"steps": STEPS}))
    ((config, _),) = loaded
    assert (config.dtype, config.quantize) == ("bfloat16", "none" if quantization is None else "fp8")
    assert np.array_equal(frames_of(output), first_chunk(config, admitted[-1]))


@pytest.mark.parametrize(("variant", "tokens"), [("base", [1]), ("distilled", [1, 4, 16])])
def test_warm_up_has_the_shapes_that_will_be_served(
    variant: str, tokens: list[int], make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tokens: of the stages, in those of the first."""
    grids: list[Grid] = []
    forward = HeliosTransformer.forward

    def noted(transformer: HeliosTransformer, batch: PackedBatch, text: Any) -> Any:
        grids.append(batch.grids[0])
        return forward(transformer, batch, text)

    monkeypatch.setattr(HeliosTransformer, "forward", noted)
    with omni(make_checkpoint(variant)) as started:
        warmed = list(grids)
        (output,) = started.generate(
            "a fox", sampling(width=None, height=None, num_frames=33, extra_args={"steps": [3] * len(tokens)})
        )
    served, warmed = (list(dict.fromkeys(part)) for part in (grids[len(warmed) :], warmed))
    assert [math.prod(grid) // math.prod(warmed[0]) for grid in warmed] == tokens
    assert served == warmed
    assert frames_of(output).shape[1:3] == (16 * warmed[-1][1], 16 * warmed[-1][2])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "tensor parallel": ({"parallel_config": {"tensor_parallel_size": 2}}, "tensor-parallel-size"),
    "hsdp": ({"parallel_config": {"use_hsdp": True, "ulysses_degree": 2}}, "use-hsdp"),
    "distributed offload": ({"enable_distributed_layerwise_offload": True}, "enable-distributed-layerwise-offload"),
    "chosen offload": (
        {"diffusion_offload_config": {"mode": "layer", "components": ["dit"]}},
        "diffusion-offload-config",
    ),
    "cache": ({"cache_backend": "cache_dit"}, "cache-backend"),
    "quantization": ({"quantization_config": "int8"}, "quantization int8"),
    "float16": ({"dtype": "float16"}, "bfloat16 or float32"),
    "both": ({"quantization_config": "fp8", "enable_layerwise_offload": True}, "one of the two"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_ignored_is_refused(name: str, tiny_distilled: Path) -> None:
    settings, said = REFUSED[name]
    od_config = OmniDiffusionConfig.from_kwargs(model=str(tiny_distilled), **settings)
    with pytest.raises(UnsupportedOperationError, match=said):
        model_config(od_config)
