"""Starts the server: checkpoint, role workers, executor, engine, service and HTTP, put together in one process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import uvicorn

from helios_serve import __version__
from helios_serve.api.http_server import GENERATIONS, ServerSettings, create_app
from helios_serve.api.service import ServiceConfig, VideoService
from helios_serve.config import Device, EngineConfig, ExecutorConfig, ModelConfig, ServerConfig
from helios_serve.engine.async_engine import AsyncEngine
from helios_serve.engine.executor import Executor
from helios_serve.engine.step_cost import CPU_PRIOR, CostModel, DevicePrior, ModelShape
from helios_serve.errors import HeliosError
from helios_serve.model_executor.model import HeliosModel, load_model, open_checkpoint
from helios_serve.model_executor.model_config import CheckpointConfig
from helios_serve.model_executor.runner import Runner
from helios_serve.telemetry import Metrics
from helios_serve.types import FRAMES_PER_CHUNK, Failure, ModelInfo, PromptChange, SamplingParams, VideoRequest
from helios_serve.workers import stills
from helios_serve.workers.encoder import EncoderWorker
from helios_serve.workers.local_executor import LocalExecutor
from helios_serve.workers.media import Decoder
from helios_serve.workers.segment import progressive_mp4
from helios_serve.workers.vae import VaeWorker

logger = logging.getLogger(__name__)


def run_server(model: ModelConfig, engine: EngineConfig, server: ServerConfig, ray: ExecutorConfig | None) -> None:
    """Loads the checkpoint and serves it until SIGINT or SIGTERM.

    Args:
        ray: the workers of a Ray cluster; None runs all roles in this process.

    Raises: CheckpointError, and HeliosError when the address is taken.
    """
    listener = _listen(server)
    config, executor = _local(model) if ray is None else (open_checkpoint(model).config, ray_executor(model, ray))
    info = config.info(model.served_name)
    metrics = Metrics(info.name, alias=server.metrics_alias)
    costs = cost_model(config, model.device, is_shared=ray is None)
    patient = engine.patient() if model.device == "cpu" else engine
    asyncio.run(_serve(AsyncEngine(executor, costs, patient, metrics), info, server, listener, metrics))


def _local(model: ModelConfig) -> tuple[CheckpointConfig, Executor]:
    loaded = load_model(model)
    return loaded.config, local_executor(loaded)


def local_executor(model: HeliosModel) -> LocalExecutor:
    """All roles of one checkpoint in this process."""
    return LocalExecutor(
        EncoderWorker(model.text_encoder, model.vae), Runner(model.transformer, model.rules), VaeWorker(model.vae)
    )


def ray_executor(model: ModelConfig, config: ExecutorConfig) -> Executor:
    """Every role in workers of a Ray cluster.

    Raises: HeliosError without the package.
    """
    try:
        from helios_serve.workers.ray_executor import RayExecutor
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise HeliosError("executor ray: the package is missing; pip install 'helios-serve[ray]'") from error
    return RayExecutor(model, config)


def cost_model(config: CheckpointConfig, device: Device, *, is_shared: bool) -> CostModel:
    """What the engine assumes of a checkpoint on a device until it has measured.

    Args:
        is_shared: whether decoding takes its time from the device that runs the steps.
    """
    transformer = config.transformer
    shape = ModelShape(
        dim=transformer.dim,
        ffn_dim=transformer.ffn_dim,
        num_layers=transformer.num_layers,
        patch=transformer.patch_size,
        spatial_scale=config.vae.scale_factor_spatial,
    )
    prior = CPU_PRIOR if device == "cpu" else DevicePrior()
    return CostModel(shape, replace(prior, vae_on_device=is_shared))


class _HttpServer(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to the caller: uvicorn would wait for open calls before their jobs are ended."""
        yield


async def _serve(
    engine: AsyncEngine, info: ModelInfo, server: ServerConfig, listener: socket.socket, metrics: Metrics
) -> None:
    await engine.start()
    config = ServiceConfig(data_dir=server.data_dir)
    service = VideoService(engine=engine, muxer=progressive_mp4, stills=stills, model=info, config=config)
    app = create_app(service, ServerSettings(decoder=Decoder(), version=__version__, metrics=metrics))
    http = _HttpServer(uvicorn.Config(app, log_config=None, access_log=False, ws_per_message_deflate=False))
    closing: list[asyncio.Task[None]] = []

    def stop() -> None:
        """First signal: running chunks end, open calls are answered. Second: at once."""
        http.force_exit = http.should_exit
        http.should_exit = True
        closing.append(asyncio.create_task(engine.close(at_once=http.force_exit)))

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    serving = asyncio.create_task(http.serve(sockets=[listener]))
    welcoming = asyncio.create_task(_welcome(engine, info, server, listener))
    await serving
    welcoming.cancel()
    await asyncio.gather(welcoming, *closing, return_exceptions=True)


async def _welcome(engine: AsyncEngine, info: ModelInfo, server: ServerConfig, listener: socket.socket) -> None:
    """Warms the workers up, then says that and where the server is ready."""
    await engine.wait_ready()
    sizes = {"none": (), "default": (info.default_size,), "all": info.recommended_sizes}[server.warmup]
    for width, height in sizes:
        await _warm_up(engine, info, width, height)
    print(_greeting(info, listener), flush=True)


async def _warm_up(engine: AsyncEngine, info: ModelInfo, width: int, height: int) -> None:
    """Makes one chunk: what is compiled or tuned at first use is so before a client waits; the cost model learns."""
    started = time.perf_counter()
    params = SamplingParams(
        width=width,
        height=height,
        num_frames=FRAMES_PER_CHUNK,
        fps=24,
        seed=0,
        steps=info.default_steps,
        guidance_scale=info.default_guidance_scale,
        amplify_first_chunk=info.variant == "distilled",
    )
    prompts = (PromptChange(chunk=0, prompt="a red ball rolls over green grass"),)
    request = VideoRequest(request_id=f"warmup-{width}x{height}", prompts=prompts, params=params)
    try:
        async with contextlib.aclosing(engine.submit(request)) as events:
            async for event in events:
                if isinstance(event, Failure):
                    logger.error("warm-up at %dx%d failed: %s", width, height, event.message)
    except HeliosError as error:  # not admitted: a worker was just lost, or the server is closing
        logger.error("no warm-up at %dx%d: %s", width, height, error.message)
    logger.info("warmed up at %dx%d in %.1f s", width, height, time.perf_counter() - started)


def _listen(server: ServerConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((server.host, server.port))
    except OSError as error:
        listener.close()
        raise HeliosError(
            f"cannot listen on {server.host}:{server.port}: {error.strerror}; choose another --port"
        ) from error
    return listener


def _greeting(info: ModelInfo, listener: socket.socket) -> str:
    """The address, and a command to paste."""
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    body = json.dumps({"prompt": "a red ball rolls over green grass", "num_frames": FRAMES_PER_CHUNK})
    return (
        f"\nhelios-serve {__version__}: {info.name} ({info.variant}) at {url}\n\nTry:\n"
        f"  curl {url}{GENERATIONS} -H 'Content-Type: application/json' -H 'Accept: video/mp4' \\\n"
        f"    -d '{body}' -o video.mp4\n\n"
        f"Or open {url} in a browser. API documentation: {url}/docs. Stop with Ctrl-C.\n"
    )
