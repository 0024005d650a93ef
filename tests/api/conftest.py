"""A fake engine and decoder at the outermost edge; everything between them and the client is real."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI
from starlette.testclient import TestClient

from helios_serve.api.convert import Limits
from helios_serve.api.http_server import ServerSettings, create_app
from helios_serve.api.service import ServiceConfig, VideoService
from helios_serve.errors import InvalidRequestError
from helios_serve.types import (
    Completed,
    Event,
    Failure,
    Frames,
    ModelInfo,
    Progress,
    SamplingParams,
    Segment,
    SegmentReady,
    StepCursor,
    VideoRequest,
)

DISTILLED = ModelInfo(
    name="helios-distilled",
    variant="distilled",
    num_stages=3,
    guidance="cfg",
    size_multiple=64,
    spatial_scale=8,
    latent_channels=16,
    default_steps=(2, 2, 2),
    default_guidance_scale=1.0,
    recommended_sizes=((640, 384),),
    max_pixels=921_600,
)


class FakeEngine:
    """Walks the real cursor; the prompt decides the fate: slow, fail, crash, mute, or a video of known bytes."""

    def __init__(self) -> None:
        self.requests: list[VideoRequest] = []
        self.cancelled: list[str] = []
        self.num_active = 0
        self.max_active = 0
        self.ready = True

    def is_ready(self) -> bool:
        return self.ready

    def generated_fps(self, params: SamplingParams) -> float:
        return 12.0

    async def submit(self, request: VideoRequest) -> AsyncGenerator[Event, None]:
        self.requests.append(request)
        self.num_active += 1
        self.max_active = max(self.max_active, self.num_active)
        try:
            async for event in self._events(request):
                yield event
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.append(request.request_id)
            raise
        finally:
            self.num_active -= 1

    async def _events(self, request: VideoRequest) -> AsyncGenerator[Event, None]:
        prompt, params = request.prompts[0].prompt, request.params
        if prompt == "crash":
            raise RuntimeError("secret detail")
        if prompt == "mute":
            return
        if prompt.startswith("fail "):
            yield Failure(request_id=request.request_id, code=prompt.removeprefix("fail "), message="it went wrong")
            return
        cursor = StepCursor(chunk=0)
        while cursor.chunk < params.num_chunks:
            await asyncio.sleep(0.05 if prompt == "slow" else 0)
            yield Progress(request_id=request.request_id, cursor=cursor, device_ms=2.0)
            if cursor.ends_chunk(params):
                yield SegmentReady(segment=_segment(request, cursor.chunk))
            cursor = cursor.next(params)
        yield Completed(request_id=request.request_id)


def _segment(request: VideoRequest, chunk: int) -> Segment:
    return Segment(
        request_id=request.request_id,
        chunk=chunk,
        start_frame=33 * chunk,
        num_frames=request.params.frames_in(chunk),
        init=b"INIT",
        media=f"[{request.prompts[0].prompt[:20]}:{chunk}]".encode(),
    )


def join(init: bytes, media: Sequence[bytes]) -> bytes:
    return init + b"".join(media)


class FakeStills:
    """Names what it was asked for."""

    def thumbnail(self, init: bytes, media: bytes) -> bytes:
        return b"thumbnail of " + media

    def last_frame(self, init: bytes, media: bytes) -> bytes:
        return b"last frame of " + media

    def spritesheet(self, init: bytes, media: Sequence[bytes], frames_per_tile: int) -> bytes:
        return f"every {frames_per_tile}th of ".encode() + b"".join(media)


class FakeDecoder:
    """PNG magic makes an image; `frames=N` makes a video."""

    def decode_image(self, data: bytes, width: int, height: int, fit: str) -> Frames:
        if not data.startswith(b"\x89PNG"):
            raise InvalidRequestError("not a PNG, JPEG or WebP image")
        return Frames(data=bytes(width * height * 3), num_frames=1, height=height, width=width)

    def decode_video(self, data: bytes, width: int, height: int, fit: str) -> Frames:
        if not data.startswith(b"frames="):
            raise InvalidRequestError("not an MP4 or WebM video")
        return Frames(data=b"", num_frames=int(data[7:]), height=height, width=width)


def make_app(engine: FakeEngine, data_dir: Path, *, max_kept: int = 100, max_active: int = 64) -> FastAPI:
    config = ServiceConfig(data_dir=data_dir, max_kept=max_kept, max_active=max_active)
    service = VideoService(engine=engine, muxer=join, stills=FakeStills(), model=DISTILLED, config=config)
    limits = Limits(model_aliases=("org/Helios-Distilled",))
    settings = ServerSettings(decoder=FakeDecoder(), version="1.2.3", limits=limits, max_body_bytes=200_000)
    return create_app(service, settings)


@pytest.fixture
def model() -> ModelInfo:
    return DISTILLED


@pytest.fixture
def decoder() -> FakeDecoder:
    return FakeDecoder()


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def app(engine: FakeEngine, tmp_path: Path) -> FastAPI:
    return make_app(engine, tmp_path)


@pytest.fixture
def small_app(engine: FakeEngine, tmp_path: Path) -> FastAPI:
    """Keeps two finished videos and takes three jobs at a time."""
    return make_app(engine, tmp_path, max_kept=2, max_active=3)


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app) as client:
        yield client


@pytest.fixture
def server(app: FastAPI) -> Iterator[str]:
    """Base URL of a real uvicorn on a free port."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", ws="none")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        thread.join(0.01)
        assert thread.is_alive()
    yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
    running.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def fuzz_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """One application for all examples of a property."""
    with TestClient(make_app(FakeEngine(), tmp_path_factory.mktemp("fuzz"))) as client:
        yield client
