"""Sessions whose connection was lost: who may go on with them, from where, and what becomes of the old call."""

from __future__ import annotations

from dataclasses import replace

import grpc
import grpc.aio

from helios_serve.api.auth import ANONYMOUS
from helios_serve.api.proto.helios.video.v1 import video_generation_pb2 as pb
from tests.api.grpc_fakes import NO_PROXY, Served, run, wire_to
from tests.api.grpc_viewer import OPEN, Viewer, eventually, started
from tests.api.session_fakes import Script, parsed_of


def test_a_lost_session_is_left_and_resumed_without_gap() -> None:
    async def scenario(served: Served) -> None:
        async with (
            wire_to(served.port) as wire,
            grpc.aio.insecure_channel(f"127.0.0.1:{wire.port}", NO_PROXY) as channel,
        ):
            first = Viewer(served, type(served.stub)(channel).Session())
            await first.send(start=pb.SessionStart(spec=OPEN))
            await first.until("segment")
            await first.send(ack=pb.Ack(segment=0))
            await first.until("segment")
            session = first.session
            wire.cut()
            await eventually(lambda: session.has_left)
        again = Viewer(served, served.stub.Session())
        await again.send(start=pb.SessionStart(resume=pb.SessionResume(id=first.id, from_segment=2)))
        opening = await again.until("started")
        while len(again.segments) < 2:
            segment = await again.until("segment")
            await again.send(ack=pb.Ack(segment=segment.index))
        assert [each.index for each in again.segments] == [2, 3]
        assert opening.video.id == first.id
        assert served.service.sessions[-1].first_segment == 2

    run(scenario)


def test_a_resumed_session_opens_with_the_init_segment() -> None:
    async def scenario(served: Served) -> None:
        async with started(served, max_ahead_segments=2) as viewer:
            while len(viewer.segments) < 2:
                await viewer.until("segment")
        again = Viewer(served, served.stub.Session())
        await again.send(start=pb.SessionStart(resume=pb.SessionResume(id=viewer.id, from_segment=1)))
        assert (await again.until("started")).init_segment[4:8] == b"ftyp"
        assert (await again.until("segment")).index == 1
        again.call.cancel()

        for video_id, from_segment, code in (("video_x", 0, "NOT_FOUND"), (viewer.id, 90, "INVALID_ARGUMENT")):
            other = Viewer(served, served.stub.Session())
            await other.send(start=pb.SessionStart(resume=pb.SessionResume(id=video_id, from_segment=from_segment)))
            refusal = await other.refusal()
            assert refusal.code.name == code
            if code == "INVALID_ARGUMENT":
                assert refusal.fields == ["start.resume.from_segment"]
                assert refusal.message.startswith("from_segment 90: ")

    run(scenario)


def test_whoever_resumes_ends_the_connection_that_hangs() -> None:
    """The first client neither reads nor leaves; its call is full when it is replaced."""

    async def scenario(served: Served) -> None:
        hanging = Viewer(served, served.stub.Session())
        await hanging.send(start=pb.SessionStart(spec=OPEN, max_ahead_segments=8))
        await hanging.until("started")
        job = served.service.jobs[hanging.id]
        await eventually(lambda: len(job.segments) == 8)
        session = hanging.session
        again = Viewer(served, served.stub.Session())
        await again.send(start=pb.SessionStart(resume=pb.SessionResume(id=hanging.id)))
        assert (await again.until("segment")).index == 0
        assert session.has_left
        refusal = await hanging.refusal()
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "protocol_error")

    run(scenario, Script(padding_bytes=3_000_000))


def test_another_tenant_cannot_resume() -> None:
    async def scenario(served: Served) -> None:
        stranger = replace(ANONYMOUS, tenant="acme")
        job = served.service.begin(parsed_of({"prompt": "a lake", "size": "64x64"}), stranger)
        viewer = Viewer(served, served.stub.Session())
        await viewer.send(start=pb.SessionStart(resume=pb.SessionResume(id=job.id)))
        assert (await viewer.refusal()).code == grpc.StatusCode.NOT_FOUND

    run(scenario)
