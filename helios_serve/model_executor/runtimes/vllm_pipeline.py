"""The pipeline that vLLM-Omni runs for a Helios checkpoint, whole requests at a time or step by step.

Knows vLLM-Omni's contract of a pipeline and its requests. All that makes a video is in `videos` and below; what a
request may hold is decided by this package's own parser, before vLLM-Omni's scheduler takes the request in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from vllm_omni.diffusion.cancellation import check_request_cancellation
from vllm_omni.diffusion.data import DiffusionOutput, OmniDiffusionConfig
from vllm_omni.diffusion.interaction.mixin import InteractionMixin
from vllm_omni.diffusion.interaction.types import ChunkMediaSpec
from vllm_omni.diffusion.models.interface import ReferenceVideoDecodeSpec
from vllm_omni.diffusion.models.progress_bar import ProgressBarMixin
from vllm_omni.diffusion.profiler.diffusion_pipeline_profiler import DiffusionPipelineProfilerMixin
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.worker.input_batch import InputBatch
from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch
from vllm_omni.diffusion.worker.utils import StepRequestState

from helios_serve.model_executor.model import load_model
from helios_serve.model_executor.runtimes.videos import VideoRun, Videos
from helios_serve.model_executor.runtimes.vllm_requests import AdmittedRequest, admit, for_the_client, request_reader
from helios_serve.model_executor.runtimes.vllm_settings import mesh_of, model_config
from helios_serve.types import FRAMES_PER_CHUNK, LATENT_FRAMES_PER_CHUNK, MAX_TEXT_TOKENS

__all__ = ["HeliosServePipeline", "output_writer", "request_reader"]
"""What the runtime looks up in this module by name."""

logger = logging.getLogger("vllm.helios_serve")  # the runtime writes what comes from below its own name

_RUN = "helios_serve.run"
"""Key of the VideoRun in the `extra` of a step-mode state."""
_WHOLE_VIDEO_IDS = ("video_gen_", "video_sync-")
"""How the ids of `/v1/videos` begin: its answer is one file, on a server that streams too."""
_MAX_REFERENCE_FRAMES = 1452


def output_writer(od_config: OmniDiffusionConfig) -> Callable[[Tensor], Tensor | npt.NDArray[np.uint8]]:
    """What the engine calls with each output: frames [1, F, H, W, 3] become an array, latents stay a tensor."""

    def write(output: Tensor) -> Tensor | npt.NDArray[np.uint8]:
        return output.numpy() if output.dtype == torch.uint8 else output

    return write


class HeliosServePipeline(nn.Module, InteractionMixin, ProgressBarMixin, DiffusionPipelineProfilerMixin):  # type: ignore[misc]
    """Text-, image- and video-to-video with every Helios checkpoint; the checkpoint's configuration says which it is.

    Args:
        od_config: of the stage.
        prefix: not used; the weights keep the checkpoint's own names.

    Raises: CheckpointError for what keeps the checkpoint from being served; UnsupportedOperationError for a setting of
        the runtime that would be ignored.
    """

    supports_step_execution: ClassVar[bool] = True
    supports_request_batch: ClassVar[bool] = True
    supports_request_cancellation: ClassVar[bool] = True
    supports_chunk_step_grouping: ClassVar[bool] = False
    dummy_run_num_frames: ClassVar[int] = FRAMES_PER_CHUNK
    _dit_modules: ClassVar[list[str]] = []  # what the runtime may move or hook: nothing, it is done by `offload`
    _encoder_modules: ClassVar[list[str]] = []
    _vae_modules: ClassVar[list[str]] = []
    _resident_modules: ClassVar[list[str]] = []

    def __init__(self, *, od_config: OmniDiffusionConfig, prefix: str = "") -> None:
        super().__init__()
        self.od_config = od_config
        config = model_config(od_config)
        with _own_defaults():
            model = load_model(config)
        self.device = model.transformer.device
        self.transformer = model.transformer
        self.vae = model.vae
        self.weights_sources = ()  # they are loaded: the checkpoint is read by this package's own loader
        self._text_encoder = model.text_encoder
        self._info = model.config.info(config.served_name)
        mesh = mesh_of(od_config, model.config.transformer.num_attention_heads)
        self._videos = Videos(model, mesh)
        self._answers = mesh.cfg.rank == 0 and mesh.tokens.rank == 0  # the other ranks' outputs are dropped
        DiffusionPipelineProfilerMixin.setup_diffusion_pipeline_profiler(
            self, enable_diffusion_pipeline_profiler=od_config.enable_diffusion_pipeline_profiler
        )
        logger.info("helios-serve runs %s (%s) on %s", config.model, self._info.variant, self.device)

    def setup_compile(self) -> None:
        """Nothing: the transformer runs this package's own kernels, eagerly."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """The names of all parameters: they have their values."""
        return {name for name, _ in self.named_parameters()}

    @classmethod
    def reference_video_decode_spec(
        cls, *, num_frames: int | None, extra_args: Mapping[str, object]
    ) -> ReferenceVideoDecodeSpec:
        """Which frames of a reference video the front end decodes: the last ones, which the new video continues."""
        return ReferenceVideoDecodeSpec(max_frames=_MAX_REFERENCE_FRAMES, keep="last")

    @torch.inference_mode()
    def forward(self, req: DiffusionRequestBatch) -> list[DiffusionOutput]:
        """Whole videos of several requests at once, each step of all of them in one forward.

        A video that fails has its error in its own output.

        Raises: DiffusionRequestAbortedError when all requests were cancelled, at the next step.
        """
        making = [
            _Making(admitted=self._admitted(one.prepared_layout, one.prompt, one.sampling_params, one.request_id))
            for one in req.requests
        ]
        try:
            for one in making:
                self._attempt(one, self._begin)
            self._run_to_the_end(making)
        finally:
            for one in making:
                if one.run is not None:
                    self._videos.drop(one.run)
        return [one.output() for one in making]

    def prepare_encode(self, state: StepRequestState) -> StepRequestState:
        """Step mode: encodes a new request and lays out its counters."""
        admitted = self._admitted(state.prepared_layout, state.prompt, state.sampling, state.request_id)
        making = _Making(admitted=admitted, run=self._videos.encode(admitted.request))
        assert making.run is not None
        params = admitted.request.params
        state.extra[_RUN] = making
        state.prompt_embeds = making.run.conditioning.prompts[0].embeds[None]
        making.prompt_embeds = state.prompt_embeds
        state.latents = torch.zeros(1, 1, device=self.device)  # a row to be scheduled by; the latents are the runner's
        state.timesteps = torch.arange(params.total_steps, device=self.device, dtype=torch.float32)
        making.streams = self.od_config.streaming_output and not state.request_id.startswith(_WHOLE_VIDEO_IDS)
        state.total_chunks = params.num_chunks if making.streams else 1
        if self.od_config.streaming_output:
            state.chunk_num_steps = params.total_steps
        return state

    def prepare_next_chunk(self, state: StepRequestState) -> None:
        """Step mode: begins the next chunk, with the prompt that is now in force."""
        making = _making(state)
        run = making.run
        assert run is not None
        if state.prompt_embeds is not making.prompt_embeds:
            self._videos.change_prompt(run, state.prompt_embeds[0])
            making.prompt_embeds = state.prompt_embeds
        self._videos.begin_chunk(run)
        if making.streams:
            state.chunk_num_steps = sum(run.request.params.steps_in(run.chunk))
            state.step_in_chunk = 0

    def denoise_step(self, input_batch: InputBatch, *, states: Sequence[StepRequestState]) -> Tensor:
        """Step mode: one step of each state's video, in one forward; the tensor that is returned has no meaning."""
        runs = [_making(state).run for state in states]
        self._videos.step([run for run in runs if run is not None])
        rows: Tensor = input_batch.latents
        return rows

    def step_scheduler(self, state: StepRequestState, noise_pred: Tensor) -> None:
        """Step mode: counts the step.

        Raises: what the step of this video raised.
        """
        making = _making(state)
        run = making.run
        assert run is not None
        if run.error is not None:
            raise run.error
        state.step_in_chunk += 1
        state.step_index += 1
        if run.latents is not None and not making.streams:
            self._collect(making)
            if not run.is_finished:
                self._videos.begin_chunk(run)

    def post_decode(self, state: StepRequestState) -> DiffusionOutput:
        """Step mode: the finished chunk where chunks are streamed, else the whole video."""
        making = _making(state)
        run = making.run
        assert run is not None
        if not making.streams:
            state.chunk_index = state.total_chunks
            return making.output()
        self._collect(making)
        chunk = state.chunk_index
        state.chunk_index += 1
        output = making.output()
        making.parts.clear()
        output.chunk_index, output.total_chunks, output.finished = chunk, state.total_chunks, run.is_finished
        return output

    def peek_chunk_media(self, state: StepRequestState) -> ChunkMediaSpec:
        """What the next chunk is in frames and time."""
        fps = _making(state).admitted.request.params.fps
        return ChunkMediaSpec(num_media_frames=FRAMES_PER_CHUNK, fps=fps, num_latent_frames=LATENT_FRAMES_PER_CHUNK)

    def encode_prompt(
        self,
        prompt: str,
        negative_prompt: str | None = None,
        do_classifier_free_guidance: bool = False,
        num_videos_per_prompt: int = 1,
        max_sequence_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, None]:
        """The embedding [1, 512, text_dim] of a prompt that takes over while its video plays; only `prompt` counts."""
        return self._text_encoder.encode(prompt, MAX_TEXT_TOKENS)[None], None

    def _admitted(self, prepared: object, prompt: Any, sampling: Any, request_id: str) -> AdmittedRequest:
        """As the engine has read it; the runtime's own warm-up and profiling come unread."""
        if isinstance(prepared, AdmittedRequest):
            return prepared
        return admit(OmniDiffusionRequest(prompt=prompt, sampling_params=sampling, request_id=request_id), self._info)

    def _begin(self, one: _Making) -> None:
        one.run = self._videos.encode(one.admitted.request)
        self._videos.begin_chunk(one.run)

    def _run_to_the_end(self, making: Sequence[_Making]) -> None:
        with ProgressBarMixin.progress_bar(
            self, total=sum(one.admitted.request.params.total_steps for one in making)
        ) as progress:
            while running := [one for one in making if one.is_running]:
                check_request_cancellation()
                self._videos.step([one.run for one in running if one.run is not None])
                progress.update(len(running))
                for one in running:
                    self._attempt(one, self._go_on)

    def _go_on(self, one: _Making) -> None:
        """Behind a step: takes in what it has finished, and begins the next chunk."""
        run = one.run
        assert run is not None
        if run.error is not None:
            raise run.error
        if run.latents is not None:
            self._collect(one)
            if not run.is_finished:
                self._videos.begin_chunk(run)

    def _collect(self, one: _Making) -> None:
        """Keeps what the caller wants of the finished chunk, in host memory."""
        run = one.run
        assert run is not None
        assert run.latents is not None
        if not self._answers:
            one.parts.append(torch.empty(0, dtype=torch.uint8))
        elif one.admitted.returns_latents:
            one.parts.append(run.latents.cpu())
        else:
            one.parts.append(self._videos.frames(run))

    @staticmethod
    def _attempt(one: _Making, work: Callable[[_Making], None]) -> None:
        """Work for one request of several: what it raises ends this one alone."""
        try:
            work(one)
        except Exception as error:
            logger.exception("request %s failed", one.admitted.request.request_id)
            one.error = error


@dataclass(slots=True, kw_only=True)
class _Making:
    """What one request has got so far. parts: frames [F, H, W, 3] or latents [C, 9, h, w] of each chunk.
    prompt_embeds: those that the runtime was told of last. streams: each chunk is an output of its own."""

    admitted: AdmittedRequest
    run: VideoRun | None
    parts: list[Tensor]
    error: Exception | None
    prompt_embeds: Tensor | None
    streams: bool

    def __init__(self, *, admitted: AdmittedRequest, run: VideoRun | None = None) -> None:
        self.admitted = admitted
        self.run = run
        self.parts = []
        self.error = None
        self.prompt_embeds = None
        self.streams = False

    @property
    def is_running(self) -> bool:
        return self.error is None and self.run is not None and not self.run.is_finished

    def output(self) -> DiffusionOutput:
        """Frames [1, F, H, W, 3] uint8, or latents [1, C, T, h, w] float32."""
        if self.error is not None:
            return DiffusionOutput.from_exception(for_the_client(self.error))
        along = 1 if self.parts[0].dim() == 4 and self.admitted.returns_latents else 0
        return DiffusionOutput(output=torch.cat(self.parts, dim=along)[None])


@contextmanager
def _own_defaults() -> Iterator[None]:
    """PyTorch's own defaults where the runtime has set its loaders': tables are made in float32, on the host."""
    theirs = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(theirs)


def _making(state: StepRequestState) -> _Making:
    making = state.extra[_RUN]
    assert isinstance(making, _Making)
    return making
