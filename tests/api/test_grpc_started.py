"""gRPC of a server that is started as a user starts it: beside HTTP, and ended by SIGTERM."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status

from helios_serve.api.grpc_server import SERVICE
from helios_serve.api.proto.helios.video.v1 import video_generation_pb2 as pb
from helios_serve.api.proto.helios.video.v1.video_generation_pb2_grpc import VideoGenerationServiceStub
from tests.api.grpc_fakes import NO_PROXY
from tests.faults.server_process import Server

EXIT_S = 10.0
SPEC: dict[str, Any] = {"prompt": "a lake", "width": 64, "height": 64, "seed": 3}


@dataclass(kw_only=True)
class Started:
    """A server, and clients of both its ports."""

    server: Server
    channel: grpc.Channel
    stub: Any

    def job(self, video_id: str) -> dict[str, Any]:
        """As HTTP shows it."""
        return self.server.get(f"/v1/videos/{video_id}")

    def until(self, video_id: str, is_reached: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        deadline = time.monotonic() + 60
        while not is_reached(job := self.job(video_id)):
            assert time.monotonic() < deadline, job
            time.sleep(0.05)
        return job


@pytest.fixture
def started(tiny_distilled: Path, tmp_path: Path) -> Iterator[Started]:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        port, grpc_port = one.getsockname()[1], two.getsockname()[1]
    options = ("--grpc-port", str(grpc_port))
    server = Server(model=tiny_distilled, data_dir=tmp_path, port=port, options=options)
    try:
        server.start()
        with grpc.insecure_channel(f"127.0.0.1:{grpc_port}", NO_PROXY) as channel:
            grpc.channel_ready_future(channel).result(timeout=30)
            stub: Any = VideoGenerationServiceStub
            yield Started(server=server, channel=channel, stub=stub(channel))
    finally:
        server.kill()


def test_from_the_first_call_to_sigterm(started: Started) -> None:
    """One test, as each start takes seconds."""
    _both_ports_see_the_same_jobs(started)
    _whoever_leaves_frees_the_job(started)
    names = ProtoReflectionDescriptorDatabase(started.channel).get_services()
    assert {SERVICE.full_name, "grpc.health.v1.Health"} <= {*names}
    _a_drain_is_told(started)


def _both_ports_see_the_same_jobs(started: Started) -> None:
    request = pb.GenerateRequest(spec=pb.VideoSpec(**SPEC, num_frames=40))
    events = [*started.stub.Generate(request)]
    video = events[-1].completed
    assert started.job(video.id)["status"] == "completed"
    content = started.server.call("GET", video.url[video.url.index("/v1/") :])
    pieces = started.stub.DownloadVideo(pb.DownloadVideoRequest(id=video.id))
    assert content == b"".join(piece.data for piece in pieces)

    body = {"prompt": "a hill", "num_frames": 33, "size": "64x64"}
    answer = started.server.call("POST", "/v1/videos", body)
    assert answer is not None
    by_http = json.loads(answer)["id"]
    *_, last = started.stub.WatchVideo(pb.WatchVideoRequest(id=by_http))
    assert (last.completed.id, last.completed.prompt) == (by_http, "a hill")


def _whoever_leaves_frees_the_job(started: Started) -> None:
    long = pb.GenerateRequest(spec=pb.VideoSpec(**SPEC, num_frames=3300))
    call = started.stub.Generate(long)
    cancelled = next(call).accepted.video.id
    call.cancel()
    overdue = next(call := started.stub.Generate(long, timeout=1.5)).accepted.video.id
    with pytest.raises(grpc.RpcError) as caught:
        _read_on(call)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    for video_id in (cancelled, overdue):
        job = started.until(video_id, lambda job: job["status"] == "failed")
        assert job["error"]["code"] == "cancelled"


def _a_drain_is_told(started: Started) -> None:
    long = pb.VideoSpec(**SPEC, num_frames=3300)
    generating = started.stub.Generate(pb.GenerateRequest(spec=long))
    video_id = next(generating).accepted.video.id
    sent = iter([pb.SessionRequest(start=pb.SessionStart(spec=pb.VideoSpec(**SPEC)))])
    session = started.stub.Session(sent)
    assert next(session).HasField("started")
    health: Any = health_pb2_grpc.HealthStub(started.channel)
    watched = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE.full_name))
    assert next(watched).status == health_pb2.HealthCheckResponse.SERVING

    signalled_s = time.monotonic()
    started.server.signal(signal.SIGTERM)
    assert next(watched).status == health_pb2.HealthCheckResponse.NOT_SERVING
    for call in (session, generating):
        with pytest.raises(grpc.RpcError) as caught:
            _read_on(call)
        assert _draining(caught.value) == ("draining", 1.0)
    assert (watched.code(), watched.details()) == (grpc.StatusCode.UNAVAILABLE, "the server is shutting down")
    assert started.server.process is not None
    assert started.server.process.wait(3 * EXIT_S) == 0
    assert time.monotonic() - signalled_s < EXIT_S
    assert "Traceback" not in (started.server.data_dir / "server.log").read_text()

    started.server.start()
    assert started.job(video_id)["status"] in ("queued", "in_progress")


def _draining(error: Any) -> tuple[str, float]:
    """The reason of an UNAVAILABLE, and the seconds to wait."""
    assert error.code() == grpc.StatusCode.UNAVAILABLE, error
    status = rpc_status.from_call(error)
    assert status is not None, error
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert any(detail.Unpack(info) for detail in status.details)
    assert any(detail.Unpack(retry) for detail in status.details)
    return info.reason, retry.retry_delay.ToMilliseconds() / 1000


def _read_on(call: Any) -> None:
    for _ in call:
        pass
