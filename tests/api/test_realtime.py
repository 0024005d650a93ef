"""Sessions over a real WebSocket: what each kind of client is told, and what it may ask for."""

from __future__ import annotations

import asyncio
import io
from typing import Any

import av

from helios_serve.errors import ConflictError
from tests.api.session_fakes import Script, Server, run

PLAIN = {"video.start", "video.chunk_metadata", "session.interaction.queued", "session.done", "session.pong", "error"}
"""What a client of vLLM-Omni's protocol knows."""

OURS: dict[str, Any] = {"protocol": "helios.v1"}


def num_frames(data: bytes) -> int:
    with av.open(io.BytesIO(data)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_a_client_without_protocol_gets_its_message_set_alone() -> None:
    async def scenario(server: Server) -> None:
        async with server.client() as client:
            await client.send(
                "session.start",
                model="BestWishYsh/Helios-Distilled",
                prompt="a lake",
                format="m4s",
                width=64,
                height=64,
                fps=16,
                num_frames=99,
                guidance_scale=1.0,
                seed=42,
                extra_params={
                    "is_enable_stage2": True,
                    "pyramid_num_stages": 3,
                    "pyramid_num_inference_steps_list": [1, 1, 1],
                    "is_amplify_first_chunk": True,
                },
            )
            start = await client.message("video.start")
            interaction = {"event_id": "a", "event": {"prompt": "a storm"}, "transition_chunks": 3}
            await client.send("session.interaction", interaction=interaction)
            await client.send("session.ping")
            assert await client.closed() == (1000, "")
        assert (start["format"], start["config"]["seed"], start["config"]["steps"]) == ("m4s", 42, [1, 1, 1])
        assert "format" not in start["config"]
        assert client.kinds() == PLAIN - {"error"}
        done = client.messages[-1]
        assert (done["request_id"], done["chunks"], done["stopped"]) == (start["request_id"], 3, False)
        assert done["video"]["status"] == "completed"
        assert done["video"]["helios"]["urls"]["content"].endswith(f"{done['video']['id']}/content")
        assert [metadata["transport_chunk_index"] for metadata, _ in client.segments] == [0, 1, 2]
        assert all(metadata["kind"] == "media" for metadata, _ in client.segments)
        assert num_frames(client.video) == 99

    run(scenario)


def test_receipts_and_event_ids_follow_a_change_through_its_transition() -> None:
    async def scenario(server: Server) -> None:
        async with server.session(**OURS, num_frames=231, max_ahead_segments=1) as client:
            await client.segment()
            change = {"event_id": "storm", "event": {"prompt": "a storm"}, "transition_chunks": 3}
            await client.send("session.interaction", interaction=change)
            queued = await client.message("session.interaction.queued")
            await client.send("session.ack", segment=0, buffered_seconds=0.4)
            applied = await client.message("session.interaction.applied")
            while len(client.segments) < 7:
                await client.segment()
                await client.send("session.ack", segment=len(client.segments) - 1)
            await client.closed()
        assert (queued["event_id"], queued["earliest_chunk"]) == ("storm", 1)
        assert (applied["event_id"], applied["chunk"], applied["start_frame"]) == ("storm", 1, 33)
        keys = ("started_event_ids", "active_event_ids", "completed_event_ids")
        seen = [[metadata[key] for key in keys] for metadata, _ in client.segments[:5]]
        storm = ["storm"]
        assert seen == [[[], [], []], [storm, storm, []], [[], storm, []], [[], storm, storm], [[], [], []]]
        weights = [round(metadata["prompt_weight"], 3) for metadata, _ in client.segments[:5]]
        assert weights == [1.0, 0.333, 0.667, 1.0, 1.0]

    run(scenario)


def test_segments_in_parts() -> None:
    """Of 1, 4, 4, ... frames; a change begins with the first part of its chunk, and is complete with the last one."""

    async def scenario(server: Server) -> None:
        async with server.session(**OURS, num_frames=72, max_ahead_segments=1, sub_chunks=True) as client:
            for _ in range(9):
                await client.segment()
            change = {"event_id": "storm", "event": {"prompt": "a storm"}, "transition_chunks": 1}
            await client.send("session.interaction", interaction=change)
            await client.message("session.interaction.queued")
            await client.send("session.ack", segment=0)
            for _ in range(9):
                await client.segment()
            await client.send("session.ack", segment=1)
            await client.closed()
        metadata = [told for told, _ in client.segments]
        assert [told["num_frames"] for told in metadata] == [*(2 * [1, *[4] * 8]), 1, 4, 1]
        assert [told["transport_chunk_index"] for told in metadata] == list(range(21))
        assert [told["generation_chunk_index"] for told in metadata] == [0] * 9 + [1] * 9 + [2] * 3
        assert [told["start_frame"] for told in metadata[:3] + metadata[9:11]] == [0, 1, 5, 33, 34]
        assert [told["byte_length"] for told in metadata] == [len(data) for _, data in client.segments]
        assert [index for index, told in enumerate(metadata) if told["started_event_ids"]] == [9]
        assert [index for index, told in enumerate(metadata) if told["active_event_ids"]] == list(range(9, 18))
        assert [index for index, told in enumerate(metadata) if told["completed_event_ids"]] == [17]
        assert num_frames(client.video) == 72

    run(scenario)


def test_a_newer_change_ends_the_transition_of_the_older_one() -> None:
    async def scenario(server: Server) -> None:
        async with server.session(**OURS, num_frames=165, max_ahead_segments=1) as client:
            for segment, name in ((0, "first"), (1, "second")):
                await client.segment()
                change = {"event_id": name, "event": {"prompt": name}, "transition_chunks": 3 if segment == 0 else 1}
                await client.send("session.interaction", interaction=change)
                await client.message("session.interaction.queued")
                await client.send("session.ack", segment=segment)
            await client.segment()
        metadata = client.segments[2][0]
        assert metadata["started_event_ids"] == metadata["active_event_ids"] == ["second"]
        assert metadata["completed_event_ids"] == ["second"]

    run(scenario)


def test_an_event_id_is_made_for_a_client_that_sends_none_and_a_retry_is_the_same_message() -> None:
    async def scenario(server: Server) -> None:
        async with server.session(**OURS) as client:
            await client.send("session.interaction", interaction={"event": {"prompt": "fog"}})
            assert (await client.message("session.interaction.queued"))["event_id"] != ""
            change = {"event_id": "a", "event": {"prompt": "rain"}, "transition_chunks": 3.0}
            for _ in range(2):
                await client.send("session.interaction", interaction=change)
                assert (await client.message("session.interaction.queued"))["event_id"] == "a"
            await client.send("session.interaction", interaction={**change, "event": {"prompt": "snow"}})
            error = await client.message("error")
            assert (error["code"], error["event_id"]) == ("event_id_conflict", "a")
            await client.segment()
        assert server.of(client).calls[1] == ("change_prompt", "rain", 3, "a")

    run(scenario)


def test_without_credit_nothing_more_is_made_and_either_message_gives_it() -> None:
    async def scenario(server: Server) -> None:
        async with server.session(**OURS, num_frames=330) as client:
            await client.segment()
            await client.segment()
            assert await client.is_silent()
            await client.send("session.ack", segment=0)
            await client.segment()
            assert await client.is_silent()
            await client.send("session.playback", position_seconds=2.75)
            await client.segment()
            assert await client.is_silent()
            assert [call for call in server.of(client).calls if call[0] == "ack"] == [("ack", 0), ("ack", 1)]
            states = [message["state"] for message in client.messages if message["type"] == "session.state"]
            assert "waiting_for_credit" in states
            assert states[-2:] == ["generating", "waiting_for_credit"]

    run(scenario)


def test_credit_for_a_segment_that_was_not_sent_is_refused() -> None:
    async def scenario(server: Server) -> None:
        async with server.session(**OURS, max_ahead_segments=1) as client:
            await client.segment()
            await client.send("session.ack", segment=5)
            error = await client.message("error")
            assert (error["param"], error["message"]) == ("segment", "segment 5: the last one that was sent is 0")
            await client.send("session.playback", position_seconds=1e30)
            await client.segment()
        assert [call for call in server.of(client).calls if call[0] == "ack"] == [("ack", 0)]

    run(scenario)


def test_how_far_a_session_runs_ahead() -> None:
    async def scenario(server: Server) -> None:
        for fields, max_ahead in (
            ({}, None),
            ({"max_ahead_segments": 3}, 3),
            (OURS, 2),
            ({**OURS, "streaming_buffer_seconds": 4.2, "fps": 24}, 3),
            ({**OURS, "streaming_buffer_seconds": 0}, 1),
            ({**OURS, "streaming_buffer_seconds": 600}, 8),
        ):
            async with server.session(**fields) as client:
                assert server.job(client).max_ahead == max_ahead, fields

    run(scenario)


def test_pause_resume_and_stop() -> None:
    async def scenario(server: Server) -> None:
        async with server.session(**OURS, max_ahead_segments=8) as client:
            await client.segment()
            await client.send("session.control", action="pause", event_id="p")
            state = await client.message("session.state")
            assert (state["state"], state["event_id"]) == ("paused", "p")
            assert await client.is_silent()
            await client.send("session.control", action="resume")
            state = await client.message("session.state")
            assert state == {"type": "session.state", "state": "generating"}
            await client.segment()
            await client.send("session.control", action="reset", seed=7, event_id="r")
            await client.send("session.control", action="stop")
            assert (await client.closed())[0] == 1000
        done = client.messages[-1]
        assert done["type"] == "session.done"
        assert done["stopped"] is True
        assert done["chunks"] == len(client.segments) < 10
        assert ("control", "reset", "r", 7) in server.of(client).calls
        assert server.of(client).has_left

    run(scenario, Script(chunk_s=0.05))


def test_stop_of_the_plain_protocol() -> None:
    async def scenario(server: Server) -> None:
        async with server.session() as client:
            assert client.start["num_chunks"] is None
            assert "num_frames" not in client.start["config"]
            await client.segment()
            await client.send("session.stop")
            assert (await client.closed())[0] == 1000
        assert client.messages[-1]["stopped"] is True
        assert client.messages[-1]["video"]["helios"]["num_chunks"] == len(client.segments)

    run(scenario, Script(chunk_s=0.05))


def test_an_action_that_comes_too_late_is_no_error_of_the_session() -> None:
    async def scenario(server: Server) -> None:
        server.service.script.action_error = ConflictError("the session has ended")
        async with server.session(**OURS, max_ahead_segments=1) as client:
            await client.send("session.control", action="pause")
            await client.send("session.control", action="pause", event_id="x")
            assert (await client.message("error"))["event_id"] == "x"
            assert [m for m in client.messages if m["type"] == "error"] == [client.messages[-1]]

    run(scenario)


def test_the_queue_and_the_steps_are_told() -> None:
    async def scenario(server: Server) -> None:
        async with server.session(**OURS, num_frames=33) as client:
            assert (await client.closed())[0] == 1000
        queued = next(message for message in client.messages if message["type"] == "session.state")
        assert (queued["state"], queued["queue_position"]) == ("queued", 3)
        progress = [message for message in client.messages if message["type"] == "video.progress"]
        last = progress[-1]
        place = ("phase", "chunk", "num_chunks", "stage", "step", "num_steps", "recommended_playback_rate")
        steps = client.start["config"]["steps"][-1]
        assert [last[name] for name in place] == ["denoise", 0, 1, 2, steps, 2 * steps, 0.5]

    run(scenario, Script(queue_position=3, queue_s=0.05, chunk_s=0.1))


def test_pacing_and_parameters_without_effect_are_told_at_the_start() -> None:
    async def scenario(server: Server) -> None:
        async with server.session(**OURS, num_frames=132, sub_chunks=True, negative_prompt="blur") as client:
            config = client.start["config"]
        assert (config["service_class"], config["steps"]) == ("realtime", [1, 1, 1])
        assert client.start["recommended_playback_rate"] == 0.5
        assert client.start["recommended_preroll_seconds"] == 4.125  # 3 chunks, each 33/12 - 33/24 s late
        assert (config["size"], config["fps"], config["num_frames"], client.start["num_chunks"]) == (
            "64x64",
            24,
            132,
            4,
        )
        assert [warning["param"] for warning in config["warnings"]] == ["negative_prompt", "sub_chunks"]
        async with server.session(**OURS) as client:
            assert client.start["recommended_preroll_seconds"] == 1.375

    run(scenario)


def test_a_cut_session_goes_on_behind_the_last_segment() -> None:
    async def scenario(server: Server) -> None:
        async with server.session(**OURS, num_frames=165, max_ahead_segments=2) as client:
            first = client
            await client.segment()
            client.socket.transport.abort()
        while not server.of(first).has_left:
            await asyncio.sleep(0.01)
        video_id = first.start["request_id"]
        async with server.client() as client:
            await client.send("session.start", **OURS, format="m4s", resume={"id": video_id, "after_segment": 0})
            client.start = await client.message("video.start")
            assert client.start["request_id"] == video_id
            for index in range(1, 5):
                metadata, _ = await client.segment()
                assert metadata["transport_chunk_index"] == index
                await client.send("session.ack", segment=index)
            assert (await client.closed())[0] == 1000
        assert client.messages[-1]["chunks"] == 5
        # Both connections' bytes join, and those of the second one play alone.
        assert num_frames(first.video + client.video) == 165
        assert num_frames(client.video) == 132

    run(scenario)


def test_a_resume_from_the_start_sends_everything_again() -> None:
    async def scenario(server: Server) -> None:
        async with server.session(**OURS, num_frames=66) as client:
            await client.closed()
            video_id = client.start["request_id"]
        async with server.client() as client:
            await client.send("session.start", **OURS, resume={"id": video_id, "after_segment": -1})
            assert (await client.closed())[0] == 1000
        assert client.start == {}
        assert num_frames(client.video) == 66
        assert client.messages[-1]["stopped"] is False

    run(scenario)
