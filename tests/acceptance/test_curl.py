"""The real curl: bodies as JSON and as forms, what headers ask for, ranges, and each refusal word for word."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from tests.acceptance.live_server import LONG, TINY, LiveServer
from tests.acceptance.mp4_boxes import boxes, times_s

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")

GENERATIONS, VIDEOS = "/v1/videos/generations", "/v1/videos"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What curl received; names of headers in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        assert self.headers["x-request-id"]
        return self.json["error"]


class Curl:
    """Runs curl against one server."""

    def __init__(self, url: str, tmp_path: Path) -> None:
        self._url = url
        self._head = tmp_path / "head"
        self._body = tmp_path / "body"

    def __call__(self, path: str, *options: str) -> Answer:
        self._body.write_bytes(b"")
        files = ("-D", str(self._head), "-o", str(self._body))
        subprocess.run(["curl", "-sS", "--max-time", "100", *files, *options, self._url + path], check=True)
        *_, last = (block for block in self._head.read_bytes().decode("latin-1").split("\r\n\r\n") if block)
        status, *lines = last.split("\r\n")
        pairs = (line.split(": ", 1) for line in lines)
        headers = {name.lower(): value for name, value in pairs}
        return Answer(status=int(status.split()[1]), headers=headers, body=self._body.read_bytes())

    def post(self, path: str, body: object, *options: str) -> Answer:
        return self(path, "-H", "Content-Type: application/json", "-d", json.dumps(body), *options)

    def form(self, path: str, parts: list[str], *options: str) -> Answer:
        return self(path, *(word for part in parts for word in ("-F", part)), *options)


@pytest.fixture
def curl(server: LiveServer, tmp_path: Path) -> Curl:
    return Curl(server.url, tmp_path)


def test_json_and_form_are_the_same_request(curl: Curl, server: LiveServer, picture: Path) -> None:
    """Under one idempotency key they are one job; any other request under it is refused."""
    key = ("-H", f"Idempotency-Key: forms-{time.time()}")
    image = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    body = {
        "prompts": [{"chunk": 0, "prompt": "a fox"}, {"chunk": 1, "prompt": "a wolf", "transition_chunks": 1}],
        "size": "64x64",
        "num_frames": 66,
        "input_reference": {"image_url": image},
        "helios": {"steps": [2, 1, 2], "amplify_first_chunk": True, "crf": 28},
        "metadata": {"a": "1"},
    }
    fields = [
        'prompts=[{"chunk": 0, "prompt": "a fox"}, {"chunk": 1, "prompt": "a wolf", "transition_chunks": 1}]',
        "size=64x64",
        "frames=66",
        f"input_reference=@{picture};type=image/png",
        "helios[steps][]=2",
        "helios[steps][]=1",
        "helios[steps][]=2",
        "helios[amplify_first_chunk]=true",
        "crf=28",
        "metadata[a]=1",
    ]
    (tmp := server.data_dir / "body.json").write_text(json.dumps(body))
    made = curl(VIDEOS, "-H", "Content-Type: application/json", "--data-binary", f"@{tmp}", *key)
    assert made.status == 200, made.body
    again = curl.form(VIDEOS, fields, *key)
    assert again.status == 200, again.body
    assert again.json["id"] == made.json["id"]
    assert again.headers["idempotent-replayed"] == "true"
    other = curl.form(VIDEOS, [*fields[:-2], "crf=29", fields[-1]], *key)
    assert (other.status, other.error["code"]) == (422, "idempotency_key_reused")
    assert server.ended(made.json["id"])["status"] == "completed"


@pytest.mark.parametrize("name", ["prompts", "helios[prompts]"])
def test_a_list_of_objects_in_brackets(curl: Curl, server: LiveServer, name: str) -> None:
    """Grouped by key, as the SDK writes it."""
    schedule = ["[chunk]=0", "[chunk]=1", "[prompt]=a fox", "[prompt]=a wolf"]
    made = curl.form(VIDEOS, [*(f"{name}[]{entry}" for entry in schedule), "size=64x64", "num_frames=66"])
    assert made.status == 200, made.body
    assert made.json["prompt"] == "a fox"
    server.cancel(made.json["id"])


def test_accept_mp4(curl: Curl) -> None:
    made = curl.post(GENERATIONS, {**TINY, "seed": 11}, "-H", "Accept: video/mp4")
    assert (made.status, made.headers["content-type"], made.headers["x-seed"]) == (200, "video/mp4", "11")
    assert len(times_s(made.body)) == 33
    assert "total;dur=" in made.headers["server-timing"]
    stored = curl(f"{VIDEOS}/{made.headers['x-video-id']}/content")
    assert stored.body == made.body
    assert curl.post("/v1/videos/sync", TINY).headers["content-type"] == "video/mp4"


def test_accept_mp4_and_stream(curl: Curl) -> None:
    live = curl.post(GENERATIONS, {**TINY, "num_frames": 50, "stream": True}, "-H", "Accept: video/mp4")
    assert (live.status, live.headers["content-type"], live.headers["transfer-encoding"]) == (
        200, "video/mp4", "chunked"
    )  # fmt: skip
    assert (live.headers["cache-control"], live.headers["accept-ranges"]) == ("no-store", "none")
    assert [box.kind for box in boxes(live.body)] == ["ftyp", "moov", "moof", "mdat", "moof", "mdat"]
    assert len(times_s(live.body)) == 50
    assert live.body == curl(f"{VIDEOS}/{live.headers['x-video-id']}/stream").body


@pytest.mark.parametrize(
    "accept",
    [
        "*/*",
        "application/json",
        "text/event-stream",
    ],
)
def test_accept_of_a_stream_of_events(curl: Curl, accept: str) -> None:
    events = curl.post(GENERATIONS, {**TINY, "stream": True}, "-H", f"Accept: {accept}")
    assert events.status == 200, events.body
    assert events.headers["content-type"].startswith("text/event-stream")


@pytest.mark.parametrize("by", ["header", "field"])
def test_respond_async(curl: Curl, server: LiveServer, by: str) -> None:
    body, options = (TINY, ("-H", "Prefer: respond-async")) if by == "header" else ({**TINY, "async": True}, ())
    made = curl.post(GENERATIONS, body, *options)
    assert made.status == 202, made.body
    assert made.json["request_id"] == made.json["id"]
    assert made.headers["location"] == f"{VIDEOS}/{made.json['id']}"
    assert made.headers["preference-applied"] == "respond-async"
    assert server.ended(curl(made.headers["location"]).json["id"])["status"] == "completed"


def test_prefer_wait(curl: Curl, server: LiveServer) -> None:
    started = time.monotonic()
    left = curl.post(GENERATIONS, LONG, "-H", "Prefer: wait=1")
    assert 1 <= time.monotonic() - started < 10
    assert left.status == 202, left.body
    assert server.job(left.json["id"])["status"] in ("queued", "in_progress")
    server.cancel(left.json["id"])
    done = curl.post(GENERATIONS, TINY, "-H", "Prefer: wait=90")
    assert (done.status, done.json["object"]) == (200, "video.generation")


def test_ranges(curl: Curl, finished: str) -> None:
    path = f"{VIDEOS}/{finished}/content"
    whole = curl(path)
    size, etag = len(whole.body), whole.headers["etag"]
    assert (whole.status, whole.headers["accept-ranges"], whole.headers["content-length"]) == (200, "bytes", str(size))
    assert whole.headers["cache-control"] == "private, max-age=3600, immutable"
    for given, span in (("0-99", slice(0, 100)), ("100-", slice(100, None)), ("-50", slice(size - 50, None))):
        part = curl(path, "-r", given)
        assert (part.status, part.body) == (206, whole.body[span]), given
        first = span.start
        last = first + len(part.body) - 1
        assert part.headers["content-range"] == f"bytes {first}-{last}/{size}"
    several = curl(path, "-r", "0-1,5-6")
    assert (several.status, several.body) == (200, whole.body)
    assert curl(path, "-r", "0-9", "-H", f"If-Range: {etag}").status == 206
    assert curl(path, "-r", "0-9", "-H", 'If-Range: "other"').status == 200
    assert curl(path, "-H", f"If-None-Match: {etag}").status == 304
    beyond = curl(path, "-r", f"{size}-")
    assert (beyond.status, beyond.error["code"]) == (416, "range_not_satisfiable")
    assert beyond.headers["content-range"] == f"bytes */{size}"


def test_head(curl: Curl, finished: str) -> None:
    path = f"{VIDEOS}/{finished}/content"
    whole, head = curl(path), curl(path, "-I")
    assert (head.status, head.body) == (200, b"") or head.body.startswith(b"HTTP/")
    for name in ("content-length", "content-type", "etag", "accept-ranges"):
        assert head.headers[name] == whole.headers[name]
    assert curl(path, "-I", "-r", "0-9").headers["content-length"] == "10"
    for other in ("", f"/{finished}", f"/{finished}/hls/index.m3u8", f"/{finished}/content?variant=thumbnail"):
        assert curl(VIDEOS + other, "-I").status == 200, other
    for other in ("/v1/models", "/live", "/ready", "/health", "/version", "/metrics", "/", "/docs", "/openapi.json"):
        assert curl(other, "-I").status == 200, other


MESSAGES: list[tuple[dict[str, Any], str, str]] = [
    ({"size": "650x384"}, "size",
     "size 650x384: both sides must be multiples of 64 for helios-tiny; nearest: 640x384, 704x384"),
    ({"size": "1920x1088"}, "size",
     "size 1920x1088: at most 921600 pixels on this server; nearest: 1216x704, 1280x704"),
    ({"num_frames": 9000}, "num_frames", "num_frames 9000: at most 7260 for this key"),
    ({"helios": {"guidence_scale": 3}}, "helios.guidence_scale",
     "helios.guidence_scale: unknown parameter; did you mean guidance_scale?"),
    ({"helios": {"steps": [2, 2]}}, "helios.steps",
     "helios.steps [2, 2]: helios-tiny needs 3 numbers, one per stage, each 1 to 100"),
    ({"prompt": None, "num_frames": 132, "prompts": [{"chunk": 0, "prompt": "a"}, {"chunk": 6, "prompt": "b"}]},
     "prompts[1].chunk", "prompts[1].chunk 6: the video has 4 chunks, 0 to 3"),
    ({"output_format": "webm"}, "output_format",
     'output_format "webm": only mp4; for royalty-free video set codec to vp9 or av1'),
]  # fmt: skip


@pytest.mark.parametrize("path", [GENERATIONS, VIDEOS])
@pytest.mark.parametrize(("change", "param", "message"), MESSAGES)
def test_each_message(curl: Curl, path: str, change: dict[str, Any], param: str, message: str) -> None:
    body = {name: value for name, value in ({"prompt": "a"} | change).items() if value is not None}
    answer = curl.post(path, body)
    assert answer.status == 400
    assert answer.headers["x-should-retry"] == "false"
    code = "unknown_parameter" if "unknown" in message else "invalid_value"
    assert answer.error == {"message": message, "type": "invalid_request_error", "param": param, "code": code}


def test_the_message_about_a_short_video(curl: Curl, tmp_path: Path) -> None:
    (tmp_path / "short.mp4").write_bytes(_clip(20))
    answer = curl.form(VIDEOS, ["prompt=a", f"video=@{tmp_path / 'short.mp4'};type=video/mp4"])
    assert (answer.status, answer.error["message"]) == (400, "video: 20 frames, at least 33 are needed")
    assert answer.error["param"] == "video"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [(GENERATIONS, {"prompt": "a", "promt": "b"}, "promt"),
     (VIDEOS, {"prompt": "a", "helios": {"crx": 1}}, "helios.crx"),
     (f"{VIDEOS}/extensions", {"prompt": "a", "video": {"id": "x"}, "sedd": 1}, "sedd")],
)  # fmt: skip
def test_an_unknown_key_is_refused(curl: Curl, path: str, body: dict[str, Any], param: str) -> None:
    answer = curl.post(path, body)
    assert (answer.status, answer.error["code"], answer.error["param"]) == (400, "unknown_parameter", param)


def test_other_refusals(curl: Curl) -> None:
    text = curl(VIDEOS, "-H", "Content-Type: text/plain", "-d", "prompt=a")
    assert (text.status, text.error["code"]) == (415, "unsupported_media_type")
    html = curl.post(GENERATIONS, TINY, "-H", "Accept: text/html")
    assert (html.status, html.error["code"]) == (406, "not_acceptable")
    cut = curl(VIDEOS, "-H", "Content-Type: application/json", "-d", '{"prompt": ')
    assert (cut.status, cut.error["code"]) == (400, "malformed_body")
    for path, method, status, code in (
        ("/v1/nothing", "GET", 404, "route_not_found"),
        (VIDEOS, "PUT", 405, "method_not_allowed"),
        (f"{VIDEOS}/edits", "POST", 501, "unsupported_operation"),
        (f"{VIDEOS}/characters/x", "GET", 501, "unsupported_operation"),
    ):
        answer = curl(path, "-X", method)
        assert (answer.status, answer.error["code"]) == (status, code), path


def test_conflicting_names(curl: Curl) -> None:
    answer = curl.post(VIDEOS, {"prompt": "a", "num_frames": 33, "frames": 34})
    assert (answer.status, answer.error["code"]) == (400, "conflicting_parameters")
    same = curl.post(VIDEOS, {**TINY, "frames": 33})
    assert same.status == 200, same.body


def _clip(num_frames: int) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for index in range(num_frames):
            picture = np.full((64, 64, 3), 3 * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()
