"""Requests, tasks and right answers for the tests of workers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from helios_serve.model_executor.batch import ParkedChunk
from helios_serve.model_executor.model import HeliosModel
from helios_serve.model_executor.runner import Runner
from helios_serve.types import ChunkTask, PromptChange, SamplingParams, TensorRef, VideoRequest
from helios_serve.workers.dit import ChunkInputs
from helios_serve.workers.encoder import EncodeResult, EncoderWorker

MAX_ABS = 2e-4

_attempts = itertools.count()


def request(
    name: str, *, num_frames: int = 33, steps: tuple[int, ...] = (1, 1, 1), width: int = 64, seed: int = 1
) -> VideoRequest:
    params = SamplingParams(
        width=width, height=64, num_frames=num_frames, fps=24, seed=seed, steps=steps, guidance_scale=1.0
    )
    return VideoRequest(request_id=name, prompts=(PromptChange(chunk=0, prompt=name),), params=params)


@dataclass(frozen=True, slots=True)
class Video:
    """An encoded request."""

    request: VideoRequest
    encoded: EncodeResult

    def task(self, chunk: int = 0, generator_state: bytes | None = None) -> ChunkTask:
        """A new attempt; its references stand for nothing, the inputs go beside it."""
        name = self.request.request_id
        return ChunkTask(
            task_id=f"{name}/c{chunk}.{next(_attempts)}",
            request_id=name,
            chunk=chunk,
            conditioning=TensorRef(key="-"),
            trail=(),
            first=None,
            generator_state=self.encoded.generator_state if generator_state is None else generator_state,
            parked=None,
            predicted_s=1.0,
        )

    def inputs(self, made: Sequence[Tensor] = (), parked: ParkedChunk | None = None) -> ChunkInputs:
        """What the next chunk after `made` needs."""
        pinned = self.request.pinned_chunk(len(made))
        return ChunkInputs(
            conditioning=self.encoded.conditioning,
            trail=tuple(made[-3:]),
            first=None if pinned is None else made[pinned],
            parked=parked,
        )


def encode(model: HeliosModel, video: VideoRequest) -> Video:
    return Video(video, EncoderWorker(model.text_encoder, model.vae).encode(video))


def latents_of(model: HeliosModel, video: VideoRequest) -> list[Tensor]:
    """The chunks of a video that is made alone, without any worker."""
    encoded = EncoderWorker(model.text_encoder, model.vae).encode(video)
    runner, state, made = Runner(model.transformer, model.rules), encoded.generator_state, list[Tensor]()
    for chunk in range(video.params.num_chunks):
        pinned = video.pinned_chunk(chunk)
        history = encoded.conditioning.history.followed_by(made[-3:], None if pinned is None else made[pinned])
        runner.join(encoded.conditioning.chunk_input("alone", video.request_id, chunk, history, state))
        while not (finished := runner.step().finished):
            pass
        state = finished[0].generator_state
        made.append(finished[0].latents)
    return made


def assert_close(ours: Tensor, right: Tensor) -> None:
    assert ours.shape == right.shape
    assert torch.allclose(ours, right, rtol=0, atol=MAX_ABS)
