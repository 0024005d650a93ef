"""`client.post` of the OpenAI SDK on `/v1/videos/generations`: one JSON answer, and typed server-sent events."""

from __future__ import annotations

import base64
from typing import Any

import openai
import pytest
from openai import OpenAI, Stream

from tests.acceptance.live_server import LONG, TINY, LiveServer
from tests.acceptance.mp4_boxes import times_s

PATH = "/videos/generations"


def test_json(server: LiveServer, client: OpenAI) -> None:
    answer: Any = client.post(PATH, body={**TINY, "num_frames": 66, "seed": 42}, cast_to=object)
    assert set(answer) == {
        "id", "object", "created", "model", "data", "size", "seconds", "output_format", "usage", "helios"
    }  # fmt: skip
    assert (answer["object"], answer["size"], answer["seconds"]) == ("video.generation", "64x64", "2.75")
    assert answer["usage"]["num_frames"] == 66
    assert (answer["helios"]["seed"], answer["helios"]["fps"]) == (42, 24)
    timing = answer["helios"]["timing"]
    assert 0 <= timing["queue_ms"] <= timing["first_segment_ms"] <= timing["total_ms"]
    (item,) = answer["data"]
    assert item["b64_json"] is None
    assert len(times_s(server.http.get(item["url"]).content)) == 66


def test_json_with_the_bytes(client: OpenAI) -> None:
    answer: Any = client.post(PATH, body={**TINY, "response_format": "b64_json"}, cast_to=object)
    (item,) = answer["data"]
    assert item["url"] is None
    assert len(times_s(base64.b64decode(item["b64_json"]))) == 33


def test_stream(client: OpenAI) -> None:
    stream = client.post(
        PATH, body={**TINY, "num_frames": 80, "stream": True}, cast_to=object, stream=True, stream_cls=Stream[object]
    )
    events: list[Any] = [*stream]
    kinds = [event["type"].removeprefix("video_generation.") for event in events]
    assert (kinds[0], kinds[-1]) == ("created", "completed")
    assert kinds.count("created") == kinds.count("completed") == 1
    assert set(kinds) == {"created", "queued", "progress", "partial_video", "completed"}
    partials = [event for event in events if event["type"].endswith("partial_video")]
    assert [event["partial_video_index"] for event in partials] == [0, 1, 2]
    assert [event["num_frames"] for event in partials] == [33, 33, 14]
    assert len(times_s(b"".join(base64.b64decode(event["b64_json"]) for event in partials))) == 80
    assert len({event["id"] for event in events}) == 1
    assert events[-1]["video"]["status"] == "completed"


def test_an_error_in_the_middle_of_a_stream_raises(server: LiveServer, client: OpenAI) -> None:
    stream = client.post(PATH, body={**LONG, "stream": True}, cast_to=object, stream=True, stream_cls=Stream[object])
    seen: list[str] = []

    def read() -> None:
        for event in stream:
            assert isinstance(event, dict)
            seen.append(event["type"])
            if seen[-1] == "video_generation.partial_video" and seen.count(seen[-1]) == 1:
                server.cancel(event["id"])

    with pytest.raises(openai.APIError) as caught:
        read()
    assert caught.value.code == "cancelled"
    assert "video_generation.completed" not in seen


def test_a_refusal_before_a_stream_is_no_stream(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.post(PATH, body={**TINY, "stream": True, "n": 2}, cast_to=object, stream=True, stream_cls=Stream[object])
    assert caught.value.param == "n"


def test_what_takes_longer_than_the_client_waits_is_refused(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="respond-async") as caught:
        client.with_options(timeout=1.0).post(PATH, body=LONG, cast_to=object)
    assert caught.value.code == "sync_too_long"
