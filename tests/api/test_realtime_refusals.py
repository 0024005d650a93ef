"""What a session's WebSocket does with clients that err, leave or do not read, and how each end is told."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from websockets.asyncio.client import connect

from helios_serve.api.auth import ANONYMOUS, ScopeError
from helios_serve.api.limits import TooManySessionsError
from helios_serve.api.realtime_connection import RealtimeSettings
from helios_serve.errors import CapacityError, ConflictError, GenerationError, HeliosError
from tests.api.session_fakes import PATH, Client, FakeSession, Script, Server, run

OURS: dict[str, Any] = {"protocol": "helios.v1"}


async def refused_start(server: Server, text: str | bytes) -> tuple[dict[str, Any], int, str]:
    """The error that answers a first message, and how the connection then ends."""
    async with server.client() as client:
        await client.socket.send(text)
        code, reason = await client.closed()
    (error,) = client.messages
    assert error["type"] == "error"
    return error, code, reason


@pytest.mark.parametrize(
    ("message", "code", "param"),
    [
        ({"prompt": "a", "num_frames": 0}, "invalid_value", "num_frames"),
        ({"prompt": "a", "helios": {"steps": [1]}}, "invalid_value", "helios.steps"),
        ({"prompt": "a", "guidence_scale": 2}, "unknown_parameter", "guidence_scale"),
        ({"prompt": "a", "format": "webm"}, "invalid_value", "format"),
        ({"prompt": "a", "protocol": "helios.v9"}, "invalid_value", "protocol"),
        ({"prompt": "a", "max_ahead_segments": 9}, "invalid_value", "max_ahead_segments"),
        ({"prompt": "a", "max_ahead_segments": "2"}, "invalid_value", "max_ahead_segments"),
        ({"prompt": "a", "model": "other"}, "model_not_found", "model"),
        ({}, "missing_required_parameter", "prompt"),
        ({"resume": {"id": "video_none", "after_segment": -1}}, "video_not_found", "id"),
        ({"resume": {"id": "video_none"}}, "missing_required_parameter", "resume.after_segment"),
        ({"resume": {"id": "video_none", "after_segment": -2}}, "invalid_value", "resume.after_segment"),
        ({"resume": {"id": "video_none", "after_segment": 0}, "seed": 1}, "conflicting_parameters", "seed"),
        ({"type": "session.ping"}, "invalid_value", "type"),
    ],
)
def test_a_bad_start_is_told_with_its_field(message: dict[str, Any], code: str, param: str) -> None:
    async def scenario(server: Server) -> None:
        error, closing, reason = await refused_start(server, json.dumps({"type": "session.start", **message}))
        assert (error["code"], error["param"], closing) == (code, param, 4400)
        assert reason == error["message"][:123]
        assert not server.service.jobs

    run(scenario)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("{", "malformed_body"),
        ("[]", "malformed_body"),
        ('{"type": "session.start", "prompt": "a", "seed": NaN}', "malformed_body"),
        ('{"type": "session.start", "prompt": "a", "prompt": "b"}', "malformed_body"),
        ("[" * 100_000, "malformed_body"),
        (b"\x00", "protocol_error"),
        (json.dumps({"type": "session.start", "prompt": "a" * 200_000}), "body_too_large"),
    ],
)
def test_a_start_that_is_no_message(text: str | bytes, code: str) -> None:
    async def scenario(server: Server) -> None:
        error, closing, _ = await refused_start(server, text)
        assert (error["code"], closing) == (code, 4400)

    run(scenario, settings=RealtimeSettings(max_start_chars=150_000))


def test_a_client_that_does_not_start() -> None:
    async def scenario(server: Server) -> None:
        async with server.client() as client:
            assert await client.closed() == (4408, "no session.start within 0.1 seconds")
        assert client.messages == []

    run(scenario, settings=RealtimeSettings(start_timeout_s=0.1))


def test_a_foreign_page_is_refused_before_it_says_anything() -> None:
    async def scenario(server: Server) -> None:
        async with server.client(origin="https://evil.example") as client:
            code, reason = await client.closed()
            assert code == 1008
            assert reason.startswith("origin https://evil.example")
        assert client.messages == []
        async with server.client(origin=f"http://{server.url}") as client:
            await client.send("session.start", prompt="a lake")
            await client.message("video.start")

    run(scenario)


@pytest.mark.parametrize(
    ("failure", "told", "closing"),
    [
        (CapacityError("the queue is full"), "capacity_exceeded", 1013),
        (TooManySessionsError("1 session is open", retry_after_s=5), "too_many_sessions", 1013),
        (CapacityError("shutting down", code="draining"), "draining", 1012),
        (ScopeError("scope realtime is needed"), "insufficient_scope", 1008),
        (HeliosError("we failed"), "internal_error", 1011),
        (RuntimeError("secret detail"), None, 1011),
    ],
)
def test_a_session_that_cannot_be_opened(
    failure: Exception, told: str | None, closing: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(server: Server) -> None:
        async with server.client() as client:
            await client.send("session.start", prompt="a lake")
            code, reason = await client.closed()
        assert code == closing
        assert [message["code"] for message in client.messages] == ([] if told in (None, "draining") else [told])
        assert "secret" not in reason

    with caplog.at_level(logging.ERROR, logger="helios_serve"):
        run(scenario, Script(open_error=failure))
    assert ("secret detail" in caplog.text) == (told is None)


def _interaction(**fields: object) -> dict[str, Any]:
    interaction = {"event_id": "e", "event": {"prompt": "a"}, **fields}
    return {"type": "session.interaction", "interaction": interaction}


BAD_MESSAGES: list[tuple[dict[str, Any], str, str]] = [
    ({"type": "session.dance", "event_id": "e"}, "invalid_value", "type"),
    ({"type": 7, "event_id": "e"}, "invalid_value", "type"),
    ({"type": "session.start", "prompt": "b", "event_id": "e"}, "invalid_value", "type"),
    ({"type": "session.control", "action": "jump", "event_id": "e"}, "invalid_value", "action"),
    ({"type": "session.control", "event_id": "e"}, "missing_required_parameter", "action"),
    ({"type": "session.control", "action": "pause", "seed": 1, "event_id": "e"}, "invalid_value", "seed"),
    ({"type": "session.control", "action": "stop", "speed": 1, "event_id": "e"}, "unknown_parameter", "speed"),
    ({"type": "session.interaction"}, "missing_required_parameter", "interaction"),
    ({"type": "session.interaction", "prompt": "a"}, "unknown_parameter", "prompt"),
    (_interaction(event={}), "missing_required_parameter", "interaction.event.prompt"),
    (_interaction(event={"prompt": ""}), "invalid_value", "interaction.event.prompt"),
    (_interaction(event={"prompt": "a", "camera": 1}), "unknown_parameter", "interaction.event.camera"),
    (_interaction(event={"prompt": "a", "negative_prompt": "b"}), "invalid_value", "interaction.event.negative_prompt"),
    (_interaction(transition_chunks=-1), "invalid_value", "interaction.transition_chunks"),
    (_interaction(transition_chunks=True), "invalid_value", "interaction.transition_chunks"),
    (_interaction(transition_chunks=0.5), "invalid_value", "interaction.transition_chunks"),
    ({"type": "session.ack", "segment": -1, "event_id": "e"}, "unknown_parameter", "event_id"),
    ({"type": "session.ack", "segment": 1.5}, "invalid_value", "segment"),
    ({"type": "session.playback", "position_seconds": -1}, "invalid_value", "position_seconds"),
]


def test_a_refused_message_has_an_error_with_its_id_and_the_session_goes_on() -> None:
    async def scenario(server: Server) -> None:
        async with server.session(**OURS, num_frames=33) as client:
            for message, code, param in BAD_MESSAGES:
                await client.socket.send(json.dumps(message))
                error = await client.message("error")
                assert (error["code"], error["param"]) == (code, param), message
                inner = message.get("interaction", message)
                assert error.get("event_id") == inner.get("event_id")
            for text in ("{", "null", '"x"', '{"type":"session.ping","type":"session.ping"}', "x" * 600_000):
                await client.socket.send(text)
                error = await client.message("error")
                assert error["code"] == ("body_too_large" if len(text) > 500_000 else "malformed_body")
                assert "event_id" not in error
            await client.send("session.ping")
            await client.message("session.pong")
            assert await client.closed() == (1000, "")
        assert not [call for call in server.of(client).calls if call[0] == "change_prompt"]

    run(scenario, Script(chunk_s=1.0))


def test_a_binary_message_ends_the_connection() -> None:
    async def scenario(server: Server) -> None:
        async with server.session() as client:
            await client.socket.send(b"\x00\x01")
            assert (await client.closed())[0] == 4400
        assert client.messages[-1]["code"] == "protocol_error"
        assert server.of(client).has_left

    run(scenario)


def test_the_65th_pending_message_is_refused() -> None:
    async def scenario(server: Server) -> None:
        async with server.session(**OURS, max_ahead_segments=1) as client:
            await client.segment()
            for number in range(65):
                change = {"event_id": f"e{number}", "event": {"prompt": f"prompt {number}"}}
                await client.send("session.interaction", interaction=change)
            for number in range(64):
                assert (await client.message("session.interaction.queued"))["event_id"] == f"e{number}"
            error = await client.message("error")
            assert (error["code"], error["event_id"]) == ("interaction_queue_full", "e64")
            await client.send("session.ack", segment=0)
            assert (await client.message("session.interaction.applied"))["event_id"] == "e63"
            await client.segment()

    run(scenario)


def test_a_client_that_does_not_read_is_closed_and_can_resume() -> None:
    async def scenario(server: Server) -> None:
        async with unread(server, num_frames=990) as session:
            job = server.service.jobs[session.job.id]
            await left(session)
            made = len(job.segments)
            assert made < 30, "generation went on without a reader"
            await asyncio.sleep(0.2)
            assert len(job.segments) == made
        async with server.client() as client:
            await client.send("session.start", resume={"id": job.id, "after_segment": -1})
            assert (await client.closed())[0] == 1000
        assert [metadata["transport_chunk_index"] for metadata, _ in client.segments] == [*range(30)]

    settings = RealtimeSettings(send_timeout_s=0.3, close_timeout_s=0.1, max_buffered_bytes=4 << 20)
    run(scenario, Script(padding_bytes=2 << 20), settings)


@asynccontextmanager
async def unread(server: Server, **fields: object) -> AsyncIterator[FakeSession]:
    """The session of a client that reads nothing behind `video.start`; cut in the end."""
    socket = await connect(f"ws://{server.url}{PATH}", max_size=None, max_queue=1, proxy=None)
    try:
        client = Client(socket)
        await client.send("session.start", prompt="a lake", **fields)
        await client.message("video.start")
        yield server.service.sessions[-1]
    finally:
        socket.transport.abort()


async def left(session: FakeSession) -> None:
    async with asyncio.timeout(10):
        while not session.has_left:
            await asyncio.sleep(0.01)


def test_a_resume_does_not_wait_for_the_lost_connection_to_be_noticed() -> None:
    async def scenario(server: Server) -> None:
        async with unread(server, num_frames=990) as lost:
            await asyncio.sleep(0.2)
            async with server.client() as client:
                await client.send("session.start", resume={"id": lost.job.id, "after_segment": -1})
                client.start = await client.message("video.start")
                assert lost.has_left
                await client.segment()

    run(scenario, Script(padding_bytes=2 << 20))


def test_only_its_owner_ends_a_connection_by_resuming() -> None:
    async def scenario(server: Server) -> None:
        async with server.session(**OURS, max_ahead_segments=1) as client:
            await client.segment()
            server.callers.append(replace(ANONYMOUS, tenant="stranger"))
            start = {"type": "session.start", "resume": {"id": client.start["request_id"], "after_segment": 0}}
            error, code, _ = await refused_start(server, json.dumps(start))
            assert (error["code"], code) == ("video_not_found", 4400)
            await client.send("session.ping")
            await client.message("session.pong")
            async with server.client() as second:
                await second.socket.send(json.dumps(start))
                await second.message("video.start")
                assert await client.closed() == (4400, "another connection goes on with this session")

    run(scenario)


def test_a_client_that_leaves_is_noticed_at_once_and_its_session_kept() -> None:
    async def scenario(server: Server) -> None:
        for cut in (False, True):
            async with server.session(**OURS) as client:
                session = server.of(client)
                if cut:
                    client.socket.transport.abort()
                else:
                    await client.socket.close()
                await left(session)
            assert ("control", "stop", None, None) not in session.calls

    run(scenario)


def test_a_restart_closes_sessions_with_1012_and_opens_no_others() -> None:
    async def scenario(server: Server) -> None:
        async with server.session(**OURS, max_ahead_segments=1) as client:
            await client.segment()
            await server.route.restart()
            assert await client.closed() == (1012, "the server restarts; resume the session")
        assert server.of(client).has_left
        async with server.client() as client:
            await client.send("session.start", prompt="a")
            assert (await client.closed())[0] == 1012
        assert client.messages == []

    run(scenario)


@pytest.mark.parametrize(
    ("failure", "closing"),
    [
        (GenerationError("not finite"), 1011),
        (ConflictError("video x: cancelled", code="cancelled"), 1000),
        (CapacityError("gone", code="worker_lost"), 1013),
    ],
)
def test_a_job_that_fails_ends_with_its_error(failure: HeliosError, closing: int) -> None:
    async def scenario(server: Server) -> None:
        async with server.session(**OURS) as client:
            code, reason = await client.closed()
        assert (code, reason) == (closing, failure.message)
        error = client.messages[-1]
        assert error == {"type": "error", "code": failure.code, "message": failure.message}
        assert len(client.segments) == 1

    run(scenario, Script(fail_at=1, failure=failure))


def test_events_that_break_off() -> None:
    async def scenario(server: Server) -> None:
        for failure, last, closing in (
            (RuntimeError("secret detail"), "error", 1011),
            (CapacityError("bye", code="draining"), "video.start", 1012),
        ):
            server.service.script.events_error = failure
            async with server.session() as client:
                code, reason = await client.closed()
            assert (client.messages[-1]["type"], code) == (last, closing)
            assert "secret" not in reason
            assert server.of(client).has_left

    run(scenario)


def test_an_idle_session_ends_with_what_it_has() -> None:
    async def scenario(server: Server) -> None:
        async with server.session(**OURS, max_ahead_segments=1) as client:
            code, _ = await client.closed()
        assert code == 4408
        done = client.messages[-1]
        assert (done["type"], done["chunks"], done["stopped"]) == ("session.done", 1, True)

    run(scenario, Script(idle_s=0.1))


def test_messages_behind_the_end_are_not_answered() -> None:
    async def scenario(server: Server) -> None:
        async with server.session(num_frames=33) as client:
            await client.message("session.done")
            await client.socket.send(b"\x00")
            assert await client.closed() == (1000, "")
        assert client.messages[-1]["type"] == "session.done"

    run(scenario)
