"""What a server does between its start and its greeting: runs the recommended sizes once. Knows the engine and
requests; knows no port and no protocol.
"""

from __future__ import annotations

import logging
import time
from contextlib import aclosing
from typing import Literal

from helios_serve.engine.async_engine import AsyncEngine
from helios_serve.errors import HeliosError
from helios_serve.types import FRAMES_PER_CHUNK, Failure, ModelInfo, PromptChange, SamplingParams, VideoRequest

logger = logging.getLogger(__name__)

EXAMPLE_PROMPT = "a red ball rolls over green grass"
"""For checkpoints that recommend none."""


async def warm_up(engine: AsyncEngine, info: ModelInfo, which: Literal["none", "default", "all"]) -> None:
    """Waits until every role has a worker, then makes one chunk of each size: what is compiled or tuned at first use is
    so before a client waits, and the cost model learns."""
    await engine.wait_ready()
    sizes = {"none": (), "default": (info.default_size,), "all": info.recommended_sizes}[which]
    for width, height in sizes:
        await _make_chunk(engine, _request(info, width, height))


async def _make_chunk(engine: AsyncEngine, request: VideoRequest) -> None:
    started, size = time.perf_counter(), f"{request.params.width}x{request.params.height}"
    try:
        async with aclosing(engine.submit(request)) as events:
            async for event in events:
                if isinstance(event, Failure):
                    logger.error("warm-up at %s failed: %s", size, event.message)
    except HeliosError as error:  # not admitted: a worker was just lost, or the server is closing
        logger.error("no warm-up at %s: %s", size, error.message)
    logger.info("warmed up at %s in %.1f s", size, time.perf_counter() - started)


def _request(info: ModelInfo, width: int, height: int) -> VideoRequest:
    params = SamplingParams(
        width=width,
        height=height,
        num_frames=FRAMES_PER_CHUNK,
        fps=24,
        seed=0,
        steps=info.default_steps,
        guidance_scale=info.default_guidance_scale,
        amplify_first_chunk=info.variant == "distilled",
        approximations=info.approximations,
    )
    prompts = (PromptChange(chunk=0, prompt=EXAMPLE_PROMPT),)
    return VideoRequest(request_id=f"warmup-{width}x{height}", prompts=prompts, params=params)
