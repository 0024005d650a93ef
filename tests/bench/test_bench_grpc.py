"""Videos over gRPC from a server that does what it is told: what is measured is what was done, failures have names."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from helios_serve.api.proto.helios.video.v1 import video_generation_pb2 as pb
from helios_serve.api.proto.helios.video.v1 import video_generation_pb2_grpc as pb_grpc
from helios_serve.bench.arrivals import ClosedLoad
from helios_serve.bench.grpc_target import GrpcTarget, parse_grpc_url
from helios_serve.bench.load import Caller, drive
from helios_serve.bench.observed import Observed
from helios_serve.bench.workload import Kind, Planned
from tests.bench.scripted_server import FRAMES, media_bytes
from tests.bench.test_bench_load import LATE_S, Counting

STREAM = Kind(via="grpc", num_frames=2 * FRAMES)
Act = Callable[[pb.GenerateRequest, grpc.ServicerContext], Iterator[pb.GenerateResponse]]


def accepted() -> pb.GenerateResponse:
    video = pb.Video(id="v1")
    return pb.GenerateResponse(accepted=pb.Accepted(video=video, init_segment=b"init", recommended_preroll_seconds=0.5))


def segment(index: int) -> Iterator[pb.GenerateResponse]:
    """In two parts."""
    data = media_bytes()
    for part, piece in enumerate((data[:100], data[100:])):
        yield pb.GenerateResponse(segment=pb.Segment(index=index, data=piece, part=part, num_parts=2))


def well(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
    yield accepted()
    yield pb.GenerateResponse(progress=pb.Progress(percent=10))
    for index in range(2):
        time.sleep((0.1, 1.0)[index])
        yield from segment(index)
    warnings = [pb.Warning(message="careful")]
    timing = pb.Timing(queue_ms=3, generated_fps=20)
    video = pb.Video(id="v1", num_chunks=2, width=128, height=64, fps=24, timing=timing, warnings=warnings)
    yield pb.GenerateResponse(completed=video)


def without_end(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
    yield accepted()
    yield from segment(0)


def failed(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
    yield accepted()
    yield pb.GenerateResponse(failed=pb.Video(error=pb.Error(code="generation_failed", message="NaN")))


def refused(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
    status = Status(code=grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], message="too many")
    status.details.add().Pack(ErrorInfo(reason="quota_exceeded", domain="helios.video.v1"))
    context.abort_with_status(rpc_status.to_status(status))
    yield accepted()


def lost(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
    yield accepted()
    context.abort(grpc.StatusCode.UNAVAILABLE, "gone")


def forbidden(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
    context.abort(grpc.StatusCode.PERMISSION_DENIED, "by a proxy")
    yield accepted()


def never(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
    yield accepted()
    while context.is_active():
        time.sleep(0.02)


@dataclass
class Servicer(pb_grpc.VideoGenerationServiceServicer):
    """Acts as told; keeps what it was asked."""

    act: Act

    def __post_init__(self) -> None:
        self.received: list[pb.GenerateRequest] = []
        self.metadata: list[dict[str, Any]] = []

    def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        self.received.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        return self.act(request, context)


@contextmanager
def serving(act: Act) -> Iterator[tuple[Servicer, str]]:
    servicer = Servicer(act)
    server = grpc.server(ThreadPoolExecutor(4))
    pb_grpc.add_VideoGenerationServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield servicer, f"grpc://127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


def load_on(url: str, kinds: list[Kind], *, concurrency: int = 1, timeout_s: float = 10.0) -> list[Observed]:
    async def run() -> list[Observed]:
        channels = parse_grpc_url(url)
        target = GrpcTarget(channels=channels, image=b"png", video=b"mp4", model="m", key="hs_key")
        planned = [Planned(index=index, kind=kind, prompt="a fox", seed=7) for index, kind in enumerate(kinds)]
        caller = Caller(target=target, timeout_s=timeout_s)
        seen = await drive(caller, planned, ClosedLoad(concurrency=concurrency), 1, Counting())
        await channels.aclose()
        return seen

    return asyncio.run(run())


def test_a_call_is_seen_as_it_was_sent() -> None:
    with serving(well) as (_, url):
        (seen,) = load_on(url, [STREAM])
    assert (seen.error, seen.num_frames, seen.num_chunks, seen.video_id) == (None, 2 * FRAMES, 2, "v1")
    assert [one.num_frames for one in seen.segments] == [FRAMES, FRAMES]
    assert seen.num_bytes == 2 * len(media_bytes()) + len(b"init")
    assert 0.1 <= seen.segments[0].at_s - seen.due_s < 0.1 + LATE_S
    assert seen.segments[1].at_s - seen.segments[0].at_s == pytest.approx(1.0, abs=LATE_S)
    assert (seen.preroll_s, seen.warnings, seen.server_timing_ms) == (0.5, ("careful",), {"queue_ms": 3})
    assert seen.made_as == "128x64, 24 fps"


def test_what_is_asked_over_grpc() -> None:
    full = Kind(via="grpc", task="i2v", num_frames=66, size="128x64", steps=(2, 1, 1), fps=16)
    with serving(well) as (servicer, url):
        seen = load_on(url, [full, Kind(via="grpc", task="v2v", service_class="offline")], concurrency=2)
    assert [one.error for one in seen] == [None, None]
    first, second = sorted((request.spec for request in servicer.received), key=lambda spec: spec.num_frames)
    assert (first.prompt, first.seed, first.model, first.fps, first.num_frames) == ("a fox", 7, "m", 16, 66)
    assert (first.width, first.height, [*first.helios.steps], first.image.data) == (128, 64, [2, 1, 1], b"png")
    assert first.helios.service_class == pb.SERVICE_CLASS_UNSPECIFIED
    assert (second.video.data, second.helios.service_class) == (b"mp4", pb.SERVICE_CLASS_OFFLINE)
    assert not second.HasField("width")
    assert {one["authorization"] for one in servicer.metadata} == {"Bearer hs_key"}


@pytest.mark.parametrize(
    ("act", "code"),
    [
        (without_end, "cut"),
        (lost, "cut"),
        (failed, "generation_failed"),
        (refused, "quota_exceeded"),
        (forbidden, "grpc_permission_denied"),
        (never, "timeout"),
    ],
)
def test_every_failure_of_a_call_has_a_code(act: Act, code: str) -> None:
    with serving(act) as (_, url):
        first, second = load_on(url, [STREAM, STREAM], timeout_s=1.0 if act is never else 10.0)
    assert (first.error, second.error) == (code, code)
    assert first.message


def test_nobody_listens_to_calls() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"127.0.0.1:{free.getsockname()[1]}"
    (seen,) = load_on(url, [STREAM])
    assert seen.error == "connect"
