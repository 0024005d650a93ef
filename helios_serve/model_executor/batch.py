"""One chunk in the making: what it needs, its mutable state, and how a predicted flow moves it one step on.

Knows samplers, guidance and schedules; knows nothing of packing, threads or other requests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from helios_serve.config import STEP_CACHE_THRESHOLD
from helios_serve.model_executor import guidance
from helios_serve.model_executor.history import History, HistoryTokens
from helios_serve.model_executor.history_reuse import HistoryKV
from helios_serve.model_executor.model_config import SchedulerConfig
from helios_serve.model_executor.packing import TextKV, TokenSequence
from helios_serve.model_executor.prompt_schedule import PromptEmbedding
from helios_serve.model_executor.rope import Grid
from helios_serve.model_executor.sampling.base import UniPCMemory, UniPCOrders, euler_step, unipc_step
from helios_serve.model_executor.sampling.dmd import dmd_step
from helios_serve.model_executor.sampling.pyramid import block_noise, enlarge, shrink_noise
from helios_serve.model_executor.sampling.schedule import ChunkSchedule, StageSchedule, chunk_schedule
from helios_serve.model_executor.step_cache import StepCache
from helios_serve.model_executor.transformer import HeliosTransformer
from helios_serve.parallel.shards import upload
from helios_serve.types import LATENT_FRAMES_PER_CHUNK, Guidance, SamplingParams, StepCursor


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkInput:
    """Everything that decides the latents of one chunk; any worker can run it.

    `negative` is set exactly when `params.uses_guidance`. `generator_state` is that of the request's CPU generator
    before the chunk.
    """

    task_id: str
    request_id: str
    chunk: int
    params: SamplingParams
    prompt: PromptEmbedding
    negative: PromptEmbedding | None
    history: History
    generator_state: bytes

    @property
    def prompts(self) -> tuple[PromptEmbedding, ...]:
        """The prompt of each sequence."""
        return (self.prompt,) if self.negative is None else (self.prompt, self.negative)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParkedChunk:
    """A chunk taken out between two steps: with its ChunkInput, all that any worker needs to go on as if nothing had
    happened. Tensors keep their dtypes."""

    cursor: StepCursor
    x: Tensor
    stage_start: Tensor
    memory: UniPCMemory | None
    generator_state: bytes

    def tensors(self) -> tuple[Tensor, ...]:
        """All that it holds."""
        if self.memory is None:
            return (self.x, self.stage_start)
        older = () if self.memory.older is None else (self.memory.older,)
        return (self.x, self.stage_start, self.memory.clean, self.memory.last, *older)

    def to(self, device: torch.device) -> ParkedChunk:
        """The same on another device."""
        memory = self.memory
        if memory is not None:
            older = None if memory.older is None else memory.older.to(device)
            memory = replace(memory, clean=memory.clean.to(device), older=older, last=memory.last.to(device))
        return replace(self, x=self.x.to(device), stage_start=self.stage_start.to(device), memory=memory)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkOutput:
    """A finished chunk: `latents` [C, 9, h, w] float32, normalised, and the generator's state after it."""

    task_id: str
    chunk: int
    latents: Tensor
    generator_state: bytes


class NotFiniteError(ArithmeticError):
    """The latents of a chunk hold NaN or infinity."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRules:
    """What the checkpoint, not the request, decides about sampling."""

    scheduler: SchedulerConfig
    guidance: Guidance
    step_cache_threshold: float = STEP_CACHE_THRESHOLD


class ChunkState:
    """The mutable state of one chunk, owned by the runner.

    `x` is the current latents [C, 9, h, w] of the current stage, `cursor` the step that comes next.
    """

    def __init__(
        self,
        chunk: ChunkInput,
        rules: SamplingRules,
        transformer: HeliosTransformer,
        texts: tuple[TextKV, TextKV | None],
        parked: ParkedChunk | None = None,
    ) -> None:
        self.input = chunk
        self.rules = rules
        self._patch = transformer.patch
        self._dtype = transformer.dtype
        self._device = transformer.device
        self._cond, self._uncond = texts
        channels, _, height, width = chunk.history.frames.shape
        self._shape = (channels, LATENT_FRAMES_PER_CHUNK, height, width)
        num_stages = chunk.params.num_stages
        self._grids = tuple(self._grid(num_stages - 1 - stage) for stage in range(num_stages))
        self._rotary = tuple(transformer.current_rotary(grid) for grid in self._grids)
        self._history: HistoryTokens = transformer.embed_history(chunk.history)
        self.schedule: ChunkSchedule = chunk_schedule(
            rules.scheduler,
            chunk.params.steps_in(chunk.chunk),
            tuple(t * h * w for t, h, w in self._grids),
        )
        self._generator = torch.Generator()
        at = self._begin() if parked is None else parked.to(self._device)
        self._generator.set_state(torch.frombuffer(bytearray(at.generator_state), dtype=torch.uint8))
        self.cursor, self.x, self._stage_start, self._memory = at.cursor, at.x, at.stage_start, at.memory
        self._peak = torch.zeros((), device=self._device)  # the largest |x| after any step: NaN and infinity stay
        keeps_history = "history_reuse" in chunk.params.approximations
        num_layers = transformer.config.num_layers
        self._history_kvs = tuple(HistoryKV(num_layers) if keeps_history else None for _ in chunk.prompts)
        self._stage_caches = self._new_step_caches()

    def park(self) -> ParkedChunk:
        """What a ChunkState needs to go on from here."""
        return ParkedChunk(
            cursor=self.cursor,
            x=self.x,
            stage_start=self._stage_start,
            memory=self._memory,
            generator_state=self._generator_state(),
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of the next step's sequences, history included unless it is kept; 0 if it needs none."""
        if not self.needs_forward:
            return 0
        is_kept = any(kept is not None and kept.is_sealed for kept in self._history_kvs)
        per_sequence = (0 if is_kept else len(self._history.tokens)) + math.prod(self._grids[self.cursor.stage])
        return per_sequence if self._uncond is None else 2 * per_sequence

    @property
    def num_computed(self) -> int:
        """Sequences of the next step, once it is predicted, whose flow is computed, not taken from an earlier one."""
        if not self.needs_forward:
            return 0
        return sum(cache is None or not cache.is_reused for cache in self._step_caches)

    @property
    def needs_forward(self) -> bool:
        """Whether the next step takes a predicted flow; CFG-Zero* begins with zero flow instead."""
        is_begun = self.cursor.stage > 0 or self.cursor.step >= self.input.params.num_zeroed_steps
        return is_begun or self.rules.guidance != "cfg_zero_star"

    def sequences(self) -> list[TokenSequence]:
        """The sequences of the next step: the conditional one, and the unconditional one under guidance; none if the
        step needs no forward."""
        if not self.needs_forward:
            return []
        stage = self.cursor.stage
        x = self.x.to(self._dtype)
        timestep = self._stage().model_timesteps[self.cursor.step]
        texts = [self._cond] if self._uncond is None else [self._cond, self._uncond]
        return [
            TokenSequence(
                history=self._history,
                x=x,
                rotary=self._rotary[stage],
                timestep=timestep,
                text=text,
                history_kv=history_kv,
                step_cache=step_cache,
            )
            for text, history_kv, step_cache in zip(texts, self._history_kvs, self._step_caches, strict=True)
        ]

    def advance(self, flows: list[Tensor]) -> None:
        """Moves one step on with the flows of `sequences()`, each [C, T, h, w]; enters the next stage if one ends."""
        if flows:
            self._keep()
        self._solve(self._guided(flows))
        self._peak = torch.maximum(self._peak, torch.linalg.vector_norm(self.x, ord=math.inf, dtype=torch.float32))
        following = self.cursor.next(self.input.params)
        if following.chunk == self.cursor.chunk and following.stage != self.cursor.stage:
            self._enter(following.stage)
        self.cursor = following

    def _keep(self) -> None:
        """What the step at hand leaves for the next ones."""
        for history_kv in self._history_kvs:
            if history_kv is not None and not history_kv.is_sealed:
                history_kv.seal()
        for step_cache in self._step_caches:
            if step_cache is not None:
                step_cache.commit()

    @property
    def _step_caches(self) -> tuple[StepCache | None, ...]:
        """Of the sequences of the next step. The last step of a stage has none: its forward is never left out."""
        is_last = self.cursor.step + 1 == self._stage().num_steps
        return (None,) * len(self._stage_caches) if is_last else self._stage_caches

    def _new_step_caches(self) -> tuple[StepCache | None, ...]:
        is_caching, threshold = "step_cache" in self.input.params.approximations, self.rules.step_cache_threshold
        return tuple(StepCache(threshold) if is_caching else None for _ in self.input.prompts)

    @property
    def is_finished(self) -> bool:
        return self.cursor.chunk != self.input.chunk

    def output(self) -> ChunkOutput:
        """The finished chunk; waits for the device.

        Raises: NotFiniteError if x was not finite after some step.
        """
        assert self.is_finished
        latents = self.x.float()
        if not math.isfinite(self._peak.item()):
            raise NotFiniteError(f"the latents of chunk {self.input.chunk} are not finite")
        return ChunkOutput(
            task_id=self.input.task_id,
            chunk=self.input.chunk,
            latents=latents,
            generator_state=self._generator_state(),
        )

    def _begin(self) -> ParkedChunk:
        """The chunk before its first step: noise at the coarsest stage."""
        self._generator.set_state(torch.frombuffer(bytearray(self.input.generator_state), dtype=torch.uint8))
        noise = torch.randn(1, *self._shape, generator=self._generator)[0]
        x = upload(shrink_noise(noise, self.input.params.num_stages), self._device)
        cursor = StepCursor(chunk=self.input.chunk)
        return ParkedChunk(cursor=cursor, x=x, stage_start=x, memory=None, generator_state=self._generator_state())

    def _generator_state(self) -> bytes:
        return self._generator.get_state().numpy().tobytes()

    def _stage(self) -> StageSchedule:
        return self.schedule.stages[self.cursor.stage]

    def _grid(self, halvings: int) -> Grid:
        _, frames, height, width = self._shape
        pt, ph, pw = self._patch
        return (frames // pt, (height >> halvings) // ph, (width >> halvings) // pw)

    def _guided(self, flows: list[Tensor]) -> Tensor:
        if not flows:
            return torch.zeros_like(self.x, dtype=self._dtype)
        if self._uncond is None:
            return flows[0]
        cond, uncond = flows
        combine = guidance.cfg if self.rules.guidance == "cfg" else guidance.cfg_zero_star
        return combine(cond, uncond, self.input.params.guidance_scale)

    def _solve(self, flow: Tensor) -> None:
        scheduler, step = self.rules.scheduler, self.cursor.step
        if scheduler.solver == "dmd":
            self.x = dmd_step(self.x, flow, self._stage_start, self._stage(), step)
        elif scheduler.solver == "euler":
            self.x = euler_step(self.x, flow, self._stage(), step)
        else:
            orders = UniPCOrders(solver_order=scheduler.solver_order, lower_order_final=scheduler.lower_order_final)
            self.x, self._memory = unipc_step(self.x, flow, self._stage(), step, self._memory, orders)

    def _enter(self, stage: int) -> None:
        """Upsamples and renoises for the next stage; solvers with memory begin anew."""
        c, frames, height, width = self.x.shape
        shape = (c, frames, 2 * height, 2 * width)
        noise = block_noise(shape, self._patch, self.rules.scheduler.gamma, self._generator)
        renoise = self.schedule.renoise[stage]
        assert renoise is not None
        self.x = enlarge(self.x, renoise, upload(noise.to(self._dtype), self._device))
        self._stage_start = self.x
        self._memory = None
        self._stage_caches = self._new_step_caches()
