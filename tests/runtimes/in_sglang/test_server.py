"""`sglang serve --model-path CHECKPOINT` with this package beside it: files, sessions, progress and refusals over HTTP
and WebSocket."""

from __future__ import annotations

import base64
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import msgspec.msgpack
import numpy as np
import pytest
from PIL import Image
from websockets.sync.client import connect

from tests.conftest import MakeCheckpoint
from tests.runtimes.in_sglang.conftest import STEPS, Native, Server, StartServer
from tests.runtimes.in_sglang.served import LOSSLESS, content, finished, play, post
from tests.runtimes.pictures import MAX_LUMA_ERROR, PIXELS, as_mp4, luma, luma_of

pytestmark = pytest.mark.timeout(1800)  # each process that SGLang starts imports for half a minute

BATCHING = ("--batching-max-size", "3", "--batching-delay-ms", "1500")


@pytest.fixture(scope="module", params=["base", "mid", "distilled"])
def server(request: pytest.FixtureRequest, start_server: StartServer, make_checkpoint: MakeCheckpoint) -> Server:
    return start_server(make_checkpoint(request.param), *BATCHING)


@pytest.fixture(scope="module")
def distilled(server: Server) -> Server:
    if server.variant != "distilled":
        pytest.skip("once is enough")
    return server


def test_the_log_names_the_backend(server: Server) -> None:
    assert re.search(rf"helios-serve \S+ runs \S+ \({server.variant}\) on cpu", server.log.read_text())


@pytest.mark.parametrize("task", ["t2v", "i2v", "v2v"])
def test_a_file_is_the_engine_s_video(
    task: str, server: Server, make_checkpoint: MakeCheckpoint, native: Native, tmp_path: Path
) -> None:
    steps = STEPS[server.variant]
    form: dict[str, Any] = {"prompt": "a fox", "size": "64x64", "seed": "7", "num_frames": "40", **LOSSLESS}
    own: dict[str, Any] = {}
    files: dict[str, Any] = {"unused": ("", b"")}
    if task == "i2v":
        Image.fromarray(PIXELS[0]).save(tmp_path / "first.png")
        files = {"input_reference": ("first.png", (tmp_path / "first.png").read_bytes(), "image/png")}
        own = {"image": str(tmp_path / "first.png")}
    if task == "v2v":
        (tmp_path / "clip.mp4").write_bytes(as_mp4(PIXELS))
        files = {"video_reference": ("clip.mp4", (tmp_path / "clip.mp4").read_bytes(), "video/mp4")}
        own = {"video": str(tmp_path / "clip.mp4")}
    data = {**form, "extra_params": json.dumps({"steps": steps})}
    answer = httpx.post(f"{server.url}/v1/videos", data=data, files=files, timeout=120)
    made = luma(content(server, answer))
    expected = luma_of(native(make_checkpoint(server.variant), "a fox", num_frames=40, steps=steps, **own))
    assert made.shape == expected.shape
    assert np.abs(made - expected).mean() < MAX_LUMA_ERROR


def test_json_says_the_same(distilled: Server, tiny_distilled: Path, native: Native) -> None:
    made = luma(content(distilled, post(distilled, steps=[1, 2, 1])))
    expected = luma_of(native(tiny_distilled, "a fox", num_frames=40, steps=[1, 2, 1]))
    assert np.abs(made - expected).mean() < MAX_LUMA_ERROR


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"size": "65x64"}, "nearest: 64x64"),
        ({"steps": [1]}, "needs 3 numbers"),
        ({"colour": "red"}, "colour: unknown parameter"),
        ({"num_inference_steps": 5}, "3 stages"),
        ({"enable_teacache": True}, "enable_teacache: not with Helios"),
        ({"input_reference": "data:image/png;base64,AAAA"}, "image"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(fields: dict[str, Any], said: str, distilled: Server) -> None:
    answer = post(distilled, **fields)
    assert answer.status_code == 400, answer.text
    assert said in answer.text


def test_progress_is_told_while_a_video_is_made(distilled: Server) -> None:
    video_id = post(distilled, num_frames=660).json()["id"]
    told = set()
    while (job := httpx.get(f"{distilled.url}/v1/videos/{video_id}", timeout=60).json())["status"] != "completed":
        assert job["status"] != "failed", job
        told.add(job["progress"])
        time.sleep(0.05)
    assert len(told) > 3
    assert all(0 <= progress < 100 for progress in told)


def test_requests_at_a_time_are_one_batch_and_the_engine_s_videos(
    distilled: Server, tiny_distilled: Path, native: Native
) -> None:
    asked: list[dict[str, Any]] = [
        {"prompt": "a fox", "num_frames": 66},
        {"prompt": "a dog", "num_frames": 40, "size": "128x64"},
        {"prompt": "a cat", "num_frames": 33, "seed": 9},
    ]
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda fields: post(distilled, **fields), asked))
    for answer, fields in zip(answers, asked, strict=True):
        made = luma(content(distilled, answer))
        expected = luma_of(native(tiny_distilled, **fields))
        assert made.shape == expected.shape
        assert np.abs(made - expected).mean() < MAX_LUMA_ERROR
    assert "Processed native grouped batch of 3/3" in distilled.log.read_text()


def test_several_outputs_of_a_request(distilled: Server, tiny_distilled: Path, native: Native) -> None:
    job = finished(distilled, post(distilled, n=2, num_frames=33).json()["id"])
    assert job["status"] == "completed", job
    assert job["num_outputs"] == 2
    for number in range(2):
        address = f"{distilled.url}/v1/videos/{job['id']}/content?variant={number}"
        made = luma(httpx.get(address, timeout=60).content)
        expected = luma_of(native(tiny_distilled, "a fox", num_frames=33, seed=7 + number))
        assert np.abs(made - expected).mean() < MAX_LUMA_ERROR


@pytest.mark.parametrize("task", ["t2v", "i2v", "v2v"])
def test_a_session_plays_chunk_by_chunk(
    task: str, server: Server, make_checkpoint: MakeCheckpoint, native: Native, tmp_path: Path
) -> None:
    steps = STEPS[server.variant]
    first: dict[str, Any] = {}
    own: dict[str, Any] = {}
    if task == "i2v":
        Image.fromarray(PIXELS[0]).save(tmp_path / "first.png")
        first = {"first_frame": (tmp_path / "first.png").read_bytes()}
        own = {"image": str(tmp_path / "first.png")}
    if task == "v2v":
        (tmp_path / "clip.mp4").write_bytes(as_mp4(PIXELS))
        clip = base64.b64encode((tmp_path / "clip.mp4").read_bytes()).decode()
        first = {"video_path": f"data:video/mp4;base64,{clip}"}
        own = {"video": str(tmp_path / "clip.mp4")}
    chunks, _ = play(server, {"num_frames": 70, "steps": steps, **first}, {})
    assert [len(chunk) for chunk in chunks] == [33, 33, 4]
    expected = native(make_checkpoint(server.variant), "a fox", num_frames=70, steps=steps, **own)
    assert np.array_equal(np.concatenate(chunks), expected)


@pytest.mark.parametrize("change", ["a dog", {"prompt": "a dog", "transition_chunks": 0}])
def test_a_changed_prompt_shows_from_the_next_chunk_on(
    change: Any, distilled: Server, tiny_distilled: Path, native: Native
) -> None:
    chunks, events = play(distilled, {"max_chunks": 12, "steps": [1, 1, 1]}, {1: change})
    assert len(chunks) == 12
    changed = events.index(1)
    assert 2 <= changed < 12
    schedule: list[dict[str, Any]] = [{"prompt": "a fox"}, {"prompt": "a dog", "chunk": changed}]
    if not isinstance(change, str):
        schedule[1]["transition_chunks"] = 0
    expected = native(tiny_distilled, prompts=schedule, num_frames=33 * 12, steps=[1, 1, 1])
    assert np.array_equal(np.concatenate(chunks), expected)
    unchanged = native(tiny_distilled, "a fox", num_frames=33 * 12, steps=[1, 1, 1])
    assert not np.array_equal(unchanged[33 * changed :], expected[33 * changed :])


def test_a_file_and_a_session_at_a_time_are_the_engine_s(
    distilled: Server, tiny_distilled: Path, native: Native
) -> None:
    with ThreadPoolExecutor(1) as pool:
        session = pool.submit(play, distilled, {"num_frames": 132, "steps": [1, 1, 1]}, {})
        made = luma(content(distilled, post(distilled, prompt="a dog", num_frames=66)))
        chunks, _ = session.result()
    assert np.array_equal(np.concatenate(chunks), native(tiny_distilled, "a fox", num_frames=132, steps=[1, 1, 1]))
    assert np.abs(made - luma_of(native(tiny_distilled, "a dog", num_frames=66))).mean() < MAX_LUMA_ERROR


def test_a_session_that_is_left_makes_room_for_the_next(distilled: Server) -> None:
    with connect(distilled.url.replace("http", "ws") + "/v1/realtime_video/generate", max_size=None) as socket:
        start = {"type": "init", "prompt": "a fox", "size": "64x64", "steps": [1, 1, 1]}
        socket.send(msgspec.msgpack.encode(start))
        socket.recv(timeout=120)
    chunks, _ = play(distilled, {"num_frames": 33, "steps": [1, 1, 1]}, {})
    assert len(chunks) == 1
    assert "released=True" in distilled.log.read_text()
