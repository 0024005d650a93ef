"""Generation in the caller's own process: the roles of the server, called one after the other.

A composition root like the command line: it may know everything below it. Requests are read by the API's parser, so
that every field means the same here and over HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from helios_serve.api.convert import Limits, ParsedRequest, parse_generation
from helios_serve.api.media_input import Media, check_media_bytes
from helios_serve.config import Device, DType, ModelConfig
from helios_serve.errors import InvalidRequestError
from helios_serve.kernels import to_uint8
from helios_serve.model_executor.batch import ChunkInput, ChunkOutput
from helios_serve.model_executor.history import History
from helios_serve.model_executor.model import load_model
from helios_serve.model_executor.runner import Runner
from helios_serve.model_executor.transformer import HeliosTransformer
from helios_serve.types import NUM_TRAIL_CHUNKS, ModelInfo, SamplingParams, Segment, StepCursor, VideoRequest
from helios_serve.workers.encoder import EncoderWorker
from helios_serve.workers.media import Decoder
from helios_serve.workers.vae import VaeWorker

OnStep = Callable[[StepCursor], None]
"""Called after each step with the step that was done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoChunk:
    """A finished chunk, cut to the frames that belong to the video.

    `latents` [C, 9, h, w] are the normalised latents of the whole chunk; `pixels` [F, 3, H, W] float32 in [-1, 1].
    """

    request_id: str
    index: int
    start_frame: int
    latents: Tensor
    pixels: Tensor

    @property
    def frames(self) -> npt.NDArray[np.uint8]:
        """[F, H, W, 3] uint8 RGB."""
        return to_uint8(self.pixels).cpu().numpy()


class Helios:
    """A checkpoint ready to make videos.

    Args:
        model: directory or hub id of a checkpoint in the official layout.
        device: cpu or cuda.
        dtype: of the transformer and the text encoder; the VAE always runs in float32.

    Raises: CheckpointError when the checkpoint cannot be served.
    """

    def __init__(self, model: str | Path, *, device: Device = "cpu", dtype: DType = "float32") -> None:
        self._load(ModelConfig(model=str(model), device=device, dtype=dtype))

    @classmethod
    def configured(cls, config: ModelConfig) -> Helios:
        """One whose model runs as a server's would, approximations included.

        Raises: CheckpointError when the checkpoint cannot be served.
        """
        helios = cls.__new__(cls)
        helios._load(config)
        return helios

    def _load(self, config: ModelConfig) -> None:
        loaded = load_model(config)
        self.info: ModelInfo = loaded.config.info(config.served_name, approximations=config.approximations)
        self._encoder = EncoderWorker(loaded.text_encoder, loaded.vae)
        self._runner = Runner(loaded.transformer, loaded.rules)
        self._vae = VaeWorker(loaded.vae)

    @property
    def transformer(self) -> HeliosTransformer:
        """What makes the latents."""
        return self._runner.transformer

    def generate(self, prompt: str | None = None, **fields: object) -> Iterator[VideoChunk]:
        """Makes a video and yields its chunks as they are done.

        Args:
            prompt: what to show.
            fields: any field of `POST /v1/videos/generations`; `image` and `video` are paths of files.

        Raises: InvalidRequestError when a field cannot be served, before anything is generated.
        """
        body = fields if prompt is None else {"prompt": prompt, **fields}
        return self.run(self.parse(body).request)

    def parse(self, body: Mapping[str, object]) -> ParsedRequest:
        """Reads request fields; `image` and `video` are paths.

        Raises: InvalidRequestError with the field at fault.
        """
        return parse_generation(body, self.info, Media(source=FileSource(), decoder=Decoder(allow_npy=True)), Limits())

    def run(self, request: VideoRequest, on_step: OnStep | None = None) -> Iterator[VideoChunk]:
        """Yields the chunks of a parsed request; closing the iterator stops after the step in flight."""
        params = request.params
        encoded = self._encoder.encode(request)
        generator_state = encoded.generator_state
        made: dict[int, Tensor] = {}  # latents of the chunks that later ones see
        for chunk in range(params.num_chunks):
            history = _history(request, chunk, encoded.conditioning.history, made)
            finished = self._run_chunk(
                encoded.conditioning.chunk_input(
                    request.request_id, request.request_id, chunk, history, generator_state
                ),
                on_step,
            )
            generator_state = finished.generator_state
            made[chunk] = finished.latents
            seen = (*range(chunk + 1 - NUM_TRAIL_CHUNKS, chunk + 1), request.pinned_chunk(chunk + 1))
            made = {index: latents for index, latents in made.items() if index in seen}
            pixels = self._vae.decode(finished.latents)[: params.frames_in(chunk)]
            yield VideoChunk(
                request_id=request.request_id,
                index=chunk,
                start_frame=sum(params.frames_in(earlier) for earlier in range(chunk)),
                latents=finished.latents.clone(),
                pixels=pixels.float(),
            )

    def encode_segment(self, chunk: VideoChunk, params: SamplingParams) -> Segment:
        """The fMP4 segment of a chunk that `run` yielded."""
        return self._vae.encode_segment(chunk.pixels, chunk.request_id, chunk.index, params)

    def _run_chunk(self, chunk: ChunkInput, on_step: OnStep | None) -> ChunkOutput:
        """All steps of one chunk; the runner is empty afterwards, whatever happens."""
        self._runner.join(chunk)
        try:
            while True:
                result = self._runner.step((chunk.task_id,))
                for _, error in result.failed:
                    raise error
                if on_step is not None:
                    on_step(result.steps[0][1])
                if result.finished:
                    return result.finished[0]
        finally:
            self._runner.abort(chunk.task_id)


def _history(request: VideoRequest, chunk: int, start: History, made: Mapping[int, Tensor]) -> History:
    """What `chunk` sees: the latents of the chunks before it, behind what the request began from."""
    pinned = request.pinned_chunk(chunk)
    trail = [made[index] for index in range(max(0, chunk - NUM_TRAIL_CHUNKS), chunk)]
    return start.followed_by(trail, None if pinned is None else made[pinned])


class FileSource:
    """Reads the image and the video of a request from files that the caller names."""

    def read(self, reference: str, param: str, max_bytes: int) -> bytes:
        """The bytes of a file.

        Raises: InvalidRequestError when it cannot be read or is larger than `max_bytes`.
        """
        path = Path(reference)
        try:
            # Lossless arrays are the caller's own and larger than any upload.
            if path.suffix != ".npy":
                check_media_bytes(path.stat().st_size, max_bytes, param)
            return path.read_bytes()
        except OSError as error:
            raise InvalidRequestError(
                f"{param} {reference}: {error.strerror}; give the path of a readable file", param=param
            ) from error
