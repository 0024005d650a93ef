"""HLS of running and finished jobs, read by a parser and by players that were not written here."""

from __future__ import annotations

import asyncio
import io
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, cast

import av
import m3u8
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from helios_serve.api.auth import ANONYMOUS
from helios_serve.api.hls import (
    INIT_TYPE,
    PLAYLIST_TYPE,
    SEGMENT_TYPE,
    hls_index,
    hls_init,
    hls_segment,
    playlist,
)
from helios_serve.api.service import VideoService
from helios_serve.api.video_files import VideoExpiredError
from helios_serve.errors import CapacityError, ConflictError, GenerationError, NotFoundError
from tests.api.session_fakes import FakeJob, FakeService, Script, parsed_of

TOKEN = "abc.d-e_f=+&"
Scenario = Callable[[FakeService], Coroutine[Any, Any, None]]


def run(scenario: Scenario, script: Script | None = None) -> None:
    async def main() -> None:
        service = FakeService(Script() if script is None else script)
        try:
            async with asyncio.timeout(60):
                await scenario(service)
        finally:
            await service.close()

    asyncio.run(main())


def served(service: FakeService) -> VideoService:
    return cast(VideoService, service)


def begin(service: FakeService, **fields: object) -> FakeJob:
    return service.begin(parsed_of({"prompt": "a lake", **fields}))


async def ended(job: FakeJob) -> FakeJob:
    while not job.has_ended:
        await asyncio.sleep(0.01)
    return job


def read(text: str) -> Any:
    parsed = m3u8.loads(text)
    assert (parsed.version, parsed.playlist_type, parsed.media_sequence) == (7, "event", 0)
    assert parsed.is_independent_segments
    return parsed


@pytest.mark.parametrize(("fps", "num_frames"), [(24, 132), (24, 100), (16, 33), (60, 1), (23.976, 66), (1, 34)])
def test_a_finished_playlist_names_every_segment_and_its_time(fps: float, num_frames: int) -> None:
    async def scenario(service: FakeService) -> None:
        job = await ended(begin(service, fps=fps, num_frames=num_frames))
        parsed = read(await hls_index(served(service), ANONYMOUS, job.id, None))
        assert parsed.is_endlist
        assert parsed.segment_map[0].uri == "init.mp4"
        assert [segment.uri for segment in parsed.segments] == [f"seg{n}.m4s" for n in range(-(-num_frames // 33))]
        assert sum(segment.duration for segment in parsed.segments) == pytest.approx(num_frames / fps, abs=1e-4)
        assert parsed.target_duration == math.ceil(33 / fps)
        assert all(segment.duration <= parsed.target_duration for segment in parsed.segments)

    run(scenario)


def test_every_entry_carries_the_token() -> None:
    async def scenario(service: FakeService) -> None:
        job = await ended(begin(service, num_frames=66))
        parsed = read(await hls_index(served(service), ANONYMOUS, job.id, TOKEN))
        quoted = "?token=abc.d-e_f%3D%2B%26"
        assert parsed.segment_map[0].uri == f"init.mp4{quoted}"
        assert [segment.uri for segment in parsed.segments] == [f"seg0.m4s{quoted}", f"seg1.m4s{quoted}"]

    run(scenario)


def test_a_growing_playlist_waits_for_its_third_segment() -> None:
    async def scenario(service: FakeService) -> None:
        job = begin(service, num_frames=330)
        parsed = read(await hls_index(served(service), ANONYMOUS, job.id, None))
        assert 3 <= len(parsed.segments) < 10
        assert not parsed.is_endlist
        assert not job.has_ended

    run(scenario, Script(chunk_s=0.1))


def test_a_short_job_is_listed_when_it_ends() -> None:
    async def scenario(service: FakeService) -> None:
        job = begin(service, num_frames=40)
        parsed = read(await hls_index(served(service), ANONYMOUS, job.id, None))
        assert [segment.uri for segment in parsed.segments] == ["seg0.m4s", "seg1.m4s"]
        assert parsed.is_endlist

    run(scenario, Script(chunk_s=0.1))


def test_a_player_is_not_kept_for_ever() -> None:
    async def scenario(service: FakeService) -> None:
        job = begin(service, num_frames=330)
        with pytest.raises(CapacityError) as caught:
            await hls_index(served(service), ANONYMOUS, job.id, None, hold_s=0.1)
        error = caught.value
        assert (error.status, error.code, error.retryable, error.retry_after_s) == (503, "video_not_ready", True, 2)

    run(scenario, Script(chunk_s=10))


def test_a_failed_job_keeps_what_it_has() -> None:
    async def scenario(service: FakeService) -> None:
        job = await ended(begin(service, num_frames=330))
        parsed = read(await hls_index(served(service), ANONYMOUS, job.id, None))
        assert len(parsed.segments) == 1
        assert parsed.is_endlist
        assert parsed.segments[0].duration == 1.375

    run(scenario, Script(fail_at=1, failure=GenerationError("not finite")))


def test_a_job_that_failed_before_its_first_segment() -> None:
    async def scenario(service: FakeService) -> None:
        job = await ended(begin(service))
        for verb in (hls_index(served(service), ANONYMOUS, job.id, None), hls_init(served(service), ANONYMOUS, job.id)):
            with pytest.raises(ConflictError, match="not finite") as caught:
                await verb
            assert caught.value.code == "video_failed"

    run(scenario, Script(fail_at=0, failure=GenerationError("not finite")))


def test_what_is_not_there() -> None:
    async def scenario(service: FakeService) -> None:
        with pytest.raises(NotFoundError):
            await hls_index(served(service), ANONYMOUS, "video_none", None)
        with pytest.raises(NotFoundError):
            await hls_segment(served(service), ANONYMOUS, "video_none", 0)
        job = begin(service, num_frames=66)
        stranger = replace(ANONYMOUS, tenant="other")
        with pytest.raises(NotFoundError):
            await hls_init(served(service), stranger, job.id)
        with pytest.raises(NotFoundError, match="has 0 so far"):
            await hls_init(served(service), ANONYMOUS, job.id)
        await ended(job)
        with pytest.raises(NotFoundError, match="segment 2: the video has 2"):
            await hls_segment(served(service), ANONYMOUS, job.id, 2)
        job.state = "expired"
        with pytest.raises(VideoExpiredError):
            await hls_index(served(service), ANONYMOUS, job.id, None)
        with pytest.raises(VideoExpiredError):
            await hls_segment(served(service), ANONYMOUS, job.id, 0)

    run(scenario, Script(chunk_s=0.05))


def test_the_files_of_a_playlist_join_to_the_video() -> None:
    async def scenario(service: FakeService) -> None:
        job = await ended(begin(service, num_frames=100))
        view = await service.get(ANONYMOUS, job.id)
        data = await hls_init(served(service), ANONYMOUS, job.id)
        for index in range(len(read(playlist(view, None)).segments)):
            data += await hls_segment(served(service), ANONYMOUS, job.id, index)
        with av.open(io.BytesIO(data)) as container:
            times = [frame.time for frame in container.decode(video=0)]
        assert times == pytest.approx([frame / 24 for frame in range(100)])

    run(scenario)


@pytest.mark.parametrize("num_frames", [33, 66, 100, 330])
def test_ffmpeg_plays_a_finished_video(num_frames: int) -> None:
    async def scenario(service: FakeService) -> None:
        job = await ended(begin(service, num_frames=num_frames))
        async with serving(service) as url:
            frames = await asyncio.to_thread(play, f"{url}/v1/videos/{job.id}/hls/index.m3u8?token=abc")
        assert frames == pytest.approx([frame / 24 for frame in range(num_frames)])

    run(scenario)


def test_ffmpeg_follows_a_growing_video_to_its_end() -> None:
    async def scenario(service: FakeService) -> None:
        job = begin(service, num_frames=150, fps=60)
        async with serving(service) as url:
            frames = await asyncio.to_thread(play, f"{url}/v1/videos/{job.id}/hls/index.m3u8?token=abc")
        assert frames == pytest.approx([frame / 60 for frame in range(150)])

    run(scenario, Script(chunk_s=0.4))


def play(url: str) -> list[float]:
    """The times of the frames that FFmpeg's HLS demuxer shows, from the first segment on."""
    with av.open(url, options={"live_start_index": "0"}) as container:
        return [frame.time for frame in container.decode(video=0) if frame.time is not None]


@asynccontextmanager
async def serving(service: FakeService) -> AsyncIterator[str]:
    """The three routes, for whoever has the token."""

    def answer(content: Callable[[Request], Awaitable[str | bytes]], media_type: str) -> Callable[..., Any]:
        async def endpoint(request: Request) -> Response:
            if request.query_params.get("token") != "abc":
                return Response(status_code=401)
            return Response(await content(request), media_type=media_type)

        return endpoint

    def id_of(request: Request) -> str:
        return str(request.path_params["video_id"])

    app, verbs, base = FastAPI(), served(service), "/v1/videos/{video_id}/hls"
    index = answer(lambda request: hls_index(verbs, ANONYMOUS, id_of(request), "abc"), PLAYLIST_TYPE)
    init = answer(lambda request: hls_init(verbs, ANONYMOUS, id_of(request)), INIT_TYPE)
    media = answer(
        lambda request: hls_segment(verbs, ANONYMOUS, id_of(request), request.path_params["index"]), SEGMENT_TYPE
    )
    for path, endpoint in (("index.m3u8", index), ("init.mp4", init), ("seg{index:int}.m4s", media)):
        app.add_route(f"{base}/{path}", endpoint)
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", lifespan="off", ws="none")
    )
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        await task
