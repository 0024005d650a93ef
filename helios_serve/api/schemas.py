"""The JSON that clients send and receive, as pydantic models, and the other names that a field goes by.

Knows types and ranges that hold for every checkpoint; knows nothing of a checkpoint's own rules (`convert`) and nothing
of HTTP. Scalars are strict: a boolean is no number, a string is no number, NaN and infinity are refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidatorFunctionWrapHandler,
)
from pydantic_core import CoreSchema, core_schema

from helios_serve.types import Codec, FramePolicy, ImageFit, ServiceClass

MAX_SEED = 2**63 - 1
MAX_PROMPT_CHARS = 32_000

FILE_MARK = "x-file-in-forms"
"""Key of the JSON schema of a string that may come as a file in a multipart form."""

FIELD_ALIASES = {
    "frames": "num_frames",
    "duration": "seconds",
    "image": "input_reference",
    "image_url": "input_reference",
    "image_reference": "input_reference",
    "first_frame": "input_reference",
    "video_reference": "video",
    "video_url": "video",
    "num_outputs_per_prompt": "n",
    "safety_identifier": "user",
    "callback_url": "webhook_url",
    "partial_images": "partial_videos",
}
"""Other name of a top-level field -> the field."""

HELIOS_ALIASES = {
    "pyramid_steps": "steps",
    "pyramid_num_inference_steps_list": "steps",
    "is_amplify_first_chunk": "amplify_first_chunk",
    "is_skip_first_chunk": "skip_first_chunk",
}
"""Other name of a key of `helios` -> the key."""

FIXED_HERE = {
    "keep_first_frame": "the first frame is always kept; leave it out",
    "latents": "initial noise comes from seed; leave it out",
    "image_latents": "latents are not taken; give image",
    "fake_image_latents": "latents are not taken; give image",
    "video_latents": "latents are not taken; give video",
    "prompt_embeds": "embeddings are not taken; give prompt",
    "negative_prompt_embeds": "embeddings are not taken; give negative_prompt",
    "num_videos_per_prompt": "one request makes one video; send several requests",
    "sigmas": "the checkpoint's scheduler sets them; steps says how many",
    "history_sizes": "the history is always 16, 2 and 1 latent frames; leave it out",
    "num_latent_frames_per_chunk": "a chunk is always 9 latent frames; leave it out",
    "max_sequence_length": "prompts always have 512 tokens; leave it out",
    "add_noise_to_image_latents": "noise is always added; image_noise_sigma_min and image_noise_sigma_max 0 give none",
    "add_noise_to_video_latents": "noise is always added; video_noise_sigma_min and video_noise_sigma_max 0 give none",
    "output_type": "see response_format and the Accept header; leave it out",
}
"""Options of the reference's pipelines that are no fields here -> why not, and what to do."""

HELIOS_CONTAINERS = ("helios", "extra_params", "extra_body", "sampling_params")
"""Objects whose keys are keys of `helios`; all but the first may hold top-level fields as well."""

ALSO_IN_HELIOS = ("prompts",)
"""Top-level fields that no other API has, and that may therefore stand within `helios` too."""


@dataclass(frozen=True, slots=True)
class UploadedMedia:
    """A file that came as a part of a form, where JSON has a `data:` URI."""

    data: bytes = field(repr=False)
    content_type: str

    def __str__(self) -> str:
        return f"file of {len(self.data)} bytes, {self.content_type}"


class _TextOrUpload:
    """Validates as a string; lets an upload pass. A union would put the member's name into the path of an error."""

    @classmethod
    def __get_pydantic_core_schema__(cls, _: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_wrap_validator_function(_keep_upload, handler.generate_schema(str))

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), FILE_MARK: True}


def _keep_upload(value: object, validate_text: ValidatorFunctionWrapHandler) -> object:
    return value if isinstance(value, UploadedMedia) else validate_text(value)


def _number_from_text(value: object) -> object:
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", value):
        return float(value)
    return value


def _as_image_reference(value: object) -> object:
    return {"image_url": value} if isinstance(value, str | UploadedMedia) else value


def _as_video_reference(value: object) -> object:
    return {"video_url": value} if isinstance(value, str | UploadedMedia) else value


def _seconds_of(value: object) -> object:
    return value["seconds"] if isinstance(value, dict) and set(value) == {"seconds"} else value


def _all_partials(value: object) -> object:
    return "all" if isinstance(value, int) and value > 0 and not isinstance(value, bool) else value


Prompt = Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_CHARS)]
Sigma = Annotated[float, Field(ge=0, le=1)]
MediaText = Annotated[str | UploadedMedia, _TextOrUpload]


class _Input(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ImageReference(_Input):
    """An image: a `data:` URI, an https address of a host that the server allows, an uploaded file or a stored one."""

    image_url: MediaText | None = None
    file_id: str | None = None


class VideoReference(_Input):
    """A video to continue: as an image is given, or `id`, an own finished video."""

    video_url: MediaText | None = None
    file_id: str | None = None
    id: str | None = None


class Expiry(_Input):
    """When the video is deleted, written as an object."""

    seconds: int


class PromptEntry(_Input):
    """One entry of a prompt schedule; exactly one of `chunk` and `start_seconds` says where it begins."""

    prompt: Prompt
    chunk: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    start_seconds: Annotated[float, Field(ge=0)] | None = None
    transition_chunks: Annotated[int, Field(ge=0, le=1000)] = 2


VideoInput = Annotated[
    VideoReference, BeforeValidator(_as_video_reference, json_schema_input_type=str | VideoReference)
]
"""A video as clients write it: an object, an address alone, or a file."""


class HeliosParams(_Input):
    """What Helios offers beyond the OpenAI schema. Each key may also be given at the top level."""

    steps: list[int] | None = Field(
        default=None, description="Steps per pyramid stage; also `pyramid_steps`, `pyramid_num_inference_steps_list`."
    )
    num_inference_steps: int | None = Field(default=None, description="Steps of a checkpoint that has one stage.")
    profile: Literal["quality", "realtime"] | None = None
    guidance_scale: float | None = Field(default=None, ge=1, le=20)
    amplify_first_chunk: bool | None = None
    skip_first_chunk: bool = False
    use_zero_init: bool | None = None
    zero_steps: int | None = Field(default=None, ge=0, le=100)
    image_noise_sigma_min: Sigma = 0.111
    image_noise_sigma_max: Sigma = 0.135
    video_noise_sigma_min: Sigma = 0.111
    video_noise_sigma_max: Sigma = 0.135
    frame_policy: FramePolicy = "trim"
    image_fit: ImageFit = "crop"
    crf: int = Field(default=23, ge=0, le=51)
    service_class: ServiceClass | None = None
    reproducible: Literal["strict"] | None = None
    is_enable_stage2: bool | None = None
    pyramid_num_stages: int | None = None


class GenerationBody(_Input):
    """The body of `POST /v1/videos/generations`. `prompt` is required unless `prompts` is given."""

    prompt: Prompt | None = None
    negative_prompt: Annotated[str, Field(max_length=MAX_PROMPT_CHARS)] | None = None
    model: str | None = None
    size: str | None = Field(default=None, description="WIDTHxHEIGHT or auto; or give `width` and `height`.")
    width: int | None = Field(default=None, ge=1, le=1_000_000)
    height: int | None = Field(default=None, ge=1, le=1_000_000)
    num_frames: int | None = Field(default=None, ge=1, description="Wins over `seconds`. Also `frames`.")
    seconds: (
        Annotated[float, BeforeValidator(_number_from_text, json_schema_input_type=float | str), Field(gt=0)] | None
    ) = None
    fps: float = Field(default=24, ge=1, le=60, description="Playback rate of the file; frames do not depend on it.")
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    input_reference: (
        Annotated[ImageReference, BeforeValidator(_as_image_reference, json_schema_input_type=str | ImageReference)]
        | None
    ) = Field(
        default=None, description="Image to start from. Also `image`, `image_url`, `image_reference`, `first_frame`."
    )
    video: VideoInput | None = Field(
        default=None, description="Video to continue. Also `video_reference`, `video_url`."
    )
    prompts: list[PromptEntry] | None = None
    response_format: Literal["url", "b64_json"] = "url"
    n: int = 1
    output_format: str = "mp4"
    codec: Codec = "h264"
    detach: bool = False
    user: Annotated[str, Field(max_length=256)] | None = None
    metadata: Annotated[dict[str, Annotated[str, Field(max_length=512)]], Field(max_length=16)] | None = None
    stream: bool = False
    async_: bool = Field(default=False, alias="async")
    partial_videos: Annotated[
        Literal["all", 0], BeforeValidator(_all_partials, json_schema_input_type=Literal["all"] | int)
    ] = "all"
    priority: int = 0
    queue_timeout: float | None = None
    webhook_url: str | None = None
    expires_after: Annotated[int, BeforeValidator(_seconds_of, json_schema_input_type=int | Expiry)] | None = None
    helios: HeliosParams = HeliosParams()


class WarningItem(BaseModel):
    """A parameter that was accepted and has no effect, or one that deserves a second look."""

    param: str
    message: str


class Usage(BaseModel):
    """What a video took; `gpu_seconds` counts device time of the transformer's steps."""

    num_frames: int
    num_chunks: int
    video_seconds: float
    gpu_seconds: float


class Timing(BaseModel):
    """Milliseconds since the request was accepted; null where it has not happened."""

    queue_ms: int | None
    encode_ms: int | None
    first_segment_ms: int | None
    total_ms: int | None


class GenerationItem(BaseModel):
    """Exactly one of `url` and `b64_json` is set."""

    url: str | None
    b64_json: str | None
    revised_prompt: str | None


class GenerationDetails(BaseModel):
    """The values that were really used."""

    seed: int
    fps: int | float
    steps: list[int]
    approximations: list[str]
    warnings: list[WarningItem]
    timing: Timing


class Generation(BaseModel):
    """The answer to a synchronous generation."""

    id: str
    object: Literal["video.generation"]
    created: int
    model: str
    data: list[GenerationItem]
    size: str
    seconds: str
    output_format: Literal["mp4"]
    usage: Usage
    helios: GenerationDetails


class VideoUrls(BaseModel):
    """Absolute addresses; null where this server offers none."""

    content: str
    stream: str | None
    events: str | None
    hls: str | None


class ContinuedFrames(BaseModel):
    """Frames of the video that was sent, from 0; both ends are in."""

    first: int
    last: int


class VideoDetails(BaseModel):
    """What a job asked for and how far it is."""

    state: Literal["queued", "in_progress", "completed", "failed", "cancelled", "expired"]
    num_frames: int
    num_chunks: int
    chunks_done: int
    fps: int | float
    seed: int
    steps: list[int]
    approximations: list[str]
    queue_position: int | None
    eta_seconds: float | None
    urls: VideoUrls
    timing: Timing
    usage: Usage
    warnings: list[WarningItem]
    user: str | None
    metadata: dict[str, str] | None
    extended_from_video_id: str | None
    continued_frames: ContinuedFrames | None = Field(
        description="Frames of a video that was sent to be extended which begin this one; null for other videos."
    )


class ErrorDetail(BaseModel):
    """What went wrong: `param` is the dotted path of the field at fault, `code` is stable."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(BaseModel):
    """Every error, of every route."""

    error: ErrorDetail


class Video(BaseModel):
    """A job and its video."""

    id: str
    object: Literal["video"]
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    prompt: str
    size: str
    seconds: str
    error: ErrorDetail | None
    remixed_from_video_id: str | None
    helios: VideoDetails


class VideoList(BaseModel):
    """A page of jobs; ask for the next one with `after` = `last_id`."""

    object: Literal["list"]
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(BaseModel):
    """The job and its files are gone."""

    id: str
    object: Literal["video.deleted"]
    deleted: Literal[True]


class ModelDetails(BaseModel):
    """What a served checkpoint can do."""

    variant: str
    tasks: list[str]
    frames_per_chunk: int
    size_multiple: int
    num_stages: int
    recommended_sizes: list[str]
    max_pixels: int
    max_frames: int
    default_fps: int
    default_steps: list[int]
    example_prompt: str | None
    codecs: list[str]
    approximations: list[str]
    measured_fps: dict[str, float] | None


class ModelItem(BaseModel):
    """A served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["helios"]
    helios: ModelDetails


class ModelList(BaseModel):
    """All served models."""

    object: Literal["list"]
    data: list[ModelItem]
