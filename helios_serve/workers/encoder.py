"""The encoder role: prompts, images and videos of a request become its conditioning.

Knows the text encoder and the VAE's encoder; knows nothing of steps, clients or where its result goes. One thread uses
a worker.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass

import torch

from helios_serve.faults import NO_FAULTS, FaultPlan
from helios_serve.model_executor.byte_cache import ByteCache
from helios_serve.model_executor.conditioning import Conditioning, starting_history
from helios_serve.model_executor.history import History
from helios_serve.model_executor.prompt_schedule import PromptEmbedding
from helios_serve.model_executor.text_encoder import TextEncoder, clean_prompt
from helios_serve.model_executor.vae import WanVAE
from helios_serve.model_executor.vae_spread import with_retry
from helios_serve.parallel.collectives import ALONE, Axis
from helios_serve.types import Phase, VideoRequest
from helios_serve.workers.records import history_of


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeResult:
    """A request's conditioning, the state of its generator before chunk 0, and how long what took."""

    conditioning: Conditioning
    generator_state: bytes
    phases: tuple[Phase, ...]


class EncoderWorker:
    """Encodes requests; embeddings of recent prompts are kept by content.

    Args:
        cache_bytes: limit of the kept embeddings (4 MiB each at 512 x 4096 bfloat16).
        faults: visited at `text.encode`, once for each request, with request_id and prompt (the first one).
        axis: its ranks share the encoding of images and videos, and each has the result; they encode the same requests
            in the same order.
    """

    def __init__(
        self,
        text_encoder: TextEncoder,
        vae: WanVAE,
        cache_bytes: int = 1 << 30,
        *,
        faults: FaultPlan = NO_FAULTS,
        axis: Axis = ALONE,
    ) -> None:
        self._text_encoder = text_encoder
        self._vae = vae
        self._faults = faults
        self._axis = axis
        self._embeddings = ByteCache[PromptEmbedding](cache_bytes)
        self._device = next(vae.parameters()).device

    @torch.inference_mode()
    def encode(self, request: VideoRequest, earlier: Conditioning | None = None) -> EncodeResult:
        """All that the DiT needs to know of a request; draws from the request's generator in the reference's order.

        The result is ready on every stream of its device.

        Args:
            earlier: a result for the same request, of which only the prompts are made anew.

        Raises: ValueError when the request begins from a record that is none; GroupBrokenError for whatever goes wrong
            on one of several ranks.
        """
        return with_retry(lambda: self._encode(request, earlier), self._axis)

    def _encode(self, request: VideoRequest, earlier: Conditioning | None) -> EncodeResult:
        started_s = time.time()
        generator = torch.Generator()
        generator.manual_seed(request.params.seed)
        is_spoiled = self._faults.at("text.encode", request_id=request.request_id, prompt=request.prompts[0].prompt)
        prompts = tuple(self._embed(change.prompt) for change in request.prompts)
        if is_spoiled:
            prompts = tuple(_spoiled(prompt) for prompt in prompts)
        negative = self._embed(request.negative_prompt) if request.params.uses_guidance else None
        self._wait_for_device()
        embedded_s = time.time()
        history = self._history(request, generator) if earlier is None else earlier.history
        self._wait_for_device()
        phases = [Phase(name="text_encode", started_s=started_s, ended_s=embedded_s)]
        if earlier is None and request.image is not None:
            phases.append(Phase(name="image_encode", started_s=embedded_s, ended_s=time.time()))
        elif earlier is None and request.video is not None:
            phases.append(Phase(name="video_encode", started_s=embedded_s, ended_s=time.time()))
        conditioning = Conditioning(
            params=request.params, schedule=request.prompts, prompts=prompts, negative=negative, history=history
        )
        return EncodeResult(
            conditioning=conditioning,
            generator_state=(
                generator.get_state().numpy().tobytes() if request.start is None else request.start.generator_state
            ),
            phases=tuple(phases),
        )

    def _history(self, request: VideoRequest, generator: torch.Generator) -> History:
        if request.start is not None:
            return history_of(request.start.record, self._device)
        return starting_history(request, self._vae, generator, self._axis)

    def _embed(self, prompt: str) -> PromptEmbedding:
        cleaned = clean_prompt(prompt)
        key = hashlib.sha256(cleaned.encode()).hexdigest()
        return self._embeddings.get(key, lambda: PromptEmbedding(key=key, embeds=self._text_encoder.encode(prompt)))

    def _wait_for_device(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


def _spoiled(prompt: PromptEmbedding) -> PromptEmbedding:
    return PromptEmbedding(key=f"NaN for {prompt.key}", embeds=torch.full_like(prompt.embeds, torch.nan))
