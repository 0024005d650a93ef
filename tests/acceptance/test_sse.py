"""Server-sent events, read line by line: the segments joined are one MP4, and a reconnect loses and repeats nothing."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest

from tests.acceptance.live_server import TINY, LiveServer
from tests.acceptance.mp4_boxes import all_of, boxes, decode_times, sequence_numbers, times_s, timescale

PATH = "/v1/videos/generations"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sse:
    """One event; `number` is its id, where it has one."""

    kind: str
    number: int | None
    data: dict[str, Any]


def read_events(lines: Iterable[str]) -> Iterator[Sse]:
    """By the rules of the HTML standard, as far as they matter here."""
    fields: dict[str, str] = {}
    for line in lines:
        if line == "":
            if "data" in fields:
                number = int(fields["id"]) if "id" in fields else None
                yield Sse(kind=fields["event"], number=number, data=json.loads(fields["data"]))
            fields = {}
        elif not line.startswith(":"):
            name, _, value = line.partition(":")
            fields[name] = value.removeprefix(" ")
    assert fields == {}, "the stream ends within an event"


def generate(server: LiveServer, **body: object) -> list[Sse]:
    with server.http.stream("POST", PATH, json={**TINY, **body, "stream": True}) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert (answer.headers["cache-control"], answer.headers["x-accel-buffering"]) == ("no-store", "no")
        return [*read_events(answer.iter_lines())]


def partials(events: list[Sse]) -> list[dict[str, Any]]:
    return [event.data for event in events if event.kind == "video_generation.partial_video"]


def joined(events: list[Sse]) -> bytes:
    return b"".join(base64.b64decode(partial["b64_json"]) for partial in partials(events))


@pytest.mark.parametrize("num_frames", [33, 50, 132])
@pytest.mark.parametrize("fps", [24, 16])
def test_partials_are_one_mp4(server: LiveServer, num_frames: int, fps: int) -> None:
    data = joined(generate(server, num_frames=num_frames, fps=fps))
    num_chunks = -(-num_frames // 33)
    assert [box.kind for box in boxes(data)] == ["ftyp", "moov", *["moof", "mdat"] * num_chunks]
    assert len(all_of("moov", data)) == len(all_of("ftyp", data)) == 1
    assert sequence_numbers(data) == [*range(1, num_chunks + 1)]
    assert decode_times(data) == [33 * chunk * timescale(data) / fps for chunk in range(num_chunks)]
    times = times_s(data)
    assert len(times) == num_frames
    assert times == sorted(set(times))
    assert times == pytest.approx([frame / fps for frame in range(num_frames)], abs=1e-4)


def test_every_prefix_is_an_mp4(server: LiveServer) -> None:
    events = generate(server, num_frames=80)
    pieces = [base64.b64decode(partial["b64_json"]) for partial in partials(events)]
    assert [len(times_s(b"".join(pieces[: k + 1]))) for k in range(3)] == [33, 66, 80]


def test_events_tell_the_truth(server: LiveServer) -> None:
    events = generate(server, num_frames=80, seed=9)
    created, last, segments = events[0].data, events[-1], partials(events)
    assert events[0].kind == "video_generation.created"
    assert (created["num_frames"], created["num_chunks"], created["seed"], created["size"]) == (80, 3, 9, "64x64")
    assert created["recommended_preroll_seconds"] >= 0
    assert 0 < created["recommended_playback_rate"] <= 1
    assert [event.number for event in events if event.number is not None] == [0, 1, 2, 3, 4]
    assert [(each["start_frame"], each["num_frames"]) for each in segments] == [(0, 33), (33, 33), (66, 14)]
    assert [each["pts_seconds"] for each in segments] == pytest.approx([0, 33 / 24, 66 / 24])
    assert [each["duration"] for each in segments] == pytest.approx([33 / 24, 33 / 24, 14 / 24])
    assert last.kind == "video_generation.completed"
    assert last.data["usage"]["num_frames"] == 80
    assert last.data["video"]["id"] == created["id"]
    assert (last.data["video"]["status"], last.data["video"]["progress"]) == ("completed", 100)
    steps = [event.data for event in events if event.kind == "video_generation.progress"]
    percents = [step["progress"] for step in steps]
    assert percents == sorted(percents)
    assert {step["chunk"] for step in steps} == {0, 1, 2}
    assert server.http.get(last.data["url"]).content


def test_the_mime_type_is_that_of_the_stream(server: LiveServer) -> None:
    """What `MediaSource.addSourceBuffer` needs is there with the first event."""
    events = generate(server)
    codec = all_of("moov", joined(events))[0].body
    at = codec.index(b"avcC") + 5
    expected = f'video/mp4; codecs="avc1.{codec[at : at + 3].hex()}"'
    assert partials(events)[0]["mime_type"] == expected
    assert events[0].data["mime_type"].startswith("video/mp4")


def test_without_partials_there_is_progress_alone(server: LiveServer) -> None:
    events = generate(server, num_frames=66, partial_videos=0)
    assert partials(events) == []
    assert [event.number for event in events if event.number is not None] == [0, 3]


@pytest.mark.parametrize("after", [0, 1, 2, 4])
def test_a_reconnect_goes_on_where_it_was_cut(server: LiveServer, after: int) -> None:
    """The connection is cut in the middle; what came before and what comes after are the whole, once."""
    seen: list[Sse] = []
    body = {**TINY, "num_frames": 165, "stream": True, "detach": True, "seed": 4}
    with server.http.stream("POST", PATH, json=body) as answer:
        for event in read_events(answer.iter_lines()):
            seen.append(event)
            if event.number == after:
                break
    path = f"/v1/videos/{seen[0].data['id']}/events"
    with server.http.stream("GET", path, headers={"last-event-id": str(after)}) as answer:
        seen += read_events(answer.iter_lines())
    assert [event.number for event in seen if event.number is not None] == [0, 1, 2, 3, 4, 5, 6]
    assert joined(seen) == server.http.get(path.replace("events", "stream")).content
    assert len(times_s(joined(seen))) == 165


def test_a_finished_job_tells_everything_again(server: LiveServer, finished: str) -> None:
    with server.http.stream("GET", f"/v1/videos/{finished}/events") as answer:
        events = [*read_events(answer.iter_lines())]
    assert [event.number for event in events if event.number is not None] == [0, 1, 2, 3]
    assert joined(events) == server.http.get(f"/v1/videos/{finished}/stream").content


def test_a_wrong_last_event_id_is_refused(server: LiveServer, finished: str) -> None:
    answer: httpx2.Response = server.http.get(f"/v1/videos/{finished}/events", headers={"last-event-id": "x"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "last-event-id")


def test_progressive_video_from_a_segment(server: LiveServer, finished: str) -> None:
    whole = server.http.get(f"/v1/videos/{finished}/stream").content
    rest = server.http.get(f"/v1/videos/{finished}/stream?from_segment=1").content
    assert decode_times(rest) == decode_times(whole)[1:]
    assert [box.kind for box in boxes(rest)] == ["ftyp", "moov", "moof", "mdat"]
    beyond = server.http.get(f"/v1/videos/{finished}/stream?from_segment=2")
    assert (beyond.status_code, beyond.json()["error"]["param"]) == (400, "from_segment")
