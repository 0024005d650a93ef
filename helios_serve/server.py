"""Starts the server: checkpoint, role workers, executor, engine, service and HTTP, put together in one process."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from helios_serve import __version__
from helios_serve.api.http_server import GENERATIONS, ServerSettings, create_app
from helios_serve.api.service import ServiceConfig, VideoService
from helios_serve.config import EngineConfig, ModelConfig, ServerConfig
from helios_serve.engine.async_engine import AsyncEngine
from helios_serve.errors import HeliosError
from helios_serve.model_executor.model import HeliosModel, load_model
from helios_serve.model_executor.runner import Runner
from helios_serve.types import FRAMES_PER_CHUNK, ModelInfo
from helios_serve.workers.encoder import EncoderWorker
from helios_serve.workers.local_executor import LocalExecutor
from helios_serve.workers.media import Decoder
from helios_serve.workers.segment import progressive_mp4
from helios_serve.workers.vae import VaeWorker


def run_server(model: ModelConfig, engine: EngineConfig, server: ServerConfig) -> None:
    """Loads the checkpoint and serves it until SIGINT or SIGTERM.

    Raises: CheckpointError, and HeliosError when the address is taken.
    """
    listener = _listen(server)
    loaded = load_model(model)
    info = loaded.config.info(model.served_name)
    asyncio.run(_serve(AsyncEngine(local_executor(loaded), engine), info, server, listener))


def local_executor(model: HeliosModel) -> LocalExecutor:
    """All roles of one checkpoint in this process."""
    return LocalExecutor(
        EncoderWorker(model.text_encoder, model.vae), Runner(model.transformer, model.rules), VaeWorker(model.vae)
    )


class _HttpServer(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to the caller: uvicorn would wait for open calls before their jobs are ended."""
        yield


async def _serve(engine: AsyncEngine, info: ModelInfo, server: ServerConfig, listener: socket.socket) -> None:
    await engine.start()
    config = ServiceConfig(data_dir=server.data_dir)
    service = VideoService(engine=engine, muxer=progressive_mp4, model=info, config=config)
    app = create_app(service, ServerSettings(decoder=Decoder(), version=__version__))
    http = _HttpServer(uvicorn.Config(app, log_config=None, access_log=False, ws_per_message_deflate=False))
    closing: list[asyncio.Task[None]] = []

    def stop() -> None:
        """First signal: running jobs end, open calls are answered. Second: at once."""
        http.force_exit = http.should_exit
        http.should_exit = True
        closing.append(asyncio.create_task(engine.close()))

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    serving = asyncio.create_task(http.serve(sockets=[listener]))
    while not http.started and not serving.done():
        await asyncio.sleep(0.01)
    if http.started:
        print(_welcome(info, listener), flush=True)
    await serving
    await asyncio.gather(*closing)


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


def _welcome(info: ModelInfo, listener: socket.socket) -> str:
    """The address, and a command to paste."""
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    body = json.dumps({"prompt": "a red ball rolls over green grass", "num_frames": FRAMES_PER_CHUNK})
    return (
        f"\nhelios-serve {__version__}: {info.name} ({info.variant}) at {url}\n\nTry:\n"
        f"  curl {url}{GENERATIONS} -H 'Content-Type: application/json' -H 'Accept: video/mp4' \\\n"
        f"    -d '{body}' -o video.mp4\n\nAPI documentation: {url}/docs. Stop with Ctrl-C.\n"
    )
