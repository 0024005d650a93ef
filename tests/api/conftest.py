"""A fake engine and decoder at the outermost edge; everything between them and the client is real."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI
from starlette.testclient import TestClient

from helios_serve.api.auth import Authenticator, OriginPolicy
from helios_serve.api.convert import Limits
from helios_serve.api.engine_protocol import Engine
from helios_serve.api.files import FileService
from helios_serve.api.http_access import HttpAccess, owners_in
from helios_serve.api.http_server import Extras, create_app
from helios_serve.api.intake import InputSegments
from helios_serve.api.limits import Limiter
from helios_serve.api.media_input import DataUriSource, Media
from helios_serve.api.outgoing import Outgoing
from helios_serve.api.realtime import realtime_route
from helios_serve.api.routes import Desk, MediaFor, ServerSettings
from helios_serve.api.service import ServiceConfig, VideoService
from helios_serve.api.signed_urls import UrlSigner, load_signing_keys
from helios_serve.api.webhooks import WebhookSender
from helios_serve.errors import HeliosError, InvalidRequestError
from helios_serve.store.connect import StoreConfig, Stores, open_stores
from helios_serve.telemetry import Metrics
from helios_serve.types import (
    NUM_TRAIL_CHUNKS,
    ChunkReady,
    ChunkRecord,
    ChunkStarted,
    Completed,
    Event,
    Failure,
    Frames,
    ModelInfo,
    Prepared,
    Progress,
    Resume,
    SamplingParams,
    Segment,
    SegmentReady,
    Start,
    StepCursor,
    TensorRef,
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
    """Walks the real cursor; the prompt decides the fate: slow, fail, crash, mute, or a video of known bytes.

    A chunk's latents follow from all that the real ones follow from, its number not, and the media of a prompt that
    begins with "exact" shows them. step_s: how long a step takes, when it is not slow.
    """

    def __init__(self, *, step_s: float = 0.0) -> None:
        self.step_s = step_s
        self.requests: list[VideoRequest] = []
        self.cancelled: list[str] = []
        self.resumed: list[Resume] = []
        self.refusal: HeliosError | None = None
        self.ready = True
        self.queue_s = 0.0
        self.num_active = 0
        self.max_active = 0
        self._num_committed: dict[str, int] = {}

    def is_ready(self) -> bool:
        return self.ready

    def missing(self) -> list[str]:
        return [] if self.ready else ["no dit worker is up"]

    def generated_fps(self, params: SamplingParams) -> float:
        return 12.0

    def start_in_s(self, request: VideoRequest) -> float:
        return self.queue_s

    def check(self, request: VideoRequest) -> None:
        if self.refusal is not None:
            raise self.refusal

    def read(self, ref: TensorRef) -> bytes:
        return ref.key.encode()

    async def put(self, name: str, record: bytes) -> TensorRef:
        return TensorRef(key=record.decode())

    def committed(self, request_id: str, chunk: int) -> None:
        self._num_committed[request_id] = chunk + 1

    def change_prompt(self, request_id: str, prompt: str, transition_chunks: int) -> int:
        return 1

    def restart(self, request_id: str, seed: int) -> int:
        return 1

    def allow(self, request_id: str, num_chunks: int) -> None:
        pass

    def pause(self, request_id: str, is_paused: bool) -> None:
        pass

    def release(self, request_id: str) -> None:
        pass

    def reserve(self, request_id: str) -> None:
        pass

    def stop(self, request_id: str) -> int:
        return 1

    async def run(
        self,
        request: VideoRequest,
        *,
        resume: Resume | None = None,
        has_keeper: bool = False,
        allowed: int | None = None,
    ) -> AsyncGenerator[Event, None]:
        assert has_keeper
        assert resume is not None
        self.requests.append(request)
        self.resumed.append(resume)
        self.num_active += 1
        self.max_active = max(self.max_active, self.num_active)
        has_ended = False
        try:
            async for event in self._events(request, resume):
                has_ended = isinstance(event, Completed | Failure)
                yield event
        except (asyncio.CancelledError, GeneratorExit):
            if not has_ended:
                self.cancelled.append(request.request_id)
            raise
        finally:
            self.num_active -= 1

    async def _events(self, request: VideoRequest, resume: Resume) -> AsyncGenerator[Event, None]:
        prompt, params, name = request.prompts[0].prompt, request.params, request.request_id
        if prompt == "crash":
            raise RuntimeError("secret detail")
        if prompt == "mute":
            return
        if prompt.startswith("fail "):
            yield Failure(request_id=name, code=prompt.removeprefix("fail "), message="it went wrong")
            return
        start = _start(request)
        yield Prepared(
            request_id=name, conditioning=TensorRef(key=start.record.decode()), generator_state=b"0", seconds=0.1
        )
        latents = {record.chunk: record.latents.key for record in resume.records}
        for chunk in resume.undecoded:
            yield SegmentReady(segment=_segment(request, chunk, latents[chunk]), seconds=(0.02, 0.01))
        state = resume.generator_state if resume.generator_state else start.generator_state
        self._num_committed[name] = resume.next_chunk
        cursor = StepCursor(chunk=resume.next_chunk)
        while cursor.chunk < params.num_chunks:
            chunk = cursor.chunk
            if cursor.stage == cursor.step == 0:
                yield ChunkStarted(request_id=name, chunk=chunk, num_sharing=1)
            await asyncio.sleep(0.05 if prompt == "slow" else self.step_s)
            yield Progress(request_id=name, cursor=cursor, device_ms=2.0)
            if cursor.ends_chunk(params):
                latents[chunk] = _latents(request, chunk, start.record, latents, state)
                state = f"behind {latents[chunk]}".encode()
                record = ChunkRecord(chunk=chunk, latents=TensorRef(key=latents[chunk]), generator_state=state)
                yield ChunkReady(request_id=name, record=record, attempt=1, seconds=0.2)
                yield SegmentReady(segment=_segment(request, chunk, latents[chunk]), seconds=(0.02, 0.01))
            cursor = cursor.next(params)
        assert self._num_committed[name] == params.num_chunks, "the engine waits for its keeper"
        yield Completed(request_id=name)


def _start(request: VideoRequest) -> Start:
    """What the encoder makes of the pictures, unless it is given."""
    if request.start is not None:
        return request.start
    frames = request.image or request.video
    record = f"start of {_digest(b'' if frames is None else frames.data)}".encode()
    return Start(task=request.task, record=record, generator_state=b"0")


def _latents(request: VideoRequest, chunk: int, start: bytes, latents: Mapping[int, str], state: bytes) -> str:
    """Fails when what the chunk follows from is not there."""
    pinned = request.pinned_chunk(chunk)
    begin = max(request.params.start_of(chunk), chunk - NUM_TRAIL_CHUNKS)
    history = [latents[earlier] for earlier in range(begin, chunk)]
    history += [] if pinned is None else [latents[pinned]]
    shown = f"{request.prompt_at(chunk)} {request.prompt_weight(chunk)} {request.params.seed} {history}"
    return f"latents {_digest(shown.encode() + start + state)}"


def _segment(request: VideoRequest, chunk: int, latents: str) -> Segment:
    prompt = request.prompts[0].prompt
    shown = f":{_digest(latents.encode())}" if prompt.startswith("exact") else ""
    return Segment(
        request_id=request.request_id,
        chunk=chunk,
        start_frame=33 * chunk,
        num_frames=request.params.frames_in(chunk),
        init=b"INIT",
        media=f"[{prompt[:20]}:{chunk}{shown}]".encode(),
    )


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


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

    def raw_frames(self, init: bytes, media: bytes, pixels: str) -> bytes:
        return f"{pixels} of ".encode() + media


class FakeDecoder:
    """PNG magic makes an image; `frames=N` makes a video."""

    def decode_image(self, data: bytes, width: int, height: int, fit: str) -> Frames:
        if not data.startswith(b"\x89PNG"):
            raise InvalidRequestError("not a PNG, JPEG or WebP image")
        return Frames(data=bytes(width * height * 3), num_frames=1, height=height, width=width)

    def image_size(self, data: bytes) -> tuple[int, int]:
        return 1920, 1080

    def video_look(self, data: bytes) -> tuple[int, int, float]:
        """As `size=64x64` and `fps=25` say, which may follow the number of frames."""
        if not data.startswith(b"frames="):
            raise InvalidRequestError("not an MP4 or WebM video")
        said = dict(part.split("=") for part in data.decode().split())
        width, height = said.get("size", "1920x1080").split("x")
        return int(width), int(height), float(said.get("fps", "0"))

    def decode_video(self, data: bytes, width: int, height: int, fit: str) -> Frames:
        if not data.startswith(b"frames="):
            raise InvalidRequestError("not an MP4 or WebM video")
        return Frames(data=b"", num_frames=int(data[7:].split()[0]), height=height, width=width)


def fake_input_segments(frames: Frames, params: SamplingParams) -> tuple[bytes, list[bytes]]:
    """Names the chunks."""
    return b"INIT", [f"[given:{chunk}]".encode() for chunk in range(frames.num_frames // 33)]


KEYLESS = OriginPolicy(is_keyless=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What one application is made of; its stores are closed with it."""

    app: FastAPI
    service: VideoService
    stores: Stores
    metrics: Metrics


@contextmanager
def parts_of(
    engine: Engine,
    data_dir: Path,
    metrics: Metrics | None = None,
    *,
    input_segments: InputSegments | None = fake_input_segments,
    media_of: Callable[[VideoService, FileService], MediaFor] | None = None,
) -> Iterator[Parts]:
    """A keyless application over real stores in `data_dir`. media_of: reads media; without it a fake decoder does."""
    stores = open_stores(StoreConfig(data_dir=data_dir))
    told = Metrics(DISTILLED.name) if metrics is None else metrics
    limiter, keys = Limiter(), load_signing_keys(data_dir)
    service = VideoService(
        stores=stores,
        engine=engine,
        muxer=join,
        stills=FakeStills(),
        model=DISTILLED,
        limiter=limiter,
        metrics=told,
        config=ServiceConfig(),
        input_segments=input_segments,
    )
    access = HttpAccess(Authenticator([]), KEYLESS, UrlSigner(keys), limiter, owner_of=owners_in(stores.database))
    limits = Limits(model_aliases=("org/Helios-Distilled",))
    webhooks = WebhookSender(stores.access, Outgoing(), keys, metrics=told)
    media = Media(source=DataUriSource(), decoder=FakeDecoder())
    files = FileService(stores.access, stores.blobs, stores.jobs, limiter)
    desk = Desk(
        service=service,
        access=access,
        settings=ServerSettings(version="1.2.3", metrics=told, limits=limits, max_body_bytes=200_000),
        media_for=(lambda _: media) if media_of is None else media_of(service, files),
        webhooks=webhooks,
    )
    extras = Extras(
        realtime=realtime_route(service, desk.parsed_live, access.socket_caller, desk.links),
        files=files,
        rows=stores.access,
        origins=KEYLESS,
    )
    try:
        yield Parts(app=create_app(desk, extras), service=service, stores=stores, metrics=told)
    finally:
        stores.close()


def client_of(app: FastAPI) -> TestClient:
    """A client on this machine, as a server without keys wants it."""
    return TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 1))


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
def parts(engine: FakeEngine, tmp_path: Path) -> Iterator[Parts]:
    with parts_of(engine, tmp_path) as found:
        yield found


@pytest.fixture
def app(parts: Parts) -> FastAPI:
    return parts.app


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with client_of(app) as client:
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
    with (
        parts_of(FakeEngine(), tmp_path_factory.mktemp("fuzz")) as parts,
        client_of(parts.app) as client,
    ):
        yield client
