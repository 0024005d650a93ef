"""A service whose sessions are scripted, a server with the realtime route alone, and a client that checks the framing.

The jobs are in memory and their segments are real fMP4. Follows the service's interface; knows no engine and no store.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal, cast

import numpy as np
import uvicorn
from fastapi import FastAPI
from starlette.websockets import WebSocket
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from helios_serve.api.auth import ANONYMOUS, Caller, OriginPolicy, check_origin
from helios_serve.api.convert import Limits, ParsedRequest, parse_generation
from helios_serve.api.jobs import Job, JobEnded, JobEvent, JobPhase, JobProgress, JobSegment, Links, State, Timing
from helios_serve.api.media_input import DataUriSource, Media
from helios_serve.api.mime import mime_type_of
from helios_serve.api.realtime import RealtimeRoute, realtime_route
from helios_serve.api.realtime_connection import RealtimeSettings
from helios_serve.api.service import VideoService
from helios_serve.api.session import PromptApplied, PromptQueued, SessionEvent, SessionState
from helios_serve.api.video_files import Pixels
from helios_serve.errors import ConflictError, HeliosError, InvalidRequestError, NotFoundError, QuotaError
from helios_serve.types import FRAMES_PER_CHUNK, Frames, ModelInfo, PlayState, PromptChange, StepCursor
from helios_serve.workers import stills
from helios_serve.workers.segment import SegmentSpec, encode_segment

Json = dict[str, Any]
PATH = "/v1/realtime/video"
MAX_PENDING = 64
SESSION_FRAMES = 330
MODEL = ModelInfo(
    name="helios-distilled",
    variant="distilled",
    num_stages=3,
    guidance="cfg",
    size_multiple=64,
    spatial_scale=8,
    latent_channels=16,
    default_steps=(2, 2, 2),
    default_guidance_scale=1.0,
    recommended_sizes=((64, 64), (128, 64)),
    max_pixels=921_600,
)


@lru_cache(maxsize=64)
def encoded(chunk: int, num_frames: int, fps: float) -> tuple[bytes, bytes]:
    """Init and media of a grey segment, each frame a little lighter."""
    yuv = np.full((num_frames, 96, 64), 128, np.uint8)
    yuv[:, :64] = (40 + (33 * chunk + np.arange(num_frames)) % 180).astype(np.uint8)[:, None, None]
    return encode_segment(
        yuv, SegmentSpec(width=64, height=64, fps=fps, crf=23, codec="h264"), chunk, FRAMES_PER_CHUNK * chunk
    )


@dataclass(kw_only=True)
class Script:
    """What the fake does: how long a chunk takes, and what goes wrong."""

    chunk_s: float = 0.01
    padding_bytes: int = 0  # of each segment
    open_error: Exception | None = None
    fail_at: int | None = None
    failure: HeliosError | None = None
    events_error: Exception | None = None
    queue_position: int | None = None
    queue_s: float = 0.0
    idle_s: float | None = None
    action_error: HeliosError | None = None


@dataclass(kw_only=True, eq=False)
class FakeJob:
    """A job; everything on the event loop."""

    parsed: ParsedRequest
    tenant: str
    max_ahead: int | None
    script: Script
    state: State = "queued"
    error: HeliosError | None = None
    log: list[SessionEvent] = field(default_factory=list)
    segments: list[JobSegment] = field(default_factory=list)
    denoising: int = 0
    num_consumed: int = 0
    is_connected: bool = True
    is_paused: bool = False
    is_stopped: bool = False
    asked_by: str | None = None
    play_state: PlayState = "running"
    prompts: list[PromptChange] = field(default_factory=list)
    sent: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    pending: list[tuple[str, str, int]] = field(default_factory=list)
    num_sent: int = 0
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    @property
    def id(self) -> str:
        return self.parsed.request.request_id

    @property
    def num_chunks(self) -> int:
        return len(self.segments) if self.has_ended else self.parsed.request.params.num_chunks

    @property
    def has_ended(self) -> bool:
        return self.state not in ("queued", "in_progress")

    def view(self) -> Job:
        request, is_over = self.parsed.request, self.has_ended
        return Job(
            id=self.id,
            model=MODEL.name,
            state=self.state,
            request=request,
            warnings=self.parsed.warnings,
            user=None,
            metadata=None,
            with_segments=True,
            created_at=1.0,
            started_at=1.0,
            completed_at=2.0 if is_over else None,
            expires_at=None,
            chunks_done=len(self.segments),
            progress=100 if self.state == "completed" else 10,
            queue_position=self.script.queue_position if self.state == "queued" else None,
            eta_s=None,
            timing=Timing(),
            error=self.error,
            is_open_ended=request.is_open_ended and not is_over,
            num_chunks=self.num_chunks,
            num_frames=min(request.params.num_output_frames, FRAMES_PER_CHUNK * self.num_chunks),
            remixed_from=None,
            extended_from=None,
            mime_type=mime_type_of(self.segments[0].init) if self.segments else None,
        )

    async def tell(self, event: SessionEvent) -> None:
        async with self.changed:
            self.log.append(event)
            self.changed.notify_all()

    async def poke(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def run(self) -> None:
        params = self.parsed.request.params
        await self.tell(self._progress("queued", None))
        await asyncio.sleep(self.script.queue_s)
        self.state = "in_progress"
        for chunk in range(params.num_chunks):
            await self._wait_allowed(chunk)
            if self.is_stopped or chunk == self.script.fail_at:
                break
            self.denoising = chunk + 1
            await self._apply(chunk)
            for stage, num_steps in enumerate(params.steps):
                for step in range(num_steps):
                    await asyncio.sleep(self.script.chunk_s / sum(params.steps))
                    await self.tell(self._progress("denoise", StepCursor(chunk=chunk, stage=stage, step=step)))
            self.segments.append(self._segment(chunk))
            await self.tell(self.segments[-1])
        failure = self.script.failure
        self.state, self.error = ("completed", None) if failure is None else ("failed", failure)
        await self.tell(JobEnded(job=self.view()))

    async def _wait_allowed(self, chunk: int) -> None:
        stood_since = time.monotonic()
        while not self.is_stopped:
            ahead = 8 if self.max_ahead is None else self.max_ahead
            has_credit = chunk < self.num_consumed + ahead or not self.parsed.request.is_interactive
            state: PlayState = "paused" if self.is_paused else "running" if has_credit else "waiting_for_credit"
            if state != self.play_state:
                self.play_state = state
                await self.tell(SessionState(state=state, event_id=self.asked_by))
                self.asked_by = None
            if state == "running" and self.is_connected:
                return
            if self.script.idle_s is not None and time.monotonic() - stood_since > self.script.idle_s:
                self.is_stopped = True
            async with self.changed:
                try:
                    async with asyncio.timeout(0.05):
                        await self.changed.wait()
                except TimeoutError:
                    continue

    async def _apply(self, chunk: int) -> None:
        if not self.pending:
            return
        event_id, prompt, count = self.pending[-1]
        self.pending = []
        self.prompts.append(PromptChange(chunk=chunk, prompt=prompt, transition_chunks=count))
        last = chunk + max(1, count) - 1
        await self.tell(
            PromptApplied(event_id=event_id, chunk=chunk, completed_chunk=last, start_frame=FRAMES_PER_CHUNK * chunk)
        )

    def _segment(self, chunk: int) -> JobSegment:
        params = self.parsed.request.params
        init, media = encoded(chunk, params.frames_in(chunk), params.fps)
        if self.script.padding_bytes:
            media += self.script.padding_bytes.to_bytes(4, "big") + b"free" + bytes(self.script.padding_bytes - 8)
        prompts = [*self.parsed.request.prompts, *self.prompts]
        request = replace(self.parsed.request, prompts=tuple(prompts))
        return JobSegment(
            index=chunk,
            init=init,
            media=media,
            start_frame=FRAMES_PER_CHUNK * chunk,
            num_frames=params.frames_in(chunk),
            fps=params.fps,
            prompt=request.prompt_at(chunk),
            prompt_weight=request.prompt_weight(chunk),
            is_last=chunk + 1 == params.num_chunks,
            generated_ms=10,
        )

    def _progress(self, phase: JobPhase, cursor: StepCursor | None) -> JobProgress:
        return JobProgress(job=self.view(), cursor=cursor, phase=phase)


class FakeSession:
    """One connection to a fake job; `calls` are the verbs it was asked for."""

    def __init__(self, job: FakeJob, first_segment: int) -> None:
        self.job = job.view()
        self.first_segment = first_segment
        self.calls: list[tuple[Any, ...]] = []
        self.has_left = False
        self._job = job
        self._seen = len(job.log)
        job.is_connected = True

    async def events(self) -> AsyncGenerator[SessionEvent, None]:
        job, following = self._job, 0
        if job.script.events_error is not None:
            raise job.script.events_error
        while True:
            async with job.changed:
                while following == len(job.log):
                    await job.changed.wait()
            event, is_news = job.log[following], following >= self._seen
            following += 1
            if isinstance(event, JobSegment):
                is_news = event.index >= self.first_segment
            elif isinstance(event, PromptApplied):
                is_news = event.chunk >= self.first_segment
            if is_news or isinstance(event, JobEnded):
                if isinstance(event, JobSegment) and job.max_ahead is None:
                    job.num_consumed = event.index + 1
                    await job.poke()
                yield event
            if isinstance(event, JobEnded):
                return

    async def change_prompt(self, prompt: str, transition_chunks: int | None, event_id: str | None) -> PromptQueued:
        job = self._job
        self.calls.append(("change_prompt", prompt, transition_chunks, event_id))
        count = 2 if transition_chunks is None else transition_chunks
        job.num_sent += 1
        name = f"event_{job.num_sent}" if event_id is None else event_id
        if name in job.sent:
            earlier = job.sent[name]
            if earlier[:2] != (prompt, count):
                raise ConflictError(f"event_id {name}: was sent with other content", code="event_id_conflict")
            return PromptQueued(event_id=name, earliest_chunk=earlier[2])
        if len(job.pending) >= MAX_PENDING:
            raise QuotaError(f"{MAX_PENDING} messages are pending", code="interaction_queue_full")
        job.sent[name] = (prompt, count, job.denoising)
        job.pending.append((name, prompt, count))
        return PromptQueued(event_id=name, earliest_chunk=job.denoising)

    async def control(
        self, action: Literal["pause", "resume", "reset", "stop"], event_id: str | None = None, seed: int | None = None
    ) -> None:
        job = self._job
        self.calls.append(("control", action, event_id, seed))
        if job.script.action_error is not None:
            raise job.script.action_error
        if action == "stop":
            job.is_stopped = True
        elif action != "reset":
            job.is_paused, job.asked_by = action == "pause", event_id
        await job.poke()

    def ack(self, segment: int) -> None:
        self.calls.append(("ack", segment))
        self._job.num_consumed = max(self._job.num_consumed, segment + 1)

    async def leave(self) -> None:
        self.has_left = True
        self._job.is_connected = False


class FakeService:
    """The part of `VideoService` that sessions and HLS use."""

    model = MODEL

    def __init__(self, script: Script) -> None:
        self.script = script
        self.jobs: dict[str, FakeJob] = {}
        self.sessions: list[FakeSession] = []
        self._tasks: list[asyncio.Task[None]] = []

    def generated_fps(self, params: object) -> float:
        return 12.0

    def begin(self, parsed: ParsedRequest, caller: Caller = ANONYMOUS, max_ahead: int | None = None) -> FakeJob:
        job = FakeJob(parsed=parsed, tenant=caller.tenant, max_ahead=max_ahead, script=self.script)
        self.jobs[job.id] = job
        self._tasks.append(asyncio.create_task(job.run()))
        return job

    async def open_session(self, caller: Caller, parsed: ParsedRequest, max_ahead: int | None) -> FakeSession:
        if self.script.open_error is not None:
            raise self.script.open_error
        request, is_open_ended = parsed.request, not parsed.has_length
        if is_open_ended:
            request = replace(request, params=replace(request.params, num_frames=SESSION_FRAMES))
        request = replace(request, is_interactive=True, is_open_ended=is_open_ended)
        job = self.begin(replace(parsed, request=request), caller, max_ahead)
        self.sessions.append(FakeSession(job, 0))
        return self.sessions[-1]

    async def resume_session(self, caller: Caller, video_id: str, after_segment: int) -> FakeSession:
        job = self._job(caller, video_id)
        if after_segment > len(job.segments):
            raise InvalidRequestError(f"after_segment {after_segment}: too far", param="resume.after_segment")
        job.num_consumed = max(job.num_consumed, after_segment + 1)
        self.sessions.append(FakeSession(job, after_segment + 1))
        return self.sessions[-1]

    async def get(self, caller: Caller, video_id: str) -> Job:
        return self._job(caller, video_id).view()

    async def watch(
        self, caller: Caller, video_id: str, start: int = 0, *, with_steps: bool = True
    ) -> AsyncGenerator[JobEvent, None]:
        job = self._job(caller, video_id)
        async for event in FakeSession(job, start).events():
            if isinstance(event, JobProgress | JobSegment | JobEnded):
                yield event

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def raw(self, segment: JobSegment, pixels: Pixels) -> JobSegment:
        return replace(segment, init=b"", media=stills.raw_frames(segment.init, segment.media, pixels))

    def _job(self, caller: Caller, video_id: str) -> FakeJob:
        job = self.jobs.get(video_id)
        if job is None or job.tenant != caller.tenant:
            raise NotFoundError(f"video {video_id}: not found", param="id")
        return job


class NoDecoder:
    """No test here sends pictures."""

    def decode_image(self, data: bytes, width: int, height: int, fit: str) -> Frames:
        raise AssertionError

    def decode_video(self, data: bytes, width: int, height: int, fit: str) -> Frames:
        raise AssertionError


def parsed_of(body: Mapping[str, object], *, is_live: bool = False) -> ParsedRequest:
    media = Media(source=DataUriSource(), decoder=cast(Any, NoDecoder()))
    limits = Limits(model_aliases=("BestWishYsh/Helios-Distilled",))
    return parse_generation(body, MODEL, media, limits, is_live=is_live)


def check_page(websocket: WebSocket) -> None:
    """Raises OriginError for foreign pages."""
    origins = OriginPolicy(is_keyless=True)
    check_origin(websocket.headers.get("origin"), f"http://{websocket.headers['host']}", origins, is_websocket=True)


def links_for(websocket: WebSocket) -> Callable[[Job], Links]:
    def links(job: Job) -> Links:
        base = f"http://{websocket.headers['host']}/v1/videos/{job.id}"
        return Links(content=f"{base}/content", stream=f"{base}/stream", events=f"{base}/events", hls=f"{base}/hls")

    return links


@dataclass(kw_only=True)
class Server:
    """A running server: its address, its route, the fake behind it, and who calls next; then it is the anonymous
    caller."""

    url: str
    route: RealtimeRoute
    service: FakeService
    callers: list[Caller]

    @asynccontextmanager
    async def client(self, origin: str | None = None) -> AsyncIterator[Client]:
        address = f"ws://{self.url}{PATH}"
        async with connect(address, origin=cast(Any, origin), max_size=None, proxy=None) as socket:
            yield Client(socket)

    @asynccontextmanager
    async def session(self, **fields: object) -> AsyncIterator[Client]:
        """A client whose session is started, behind its `video.start`."""
        async with self.client() as client:
            await client.send("session.start", prompt="a lake", **fields)
            client.start = await client.message("video.start")
            yield client

    def of(self, client: Client) -> FakeSession:
        """The last session of a client's job."""
        return [session for session in self.service.sessions if session.job.id == client.start["request_id"]][-1]

    def job(self, client: Client) -> FakeJob:
        return self.service.jobs[client.start["request_id"]]


class Client:
    """Reads messages, and segments as one thing: metadata with the binary frame right behind it."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.start: Json = {}
        self.messages: list[Json] = []
        self.segments: list[tuple[Json, bytes]] = []

    async def send(self, kind: str, **fields: object) -> None:
        await self.socket.send(json.dumps({"type": kind, **fields}))

    async def next(self, timeout_s: float = 10.0) -> Json:
        """The next message; a segment's bytes are in `segments` before it is returned."""
        async with asyncio.timeout(timeout_s):
            text = await self.socket.recv()
            assert isinstance(text, str), "a binary frame without metadata"
            message: Json = json.loads(text)
            if message["type"] == "video.chunk_metadata":
                media = await self.socket.recv()
                assert isinstance(media, bytes), "metadata without its binary frame"
                assert len(media) == message["byte_length"]
                self.segments.append((message, media))
        self.messages.append(message)
        return message

    async def message(self, kind: str) -> Json:
        """Reads on to the next message of this type."""
        while True:
            message = await self.next()
            if message["type"] == kind:
                return message

    async def segment(self) -> tuple[Json, bytes]:
        await self.message("video.chunk_metadata")
        return self.segments[-1]

    async def is_silent(self, seconds: float = 0.25) -> bool:
        """Whether no segment comes for a while."""
        try:
            async with asyncio.timeout(seconds):
                await self.segment()
        except TimeoutError:
            return True
        return False

    async def closed(self) -> tuple[int, str]:
        """Reads to the end: how the server closed."""
        with suppress(ConnectionClosed):
            while True:
                await self.next()
        assert self.socket.close_code is not None
        return self.socket.close_code, self.socket.close_reason or ""

    def kinds(self) -> set[str]:
        return {message["type"] for message in self.messages}

    @property
    def video(self) -> bytes:
        return b"".join(media for _, media in self.segments)


def run(
    scenario: Callable[[Server], Coroutine[Any, Any, None]],
    script: Script | None = None,
    settings: RealtimeSettings | None = None,
) -> None:
    """Runs a scenario against a real uvicorn on a free port of loopback."""

    async def main() -> None:
        async with serving(FakeService(Script() if script is None else script), settings) as server:
            async with asyncio.timeout(60):
                await scenario(server)

    asyncio.run(main())


@asynccontextmanager
async def serving(
    service: FakeService, settings: RealtimeSettings | None = None, app: FastAPI | None = None
) -> AsyncIterator[Server]:
    """A server with the realtime route, added to `app` if there is one."""

    async def parse(body: Mapping[str, object], caller: Caller) -> ParsedRequest:
        return await asyncio.to_thread(parsed_of, body, is_live=True)

    async def access(websocket: WebSocket) -> Caller:
        check_page(websocket)
        return callers.pop() if callers else ANONYMOUS

    callers: list[Caller] = []
    route = realtime_route(cast(VideoService, service), parse, access, links_for, settings)
    app = FastAPI() if app is None else app
    app.add_api_websocket_route(PATH, route.serve)
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=0,
        log_level="critical",
        lifespan="off",
        ws_per_message_deflate=False,
        ws_max_size=32 << 20,
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
        assert not task.done()
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Server(url=f"127.0.0.1:{port}", route=route, service=service, callers=callers)
    finally:
        await service.close()
        server.should_exit = server.force_exit = True
        await task
