"""Streams, jobs and their lists over the real application: what is sent, in which order, and what a viewer that leaves
or comes back finds."""

from __future__ import annotations

import base64
import json
import threading
import time
from typing import Any

import httpx2
import openai
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from helios_serve.api import streaming
from helios_serve.api.mime import codec_of, mime_type_of
from helios_serve.workers.segment import SegmentSpec, encode_segment
from tests.api.conftest import client_of

URL = "/v1/videos/generations"


def events_of(text: str) -> list[tuple[str | None, str, dict[str, Any]]]:
    """(id, event, data) of each event; comments are left out."""
    found = []
    for block in text.strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if lines:
            found.append((lines.get("id"), lines["event"], json.loads(lines["data"])))
    return found


def create(client: TestClient, prompt: str = "p", **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/videos", json={"prompt": prompt, "num_frames": 33, **body})
    assert answer.status_code == 200, answer.text
    video: dict[str, Any] = answer.json()
    return video


def finished(client: TestClient, video_id: str) -> dict[str, Any]:
    for _ in range(500):
        video: dict[str, Any] = client.get(f"/v1/videos/{video_id}").json()
        if video["status"] in ("completed", "failed"):
            return video
        time.sleep(0.01)
    raise AssertionError("not finished")


def test_events_of_a_generation(client: TestClient) -> None:
    answer = client.post(URL, json={"prompt": "p", "num_frames": 99, "stream": True, "seed": 5})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"
    events = events_of(answer.text)
    assert [event for _, event, _ in events if "progress" not in event and "queued" not in event] == [
        "video_generation.created",
        *["video_generation.partial_video"] * 3,
        "video_generation.completed",
    ]
    assert [number for number, event, _ in events if number is not None] == ["0", "1", "2", "3", "4"]
    created, completed = events[0][2], events[-1][2]
    assert (created["num_frames"], created["num_chunks"], created["seed"], created["fps"]) == (99, 3, 5, 24)
    assert created["recommended_playback_rate"] == 0.5, "half as fast as it plays"
    assert created["recommended_preroll_seconds"] == 2.75
    partials = [data for _, event, data in events if event == "video_generation.partial_video"]
    assert [p["start_frame"] for p in partials] == [0, 33, 66]
    assert b"".join(base64.b64decode(p["b64_json"]) for p in partials) == b"INIT[p:0][p:1][p:2]"
    assert completed["video"]["status"] == "completed"
    assert client.get(completed["url"]).content == b"INIT[p:0][p:1][p:2]"
    steps = [data for _, event, data in events if event == "video_generation.progress"]
    assert all(0 <= step["progress"] <= 100 and step["num_chunks"] == 3 for step in steps)


def test_progress_alone(client: TestClient) -> None:
    body = {"prompt": "p", "num_frames": 66, "stream": True, "partial_videos": 0}
    kinds = {event for _, event, _ in events_of(client.post(URL, json=body).text)}
    assert "video_generation.partial_video" not in kinds
    assert "video_generation.completed" in kinds


def test_a_viewer_comes_back_without_gap_or_repeat(client: TestClient) -> None:
    video_id = create(client, num_frames=165)["id"]
    finished(client, video_id)
    url = f"/v1/videos/{video_id}/events"
    whole = [row for row in events_of(client.get(url).text) if row[0] is not None]
    assert [row[0] for row in whole] == [str(number) for number in range(7)]
    for last in range(6):
        rest = [row for row in events_of(client.get(url, headers={"last-event-id": str(last)}).text) if row[0]]
        assert [row[0] for row in rest] == [str(number) for number in range(last + 1, 7)]
        assert [row[2] for row in rest[:-1]] == [row[2] for row in whole[last + 1 : -1]]
    bad = client.get(url, headers={"last-event-id": "x"})
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "last-event-id")


def test_live_fmp4_and_the_stream_of_a_finished_job(client: TestClient) -> None:
    body = {"prompt": "p", "num_frames": 99, "stream": True}
    answer = client.post(URL, json=body, headers={"accept": "video/mp4"})
    assert answer.headers["content-type"] == "video/mp4"
    assert answer.headers["accept-ranges"] == "none"
    assert answer.content == b"INIT[p:0][p:1][p:2]"
    stream = f"/v1/videos/{answer.headers['x-video-id']}/stream"
    assert client.get(stream).content == b"INIT[p:0][p:1][p:2]"
    assert client.get(stream, params={"from_segment": 2}).content == b"INIT[p:2]"
    bad = client.get(stream, params={"from_segment": 3})
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "from_segment")
    assert client.get("/v1/videos/video_0/stream").status_code == 404


def test_a_failure_is_the_last_event(client: TestClient) -> None:
    events = events_of(client.post(URL, json={"prompt": "fail worker_lost", "stream": True}).text)
    assert [event for _, event, _ in events if "queued" not in event] == ["video_generation.created", "error"]
    assert events[-1][2]["error"]["code"] == "worker_lost"


@pytest.mark.parametrize(("detach", "ends"), [(False, "failed"), (True, "completed")])
def test_a_viewer_that_leaves_ends_the_job_unless_it_is_detached(server: str, detach: bool, ends: str) -> None:
    with httpx2.Client(base_url=server) as client:
        body = {"prompt": "slow", "num_frames": 33, "stream": True, "detach": detach, "steps": [4, 4, 4]}
        with client.stream("POST", URL, json=body) as answer:
            video_id = answer.headers["x-video-id"]
            next(answer.iter_bytes())
        video: dict[str, Any] = {}
        for _ in range(400):
            video = client.get(f"/v1/videos/{video_id}").json()
            if video["status"] in ("completed", "failed"):
                break
            time.sleep(0.02)
        assert video["status"] == ends
        assert (video["error"] or {"code": None})["code"] == (None if detach else "cancelled")


def test_watching_never_ends_a_job(server: str) -> None:
    with httpx2.Client(base_url=server) as client:
        made = client.post("/v1/videos", json={"prompt": "slow", "num_frames": 33, "steps": [4, 4, 4]}).json()
        for path in ("events", "stream"):
            with client.stream("GET", f"/v1/videos/{made['id']}/{path}") as answer:
                assert answer.status_code == 200
        for _ in range(400):
            video = client.get(f"/v1/videos/{made['id']}").json()
            if video["status"] == "completed":
                return
            time.sleep(0.02)
        raise AssertionError(video)


def test_a_video_that_is_deleted_ends_its_viewers(server: str) -> None:
    with httpx2.Client(base_url=server) as client:
        video_id = client.post("/v1/videos", json={"prompt": "slow", "num_frames": 990}).json()["id"]
        with client.stream("GET", f"/v1/videos/{video_id}/events") as answer:
            pieces = answer.iter_text()
            text = next(pieces)
            client.delete(f"/v1/videos/{video_id}")
            text += "".join(pieces)
        assert events_of(text)[-1][1:] == ("error", {"error": events_of(text)[-1][2]["error"]})
        assert events_of(text)[-1][2]["error"]["code"] == "video_not_found"
        assert client.get(f"/v1/videos/{video_id}").status_code == 404


def test_segments_come_before_the_end(server: str) -> None:
    """Live means live: the first segment is there while later chunks are still made."""
    with httpx2.Client(base_url=server) as client:
        body = {"prompt": "slow", "num_frames": 99, "stream": True, "steps": [1, 1, 1]}
        with client.stream("POST", URL, json=body, headers={"accept": "video/mp4"}) as answer:
            pieces = answer.iter_bytes()
            assert next(pieces).startswith(b"INIT[slow:0]")
            video = client.get(f"/v1/videos/{answer.headers['x-video-id']}").json()
            assert video["status"] == "in_progress"
            assert b"".join(pieces) == b"[slow:1][slow:2]"


def test_a_segment_of_several_pieces_is_whole(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    assert streaming.PIECE_BYTES % 3 == 0  # base64 of pieces has no seam
    monkeypatch.setattr(streaming, "PIECE_BYTES", 3)
    body = {"prompt": "p", "num_frames": 66, "stream": True}
    events = events_of(client.post(URL, json=body).text)
    media = [base64.b64decode(data["b64_json"]) for _, event, data in events if event.endswith("partial_video")]
    assert media == [b"INIT[p:0]", b"[p:1]"]
    assert client.post(URL, json=body, headers={"accept": "video/mp4"}).content == b"INIT[p:0][p:1]"


def test_asynchronous_generation(client: TestClient) -> None:
    for headers, extra in (({"prefer": "respond-async"}, {}), ({}, {"async": True}), ({"prefer": "wait=0"}, {})):
        answer = client.post(URL, json={"prompt": "slow", "num_frames": 33, **extra}, headers=headers)
        assert answer.status_code == 202
        video = answer.json()
        assert video["request_id"] == video["id"]
        assert answer.headers["location"] == f"/v1/videos/{video['id']}"
        assert finished(client, video["id"])["status"] == "completed"
    waited = client.post(URL, json={"prompt": "p", "num_frames": 33}, headers={"prefer": "wait=20"})
    assert (waited.status_code, waited.json()["object"]) == (200, "video.generation")


def test_jobs_are_created_listed_cancelled_and_deleted(client: TestClient) -> None:
    ids = [create(client, f"p{index}")["id"] for index in range(5)]
    for video_id in ids:
        finished(client, video_id)
    newest = client.get("/v1/videos", params={"limit": 2}).json()
    assert [video["id"] for video in newest["data"]] == ids[:2:-1]
    assert (newest["first_id"], newest["last_id"], newest["has_more"]) == (ids[4], ids[3], True)
    rest = client.get("/v1/videos", params={"limit": 10, "after": newest["last_id"]}).json()
    assert [video["id"] for video in rest["data"]] == ids[2::-1]
    assert not rest["has_more"]
    oldest = client.get("/v1/videos", params={"order": "asc"}).json()
    assert [video["id"] for video in oldest["data"]] == ids
    assert client.get("/v1/videos", params={"status": "queued"}).json()["data"] == []
    assert client.post(f"/v1/videos/{ids[0]}/cancel").json()["status"] == "completed", "finished: unchanged"
    running = create(client, "slow", steps=[9, 9, 9])["id"]
    cancelled = client.post(f"/v1/videos/{running}/cancel").json()
    assert (cancelled["status"], cancelled["error"]["code"]) == ("failed", "cancelled")
    assert client.delete(f"/v1/videos/{ids[0]}").json() == {"id": ids[0], "object": "video.deleted", "deleted": True}
    for path in ("", "/content", "/events", "/stream"):
        assert client.get(f"/v1/videos/{ids[0]}{path}").status_code == 404
    assert client.delete(f"/v1/videos/{ids[0]}").status_code == 404


def test_deleting_a_running_job_ends_it(client: TestClient, engine: Any) -> None:
    video_id = create(client, "slow", steps=[9, 9, 9])["id"]
    while client.get(f"/v1/videos/{video_id}").json()["status"] != "in_progress":
        time.sleep(0.01)
    assert client.delete(f"/v1/videos/{video_id}").json()["deleted"]
    assert engine.cancelled == [video_id]
    assert client.get(f"/v1/videos/{video_id}").status_code == 404


def test_pictures_of_a_video(client: TestClient) -> None:
    video_id = create(client, num_frames=66)["id"]
    finished(client, video_id)
    content = f"/v1/videos/{video_id}/content"
    expected = {
        "thumbnail": (b"thumbnail of [p:0]", "image/webp"),
        "last_frame": (b"last frame of [p:1]", "image/png"),
        "spritesheet": (b"every 24th of [p:0][p:1]", "image/jpeg"),
    }
    for variant, (body, media_type) in expected.items():
        answer = client.get(content, params={"variant": variant})
        assert (answer.content, answer.headers["content-type"]) == (body, media_type)
    slow = create(client, "slow", num_frames=99, steps=[1, 1, 1])["id"]
    early = client.get(f"/v1/videos/{slow}/content", params={"variant": "thumbnail"})
    assert (early.status_code, early.json()["error"]["code"]) == (409, "video_not_ready")
    while client.get(f"/v1/videos/{slow}").json()["helios"]["chunks_done"] == 0:
        time.sleep(0.01)
    assert client.get(f"/v1/videos/{slow}/content", params={"variant": "thumbnail"}).status_code == 200
    assert client.get(f"/v1/videos/{slow}/content", params={"variant": "last_frame"}).status_code == 409


def test_the_playground_is_the_root(client: TestClient) -> None:
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert client.get("/", headers={"if-none-match": page.headers["etag"]}).status_code == 304
    assert client.get("/playground/app.js").headers["content-type"].startswith("text/javascript")
    assert client.get("/playground/none.js").status_code == 404


@pytest.mark.parametrize(
    ("query", "param"),
    [({"limit": 0}, "limit"), ({"limit": 101}, "limit"), ({"order": "up"}, "order"), ({"status": "odd"}, "status")],
)
def test_bad_pages(client: TestClient, query: dict[str, Any], param: str) -> None:
    answer = client.get("/v1/videos", params=query)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert client.get("/v1/videos", params={"after": "video_0"}).status_code == 404


@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
def test_the_sdk_lists_polls_and_deletes(server: str) -> None:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="unused", max_retries=0) as client:
        made: Any = client.post("/videos", body={"prompt": "slow", "num_frames": 33}, cast_to=object)
        video = client.videos.poll(made["id"])
        assert video.status == "completed"
        sdk = client.videos.create(prompt="p", size="640x384", seconds="4")  # type: ignore[arg-type]
        assert client.videos.poll(sdk.id).seconds == "4"
        for index in range(9):
            client.post("/videos", body={"prompt": f"p{index}", "num_frames": 33}, cast_to=object)
        assert len({item.id for item in client.videos.list(limit=3)}) == 11
        assert client.videos.delete(made["id"]).deleted
        with pytest.raises(openai.NotFoundError):
            client.videos.retrieve(made["id"])
        stream: Any = client.post(
            "/videos/generations",
            body={"prompt": "p", "num_frames": 66, "stream": True},
            cast_to=object,
            stream=True,
            stream_cls=openai.Stream[object],
        )
        kinds = [event["type"] for event in stream]
        assert (kinds[0], kinds[-1]) == ("video_generation.created", "video_generation.completed")
        assert kinds.count("video_generation.partial_video") == 2


def test_many_viewers_of_one_job_see_the_same(app: FastAPI) -> None:
    with client_of(app) as client:
        video_id = create(client, "slow", num_frames=99, steps=[1, 1, 1])["id"]
        seen: list[bytes] = []
        threads = [
            threading.Thread(target=lambda: seen.append(client.get(f"/v1/videos/{video_id}/stream").content))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen == [b"INIT[slow:0][slow:1][slow:2]"] * 8


@pytest.mark.parametrize(("codec", "name"), [("h264", "avc1.42c0"), ("vp9", "vp09.00."), ("av1", "av01.0.")])
def test_the_codec_is_read_from_the_init_segment(codec: Any, name: str) -> None:
    import numpy as np

    spec = SegmentSpec(width=64, height=64, fps=24, crf=30, codec=codec)
    init, _ = encode_segment(np.full((3, 96, 64), 128, np.uint8), spec, 0, 0)
    found = codec_of(init)
    assert found is not None
    assert found.startswith(name)
    assert mime_type_of(init) == f'video/mp4; codecs="{found}"'
    assert mime_type_of(b"none") == "video/mp4"
