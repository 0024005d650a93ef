"""Requests of vLLM-Omni read by this package's own parser, before vLLM-Omni's scheduler takes them in.

Knows where vLLM-Omni puts which field. What a field may hold and what it means is decided by the parser alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.errors import OmniClientError

from helios_serve.errors import HeliosError, InvalidRequestError
from helios_serve.model_executor.checkpoint import read_config, resolve_checkpoint
from helios_serve.model_executor.runtimes.memory_request import Pictures, read_request
from helios_serve.model_executor.runtimes.vllm_settings import model_config
from helios_serve.types import FRAMES_PER_CHUNK, ModelInfo, VideoRequest

_OTHERS_EXTRAS = frozenset(
    {"cfg_img_scale", "cfg_text_scale", "duration", "preencode_batch_frames", "preencode_mp4", "video_codec_options"}
)
"""Keys of a request's extra_args that the runtime puts there for itself or for all its models alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmittedRequest:
    """A request that was read before admission. `returns_latents`: normalised latents are asked for, not pictures."""

    request: VideoRequest
    returns_latents: bool


def request_reader(od_config: OmniDiffusionConfig) -> Callable[[OmniDiffusionRequest], OmniDiffusionRequest]:
    """What the engine calls with each request before its scheduler sees it.

    The result raises OmniClientError for a request that this checkpoint cannot serve as it is written.
    """
    info = _model_info(od_config)
    counts_steps = od_config.step_execution or od_config.streaming_output

    def read(request: OmniDiffusionRequest) -> OmniDiffusionRequest:
        layout = admit(request, info)
        admitted = copy.copy(request)
        admitted.prepared_layout = layout
        admitted.sampling_params = _alike(request.sampling_params)
        if counts_steps:  # the step scheduler plans with it
            admitted.sampling_params.num_inference_steps = layout.request.params.total_steps
        return admitted

    return read


def _model_info(od_config: OmniDiffusionConfig) -> ModelInfo:
    config = model_config(od_config)
    path = resolve_checkpoint(config.model, has_weights=False)
    return read_config(path).info(config.served_name)


def admit(request: OmniDiffusionRequest, info: ModelInfo) -> AdmittedRequest:
    """Raises: OmniClientError for a request that cannot be served as it is written."""
    fields, pictures = _fields(request, info)
    try:
        _refuse_ignored(request.sampling_params)
        output_type = fields.pop("output_type", None)
        return AdmittedRequest(request=read_request(fields, pictures, info), returns_latents=output_type == "latent")
    except HeliosError as error:
        raise for_the_client(error) from error


def for_the_client(error: Exception) -> Exception:
    """The same error as the runtime's front end knows it."""
    if isinstance(error, HeliosError) and error.status < 500:
        return OmniClientError(error.message, status_code=error.status, error_type=error.type)
    return error


def _fields(request: OmniDiffusionRequest, info: ModelInfo) -> tuple[dict[str, Any], Pictures]:
    """The runtime's request under the names of `POST /v1/videos/generations`, without what was not given."""
    sampling, prompt = request.sampling_params, request.prompt
    if request.is_dummy_run():  # its size and steps are the same for all models
        return _warm_up(info), Pictures()
    texts: Mapping[str, Any] = {"prompt": prompt} if isinstance(prompt, str) else prompt
    extra = {key: value for key, value in sampling.extra_args.items() if key not in _OTHERS_EXTRAS}
    media = {**texts.get("multi_modal_data", {}), **{key: extra.pop(key) for key in ("image", "video") if key in extra}}
    fields = {
        "prompt": texts.get("prompt"),
        "negative_prompt": texts.get("negative_prompt"),
        "width": sampling.width,
        "height": sampling.height,
        # The runtime's default is one frame, for images: a video of one frame cannot be told from one of no length.
        "num_frames": None if sampling.num_frames in (None, 1) else sampling.num_frames,
        "fps": sampling.fps,
        "seed": sampling.seed,
        "n": sampling.num_outputs_per_prompt,
        "num_inference_steps": sampling.num_inference_steps,
        "guidance_scale": sampling.guidance_scale if sampling.guidance_scale_provided else None,
        "output_type": sampling.output_type,
    }
    given = {key: value for key, value in fields.items() if value is not None}
    return {**given, **extra}, _pictures(media)


def _warm_up(info: ModelInfo) -> dict[str, Any]:
    """One forward in each shape of a chunk of the default size."""
    width, height = info.default_size
    size = {"width": width, "height": height, "num_frames": FRAMES_PER_CHUNK}
    return {"prompt": "warm-up", **size, "steps": [1] * info.num_stages, "use_zero_init": False}


def _pictures(media: Mapping[str, Any]) -> Pictures:
    image: Any = media.get("image")
    if isinstance(image, list):
        image = image[0] if len(image) == 1 else image
    return Pictures(image=image, video=media.get("video"))


def _alike(sampling: Any) -> Any:
    """Sampling parameters without those by which the runtime tells apart what cannot share a forward: it can here."""
    alike = copy.copy(sampling)
    alike.height = alike.width = alike.fps = alike.frame_rate = alike.num_inference_steps = None
    alike.num_frames, alike.guidance_scale, alike.guidance_scale_2 = 1, 1.0, 1.0
    alike.guidance_scale_provided = alike.do_classifier_free_guidance = False
    return alike


def _refuse_ignored(sampling: Any) -> None:
    """Raises: InvalidRequestError for what the runtime offers for other models and would be ignored here."""
    refused = (
        ("enable_frame_interpolation", sampling.enable_frame_interpolation, "frames are not interpolated"),
        ("lora", sampling.lora_request is not None, "adapters are not loaded"),
    )
    for name, is_set, why in refused:
        if is_set:
            raise InvalidRequestError(f"{name}: {why}; leave it out", param=name)
