"""Predicts the seconds of transformer steps, packs of steps and chunks, and learns from what it observes.

Knows the floating-point operations of a step, one prior per device and the factors measured so far. Knows nothing of
deadlines, tenants or groups' states; no clock, no I/O, no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from helios_serve.types import HISTORY_FRAMES, LATENT_FRAMES_PER_CHUNK, MAX_TEXT_TOKENS, SamplingParams, StepCursor

ALPHA: Final = 0.1
"""Weight of a new sample once a factor has seen ten."""
SLOW_FACTOR: Final = 2.5
"""A sample above this multiple of its factor is a slow step: ignored, unless it is the fifth in a row."""
SLOW_RUN: Final = 5
WARMUP_STEPS: Final = 2
"""Steps after a load or a compilation that teach nothing."""
PUBLISH_MOVE: Final = 0.02
"""A factor enters predictions when it has moved by this share, so that cached predictions live for many steps."""
MIXED: Final = -1
"""In place of a stage: a pack whose members stand at different ones."""
REFERENCE_PIXELS: Final = 640 * 384
"""The picture size that `DevicePrior.decode_s` is stated for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What the operation count of a checkpoint depends on; `patch` is the noisy patch in latent cells (t, h, w)."""

    dim: int = 5120
    ffn_dim: int = 13824
    num_layers: int = 40
    patch: tuple[int, int, int] = (1, 2, 2)
    spatial_scale: int = 8
    text_tokens: int = MAX_TEXT_TOKENS
    text_kv_is_cached: bool = True

    def noisy_tokens(self, params: SamplingParams, stage: int) -> int:
        """Tokens N of a noisy chunk at pyramid `stage`; each stage below the last halves both sides."""
        shrink = self.spatial_scale << (params.num_stages - 1 - stage)
        frames, rows, columns = self.patch
        height, width = params.height // shrink // rows, params.width // shrink // columns
        return LATENT_FRAMES_PER_CHUNK // frames * max(1, height) * max(1, width)

    def history_tokens(self, params: SamplingParams) -> int:
        """Tokens H of the history: long at 1/4 of the patch rate, mid at 1/2, short and the pinned frame at full."""
        long, mid, short = HISTORY_FRAMES
        terms = ((long, 4), (mid, 2), (short + 1, 1))
        return sum(self._history_term(params, frames, rate) for frames, rate in terms)

    def _history_term(self, params: SamplingParams, frames: int, rate: int) -> int:
        step, rows, columns = (rate * side for side in self.patch)
        height, width = params.height // self.spatial_scale, params.width // self.spatial_scale
        return math.ceil(frames / step) * math.ceil(height / rows) * math.ceil(width / columns)

    def step_flops(self, noisy: int, history: int) -> float:
        """Operations of one forward of one sequence of `noisy` + `history` tokens (RELIABILITY.md 4.11)."""
        total, d, keys = noisy + history, self.dim, self.text_tokens
        layer = 8 * total * d**2 + 4 * total * d * self.ffn_dim + 4 * total**2 * d + 4 * noisy * d**2
        layer += 4 * noisy * keys * d
        if not self.text_kv_is_cached:
            layer += 4 * keys * d**2
        return float(self.num_layers * layer)


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePrior:
    """What is assumed of a device before anything was measured; rates in units per second, times in seconds."""

    name: str = "h100"
    flops_per_s: float = 700e12
    floor_s: float = 0.010
    """Least time of a forward, whatever its size: launches, or the replay of a graph."""
    latency_s: float = 15e-6
    """One all-to-all; a layer makes four when a group has several ranks."""
    bytes_per_s: float = 300e9
    decode_s: float = 0.2
    """Decode and encode one chunk of 640x384."""
    commit_s: float = 0.025
    text_s: float = 0.05
    media_s: float = 0.5
    vae_on_device: bool = False
    """Whether decodes take their time from the device that also runs the steps."""

    def scaled(self, factor: float) -> DevicePrior:
        """The same device believed to need `factor` times as long for a step."""
        return DevicePrior(
            name=self.name,
            flops_per_s=self.flops_per_s / factor,
            floor_s=self.floor_s * factor,
            latency_s=self.latency_s * factor,
            bytes_per_s=self.bytes_per_s / factor,
            decode_s=self.decode_s,
            commit_s=self.commit_s,
            text_s=self.text_s,
            media_s=self.media_s,
            vae_on_device=self.vae_on_device,
        )


CPU_PRIOR: Final = DevicePrior(
    name="cpu", flops_per_s=20e9, floor_s=0.002, decode_s=8.0, text_s=0.2, media_s=2.0, vae_on_device=True
)
"""A few laptop cores in float32; the factors correct it within a chunk."""


@dataclass(slots=True, kw_only=True)
class Factor:
    """Observed over predicted: the mean of the first ten samples, then an EWMA; `spread` is the mean error."""

    value: float = 1.0
    spread: float = 0.05
    num_samples: int = 0
    num_slow_in_row: int = 0
    published: float = 1.0

    def add(self, sample: float) -> bool:
        """Take one sample in; False when it counts as a slow step and was ignored."""
        if sample > SLOW_FACTOR * self.value:
            self.num_slow_in_row += 1
            if self.num_slow_in_row < SLOW_RUN:
                return False
            self.value, self.num_samples = sample, 1
        else:
            weight = max(ALPHA, 1 / (self.num_samples + 1))
            if self.num_samples > 0:
                self.spread += max(ALPHA, 1 / (self.num_samples + 1)) * (abs(sample - self.value) - self.spread)
            self.value += weight * (sample - self.value)
            self.num_samples += 1
        self.num_slow_in_row = 0
        return True

    def publish(self) -> bool:
        """Make the value the one that predictions use, if it moved enough; whether it did."""
        if abs(self.value - self.published) <= PUBLISH_MOVE * self.published:
            return False
        self.published = self.value
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """One step of one job: its sequences (two with guidance), their tokens and operations together; all 0 for a step
    that takes zero flow instead of a forward."""

    stage: int
    num_sequences: int
    num_tokens: int
    flops: float


@dataclass(slots=True, kw_only=True, eq=False)
class ChunkTiming:
    """Predictions for one kind of chunk on groups of `num_ranks`; entry i of a list stands before step i.

    Owned by the cost model, which refreshes it; shared by all jobs with such chunks. Times in seconds.
    """

    key: int
    num_ranks: int
    steps: tuple[StepShape, ...]
    pixel_ratio: float
    tflop_left: tuple[float, ...]
    version: int = -1
    remaining_s: list[float] = field(default_factory=list)
    lead_s: list[float] = field(default_factory=list)
    """Remaining steps + 2 sigma of them + decode, encode and commit: what must fit before the deadline."""
    occupied_s: float = 0.0
    """Group seconds of the whole chunk, the decode included where it shares the device."""


Slot = tuple[ChunkTiming, int]
"""A chunk and the index of its next step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSample:
    """One forward as it was observed: what it held and how long it took."""

    num_ranks: int
    steps: tuple[StepShape, ...]
    seconds: float
    steps_since_load: int = WARMUP_STEPS


class CostModel:
    """Seconds of everything the scheduler weighs: prior times measured factor, per bucket (RELIABILITY.md 4.11)."""

    def __init__(self, shape: ModelShape, prior: DevicePrior) -> None:
        self.shape = shape
        self.prior = prior
        self.version = 0
        self.vae_queue_s = 0.0
        """Seconds that a chunk finished now waits for a VAE; set by the engine before it plans."""
        self.num_slow_steps = 0
        self._factors: dict[str, Factor] = {}
        self._timings: dict[tuple[object, ...], ChunkTiming] = {}
        self._pack_memo: dict[tuple[tuple[int, int], ...], tuple[float, ...]] = {}

    def timing(self, params: SamplingParams, chunk: int, num_ranks: int) -> ChunkTiming:
        """The shared, up-to-date predictions for chunks like `chunk` of a video with `params`."""
        steps = params.steps_in(chunk)
        key = (params.width, params.height, steps, params.uses_guidance, params.num_zeroed_steps, num_ranks)
        if key not in self._timings:
            self._timings[key] = self._new_timing(params, steps, num_ranks)
        timing = self._timings[key]
        if timing.version != self.version:
            self.refresh(timing)
        return timing

    def _new_timing(self, params: SamplingParams, steps: tuple[int, ...], num_ranks: int) -> ChunkTiming:
        history, sequences = self.shape.history_tokens(params), 2 if params.uses_guidance else 1
        shapes: list[StepShape] = []
        for stage, count in enumerate(steps):
            noisy = self.shape.noisy_tokens(params, stage)
            step = StepShape(
                stage=stage,
                num_sequences=sequences,
                num_tokens=sequences * (noisy + history),
                flops=sequences * self.shape.step_flops(noisy, history),
            )
            num_zeroed = min(count, params.num_zeroed_steps) if stage == 0 else 0
            zeroed = StepShape(stage=stage, num_sequences=0, num_tokens=0, flops=0.0)
            shapes += [zeroed] * num_zeroed + [step] * (count - num_zeroed)
        left = [0.0]
        for step in reversed(shapes):
            left.append(left[-1] + step.flops / 1e12)
        return ChunkTiming(
            key=len(self._timings),
            num_ranks=num_ranks,
            steps=tuple(shapes),
            pixel_ratio=params.width * params.height / REFERENCE_PIXELS,
            tflop_left=tuple(reversed(left)),
        )

    def refresh(self, timing: ChunkTiming) -> None:
        """Recompute `timing` from the published factors."""
        tail = self.decode_s(timing.pixel_ratio) + self.prior.commit_s
        remaining, variance = [0.0], 0.0
        lead = [tail]
        for step in reversed(timing.steps):
            seconds = self.forward_s(timing.num_ranks, (step,))
            variance += (seconds * self._relative_spread(timing.num_ranks, step)) ** 2
            remaining.append(remaining[-1] + seconds)
            lead.append(remaining[-1] + 2 * math.sqrt(variance) + tail)
        timing.remaining_s, timing.lead_s = remaining[::-1], lead[::-1]
        shared = self.decode_s(timing.pixel_ratio) if self.prior.vae_on_device else 0.0
        timing.occupied_s = timing.remaining_s[0] + shared
        timing.version = self.version

    def step_s(self, num_ranks: int, pack: Sequence[tuple[SamplingParams, StepCursor]]) -> float:
        """Seconds of one forward that holds the step at each cursor."""
        return self.forward_s(num_ranks, self.step_shapes(num_ranks, pack))

    def step_shapes(self, num_ranks: int, pack: Sequence[tuple[SamplingParams, StepCursor]]) -> tuple[StepShape, ...]:
        """The shapes of the steps at each cursor, as `StepSample` wants them."""
        return tuple(
            self.timing(params, cursor.chunk, num_ranks).steps[step_index(params, cursor)] for params, cursor in pack
        )

    def remaining_s(self, num_ranks: int, params: SamplingParams, cursor: StepCursor) -> float:
        """Seconds of the steps left in the cursor's chunk, this one included, run alone."""
        return self.timing(params, cursor.chunk, num_ranks).remaining_s[step_index(params, cursor)]

    def pack_finish_s(self, slots: Sequence[Slot]) -> tuple[float, ...]:
        """Seconds from now until each chunk of a pack has made its last step, all starting at the next boundary."""
        key = tuple((timing.key, step) for timing, step in slots)
        known = self._pack_memo.get(key)
        if known is None:
            known = self._pack_memo[key] = self._run_pack(slots)
        return known

    def _run_pack(self, slots: Sequence[Slot]) -> tuple[float, ...]:
        num_ranks, elapsed, offset = slots[0][0].num_ranks, 0.0, 0
        finish = [0.0] * len(slots)
        active = [i for i, (timing, step) in enumerate(slots) if step < len(timing.steps)]
        while active:
            shapes = tuple(slots[i][0].steps[slots[i][1] + offset] for i in active)
            elapsed += self.forward_s(num_ranks, shapes)
            offset += 1
            for i in active:
                finish[i] = elapsed
            active = [i for i in active if slots[i][1] + offset < len(slots[i][0].steps)]
        return tuple(finish)

    def decode_s(self, pixel_ratio: float = 1.0) -> float:
        """Seconds to decode and encode a chunk with `pixel_ratio` times the pixels of 640x384."""
        return self.prior.decode_s * pixel_ratio * self._published("decode")

    def text_s(self) -> float:
        """Seconds to encode a prompt."""
        return self.prior.text_s * self._published("text")

    def media_s(self) -> float:
        """Seconds to encode an image or a video input."""
        return self.prior.media_s * self._published("media")

    def observe(self, sample: StepSample) -> float:
        """Learn from one forward; returns predicted over observed seconds (the metric)."""
        steps = _with_forward(sample.steps)
        if not steps:
            return 1.0
        predicted = self.forward_s(sample.num_ranks, steps)
        if sample.steps_since_load >= WARMUP_STEPS:
            prior = self._prior_s(sample.num_ranks, steps)
            self._learn(_bucket(sample.num_ranks, steps), sample.seconds / prior)
        return predicted / sample.seconds

    def observe_decode(self, pixel_ratio: float, seconds: float) -> None:
        """Learn from one decode and encode of a chunk."""
        self._learn("decode", seconds / (self.prior.decode_s * pixel_ratio))

    def observe_text(self, seconds: float) -> None:
        """Learn from one prompt encoding."""
        self._learn("text", seconds / self.prior.text_s)

    def observe_media(self, seconds: float) -> None:
        """Learn from one encoding of an image or a video input."""
        self._learn("media", seconds / self.prior.media_s)

    def to_dict(self) -> dict[str, list[float]]:
        """The factors as plain data: bucket -> [value, spread, samples]."""
        return {key: [f.value, f.spread, float(f.num_samples)] for key, f in sorted(self._factors.items())}

    def load_dict(self, saved: Mapping[str, Sequence[float]]) -> None:
        """Take over factors that `to_dict` gave."""
        for key, (value, spread, samples) in saved.items():
            self._factors[key] = Factor(value=value, spread=spread, num_samples=int(samples), published=value)
        self._bump()

    def _learn(self, bucket: str, sample: float) -> None:
        factor = self._factors.get(bucket)
        if factor is None:
            factor = self._factors[bucket] = Factor()
        if not factor.add(sample):
            self.num_slow_steps += 1
        elif factor.publish() or factor.num_samples == 1:
            self._bump()

    def _bump(self) -> None:
        self.version += 1
        self._pack_memo.clear()

    def _published(self, bucket: str) -> float:
        factor = self._factors.get(bucket)
        return 1.0 if factor is None else factor.published

    def forward_s(self, num_ranks: int, steps: tuple[StepShape, ...]) -> float:
        """Seconds of one forward that holds `steps`; 0 if none of them needs one."""
        steps = _with_forward(steps)
        return self._prior_s(num_ranks, steps) * self._factor_of(num_ranks, steps) if steps else 0.0

    def _prior_s(self, num_ranks: int, steps: tuple[StepShape, ...]) -> float:
        flops = sum(step.flops for step in steps)
        compute = max(self.prior.floor_s, flops / (num_ranks * self.prior.flops_per_s))
        if num_ranks == 1:
            return compute
        moved = 4 * sum(step.num_tokens for step in steps) * self.shape.dim * 2 * (num_ranks - 1) / num_ranks**2
        return compute + self.shape.num_layers * (4 * self.prior.latency_s + moved / self.prior.bytes_per_s)

    def _factor_of(self, num_ranks: int, steps: tuple[StepShape, ...]) -> float:
        """The bucket's own factor; an unmeasured pack takes its members' (by operations), a lone step the mean."""
        own = self._factors.get(_bucket(num_ranks, steps))
        if own is not None and own.num_samples > 0:
            return own.published
        if len(steps) > 1:
            total = sum(step.flops for step in steps)
            return sum(step.flops * self._factor_of(num_ranks, (step,)) for step in steps) / total
        same_ranks = [f for key, f in self._factors.items() if key.startswith(f"p{num_ranks}/")]
        known = same_ranks or [f for key, f in self._factors.items() if key.startswith("p")]
        return sum(f.published for f in known) / len(known) if known else 1.0

    def _relative_spread(self, num_ranks: int, step: StepShape) -> float:
        if not step.num_sequences:
            return 0.0
        factor = self._factors.get(_bucket(num_ranks, (step,)))
        return 0.05 if factor is None else factor.spread / factor.value


def _with_forward(steps: tuple[StepShape, ...]) -> tuple[StepShape, ...]:
    return tuple(step for step in steps if step.num_sequences)


def step_index(params: SamplingParams, cursor: StepCursor) -> int:
    """How many steps of its chunk come before the cursor."""
    return sum(params.steps_in(cursor.chunk)[: cursor.stage]) + cursor.step


def _bucket(num_ranks: int, steps: tuple[StepShape, ...]) -> str:
    """Ranks, stage (m when mixed), half-octave of the mean sequence length, power of two of the sequences."""
    first = steps[0]
    if len(steps) == 1:
        return _bucket_name(num_ranks, first.stage, first.num_tokens, first.num_sequences)
    stage = first.stage if all(step.stage == first.stage for step in steps) else MIXED
    tokens, sequences = sum(step.num_tokens for step in steps), sum(step.num_sequences for step in steps)
    return _bucket_name(num_ranks, stage, tokens, sequences)


@lru_cache(maxsize=4096)
def _bucket_name(num_ranks: int, stage: int, tokens: int, sequences: int) -> str:
    name = "m" if stage == MIXED else str(stage)
    return f"p{num_ranks}/s{name}/n{round(2 * math.log2(tokens / sequences))}/k{(sequences - 1).bit_length()}"
