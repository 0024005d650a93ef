"""`Generate` and `WatchVideo` over a real channel: what is told in which order, and who ends the job."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator
from typing import Any

import av
import grpc
import grpc.aio
import pytest
from google.protobuf.message import Message

from helios_serve.api.auth import Authenticator
from helios_serve.api.grpc_access import GrpcAccess
from helios_serve.api.grpc_boundary import Boundary, Call, StreamMethod
from helios_serve.api.grpc_server import SERVICE
from helios_serve.api.limits import Limiter
from helios_serve.api.proto.helios.video.v1 import video_generation_pb2 as pb
from helios_serve.errors import CapacityError, GenerationError
from helios_serve.telemetry import Metrics
from tests.api.grpc_fakes import FRAMES, NO_PROXY, Served, refused, run, wire_to
from tests.api.session_fakes import Script


async def events_of(call: Any) -> list[Any]:
    return [event async for event in call]


def kinds_of(events: list[Any]) -> list[str]:
    return [event.WhichOneof("event") for event in events]


def video_of(events: list[Any]) -> bytes:
    """The bytes as a client joins them."""
    return b"".join(event.accepted.init_segment + event.segment.data for event in events)


def num_frames(data: bytes) -> int:
    with av.open(io.BytesIO(data)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_a_video_is_told_while_it_is_made() -> None:
    async def scenario(served: Served) -> None:
        events = await events_of(served.stub.Generate(pb.GenerateRequest(spec=served.spec())))
        kinds = kinds_of(events)
        assert kinds[0] == "accepted"
        assert kinds[-1] == "completed"
        assert set(kinds[1:-1]) == {"progress", "segment", "accepted"}
        accepted = [event.accepted for event in events if event.WhichOneof("event") == "accepted"]
        assert [bool(each.init_segment) for each in accepted] == [False, True]
        assert accepted[0].video.id == accepted[1].video.id == events[-1].completed.id
        assert accepted[1].mime_type.startswith('video/mp4; codecs="avc1.')
        assert accepted[0].recommended_playback_rate == 0.5
        assert kinds[kinds.index("segment") - 1] == "accepted"

        segments = [event.segment for event in events if event.WhichOneof("event") == "segment"]
        assert [(each.index, each.part, each.num_parts) for each in segments] == [(0, 0, 1), (1, 0, 1), (2, 0, 1)]
        assert [(each.start_frame, each.num_frames) for each in segments] == [(0, 33), (33, 33), (66, 4)]
        assert [each.pts_seconds for each in segments] == [0, 33 / 24, 66 / 24]
        assert [each.is_last for each in segments] == [False, False, True]
        assert {(each.prompt, each.prompt_weight) for each in segments} == {("a lake", 1.0)}
        assert all(each.data[4:8] == b"moof" for each in segments)
        assert num_frames(video_of(events)) == FRAMES

        steps = [event.progress for event in events if event.progress.num_steps]
        assert (steps[0].chunk, steps[0].stage, steps[0].step, steps[0].num_steps) == (0, 0, 1, 2)
        assert {each.num_chunks for each in steps} == {3}
        completed = events[-1].completed
        assert (completed.status, completed.progress) == (pb.VIDEO_STATUS_COMPLETED, 100)
        assert completed.size_bytes == len(video_of(events))
        job = served.service.jobs[completed.id]
        assert job.parsed.request.service_class == "realtime"
        assert served.service.origins[0].route == "generate"
        assert served.counted("Generate", "OK") == 1

    run(scenario)


def test_large_segments_are_split_and_joined_again_at_default_limits() -> None:
    async def scenario(served: Served) -> None:
        spec = served.spec(prompt="\u00e9" * 32_000)
        events = await events_of(served.stub.Generate(pb.GenerateRequest(spec=spec)))
        assert max(event.ByteSize() for event in events) <= 1 << 20
        segments = [event.segment for event in events if event.WhichOneof("event") == "segment"]
        assert len(segments) == 3 * 4
        assert [(each.index, each.part, each.num_parts) for each in segments[:5]] == [
            (0, 0, 4), (0, 1, 4), (0, 2, 4), (0, 3, 4), (1, 0, 4),
        ]  # fmt: skip
        data = video_of(events)
        assert data == served.service.file(served.service.jobs[events[-1].completed.id])
        assert num_frames(data) == FRAMES

    run(scenario, Script(padding_bytes=3_000_000))


def test_segments_in_sub_chunks() -> None:
    async def scenario(served: Served) -> None:
        spec = served.spec(output=pb.OutputOptions(sub_chunks=True))
        events = await events_of(served.stub.Generate(pb.GenerateRequest(spec=spec)))
        segments = [event.segment for event in events if event.WhichOneof("event") == "segment"]
        assert [each.num_frames for each in segments] == [*(2 * [1, *[4] * 8]), 1, 3]
        assert [each.index for each in segments] == [0] * 9 + [1] * 9 + [2] * 2
        assert [each.start_frame for each in segments[8:12]] == [29, 33, 34, 38]
        assert {(each.part, each.num_parts) for each in segments} == {(0, 1)}
        assert [each.is_last for each in segments] == [False] * 19 + [True]
        assert num_frames(video_of(events)) == FRAMES

    run(scenario)


@pytest.mark.parametrize("sub_chunks", [False, True])
@pytest.mark.parametrize(
    ("container", "pixels"), [(pb.CONTAINER_RAW_RGB24, "rgb24"), (pb.CONTAINER_RAW_YUV420P, "yuv420p")]
)
def test_raw_frames(container: pb.Container, pixels: str, sub_chunks: bool) -> None:
    async def scenario(served: Served) -> None:
        spec = served.spec(output=pb.OutputOptions(container=container, sub_chunks=sub_chunks))
        events = await events_of(served.stub.Generate(pb.GenerateRequest(spec=spec)))
        openings = [event.accepted for event in events if event.WhichOneof("event") == "accepted"]
        assert [(told.init_segment, told.mime_type) for told in openings] == [(b"", "")]
        segments = [event.segment for event in events if event.WhichOneof("event") == "segment"]
        counts = [*(2 * [1, *[4] * 8]), 1, 3] if sub_chunks else [33, 33, 4]
        assert [each.num_frames for each in segments] == counts
        size = 64 * 64 * 3 // (1 if pixels == "rgb24" else 2)
        assert [len(each.data) for each in segments] == [size * count for count in counts]
        file = served.service.file(served.service.jobs[events[-1].completed.id])
        with av.open(io.BytesIO(file), "r") as video:
            shown = b"".join(frame.to_ndarray(format=pixels).tobytes() for frame in video.decode(video=0))
        assert b"".join(each.data for each in segments) == shown

    run(scenario)


def test_progress_alone() -> None:
    async def scenario(served: Served) -> None:
        spec = served.spec(output=pb.OutputOptions(inline_segments=False, sub_chunks=True))
        events = await events_of(served.stub.Generate(pb.GenerateRequest(spec=spec)))
        assert set(kinds_of(events)) == {"accepted", "progress", "completed"}
        assert kinds_of(events).count("accepted") == 1
        completed = events[-1].completed
        assert completed.url
        parsed = served.service.jobs[completed.id].parsed
        assert parsed.request.service_class == "offline"
        assert not parsed.with_segments
        assert [warning.param for warning in completed.warnings] == ["spec.output.sub_chunks"]

        watched = await events_of(served.stub.WatchVideo(pb.WatchVideoRequest(id=completed.id, inline_segments=False)))
        assert set(kinds_of(watched)) == {"accepted", "completed"}

    run(scenario)


def test_a_failed_job_is_an_event_and_the_call_is_ok() -> None:
    async def scenario(served: Served) -> None:
        call = served.stub.Generate(pb.GenerateRequest(spec=served.spec()))
        events = await events_of(call)
        assert await call.code() == grpc.StatusCode.OK
        failed = events[-1].failed
        assert (failed.status, failed.error.code) == (pb.VIDEO_STATUS_FAILED, "generation_failed")
        assert failed.error.type == "server_error"
        assert failed.url == ""
        assert [event.segment.index for event in events if event.WhichOneof("event") == "segment"] == [0]

    run(scenario, Script(fail_at=1, failure=GenerationError("NaN in three attempts")))


async def _first(call: Any) -> str:
    """The id of the job of a call that has just begun."""
    event = await anext(aiter(call))
    return str(event.accepted.video.id)


async def _has_left(served: Served, video_id: str) -> bool:
    """Whether the job was cancelled, once its caller is gone."""
    async with asyncio.timeout(5):
        while ("left", video_id) not in served.service.log:
            await asyncio.sleep(0.01)
    return ("cancel", video_id) in served.service.log


@pytest.mark.parametrize("how", ["cancel", "deadline", "lost"])
@pytest.mark.parametrize("detach", [False, True])
def test_a_caller_that_leaves_cancels_its_job(how: str, detach: bool) -> None:
    async def scenario(served: Served) -> None:
        request = pb.GenerateRequest(spec=served.spec(), detach=detach)
        timeout_s = 0.5 if how == "deadline" else None
        if how == "lost":
            async with (
                wire_to(served.port) as wire,
                grpc.aio.insecure_channel(f"127.0.0.1:{wire.port}", NO_PROXY) as channel,
            ):
                call = type(served.stub)(channel).Generate(request)
                video_id = await _first(call)
                wire.cut()
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await events_of(call)
                assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        else:
            call = served.stub.Generate(request, timeout=timeout_s)
            video_id = await _first(call)
            if how == "cancel":
                call.cancel()
            else:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await events_of(call)
                assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert await _has_left(served, video_id) != detach
        await asyncio.sleep(0.05)
        assert served.counted("Generate", "DEADLINE_EXCEEDED" if how == "deadline" else "CANCELLED") == 1

    run(scenario, Script(chunk_s=5))


def test_a_caller_that_leaves_while_its_job_is_made_leaves_none() -> None:
    async def scenario(served: Served) -> None:
        served.service.create_s = 0.3
        call = served.stub.Generate(pb.GenerateRequest(spec=served.spec()), timeout=0.1)
        with pytest.raises(grpc.aio.AioRpcError):
            await events_of(call)
        await asyncio.sleep(0.5)
        (video_id,) = served.service.jobs
        assert ("cancel", video_id) in served.service.log

    run(scenario, Script(chunk_s=0.1))


def test_a_caller_that_stops_reading_is_noticed_when_it_leaves() -> None:
    """The server waits for room to write when the cancellation comes."""

    async def scenario(served: Served) -> None:
        call = served.stub.Generate(pb.GenerateRequest(spec=served.spec(num_frames=330)))
        video_id = await _first(call)
        job = await served.service.ended(video_id)
        assert len(job.segments) == 10
        await asyncio.sleep(0.2)
        assert ("left", video_id) not in served.service.log
        call.cancel()
        assert not await _has_left(served, video_id)

    run(scenario, Script(padding_bytes=3_000_000))


def test_whoever_joins_a_job_does_not_own_it() -> None:
    async def scenario(served: Served) -> None:
        metadata = (("idempotency-key", "k1"),)
        created = await served.stub.CreateVideo(pb.CreateVideoRequest(spec=served.spec()), metadata=metadata)
        call = served.stub.Generate(pb.GenerateRequest(spec=served.spec()), metadata=metadata)
        assert await _first(call) == created.video.id
        call.cancel()
        assert not await _has_left(served, created.video.id)

    run(scenario, Script(chunk_s=5))


def test_watchers_see_the_same_bytes_and_cancel_nothing() -> None:
    async def scenario(served: Served) -> None:
        created = (await served.stub.CreateVideo(pb.CreateVideoRequest(spec=served.spec()))).video
        leaving = served.stub.WatchVideo(pb.WatchVideoRequest(id=created.id))
        assert await _first(leaving) == created.id
        leaving.cancel()
        live = await events_of(served.stub.WatchVideo(pb.WatchVideoRequest(id=created.id)))
        late = await events_of(served.stub.WatchVideo(pb.WatchVideoRequest(id=created.id, from_segment=1)))
        assert not served.service.log
        assert kinds_of(live)[-1] == kinds_of(late)[-1] == "completed"
        assert num_frames(video_of(live)) == FRAMES

        accepted = [event.accepted for event in late if event.WhichOneof("event") == "accepted"]
        assert [bool(each.init_segment) for each in accepted] == [True]
        assert accepted[0].mime_type == live[-1].completed.mime_type
        segments = [event.segment for event in late if event.WhichOneof("event") == "segment"]
        assert [each.index for each in segments] == [1, 2]
        data = [event.segment.data for event in live if event.WhichOneof("event") == "segment"]
        assert [each.data for each in segments] == data[1:]

        behind = await events_of(served.stub.WatchVideo(pb.WatchVideoRequest(id=created.id, from_segment=3)))
        assert kinds_of(behind) == ["accepted", "completed"]
        for bad in (-1, 4):
            refusal = await refused(served.stub.WatchVideo(pb.WatchVideoRequest(id=created.id, from_segment=bad)))
            assert refusal.fields == ["from_segment"]
        unknown = await refused(served.stub.WatchVideo(pb.WatchVideoRequest(id="video_x")))
        assert unknown.code == grpc.StatusCode.NOT_FOUND

    run(scenario)


class GoneContext:
    """A call whose client is gone before the server has heard of it."""

    def __init__(self) -> None:
        self.aborted: list[grpc.StatusCode] = []

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def cancelled(self) -> bool:
        return False

    def time_remaining(self) -> None:
        return None

    async def send_initial_metadata(self, _: object) -> None:
        return None

    async def write(self, _: object) -> None:
        raise grpc.aio.InternalError("the batch failed")

    async def abort(self, code: grpc.StatusCode, *_: object) -> None:
        self.aborted.append(code)


def test_a_client_that_is_gone_is_no_defect(caplog: pytest.LogCaptureFixture) -> None:
    async def answer(_: object, call: Call) -> AsyncGenerator[Message, None]:
        yield pb.WatchVideoResponse()

    async def one(raw: bytes) -> AsyncGenerator[bytes, None]:
        yield raw

    async def main() -> None:
        metrics, context = Metrics("helios-distilled"), GoneContext()
        boundary = Boundary(GrpcAccess(Authenticator([]), Limiter()), metrics)
        method: Any = boundary._method(SERVICE.methods_by_name["WatchVideo"], StreamMethod(scope="read", answer=answer))
        with pytest.raises(asyncio.CancelledError):
            await method.stream_stream(one(b""), context)
        assert not context.aborted

    with caplog.at_level("INFO"):
        asyncio.run(main())
    assert "the client was gone" in caplog.text
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_stream_that_the_server_ends_can_be_taken_up_again() -> None:
    async def scenario(served: Served) -> None:
        draining = CapacityError("the server is shutting down", code="draining", retry_after_s=1.0)
        served.service.script.events_error = draining
        created = (await served.stub.CreateVideo(pb.CreateVideoRequest(spec=served.spec()))).video
        refusal = await refused(served.stub.WatchVideo(pb.WatchVideoRequest(id=created.id)))
        assert (refusal.code, refusal.reason, refusal.retry_s) == (grpc.StatusCode.UNAVAILABLE, "draining", 1.0)

    run(scenario)
