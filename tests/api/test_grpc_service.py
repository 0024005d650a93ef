"""gRPC over the real service and store: with the real engine and a tiny checkpoint, and beside HTTP."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import av
import grpc
import grpc.aio
import httpx2
import pytest

from helios_serve.api.auth import ANONYMOUS, Authenticator, Caller
from helios_serve.api.convert import Limits, ParsedRequest, parse_generation
from helios_serve.api.grpc_access import GrpcAccess
from helios_serve.api.grpc_server import GrpcServer, GrpcSettings
from helios_serve.api.grpc_service import GrpcDesk
from helios_serve.api.limits import Limiter
from helios_serve.api.media_input import DataUriSource, Media
from helios_serve.api.proto.helios.video.v1 import video_generation_pb2 as pb
from helios_serve.api.proto.helios.video.v1.video_generation_pb2_grpc import VideoGenerationServiceStub
from helios_serve.api.service import ServiceConfig, VideoService
from helios_serve.config import EngineConfig, ModelConfig
from helios_serve.engine.async_engine import AsyncEngine
from helios_serve.executors import cost_model, local_executor
from helios_serve.model_executor.model import load_model
from helios_serve.store.connect import StoreConfig, open_stores
from helios_serve.telemetry import Metrics
from helios_serve.workers import stills
from helios_serve.workers.media import Decoder
from helios_serve.workers.segment import progressive_mp4
from tests.api.conftest import FakeEngine, parts_of
from tests.api.grpc_fakes import NO_PROXY, refused


@dataclass(kw_only=True)
class Client:
    """A stub, and the service behind it."""

    stub: Any
    service: VideoService
    server: GrpcServer


@asynccontextmanager
async def served(service: VideoService, decoder: Any) -> AsyncIterator[Client]:
    def parser(*, is_live: bool) -> Any:
        async def parse(body: Mapping[str, object], _: Caller) -> ParsedRequest:
            media = Media(source=DataUriSource(), decoder=decoder)
            return await asyncio.to_thread(parse_generation, body, service.model, media, Limits(), is_live=is_live)

        return parse

    limiter = Limiter()
    desk = GrpcDesk(service=service, parsed=parser(is_live=False), parsed_live=parser(is_live=True), limiter=limiter)
    access = GrpcAccess(Authenticator([]), limiter)
    server = GrpcServer(desk, access, Metrics(service.model.name), GrpcSettings())
    port = await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", NO_PROXY) as channel:
            stub = cast(Any, VideoGenerationServiceStub)(channel)
            yield Client(stub=stub, service=service, server=server)
    finally:
        await server.drain(0.1)
        await server.stop()


Scenario = Callable[[Client], Coroutine[Any, Any, None]]


@pytest.fixture
def run_tiny(tiny_distilled: Path, tmp_path: Path) -> Callable[[Scenario], None]:
    """Runs a scenario with the real engine."""

    async def main(scenario: Scenario) -> None:
        model = load_model(ModelConfig(model=str(tiny_distilled)))
        info, metrics = model.config.info("helios-tiny"), Metrics("helios-tiny")
        costs = cost_model(model.config, "cpu", is_shared=True)
        engine = AsyncEngine(local_executor(model), costs, EngineConfig().patient(), metrics)
        stores = open_stores(StoreConfig(data_dir=tmp_path))
        service = VideoService(
            stores=stores,
            engine=engine,
            muxer=progressive_mp4,
            stills=stills,
            model=info,
            limiter=Limiter(),
            metrics=metrics,
            config=ServiceConfig(),
        )
        await engine.start()
        await engine.wait_ready()
        await service.start()
        try:
            async with asyncio.timeout(120), served(service, Decoder()) as client:
                await scenario(client)
        finally:
            await engine.close(at_once=True)
            await service.close()
            stores.close()

    return lambda scenario: asyncio.run(main(scenario))


def spec(**fields: Any) -> pb.VideoSpec:
    return pb.VideoSpec(**{"prompt": "a lake", "width": 64, "height": 64, "num_frames": 40, "seed": 3, **fields})


def num_frames(data: bytes) -> int:
    with av.open(io.BytesIO(data)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_generate_watch_download_with_the_real_engine(run_tiny: Callable[[Scenario], None]) -> None:
    async def scenario(client: Client) -> None:
        events = [event async for event in client.stub.Generate(pb.GenerateRequest(spec=spec()))]
        kinds = [event.WhichOneof("event") for event in events]
        assert (kinds[0], kinds[-1]) == ("accepted", "completed")
        live = b"".join(event.accepted.init_segment + event.segment.data for event in events)
        assert num_frames(live) == 40
        video = events[-1].completed
        assert video.timing.HasField("first_segment_ms")
        assert video.timing.generated_fps > 0

        request = pb.DownloadVideoRequest(id=video.id)
        data = b"".join([piece.data async for piece in client.stub.DownloadVideo(request)])
        assert (len(data), num_frames(data)) == (video.size_bytes, 40)
        again = [event async for event in client.stub.WatchVideo(pb.WatchVideoRequest(id=video.id))]
        assert [event.WhichOneof("event") for event in again] == ["accepted", "segment", "segment", "completed"]
        assert b"".join(event.accepted.init_segment + event.segment.data for event in again) == live
        request = pb.DownloadVideoRequest(id=video.id, variant=pb.VARIANT_LAST_FRAME)
        (picture,) = [piece async for piece in client.stub.DownloadVideo(request)]
        assert picture.data.startswith(b"\x89PNG")

        longer = pb.CreateVideoRequest(spec=pb.VideoSpec(prompt="night", num_frames=30), extend_video_id=video.id)
        extended = (await client.stub.CreateVideo(longer)).video
        assert (extended.extended_from_video_id, extended.num_frames) == (video.id, 70)
        await client.service.wait(ANONYMOUS, extended.id)
        assert (await client.stub.GetVideo(pb.GetVideoRequest(id=extended.id))).video.progress == 100

    run_tiny(scenario)


def test_a_deadline_frees_the_engine(run_tiny: Callable[[Scenario], None]) -> None:
    async def scenario(client: Client) -> None:
        call = client.stub.Generate(pb.GenerateRequest(spec=spec(num_frames=3000)), timeout=2)
        video_id = (await anext(aiter(call))).accepted.video.id
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _rest(call)
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        job = await client.service.wait(ANONYMOUS, video_id)
        assert job.state == "cancelled"

    run_tiny(scenario)


async def _rest(call: Any) -> list[Any]:
    return [event async for event in call]


def test_a_session_with_the_real_engine(run_tiny: Callable[[Scenario], None]) -> None:
    async def scenario(client: Client) -> None:
        call = client.stub.Session()
        open_ended = pb.VideoSpec(prompt="a lake", width=64, height=64, fps=1)
        await call.write(pb.SessionRequest(start=pb.SessionStart(spec=open_ended, max_ahead_segments=1)))
        kinds, segments, video = [], [], pb.Video()
        while (message := await call.read()) is not grpc.aio.EOF:
            kinds.append(message.WhichOneof("event"))
            if message.HasField("started"):
                video = message.started.video
            elif message.HasField("segment"):
                segments.append(message.segment)
                index = message.segment.index
                if index == 0:
                    await asyncio.sleep(1)
                    assert (await client.service.get(ANONYMOUS, video.id)).chunks_done == 1
                    prompt = pb.PromptUpdate(prompt="a storm", transition_chunks=1)
                    await call.write(pb.SessionRequest(event_id="e1", prompt=prompt))
                    await call.write(pb.SessionRequest(event_id="e1", prompt=pb.PromptUpdate(prompt="another")))
                if index == 2:
                    await call.write(pb.SessionRequest(control=pb.Control(action=pb.ACTION_STOP)))
                await call.write(pb.SessionRequest(ack=pb.Ack(segment=index)))
            elif message.HasField("prompt_applied"):
                assert message.prompt_applied.chunk == 1
                assert len(segments) == 1
            elif message.HasField("rejected"):
                assert (message.rejected.event_id, message.rejected.error.code) == ("e1", "event_id_conflict")
        assert await call.code() == grpc.StatusCode.OK
        assert kinds[-1] == "ended"
        assert {"prompt_queued", "prompt_applied", "rejected", "state_changed"} <= set(kinds)
        assert [each.prompt for each in segments[:3]] == ["a lake", "a storm", "a storm"]
        found = (await client.stub.GetVideo(pb.GetVideoRequest(id=video.id))).video
        assert (found.status, found.num_chunks) == (pb.VIDEO_STATUS_COMPLETED, len(segments))

    run_tiny(scenario)


def test_http_and_grpc_see_the_same_jobs_and_refuse_alike(tmp_path: Path) -> None:
    async def main() -> None:
        with parts_of(FakeEngine(), tmp_path) as parts:
            await parts.service.start()
            transport = httpx2.ASGITransport(app=parts.app, client=("127.0.0.1", 1))
            async with (
                asyncio.timeout(60),
                httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http,
                served(parts.service, None) as client,
            ):
                await _compared(http, client)
            await parts.service.close()

    asyncio.run(main())


async def _compared(http: httpx2.AsyncClient, client: Client) -> None:
    stub = client.stub
    key = {"idempotency-key": "k1"}
    body = {"prompt": "a lake", "num_frames": 40, "seed": 3, "metadata": {"a": "b"}, "helios": {"guidance_scale": 1.1}}
    by_http = (await http.post("/v1/videos", json=body, headers=key)).json()
    helios = pb.HeliosParams(guidance_scale=1.1)
    video = pb.VideoSpec(prompt="a lake", num_frames=40, seed=3, metadata={"a": "b"}, helios=helios)
    by_grpc = (await stub.CreateVideo(pb.CreateVideoRequest(spec=video), metadata=(*key.items(),))).video
    assert by_grpc.id == by_http["id"]
    await client.service.wait(ANONYMOUS, by_grpc.id)
    found = (await stub.GetVideo(pb.GetVideoRequest(id=by_grpc.id))).video
    shown = (await http.get(f"/v1/videos/{by_grpc.id}")).json()
    assert (found.progress, f"{found.width}x{found.height}") == (shown["progress"], shown["size"])
    assert (found.seed, dict(found.metadata)) == (shown["helios"]["seed"], shown["helios"]["metadata"])
    assert [each.message for each in found.warnings] == [each["message"] for each in shown["helios"]["warnings"]]
    data = (await http.get(f"/v1/videos/{by_grpc.id}/content")).content
    request = pb.DownloadVideoRequest(id=by_grpc.id)
    assert b"".join([piece.data async for piece in stub.DownloadVideo(request)]) == data

    video.seed = 4
    reused = await refused(stub.CreateVideo(pb.CreateVideoRequest(spec=video), metadata=(*key.items(),)))
    other = (await http.post("/v1/videos", json={**body, "seed": 4}, headers=key)).json()
    assert (reused.code.name, reused.reason) == ("ALREADY_EXISTS", other["error"]["code"])
    unknown = await refused(stub.GetVideo(pb.GetVideoRequest(id="video_x")))
    assert unknown.reason == (await http.get("/v1/videos/video_x")).json()["error"]["code"]
    wrong = await refused(stub.CreateVideo(pb.CreateVideoRequest(spec=pb.VideoSpec(prompt="a", num_frames=9000))))
    told = (await http.post("/v1/videos", json={"prompt": "a", "num_frames": 9000})).json()["error"]
    assert (wrong.reason, wrong.message) == (told["code"], told["message"])
    await http.delete(f"/v1/videos/{by_grpc.id}")
    assert (await refused(stub.GetVideo(pb.GetVideoRequest(id=by_grpc.id)))).code == grpc.StatusCode.NOT_FOUND


def test_a_refusal_names_the_field_that_it_came_in(tmp_path: Path) -> None:
    async def main() -> None:
        with parts_of(FakeEngine(), tmp_path) as parts:
            await parts.service.start()
            async with asyncio.timeout(60), served(parts.service, None) as client:
                await _named(client.stub)
            await parts.service.close()

    asyncio.run(main())


async def _named(stub: Any) -> None:
    lake = pb.VideoSpec(prompt="a lake")
    calls = {
        "id": stub.GetVideo(pb.GetVideoRequest(id="video_x")),
        "page_token": stub.ListVideos(pb.ListVideosRequest(page_token="video_x")),
        "remix_video_id": stub.CreateVideo(pb.CreateVideoRequest(spec=lake, remix_video_id="video_x")),
        "extend_video_id": stub.CreateVideo(pb.CreateVideoRequest(spec=lake, extend_video_id="video_x")),
    }
    for path, call in calls.items():
        refusal = await refused(call)
        assert (refusal.code, refusal.fields) == (grpc.StatusCode.NOT_FOUND, [path])
    outputs = [
        ("container", pb.OutputOptions(container=9)),
        ("codec", pb.OutputOptions(codec=9)),
        ("crf", pb.OutputOptions(crf=60)),
    ]
    starts = [
        ("start.resume.id", pb.SessionStart(resume=pb.SessionResume(id="video_x"))),
        ("start.spec.width", pb.SessionStart(spec=pb.VideoSpec(prompt="a lake", width=650, height=384))),
        ("start.spec.image", pb.SessionStart(spec=pb.VideoSpec(prompt="a lake", image=pb.Media()))),
    ]
    for name, output in outputs:
        spec_ = pb.VideoSpec(prompt="a lake", output=output)
        starts.append((f"start.spec.output.{name}", pb.SessionStart(spec=spec_)))
    for path, start in starts:
        session = stub.Session()
        await session.write(pb.SessionRequest(start=start))
        assert (await refused(session)).fields == [path]


def test_a_stream_ends_with_the_service_and_its_job_goes_on(tmp_path: Path) -> None:
    async def main() -> None:
        with parts_of(FakeEngine(), tmp_path) as parts:
            await parts.service.start()
            async with asyncio.timeout(60), served(parts.service, None) as client:
                request = pb.GenerateRequest(spec=pb.VideoSpec(prompt="slow", num_frames=330))
                call = client.stub.Generate(request)
                video_id = (await anext(aiter(call))).accepted.video.id
                parts.service.refuse()
                ending, refusal = asyncio.create_task(client.server.drain(10)), asyncio.create_task(refused(call))
                await parts.service.close()
                assert ((await refusal).code, (await refusal).reason) == (grpc.StatusCode.UNAVAILABLE, "draining")
                await ending
                row = await parts.stores.jobs.get(ANONYMOUS.tenant, video_id)
                assert row.state not in ("cancelled", "failed", "finished")

    asyncio.run(main())
