"""What hostile clients send: bytes that are no message, messages too large, garbage. The server stays healthy."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2

from helios_serve.api.grpc_server import SERVICE
from helios_serve.api.keys import KeyRing, new_key
from helios_serve.api.proto.helios.video.v1 import video_generation_pb2 as pb
from tests.api.grpc_fakes import NO_PROXY, Served, refused, run, wire_to

NAME = SERVICE.full_name
SERVING = health_pb2.HealthCheckResponse.SERVING

NESTED = b"\x0b" * 100_000
"""As many opened groups of field 1, none closed."""

MALFORMED = {
    "no message": b"\xff\xff\xff\xff",
    "cut short": b"\x0a\x10abc",
    "not UTF-8": b"\x0a\x02\xff\xfe",
    "nested": NESTED,
    "nested and closed": NESTED + b"\x0c" * 100_000,
}


@pytest.mark.parametrize("name", MALFORMED)
def test_bytes_that_are_no_message(name: str) -> None:
    async def scenario(served: Served) -> None:
        for method, kind in (("GetVideo", "unary_unary"), ("WatchVideo", "unary_stream"), ("Session", "stream_stream")):
            multi = {
                "unary_unary": served.channel.unary_unary,
                "unary_stream": served.channel.unary_stream,
                "stream_stream": served.channel.stream_stream,
            }[kind](f"/{NAME}/{method}")
            call: Any = multi(iter([MALFORMED[name]])) if kind == "stream_stream" else multi(MALFORMED[name])
            refusal = await refused(call)
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "malformed_body"), method
        await _is_healthy(served)

    run(scenario)


def test_bytes_that_are_no_message_end_a_session() -> None:
    async def scenario(served: Served) -> None:
        multi = served.channel.stream_stream(f"/{NAME}/Session")
        call: Any = multi()
        await call.write(pb.SessionRequest(start=pb.SessionStart(spec=served.spec())).SerializeToString())
        await call.read()
        await call.write(MALFORMED["no message"])
        assert (await refused(call)).code == grpc.StatusCode.INVALID_ARGUMENT
        assert served.service.sessions[-1].has_left

    run(scenario)


def test_a_message_of_65_mib() -> None:
    async def scenario(served: Served) -> None:
        options = (*NO_PROXY, ("grpc.max_send_message_length", -1))
        async with grpc.aio.insecure_channel(f"127.0.0.1:{served.port}", options) as channel:
            stub = type(served.stub)(channel)
            request = pb.CreateVideoRequest(spec=served.spec(image=pb.Media(data=bytes(65 << 20))))
            calls = [stub.CreateVideo(request), stub.Generate(pb.GenerateRequest(spec=request.spec))]
            for call in calls:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await (anext(aiter(call)) if isinstance(call, grpc.aio.UnaryStreamCall) else call)
                assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            session = stub.Session()
            await session.write(pb.SessionRequest(start=pb.SessionStart(spec=request.spec)))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await session.read()
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        await _is_healthy(served)

    run(scenario)


def test_nothing_large_is_taken_from_strangers() -> None:
    _, key = new_key()

    async def scenario(served: Served) -> None:
        request = pb.CreateVideoRequest(spec=served.spec(image=pb.Media(data=bytes(60 << 20))))
        async with (
            wire_to(served.port) as wire,
            grpc.aio.insecure_channel(
                f"127.0.0.1:{wire.port}", (*NO_PROXY, ("grpc.max_send_message_length", -1))
            ) as channel,
        ):
            stub = type(served.stub)(channel)
            for call in (stub.CreateVideo(request), stub.Generate(pb.GenerateRequest(spec=request.spec))):
                assert (await refused(call)).code == grpc.StatusCode.UNAUTHENTICATED
            assert wire.num_sent < 32 << 20  # of 120 MiB; a refusal finds some under way

    run(scenario, keys=[KeyRing([key])])


def test_a_call_without_its_message() -> None:
    async def scenario(served: Served) -> None:
        for method in ("GetVideo", "WatchVideo"):
            call: Any = served.channel.stream_stream(f"/{NAME}/{method}")()
            await call.done_writing()
            refusal = await refused(call)
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "malformed_body")

    run(scenario)


def test_only_calls_that_take_media_take_large_messages() -> None:
    async def scenario(served: Served) -> None:
        too_large = await refused(served.stub.GetVideo(pb.GetVideoRequest(id="v" * (1 << 20))))
        assert (too_large.code, too_large.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "body_too_large")
        session = served.stub.Session()
        await session.write(pb.SessionRequest(start=pb.SessionStart(spec=served.spec())))
        await session.read()
        await session.write(pb.SessionRequest(prompt=pb.PromptUpdate(prompt="a" * (1 << 20))))
        assert (await refused(session)).reason == "body_too_large"

    run(scenario)


def test_a_message_of_40_mb_is_read() -> None:
    async def scenario(served: Served) -> None:
        request = pb.CreateVideoRequest(spec=served.spec(image=pb.Media(data=bytes(40_000_000))))
        refusal = await refused(served.stub.CreateVideo(request))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "media_invalid")
        assert refusal.fields == ["spec.image"]

    run(scenario)


async def _is_healthy(served: Served) -> None:
    assert await served.health(NAME) == SERVING
    assert (await served.stub.ListModels(pb.ListModelsRequest())).models


def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Of HTTP/2: RFC 9113, section 4.1."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def _literal(name: bytes, value: bytes) -> bytes:
    """A header that is in no table: RFC 7541, section 6.2.2."""
    return bytes([0, len(name)]) + name + bytes([len(value)]) + value


def test_calls_that_are_reset_as_they_begin() -> None:
    """HTTP/2 rapid reset: no call that is over holds anything, and others are answered meanwhile."""
    path = f"/{NAME}/Generate".encode()
    headers = {b":method": b"POST", b":scheme": b"http", b":path": path, b":authority": b"a", b"te": b"trailers",
               b"content-type": b"application/grpc"}  # fmt: skip
    block = b"".join(_literal(name, value) for name, value in headers.items())
    begin, cancel, end_headers = 1, 3, 4
    attack = b"".join(
        _frame(begin, end_headers, stream, block) + _frame(cancel, 0, stream, (8).to_bytes(4, "big"))
        for stream in range(1, 40_001, 2)
    )

    async def scenario(served: Served) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(4, 0, 0) + attack)
        reading = asyncio.create_task(reader.read(-1))
        for _ in range(20):
            async with asyncio.timeout(10):
                assert (await served.stub.ListModels(pb.ListModelsRequest())).models
        writer.close()
        await asyncio.gather(reading, return_exceptions=True)
        await _is_healthy(served)
        async with asyncio.timeout(30):
            while served.server.num_open_calls:
                await asyncio.sleep(0.05)
        assert served.counted("Generate", "CANCELLED") > 0, "the attack did not come through"
        assert not served.service.jobs

    run(scenario)


def test_garbage_on_the_socket_closes_that_connection_alone() -> None:
    async def scenario(served: Served) -> None:
        for garbage in (
            b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
            bytes(range(256)) * 300,
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff" * 9,
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
            writer.write(garbage)
            async with asyncio.timeout(10):
                while await reader.read(1 << 16):
                    pass
            writer.close()
        await _is_healthy(served)

    run(scenario)
