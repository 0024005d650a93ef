"""Videos in the making inside a runtime that schedules requests itself: it says which of them take a step.

Knows the roles of the server and the order of a video's chunks; knows no runtime. One thread uses a `Videos`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from helios_serve.kernels import to_uint8
from helios_serve.model_executor.batch import ChunkInput, SamplingRules
from helios_serve.model_executor.conditioning import Conditioning
from helios_serve.model_executor.model import HeliosModel
from helios_serve.model_executor.prompt_schedule import PromptEmbedding
from helios_serve.model_executor.runner import Runner
from helios_serve.model_executor.transformer import HeliosTransformer
from helios_serve.parallel.mesh import SOLO, Mesh
from helios_serve.types import NUM_TRAIL_CHUNKS, SamplingParams, VideoRequest
from helios_serve.workers.encoder import EncoderWorker
from helios_serve.workers.vae import VaeWorker


@dataclass(slots=True, weakref_slot=True, kw_only=True, eq=False)
class VideoRun:
    """One video in the making. `chunk` is the one that is being made; when it is done, `latents` [C, 9, h, w] float32
    are its normalised latents, and until the next one begins.

    error: why the video cannot go on. prompt: takes the place of the request's own from the next chunk on.
    """

    request: VideoRequest
    conditioning: Conditioning
    generator_state: bytes
    chunk: int = 0
    latents: Tensor | None = None
    error: Exception | None = None
    prompt: PromptEmbedding | None = None
    made: dict[int, Tensor] = field(default_factory=dict)
    """Latents of the chunks that later ones see."""

    @property
    def is_finished(self) -> bool:
        """Whether the last chunk is done, or the video cannot go on."""
        is_last = self.chunk + 1 == self.request.params.num_chunks
        return self.error is not None or (is_last and self.latents is not None)

    def chunk_input(self) -> ChunkInput:
        """What decides the latents of `chunk`."""
        pinned = self.request.pinned_chunk(self.chunk)
        trail = [self.made[index] for index in range(max(0, self.chunk - NUM_TRAIL_CHUNKS), self.chunk)]
        history = self.conditioning.history.followed_by(trail, None if pinned is None else self.made[pinned])
        request_id = self.request.request_id
        made = self.conditioning.chunk_input(request_id, request_id, self.chunk, history, self.generator_state)
        return made if self.prompt is None else replace(made, prompt=self.prompt)

    def keep(self, latents: Tensor, generator_state: bytes) -> None:
        """Takes in the finished chunk, and forgets those that no later one sees."""
        self.latents, self.generator_state = latents, generator_state
        self.made[self.chunk] = latents
        following = self.chunk + 1
        seen = (*range(following - NUM_TRAIL_CHUNKS, following), self.request.pinned_chunk(following))
        self.made = {index: kept for index, kept in self.made.items() if index in seen}


def begin_video(encoder: EncoderWorker, request: VideoRequest) -> VideoRun:
    """Encodes a request's prompts and media; its first chunk waits for `begin_chunk`."""
    encoded = encoder.encode(request)
    return VideoRun(request=request, conditioning=encoded.conditioning, generator_state=encoded.generator_state)


def frames_of(vae: VaeWorker, params: SamplingParams, chunk: int, latents: Tensor) -> Tensor:
    """The pixels of a finished chunk that belong to its video: uint8 RGB [F, H, W, 3] in host memory."""
    pixels = vae.decode(latents)[: params.frames_in(chunk)]
    return to_uint8(pixels.float()).cpu()


class VideoSteps:
    """The DiT role of one checkpoint, driven a step at a time.

    A video whose `VideoRun` nobody holds any more is forgotten at the next step, so that a runtime which drops its
    requests without a word leaks nothing.

    Args:
        transformer: of this rank.
        mesh: the ranks that share each forward; all of them make the same calls in the same order.
    """

    def __init__(self, transformer: HeliosTransformer, rules: SamplingRules, mesh: Mesh = SOLO) -> None:
        self._runner = Runner(transformer, rules, mesh=mesh)
        self._runs: WeakValueDictionary[str, VideoRun] = WeakValueDictionary()

    def begin_chunk(self, run: VideoRun) -> None:
        """Begins the video's first chunk, or the one behind the chunk that is done."""
        if run.latents is not None:
            run.chunk += 1
            run.latents = None
        self._runner.join(run.chunk_input())
        self._runs[run.request.request_id] = run

    def step(self, runs: Sequence[VideoRun]) -> None:
        """One step of the chunk of each video, in one forward if it fits. What it ends is said in the runs."""
        for lost in set(self._runner.active) - set(self._runs):
            self._runner.abort(lost)
        result = self._runner.step([run.request.request_id for run in runs])
        for task_id, error in result.failed:
            self._runs.pop(task_id).error = error
        for output in result.finished:
            self._runs.pop(output.task_id).keep(output.latents, output.generator_state)

    def drop(self, run: VideoRun) -> None:
        """Forgets a video, whatever it was doing."""
        self._runs.pop(run.request.request_id, None)
        self._runner.abort(run.request.request_id)


class Videos(VideoSteps):
    """All roles of one checkpoint, driven a step at a time.

    Args:
        model: of this rank.
        mesh: as for `VideoSteps`.
    """

    def __init__(self, model: HeliosModel, mesh: Mesh = SOLO) -> None:
        super().__init__(model.transformer, model.rules, mesh)
        self._encoder = EncoderWorker(model.text_encoder, model.vae)
        self._vae = VaeWorker(model.vae)

    def encode(self, request: VideoRequest) -> VideoRun:
        """Begins a video: its prompts and media are encoded; its first chunk waits for `begin_chunk`."""
        return begin_video(self._encoder, request)

    def frames(self, run: VideoRun) -> Tensor:
        """The pixels of the finished chunk that belong to the video: uint8 RGB [F, H, W, 3] in host memory."""
        assert run.latents is not None
        return frames_of(self._vae, run.request.params, run.chunk, run.latents)

    @staticmethod
    def change_prompt(run: VideoRun, embeds: Tensor) -> None:
        """From the next chunk on the video shows `embeds` [L, text_dim], whatever its request says."""
        content = embeds.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()
        run.prompt = PromptEmbedding(key=f"embedding {hashlib.sha256(content).hexdigest()}", embeds=embeds)
