"""`Session` over a real channel: receipts, credit, control, refusals while it goes on, and every end."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
import pytest

import helios_serve.api.grpc_server as grpc_server
from helios_serve.api.grpc_session import GrpcSessions
from helios_serve.api.limits import TooManySessionsError
from helios_serve.api.proto.helios.video.v1 import video_generation_pb2 as pb
from helios_serve.errors import CapacityError, GenerationError
from tests.api.grpc_fakes import Served, run
from tests.api.grpc_viewer import OPEN, Viewer, eventually, started
from tests.api.session_fakes import FakeSession, Script


def test_a_session_with_credit_from_start_to_end() -> None:
    async def scenario(served: Served) -> None:
        spec = pb.VideoSpec(prompt="a lake", width=64, height=64, num_frames=100)
        async with started(served, spec=spec) as viewer:
            while len(viewer.segments) < 4:
                segment = await viewer.until("segment")
                await viewer.send(ack=pb.Ack(segment=segment.index, buffered_seconds=1.5))
            ended = await viewer.until("ended")
            assert await viewer.to_end() == grpc.StatusCode.OK
            assert (ended.status, ended.num_chunks, ended.num_frames) == (pb.VIDEO_STATUS_COMPLETED, 4, 100)
            assert [each.index for each in viewer.segments] == [0, 1, 2, 3]
            assert viewer.kinds.count("started") == 2
            assert viewer.kinds[viewer.kinds.index("segment") - 1] == "started"
            assert "rejected" not in viewer.kinds
            assert viewer.session.has_left
            job = served.service.jobs[viewer.id]
            assert (job.max_ahead, job.parsed.request.service_class) == (2, "realtime")

    run(scenario)


@pytest.mark.parametrize("container", [pb.CONTAINER_FMP4, pb.CONTAINER_RAW_YUV420P])
def test_a_session_in_sub_chunks(container: pb.Container) -> None:
    """Credit counts whole segments."""

    async def scenario(served: Served) -> None:
        spec = pb.VideoSpec(prompt="a lake", width=64, height=64, num_frames=66)
        spec.output.MergeFrom(pb.OutputOptions(sub_chunks=True, container=container))
        async with started(served, spec=spec, max_ahead_segments=1) as viewer:
            while len(viewer.segments) < 9:
                await viewer.until("segment")
            await viewer.send(ack=pb.Ack(segment=0))
            while len(viewer.segments) < 18:
                await viewer.until("segment")
            await viewer.send(ack=pb.Ack(segment=1))
            assert await viewer.to_end() == grpc.StatusCode.OK
        assert [segment.num_frames for segment in viewer.segments] == 2 * [1, *[4] * 8]
        sizes = {len(segment.data) == 64 * 96 * segment.num_frames for segment in viewer.segments}
        assert sizes == {container == pb.CONTAINER_RAW_YUV420P}

    run(scenario)


def test_an_open_ended_session_has_no_length_before_its_end() -> None:
    async def scenario(served: Served) -> None:
        viewer = Viewer(served, served.stub.Session())
        await viewer.send(start=pb.SessionStart(spec=OPEN))
        video = (await viewer.until("started")).video
        assert (video.num_chunks, video.num_frames, video.seconds) == (0, 0, 0)
        assert (await viewer.until("progress")).num_chunks == 0
        await viewer.until("segment")
        await viewer.send(control=pb.Control(action=pb.ACTION_STOP))
        ended = await viewer.until("ended")
        assert ended.num_chunks == ended.chunks_done > 0
        assert ended.num_frames == 33 * ended.num_chunks
        assert await viewer.to_end() == grpc.StatusCode.OK

    run(scenario)


@pytest.mark.parametrize("max_ahead", [1, 3])
def test_a_slow_reader_is_never_more_than_its_credit_behind(max_ahead: int) -> None:
    async def scenario(served: Served) -> None:
        async with started(served, max_ahead_segments=max_ahead) as viewer:
            job = served.service.jobs[viewer.id]
            for acked in range(3):
                allowed = max_ahead + acked
                await eventually(lambda: len(job.segments) == allowed)  # noqa: B023
                await asyncio.sleep(0.2)
                assert len(job.segments) == allowed
                while len(viewer.segments) <= acked:
                    await viewer.until("segment")
                await viewer.send(ack=pb.Ack(segment=acked))
            waiting = await viewer.until("state_changed")
            assert (waiting.state, waiting.event_id) == (pb.STATE_WAITING_FOR_CREDIT, "")

    run(scenario)


def test_a_prompt_is_queued_then_applied_before_its_segment() -> None:
    async def scenario(served: Served) -> None:
        async with started(served, max_ahead_segments=8) as viewer:
            prompt = pb.PromptUpdate(prompt="a storm", transition_chunks=3)
            await viewer.send("e1", prompt=prompt)
            queued = await viewer.until("prompt_queued")
            assert queued.event_id == "e1"
            await viewer.send("e1", prompt=prompt)
            assert await viewer.until("prompt_queued") == queued
            applied = await viewer.until("prompt_applied")
            assert (applied.event_id, applied.chunk) == ("e1", queued.earliest_chunk)
            assert applied.completed_chunk == applied.chunk + 2
            assert max((each.index for each in viewer.segments), default=-1) == applied.chunk - 1
            segment = await viewer.until("segment")
            assert (segment.index, segment.prompt) == (applied.chunk, "a storm")
            assert segment.prompt_weight == pytest.approx(1 / 3)

            await viewer.send(prompt=pb.PromptUpdate(prompt="the sun"))
            assert (await viewer.until("prompt_queued")).event_id.startswith("event_")
            assert viewer.session.calls[-1] == ("change_prompt", "the sun", None, None)

    run(scenario, Script(chunk_s=0.1))


def test_a_receipt_comes_before_what_it_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Although the chunk begins while the service still confirms the change."""
    change = FakeSession.change_prompt

    async def slow(self: FakeSession, prompt: str, transition_chunks: int | None, event_id: str | None) -> Any:
        queued = await change(self, prompt, transition_chunks, event_id)
        await asyncio.sleep(0.3)
        return queued

    monkeypatch.setattr(FakeSession, "change_prompt", slow)

    async def scenario(served: Served) -> None:
        async with started(served, max_ahead_segments=8) as viewer:
            await viewer.send("e1", prompt=pb.PromptUpdate(prompt="a storm"))
            await viewer.until("prompt_applied")
            assert "prompt_queued" in viewer.kinds

    run(scenario, Script(chunk_s=0.05))


def test_pause_and_resume_are_told_with_the_event_that_asked() -> None:
    async def scenario(served: Served) -> None:
        async with started(served, max_ahead_segments=8) as viewer:
            for event_id, action, state in (
                ("p", pb.ACTION_PAUSE, pb.STATE_PAUSED),
                ("r", pb.ACTION_RESUME, pb.STATE_RUNNING),
            ):
                await viewer.send(event_id, control=pb.Control(action=action))
                changed = await viewer.until("state_changed")
                assert (changed.event_id, changed.state) == (event_id, state)
            await viewer.send(control=pb.Control(action=pb.ACTION_RESET, seed=5))
            await viewer.until("segment")
            assert ("control", "reset", None, 5) in viewer.session.calls

    run(scenario, Script(chunk_s=0.1))


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "another content": ({"prompt": pb.PromptUpdate(prompt="other")}, "event_id_conflict", ""),
    "no action": ({"control": pb.Control()}, "invalid_value", "control.action"),
    "unknown action": ({"control": pb.Control(action=17)}, "invalid_value", "control.action"),
    "ahead of us": ({"ack": pb.Ack(segment=77)}, "invalid_value", "ack.segment"),
    "before us": ({"ack": pb.Ack(segment=-1)}, "invalid_value", "ack.segment"),
    "a second start": ({"start": pb.SessionStart(spec=OPEN)}, "invalid_value", "start"),
    "nothing": ({}, "missing_required_parameter", "event"),
}


def test_a_refused_message_does_not_end_the_session() -> None:
    async def scenario(served: Served) -> None:
        async with started(served, max_ahead_segments=8) as viewer:
            await viewer.send("e1", prompt=pb.PromptUpdate(prompt="a storm"))
            await viewer.until("prompt_queued")
            for event, code, param in REFUSED.values():
                await viewer.send("e1", **event)
                rejected = await viewer.until("rejected")
                assert (rejected.event_id, rejected.error.code, rejected.error.param) == ("e1", code, param)
            await viewer.send("e" * 300, ack=pb.Ack(segment=0))
            rejected = await viewer.until("rejected")
            assert (rejected.event_id, rejected.error.param) == ("e" * 256, "event_id")
            await viewer.until("segment")
            await viewer.send("s", control=pb.Control(action=pb.ACTION_STOP))
            assert (await viewer.until("ended")).status == pb.VIDEO_STATUS_COMPLETED

    run(scenario, Script(chunk_s=0.1))


FIRST: dict[str, tuple[pb.SessionRequest, str]] = {
    "an ack": (pb.SessionRequest(ack=pb.Ack()), "start"),
    "nothing": (pb.SessionRequest(), "start"),
    "a bad spec": (pb.SessionRequest(start=pb.SessionStart(spec=pb.VideoSpec(prompt="x", width=650, height=64))),
                   "start.spec.width"),
    "no prompt": (pb.SessionRequest(start=pb.SessionStart()), "start.spec.prompt"),
    "too far ahead": (pb.SessionRequest(start=pb.SessionStart(spec=OPEN, max_ahead_segments=9)),
                      "start.max_ahead_segments"),
    "no credit": (pb.SessionRequest(start=pb.SessionStart(spec=OPEN, max_ahead_segments=0)),
                  "start.max_ahead_segments"),
    "both": (pb.SessionRequest(start=pb.SessionStart(spec=OPEN, resume=pb.SessionResume(id="video_x"))), "start.spec"),
}  # fmt: skip


@pytest.mark.parametrize("name", FIRST)
def test_what_does_not_start_a_session(name: str) -> None:
    async def scenario(served: Served) -> None:
        request, path = FIRST[name]
        viewer = Viewer(served, served.stub.Session())
        await viewer.call.write(request)
        refusal = await viewer.refusal()
        assert (refusal.code, refusal.fields) == (grpc.StatusCode.INVALID_ARGUMENT, [path])
        assert not served.service.sessions

    run(scenario)


def test_a_session_has_to_be_started_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_server, "GrpcSessions", lambda desk: GrpcSessions(desk, start_s=0.1))

    async def scenario(served: Served) -> None:
        refusal = await Viewer(served, served.stub.Session()).refusal()
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "session_idle")
        silent = Viewer(served, served.stub.Session())
        await silent.call.done_writing()
        assert (await silent.refusal()).fields == ["start"]

    run(scenario)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CapacityError("full", code="capacity_exceeded"), "UNAVAILABLE"),
        (TooManySessionsError("1 session is open", retry_after_s=30.0), "RESOURCE_EXHAUSTED"),
    ],
)
def test_a_session_that_cannot_be_had(error: Any, code: str) -> None:
    async def scenario(served: Served) -> None:
        viewer = Viewer(served, served.stub.Session())
        await viewer.send(start=pb.SessionStart(spec=OPEN))
        refusal = await viewer.refusal()
        assert (refusal.code.name, refusal.reason) == (code, error.code)
        assert refusal.retry_s is not None

    run(scenario, Script(open_error=error))


def test_an_acknowledgement_that_crosses_the_end_does_no_harm() -> None:
    async def scenario(served: Served) -> None:
        async def whole() -> list[str]:
            spec = served.spec(num_frames=66)
            async with started(served, spec=spec) as viewer:
                while (message := await viewer.next()) is not None:
                    if message.HasField("segment"):
                        await asyncio.sleep(0.05 * message.segment.index)
                        await viewer.send(ack=pb.Ack(segment=message.segment.index))
                return viewer.kinds

        for kinds in await asyncio.gather(*(whole() for _ in range(20))):
            assert kinds[-1] == "ended"

    run(scenario, Script(chunk_s=0.0))


def test_a_failed_session_ends_with_its_video() -> None:
    async def scenario(served: Served) -> None:
        async with started(served, max_ahead_segments=8) as viewer:
            ended = await viewer.until("ended")
            assert (ended.status, ended.error.code) == (pb.VIDEO_STATUS_FAILED, "generation_failed")
            assert await viewer.to_end() == grpc.StatusCode.OK

    run(scenario, Script(fail_at=2, failure=GenerationError("NaN in three attempts")))


@pytest.mark.parametrize("error", [CapacityError("shutting down", code="draining"), RuntimeError("secret")])
def test_a_session_whose_events_fail(error: Exception) -> None:
    async def scenario(served: Served) -> None:
        async with started(served) as viewer:
            refusal = await viewer.refusal()
            if isinstance(error, CapacityError):
                assert (refusal.code, refusal.reason, refusal.retry_s) == (grpc.StatusCode.UNAVAILABLE, "draining", 1.0)
            else:
                assert (refusal.code, refusal.reason) == (grpc.StatusCode.INTERNAL, "internal_error")
                assert "secret" not in refusal.message
            assert viewer.session.has_left

    run(scenario, Script(events_error=error))
