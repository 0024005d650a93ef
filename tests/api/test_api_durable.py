"""What outlives a call, a client or the server: restarts, idempotency, remixes, extensions, deletion, the drain."""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import httpx2
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from helios_serve.config import EngineConfig, ModelConfig
from helios_serve.engine.async_engine import AsyncEngine
from helios_serve.executors import cost_model, local_executor
from helios_serve.model_executor.model import load_model
from helios_serve.store.connect import StoreConfig, open_stores
from helios_serve.store.errors import StoreStartError
from helios_serve.telemetry import Metrics
from tests.api.conftest import FakeEngine, Parts, client_of, parts_of
from tests.api.test_api_streaming import create, events_of, finished

URL = "/v1/videos/generations"
VIDEOS = "/v1/videos"
PNG = "data:image/png;base64," + base64.b64encode(b"\x89PNG").decode()
STEP_S = 0.02

Events = list[tuple[str | None, str, dict[str, Any]]]


@contextmanager
def serving(data_dir: Path, engine: FakeEngine | None = None) -> Iterator[TestClient]:
    """One life of a server."""
    with (
        parts_of(FakeEngine() if engine is None else engine, data_dir) as parts,
        client_of(parts.app) as client,
    ):
        yield client


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def chunks_done(client: TestClient, video_id: str) -> int:
    count: int = client.get(f"{VIDEOS}/{video_id}").json()["helios"]["chunks_done"]
    return count


def interrupted(data_dir: Path, at_chunk: int, **body: Any) -> dict[str, Any]:
    """A job whose server ended after that many segments of more."""
    engine = FakeEngine(step_s=STEP_S)
    with serving(data_dir, engine) as client:
        video = create(client, **{"prompt": "exact", "steps": [1, 1, 1], **body})
        wait_for(lambda: chunks_done(client, video["id"]) >= at_chunk)
        assert client.get(f"{VIDEOS}/{video['id']}").json()["status"] == "in_progress"
    assert engine.cancelled == [video["id"]]
    return video


def content(client: TestClient, video_id: str) -> bytes:
    assert finished(client, video_id)["status"] == "completed"
    answer = client.get(f"{VIDEOS}/{video_id}/content")
    assert answer.status_code == 200, answer.text
    return answer.content


def undisturbed(data_dir: Path, **body: Any) -> bytes:
    with serving(data_dir) as client:
        return content(client, create(client, **{"prompt": "exact", "steps": [1, 1, 1], **body})["id"])


def numbered(text: str) -> Events:
    """The events that a viewer can come back behind."""
    return [event for event in events_of(text) if event[0] is not None]


# A restart.

SCHEDULE = [{"prompt": "exact"}, {"prompt": "q", "chunk": 3, "transition_chunks": 3}]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"image": PNG},
        {"skip_first_chunk": True},
        {"prompt": None, "prompts": SCHEDULE},
    ],
    ids=["text", "image", "skip", "schedule"],
)
@pytest.mark.parametrize("at_chunk", [1, 4])
def test_a_job_goes_on_after_a_restart(tmp_path: Path, body: dict[str, Any], at_chunk: int) -> None:
    body = {"num_frames": 7 * 33 - 5, "seed": 5, **body}
    video_id = interrupted(tmp_path / "one", at_chunk, **body)["id"]
    engine = FakeEngine()
    with serving(tmp_path / "one", engine) as client:
        made = content(client, video_id)
        video = client.get(f"{VIDEOS}/{video_id}").json()
    assert engine.resumed[0].next_chunk >= at_chunk, "chunks that are committed are not made again"
    assert made == undisturbed(tmp_path / "two", **body)
    assert made.count(b"[exact:") == 7
    assert (video["helios"]["chunks_done"], video["helios"]["num_frames"]) == (7, 226)
    assert video["helios"]["usage"]["gpu_seconds"] >= 0.002 * (6 + 6 * 3)


def test_a_viewer_resumes_over_a_restart_without_gap_or_repeat(tmp_path: Path) -> None:
    engine = FakeEngine(step_s=STEP_S)
    with serving(tmp_path, engine) as client:
        video_id = create(client, "exact", num_frames=5 * 33, seed=5, steps=[1, 1, 1])["id"]
        url = f"{VIDEOS}/{video_id}/events"
        seen: list[str] = []
        with ThreadPoolExecutor(1) as pool:
            viewing = pool.submit(lambda: client.get(url).text)
            wait_for(lambda: chunks_done(client, video_id) >= 2)
            client.portal.call(service_of(client.app).close)  # type: ignore[union-attr]
            seen.append(viewing.result())
    assert seen[0].endswith("retry: 500\n\n")
    before = numbered(seen[0].removesuffix("retry: 500\n\n"))
    assert [event[0] for event in before] == [str(number) for number in range(len(before))]
    assert 3 <= len(before) <= 5
    with serving(tmp_path) as client:
        after = numbered(client.get(url, headers={"last-event-id": before[-1][0] or ""}).text)
        whole = numbered(client.get(url).text)
        made = content(client, video_id)
    both = before + after
    assert [event[0] for event in both] == [str(number) for number in range(7)]
    partials = [data for _, event, data in both if event == "video_generation.partial_video"]
    assert b"".join(base64.b64decode(data["b64_json"]) for data in partials) == made
    assert [data for _, event, data in whole if event == "video_generation.partial_video"] == partials
    assert both[-1][1] == "video_generation.completed"


def test_ended_jobs_survive_a_restart(tmp_path: Path) -> None:
    with serving(tmp_path) as client:
        done = create(client, "exact", num_frames=66)["id"]
        bytes_before = content(client, done)
        failed = create(client, "fail generation_failed")["id"]
        cancelled = create(client, "slow", steps=[9, 9, 9])["id"]
        client.post(f"{VIDEOS}/{cancelled}/cancel")
        finished(client, failed)
        before = client.get(VIDEOS).json()
    engine = FakeEngine()
    with serving(tmp_path, engine) as client:
        assert client.get(VIDEOS).json() == before
        assert [video["id"] for video in before["data"]] == [cancelled, failed, done]
        assert [video["error"] and video["error"]["code"] for video in before["data"]] == [
            "cancelled",
            "generation_failed",
            None,
        ]
        assert content(client, done) == bytes_before
        assert client.get(f"{VIDEOS}/{failed}/content").json()["error"]["code"] == "video_failed"
    assert engine.requests == []


def test_a_queued_job_survives_a_restart(tmp_path: Path) -> None:
    """Also one with a picture, which is kept as it was decoded."""
    body = {"num_frames": 33, "seed": 5, "image": PNG}
    engine = FakeEngine(step_s=60)
    with serving(tmp_path / "one", engine) as client:
        video_id = create(client, "exact", steps=[1, 1, 1], **body)["id"]
    with serving(tmp_path / "one") as client:
        assert content(client, video_id) == undisturbed(tmp_path / "two", **body)


def test_one_server_for_each_data_directory(tmp_path: Path) -> None:
    with serving(tmp_path) as client:
        with pytest.raises(StoreStartError, match=str(tmp_path)):
            open_stores(StoreConfig(data_dir=tmp_path))
        assert content(client, create(client)["id"])
    open_stores(StoreConfig(data_dir=tmp_path)).close()


# The same with the real engine and a tiny checkpoint.

REAL: dict[str, Any] = {"size": "64x64", "seed": 5, "steps": [1, 1, 1], "reproducible": "strict", "fps": 24}


@asynccontextmanager
async def real_server(checkpoint: Path, data_dir: Path, **options: Any) -> AsyncIterator[httpx2.AsyncClient]:
    model = load_model(ModelConfig(model=str(checkpoint)))
    costs, metrics = cost_model(model.config, "cpu", is_shared=True), Metrics("helios-distilled")
    engine = AsyncEngine(local_executor(model), costs, EngineConfig().patient(), metrics)
    await engine.start()
    await engine.wait_ready()
    with parts_of(engine, data_dir, metrics, **options) as parts:
        async with calling(parts.app) as client:
            try:
                async with asyncio.timeout(60):
                    yield client
            finally:
                parts.service.refuse()
                await engine.close()


async def real_content(client: httpx2.AsyncClient, video_id: str) -> bytes:
    while (video := (await client.get(f"{VIDEOS}/{video_id}")).json())["status"] in ("queued", "in_progress"):
        await asyncio.sleep(0.02)
    assert video["status"] == "completed", video["error"]
    return (await client.get(f"{VIDEOS}/{video_id}/content")).content


async def real_id(client: httpx2.AsyncClient, path: str = VIDEOS, **body: Any) -> str:
    answer = await client.post(path, json={"prompt": "a fox", **body})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def num_frames(video: bytes) -> int:
    with av.open(io.BytesIO(video), "r") as container:
        return sum(1 for _ in container.decode(video=0))


def test_the_real_engine_goes_on_bit_for_bit(tiny_distilled: Path, tmp_path: Path) -> None:
    async def run() -> None:
        body = {**REAL, "num_frames": 8 * 33 - 5}
        async with real_server(tiny_distilled, tmp_path / "one") as client:
            video_id = await real_id(client, **body)
            url = f"{VIDEOS}/{video_id}"
            while (await client.get(url)).json()["helios"]["chunks_done"] < 2:
                await asyncio.sleep(0.01)
            assert (await client.get(url)).json()["status"] == "in_progress"
        async with real_server(tiny_distilled, tmp_path / "one") as client:
            made = await real_content(client, video_id)
        async with real_server(tiny_distilled, tmp_path / "two") as client:
            assert made == await real_content(client, await real_id(client, **body))
        assert num_frames(made) == 8 * 33 - 5

    asyncio.run(run())


@pytest.mark.parametrize(("source", "added"), [(66, 40), (40, 10), (40, 60)])
def test_the_real_engine_continues_a_video(tiny_distilled: Path, tmp_path: Path, source: int, added: int) -> None:
    async def run() -> None:
        async with real_server(tiny_distilled, tmp_path) as client:
            old = await real_id(client, **REAL, num_frames=source)
            before = await real_content(client, old)
            new = await real_id(client, f"{VIDEOS}/extensions", video={"id": old}, num_frames=added)
            made = await real_content(client, new)
            same = await real_content(client, await real_id(client, **REAL, num_frames=source + added))
        assert num_frames(made) == source + added
        num_kept = source // 33
        assert made.startswith(b"".join(split_segments(before)[:num_kept]))
        if (source + added - 1) // 33 == (source - 1) // 33:
            assert made == same, "no chunk was added, so that the new prompt has no effect"

    asyncio.run(run())


def split_segments(video: bytes) -> list[bytes]:
    """The fragments of an MP4, the first one with what stands before it."""
    starts, at = [0], 0
    while at < len(video):
        size, kind = int.from_bytes(video[at : at + 4], "big"), video[at + 4 : at + 8]
        if kind == b"moof":
            starts.append(at)
        at += size
    bounds = [0, *starts[2:], len(video)]
    return [video[start:end] for start, end in pairwise(bounds)]


# The end of a server.


def service_of(app: Any) -> Any:
    return next(route for route in app.routes if route.path == URL).endpoint.__self__._service


@asynccontextmanager
async def calling(app: FastAPI) -> AsyncIterator[httpx2.AsyncClient]:
    transport = httpx2.ASGITransport(app=app, client=("127.0.0.1", 1))
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=20) as client,
    ):
        yield client


async def drained(data_dir: Path, engine: FakeEngine, *calls: dict[str, Any]) -> list[httpx2.Response]:
    """The answers to calls that the server's end finds open."""
    with parts_of(engine, data_dir) as parts:
        async with calling(parts.app) as client:
            running = [asyncio.create_task(client.request(**call)) for call in calls]
            async with asyncio.timeout(10):
                while len(engine.requests) < len(calls):
                    await asyncio.sleep(0.01)
            await asyncio.sleep(10 * STEP_S)
            parts.service.refuse()
            refused = await client.post(URL, json={"prompt": "p"})
            health = await client.get("/health")
            await parts.service.close()
            async with asyncio.timeout(10):
                return [*await asyncio.gather(*running), refused, health]


@pytest.mark.parametrize("headers", [{}, {"accept": "video/mp4"}, {"prefer": "wait=60"}], ids=["json", "mp4", "wait"])
def test_a_synchronous_call_is_told_that_the_server_ends(tmp_path: Path, headers: dict[str, str]) -> None:
    body = {"prompt": "exact", "num_frames": 99, "seed": 5, "steps": [3, 3, 3]}
    call = {"method": "POST", "url": URL, "json": body, "headers": headers}
    engine = FakeEngine(step_s=STEP_S)
    answer, refused, health = asyncio.run(drained(tmp_path, engine, call))
    for told in (answer, refused):
        assert (told.status_code, told.json()["error"]["code"]) == (503, "draining")
        assert told.headers["retry-after"] == "1"
        assert "x-should-retry" not in told.headers
    assert (health.status_code, health.json()["status"]) == (503, "not_ready")
    with serving(tmp_path) as client:
        (video,) = client.get(VIDEOS).json()["data"]
        assert video["id"] == engine.requests[0].request_id
        assert content(client, video["id"]).count(b"[exact:") == 3


def test_streams_end_with_a_hint_to_come_back(tmp_path: Path) -> None:
    body = {"prompt": "exact", "num_frames": 99, "seed": 5, "steps": [3, 3, 3], "stream": True}
    engine = FakeEngine(step_s=STEP_S)
    answer, _, _ = asyncio.run(drained(tmp_path, engine, {"method": "POST", "url": URL, "json": body}))
    assert answer.status_code == 200
    assert answer.text.endswith("\n\nretry: 500\n\n")
    assert "event: error" not in answer.text
    with serving(tmp_path) as client:
        made = content(client, answer.headers["x-video-id"])
        rest = numbered(client.get(f"{VIDEOS}/{answer.headers['x-video-id']}/events").text)
    assert made.count(b"[exact:") == 3
    assert [event[0] for event in rest] == ["0", "1", "2", "3", "4"]


# The same call again.


def test_a_key_makes_one_job(client: TestClient, engine: FakeEngine) -> None:
    headers, body = {"idempotency-key": "k1"}, {"prompt": "p", "num_frames": 33}
    first = client.post(VIDEOS, json=body, headers=headers)
    again = client.post(VIDEOS, json={"num_frames": 33, "prompt": "p", "size": "640x384"}, headers=headers)
    assert again.json()["id"] == first.json()["id"]
    assert "idempotent-replayed" not in first.headers
    assert (again.status_code, again.headers["idempotent-replayed"]) == (200, "true")
    other = client.post(VIDEOS, json={**body, "seed": 5}, headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")
    assert other.headers["x-should-retry"] == "false"
    elsewhere = client.post(URL, json=body, headers=headers)
    assert elsewhere.json()["id"] != first.json()["id"], "a key belongs to one verb"
    assert client.post(VIDEOS, json=body).json()["id"] not in (first.json()["id"], elsewhere.json()["id"])
    for key in ("", "k" * 256):
        bad = client.post(VIDEOS, json=body, headers={"idempotency-key": key})
        assert (bad.status_code, bad.json()["error"]["param"]) == (400, "idempotency-key")
    wait_for(lambda: len(engine.requests) == 3)


def test_a_key_holds_over_a_restart_and_for_the_finished_video(tmp_path: Path) -> None:
    headers, body = {"idempotency-key": "k1"}, {"prompt": "exact", "num_frames": 33}
    with serving(tmp_path) as client:
        first = client.post(URL, json=body, headers=headers)
    with serving(tmp_path) as client:
        again = client.post(URL, json=body, headers=headers)
        assert again.headers["idempotent-replayed"] == "true"
        assert again.json() == first.json()
        mp4 = client.post(URL, json=body, headers={**headers, "accept": "video/mp4"})
        assert (mp4.status_code, mp4.headers["x-video-id"]) == (200, first.json()["id"])


def test_a_key_tells_pictures_apart(client: TestClient) -> None:
    headers = {"idempotency-key": "k1"}
    one, other = {"prompt": "p", "num_frames": 33, "image": PNG}, {"prompt": "p", "num_frames": 33}
    first = client.post(VIDEOS, json=one, headers=headers)
    assert client.post(VIDEOS, json=one, headers=headers).json()["id"] == first.json()["id"]
    assert client.post(VIDEOS, json=other, headers=headers).status_code == 422


def test_a_hundred_calls_at_once_with_one_key_make_one_job(client: TestClient, engine: FakeEngine) -> None:
    body, headers = {"prompt": "p", "num_frames": 33}, {"idempotency-key": "k1"}
    with ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(lambda _: client.post(VIDEOS, json=body, headers=headers), range(100)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sum("idempotent-replayed" not in answer.headers for answer in answers) == 1
    assert len(client.get(VIDEOS).json()["data"]) == 1
    assert len(engine.requests) == 1


def test_a_caller_that_joined_a_job_does_not_end_it(tmp_path: Path) -> None:
    """The one whose job it is waits on, and the guest leaves."""

    async def run() -> None:
        engine = FakeEngine(step_s=STEP_S)
        with parts_of(engine, tmp_path) as parts:
            async with calling(parts.app) as client:
                body, headers = {"prompt": "exact", "num_frames": 33}, {"idempotency-key": "k1"}
                first = asyncio.create_task(client.post(URL, json=body, headers=headers))
                while not engine.requests:
                    await asyncio.sleep(0.01)
                guest = asyncio.create_task(client.post(URL, json=body, headers=headers))
                await asyncio.sleep(0.05)
                guest.cancel()
                answer = await first
                assert (answer.status_code, answer.json()["object"]) == (200, "video.generation")
                assert "idempotent-replayed" not in answer.headers

    asyncio.run(run())


def test_a_retry_without_a_key_joins_its_job(client: TestClient, parts: Parts) -> None:
    retry = {"x-stainless-retry-count": "1"}
    body = {"prompt": "p", "num_frames": 33}
    first = client.post(VIDEOS, json=body, headers={"x-stainless-retry-count": "0"}).json()["id"]
    again = client.post(VIDEOS, json=body, headers=retry)
    assert (again.json()["id"], again.headers["idempotent-replayed"]) == (first, "true")
    finished(client, first)
    assert client.post(VIDEOS, json=body, headers=retry).json()["id"] == first, "also when it has ended well"
    assert client.post(VIDEOS, json={**body, "fps": 30}, headers=retry).json()["id"] != first
    fails = {"prompt": "fail generation_failed"}
    failed = client.post(VIDEOS, json=fails).json()["id"]
    finished(client, failed)
    assert client.post(VIDEOS, json=fails, headers=retry).json()["id"] != failed, "never a failed one"
    slow = {"prompt": "slow", "steps": [9, 9, 9]}
    cancelled = client.post(VIDEOS, json=slow).json()["id"]
    client.post(f"{VIDEOS}/{cancelled}/cancel")
    joined = client.post(VIDEOS, json=slow, headers=retry).json()["id"]
    assert joined != cancelled, "nor a cancelled one"
    client.delete(f"{VIDEOS}/{joined}")


# Jobs from jobs.


def test_a_remix_has_all_but_the_prompt(client: TestClient) -> None:
    wanted = {"num_frames": 70, "fps": 16, "steps": [1, 2, 1], "size": "704x384", "metadata": {"k": "v"}}
    old = create(client, "exact one", seed=7, **wanted)
    assert old["remixed_from_video_id"] is None
    content(client, old["id"])
    answer = client.post(f"{VIDEOS}/{old['id']}/remix", json={"prompt": "exact two"})
    assert answer.status_code == 200, answer.text
    remix = answer.json()
    assert (remix["remixed_from_video_id"], remix["prompt"]) == (old["id"], "exact two")
    assert remix["id"] != old["id"]
    for name in ("size", "seconds", "model"):
        assert remix[name] == old[name]
    for name in ("num_frames", "fps", "seed", "steps", "metadata"):
        assert remix["helios"][name] == old["helios"][name]
    same = content(client, create(client, "exact two", seed=7, **wanted)["id"])
    assert content(client, remix["id"]) == same
    assert client.get(f"{VIDEOS}/{remix['id']}").json()["remixed_from_video_id"] == old["id"]


def test_a_remix_keeps_the_picture(client: TestClient) -> None:
    old = create(client, "exact one", seed=7, image=PNG)["id"]
    content(client, old)
    remix = client.post(f"{VIDEOS}/{old}/remix", json={"prompt": "exact two"}).json()["id"]
    same = content(client, create(client, "exact two", seed=7, image=PNG)["id"])
    assert content(client, remix) == same
    assert same != content(client, create(client, "exact two", seed=7)["id"])


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "prompt", "missing_required_parameter"),
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": "p", "seed": 1}, "seed", "unknown_parameter"),
        ({"prompt": 3}, "prompt", "invalid_value"),
    ],
)
def test_bad_remixes(client: TestClient, body: dict[str, Any], param: str, code: str) -> None:
    old = create(client)["id"]
    answer = client.post(f"{VIDEOS}/{old}/remix", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code), error


def test_a_remix_of_nothing(client: TestClient) -> None:
    answer = client.post(f"{VIDEOS}/video_0/remix", json={"prompt": "p"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "video_not_found")


def test_a_remix_has_its_own_idempotency(client: TestClient) -> None:
    old, headers = create(client)["id"], {"idempotency-key": "k1"}
    url = f"{VIDEOS}/{old}/remix"
    first = client.post(url, json={"prompt": "q"}, headers=headers).json()["id"]
    again = client.post(url, json={"prompt": "q"}, headers=headers)
    assert (again.json()["id"], again.headers["idempotent-replayed"]) == (first, "true")
    assert client.post(url, json={"prompt": "r"}, headers=headers).status_code == 422


def extend(client: TestClient, video_id: str, **body: Any) -> dict[str, Any]:
    answer = client.post(f"{VIDEOS}/extensions", json={"prompt": "exact on", "video": {"id": video_id}, **body})
    assert answer.status_code == 200, answer.text
    video: dict[str, Any] = answer.json()
    return video


def media_of(client: TestClient, video_id: str) -> list[bytes]:
    """The segments of a finished video, the first without its init."""
    events = numbered(client.get(f"{VIDEOS}/{video_id}/events").text)
    partials = [data for _, event, data in events if event == "video_generation.partial_video"]
    assert [data["partial_video_index"] for data in partials] == list(range(len(partials)))
    assert [data["start_frame"] for data in partials] == [33 * index for index in range(len(partials))]
    return [base64.b64decode(data["b64_json"]).removeprefix(b"INIT") for data in partials]


def test_an_extension_continues_a_video(client: TestClient, engine: FakeEngine) -> None:
    old = create(client, "exact", num_frames=132, seed=5, fps=24, steps=[1, 1, 1])["id"]
    content(client, old)
    video = extend(client, old, num_frames=99)
    assert video["helios"]["extended_from_video_id"] == old
    assert (video["seconds"], video["helios"]["num_frames"], video["helios"]["num_chunks"]) == ("9.625", 231, 7)
    made = content(client, video["id"])
    assert engine.resumed[-1].next_chunk == 4, "nothing of the source is made again"
    assert engine.resumed[-1].undecoded == ()
    segments = media_of(client, video["id"])
    assert segments[:4] == media_of(client, old)
    assert len(segments) == 7
    assert made == b"INIT" + b"".join(segments)
    schedule = [{"prompt": "exact"}, {"prompt": "exact on", "chunk": 4}]
    whole = {"prompts": schedule, "num_frames": 231, "seed": 5, "steps": [1, 1, 1]}
    same = client.post(VIDEOS, json=whole).json()["id"]
    assert made == content(client, same), "as if it had been asked for at once"


def test_an_extension_in_seconds_of_a_pruned_source(client: TestClient, parts: Parts) -> None:
    """What extending needs outlives the tidying of a finished job; the source may go as soon as the new job is made."""
    old = create(client, "exact", num_frames=6 * 33, seed=5, fps=24, steps=[1, 1, 1])["id"]
    content(client, old)
    before = media_of(client, old)
    assert client.portal is not None
    client.portal.call(parts.stores.retention.tidy)
    video = extend(client, old, seconds=2.75)
    assert client.delete(f"{VIDEOS}/{old}").status_code == 200
    content(client, video["id"])
    assert video["helios"]["num_frames"] == 6 * 33 + 66
    assert media_of(client, video["id"])[:6] == before


@pytest.mark.parametrize("added", [10, 26, 40, 100])
def test_an_extension_brings_trimmed_frames_back(client: TestClient, added: int) -> None:
    """The last segment of a trimmed source is encoded again; those before it are kept as they are."""
    old = create(client, "exact", num_frames=40, seed=5, steps=[1, 1, 1])["id"]
    content(client, old)
    video = extend(client, old, num_frames=added)
    made = content(client, video["id"])
    assert video["helios"]["num_frames"] == 40 + added
    assert media_of(client, video["id"])[0] == media_of(client, old)[0]
    assert made.count(b"[exact:") == -(-(40 + added) // 33)
    events = numbered(client.get(f"{VIDEOS}/{video['id']}/events").text)
    counts = [data["num_frames"] for _, event, data in events if event == "video_generation.partial_video"]
    assert sum(counts) == 40 + added


def test_an_extension_of_an_extension_over_a_restart(tmp_path: Path) -> None:
    with serving(tmp_path) as client:
        one = create(client, "exact", num_frames=33, seed=5, steps=[1, 1, 1])["id"]
        content(client, one)
        two = extend(client, one, num_frames=33)["id"]
        content(client, two)
    with serving(tmp_path, FakeEngine(step_s=STEP_S)) as client:
        three = extend(client, two, num_frames=99)["id"]
        wait_for(lambda: chunks_done(client, three) >= 3)
    with serving(tmp_path) as client:
        made = content(client, three)
        assert media_of(client, three)[:2] == media_of(client, two)
        assert made.count(b"[exact:") == 5


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"prompt": "p"}, "video", "missing_required_parameter"),
        ({"prompt": "p", "video": {}}, "video", "missing_required_parameter"),
        ({"video": {"id": "video_0"}}, "prompt", "missing_required_parameter"),
        ({"prompt": "p", "video": {"id": "video_0"}, "num_frames": 0}, "num_frames", "invalid_value"),
        ({"prompt": "p", "video": {"id": "video_0"}, "seconds": -1}, "seconds", "invalid_value"),
        ({"prompt": "p", "video": {"id": "video_0"}, "seed": 1}, "seed", "unknown_parameter"),
    ],
)
def test_bad_extensions(client: TestClient, body: dict[str, Any], param: str, code: str) -> None:
    answer = client.post(f"{VIDEOS}/extensions", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code), error


def test_an_extension_has_the_limits_of_a_request(client: TestClient) -> None:
    old = create(client, "exact", num_frames=40)["id"]
    finished(client, old)
    body = {"prompt": "p", "video": {"id": old}}
    for added in ({"num_frames": 7221}, {"seconds": 400}):
        error = client.post(f"{VIDEOS}/extensions", json={**body, **added}).json()["error"]
        assert (error["code"], error["param"]) == ("invalid_value", next(iter(added)))
        assert "at most 7260" in error["message"]
    other = client.post(f"{VIDEOS}/extensions", json={**body, "model": "another"})
    assert (other.status_code, other.json()["error"]["code"]) == (404, "model_not_found")
    assert client.post(f"{VIDEOS}/extensions", json={**body, "model": "helios-distilled"}).status_code == 200


def test_only_a_finished_video_is_extended(client: TestClient) -> None:
    body = {"prompt": "p", "video": {"id": "video_0"}}
    assert client.post(f"{VIDEOS}/extensions", json=body).status_code == 404
    running = create(client, "slow", steps=[9, 9, 9])["id"]
    early = client.post(f"{VIDEOS}/extensions", json={"prompt": "p", "video": {"id": running}})
    assert (early.status_code, early.json()["error"]["code"]) == (409, "video_not_ready")
    client.delete(f"{VIDEOS}/{running}")
    failed = create(client, "fail generation_failed")["id"]
    finished(client, failed)
    assert client.post(f"{VIDEOS}/extensions", json={"prompt": "p", "video": {"id": failed}}).status_code == 409


def test_an_extension_as_a_form(client: TestClient) -> None:
    """As the SDK sends it."""
    old = create(client, "exact", steps=[1, 1, 1])["id"]
    content(client, old)
    form = {"prompt": (None, "exact on"), "video[id]": (None, old), "seconds": (None, "1.375")}
    answer = client.post(f"{VIDEOS}/extensions", files=form)
    assert answer.status_code == 200, answer.text
    assert answer.json()["seconds"] == "2.75"


@pytest.mark.parametrize(("method", "path"), [("POST", "edits"), ("POST", "characters"), ("GET", "characters/char_1")])
def test_what_the_model_cannot_do(client: TestClient, method: str, path: str) -> None:
    answer = client.request(method, f"{VIDEOS}/{path}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (501, "unsupported_operation")
    assert answer.headers["x-should-retry"] == "false"


# The end of a video.


def test_a_deleted_video_stays_away(tmp_path: Path) -> None:
    with serving(tmp_path) as client:
        done, running = create(client, "exact")["id"], create(client, "slow", steps=[9, 9, 9])["id"]
        content(client, done)
        for video_id in (done, running):
            assert client.delete(f"{VIDEOS}/{video_id}").json()["deleted"]
    engine = FakeEngine()
    with serving(tmp_path, engine) as client:
        for video_id in (done, running):
            for path in ("", "/content", "/events", "/stream", "/hls/index.m3u8"):
                assert client.get(f"{VIDEOS}/{video_id}{path}").status_code == 404
            assert client.delete(f"{VIDEOS}/{video_id}").status_code == 404
            assert client.post(f"{VIDEOS}/{video_id}/remix", json={"prompt": "p"}).status_code == 404
        assert client.get(VIDEOS).json()["data"] == []
    assert engine.requests == []


def test_an_expired_video_is_known_but_gone(client: TestClient, parts: Parts) -> None:
    video_id = create(client, "exact", expires_after={"seconds": 3600})["id"]
    content(client, video_id)
    video = client.get(f"{VIDEOS}/{video_id}").json()
    assert video["expires_at"] - video["completed_at"] in (3600, 3601)
    assert client.portal is not None
    client.portal.call(_let_expire, parts, video_id)
    video = client.get(f"{VIDEOS}/{video_id}").json()
    assert (video["status"], video["progress"], video["helios"]["state"]) == ("completed", 100, "expired")
    for path in ("content", "content?variant=thumbnail", "content?variant=last_frame", "stream", "hls/index.m3u8"):
        answer = client.get(f"{VIDEOS}/{video_id}/{path}")
        assert (path, answer.status_code, answer.json()["error"]["code"]) == (path, 410, "video_expired")
    assert client.post(f"{VIDEOS}/extensions", json={"prompt": "p", "video": {"id": video_id}}).status_code == 409
    assert [item["id"] for item in client.get(VIDEOS, params={"status": "completed"}).json()["data"]] == [video_id]


async def _let_expire(parts: Parts, video_id: str) -> None:
    import sqlalchemy as sa

    from helios_serve.store.schema import job

    def age(connection: sa.Connection) -> None:
        connection.execute(sa.update(job).where(job.c.id == video_id).values(expires_at=1.0))

    await parts.stores.database.write(age)
    await parts.stores.retention.tidy()


# What is taken now.


def test_a_job_that_waits_too_long_fails(client: TestClient, engine: FakeEngine) -> None:
    engine.step_s = 60  # of the steps; the chunk itself begins at once
    begun = create(client, queue_timeout=0.05)["id"]
    wait_for(lambda: client.get(f"{VIDEOS}/{begun}").json()["status"] == "in_progress")
    time.sleep(0.2)
    assert client.get(f"{VIDEOS}/{begun}").json()["status"] == "in_progress", "it waits no more"
    client.delete(f"{VIDEOS}/{begun}")


def test_priority_and_class_reach_the_engine(client: TestClient, engine: FakeEngine) -> None:
    create(client, priority=3, service_class="realtime", reproducible="strict")
    wait_for(lambda: bool(engine.requests))
    request = engine.requests[0]
    assert (request.priority, request.service_class, request.is_strict) == (3, "realtime", True)
