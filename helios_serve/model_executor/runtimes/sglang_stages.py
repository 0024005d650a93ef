"""The three stages of a Helios video inside SGLang-Diffusion. One server runs all of them, or a server of its own each.

Knows SGLang's requests and roles. All that makes a video is in `videos` and below; what a request may hold is decided
by `sglang_requests`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from sglang.multimodal_gen.runtime.disaggregation.roles import RoleType
from sglang.multimodal_gen.runtime.distributed import get_world_rank
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req
from sglang.multimodal_gen.runtime.pipelines_core.stages.base import PipelineStage
from sglang.multimodal_gen.runtime.realtime.session import BaseRealtimeState
from sglang.multimodal_gen.runtime.server_args import ServerArgs
from torch import Tensor

from helios_serve.errors import UnsupportedOperationError
from helios_serve.model_executor.model import load_text_encoder, load_transformer, load_vae, open_checkpoint
from helios_serve.model_executor.runtimes.sglang_requests import read_sampling
from helios_serve.model_executor.runtimes.sglang_settings import mesh_of, model_config
from helios_serve.model_executor.runtimes.videos import VideoRun, VideoSteps, begin_video, frames_of
from helios_serve.parallel.collectives import GroupBrokenError
from helios_serve.types import ModelInfo, PromptChange, SamplingParams, Start, VideoRequest
from helios_serve.workers.encoder import EncoderWorker
from helios_serve.workers.payload import pack, unpack
from helios_serve.workers.records import record_of
from helios_serve.workers.vae import VaeWorker

logger = logging.getLogger("sglang.helios_serve")

_LEFT = "helios_serve"
"""Key of what a stage leaves to the next in the `extra` of a request."""

StagePlan = tuple[str, RoleType, Callable[[], PipelineStage]]
"""Name, role, and what loads the stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Denoised:
    """The chunks that a request has asked for, `first` and those behind it: [C, 9, h, w] float32 each."""

    params: SamplingParams
    first: int
    latents: tuple[Tensor, ...]


def make_stages(server_args: ServerArgs) -> tuple[StagePlan, ...]:
    """All stages of a checkpoint; a module is loaded when the first stage that needs it is made.

    Raises: CheckpointError for what keeps the checkpoint from being served; UnsupportedOperationError for a setting
        that would be ignored.
    """
    checkpoint = open_checkpoint(model_config(server_args))
    info = checkpoint.config.info(server_args.model_path)
    vae = cache(partial(load_vae, checkpoint))
    hop = _Hop(is_alone=server_args.disagg_role == RoleType.MONOLITHIC)

    def encode() -> PipelineStage:
        return EncodeStage(EncoderWorker(load_text_encoder(checkpoint), vae()), info, hop)

    def denoise() -> PipelineStage:
        mesh = mesh_of(server_args, checkpoint.config)
        return DenoiseStage(VideoSteps(load_transformer(checkpoint), checkpoint.rules, mesh), hop)

    def decode() -> PipelineStage:
        return DecodeStage(VaeWorker(vae()), hop)

    logger.info(
        "helios-serve %s runs %s (%s) on %s",
        version("helios-serve"),
        server_args.model_path,
        info.variant,
        checkpoint.device,
    )
    return (
        ("helios_encode", RoleType.ENCODER, encode),
        ("helios_denoise", RoleType.DENOISER, denoise),
        ("helios_decode", RoleType.DECODER, decode),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Hop:
    """The way from one stage to the next: within a process, or to another server, which SGLang sends tensors to."""

    is_alone: bool

    def leave(self, req: Req, value: object) -> None:
        if self.is_alone:
            req.extra[_LEFT] = value
            return
        head, buffers = pack(value)
        parts = (np.frombuffer(head, dtype=np.uint8), *buffers)
        req.extra[_LEFT] = [torch.from_numpy(part.copy()) for part in parts]

    def take(self, req: Req) -> Any:
        left = req.extra.pop(_LEFT)
        if self.is_alone:
            return left
        head, *buffers = (part.cpu().numpy() for part in left)
        return unpack((head.tobytes(), buffers), copy=True)


class _Session(BaseRealtimeState):  # type: ignore[misc]
    """The video of a session, kept between its chunks."""

    def __init__(self) -> None:
        self.run: VideoRun | None = None

    def dispose(self) -> None:
        self.run = None


class EncodeStage(PipelineStage):  # type: ignore[misc]
    """Prompts, pictures and videos become a video that can begin; a session's is the one that it has."""

    def __init__(self, encoder: EncoderWorker, info: ModelInfo, hop: _Hop) -> None:
        super().__init__()
        self._encoder = encoder
        self._info = info
        self._hop = hop

    @property
    def role_affinity(self) -> RoleType:
        return RoleType.ENCODER

    def forward(self, batch: Req, server_args: ServerArgs) -> Req:
        if batch.session is not None and not self._hop.is_alone:
            raise UnsupportedOperationError("sessions: only where one server has all roles; its video stays there")
        run = self._begin(batch) if batch.session is None else self._go_on(batch)
        self._hop.leave(batch, run)
        return batch

    def _begin(self, batch: Req) -> VideoRun:
        run = begin_video(self._encoder, read_sampling(batch.sampling_params, self._info))
        run.request = _without_media(run)
        return run

    def _go_on(self, batch: Req) -> VideoRun:
        """The video of the session, with the prompt that this chunk's request has."""
        session: _Session = batch.session.get_or_create_state(_Session)
        if session.run is None:
            session.run = self._begin(batch)
        elif batch.prompt != session.run.request.prompts[-1].prompt:
            self._change_prompt(session.run, batch)
        return session.run

    def _change_prompt(self, run: VideoRun, batch: Req) -> None:
        change = PromptChange(chunk=batch.block_idx, prompt=batch.prompt, **batch.condition_inputs)
        run.request = replace(run.request, prompts=(*run.request.prompts, change))
        run.conditioning = self._encoder.encode(run.request, run.conditioning).conditioning


class DenoiseStage(PipelineStage):  # type: ignore[misc]
    """All chunks of a video; the next one of a session; one to warm up. Requests of any sizes and steps share
    forwards."""

    def __init__(self, steps: VideoSteps, hop: _Hop) -> None:
        super().__init__()
        self._steps = steps
        self._hop = hop

    @property
    def role_affinity(self) -> RoleType:
        return RoleType.DENOISER

    def forward(self, batch: Req, server_args: ServerArgs) -> Req:
        (done,) = self.run_grouped_requests([batch], server_args)
        return done

    def run_grouped_requests(self, batches: list[Req], server_args: ServerArgs) -> list[Req]:
        """Raises: what the step of a video raised: SGLang gives the requests of a group one end. SystemExit when the
        ranks no longer agree: only a new start helps, and SGLang's front end refuses all requests until then.
        """
        making = [
            _Making(run=self._hop.take(batch), is_one_chunk=batch.session is not None or batch.is_warmup)
            for batch in batches
        ]
        try:
            with ExitStack() as bars:
                for one, batch in zip(making, batches, strict=True):
                    one.report = bars.enter_context(self.progress_bar(total=one.num_steps, batch=batch)).update
                    self._steps.begin_chunk(one.run)
                self._run_to_the_end(making)
        except GroupBrokenError as error:
            raise SystemExit(f"{error}; restart the server") from error
        finally:
            for one in making:
                self._steps.drop(one.run)
        for one, batch in zip(making, batches, strict=True):
            self._hop.leave(batch, one.denoised())
        return batches

    def _run_to_the_end(self, making: Sequence[_Making]) -> None:
        while running := [one for one in making if not one.is_done]:
            self._steps.step([one.run for one in running])
            for one in running:
                if one.run.error is not None:
                    raise one.run.error
                one.report(1)
                if one.run.latents is not None:
                    one.latents.append(one.run.latents)
                    if not one.is_done:
                        self._steps.begin_chunk(one.run)


class DecodeStage(PipelineStage):  # type: ignore[misc]
    """Latents become pictures, on the rank that answers."""

    def __init__(self, vae: VaeWorker, hop: _Hop) -> None:
        super().__init__()
        self._vae = vae
        self._hop = hop

    @property
    def role_affinity(self) -> RoleType:
        return RoleType.DECODER

    def forward(self, batch: Req, server_args: ServerArgs) -> Req:
        denoised: Denoised = self._hop.take(batch)
        if get_world_rank() == 0:
            parts = [
                frames_of(self._vae, denoised.params, denoised.first + index, latents)
                for index, latents in enumerate(denoised.latents)
            ]
            frames = torch.cat(parts)
            batch.output = [frames.numpy()] if self._hop.is_alone else _as_floats(frames)
        return batch


@dataclass(slots=True, kw_only=True)
class _Making:
    """What one request has got so far. is_one_chunk: it asks for the next chunk alone. report: counts its steps."""

    run: VideoRun
    is_one_chunk: bool
    first: int = field(init=False)
    latents: list[Tensor] = field(default_factory=list)
    report: Callable[[int], object] = field(init=False)

    def __post_init__(self) -> None:
        self.first = self.run.chunk if self.run.latents is None else self.run.chunk + 1

    @property
    def num_steps(self) -> int:
        params = self.run.request.params
        return sum(params.steps_in(self.first)) if self.is_one_chunk else params.total_steps

    @property
    def is_done(self) -> bool:
        return bool(self.latents) and (self.is_one_chunk or self.run.is_finished)

    def denoised(self) -> Denoised:
        return Denoised(params=self.run.request.params, first=self.first, latents=tuple(self.latents))


def _without_media(run: VideoRun) -> VideoRequest:
    """The request of a video that has begun, without pixels, which would go from role to role."""
    if run.request.task == "t2v":
        return run.request
    start = Start(task=run.request.task, record=record_of(run.conditioning), generator_state=run.generator_state)
    return replace(run.request, image=None, video=None, start=start)


def _as_floats(frames: Tensor) -> Tensor:
    """uint8 [F, H, W, 3] -> float32 [1, 3, F, H, W] in 0 to 1; SGLang cuts 255 times it back to the same numbers."""
    return ((frames.permute(3, 0, 1, 2)[None].float() + 0.5) / 255).clamp(max=1.0)
