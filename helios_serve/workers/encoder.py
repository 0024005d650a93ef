"""The encoder role: prompts, images and videos of a request become its conditioning.

Knows the text encoder and the VAE's encoder; knows nothing of steps, clients or where its result goes. One thread uses
a worker.
"""

from __future__ import annotations

import hashlib

import torch

from helios_serve.model_executor.byte_cache import ByteCache
from helios_serve.model_executor.conditioning import Conditioning, starting_history
from helios_serve.model_executor.history import Continuation
from helios_serve.model_executor.prompt_schedule import PromptEmbedding
from helios_serve.model_executor.text_encoder import TextEncoder, clean_prompt
from helios_serve.model_executor.vae import WanVAE
from helios_serve.types import VideoRequest


class EncoderWorker:
    """Encodes requests; embeddings of recent prompts are kept by content.

    Args:
        cache_bytes: limit of the kept embeddings (4 MiB each at 512 x 4096 bfloat16).
    """

    def __init__(self, text_encoder: TextEncoder, vae: WanVAE, cache_bytes: int = 1 << 30) -> None:
        self._text_encoder = text_encoder
        self._vae = vae
        self._embeddings = ByteCache[PromptEmbedding](cache_bytes)

    @torch.inference_mode()
    def encode(self, request: VideoRequest) -> Conditioning:
        """All that the DiT needs to know of a request; draws from the request's generator in the reference's order."""
        generator = torch.Generator()
        generator.manual_seed(request.params.seed)
        prompts = tuple(self._embed(change.prompt) for change in request.prompts)
        negative = self._embed(request.negative_prompt) if request.params.uses_guidance else None
        history = starting_history(request, self._vae, generator)
        return Conditioning(
            params=request.params,
            schedule=request.prompts,
            prompts=prompts,
            negative=negative,
            continuation=Continuation(history=history, generator_state=generator.get_state()),
        )

    def _embed(self, prompt: str) -> PromptEmbedding:
        cleaned = clean_prompt(prompt)
        key = hashlib.sha256(cleaned.encode()).hexdigest()
        return self._embeddings.get(key, lambda: PromptEmbedding(key=key, embeds=self._text_encoder.encode(prompt)))
