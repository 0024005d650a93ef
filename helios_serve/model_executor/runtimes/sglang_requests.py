"""Requests of SGLang-Diffusion read by this package's own parser, before SGLang's scheduler takes them in.

Knows where SGLang puts which field. What a field may hold and what it means is decided by the parser alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from sglang.multimodal_gen.configs.pipeline_configs.base import ModelTaskType
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.runtime.entrypoints.utils import expand_request_outputs
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req
from sglang.multimodal_gen.runtime.server_args import ServerArgs
from sglang.srt.utils.common import get_image_bytes

from helios_serve.api.convert import Limits, parse_generation
from helios_serve.api.media_input import DataUriSource, Media, check_media_bytes
from helios_serve.api.schemas import FIELD_ALIASES, HELIOS_ALIASES, GenerationBody, HeliosParams
from helios_serve.config import ModelConfig
from helios_serve.errors import HeliosError, InvalidRequestError
from helios_serve.types import FRAMES_PER_CHUNK, ModelInfo, VideoRequest
from helios_serve.workers.media import Decoder

MAX_FRAMES = Limits().max_frames

_NOT_SHARED = {"batch_sig_exclude": True}
"""Metadata of a field in which requests that share forwards may differ."""
_READ = ("width", "height", "num_frames", "fps", "num_inference_steps", "guidance_scale", "negative_prompt")
"""Fields that are called the same here, read when they were given."""
_IGNORED = (
    "guidance_scale_2",
    "true_cfg_scale",
    "guidance_rescale",
    "cfg_normalization",
    "boundary_ratio",
    "cfg_gate_step",
    "max_sequence_length",
    "flow_shift",
    "progressive_mode",
    "enable_teacache",
    "enable_cache_dit",
    "cache_dit_params",
    "attention_backend_override",
    "skip_softmax_params",
    "enable_spectrum",
    "rollout",
    "return_trajectory_latents",
    "return_trajectory_decoded",
    "diffusers_kwargs",
)
"""Fields that SGLang has for other models."""
_OTHERS_EXTRAS = frozenset(
    {
        "quality",
        "attention_backend_override",
        "cache_dit_params",
        "cfg_gate_step",
        "enable_cache_dit",
        "skip_softmax_params",
        "use_diffusion_decoder",
        "guardrails",
        "use_guardrails",
        "extra_args",
    }
)
"""Keys of a request's body that SGLang reads itself, for all its models alike."""

_FORM_FILES = frozenset({"video_reference"})
"""A file of SGLang's own form that is called like a field here; SGLang passes its path on."""


@dataclass
class HeliosServeSamplingParams(SamplingParams):  # type: ignore[misc]
    """A request of SGLang for a Helios checkpoint. Sizes, lengths, steps and guidance may differ between requests that
    share forwards.

    api_fields: fields of `POST /v1/videos/generations`, under any of their names. Once the request was read they are
    all that it says beside its prompt, seed, picture and video. model: what is served, known from then on.
    """

    task_type: ModelTaskType | str | None = field(default=None, metadata=_NOT_SHARED)
    video_path: str | list[str] | None = field(default=None, metadata=_NOT_SHARED)
    negative_prompt: str = field(default="", metadata=_NOT_SHARED)
    num_frames: int = field(default=132, metadata=_NOT_SHARED)
    height: int | None = field(default=None, metadata=_NOT_SHARED)
    width: int | None = field(default=None, metadata=_NOT_SHARED)
    num_inference_steps: int | None = field(default=None, metadata=_NOT_SHARED)
    guidance_scale: float | None = field(default=None, metadata=_NOT_SHARED)
    guidance_scale_2: float | None = field(default=None, metadata=_NOT_SHARED)
    api_fields: dict[str, Any] = field(default_factory=dict, metadata=_NOT_SHARED)
    model: str = ""

    @classmethod
    def video_request_extra_fields(cls) -> frozenset[str]:
        """What a form may have beside SGLang's own fields; other keys of a form are dropped by SGLang."""
        return _api_names() - _FORM_FILES

    @classmethod
    def lower_video_request_kwargs(cls, request: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keeps what a body has beside SGLang's own fields for the parser, which refuses what it does not know."""
        extras = {name: value for name, value in request.model_extra.items() if name not in _OTHERS_EXTRAS}
        own = {name: value for name, value in kwargs.items() if name not in extras}
        return {**own, "api_fields": extras}

    def prepare_video_request_for_queue(self, req: Req) -> None:
        """Reads the picture or video too, in a thread of the front end.

        Raises: ValueError for one that cannot be used.
        """
        read_sampling(self, model_info(self.model))

    def expand_video_request_outputs_for_queue(self, req: Req) -> list[Req] | None:
        """One request for each of `n` videos, with seeds of their own; they share forwards."""
        return expand_request_outputs(req) if self.num_outputs_per_prompt > 1 else None

    def _adjust_visual_fields(self, server_args: ServerArgs, pipeline_config: object) -> None:
        """Reads the request, all but its picture or video, and says what it comes to in SGLang's fields.

        Raises: ValueError for what cannot be served as it is written.
        """
        _refuse_ignored(self)
        given = {name: vars(self)[name] for name in _READ if name in self._explicit_fields}
        self.api_fields = {**{name: value for name, value in given.items() if value is not None}, **self.api_fields}
        self.model = server_args.model_path
        params = read_sampling(self, model_info(self.model), with_media=False).params
        self.width, self.height, self.num_frames = params.width, params.height, params.num_frames
        self.guidance_scale, self.num_inference_steps = params.guidance_scale, params.total_steps
        self.adjust_frames = self.enable_sequence_shard = False
        if not server_args.comfyui_mode:
            self._set_output_file_name()


@cache
def model_info(model: str) -> ModelInfo:
    """What a checkpoint is and allows, by its own configuration.

    Raises: CheckpointError for what keeps it from being served.
    """
    # Imports PyTorch code, which a server of another model does without.
    from helios_serve.model_executor.checkpoint import read_config, resolve_checkpoint

    return read_config(resolve_checkpoint(model, has_weights=False)).info(ModelConfig(model=model).served_name)


def read_sampling(sampling: HeliosServeSamplingParams, info: ModelInfo, *, with_media: bool = True) -> VideoRequest:
    """A request as this package knows it. Its id is SGLang's, if it has one.

    Args:
        with_media: whether the picture or video is read and decoded.

    Raises: ValueError for what cannot be served as it is written.
    """
    seed = sampling.seed[0] if isinstance(sampling.seed, list) else sampling.seed
    fields = {"prompt": sampling.prompt, "seed": seed, **(_media(sampling) if with_media else {})}
    body = {**(sampling.api_fields if sampling.model else _warm_up(sampling)), **fields}
    media = Media(source=_References(), decoder=Decoder(allow_npy=True))
    try:
        request = parse_generation(body, info, media, Limits()).request
    except HeliosError as error:
        if error.status >= 500:
            raise
        raise ValueError(error.message) from error
    return request if sampling.request_id is None else replace(request, request_id=sampling.request_id)


class _References:
    """Reads what SGLang takes for a picture or video: files, `data:` URIs and addresses, which SGLang fetches."""

    def read(self, reference: str, param: str, max_bytes: int) -> bytes:
        """Raises: InvalidRequestError for one that cannot be read or is too large."""
        if reference.startswith("data:"):
            return DataUriSource().read(reference, param, max_bytes)
        is_address = reference.startswith(("http://", "https://"))
        try:
            data: bytes = get_image_bytes(reference) if is_address else Path(reference).read_bytes()
        except (OSError, ValueError) as error:  # requests' errors are OSErrors
            raise InvalidRequestError(
                f"{param}: {error}; give a file that the server can read, an address or a data: URI", param=param
            ) from error
        if not reference.endswith(".npy"):  # lossless arrays are larger than any upload
            check_media_bytes(len(data), max_bytes, param)
        return data


def _warm_up(sampling: HeliosServeSamplingParams) -> dict[str, object]:
    """SGLang makes requests of its own to warm up, whose length and steps are the same for all its models."""
    return {"width": sampling.width, "height": sampling.height, "num_frames": FRAMES_PER_CHUNK}


def _media(sampling: HeliosServeSamplingParams) -> dict[str, str]:
    named = {"image": sampling.image_path, "video": sampling.video_path}
    return {name: _only(value, name) for name, value in named.items() if value}


def _only(paths: str | list[str], name: str) -> str:
    """Raises: ValueError for more than one."""
    if isinstance(paths, str):
        return paths
    if len(paths) > 1:
        raise ValueError(f"{name}: {len(paths)} were given; one is what a video begins from")
    return paths[0]


@cache
def _api_names() -> frozenset[str]:
    """All names of fields of `POST /v1/videos/generations`."""
    schemas = (GenerationBody.model_fields, HeliosParams.model_fields)
    names = {known.alias or name for schema in schemas for name, known in schema.items()}
    return frozenset(names | set(FIELD_ALIASES) | set(HELIOS_ALIASES))


@cache
def _defaults() -> Mapping[str, object]:
    return {known.name: known.default for known in dataclasses.fields(SamplingParams)}


def _refuse_ignored(sampling: HeliosServeSamplingParams) -> None:
    """Raises: ValueError for what SGLang offers for other models and would be ignored here."""
    for name in _IGNORED:
        if vars(sampling)[name] not in (_defaults()[name], None, False):
            raise ValueError(f"{name}: not with Helios; leave it out")
