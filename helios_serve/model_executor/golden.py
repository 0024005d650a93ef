"""One small fixed chunk, whose digest tells whether a DiT group computes what it should.

Knows a transformer and its sampling rules. Digests are equal on one type of device, not across types.
"""

from __future__ import annotations

import torch

from helios_serve.model_executor.batch import ChunkInput, SamplingRules
from helios_serve.model_executor.digest import latents_digest
from helios_serve.model_executor.history import NUM_HISTORY_FRAMES, History
from helios_serve.model_executor.prompt_schedule import PromptEmbedding
from helios_serve.model_executor.runner import Runner
from helios_serve.model_executor.transformer import HeliosTransformer
from helios_serve.types import FRAMES_PER_CHUNK, SamplingParams

_SEED = 20260
_TEXT_TOKENS = 32


def golden_digest(transformer: HeliosTransformer, rules: SamplingRules) -> str:
    """The digest of the float32 latents of the fixed chunk: the smallest size, one step per stage, no guidance.

    Raises: NotFiniteError when the transformer makes NaN or infinity.
    """
    runner = Runner(transformer, rules, text_cache_bytes=0)
    runner.join(_golden_chunk(transformer, rules))
    while True:
        result = runner.step()
        for _, error in result.failed:
            raise error
        if result.finished:
            return latents_digest(result.finished[0].latents)


def _golden_chunk(transformer: HeliosTransformer, rules: SamplingRules) -> ChunkInput:
    generator = torch.Generator()
    generator.manual_seed(_SEED)
    config, num_stages = transformer.config, rules.scheduler.stages
    height, width = (patch * 2 ** (num_stages - 1) for patch in config.patch_size[1:])
    frames = torch.randn(config.in_channels, NUM_HISTORY_FRAMES, height, width, generator=generator)
    embeds = torch.randn(_TEXT_TOKENS, config.text_dim, generator=generator)
    params = SamplingParams(
        width=width,  # of the latents: nothing here decodes them
        height=height,
        num_frames=FRAMES_PER_CHUNK,
        fps=24,
        seed=_SEED,
        steps=(1,) * num_stages,
        guidance_scale=1.0,
    )
    return ChunkInput(
        task_id="golden",
        request_id="golden",
        chunk=0,
        params=params,
        prompt=PromptEmbedding(key="golden", embeds=embeds),
        negative=None,
        history=History(frames=frames, first=frames[:, :1]),
        generator_state=generator.get_state().numpy().tobytes(),
    )
