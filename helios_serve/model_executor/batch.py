"""One chunk in the making: what it needs, its mutable state, and how a predicted flow moves it one step on.

Knows samplers, guidance and schedules; knows nothing of packing, threads or other requests.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from helios_serve.model_executor import guidance
from helios_serve.model_executor.history import Continuation, HistoryTokens
from helios_serve.model_executor.model_config import SchedulerConfig
from helios_serve.model_executor.packing import TextKV, TokenSequence
from helios_serve.model_executor.prompt_schedule import PromptEmbedding
from helios_serve.model_executor.rope import Grid
from helios_serve.model_executor.sampling.base import UniPCMemory, UniPCOrders, euler_step, unipc_step
from helios_serve.model_executor.sampling.dmd import dmd_step
from helios_serve.model_executor.sampling.pyramid import block_noise, enlarge, shrink_noise
from helios_serve.model_executor.sampling.schedule import ChunkSchedule, StageSchedule, chunk_schedule
from helios_serve.model_executor.transformer import HeliosTransformer
from helios_serve.types import LATENT_FRAMES_PER_CHUNK, Guidance, SamplingParams, StepCursor


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkInput:
    """Everything that decides the latents of one chunk; any worker can run it.

    `negative` is set exactly when `params.uses_guidance`.
    """

    request_id: str
    chunk: int
    params: SamplingParams
    prompt: PromptEmbedding
    negative: PromptEmbedding | None
    continuation: Continuation


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkOutput:
    """A finished chunk: `latents` [C, 9, h, w] normalised, and what the next chunk begins from."""

    request_id: str
    chunk: int
    latents: Tensor
    continuation: Continuation


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRules:
    """What the checkpoint, not the request, decides about sampling."""

    scheduler: SchedulerConfig
    guidance: Guidance


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
    ) -> None:
        self.input = chunk
        self.rules = rules
        self.cursor = StepCursor(chunk=chunk.chunk)
        self._patch = transformer.patch
        self._dtype = transformer.dtype
        self._device = transformer.device
        self._cond, self._uncond = texts
        self._generator = torch.Generator()
        self._generator.set_state(chunk.continuation.generator_state)
        history = chunk.continuation.history
        channels, _, height, width = history.frames.shape
        self._shape = (channels, LATENT_FRAMES_PER_CHUNK, height, width)
        num_stages = chunk.params.num_stages
        self._grids = tuple(self._grid(num_stages - 1 - stage) for stage in range(num_stages))
        self._rotary = tuple(transformer.current_rotary(grid) for grid in self._grids)
        self._history: HistoryTokens = transformer.embed_history(history)
        self.schedule: ChunkSchedule = chunk_schedule(
            rules.scheduler,
            chunk.params.steps_in(chunk.chunk),
            tuple(t * h * w for t, h, w in self._grids),
        )
        noise = torch.randn(1, *self._shape, generator=self._generator)[0]
        self.x = shrink_noise(noise, num_stages).to(self._device)
        self._stage_start = self.x
        self._memory: UniPCMemory | None = None

    def sequences(self) -> list[TokenSequence]:
        """The sequences of the next step: the conditional one, and the unconditional one under guidance."""
        stage = self.cursor.stage
        x = self.x.to(self._dtype)
        timestep = self._stage().model_timesteps[self.cursor.step]
        texts = [self._cond] if self._uncond is None else [self._cond, self._uncond]
        return [
            TokenSequence(history=self._history, x=x, rotary=self._rotary[stage], timestep=timestep, text=text)
            for text in texts
        ]

    def advance(self, flows: list[Tensor]) -> None:
        """Moves one step on with the flows of `sequences()`, each [C, T, h, w]; enters the next stage if one ends."""
        self._solve(self._guided(flows))
        following = self.cursor.next(self.input.params)
        if following.chunk == self.cursor.chunk and following.stage != self.cursor.stage:
            self._enter(following.stage)
        self.cursor = following

    @property
    def is_finished(self) -> bool:
        return self.cursor.chunk != self.input.chunk

    def output(self) -> ChunkOutput:
        """The finished chunk."""
        assert self.is_finished
        task = self.input
        repin = task.params.skip_first_chunk and task.chunk == 1
        return ChunkOutput(
            request_id=task.request_id,
            chunk=task.chunk,
            latents=self.x,
            continuation=Continuation(
                history=task.continuation.history.after(self.x, repin=repin),
                generator_state=self._generator.get_state(),
            ),
        )

    def _stage(self) -> StageSchedule:
        return self.schedule.stages[self.cursor.stage]

    def _grid(self, halvings: int) -> Grid:
        _, frames, height, width = self._shape
        pt, ph, pw = self._patch
        return (frames // pt, (height >> halvings) // ph, (width >> halvings) // pw)

    def _guided(self, flows: list[Tensor]) -> Tensor:
        params = self.input.params
        if self._uncond is None:
            return flows[0]
        cond, uncond = flows
        if self.rules.guidance == "cfg":
            return guidance.cfg(cond, uncond, params.guidance_scale)
        # The reference zeroes one step more than `zero_steps` says.
        if params.use_zero_init and self.cursor.stage == 0 and self.cursor.step <= params.zero_steps:
            return torch.zeros_like(cond)
        return guidance.cfg_zero_star(cond, uncond, params.guidance_scale)

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
        self.x = enlarge(self.x, renoise, noise.to(self._device, self._dtype, non_blocking=True))
        self._stage_start = self.x
        self._memory = None
