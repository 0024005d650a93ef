"""One rank's share of the offline benchmarks: streams of equal requests, chunk by chunk, each piece of work timed.

Knows the runner, the encoder and the VAE, alone or on one of several ranks; knows no flags and prints nothing. Streams
of a batch share every forward. Ranks share forwards, and the VAE by columns; rank 0 alone makes segments, and its times
count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from helios_serve.bench.rank_work import Workload, requests_of
from helios_serve.config import FREE_DEGREES, GivenDegrees, ModelConfig
from helios_serve.model_executor.batch import ChunkInput, ChunkOutput
from helios_serve.model_executor.conditioning import Conditioning
from helios_serve.model_executor.model import load_text_encoder, load_transformer, load_vae, open_checkpoint
from helios_serve.model_executor.runner import Runner
from helios_serve.model_executor.spread import join_mesh
from helios_serve.model_executor.vae_spread import join_columns
from helios_serve.parallel.collectives import RankGroup, connect_torchrun
from helios_serve.types import NUM_TRAIL_CHUNKS, ModelInfo, SamplingParams, VideoRequest
from helios_serve.workers.encoder import EncoderWorker
from helios_serve.workers.vae import VaeWorker

T = TypeVar("T")

TIMEOUT_S = 600.0
"""Patience with another rank, which may still load."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkTimes:
    """Seconds of one chunk of all streams of a batch. stages: of the forwards and what surrounds them, by stage."""

    chunk: int
    stages: tuple[float, ...]
    steps: tuple[int, ...]
    decode_s: float
    mux_s: float

    @property
    def denoise_s(self) -> float:
        return sum(self.stages)

    @property
    def total_s(self) -> float:
        return self.denoise_s + self.decode_s + self.mux_s


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoTimes:
    """Seconds of one batch of videos. encode_s: all prompts."""

    encode_s: float
    chunks: tuple[ChunkTimes, ...]

    @property
    def total_s(self) -> float:
        return self.encode_s + sum(chunk.total_s for chunk in self.chunks)


@dataclass(slots=True, kw_only=True)
class _Stream:
    """One video of a batch on its way; `made` are the latents that later chunks see."""

    request: VideoRequest
    conditioning: Conditioning
    generator_state: bytes
    made: dict[int, Tensor] = field(default_factory=dict)

    def chunk_input(self, chunk: int) -> ChunkInput:
        pinned = self.request.pinned_chunk(chunk)
        trail = [self.made[index] for index in range(max(0, chunk - NUM_TRAIL_CHUNKS), chunk)]
        first = None if pinned is None else self.made[pinned]
        history = self.conditioning.history.followed_by(trail, first)
        name = self.request.request_id
        return self.conditioning.chunk_input(name, name, chunk, history, self.generator_state)

    def take(self, output: ChunkOutput, chunk: int) -> None:
        self.generator_state = output.generator_state
        self.made[chunk] = output.latents
        seen = (*range(chunk + 1 - NUM_TRAIL_CHUNKS, chunk + 1), self.request.pinned_chunk(chunk + 1))
        self.made = {index: latents for index, latents in self.made.items() if index in seen}


class RankEngine:
    """A checkpoint on this rank. Every rank of a torchrun group makes one, with equal arguments, and runs the same.

    Raises: CheckpointError when the checkpoint cannot be run; ValueError for degrees that do not fit.
    """

    def __init__(self, config: ModelConfig, given: GivenDegrees = FREE_DEGREES) -> None:
        self.ranks: RankGroup = connect_torchrun(TIMEOUT_S)
        checkpoint = open_checkpoint(config)
        self.info: ModelInfo = checkpoint.config.info(config.served_name)
        self._device = checkpoint.device
        self.mesh = join_mesh(self.ranks, checkpoint.config, checkpoint.device, given)
        columns = join_columns(self.ranks, checkpoint.device)
        vae = load_vae(checkpoint)
        text_encoder = load_text_encoder(checkpoint)
        self._new_encoder = partial(EncoderWorker, text_encoder, vae, axis=columns)
        self._runner = Runner(load_transformer(checkpoint), checkpoint.rules, mesh=self.mesh)
        self._vae = VaeWorker(vae, axis=columns)

    @property
    def is_first(self) -> bool:
        return self.ranks.rank == 0

    def close(self) -> None:
        """Leaves the group."""
        self.ranks.close()

    def requests(self, workload: Workload) -> list[VideoRequest]:
        """Raises: InvalidRequestError when the checkpoint cannot make such videos."""
        return requests_of(workload, self.info)

    def run(
        self,
        requests: Sequence[VideoRequest],
        *,
        decodes: bool = True,
        on_output: Callable[[str, Tensor], object] = lambda _name, _latents: None,
    ) -> VideoTimes:
        """Makes the videos of a batch together.

        Args:
            decodes: whether pixels and segments are made, too.
            on_output: is given each request's id and the latents of each of its chunks, outside what is timed.
        """
        encoder = self._new_encoder()  # that remembers no prompt
        encoded, encode_s = self._timed(lambda: [encoder.encode(request) for request in requests])
        streams = [
            _Stream(request=request, conditioning=one.conditioning, generator_state=one.generator_state)
            for request, one in zip(requests, encoded, strict=True)
        ]
        chunks = []
        for chunk in range(requests[0].params.num_chunks):
            chunks.append(self._run_chunk(streams, chunk, decodes=decodes))
            for stream in streams:
                on_output(stream.request.request_id, stream.made[chunk])
        return VideoTimes(encode_s=encode_s, chunks=tuple(chunks))

    def _run_chunk(self, streams: Sequence[_Stream], chunk: int, *, decodes: bool) -> ChunkTimes:
        params = streams[0].request.params
        stages = [0.0] * params.num_stages
        of_task = {stream.request.request_id: stream for stream in streams}
        _, join_s = self._timed(lambda: [self._runner.join(stream.chunk_input(chunk)) for stream in streams])
        stages[0] += join_s
        while self._runner.active:
            result, seconds = self._timed(self._runner.step)
            for _, error in result.failed:
                raise error
            stages[result.steps[0][1].stage] += seconds
            for output in result.finished:
                of_task[output.task_id].take(output, chunk)
        decode_s = mux_s = 0.0
        for stream in streams if decodes else ():
            pixels, seconds = self._timed(lambda own=stream: self._vae.decode(own.made[chunk]))  # type: ignore[misc]
            decode_s += seconds
            if not self.is_first:
                continue
            name = stream.request.request_id
            mux_s += self._timed(lambda p=pixels, n=name: self._vae.encode_segment(p, n, chunk, params))[1]  # type: ignore[misc]
        return ChunkTimes(
            chunk=chunk, stages=tuple(stages), steps=params.steps_in(chunk), decode_s=decode_s, mux_s=mux_s
        )

    def _timed(self, run: Callable[[], T]) -> tuple[T, float]:
        """What it returns, and the seconds until the device has finished it."""
        began = time.perf_counter()
        result = run()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return result, time.perf_counter() - began


def describe_params(params: SamplingParams) -> dict[str, object]:
    """What of the parameters a number depends on."""
    return {
        "size": f"{params.width}x{params.height}",
        "steps": list(params.steps),
        "guidance_scale": params.guidance_scale,
        "chunks": params.num_chunks,
        "fps": params.fps,
    }
