"""The nouns that cross a process boundary: requests, parameters, progress, results.

Data only: no torch, no numpy, no I/O. All are frozen; derived values are properties or pure methods.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

LATENT_FRAMES_PER_CHUNK = 9
"""Latent frames that are denoised together."""

FRAMES_PER_CHUNK = 33
"""Pixel frames of a chunk: 1 + 4 * (9 - 1)."""

HISTORY_FRAMES = (16, 2, 1)
"""Latent frames of the long, mid and short (1x) history, oldest first."""

MAX_TEXT_TOKENS = 512
"""Prompt tokens that the transformer attends to; shorter prompts are zero-padded, longer ones cut."""

Variant = Literal["base", "mid", "distilled"]
Guidance = Literal["cfg", "cfg_zero_star"]
FramePolicy = Literal["trim", "pad", "reference"]
ImageFit = Literal["crop", "stretch"]
Task = Literal["t2v", "i2v", "v2v"]
ServiceClass = Literal["realtime", "offline"]
Codec = Literal["h264", "vp9", "av1"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What a served checkpoint is and allows, read from its own configs, never from its path."""

    name: str
    variant: Variant
    num_stages: int
    guidance: Guidance
    size_multiple: int
    """Both sides of a video must be multiples of this: VAE scale x patch side x 2^(stages - 1)."""
    spatial_scale: int
    """Pixels per latent cell on each side."""
    latent_channels: int
    default_steps: tuple[int, ...]
    default_guidance_scale: float
    recommended_sizes: tuple[tuple[int, int], ...]
    """(width, height) pairs, the default first."""
    max_pixels: int

    @property
    def default_size(self) -> tuple[int, int]:
        return self.recommended_sizes[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Everything numeric about one video, complete: no field is resolved later.

    `steps` counts transformer evaluations per pyramid stage, coarse to fine; Base has one stage.
    """

    width: int
    height: int
    num_frames: int
    fps: float
    seed: int
    steps: tuple[int, ...]
    guidance_scale: float
    amplify_first_chunk: bool = False
    skip_first_chunk: bool = False
    use_zero_init: bool = False
    zero_steps: int = 1
    image_noise_sigma_min: float = 0.111
    image_noise_sigma_max: float = 0.135
    video_noise_sigma_min: float = 0.111
    video_noise_sigma_max: float = 0.135
    frame_policy: FramePolicy = "trim"
    image_fit: ImageFit = "crop"
    crf: int = 23
    codec: Codec = "h264"

    @property
    def num_chunks(self) -> int:
        return max(1, math.ceil(self.num_frames / FRAMES_PER_CHUNK))

    @property
    def num_stages(self) -> int:
        return len(self.steps)

    @property
    def uses_guidance(self) -> bool:
        """Whether a second, unconditional sequence is evaluated at each step."""
        return self.guidance_scale > 1.0

    @property
    def num_output_frames(self) -> int:
        """Pixel frames of the finished video under `frame_policy`."""
        whole = FRAMES_PER_CHUNK * self.num_chunks
        if self.frame_policy == "trim":
            return self.num_frames
        return whole if self.frame_policy == "pad" else (whole - 1) // 4 * 4 + 1

    def frames_in(self, chunk: int) -> int:
        """Pixel frames of `chunk` that belong to the finished video; at least one."""
        return min(FRAMES_PER_CHUNK, self.num_output_frames - FRAMES_PER_CHUNK * chunk)

    def steps_in(self, chunk: int) -> tuple[int, ...]:
        """Steps per stage of `chunk`; an amplified first chunk takes twice as many."""
        factor = 2 if self.amplify_first_chunk and chunk == 0 else 1
        return tuple(factor * n for n in self.steps)

    @property
    def total_steps(self) -> int:
        return sum(sum(self.steps_in(chunk)) for chunk in range(self.num_chunks))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCursor:
    """Which step of a video comes next; advancing it is a pure function of the parameters."""

    chunk: int
    stage: int = 0
    step: int = 0

    def next(self, params: SamplingParams) -> StepCursor:
        """The cursor after this step; past the last step it stands at the next chunk."""
        steps = params.steps_in(self.chunk)
        if self.step + 1 < steps[self.stage]:
            return StepCursor(chunk=self.chunk, stage=self.stage, step=self.step + 1)
        if self.stage + 1 < len(steps):
            return StepCursor(chunk=self.chunk, stage=self.stage + 1)
        return StepCursor(chunk=self.chunk + 1)

    def ends_chunk(self, params: SamplingParams) -> bool:
        """Whether this step is the last one of its chunk."""
        return self.next(params).chunk != self.chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptChange:
    """One entry of a prompt schedule: `prompt` takes over at `chunk`.

    With `transition_chunks` N > 1 the i-th affected chunk (i = 1..N) uses the blend old + i/N * (new - old).
    """

    chunk: int
    prompt: str
    transition_chunks: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Frames:
    """Decoded pixels: `data` is uint8 RGB of shape [num_frames, height, width, 3], row-major."""

    data: bytes
    num_frames: int
    height: int
    width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoRequest:
    """What a caller asked for, validated and complete.

    `prompts` is a schedule: rising chunks, the first at 0. At most one of `image` (one frame) and `video` is set; both
    already have the size of the output.
    """

    request_id: str
    prompts: tuple[PromptChange, ...]
    params: SamplingParams
    negative_prompt: str = ""
    image: Frames | None = None
    video: Frames | None = None
    service_class: ServiceClass = "offline"
    tenant: str = "default"
    priority: int = 0

    @property
    def task(self) -> Task:
        if self.image is not None:
            return "i2v"
        return "t2v" if self.video is None else "v2v"


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """The encoded frames of one chunk: `media` is moof + mdat, `init` is ftyp + moov (the same for every segment)."""

    request_id: str
    chunk: int
    start_frame: int
    num_frames: int
    init: bytes
    media: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRef:
    """A tensor, or a few that belong together, on some worker. The engine passes it on and cannot open it."""

    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkTask:
    """One chunk of one request, given to one DiT group."""

    request_id: str
    chunk: int
    conditioning: TensorRef
    continuation: TensorRef


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeTask:
    """The latents of one finished chunk, given to one VAE worker."""

    request_id: str
    chunk: int
    params: SamplingParams
    latents: TensorRef


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A request's conditioning is ready; `continuation` is what chunk 0 begins from."""

    request_id: str
    conditioning: TensorRef
    continuation: TensorRef


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone:
    """One forward is done: the step of each request that took part."""

    steps: tuple[tuple[str, StepCursor], ...]
    num_sequences: int
    device_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskDone:
    """A chunk is denoised; `continuation` is what the next chunk begins from."""

    request_id: str
    chunk: int
    latents: TensorRef
    continuation: TensorRef


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """A chunk is decoded and encoded."""

    segment: Segment


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFailed:
    """A role could not do its part for one request: an error code, and a message for its caller."""

    request_id: str
    code: str
    message: str


ExecutorEvent = Encoded | StepDone | TaskDone | Decoded | TaskFailed
"""What an executor tells the engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """One step of a request is done: `cursor` is that step."""

    request_id: str
    cursor: StepCursor
    device_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentReady:
    """A chunk is decoded and encoded."""

    segment: Segment


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """All chunks of the request were delivered."""

    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The request ended without a result."""

    request_id: str
    code: str
    message: str


Event = Progress | SegmentReady | Completed | Failure
"""What an engine yields for a submitted request; ends with Completed or Failure."""
