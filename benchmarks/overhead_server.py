"""The child of `overhead`: a whole server over an executor that takes no time, and the same engine without its API.

    python -m benchmarks.overhead_server DATA_DIR

Prints its port. For a line `ready REQUESTS CHUNKS` on its input it makes the segments of so many requests ahead, for
`direct REQUESTS CHUNKS` it runs them through the engine alone, one after the other; then it prints `done`. It ends with
its input.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import numpy as np
import uvicorn

from benchmarks.instant_executor import Canned, InstantExecutor
from helios_serve import event_loop
from helios_serve.api.connections import HttpConnection
from helios_serve.api.job_runner import RunnerConfig
from helios_serve.api.signed_urls import load_signing_keys
from helios_serve.config import EngineConfig, ServerConfig
from helios_serve.engine.async_engine import AsyncEngine
from helios_serve.engine.step_cost import CostModel, DevicePrior, ModelShape
from helios_serve.listening import bound
from helios_serve.store.connect import StoreConfig, Stores, open_stores
from helios_serve.surfaces import Parts, open_surfaces
from helios_serve.telemetry import Metrics
from helios_serve.tracing import open_tracing
from helios_serve.types import (
    FRAMES_PER_CHUNK,
    ChunkReady,
    Failure,
    ModelInfo,
    PromptChange,
    Resume,
    SamplingParams,
    VideoRequest,
)
from helios_serve.workers.segment import SegmentSpec, encode_segment

WIDTH, HEIGHT, FPS = 640, 384, 24.0
STEPS = (1, 1, 1)
MAX_CHUNKS = 24
"""Of a request that the child can serve."""
STORE_S = 0.005
"""What keeping latents takes, about: the engine waits for it, as the devices take no time, and plans once more."""
DISTILLED = ModelInfo(
    name="helios-distilled",
    variant="distilled",
    num_stages=3,
    guidance="cfg",
    size_multiple=64,
    spatial_scale=8,
    latent_channels=16,
    default_steps=STEPS,
    default_guidance_scale=1.0,
    recommended_sizes=((WIDTH, HEIGHT),),
    max_pixels=921_600,
)


def canned(num_chunks: int) -> Canned:
    """Segments of a moving gradient with a little noise: 0.47 MB each, near the most of what a segment has at this size
    (0.1 to 0.5 MB)."""
    rows, columns = np.mgrid[0 : HEIGHT * 3 // 2, 0:WIDTH]
    noise = np.random.default_rng(0).random((FRAMES_PER_CHUNK, HEIGHT * 3 // 2, WIDTH)) < 0.05
    moving = np.stack([60 + (rows + columns + 4 * shown) // 8 for shown in range(FRAMES_PER_CHUNK)])
    spec = SegmentSpec(width=WIDTH, height=HEIGHT, fps=FPS, crf=23, codec="h264")
    frames = (moving + noise).astype(np.uint8)
    made = [encode_segment(frames, spec, chunk, FRAMES_PER_CHUNK * chunk) for chunk in range(num_chunks)]
    return Canned(init=made[0][0], media=tuple(media for _, media in made), step_ms=100.0, num_steps=sum(STEPS))


async def serve(stores: Stores, data_dir: Path) -> None:
    """Until standard input ends."""
    server = ServerConfig(port=0, data_dir=data_dir, warmup="none")
    executor, metrics = InstantExecutor(canned(MAX_CHUNKS)), Metrics(DISTILLED.name)
    # A device so fast that nothing is refused.
    costs = CostModel(ModelShape(), replace(DevicePrior(), flops_per_s=1e18, floor_s=1e-4, decode_s=1e-3))
    tracing = open_tracing(None, version="0")
    engine = AsyncEngine(executor, costs, EngineConfig(), metrics, tracing)
    with bound(server) as listeners:
        await engine.start()
        parts = Parts(
            engine=engine,
            executor=executor,
            stores=stores,
            info=DISTILLED,
            server=server,
            about={},
            signing=load_signing_keys(data_dir),
            metrics=metrics,
            tracing=tracing,
            runner=RunnerConfig(),
        )
        surfaces = await open_surfaces(parts, listeners)
        config = uvicorn.Config(surfaces.app, log_config=None, access_log=False, http=HttpConnection, ws="none")
        http = uvicorn.Server(config)
        serving = asyncio.create_task(http.serve(sockets=[listeners.http]))
        await engine.wait_ready()
        while not http.started:
            await asyncio.sleep(0.01)
        print(listeners.http.getsockname()[1], flush=True)
        async for line in _lines():
            what, *numbers = line.split()
            num_requests, num_chunks = map(int, numbers)
            if what == "ready":
                executor.make_ready(num_requests, num_chunks)
            else:
                await _run_directly(engine, num_requests, num_chunks)
            print("done", flush=True)
        http.should_exit = True
        await serving
        await engine.close(at_once=True)


async def _run_directly(engine: AsyncEngine, num_requests: int, num_chunks: int) -> None:
    """As the API's runner does it, but for what it writes and whom it tells."""
    for number in range(num_requests):
        params = SamplingParams(
            width=WIDTH,
            height=HEIGHT,
            num_frames=FRAMES_PER_CHUNK * num_chunks,
            fps=FPS,
            seed=0,
            steps=STEPS,
            guidance_scale=1.0,
        )
        prompts = (PromptChange(chunk=0, prompt="a fox"),)
        request = VideoRequest(request_id=f"direct-{number}", prompts=prompts, params=params)
        engine.check(request)
        start = Resume(next_chunk=0, records=(), generator_state=b"")
        async with aclosing(engine.run(request, resume=start, has_keeper=True)) as events:
            async for event in events:
                assert not isinstance(event, Failure), event
                if isinstance(event, ChunkReady):
                    await asyncio.sleep(STORE_S)
                    engine.committed(request.request_id, event.record.chunk)


async def _lines() -> AsyncIterator[str]:
    """Of standard input."""
    while line := await asyncio.to_thread(sys.stdin.readline):
        yield line


def main() -> None:
    data_dir = Path(sys.argv[1])
    stores = open_stores(StoreConfig(data_dir=data_dir))
    try:
        event_loop.run(serve(stores, data_dir))
    finally:
        stores.close()


if __name__ == "__main__":
    main()
