"""A gRPC server over a service whose jobs are in memory, and a real client of it on loopback.

The jobs are those of `session_fakes`; here are the verbs that sessions do not need.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, cast

import grpc
import grpc.aio
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from helios_serve.api.auth import Authenticator, Caller
from helios_serve.api.convert import Limits, ParsedRequest
from helios_serve.api.grpc_access import GrpcAccess
from helios_serve.api.grpc_server import GrpcServer, GrpcSettings
from helios_serve.api.grpc_service import GrpcDesk
from helios_serve.api.intake import Extension
from helios_serve.api.jobs import Created, Job, Origin, Page, StoredVideo
from helios_serve.api.keys import KeySource
from helios_serve.api.limits import Limiter
from helios_serve.api.proto.helios.video.v1 import video_generation_pb2 as pb
from helios_serve.api.proto.helios.video.v1.video_generation_pb2_grpc import VideoGenerationServiceStub
from helios_serve.api.service import Attachment, VideoService
from helios_serve.api.video_files import STILL_TYPES, Still
from helios_serve.errors import ConflictError, HeliosError
from helios_serve.telemetry import Metrics
from tests.api.session_fakes import FakeJob, FakeService, Script, parsed_of

NO_PROXY = (("grpc.enable_http_proxy", 0),)
FRAMES = 70
"""Of most videos here: three segments, the last one of 4 frames."""


class FakeVideoService(FakeService):
    """All verbs; `log` holds what was called beside reading."""

    def __init__(self, script: Script | None = None) -> None:
        super().__init__(Script() if script is None else script)
        self.log: list[tuple[Any, ...]] = []
        self.origins: list[Origin] = []
        self.by_key: dict[str, str] = {}
        self.is_up = True
        self.error: HeliosError | Exception | None = None
        self.create_s = 0.0
        self._attached: dict[str, int] = {}

    def is_ready(self) -> bool:
        return self.is_up

    async def create(self, caller: Caller, parsed: ParsedRequest, origin: Origin) -> Created:
        self.origins.append(origin)
        if self.error is not None:
            raise self.error
        await asyncio.sleep(self.create_s)
        known = self.by_key.get(origin.idempotency_key or "")
        if known is not None:
            return Created(job=self.jobs[known].view(), is_replayed=True)
        job = self.begin(parsed, caller)
        if origin.idempotency_key is not None:
            self.by_key[origin.idempotency_key] = job.id
        return Created(job=job.view(), is_replayed=False)

    async def list(self, caller: Caller, page: Page) -> tuple[list[Job], bool]:
        jobs = [job.view() for job in self.jobs.values() if job.tenant == caller.tenant]
        if page.newest_first:
            jobs.reverse()
        if page.after is not None:
            self._job(caller, page.after)
            jobs = jobs[[job.id for job in jobs].index(page.after) + 1 :]
        return jobs[: page.limit], len(jobs) > page.limit

    async def cancel(self, caller: Caller, video_id: str) -> Job:
        self.log.append(("cancel", video_id))
        job = self._job(caller, video_id)
        if not job.has_ended:
            job.script = replace(job.script, failure=ConflictError("it was cancelled", code="cancelled"))
            job.is_stopped = True
            while not job.has_ended:
                await asyncio.sleep(0.005)
            job.state = "cancelled"
        return job.view()

    async def delete(self, caller: Caller, video_id: str) -> None:
        await self.cancel(caller, video_id)
        del self.jobs[video_id]

    @asynccontextmanager
    async def attach(self, video_id: str) -> AsyncIterator[Attachment]:
        attachment = Attachment()
        self._attached[video_id] = self._attached.get(video_id, 0) + 1
        try:
            yield attachment
        finally:
            self._attached[video_id] -= 1
            job = self.jobs[video_id]
            if self._attached[video_id] == 0 and not (attachment.is_kept or job.has_ended):
                self.log.append(("cancel", video_id))
                job.is_stopped = True
            self.log.append(("left", video_id))

    async def video(self, caller: Caller, video_id: str) -> StoredVideo:
        job = self._job(caller, video_id)
        if job.state != "completed":
            raise ConflictError(f"video {video_id}: {job.state}; its content comes at the end")
        return StoredVideo(key=f"videos/{video_id}", num_bytes=len(self.file(job)))

    async def read(self, video: StoredVideo, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        data = self.file(self.jobs[video.key.removeprefix("videos/")])[start:end]
        for at in range(0, len(data), 100_000):
            yield data[at : at + 100_000]

    async def still(self, caller: Caller, video_id: str, variant: Still) -> tuple[bytes, str]:
        await self.video(caller, video_id)
        return f"{variant} of {video_id}".encode(), STILL_TYPES[variant]

    async def remix(self, caller: Caller, video_id: str, prompt: str, origin: Origin) -> Created:
        self.log.append(("remix", video_id, prompt, origin.route))
        return await self._again(caller, video_id, prompt, origin)

    async def extend(self, caller: Caller, video_id: str, extension: Extension, origin: Origin) -> Created:
        self.log.append(("extend", video_id, extension, origin.route))
        return await self._again(caller, video_id, extension.prompt, origin)

    async def _again(self, caller: Caller, video_id: str, prompt: str, origin: Origin) -> Created:
        self._job(caller, video_id)
        return await self.create(caller, parsed_of({"prompt": prompt, "size": "64x64", "num_frames": 33}), origin)

    def file(self, job: FakeJob) -> bytes:
        return job.segments[0].init + b"".join(segment.media for segment in job.segments)

    async def ended(self, video_id: str) -> FakeJob:
        job = self.jobs[video_id]
        while not job.has_ended:
            await asyncio.sleep(0.005)
        return job


@dataclass(kw_only=True)
class Served:
    """A running server, its service, and a client of it."""

    server: GrpcServer
    service: FakeVideoService
    metrics: Metrics
    port: int
    channel: grpc.aio.Channel
    stub: Any
    """Untyped: the generated one is."""

    def spec(self, **fields: Any) -> pb.VideoSpec:
        """A small video, unless the fields say something else."""
        return pb.VideoSpec(**{"prompt": "a lake", "width": 64, "height": 64, "num_frames": FRAMES, **fields})

    async def made(self, **fields: Any) -> str:
        """The id of a finished video."""
        answer = await self.stub.CreateVideo(pb.CreateVideoRequest(spec=self.spec(**fields)))
        await self.service.ended(answer.video.id)
        return str(answer.video.id)

    async def health(self, name: str) -> Any:
        stub: Any = health_pb2_grpc.HealthStub(self.channel)
        return (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status

    def counted(self, method: str, status: str) -> float:
        """Calls of a method that ended with a status."""
        text, _ = self.metrics.render(openmetrics=False)
        for line in text.decode().splitlines():
            if "grpc_requests_total{" in line and f'"{method}"' in line and f'status="{status}"' in line:
                return float(line.rpartition(" ")[2])
        return 0.0


@dataclass(kw_only=True)
class Refusal:
    """An error as a client of google.rpc reads it."""

    code: grpc.StatusCode
    message: str
    reason: str
    fields: list[str] = field(default_factory=list)
    retry_s: float | None = None
    retry_after_ms: str | None = None


def refusal_of(error: grpc.aio.AioRpcError) -> Refusal:
    """Reads the details with grpcio-status, which checks that they agree with the status."""
    call = _Ended(error)
    status = rpc_status.from_call(cast(Any, call))
    assert status is not None, error
    refusal = Refusal(code=error.code(), message=status.message, reason="")
    for detail in status.details:
        info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            refusal.reason = info.reason
        elif detail.Unpack(bad):
            refusal.fields = [violation.field for violation in bad.field_violations]
        elif detail.Unpack(retry):
            refusal.retry_s = retry.retry_delay.ToMilliseconds() / 1000
    value = dict(call.trailing_metadata()).get("retry-after-ms")
    refusal.retry_after_ms = None if value is None else str(value)
    return refusal


class _Ended:
    """The synchronous view of a call that grpcio-status reads."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self._error = error

    def code(self) -> grpc.StatusCode:
        return self._error.code()

    def details(self) -> str | None:
        return self._error.details()

    def trailing_metadata(self) -> list[tuple[str, str | bytes]]:
        return [*self._error.trailing_metadata()]


async def refused(call: Any) -> Refusal:
    """Awaits a call, or reads a stream to its end, that must be refused."""
    try:
        if isinstance(call, grpc.aio.UnaryStreamCall):
            async for _ in call:
                pass
        elif isinstance(call, grpc.aio.StreamStreamCall):
            while await call.read() is not grpc.aio.EOF:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return refusal_of(error)
    raise AssertionError("the call was not refused")


@asynccontextmanager
async def serving(
    service: FakeVideoService,
    settings: GrpcSettings | None = None,
    keys: Sequence[KeySource] = (),
    parse: Callable[[Mapping[str, object], bool], ParsedRequest] | None = None,
) -> AsyncIterator[Served]:
    def read(body: Mapping[str, object], is_live: bool) -> ParsedRequest:
        return parsed_of(body, is_live=is_live) if parse is None else parse(body, is_live)

    async def parsed(body: Mapping[str, object], caller: Caller) -> ParsedRequest:
        return await asyncio.to_thread(read, body, False)

    async def parsed_live(body: Mapping[str, object], caller: Caller) -> ParsedRequest:
        return await asyncio.to_thread(read, body, True)

    metrics, limiter = Metrics("helios-distilled"), Limiter()
    desk = GrpcDesk(
        service=cast(VideoService, service),
        parsed=parsed,
        parsed_live=parsed_live,
        limiter=limiter,
        limits=Limits(),
        content_url=lambda video_id: f"http://127.0.0.1:8000/v1/videos/{video_id}/content",
    )
    access = GrpcAccess(Authenticator(keys), limiter)
    server = GrpcServer(desk, access, metrics, GrpcSettings() if settings is None else settings)
    port = await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", NO_PROXY) as channel:
            stub = cast(Any, VideoGenerationServiceStub)(channel)
            yield Served(server=server, service=service, metrics=metrics, port=port, channel=channel, stub=stub)
    finally:
        await service.close()
        await server.drain(0.0)
        await server.stop()


def run(
    scenario: Callable[[Served], Coroutine[Any, Any, None]],
    script: Script | None = None,
    settings: GrpcSettings | None = None,
    keys: Sequence[KeySource] = (),
) -> None:
    """Runs a scenario against a real server on a free port of loopback."""

    async def main() -> None:
        async with asyncio.timeout(60), serving(FakeVideoService(script), settings, keys) as served:
            await scenario(served)

    asyncio.run(main())


@asynccontextmanager
async def wire_to(port: int) -> AsyncIterator[Wire]:
    """A connection to `port` that can be cut."""
    wire = Wire()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        wire.writers.extend((writer, far_writer))
        await asyncio.gather(wire.copy(reader, far_writer, 1), wire.copy(far_reader, writer, 0))

    server = await asyncio.start_server(connect, "127.0.0.1", 0)
    wire.port = server.sockets[0].getsockname()[1]
    try:
        yield wire
    finally:
        server.close()
        wire.cut()
        await asyncio.sleep(0.01)


@dataclass(kw_only=True)
class Wire:
    """What lies between a client and the server. num_sent: bytes towards the server."""

    port: int = 0
    num_sent: int = 0
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    async def copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, counts: int) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                self.num_sent += counts * len(data)
                writer.write(data)
                await writer.drain()

    def cut(self) -> None:
        """Without a word to either side's protocol."""
        for writer in self.writers:
            writer.transport.abort()
