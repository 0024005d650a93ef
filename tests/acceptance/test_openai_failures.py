"""The unmodified OpenAI SDK where something goes wrong: what it raises, what it sends again, and after which time."""

from __future__ import annotations

import time
from typing import Any, cast

import openai
import pytest
from openai import OpenAI, omit

from tests.acceptance.conftest import KeyedServer
from tests.acceptance.live_server import LONG, TINY, LiveServer
from tests.acceptance.sdk import Wire, sdk_on

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
"""The SDK warns that OpenAI ends its own Videos API."""

SIZE = cast(Any, "64x64")
SMALL: Any = {"prompt": "a red ball", "size": SIZE, "extra_body": {"num_frames": 33}}


def assert_told(error: openai.APIStatusError, code: str, param: str | None) -> None:
    """The SDK found all parts of the error, and the id of the request."""
    assert (error.code, error.param) == (code, param)
    assert error.type == "invalid_request_error"
    assert error.request_id


def test_a_failed_job_is_polled_without_raising(server: LiveServer, client: OpenAI) -> None:
    video_id = server.create({**LONG, "prompt": "fails"})
    server.cancel(video_id)
    video = client.videos.poll(video_id)
    assert video.status == "failed"
    assert video.error is not None
    assert video.error.code == "cancelled"
    assert video.error.message


def test_a_job_that_waited_too_long_is_polled_without_raising(keyed: KeyedServer) -> None:
    narrow = keyed.narrow
    running = narrow.create(LONG)
    narrow.until(running, lambda job: job["status"] == "in_progress")
    wire = Wire()
    with sdk_on(wire, narrow) as client:
        body = {"num_frames": 33, "queue_timeout": 1}
        video = client.videos.create_and_poll(prompt="waits", size=SIZE, extra_body=body)
    narrow.cancel(running)
    assert video.status == "failed"
    assert video.error is not None
    assert video.error.code == "queue_timeout"


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"num_frames": 0}, "invalid_value", "num_frames"),
        ({"helios": {"guidence_scale": 1}}, "unknown_parameter", "helios.guidence_scale"),
        ({"num_frames": 33, "frames": 66}, "conflicting_parameters", "frames"),
        ({"input_reference": {"image_url": "https://127.0.0.1/x.png"}}, "media_url_forbidden", "input_reference"),
    ],
)
def test_a_400_says_what_and_where(server: LiveServer, body: dict[str, Any], code: str, param: str) -> None:
    wire = Wire()
    with sdk_on(wire, server) as client, pytest.raises(openai.BadRequestError) as caught:
        client.videos.create(prompt="a", size=SIZE, extra_body=body)
    assert caught.value.code == code
    assert (caught.value.param or "").startswith(param)
    assert caught.value.request_id == wire.exchanges[0].headers["x-request-id"]
    assert len(wire.exchanges) == 1


def test_a_429_is_retried_after_the_headers_delay(keyed: KeyedServer) -> None:
    wire, slow = Wire(), keyed.slow
    slow.cancel(slow.create({**TINY, "num_frames": 1980}))
    with sdk_on(wire, slow) as client:
        video = client.videos.create(**SMALL)
    first, *_, last = wire.exchanges
    assert (first.status, last.status) == (429, 200)
    delay_s = int(first.headers["retry-after"])
    assert 1 <= delay_s <= 2
    assert wire.exchanges[1].sent_s - first.sent_s >= delay_s
    assert first.headers["x-ratelimit-limit-frames"] == "1980"
    assert int(first.headers["x-ratelimit-remaining-frames"]) < 33
    assert slow.ended(video.id)["status"] == "completed"


def test_a_full_queue_is_429_with_a_delay(keyed: KeyedServer) -> None:
    narrow = keyed.narrow
    made = [narrow.create(LONG)]
    narrow.until(made[0], lambda job: job["status"] == "in_progress")
    made.append(narrow.create({**LONG, "prompt": "waits"}))
    with sdk_on(Wire(), narrow) as client, pytest.raises(openai.RateLimitError) as caught:
        client.with_options(max_retries=0).videos.create(**SMALL)
    for video_id in made:
        narrow.cancel(video_id)
    assert caught.value.code == "quota_exceeded"
    assert caught.value.type == "rate_limit_error"
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 120


def test_what_a_retry_cannot_mend_is_sent_once(server: LiveServer) -> None:
    """The SDK would send a 409 three times."""
    wire, running = Wire(), server.create(LONG)
    with sdk_on(wire, server) as client, pytest.raises(openai.ConflictError) as caught:
        client.videos.download_content(running)
    server.cancel(running)
    assert_told(caught.value, "video_not_ready", None)
    (only,) = wire.exchanges
    assert only.headers["x-should-retry"] == "false"


def test_a_retried_post_makes_one_job(server: LiveServer) -> None:
    wire = Wire(num_lost=2)
    with sdk_on(wire, server) as client:
        video = client.videos.create(**{**SMALL, "prompt": f"once, {time.time()}"})
        assert [each.retry_count for each in wire.exchanges] == ["0", "1", "2"]
        assert [each.headers.get("idempotent-replayed") for each in wire.exchanges] == [None, "true", "true"]
        same = [each.id for each in client.videos.list(limit=10).data if each.prompt == video.prompt]
    assert same == [video.id]
    assert server.ended(video.id)["status"] == "completed"


def test_a_retried_upload_makes_one_job(server: LiveServer, picture: Any) -> None:
    wire = Wire(num_lost=1)
    with sdk_on(wire, server) as client:
        body = {**SMALL, "prompt": f"once with a picture, {time.time()}"}
        video = client.videos.create(**body, input_reference=picture)
        assert wire.exchanges[1].headers["idempotent-replayed"] == "true"
        assert len([each for each in client.videos.list(limit=10).data if each.prompt == video.prompt]) == 1
    server.cancel(video.id)


def test_the_same_post_without_a_retry_makes_two_jobs(client: OpenAI) -> None:
    assert client.videos.create(**SMALL).id != client.videos.create(**SMALL).id


def test_every_error_has_its_class_and_a_request_id(keyed: KeyedServer) -> None:
    alice = keyed.alice
    key: dict[str, Any] = {"extra_headers": {"Idempotency-Key": "every-error"}}
    nothing: Any = None
    with sdk_on(Wire(), alice) as client, sdk_on(Wire(), keyed.reader) as reader:
        client.videos.create(**SMALL, **key)
        calls: list[tuple[type[openai.APIStatusError], str | None, Any]] = [
            (openai.BadRequestError, "missing_required_parameter", lambda: client.videos.create(prompt=nothing)),
            (openai.NotFoundError, "video_not_found", lambda: client.videos.retrieve("video_unknown")),
            (openai.NotFoundError, "route_not_found", lambda: client.get("/nothing", cast_to=object)),
            (openai.NotFoundError, "model_not_found", lambda: client.models.retrieve("sora-2")),
            (openai.NotFoundError, "model_not_found", lambda: client.videos.create(prompt="a", model="sora-2")),
            (openai.APIStatusError, "method_not_allowed", lambda: client.put("/videos", cast_to=object)),
            (openai.UnprocessableEntityError, "idempotency_key_reused",
             lambda: client.videos.create(**{**SMALL, "prompt": "other"}, **key)),
            (openai.InternalServerError, "unsupported_operation",
             lambda: client.videos.edit(prompt="a", video=cast(Any, omit), extra_body={"video": {"id": "x"}})),
            (openai.PermissionDeniedError, "insufficient_scope", lambda: reader.videos.create(**SMALL)),
            (openai.AuthenticationError, "invalid_api_key",
             lambda: client.with_options(api_key="hs_wrong").videos.list()),
        ]  # fmt: skip
        for kind, code, call in calls:
            with pytest.raises(kind) as caught:
                call()
            assert caught.value.code == code, caught.value
            assert caught.value.request_id, code


def test_the_callers_own_request_id_comes_back(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.videos.retrieve("video_unknown", extra_headers={"x-request-id": "mine-1"})
    assert caught.value.request_id == "mine-1"
