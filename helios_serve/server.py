"""Starts the server: checkpoint, role workers, executor, engine, service and HTTP, put together in one process."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import json
import logging
import signal
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import uvicorn

from helios_serve import __version__
from helios_serve.api.auth import Authenticator, OriginPolicy
from helios_serve.api.caller_media import CallerMedia
from helios_serve.api.files import FileService
from helios_serve.api.grpc_access import GrpcAccess
from helios_serve.api.grpc_server import GrpcServer, GrpcSettings
from helios_serve.api.grpc_service import GrpcDesk
from helios_serve.api.http_access import HttpAccess, owners_in
from helios_serve.api.http_server import Extras, create_app
from helios_serve.api.job_runner import RunnerConfig
from helios_serve.api.keys import KeyFile, KeyRing, KeySource, keys_from_env
from helios_serve.api.limits import Limiter
from helios_serve.api.media_fetch import url_reader
from helios_serve.api.outgoing import Outgoing, OutgoingPolicy
from helios_serve.api.realtime import realtime_route
from helios_serve.api.routes import GENERATIONS, Desk, ServerSettings
from helios_serve.api.service import ServiceConfig, VideoService
from helios_serve.api.signed_urls import UrlSigner, load_signing_keys, without_token
from helios_serve.api.webhooks import WebhookSender
from helios_serve.config import Device, ExecutorConfig, ModelConfig, ServerConfig
from helios_serve.engine.async_engine import AsyncEngine
from helios_serve.engine.executor import Executor
from helios_serve.engine.step_cost import CPU_PRIOR, CostModel, DevicePrior, ModelShape
from helios_serve.errors import HeliosError
from helios_serve.model_executor.model import HeliosModel, load_model, open_checkpoint
from helios_serve.model_executor.model_config import CheckpointConfig
from helios_serve.model_executor.runner import Runner
from helios_serve.settings import Settings, describe
from helios_serve.store.connect import Stores, open_stores
from helios_serve.telemetry import Metrics
from helios_serve.tracing import Tracing, open_tracing
from helios_serve.types import FRAMES_PER_CHUNK, Failure, ModelInfo, PromptChange, SamplingParams, VideoRequest
from helios_serve.workers import stills
from helios_serve.workers.encoder import EncoderWorker
from helios_serve.workers.local_executor import LocalExecutor
from helios_serve.workers.media_sandbox import SandboxDecoder, SandboxLimits
from helios_serve.workers.segment import progressive_mp4
from helios_serve.workers.vae import VaeWorker

logger = logging.getLogger(__name__)


MEDIA_LIMITS = SandboxLimits(cpu_s=60, wall_s=90.0)
"""Of one decoding: an hour-long container stops at 1,452 frames, which take up to 45 s of CPU at 1080p."""

MAX_MESSAGE_BYTES = 32 << 20
"""Of a WebSocket: the first message of a session may hold an image."""

GRACE_S = 2
"""How long, after all jobs are given back, connections may take to end before they are cut."""

DRAIN_S = 5.0
"""How long gRPC calls may take to end by themselves when the server ends."""

CRASH_FILE = "crash.log"
"""Where a fatal signal of this process leaves its traceback."""


def run_server(settings: Settings) -> None:
    """Loads the checkpoint and serves it until SIGINT or SIGTERM.

    Raises: CheckpointError, and HeliosError when the address is taken or the store cannot be used.
    """
    model, engine, server, ray = settings.model, settings.engine, settings.server, settings.ray
    listener = _listen(server)
    logger.info("settings:\n%s", describe(settings))
    stores = open_stores(settings.store)
    has_crashed = _watch_crashes(server.data_dir)
    config, executor = _local(model) if ray is None else (open_checkpoint(model).config, ray_executor(model, ray))
    info = config.info(model.served_name)
    metrics = Metrics(info.name, alias=server.metrics_alias)
    costs = cost_model(config, model.device, is_shared=ray is None)
    patient = engine.patient() if model.device == "cpu" else engine
    tracing = open_tracing(server.otel_endpoint, version=__version__)
    parts = _Parts(
        engine=AsyncEngine(executor, costs, patient, metrics, tracing),
        tracing=tracing,
        stores=stores,
        info=info,
        server=server,
        metrics=metrics,
        # A crash of a worker of a cluster does not end this process.
        runner=RunnerConfig(crashed=has_crashed, notes_dispatch=ray is None),
    )
    try:
        asyncio.run(_serve(parts, listener))
    finally:
        tracing.close()
        stores.close()


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


class _WithoutTokens(logging.Filter):
    """Keeps tokens in addresses out of the log."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = without_token(record.getMessage()), ()
        return True


class _HttpServer(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to the caller: uvicorn would wait for open calls before their jobs are ended."""
        yield


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """What a server is put together from."""

    engine: AsyncEngine
    stores: Stores
    info: ModelInfo
    server: ServerConfig
    metrics: Metrics
    tracing: Tracing
    runner: RunnerConfig


async def _serve(parts: _Parts, listener: socket.socket) -> None:
    engine, info, server = parts.engine, parts.info, parts.server
    await engine.start()
    limiter = Limiter()
    service = VideoService(
        stores=parts.stores,
        engine=engine,
        muxer=progressive_mp4,
        stills=stills,
        model=info,
        limiter=limiter,
        metrics=parts.metrics,
        config=ServiceConfig(runner=parts.runner),
    )
    decoder = SandboxDecoder(limits=MEDIA_LIMITS)
    await asyncio.to_thread(decoder.check)
    stores, keys = parts.stores, load_signing_keys(server.data_dir)
    files = FileService(stores.access, stores.blobs, stores.jobs, limiter)
    loop = asyncio.get_running_loop()
    urls = url_reader(frozenset(server.media_url_hosts), loop)
    outgoing = Outgoing(OutgoingPolicy(allow_private=server.webhook_private))
    webhooks = WebhookSender(stores.access, outgoing, keys, metrics=parts.metrics)
    service.on_end = webhooks.wake
    origins = OriginPolicy(is_keyless=not server.has_keys, allowed=frozenset(server.cors_origins))
    authenticator = Authenticator(_key_sources(server))
    desk = Desk(
        service=service,
        access=HttpAccess(
            authenticator,
            origins,
            UrlSigner(keys),
            limiter,
            owner_of=owners_in(stores.database),
        ),
        settings=ServerSettings(version=__version__, metrics=parts.metrics, tracing=parts.tracing),
        webhooks=webhooks,
        media_for=CallerMedia(service, files, decoder.for_tenant, urls, loop),
    )
    realtime = realtime_route(service, desk.parsed_live, desk.access.socket_caller, desk.links)
    extras = Extras(
        realtime=realtime,
        files=files,
        rows=stores.access,
        origins=origins,
    )
    app = create_app(desk, extras)
    grpc = None
    if server.grpc_port is not None:
        grpc_desk = GrpcDesk(
            service=service,
            parsed=desk.parsed,
            parsed_live=desk.parsed_live,
            limiter=limiter,
            limits=desk.settings.limits,
            content_url=lambda video_id: desk.content_url(_base_url(server, listener), video_id),
        )
        grpc = GrpcServer(grpc_desk, GrpcAccess(authenticator, limiter), parts.metrics, _grpc_settings(server))
    config = uvicorn.Config(
        app,
        ssl_certfile=server.tls_cert,
        ssl_keyfile=server.tls_key,
        ssl_ca_certs=None if server.tls_client_ca is None else str(server.tls_client_ca),
        ssl_cert_reqs=ssl.CERT_NONE if server.tls_client_ca is None else ssl.CERT_REQUIRED,
        log_config=None,
        access_log=False,
        ws_per_message_deflate=False,
        ws_max_size=MAX_MESSAGE_BYTES,
        timeout_graceful_shutdown=GRACE_S,
    )
    logging.getLogger("uvicorn.error").addFilter(_WithoutTokens())
    http = _HttpServer(config)
    closing: list[asyncio.Task[None]] = []

    def stop() -> None:
        """First signal: running chunks end, open calls are answered. Second: at once."""
        http.force_exit = http.should_exit
        http.should_exit = True
        service.refuse()
        closing.append(asyncio.create_task(drain(at_once=http.force_exit)))

    async def drain(*, at_once: bool) -> None:
        if grpc is not None:
            closing.append(asyncio.create_task(grpc.drain(0.0 if at_once else DRAIN_S)))
        await realtime.restart()
        await engine.close(at_once=at_once)
        await service.close()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    serving = asyncio.create_task(http.serve(sockets=[listener]))
    while not (http.started or serving.done()):
        await asyncio.sleep(0.01)
    grpc_port = None if grpc is None or serving.done() else await grpc.start()
    welcoming = asyncio.create_task(_welcome(parts, _greeting(info, server, listener, grpc_port)))
    await serving
    welcoming.cancel()
    await asyncio.gather(welcoming, *closing, return_exceptions=True)
    if grpc is not None:
        await grpc.stop()


def _key_sources(server: ServerConfig) -> list[KeySource]:
    sources: list[KeySource] = []
    if server.keys:
        sources.append(KeyRing(keys_from_env(server.keys)))
    if server.keys_file is not None:
        sources.append(KeyFile(server.keys_file))
    return sources


def _watch_crashes(data_dir: Path) -> bool:
    """Whether the last server of this directory ended by a fatal signal of its own; from now on one is noted."""
    path = data_dir / CRASH_FILE
    has_crashed = path.exists() and path.stat().st_size > 0
    faulthandler.enable(path.open("w"), all_threads=False)
    return has_crashed


async def _welcome(parts: _Parts, greeting: str) -> None:
    """Warms the workers up, then says that and where the server is ready."""
    engine, info, server = parts.engine, parts.info, parts.server
    await engine.wait_ready()
    sizes = {"none": (), "default": (info.default_size,), "all": info.recommended_sizes}[server.warmup]
    for width, height in sizes:
        await _warm_up(engine, info, width, height)
    print(greeting, flush=True)


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


def _base_url(server: ServerConfig, listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    scheme = "http" if server.tls_cert is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def _grpc_settings(server: ServerConfig) -> GrpcSettings:
    assert server.grpc_port is not None
    return GrpcSettings(
        host=server.host,
        port=server.grpc_port,
        tls_cert=server.tls_cert,
        tls_key=server.tls_key,
        tls_client_ca=server.tls_client_ca,
    )


def _greeting(info: ModelInfo, server: ServerConfig, listener: socket.socket, grpc_port: int | None) -> str:
    """The address, and a command to paste."""
    url = _base_url(server, listener)
    body = json.dumps({"prompt": "a red ball rolls over green grass", "num_frames": FRAMES_PER_CHUNK})
    key = "-H 'Authorization: Bearer YOUR_KEY' " if server.has_keys else ""
    grpc = "" if grpc_port is None else f"gRPC: {server.host}:{grpc_port}. "
    return (
        f"\nhelios-serve {__version__}: {info.name} ({info.variant}) at {url}\n\nTry:\n"
        f"  curl {url}{GENERATIONS} {key}-H 'Content-Type: application/json' -H 'Accept: video/mp4' \\\n"
        f"    -d '{body}' -o video.mp4\n\n"
        f"Or open {url} in a browser. API documentation: {url}/docs. {grpc}Stop with Ctrl-C.\n"
    )
