"""The nouns that cross a process boundary: requests, parameters, progress, results.

Data only: no torch, no numpy, no I/O. All are frozen; derived values are properties or pure methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LATENT_FRAMES_PER_CHUNK = 9
"""Latent frames that are denoised together."""

FRAMES_PER_CHUNK = 33
"""Pixel frames of a chunk: 1 + 4 * (9 - 1)."""

HISTORY_FRAMES = (16, 2, 1)
"""Latent frames of the long, mid and short (1x) history, oldest first."""

NUM_TRAIL_CHUNKS = -(-sum(HISTORY_FRAMES) // LATENT_FRAMES_PER_CHUNK)
"""Chunks that the history reaches back."""

MAX_TEXT_TOKENS = 512
"""Prompt tokens that the transformer attends to; shorter prompts are zero-padded, longer ones cut."""

Variant = Literal["base", "mid", "distilled"]
Approximation = Literal["history_reuse", "step_cache"]
Guidance = Literal["cfg", "cfg_zero_star"]
FramePolicy = Literal["trim", "pad", "reference"]
ImageFit = Literal["crop", "stretch"]
Task = Literal["t2v", "i2v", "v2v"]
ServiceClass = Literal["realtime", "offline"]
Codec = Literal["h264", "vp9", "av1"]
Role = Literal["encoder", "dit", "vae"]
PlayState = Literal["running", "paused", "waiting_for_credit"]


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
    example_prompt: str | None = None
    """One that shows what the checkpoint can do."""
    approximations: tuple[Approximation, ...] = ()
    """What the server, not the checkpoint, says of every video that begins."""

    @property
    def default_size(self) -> tuple[int, int]:
        return self.recommended_sizes[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    """From `chunk` on a video has a new history, as if it began there, and draws from a new generator with `seed`."""

    chunk: int
    seed: int


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
    restarts: tuple[Restart, ...] = ()
    """Of a session, rising in their chunks."""
    approximations: tuple[Approximation, ...] = ()
    """Ways to less work that make another video."""

    @property
    def num_chunks(self) -> int:
        return max(1, -(-self.num_frames // FRAMES_PER_CHUNK))

    @property
    def num_stages(self) -> int:
        return len(self.steps)

    @property
    def uses_guidance(self) -> bool:
        """Whether a second, unconditional sequence is evaluated at each step."""
        return self.guidance_scale > 1.0

    @property
    def num_zeroed_steps(self) -> int:
        """At most how many steps at the start of a chunk's first stage take zero flow, and so no forward.

        The reference zeroes one step more than `zero_steps` says.
        """
        return self.zero_steps + 1 if self.use_zero_init and self.uses_guidance else 0

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

    def start_of(self, chunk: int) -> int:
        """The chunk that begins the history which `chunk` sees."""
        if not self.restarts:
            return 0
        return max((restart.chunk for restart in self.restarts if restart.chunk <= chunk), default=0)

    def seed_at(self, chunk: int) -> int | None:
        """The seed with which `chunk` begins anew; None when it does not."""
        return next((restart.seed for restart in self.restarts if restart.chunk == chunk), None)

    def steps_in(self, chunk: int) -> tuple[int, ...]:
        """Steps per stage of `chunk`; an amplified first chunk takes twice as many."""
        if self.amplify_first_chunk and chunk == self.start_of(chunk):
            return tuple(2 * n for n in self.steps)
        return self.steps

    def steps_from(self, first: int) -> int:
        """Steps of chunk `first` and all after it."""
        num_chunks = self.num_chunks
        num_made = max(0, num_chunks - first)
        if self.amplify_first_chunk:
            starts = {0, *(restart.chunk for restart in self.restarts)}
            num_made += sum(first <= chunk < num_chunks for chunk in starts)
        return sum(self.steps) * num_made

    @property
    def total_steps(self) -> int:
        return self.steps_from(0)


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
class Start:
    """What the encoder made of a request's image or video, kept from an earlier run so that it is not encoded again.

    record: its starting history, as `Executor.read` gives it. generator_state: before chunk 0.
    """

    task: Task
    record: bytes
    generator_state: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoRequest:
    """What a caller asked for, validated and complete.

    `prompts` is a schedule: rising chunks, the first at 0. At most one of `image` (one frame), `video` and `start` is
    set; the first two already have the size of the output.
    """

    request_id: str
    prompts: tuple[PromptChange, ...]
    params: SamplingParams
    negative_prompt: str = ""
    image: Frames | None = None
    video: Frames | None = None
    start: Start | None = None
    service_class: ServiceClass = "offline"
    tenant: str = "default"
    priority: int = 0
    is_strict: bool = False
    """`reproducible: strict`: never shares a forward with another request."""
    is_interactive: bool = False
    """A session that takes prompt changes while it plays: it runs ahead less."""
    is_open_ended: bool = False
    """It goes on until it is stopped; `params.num_frames` is a bound that is not planned for."""

    @property
    def task(self) -> Task:
        if self.start is not None:
            return self.start.task
        if self.image is not None:
            return "i2v"
        return "t2v" if self.video is None else "v2v"

    def prompt_at(self, chunk: int) -> str:
        """The prompt that took over last."""
        return [change for change in self.prompts if change.chunk <= chunk][-1].prompt

    def prompt_weight(self, chunk: int) -> float:
        """How much of the prompt that took over last is in `chunk`: 1 outside transitions."""
        change = [change for change in self.prompts if change.chunk <= chunk][-1]
        return 1.0 if change.chunk == 0 else min(1.0, (chunk - change.chunk + 1) / max(1, change.transition_chunks))

    def pinned_chunk(self, chunk: int) -> int | None:
        """The earlier chunk whose first frame is pinned while `chunk` is made; None while it is the input's, or none
        is."""
        start = self.params.start_of(chunk)
        if self.params.skip_first_chunk and chunk >= start + 2:
            return start + 1
        return start if self.task == "t2v" and chunk > start else None


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
    """A tensor, or a few that belong together, on some worker. The engine passes it on and cannot open it.

    `key` is unique over requests, chunks and attempts; `num_bytes` is what a worker that reads it may have to move.
    """

    key: str
    num_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkRecord:
    """What one finished chunk leaves behind, never changed again. Conditioning and the records of a request's chunks so
    far are all that any DiT group needs to run the next one.

    latents: [C, 9, h, w] float32, normalised. generator_state: of the request's CPU generator after the chunk.
    """

    chunk: int
    latents: TensorRef
    generator_state: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume:
    """Where a request goes on that was begun before, by another engine or another request.

    records: of the last chunks that the history reaches, the pinned one and those in `undecoded`. generator_state:
    before `next_chunk`; empty where nothing was made yet although there are chunks: they are its caller's own, and
    `next_chunk` begins from what the encoder leaves. undecoded: earlier chunks whose segments are still to be made; all
    others have theirs.
    """

    next_chunk: int
    records: tuple[ChunkRecord, ...]
    generator_state: bytes
    undecoded: tuple[int, ...] = ()
    is_suspect: bool = False
    """It was running when a worker was lost: it runs alone next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeTask:
    """The prompts and media of one request, given to one encoder. `conditioning`: an earlier result for the request,
    of which only the prompts are made anew."""

    task_id: str
    request: VideoRequest
    conditioning: TensorRef | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkTask:
    """One chunk of one request, given to one DiT group.

    trail: latents of the chunks just before, oldest first: as many as the history window reaches, at most three.
    first: latents of the chunk whose first frame is pinned; None while the conditioning's own frame, or none, is.
    generator_state: before the chunk. seed: begins a new generator instead. parked: the progress of an earlier, parked
    run of this chunk.
    """

    task_id: str
    request_id: str
    chunk: int
    conditioning: TensorRef
    trail: tuple[TensorRef, ...]
    first: TensorRef | None
    generator_state: bytes
    parked: TensorRef | None
    predicted_s: float
    seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeTask:
    """The latents of one finished chunk, given to one VAE worker. `is_due`: a viewer waits for it, so that it goes
    before the next step where the VAE shares its device with a DiT group."""

    task_id: str
    request_id: str
    chunk: int
    params: SamplingParams
    latents: TensorRef
    is_due: bool


RoleTask = EncodeTask | ChunkTask | DecodeTask
"""What a group is given. `task_id` names request, role, chunk and attempt: the answer to any other attempt is stale."""

Signal = Literal["park", "abort"]
"""What a running chunk may be told: leave at the next step boundary and keep the progress, or lose it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A stretch of work on a worker: `name` is one of API.md's phases, times are seconds of the Unix clock."""

    name: Literal["text_encode", "image_encode", "video_encode", "chunk", "decode", "mux"]
    started_s: float
    ended_s: float

    @property
    def seconds(self) -> float:
        return max(0.0, self.ended_s - self.started_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupUp:
    """A group can take tasks. Encoders and VAE workers are groups of one rank.

    incarnation: counts the times that the group was made anew. golden: the digest of the fixed chunk that a DiT group
    runs before it says that it is up; equal in all groups of the same device type and number of ranks.
    """

    group: str
    role: Role
    num_ranks: int
    incarnation: int
    golden: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenCheck:
    """The golden chunk of a DiT group that is up, made once more.

    expected: its digest when the group came up. found: its digest now; None where it could not be made, and `problem`
    says why.
    """

    group: str
    expected: str | None
    found: str | None
    problem: str | None = None

    @property
    def is_right(self) -> bool:
        return self.found is not None and self.found == self.expected


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupLost:
    """A group is gone, in this incarnation, with everything that it was running; GroupUp follows if it comes back."""

    group: str
    incarnation: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """A group is alive. `progress` grows with every step or task; `task_ids` are the tasks that it has."""

    group: str
    incarnation: int
    progress: int
    task_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A request's conditioning is ready; `generator_state` is what chunk 0 begins from."""

    task_id: str
    conditioning: TensorRef
    generator_state: bytes
    phases: tuple[Phase, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone:
    """One forward of a DiT group is done; it held the current step of each of these tasks."""

    group: str
    task_ids: tuple[str, ...]
    device_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskDone:
    """A chunk is denoised."""

    task_id: str
    latents: TensorRef
    generator_state: bytes
    phase: Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class Parked:
    """A chunk left its group at a step boundary; `state` is its progress."""

    task_id: str
    state: TensorRef


@dataclass(frozen=True, slots=True, kw_only=True)
class Aborted:
    """A chunk left its group at a step boundary; nothing is kept."""

    task_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """A chunk is decoded and encoded. `latents_digest` is the BLAKE2b-128 of its float32 latents, in hexadecimal."""

    task_id: str
    segment: Segment
    latents_digest: str
    phases: tuple[Phase, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFailed:
    """A group could not do a task and goes on with its others.

    fault: `request` is the caller's and final; after `nan` (the latents are not finite), `out_of_memory` (even alone)
    and `error` the task may be tried again. code and message are for the caller.
    """

    task_id: str
    fault: Literal["request", "nan", "out_of_memory", "error"]
    code: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PackLimit:
    """A pack ran out of memory: forwards of at most `max_tokens` tokens are known to fit this DiT group."""

    group: str
    max_tokens: int


ExecutorEvent = (
    GroupUp | GroupLost | Beat | Encoded | StepDone | TaskDone | Parked | Aborted | Decoded | TaskFailed | PackLimit
)
"""What an executor tells the engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """One step of a request is done: `cursor` is that step."""

    request_id: str
    cursor: StepCursor
    device_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A request's conditioning is there; readable until the request ends. generator_state: before chunk 0."""

    request_id: str
    conditioning: TensorRef
    generator_state: bytes
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkStarted:
    """A chunk was given to a DiT group, whose pack then holds `num_sharing` chunks."""

    request_id: str
    chunk: int
    num_sharing: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkReady:
    """A chunk is denoised. Its latents stay readable until the request's keeper says that they are committed."""

    request_id: str
    record: ChunkRecord
    attempt: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentReady:
    """A chunk is decoded and encoded. seconds: decoding, and muxing."""

    segment: Segment
    seconds: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlayChanged:
    """A session's generation stands still or goes on."""

    request_id: str
    state: PlayState


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


Event = Progress | Prepared | ChunkStarted | ChunkReady | SegmentReady | PlayChanged | Completed | Failure
"""What an engine yields for a submitted request; ends with Completed or Failure."""
