"""Webhooks of the running server to a receiver on this machine, verified by code that is not ours; and media by id."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import pytest
from openai import OpenAI
from standardwebhooks import Webhook, WebhookVerificationError

from tests.acceptance.live_server import LONG, TINY, LiveServer
from tests.acceptance.mp4_boxes import times_s

IS_LONG = os.environ.get("HELIOS_TEST_LONG") == "1"
"""Waits for the third attempt, half a minute later, where otherwise it is asked for."""

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
"""The SDK warns that OpenAI ends its own Videos API."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One delivery as it came in; names of headers in lower case."""

    at_s: float
    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def event(self) -> Any:
        return json.loads(self.body)


@dataclass
class Receiver:
    """Answers 503 to the first `num_down` deliveries of each path, then 204."""

    num_down: dict[str, int] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)
    url: str = ""

    def at(self, path: str) -> list[Seen]:
        return [each for each in self.seen if each.path == path]

    def wait(self, path: str, count: int, timeout_s: float = 60.0) -> list[Seen]:
        deadline = time.monotonic() + timeout_s
        while len(self.at(path)) < count:
            assert time.monotonic() < deadline, f"{len(self.at(path))} of {count} deliveries came"
            time.sleep(0.05)
        return self.at(path)


@pytest.fixture(scope="module")
def receiver(server: LiveServer) -> Iterator[Receiver]:
    """Hears of no job that another module left running."""
    deadline = time.monotonic() + 60
    while any(server.http.get(f"/v1/videos?status={each}").json()["data"] for each in ("queued", "in_progress")):
        assert time.monotonic() < deadline, "a job of another module does not end"
        time.sleep(0.1)
    made = Receiver()

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            is_down = len(made.at(self.path)) < made.num_down.get(self.path, 0)
            made.seen.append(Seen(at_s=time.monotonic(), path=self.path, headers=headers, body=body))
            self.send_response(503 if is_down else 204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as http:
        made.url = f"http://127.0.0.1:{http.server_address[1]}"
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield made
        http.shutdown()
        thread.join()


@contextmanager
def endpoint(server: LiveServer, receiver: Receiver, path: str) -> Iterator[str]:
    """Sends the tenant's events there meanwhile; the secret that signs them."""
    made = server.http.post("/v1/webhook_endpoints", json={"url": receiver.url + path})
    assert made.status_code == 200, made.text
    try:
        yield made.json()["signing_secret"]
    finally:
        server.http.delete(f"/v1/webhook_endpoints/{made.json()['id']}")


def test_a_delivery_verifies(server: LiveServer, client: OpenAI, receiver: Receiver) -> None:
    with endpoint(server, receiver, "/ok") as secret:
        video_id = server.create(TINY)
        (seen,) = receiver.wait("/ok", 1)
    event = cast(Any, Webhook(secret).verify(seen.body, dict(seen.headers)))
    assert event == seen.event
    assert set(event) == {"id", "object", "type", "created_at", "data"}
    assert (event["object"], event["type"], event["data"]["id"]) == ("event", "video.completed", video_id)
    assert seen.headers["webhook-id"] == event["id"]
    assert event["id"].startswith("evt_")
    unwrapped = cast(Any, client.webhooks.unwrap(seen.body, cast(Any, seen.headers), secret=secret))
    assert (unwrapped.id, unwrapped.type) == (event["id"], "video.completed")
    with pytest.raises(WebhookVerificationError):
        Webhook(secret).verify(seen.body + b" ", dict(seen.headers))
    assert server.job(video_id)["status"] == "completed", "the event came before the job had ended"


def test_a_failed_job_is_told(server: LiveServer, receiver: Receiver) -> None:
    with endpoint(server, receiver, "/failed") as secret:
        video_id = server.create(LONG)
        server.cancel(video_id)
        (seen,) = receiver.wait("/failed", 1)
    event = cast(Any, Webhook(secret).verify(seen.body, dict(seen.headers)))
    assert (event["type"], event["data"]["id"]) == ("video.failed", video_id)


def test_a_jobs_own_webhook(server: LiveServer, receiver: Receiver) -> None:
    secret = server.http.get("/v1/webhook_secret").json()["signing_secret"]
    video_id = server.create({**TINY, "webhook_url": f"{receiver.url}/own"})
    (seen,) = receiver.wait("/own", 1)
    assert cast(Any, Webhook(secret).verify(seen.body, dict(seen.headers)))["data"]["id"] == video_id


def test_a_receiver_that_is_down_for_two_attempts_still_gets_it(server: LiveServer, receiver: Receiver) -> None:
    receiver.num_down["/down"] = 2
    with endpoint(server, receiver, "/down") as secret:
        video_id = server.create(TINY)
        first, second = receiver.wait("/down", 2)
        assert 5 <= second.at_s - first.at_s < 10
        if not IS_LONG:
            _send_now(server, video_id)
        third = receiver.wait("/down", 3)[2]
        time.sleep(0.5)
    assert len(receiver.at("/down")) == 3
    assert len({each.headers["webhook-id"] for each in (first, second, third)}) == 1
    Webhook(secret).verify(third.body, dict(third.headers))


def test_endpoints(server: LiveServer, receiver: Receiver) -> None:
    """An endpoint of the tenant hears of every job; during a rotation both secrets sign."""
    http, path = server.http, "/v1/webhook_endpoints"
    made = http.post(path, json={"url": f"{receiver.url}/all", "event_types": ["video.completed"]}).json()
    try:
        old = made["signing_secret"]
        assert old.startswith("whsec_")
        assert "signing_secret" not in http.get(f"{path}/{made['id']}").json()
        assert http.post(f"{path}/{made['id']}/test", json={}).json()["status_code"] == 204
        new = http.post(f"{path}/{made['id']}/rotate_secret", json={}).json()["signing_secret"]
        server.cancel(server.create(LONG))  # an event that it does not want
        video_id = server.create(TINY)
        sample, seen = receiver.wait("/all", 2)
        Webhook(old).verify(sample.body, dict(sample.headers))
        assert len(seen.headers["webhook-signature"].split(" ")) == 2
        for each in (old, new):
            event = cast(Any, Webhook(each).verify(seen.body, dict(seen.headers)))
            assert (event["type"], event["data"]["id"]) == ("video.completed", video_id)
    finally:
        assert http.delete(f"{path}/{made['id']}").json()["deleted"] is True
    assert http.get(f"{path}/{made['id']}").status_code == 404
    assert http.get("/v1/webhook_event_types").json()["data"] == ["video.completed", "video.failed"]


def test_an_image_by_file_id(client: OpenAI, server: LiveServer, picture: Path) -> None:
    with picture.open("rb") as data:
        file = client.files.create(file=data, purpose="vision")
    assert file.filename == picture.name
    assert file.bytes == picture.stat().st_size
    body = {"num_frames": 33, "input_reference": {"file_id": file.id}, "seed": 6}
    video = client.videos.create(prompt="a", size=cast(Any, "64x64"), extra_body=body)
    assert client.videos.poll(video.id).status == "completed"
    sent = {**TINY, "prompt": "a", "seed": 6}
    without = server.http.post("/v1/videos/generations", json=sent, headers={"accept": "video/mp4"}).content
    assert client.videos.download_content(video.id).read() != without
    assert client.files.delete(file.id).deleted
    gone = server.http.post("/v1/videos", json={**sent, "input_reference": {"file_id": file.id}})
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "file_not_found")


def test_a_video_by_id_and_by_file_id(client: OpenAI, server: LiveServer, finished: str) -> None:
    data = client.videos.download_content(finished).read()
    file = client.files.create(file=("source.mp4", data, "video/mp4"), purpose="user_data")
    for reference in ({"id": finished}, {"file_id": file.id}):
        job = server.ended(server.create({**TINY, "video": reference}))
        assert job["status"] == "completed", job["error"]
        assert len(times_s(server.http.get(f"/v1/videos/{job['id']}/content").content)) == 33


def _send_now(server: LiveServer, video_id: str) -> None:
    """Does not wait for the third attempt, once the second has been settled."""
    deadline = time.monotonic() + 10
    while True:
        rows = server.http.get("/v1/webhook_deliveries?limit=100").json()["data"]
        (row,) = (each for each in rows if each["video_id"] == video_id)
        if row["attempts"] == 2:
            break
        assert time.monotonic() < deadline, row
        time.sleep(0.05)
    assert (row["state"], row["last_status"]) == ("pending", 503)
    assert server.http.post(f"/v1/webhook_deliveries/{row['id']}/resend").status_code == 200
