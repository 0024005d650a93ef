"""The server around the calls: who may call, ids, health, reflection, TLS, and draining."""

from __future__ import annotations

import asyncio
import logging
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from opentelemetry import trace
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from helios_serve.api.auth import Authenticator, Caller
from helios_serve.api.convert import Limits, ParsedRequest
from helios_serve.api.grpc_access import GrpcAccess, read_headers
from helios_serve.api.grpc_server import SERVICE, GrpcServer, GrpcSettings
from helios_serve.api.grpc_service import GrpcDesk
from helios_serve.api.jobs import Created, Origin
from helios_serve.api.keys import KeyRing, new_key
from helios_serve.api.limits import Limiter
from helios_serve.api.probes import Pulse
from helios_serve.api.proto.helios.video.v1 import video_generation_pb2 as pb
from helios_serve.api.proto.helios.video.v1.video_generation_pb2_grpc import VideoGenerationServiceStub
from helios_serve.api.service import VideoService
from helios_serve.errors import HeliosError
from helios_serve.telemetry import Metrics
from helios_serve.tracing import TraceContext, Tracing, current_context
from helios_serve.tracing_otel import OtelTracing
from tests.api.grpc_fakes import NO_PROXY, FakeVideoService, Served, refused, run, serving
from tests.api.session_fakes import Script, parsed_of

NAME = SERVICE.full_name
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def test_health_follows_the_service() -> None:
    async def scenario(served: Served) -> None:
        stub: Any = health_pb2_grpc.HealthStub(served.channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=NAME))
        assert (await watch.read()).status == SERVING
        served.service.is_up = False
        assert (await watch.read()).status == NOT_SERVING
        assert await served.health("") == SERVING
        served.service.is_up = True
        assert (await watch.read()).status == SERVING
        await served.server.set_ready(False)
        assert (await watch.read()).status == NOT_SERVING
        await asyncio.sleep(0.6)
        assert await served.health(NAME) == NOT_SERVING
        watch.cancel()

    run(scenario)


async def listed(served: Served) -> list[str]:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(cast(Any, served.channel))
    call = stub.ServerReflectionInfo()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    names = [each.name for each in (await call.read()).list_services_response.service]
    await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=NAME))
    files = (await call.read()).file_descriptor_response.file_descriptor_proto
    assert any(pb.DESCRIPTOR.serialized_pb == file for file in files)
    await call.done_writing()
    return names


def test_reflection_lists_the_service() -> None:
    async def scenario(served: Served) -> None:
        assert {NAME, "grpc.health.v1.Health"} <= {*await listed(served)}

    run(scenario)


def test_reflection_can_be_left_out_and_is_where_strangers_can_call() -> None:
    async def scenario(served: Served) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await listed(served)
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED

    run(scenario, settings=GrpcSettings(reflection=False))
    assert not GrpcSettings(host="0.0.0.0").has_reflection
    assert GrpcSettings(host="::1").has_reflection


def test_every_answer_has_a_request_id() -> None:
    async def scenario(served: Served) -> None:
        call = served.stub.ListModels(pb.ListModelsRequest(), metadata=(("x-request-id", "mine"),))
        assert dict(await call.initial_metadata())["x-request-id"] == "mine"
        await call
        call = served.stub.GetVideo(pb.GetVideoRequest(id="video_x"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert str(dict(caught.value.initial_metadata())["x-request-id"]).startswith("req_")

    run(scenario)


def test_the_first_value_of_a_header_counts_and_bad_ones_do_not() -> None:
    headers = read_headers(
        [
            ("x-request-id", "a" * 129),
            ("authorization", "Bearer one"),
            ("authorization", "Bearer two"),
            ("traceparent", TRACEPARENT),
            ("tracestate", "vendor=1"),
            ("idempotency-key", "k"),
            ("grpc-trace-bin", b"\x00"),
        ]
    )
    assert headers.request_id.startswith("req_")
    assert (headers.authorization, headers.idempotency_key) == ("Bearer one", "k")
    assert headers.trace == TraceContext(traceparent=TRACEPARENT, tracestate="vendor=1")
    assert read_headers([("traceparent", "00-xyz")]).trace is None


def test_keys_and_scopes() -> None:
    reader, reader_key = new_key(scopes=("read",))
    maker, maker_key = new_key(scopes=("generate", "read"), tenant="acme")
    _, old_key = new_key(expires_at=1.0)
    ring = KeyRing([reader_key, maker_key, old_key])

    async def scenario(served: Served) -> None:
        stub = served.stub

        def by(key: str) -> dict[str, Any]:
            return {"metadata": (("authorization", f"Bearer {key}"),)}

        nobody = await refused(stub.ListModels(pb.ListModelsRequest()))
        assert (nobody.code, nobody.reason) == (grpc.StatusCode.UNAUTHENTICATED, "invalid_api_key")
        wrong = await refused(stub.ListModels(pb.ListModelsRequest(), **by("hs_abcdefabcdef_" + "0" * 64)))
        assert wrong.code == grpc.StatusCode.UNAUTHENTICATED
        assert (await stub.ListModels(pb.ListModelsRequest(), **by(reader))).models
        for call in (
            stub.CreateVideo(pb.CreateVideoRequest(spec=served.spec()), **by(reader)),
            stub.Generate(pb.GenerateRequest(spec=served.spec()), **by(reader)),
            stub.DeleteVideo(pb.DeleteVideoRequest(id="video_x"), **by(reader)),
            stub.Session(**by(maker)),
        ):
            refusal = await refused(call)
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.PERMISSION_DENIED, "insufficient_scope")
        made = (await stub.CreateVideo(pb.CreateVideoRequest(spec=served.spec()), **by(maker))).video
        assert served.service.jobs[made.id].tenant == "acme"
        strange = await refused(stub.GetVideo(pb.GetVideoRequest(id=made.id), **by(reader)))
        assert strange.code == grpc.StatusCode.NOT_FOUND
        assert await served.health(NAME) == SERVING
        for _ in range(9):
            await refused(stub.ListModels(pb.ListModelsRequest(), **by("hs_abcdefabcdef_" + "1" * 64)))
        throttled = await refused(stub.ListModels(pb.ListModelsRequest(), **by(reader)))
        assert (throttled.code, throttled.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "auth_throttled")
        assert throttled.retry_s is not None

    run(scenario, keys=[ring])


def test_a_drain_shows_itself_first_and_ends_what_is_open() -> None:
    async def scenario(served: Served) -> None:
        stub, service = served.stub, served.service
        generating = stub.Generate(pb.GenerateRequest(spec=served.spec()))
        video_id = (await anext(aiter(generating))).accepted.video.id
        session = stub.Session()
        await session.write(pb.SessionRequest(start=pb.SessionStart(spec=served.spec())))
        assert (await session.read()).HasField("started")

        draining = asyncio.create_task(served.server.drain(2.0))
        started_s = time.monotonic()
        refusal = await refused(session)
        assert time.monotonic() - started_s < 1.5
        assert await served.health(NAME) == NOT_SERVING
        assert await served.health("") == SERVING
        new = await refused(stub.ListModels(pb.ListModelsRequest()))
        ended = await refused(generating)
        for each in (refusal, new, ended):
            assert (each.code, each.reason, each.retry_s) == (grpc.StatusCode.UNAVAILABLE, "draining", 1.0)
            assert each.retry_after_ms == "1000"
        await draining
        assert 1.9 < time.monotonic() - started_s < 10
        assert service.sessions[-1].has_left
        assert ("left", video_id) in service.log
        assert ("cancel", video_id) not in service.log

    run(scenario, Script(chunk_s=5))


def test_whoever_watches_is_told_that_the_server_ends(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(served: Served) -> None:
        stub: Any = health_pb2_grpc.HealthStub(served.channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest(service=name)) for name in (NAME, "", "no such")]
        for watch in watches:
            await watch.read()
        left = stub.Watch(health_pb2.HealthCheckRequest(service=NAME))
        await left.read()
        left.cancel()
        await served.server.drain(0)
        assert (await watches[0].read()).status == NOT_SERVING
        started_s = time.monotonic()
        await served.server.stop()
        assert time.monotonic() - started_s < 5
        for watch in watches:
            assert await watch.code() == grpc.StatusCode.UNAVAILABLE
            assert await watch.details() == "the server is shutting down"

    with caplog.at_level("WARNING"):
        run(scenario)
    assert not caplog.records


def test_a_drain_waits_for_calls_that_end_by_themselves() -> None:
    async def scenario(served: Served) -> None:
        call = served.stub.Generate(pb.GenerateRequest(spec=served.spec()))
        assert (await anext(aiter(call))).HasField("accepted")
        started_s = time.monotonic()
        (_, events) = await asyncio.gather(served.server.drain(20), _rest(call))
        assert events[-1].HasField("completed")
        assert time.monotonic() - started_s < 10

    run(scenario, Script(chunk_s=0.1))


async def _rest(call: Any) -> list[Any]:
    return [event async for event in call]


def test_a_drain_ends_a_call_that_nobody_reads() -> None:
    async def scenario(served: Served) -> None:
        call = served.stub.Generate(pb.GenerateRequest(spec=served.spec(num_frames=330)))
        video_id = (await anext(aiter(call))).accepted.video.id
        await served.service.ended(video_id)
        await asyncio.sleep(0.2)
        assert ("left", video_id) not in served.service.log
        await served.server.drain(0.1)
        assert ("left", video_id) in served.service.log

    run(scenario, Script(padding_bytes=3_000_000))


@asynccontextmanager
async def watched(
    service: FakeVideoService, *, pulse: Pulse | None = None, tracing: Tracing | None = None
) -> AsyncIterator[grpc.aio.Channel]:
    """A client of a server with this pulse and tracing; its key is not needed."""

    async def parsed(body: Mapping[str, object], caller: Caller) -> ParsedRequest:
        return parsed_of(body)

    limiter = Limiter()
    desk = GrpcDesk(
        service=cast(VideoService, service),
        parsed=parsed,
        parsed_live=parsed,
        limiter=limiter,
        limits=Limits(),
        content_url=lambda video_id: video_id,
    )
    access = GrpcAccess(Authenticator([]), limiter)
    server = GrpcServer(desk, access, Metrics("m"), GrpcSettings(), pulse=pulse, tracing=tracing)
    port = await server.start()
    try:
        async with asyncio.timeout(60), grpc.aio.insecure_channel(f"127.0.0.1:{port}", NO_PROXY) as channel:
            yield channel
    finally:
        await service.close()
        await server.drain(0.0)
        await server.stop()


def test_the_health_of_the_server_follows_its_pulse() -> None:
    silent_s = 0.0

    async def main() -> None:
        nonlocal silent_s
        async with watched(FakeVideoService(), pulse=Pulse(lambda: silent_s)) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            watch = stub.Watch(health_pb2.HealthCheckRequest(service=""))
            assert (await watch.read()).status == SERVING
            silent_s = 5.0
            assert (await watch.read()).status == NOT_SERVING
            assert (await stub.Check(health_pb2.HealthCheckRequest(service=NAME))).status == SERVING
            silent_s = 0.1
            assert (await watch.read()).status == SERVING
            watch.cancel()

    asyncio.run(main())


class TracedService(FakeVideoService):
    """Notes the place in a trace at which each job was made."""

    def __init__(self) -> None:
        super().__init__()
        self.contexts: list[TraceContext | None] = []

    async def create(self, caller: Caller, parsed: ParsedRequest, origin: Origin) -> Created:
        self.contexts.append(current_context())
        return await super().create(caller, parsed, origin)


def test_a_call_is_a_span_of_the_callers_trace_and_the_service_works_inside(caplog: pytest.LogCaptureFixture) -> None:
    exporter, service = InMemorySpanExporter(), TracedService()
    tracing = OtelTracing(exporter, version="1")
    given = (("traceparent", TRACEPARENT), ("x-request-id", "mine"), ("authorization", "Bearer hs_secret"))

    async def main() -> None:
        async with watched(service, tracing=tracing) as channel:
            stub: Any = cast(Any, VideoGenerationServiceStub)(channel)
            spec = pb.VideoSpec(prompt="a secret lake", width=64, height=64, num_frames=33)
            await stub.CreateVideo(pb.CreateVideoRequest(spec=spec), metadata=given)
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.GetVideo(pb.GetVideoRequest(id="video_x"))
            call = stub.Generate(pb.GenerateRequest(spec=spec))
            await anext(aiter(call))
            call.cancel()
            while len(_access_lines(caplog)) < 3:
                await asyncio.sleep(0.01)
            service.error = RuntimeError("broken")
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.CreateVideo(pb.CreateVideoRequest(spec=spec))

    with caplog.at_level("INFO", "helios_serve.access"):
        asyncio.run(main())
    tracing.close()
    made, missing, left, broken = exporter.get_finished_spans()
    assert made.name == f"{NAME}/CreateVideo"
    assert made.kind is trace.SpanKind.SERVER
    assert made.parent is not None
    assert made.parent.span_id == 0xB7AD6B7169203331
    own = made.get_span_context()
    assert own is not None
    assert own.trace_id == 0x0AF7651916CD43DD8448EB211C80319C
    assert service.contexts[0] is not None
    assert service.contexts[0].traceparent == f"00-{own.trace_id:032x}-{own.span_id:016x}-01"
    assert made.attributes == {
        "rpc.system": "grpc", "rpc.service": NAME, "rpc.method": "CreateVideo", "rpc.grpc.status_code": 0
    }  # fmt: skip
    codes = [dict(span.attributes or {})["rpc.grpc.status_code"] for span in (missing, left, broken)]
    assert codes == [5, 1, 13]
    assert [span.status.status_code for span in (made, missing, left)] == [trace.StatusCode.UNSET] * 3
    assert broken.status.status_code is trace.StatusCode.ERROR

    lines = _access_lines(caplog)
    assert [line.getMessage() for line in lines] == [
        f"GRPC /{NAME}/CreateVideo OK",
        f"GRPC /{NAME}/GetVideo NOT_FOUND",
        f"GRPC /{NAME}/Generate CANCELLED",
        f"GRPC /{NAME}/CreateVideo INTERNAL",
    ]
    first = vars(lines[0])
    assert (first["method"], first["status"], first["client"]) == ("GRPC", "OK", "127.0.0.1")
    assert first["duration_s"] >= 0
    assert "secret" not in "".join(str(vars(line)) for line in lines)


def _access_lines(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == "helios_serve.access"]


def test_an_address_that_is_taken() -> None:
    async def scenario(served: Served) -> None:
        with pytest.raises(HeliosError, match="choose another port"):
            async with serving(FakeVideoService(), GrpcSettings(port=served.port)):
                pass

    run(scenario)


def test_settings_that_do_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="both or none"):
        GrpcSettings(tls_cert=tmp_path / "cert.pem")
    with pytest.raises(ValueError, match="tls_client_ca"):
        GrpcSettings(tls_client_ca=tmp_path / "ca.pem")
    missing = GrpcSettings(tls_cert=tmp_path / "cert.pem", tls_key=tmp_path / "key.pem")

    async def main() -> None:
        with pytest.raises(HeliosError, match="No such file"):
            async with serving(FakeVideoService(), missing):
                pass

    asyncio.run(main())


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_tls_and_client_certificates(tmp_path: Path) -> None:
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", cert],
        check=True, capture_output=True,
    )  # fmt: skip
    root, pair = cert.read_bytes(), (key.read_bytes(), cert.read_bytes())

    async def code_of(port: int, credentials: grpc.ChannelCredentials) -> grpc.StatusCode:
        async with grpc.aio.secure_channel(f"localhost:{port}", credentials, NO_PROXY) as channel:
            method: Any = channel.unary_unary(f"/{NAME}/ListModels")
            call = method(b"", timeout=5)
            code: grpc.StatusCode = await call.code()
            return code

    async def main() -> None:
        plain = grpc.ssl_channel_credentials(root)
        with_cert = grpc.ssl_channel_credentials(root, *pair)
        async with serving(FakeVideoService(), GrpcSettings(tls_cert=cert, tls_key=key)) as served:
            assert await code_of(served.port, plain) == grpc.StatusCode.OK
        both = GrpcSettings(tls_cert=cert, tls_key=key, tls_client_ca=cert)
        async with serving(FakeVideoService(), both) as served:
            assert await code_of(served.port, with_cert) == grpc.StatusCode.OK
            assert await code_of(served.port, plain) == grpc.StatusCode.UNAVAILABLE

    asyncio.run(main())
