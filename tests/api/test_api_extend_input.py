"""Videos of callers' own that are extended: they come first, and what follows is what video-to-video makes."""

from __future__ import annotations

import asyncio
import base64
import io
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import av
import httpx2
import numpy as np
import numpy.typing as npt
import pytest
from starlette.testclient import TestClient

from helios_serve.api.caller_media import CallerMedia
from helios_serve.api.files import FileService
from helios_serve.api.service import VideoService
from helios_serve.workers.input_segments import input_segments
from helios_serve.workers.media_sandbox import SandboxDecoder
from tests.api.conftest import FakeEngine, Parts, client_of, parts_of
from tests.api.test_api_durable import (
    STEP_S,
    chunks_done,
    content,
    real_content,
    real_id,
    real_server,
    serving,
    wait_for,
)

VIDEOS = "/v1/videos"
EXTENSIONS = f"{VIDEOS}/extensions"
FILE = b"frames=71 size=640x384 fps=25"
"""Two whole chunks, and five frames before them."""
STEPS = {"steps": [1, 1, 1]}


def as_uri(data: bytes) -> str:
    return "data:video/mp4;base64," + base64.b64encode(data).decode()


def extend(client: TestClient, data: bytes = FILE, **body: Any) -> dict[str, Any]:
    whole = {"prompt": "exact", "video": as_uri(data), "seed": 5, **STEPS, **body}
    answer = client.post(EXTENSIONS, json=whole)
    assert answer.status_code == 200, answer.text
    video: dict[str, Any] = answer.json()
    return video


def made(data: bytes) -> list[tuple[int, str]]:
    """(number, what its latents follow from) of the chunks that were made."""
    return [(int(chunk), digest) for chunk, digest in re.findall(r"\[exact[^:]*:(\d+):(\w+)\]", data.decode())]


def alone(client: TestClient, data: bytes = FILE, **body: Any) -> list[tuple[int, str]]:
    """The same continuation as a video of its own."""
    whole = {"prompt": "exact", "video": as_uri(data), "seed": 5, "size": "640x384", **STEPS, **body}
    return made(content(client, client.post(VIDEOS, json=whole).json()["id"]))


def behind(num_chunks: int, chunks: list[tuple[int, str]]) -> list[tuple[int, str]]:
    return [(chunk + num_chunks, digest) for chunk, digest in chunks]


def refusal(client: TestClient, body: Mapping[str, Any]) -> tuple[int, str, str]:
    answer = client.post(EXTENSIONS, json=body)
    error = answer.json()["error"]
    return answer.status_code, error["param"], error["code"]


def test_an_upload_is_continued_as_video_to_video_continues_it(client: TestClient, engine: FakeEngine) -> None:
    video = extend(client, num_frames=100)
    details = video["helios"]
    assert (video["size"], details["fps"], details["num_frames"], details["num_chunks"]) == ("640x384", 25, 166, 6)
    assert details["continued_frames"] == {"first": 5, "last": 70}
    assert [(told["param"], "frames 5 to 70" in told["message"]) for told in details["warnings"]] == [("video", True)]
    assert (details["extended_from_video_id"], details["seed"]) == (None, 5)
    data = content(client, video["id"])
    assert data.startswith(b"INIT[given:0][given:1][exact:2:")
    resumed = engine.resumed[-1]
    assert (resumed.next_chunk, resumed.records, resumed.generator_state) == (2, (), b"")
    assert engine.requests[-1].params.steps_in(2) == (2, 2, 2), "the first chunk that is made is not amplified"
    assert made(data) == behind(2, alone(client, num_frames=100))
    assert len(made(data)) == 4


def test_its_segments_are_there_at_once(client: TestClient) -> None:
    video = extend(client, prompt="slow", num_frames=99, steps=[9, 9, 9])
    assert chunks_done(client, video["id"]) == 2
    client.post(f"{VIDEOS}/{video['id']}/cancel")


def test_a_form_with_a_file(client: TestClient) -> None:
    """As the SDK sends one."""
    form: dict[str, Any] = {"prompt": (None, "exact"), "seconds": (None, "2"), "video": ("a.mp4", FILE, "video/mp4")}
    answer = client.post(EXTENSIONS, files=form)
    assert answer.status_code == 200, answer.text
    assert answer.json()["seconds"] == "4.64"
    assert content(client, answer.json()["id"]).startswith(b"INIT[given:0][given:1][exact:2:")


def test_another_name_of_the_video(client: TestClient) -> None:
    body = {"prompt": "p", "video_url": as_uri(FILE)}
    assert client.post(EXTENSIONS, json=body).json()["helios"]["num_frames"] == 66 + round(5.5 * 25)


@pytest.mark.parametrize(
    ("said", "asked", "size", "fps"),
    [
        (b"frames=33 size=1024x576 fps=30", {}, "1024x576", 30),
        (b"frames=33 size=650x384 fps=29.97", {}, "640x384", 29.97),
        (b"frames=33 size=1920x1080", {}, "704x384", 24),
        (b"frames=33 size=64x64 fps=0.5", {}, "64x64", 24),
        (b"frames=33 size=64x64 fps=120", {"size": "auto"}, "64x64", 24),
        (b"frames=33 size=64x64 fps=30", {"size": "128x64", "fps": 16}, "128x64", 16),
        (b"frames=33 size=64x64 fps=30", {"width": 128, "height": 64}, "128x64", 30),
    ],
)
def test_it_keeps_its_looks(client: TestClient, said: bytes, asked: dict[str, Any], size: str, fps: float) -> None:
    video = extend(client, said, **asked)
    assert (video["size"], video["helios"]["fps"]) == (size, fps)
    assert video["helios"]["continued_frames"] == {"first": 0, "last": 32}
    assert [told["param"] for told in video["helios"]["warnings"]] in ([], ["size"], ["width"])


def test_a_schedule_counts_from_the_first_new_chunk(client: TestClient) -> None:
    schedule = [{"prompt": "exact"}, {"prompt": "night", "chunk": 1}]
    video = extend(client, prompt="exact", prompts=schedule, num_frames=99)
    assert made(content(client, video["id"])) == behind(2, alone(client, prompts=schedule, num_frames=99))


def test_a_restart_goes_on_where_it_was(tmp_path: Path) -> None:
    with serving(tmp_path, FakeEngine(step_s=STEP_S)) as client:
        video = extend(client, num_frames=165)["id"]
        wait_for(lambda: chunks_done(client, video) >= 4)
    engine = FakeEngine()
    with serving(tmp_path, engine) as client:
        data = content(client, video)
        assert engine.resumed[0].next_chunk >= 4
        assert {record.chunk for record in engine.resumed[0].records} <= {2, 3, 4, 5}, "given chunks have no latents"
        assert made(data) == behind(2, alone(client, num_frames=165))


def test_a_restart_before_the_first_chunk(tmp_path: Path) -> None:
    """What the encoder made is kept; the chunk still begins from the state that the encoder left."""
    slow = FakeEngine(step_s=0.5)
    with serving(tmp_path, slow) as client:
        video = extend(client, num_frames=33)["id"]
        wait_for(lambda: client.get(f"{VIDEOS}/{video}").json()["status"] == "in_progress")
    engine = FakeEngine()
    with serving(tmp_path, engine) as client:
        data = content(client, video)
        assert engine.requests[0].start is not None
        assert (engine.resumed[0].next_chunk, engine.resumed[0].generator_state) == (2, b"")
        assert made(data) == behind(2, alone(client, num_frames=33))


def test_it_is_extended_again_as_what_was_made_here(client: TestClient, parts: Parts, engine: FakeEngine) -> None:
    first = extend(client, num_frames=33)["id"]
    content(client, first)
    assert client.portal is not None
    client.portal.call(parts.stores.retention.tidy)
    answer = client.post(EXTENSIONS, json={"prompt": "on", "video": {"id": first}, "num_frames": 66})
    assert answer.status_code == 200, answer.text
    second = answer.json()
    assert second["helios"]["continued_frames"] == {"first": 5, "last": 70}
    data = content(client, second["id"])
    assert engine.resumed[-1].next_chunk == 3
    schedule = [{"prompt": "exact"}, {"prompt": "on", "chunk": 1}]
    assert made(data) == behind(2, alone(client, prompts=schedule, num_frames=99))


def test_its_remix_keeps_the_beginning(client: TestClient) -> None:
    old = extend(client, num_frames=66)["id"]
    content(client, old)
    answer = client.post(f"{VIDEOS}/{old}/remix", json={"prompt": "exact too"})
    assert answer.status_code == 200, answer.text
    data = content(client, answer.json()["id"])
    assert data.startswith(b"INIT[given:0][given:1][exact too:2:")
    assert made(data) == behind(2, alone(client, prompt="exact too", num_frames=66))


def test_a_remix_waits_for_its_end(client: TestClient) -> None:
    old = extend(client, prompt="slow", num_frames=66)["id"]
    answer = client.post(f"{VIDEOS}/{old}/remix", json={"prompt": "p"})
    assert answer.status_code == 409
    assert "when it is finished" in answer.json()["error"]["message"]
    client.post(f"{VIDEOS}/{old}/cancel")


def test_the_same_key_makes_one_job(client: TestClient) -> None:
    body, headers = {"prompt": "p", "video": as_uri(FILE)}, {"idempotency-key": "k1"}
    first = client.post(EXTENSIONS, json=body, headers=headers)
    again = client.post(EXTENSIONS, json=body, headers=headers)
    assert (again.json()["id"], again.headers["idempotent-replayed"]) == (first.json()["id"], "true")
    other = {**body, "video": as_uri(b"frames=66 size=640x384 fps=25")}
    assert client.post(EXTENSIONS, json=other, headers=headers).status_code == 422


def test_a_transition_has_nothing_to_leave(client: TestClient) -> None:
    video = extend(client, b"frames=66 size=640x384", transition_chunks=3)
    assert [told["param"] for told in video["helios"]["warnings"]] == ["transition_chunks"]


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        ({"video": as_uri(b"frames=20")}, 400, "video", "media_invalid"),
        ({"video": as_uri(b"nothing")}, 400, "video", "media_invalid"),
        ({"video": "data:video/mp4;base64,!"}, 400, "video", "media_invalid"),
        ({"video": "https://example.com/a.mp4"}, 400, "video", "media_url_forbidden"),
        ({"video": {"id": "video_0", "file_id": "file_0"}}, 400, "video", "conflicting_parameters"),
        ({"video": as_uri(FILE), "num_frames": 7200}, 400, "num_frames", "invalid_value"),
        ({"video": as_uri(FILE), "seconds": 288}, 400, "seconds", "invalid_value"),
        ({"video": as_uri(FILE), "size": "650x384"}, 400, "size", "invalid_value"),
        ({"video": as_uri(FILE), "sied": 1}, 400, "sied", "unknown_parameter"),
        ({"video": as_uri(FILE), "stream": True}, 400, "stream", "invalid_value"),
        ({"video": as_uri(FILE), "model": "another"}, 404, "model", "model_not_found"),
    ],
)
def test_refusals(client: TestClient, body: dict[str, Any], status: int, param: str, code: str) -> None:
    assert refusal(client, {"prompt": "p", **body}) == (status, param, code)


def test_an_own_video_of_the_same_looks_is_not_decoded(client: TestClient, engine: FakeEngine) -> None:
    body = {"prompt": "exact", "num_frames": 33, "size": "640x384", "fps": 16}
    old = client.post(VIDEOS, json=body).json()["id"]
    content(client, old)
    same = {"prompt": "p", "video": {"id": old}, "size": "640x384", "fps": 16, "codec": "h264", "num_frames": 33}
    assert client.post(EXTENSIONS, json=same).json()["helios"]["continued_frames"] is None
    for look in ({"size": "704x384"}, {"fps": 24}, {"codec": "vp9"}):
        # This server keeps no videos for its decoder.
        assert refusal(client, {**same, **look})[1:] == ("video.id", "unsupported_parameter")
    assert refusal(client, {**same, "video": {"id": "video_0"}}) == (404, "id", "video_not_found")


def test_a_server_that_encodes_none(tmp_path: Path) -> None:
    with (
        parts_of(FakeEngine(), tmp_path, input_segments=None) as parts,
        client_of(parts.app) as client,
    ):
        assert refusal(client, {"prompt": "p", "video": as_uri(FILE)}) == (501, "video", "unsupported_operation")


# The same with the real engine, the real decoder and a tiny checkpoint.


def clip(num_frames: int) -> npt.NDArray[np.uint8]:
    """Smooth moving colours, [F, 64, 64, 3]."""
    t, y, x = np.meshgrid(np.arange(num_frames) / 10, np.linspace(0, 3, 64), np.linspace(0, 4, 64), indexing="ij")
    colours = np.stack([np.sin(x + y + t + phase) for phase in (0.0, 2.0, 4.0)], axis=-1)
    return np.round(127.5 + 100 * colours).astype(np.uint8)


def mp4(frames: npt.NDArray[np.uint8], fps: int) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=fps, options={"crf": "5"})
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for frame in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode(None))
    return file.getvalue()


def pictures(video: bytes) -> npt.NDArray[np.uint8]:
    with av.open(io.BytesIO(video), "r") as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def psnr(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> float:
    return float(10 * np.log10(255**2 / np.mean((one.astype(float) - other) ** 2)))


def samples(video: bytes) -> list[bytes]:
    """The encoded pictures of each segment of a fragmented file."""
    boxes, at = [], 0
    while at < len(video):
        size = int.from_bytes(video[at : at + 4], "big")
        boxes.append((video[at + 4 : at + 8], video[at + 8 : at + size]))
        at += size
    return [body for kind, body in boxes if kind == b"mdat"]


@asynccontextmanager
async def real(checkpoint: Path, data_dir: Path) -> AsyncIterator[httpx2.AsyncClient]:
    loop, decoder = asyncio.get_running_loop(), SandboxDecoder()

    def media_of(service: VideoService, files: FileService) -> CallerMedia:
        return CallerMedia(service, files, decoder.for_tenant, None, loop)

    async with real_server(checkpoint, data_dir, input_segments=input_segments, media_of=media_of) as client:
        yield client


async def extended(client: httpx2.AsyncClient, **body: Any) -> dict[str, Any]:
    answer = await client.post(EXTENSIONS, json={"prompt": "a fox", **body})
    assert answer.status_code == 200, answer.text
    video: dict[str, Any] = answer.json()
    return video


def test_the_real_engine_continues_an_upload(tiny_distilled: Path, tmp_path: Path) -> None:
    source = clip(71)
    file = as_uri(mp4(source, 25))
    how: dict[str, Any] = {"seed": 5, "steps": [1, 1, 1], "reproducible": "strict", "num_frames": 40}

    async def run() -> None:
        async with real(tiny_distilled, tmp_path) as client:
            video = await extended(client, video=file, **how)
            assert (video["size"], video["helios"]["fps"], video["helios"]["num_frames"]) == ("64x64", 25, 106)
            whole = pictures(await real_content(client, video["id"]))
            fragments = samples((await client.get(f"{VIDEOS}/{video['id']}/stream")).content)
            same = await real_id(client, video=file, size="64x64", fps=25, **how)
            await real_content(client, same)
            assert fragments[2:] == samples((await client.get(f"{VIDEOS}/{same}/stream")).content)
            assert (len(whole), len(fragments)) == (106, 4)
            assert psnr(whole[:66], source[5:]) > 33
            assert psnr(whole[:66], source[:66]) < 25, "the frames of the head would pass as well"

            again = await extended(client, video={"id": video["id"]}, num_frames=33)
            await real_content(client, again["id"])
            longer = samples((await client.get(f"{VIDEOS}/{again['id']}/stream")).content)
            assert longer[:3] == fragments[:3]
            assert len(longer) == 5

            slower = await extended(client, video={"id": video["id"]}, fps=12, num_frames=33, steps=[1, 1, 1])
            assert slower["helios"]["continued_frames"] == {"first": 7, "last": 105}
            assert slower["helios"]["extended_from_video_id"] == video["id"]
            kept = pictures(await real_content(client, slower["id"]))
            assert len(kept) == 132
            assert psnr(kept[:99], whole[7:]) > 30

    asyncio.run(run())
