"""Sessions and HLS over the real service, store and engine, with a tiny checkpoint."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import av
import m3u8
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.websockets import WebSocket

from helios_serve.api.auth import ANONYMOUS, Caller
from helios_serve.api.convert import Limits, ParsedRequest, parse_generation
from helios_serve.api.hls import hls_index, hls_init, hls_segment
from helios_serve.api.jobs import Origin
from helios_serve.api.keys import KeyLimits
from helios_serve.api.limits import Limiter
from helios_serve.api.media_input import DataUriSource, Media
from helios_serve.api.realtime import realtime_route
from helios_serve.api.service import ServiceConfig, VideoService
from helios_serve.api.session import SessionConfig
from helios_serve.config import EngineConfig, ModelConfig
from helios_serve.engine.async_engine import AsyncEngine
from helios_serve.errors import CapacityError
from helios_serve.executors import cost_model, local_executor
from helios_serve.model_executor.model import load_model
from helios_serve.store.connect import StoreConfig, open_stores
from helios_serve.telemetry import Metrics
from helios_serve.workers import stills
from helios_serve.workers.media import Decoder
from helios_serve.workers.segment import progressive_mp4
from tests.api.session_fakes import PATH, Client, Server, links_for

OURS: dict[str, Any] = {"protocol": "helios.v1", "size": "64x64"}
LIMITED = replace(ANONYMOUS, tenant="acme", key_id="k", limits=KeyLimits(max_sessions=1))

Scenario = Callable[[Server, VideoService], Coroutine[Any, Any, None]]
Run = Callable[..., None]


@pytest.fixture
def run(tiny_distilled: Path, tmp_path: Path) -> Run:
    """Runs a scenario; `caller` is who calls, the other options are those of SessionConfig."""

    def run_scenario(scenario: Scenario, *, caller: Caller = ANONYMOUS, **options: float) -> None:
        async def main() -> None:
            async with asyncio.timeout(120):
                await _serve(scenario, tiny_distilled, tmp_path, caller, SessionConfig(**options))

        asyncio.run(main())

    return run_scenario


async def _serve(scenario: Scenario, checkpoint: Path, data_dir: Path, caller: Caller, config: SessionConfig) -> None:
    model = load_model(ModelConfig(model=str(checkpoint)))
    info, decoder = model.config.info("helios-tiny"), Decoder()
    costs = cost_model(model.config, "cpu", is_shared=True)
    metrics = Metrics(info.name)
    engine = AsyncEngine(local_executor(model), costs, EngineConfig().patient(), metrics)
    stores = open_stores(StoreConfig(data_dir=data_dir))
    service = VideoService(
        stores=stores,
        engine=engine,
        muxer=progressive_mp4,
        stills=stills,
        model=info,
        limiter=Limiter(),
        metrics=metrics,
        config=ServiceConfig(session=config),
    )

    async def parse(body: Mapping[str, object], _: Caller) -> ParsedRequest:
        media = Media(source=DataUriSource(), decoder=decoder)
        return await asyncio.to_thread(parse_generation, body, info, media, Limits(), is_live=True)

    async def access(_: WebSocket) -> Caller:
        return caller

    route, app = realtime_route(service, parse, access, links_for), FastAPI()
    app.add_api_websocket_route(PATH, route.serve)
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", lifespan="off")
    http = uvicorn.Server(config)
    await engine.start()
    await engine.wait_ready()
    await service.start()
    serving = asyncio.create_task(http.serve())
    try:
        while not http.started:
            await asyncio.sleep(0.01)
        url = f"127.0.0.1:{http.servers[0].sockets[0].getsockname()[1]}"
        await scenario(Server(url=url, route=route, service=cast(Any, service), callers=[]), service)
    finally:
        http.should_exit = http.force_exit = True
        await serving
        await engine.close(at_once=True)
        await service.close()
        stores.close()


def num_frames(data: bytes) -> int:
    with av.open(io.BytesIO(data)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_a_session_of_the_plain_protocol_and_its_playlist(run: Run) -> None:
    async def scenario(server: Server, service: VideoService) -> None:
        async with server.session(size="64x64", num_frames=100) as client:
            await client.segment()
            await client.send("session.interaction", interaction={"event": {"prompt": "a storm"}})
            assert await client.closed() == (1000, "")
        assert client.start["config"]["service_class"] == "realtime"
        assert client.kinds() <= {"video.start", "video.chunk_metadata", "session.interaction.queued", "session.done"}
        done, video_id = client.messages[-1], client.start["request_id"]
        assert (done["chunks"], done["stopped"], done["video"]["status"]) == (4, False, "completed")
        assert num_frames(client.video) == 100
        parsed = m3u8.loads(await hls_index(service, ANONYMOUS, video_id, None))
        assert parsed.is_endlist
        assert [segment.duration for segment in parsed.segments] == [1.375, 1.375, 1.375, round(1 / 24, 6)]
        data = await hls_init(service, ANONYMOUS, video_id)
        for index in range(4):
            data += await hls_segment(service, ANONYMOUS, video_id, index)
        assert data == client.video

    run(scenario)


def test_credit_receipts_pause_a_cut_and_stop(run: Run) -> None:
    async def scenario(server: Server, _: VideoService) -> None:
        async with server.session(**OURS) as first:
            await first.segment()
            change = {"event_id": "storm", "event": {"prompt": "a storm"}, "transition_chunks": 2}
            await first.send("session.interaction", interaction=change)
            chunk = (await first.message("session.interaction.queued"))["earliest_chunk"]
            await first.segment()
            assert await first.is_silent(0.5)
            while len(first.segments) <= chunk + 1:
                await first.send("session.ack", segment=len(first.segments) - 2)
                await first.segment()
            await first.send("session.control", action="pause", event_id="p")
            assert (await first.message("session.state"))["state"] in ("waiting_for_credit", "paused")
            await first.send("session.ack", segment=len(first.segments) - 1)
            assert await first.is_silent(0.5)
            await first.send("session.control", action="resume")
            await first.segment()
            cast(Any, first.socket).transport.abort()
        applied = next(m for m in first.messages if m["type"] == "session.interaction.applied")
        assert (applied["event_id"], applied["chunk"], applied["start_frame"]) == ("storm", chunk, 33 * chunk)
        shown = [metadata["active_event_ids"] for metadata, _ in first.segments[: chunk + 2]]
        assert shown == [[]] * chunk + [["storm"]] * 2
        second = await resumed(server, first)
        await second.segment()
        assert second.segments[0][0]["transport_chunk_index"] == len(first.segments)
        await second.send("session.stop")
        assert (await second.closed())[0] == 1000
        done = second.messages[-1]
        assert done["stopped"] is True
        assert done["chunks"] == len(first.segments) + len(second.segments)
        assert num_frames(first.video + second.video) == 33 * done["chunks"]

    run(scenario)


async def resumed(server: Server, lost: Client) -> Client:
    """Another client behind the last segment of a lost one, with credit for all of them."""
    from websockets.asyncio.client import connect

    client = Client(await connect(f"ws://{server.url}{PATH}", max_size=None, proxy=None))
    last = len(lost.segments) - 1
    await client.send(
        "session.start", protocol="helios.v1", resume={"id": lost.start["request_id"], "after_segment": last}
    )
    await client.message("video.start")
    await client.send("session.ack", segment=last)
    return client


def test_an_idle_session_and_a_restart(run: Run) -> None:
    async def scenario(server: Server, _: VideoService) -> None:
        async with server.session(**OURS, max_ahead_segments=1) as client:
            assert (await client.closed())[0] == 4408
        assert (client.messages[-1]["type"], client.messages[-1]["chunks"]) == ("session.done", 1)
        async with server.session(**OURS, max_ahead_segments=1) as client:
            await client.segment()
            await server.route.restart()
            assert (await client.closed())[0] == 1012

    run(scenario, idle_s=0.5)


def test_a_key_with_one_session_resumes_it_and_opens_no_other(run: Run) -> None:
    async def scenario(server: Server, _: VideoService) -> None:
        async with server.session(**OURS) as client:
            await client.segment()
            async with server.client() as other:
                await other.send("session.start", prompt="a lake", **OURS)
                assert (await other.closed())[0] == 1013
            assert other.messages[-1]["code"] == "too_many_sessions"
            second = await resumed(server, client)
            assert (await client.closed())[0] == 4400
            await second.segment()
            await second.socket.close()

    run(scenario, caller=LIMITED)


def pixels(data: bytes) -> list[bytes]:
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format="yuv420p").tobytes() for frame in container.decode(video=0)]


async def played(server: Server, seed: int, num_chunks: int, change: Callable[[Client], Any] | None = None) -> Client:
    """A session of that many segments; `change` is awaited after the first one."""
    async with server.session(**OURS, seed=seed, max_ahead_segments=2) as client:
        await client.segment()
        if change is not None:
            await change(client)
        while len(client.segments) < num_chunks:
            await client.send("session.ack", segment=len(client.segments) - 1)
            await client.segment()
        await client.send("session.stop")
        await client.closed()
    return client


def test_a_reset_begins_another_video_on_the_same_timeline(run: Run) -> None:
    async def reset(client: Client) -> None:
        for _ in range(2):  # the second is a retry of the first
            await client.send("session.control", action="reset", seed=11, event_id="again")
        await client.send("session.control", action="reset", seed=12, event_id="again")
        assert (await client.message("error"))["code"] == "event_id_conflict"

    async def scenario(server: Server, service: VideoService) -> None:
        client = await played(server, 5, 5, reset)
        told = [m for m in client.messages if m["type"] == "session.state" and m.get("event_id") == "again"]
        assert len(told) == 1
        begins = sum(m["type"] == "video.chunk_metadata" for m in client.messages[: client.messages.index(told[0])])
        assert 1 <= begins <= 3
        assert [metadata["start_frame"] for metadata, _ in client.segments] == [33 * index for index in range(5)]
        before, after = [pixels((await played(server, seed, 3)).video) for seed in (5, 11)]
        made = pixels(client.video)
        count = min(5 - begins, 3) * 33
        assert made[: 33 * begins] == before[: 33 * begins]
        assert made[33 * begins : 33 * begins + count] == after[:count]
        assert after[:33] != before[:33]
        assert made[33 * begins : 33 * begins + 33] != before[33 * begins : 33 * begins + 33]

    run(scenario)


def test_a_reset_that_was_confirmed_survives_the_server(run: Run) -> None:
    lost: list[Client] = []

    async def first(server: Server, service: VideoService) -> None:
        async with server.session(**OURS, seed=5, max_ahead_segments=1) as client:
            await client.segment()
            assert await client.is_silent(0.5)
            await client.send("session.control", action="reset", seed=11, event_id="again")
            await client.send("session.ping")
            await client.message("session.pong")
            lost.append(client)

    async def second(server: Server, service: VideoService) -> None:
        client = await resumed(server, lost[0])
        for _ in range(2):
            await client.segment()
            await client.send("session.ack", segment=len(client.segments))
        await client.send("session.stop")
        await client.closed()
        fresh = pixels((await played(server, 11, 2)).video)
        assert pixels(lost[0].segments[0][1] + b"".join(media for _, media in client.segments))[33:99] == fresh[:66]
        assert [metadata["start_frame"] for metadata, _ in client.segments][:2] == [33, 66]

    run(first)
    run(second)


def test_a_session_plays_what_the_schedule_of_its_prompts_gives(run: Run) -> None:
    asked: list[Any] = []

    async def storm(client: Client) -> None:
        for prompt, count in (("a storm", 3), ("a calm", 0)):
            event = {"event": {"prompt": prompt}, "transition_chunks": count}
            await client.send("session.interaction", interaction=event)
            chunk = (await client.message("session.interaction.queued"))["earliest_chunk"]
            asked.append({"chunk": chunk, "prompt": prompt, "transition_chunks": count})
            while len(client.segments) <= chunk:
                await client.send("session.ack", segment=len(client.segments) - 1)
                await client.segment()

    async def scenario(server: Server, service: VideoService) -> None:
        live = pixels((await played(server, 5, 6, storm)).video)
        prompts = [{"chunk": 0, "prompt": "a lake"}, *asked]
        body = {"prompts": prompts, "size": "64x64", "seed": 5, "num_frames": len(live), "profile": "realtime"}
        parsed = parse_generation(body, service.model, Media(source=DataUriSource(), decoder=Decoder()), Limits())
        job = (await service.create(ANONYMOUS, parsed, Origin(route="create"))).job
        assert (await service.wait(ANONYMOUS, job.id)).state == "completed"
        video = await service.video(ANONYMOUS, job.id)
        offline = pixels(b"".join([piece async for piece in service.read(video)]))
        assert live == offline
        assert len({*live[::33]}) == len(live) // 33

    run(scenario)


def test_the_place_of_a_session_whose_client_is_gone_is_given_away(run: Run) -> None:
    async def scenario(server: Server, service: VideoService) -> None:
        engine = cast(Any, service)._engine._engine
        async with server.session(**OURS) as client:
            await client.segment()
            run = engine._runs.get(client.start["request_id"])
            assert run is not None
            state = run.state
            cast(Any, client.socket).transport.abort()
        while not state.is_held:
            await asyncio.sleep(0.01)
        assert not state.has_released
        await asyncio.sleep(0.6)
        assert state.has_released
        second = await resumed(server, client)
        await second.segment()
        assert not state.has_released
        await second.socket.close()
        await asyncio.sleep(0.6)
        admit, engine._admit = engine._admit, _full
        async with server.client() as third:
            resume = {"id": client.start["request_id"], "after_segment": -1}
            await third.send("session.start", protocol="helios.v1", resume=resume)
            assert (await third.closed())[0] == 1013
        engine._admit = admit
        assert third.messages[-1]["code"] == "capacity_exceeded"

    run(scenario, reserved_s=0.3)


def _full(*_: object) -> None:
    raise CapacityError("full", code="capacity_exceeded", retry_after_s=1.0)
