"""Starts the server, all in one process: checkpoint, role workers, executor, engine, and the surfaces over them. And
ends it.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import json
import logging
import os
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from importlib.metadata import distribution
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from helios_serve import __version__, event_loop
from helios_serve.api.connections import HttpConnection, WebSocketConnection
from helios_serve.api.job_runner import RunnerConfig
from helios_serve.api.probes import Pulse
from helios_serve.api.routes import GENERATIONS
from helios_serve.api.signed_urls import SigningKeys, load_signing_keys, read_signing_keys, signing_keys_file
from helios_serve.config import ExecutorConfig, ModelConfig, ServerConfig
from helios_serve.engine.async_engine import AsyncEngine
from helios_serve.errors import HeliosError
from helios_serve.listening import Listeners, bound, shown_address
from helios_serve.settings import Settings, describe
from helios_serve.store.connect import Stores, open_stores
from helios_serve.surfaces import Parts, Surfaces, open_surfaces
from helios_serve.telemetry import Metrics
from helios_serve.tracing import Tracing, open_tracing
from helios_serve.types import FRAMES_PER_CHUNK
from helios_serve.warmup import EXAMPLE_PROMPT, warm_up

logger = logging.getLogger(__name__)


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

    Raises: CheckpointError, and HeliosError when an address is taken or a TLS file or the store cannot be used, before
    the checkpoint is loaded; ValueError for signing keys that cannot be used.
    """
    server = settings.server
    with bound(server) as listeners:
        logger.info("settings:\n%s", describe(settings))
        with closing(open_stores(settings.store)) as stores:
            signing = _signing_keys(server)
            with closing(open_tracing(server.otel_endpoint, version=__version__)) as tracing:
                event_loop.run(_serve(_put_together(settings, stores, signing, tracing), listeners))


def _put_together(settings: Settings, stores: Stores, signing: SigningKeys, tracing: Tracing) -> Parts:
    """Loads the checkpoint; nothing runs yet."""
    # Here, as it takes seconds to import: an address that is taken is told before.
    from helios_serve.executors import cost_model, local, on_cluster

    model, engine, server, ray = settings.model, settings.engine, settings.server, settings.ray
    has_crashed = _watch_crashes(server.data_dir)
    config, executor = local(model) if ray is None else on_cluster(model, ray)
    info = config.info(model.served_name, approximations=model.approximations)
    metrics = Metrics(info.name, alias=server.metrics_alias)
    costs = cost_model(config, model.device, is_shared=ray is None)
    patient = engine.patient() if model.device == "cpu" else engine
    return Parts(
        engine=AsyncEngine(executor, costs, patient, metrics, tracing),
        executor=executor,
        stores=stores,
        info=info,
        server=server,
        about=_about(model, ray, server),
        signing=signing,
        metrics=metrics,
        tracing=tracing,
        # A crash of a worker of a cluster does not end this process.
        runner=RunnerConfig(crashed=has_crashed, notes_dispatch=ray is None),
    )


def _about(model: ModelConfig, ray: ExecutorConfig | None, server: ServerConfig) -> dict[str, object]:
    """What /version says beside the version and the model's name; no path of this machine."""
    one_each = {"encoder": 1, "dit": 1, "vae": 1}
    of_cluster = {} if ray is None else {"encoder": ray.num_encoders, "dit": ray.num_dit_groups, "vae": ray.num_vaes}
    return {
        "commit": _commit(),
        "device": model.device,
        "dtype": model.dtype,
        "quantize": model.quantize,
        "attention_precision": model.attention_precision,
        "cuda_graphs": model.cuda_graphs,
        "approximations": list(model.approximations),
        "executor": "local" if ray is None else "ray",
        "roles": of_cluster if of_cluster else one_each,
        "protocols": ["openai-videos", "helios.v1", *(["helios.video.v1"] if server.grpc_port is not None else [])],
    }


def _commit() -> str | None:
    """The commit that this package was made from, as its image (IMAGE_REVISION) or its installer says; else None."""
    if commit := os.environ.get("IMAGE_REVISION"):
        return commit
    text = distribution("helios-serve").read_text("direct_url.json")
    return None if text is None else json.loads(text).get("vcs_info", {}).get("commit_id")


def _signing_keys(server: ServerConfig) -> SigningKeys:
    if server.signing_keys_file is not None:
        return signing_keys_file(server.signing_keys_file)
    if server.signing_keys:
        try:
            return read_signing_keys(server.signing_keys)
        except ValueError as error:
            raise ValueError(f"signing_keys: {error}") from None
    return load_signing_keys(server.data_dir)


def _watch_crashes(data_dir: Path) -> bool:
    """Whether the last server of this directory ended by a fatal signal of its own; from now on one is noted."""
    path = data_dir / CRASH_FILE
    has_crashed = path.exists() and path.stat().st_size > 0
    faulthandler.enable(path.open("w"), all_threads=False)
    return has_crashed


async def _serve(parts: Parts, listeners: Listeners) -> None:
    await parts.engine.start()
    try:
        surfaces = await open_surfaces(parts, listeners)
        async with _beating(surfaces.pulse), _admin_port(surfaces.admin_app, listeners):
            await _serve_callers(parts, surfaces, listeners)
    finally:
        await parts.engine.close(at_once=True)  # it is closed already, unless something above failed


@asynccontextmanager
async def _beating(pulse: Pulse) -> AsyncIterator[None]:
    task = asyncio.create_task(pulse.beat())
    try:
        yield
    finally:
        task.cancel()


@asynccontextmanager
async def _admin_port(app: FastAPI | None, listeners: Listeners) -> AsyncIterator[None]:
    """The open routes, where they have a port of their own; they answer until the very end."""
    if app is None or listeners.admin is None:
        yield
        return
    http = _HttpServer(_admin_config(app))
    serving = asyncio.create_task(_run_http(http, listeners.admin))
    try:
        await _started(http, serving)
        yield
    finally:
        http.should_exit = True
        await serving


async def _serve_callers(parts: Parts, surfaces: Surfaces, listeners: Listeners) -> None:
    """The main port and gRPC, from their start to the end of the drain."""
    http = _HttpServer(_http_config(surfaces.app, parts.server))
    ending = _Ending(parts.engine, surfaces, http)
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ending.begin)
    serving = asyncio.create_task(_run_http(http, listeners.http))
    tasks: list[asyncio.Task[None]] = [serving]
    try:
        await _started(http, serving)
        if surfaces.grpc is not None and not serving.done():
            await surfaces.grpc.start()
        tasks.append(asyncio.create_task(_welcome(parts, listeners)))
        await serving
        await ending.wait()
    finally:
        http.should_exit = True
        for task in tasks[1:]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if surfaces.grpc is not None:
            await surfaces.grpc.stop()


async def _started(http: uvicorn.Server, serving: asyncio.Task[None]) -> None:
    """Returns when it listens, or has ended already. Raises: what it raises."""
    while not (http.started or serving.done()):
        await asyncio.sleep(0.01)
    if serving.done():
        await serving


class _Ending:
    """The end of a server. First signal: nothing new is taken in, running chunks end, open calls are answered, and only
    then the ports close, so that whoever asks meanwhile is told. Second signal: at once."""

    def __init__(self, engine: AsyncEngine, surfaces: Surfaces, http: uvicorn.Server) -> None:
        self._engine = engine
        self._surfaces = surfaces
        self._http = http
        self._tasks: list[asyncio.Task[None]] = []

    def begin(self) -> None:
        """Answers a signal."""
        at_once = bool(self._tasks)
        self._http.force_exit = at_once
        self._surfaces.service.refuse()
        self._tasks.append(asyncio.create_task(self._drain(at_once=at_once)))

    async def wait(self) -> None:
        """Returns when all is given back."""
        for result in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(result, Exception):
                logger.error("the end was not orderly", exc_info=result)

    async def _drain(self, *, at_once: bool) -> None:
        grpc = self._surfaces.grpc
        try:
            if grpc is not None:
                self._tasks.append(asyncio.create_task(grpc.drain(0.0 if at_once else DRAIN_S)))
            await self._surfaces.realtime.restart()
            await self._engine.close(at_once=at_once)
            await self._surfaces.service.close()
        finally:
            self._http.should_exit = True


class _HttpServer(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to the caller: uvicorn would wait for open calls before their jobs are ended."""
        yield


async def _run_http(http: uvicorn.Server, listener: socket.socket) -> None:
    """Raises: HeliosError when another process has begun to listen on the address since it was taken."""
    address = shown_address(listener)
    try:
        await http.serve(sockets=[listener])
    except OSError as error:
        raise HeliosError(f"cannot listen on {address}: {error.strerror}; choose another port") from error


def _http_config(app: FastAPI, server: ServerConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        ssl_certfile=server.tls_cert,
        ssl_keyfile=server.tls_key,
        ssl_ca_certs=None if server.tls_client_ca is None else str(server.tls_client_ca),
        ssl_cert_reqs=ssl.CERT_NONE if server.tls_client_ca is None else ssl.CERT_REQUIRED,
        log_config=None,
        access_log=False,
        http=HttpConnection,
        ws=WebSocketConnection,
        ws_per_message_deflate=False,
        ws_max_size=MAX_MESSAGE_BYTES,
        timeout_graceful_shutdown=GRACE_S,
    )


def _admin_config(app: FastAPI) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        lifespan="off",
        log_config=None,
        access_log=False,
        http=HttpConnection,
        ws="none",
        timeout_graceful_shutdown=GRACE_S,
    )


async def _welcome(parts: Parts, listeners: Listeners) -> None:
    """Warms the workers up, then says that and where the server is ready."""
    await warm_up(parts.engine, parts.info, parts.server.warmup)
    gc.collect()
    gc.freeze()  # all that lives by now lives on: to look through it again would hold every stream up
    print(_greeting(parts, listeners), flush=True)


def _greeting(parts: Parts, listeners: Listeners) -> str:
    """The addresses, and a command to paste."""
    info, url = parts.info, listeners.url
    body = json.dumps({"prompt": info.example_prompt or EXAMPLE_PROMPT, "num_frames": FRAMES_PER_CHUNK})
    key = "-H 'Authorization: Bearer YOUR_KEY' " if parts.server.has_keys else ""
    grpc = "" if listeners.grpc is None else f"gRPC: {shown_address(listeners.grpc)}. "
    admin = "" if listeners.admin is None else f"Probes and metrics: http://{shown_address(listeners.admin)}. "
    return (
        f"\nhelios-serve {__version__}: {info.name} ({info.variant}) at {url}\n\nTry:\n"
        f"  curl {url}{GENERATIONS} {key}-H 'Content-Type: application/json' -H 'Accept: video/mp4' \\\n"
        f"    -d '{body}' -o video.mp4\n\n"
        f"Or open {url} in a browser. API documentation: {url}/docs. {grpc}{admin}Stop with Ctrl-C.\n"
    )
