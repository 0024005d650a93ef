"""Who may do what: other tenants, tokens in addresses, scopes, limits, one key for many posts, guessing, metrics."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx2
import pytest

from helios_serve.api.signed_urls import UrlSigner, load_signing_keys
from tests.acceptance.conftest import KeyedServer
from tests.acceptance.live_server import ANSWER_S, TINY, LiveServer, error_of

UNKNOWN = {"video": "video_01JD0000000000000000000000", "file": "file-unknown", "endpoint": "we_unknown"}


@contextmanager
def calling_from(address: str, server: LiveServer) -> Iterator[httpx2.Client]:
    """A client at another address of this machine, so that its failures are not counted against the others."""
    transport = httpx2.HTTPTransport(local_address=address)
    with httpx2.Client(base_url=server.url, transport=transport, timeout=ANSWER_S) as client:
        yield client


@pytest.fixture(scope="module")
def alices(keyed: KeyedServer, picture: Path) -> dict[str, str]:
    """One of each thing that a tenant owns, by kind."""
    alice = keyed.alice
    video = alice.create({**TINY, "num_frames": 66})
    file = alice.http.post("/v1/files", files={"file": picture.read_bytes()}, data={"purpose": "vision"})
    endpoint = alice.http.post("/v1/webhook_endpoints", json={"url": "http://127.0.0.1:9/hook"})
    assert (file.status_code, endpoint.status_code) == (200, 200), (file.text, endpoint.text)
    assert alice.ended(video)["status"] == "completed"
    return {"video": video, "file": file.json()["id"], "endpoint": endpoint.json()["id"]}


def calls(server: LiveServer) -> Iterator[tuple[str, str, str]]:
    """Method, path and kind of thing of every documented route that names one by its id."""
    for path, operations in server.http.get("/openapi.json").json()["paths"].items():
        for kind in ("video", "file", "endpoint"):
            if f"{{{kind}_id}}" in path:
                yield from ((method.upper(), path.replace("{index}", "0"), kind) for method in operations)


BODIES: dict[str, dict[str, Any]] = {"remix": {"prompt": "b"}}


def test_another_tenants_things_are_not_found(keyed: KeyedServer, alices: dict[str, str]) -> None:
    """Every documented route answers as for an id that nobody has, to the letter."""
    seen = 0
    for method, path, kind in calls(keyed.bob):
        answers = []
        for given in (alices[kind], UNKNOWN[kind]):
            body = BODIES.get(path.rpartition("/")[2], {}) if method == "POST" else None
            url = path.replace(f"{{{kind}_id}}", given)
            answer = keyed.bob.http.request(method, url, json=body) if body is not None else (
                keyed.bob.http.request(method, url)
            )  # fmt: skip
            assert answer.status_code == 404, (method, url, answer.text)
            error = error_of(answer)
            answers.append({**error, "message": error["message"].replace(given, "ID")})
        assert answers[0] == answers[1]
        seen += 1
    assert seen > 14
    for kind, path in (("video", "/v1/videos"), ("file", "/v1/files"), ("endpoint", "/v1/webhook_endpoints")):
        assert keyed.alice.http.get(f"{path}/{alices[kind]}").status_code == 200
        assert alices[kind] not in keyed.bob.http.get(f"{path}?limit=100").text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/videos/extensions", {"prompt": "b", "video": {"id": "{video}"}}),
        ("/v1/videos", {"prompt": "b", "video": {"id": "{video}"}}),
        ("/v1/videos", {"prompt": "b", "input_reference": {"file_id": "{file}"}}),
        ("/v1/videos/generations", {"prompt": "b", "input_reference": {"file_id": "{file}"}}),
    ],
)
def test_another_tenants_things_cannot_be_used(
    keyed: KeyedServer, alices: dict[str, str], path: str, body: dict[str, Any]
) -> None:
    def named(ids: dict[str, str]) -> dict[str, Any]:
        return {
            name: {key: text.format(**ids) for key, text in value.items()} if isinstance(value, dict) else value
            for name, value in body.items()
        }

    theirs, unknown = (keyed.bob.http.post(path, json=named(ids)) for ids in (alices, UNKNOWN))
    assert theirs.status_code == unknown.status_code == 404, theirs.text
    assert error_of(theirs)["code"] == error_of(unknown)["code"]


def test_a_lists_cursor_of_another_tenant_is_not_found(keyed: KeyedServer, alices: dict[str, str]) -> None:
    assert keyed.bob.http.get("/v1/videos", params={"after": alices["video"]}).status_code == 404


def test_without_a_key(keyed: KeyedServer) -> None:
    for path in ("/v1/videos", "/v1/models", "/v1/files", "/v1/webhook_endpoints"):
        answer = keyed.anonymous.http.get(path)
        assert (answer.status_code, error_of(answer)["code"]) == (401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/live", "/ready", "/health", "/version", "/metrics", "/", "/openapi.json"):
        assert keyed.anonymous.http.get(path).status_code == 200, path


def test_signed_addresses_need_no_key(keyed: KeyedServer, alices: dict[str, str]) -> None:
    urls = keyed.alice.job(alices["video"])["helios"]["urls"]
    for url in urls.values():
        answer = keyed.anonymous.http.get(url)
        assert answer.status_code == 200, url
        assert answer.headers["referrer-policy"] == "no-referrer"
    playlist = keyed.anonymous.http.get(urls["hls"]).text
    entries = [line for line in playlist.splitlines() if line and not line.startswith("#")]
    assert len(entries) == 2
    for entry in entries:
        url = str(httpx2.URL(urls["hls"]).join(entry))
        assert keyed.anonymous.http.get(url).status_code == 200, url


def test_tokens_are_for_one_video_and_one_use_and_end(keyed: KeyedServer, alices: dict[str, str]) -> None:
    video, other = alices["video"], keyed.alice.create(TINY)
    keyed.alice.ended(other)
    token = parse_qs(urlsplit(keyed.alice.job(video)["helios"]["urls"]["content"]).query)["token"][0]
    signer = UrlSigner(load_signing_keys(keyed.alice.data_dir))
    expired = signer.sign(video, "content", time.time() - 3601)
    with calling_from("127.0.0.3", keyed.anonymous) as client:
        assert client.get(f"/v1/videos/{video}/content", params={"token": token}).status_code == 200
        for path, given in (
            (f"/v1/videos/{other}/content", token),
            (f"/v1/videos/{video}/stream", token),
            (f"/v1/videos/{video}/hls/index.m3u8", token),
            (f"/v1/videos/{video}/content", expired),
            (f"/v1/videos/{video}/content", token[:-2] + ("AA" if token[-2:] != "AA" else "BB")),
            (f"/v1/videos/{video}", token),
        ):
            answer = client.get(path, params={"token": given})
            assert (answer.status_code, error_of(answer)["code"]) == (401, "invalid_api_key"), path
            assert given not in answer.text
    assert token not in (keyed.alice.data_dir / "server.log").read_text()


def test_scopes(keyed: KeyedServer, alices: dict[str, str]) -> None:
    """reader is of alice's tenant and may only read."""
    reader, video = keyed.reader.http, alices["video"]
    for path in (f"/v1/videos/{video}", f"/v1/videos/{video}/content", "/v1/videos", "/v1/models"):
        assert reader.get(path).status_code == 200
    for method, path in (
        ("POST", "/v1/videos"), ("POST", "/v1/videos/generations"), ("DELETE", f"/v1/videos/{video}"),
        ("POST", f"/v1/videos/{video}/cancel"), ("POST", f"/v1/videos/{video}/remix"), ("GET", "/v1/files"),
        ("POST", "/v1/files"), ("GET", "/v1/webhook_endpoints"), ("POST", "/v1/realtime/client_secrets"),
    ):  # fmt: skip
        answer = reader.request(method, path, json=TINY) if method == "POST" else reader.request(method, path)
        assert (answer.status_code, error_of(answer)["code"]) == (403, "insufficient_scope"), path


def test_limits_of_a_key(keyed: KeyedServer) -> None:
    over = keyed.capped.http.post("/v1/videos", json={**TINY, "num_frames": 34})
    assert over.status_code == 400
    assert error_of(over)["message"] == "num_frames 34: at most 33 for this key"
    for field, value in (("priority", -1), ("expires_after", 8 * 86_400)):
        answer = keyed.bob.http.post("/v1/videos", json={**TINY, field: value})
        assert (answer.status_code, error_of(answer)["param"]) == (400, field)
    with ThreadPoolExecutor(16) as pool:
        statuses = Counter(pool.map(lambda _: keyed.bob.http.get("/v1/models").status_code, range(300)))
    assert statuses[429] > 0, "more than 50 requests a second"
    assert set(statuses) == {200, 429}
    time.sleep(1)  # bob's bucket fills again, for the tests that follow


def test_a_hundred_posts_with_one_key_make_one_job(keyed: KeyedServer) -> None:
    body, headers = {**TINY, "prompt": "only once"}, {"idempotency-key": f"hundred-{time.time()}"}
    with ThreadPoolExecutor(100) as pool:
        answers = [*pool.map(lambda _: keyed.alice.http.post("/v1/videos", json=body, headers=headers), range(100))]
    assert Counter(answer.status_code for answer in answers) == {200: 100}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sum("idempotent-replayed" in answer.headers for answer in answers) == 99
    listed = keyed.alice.http.get("/v1/videos?limit=100").json()["data"]
    assert [job["prompt"] for job in listed].count("only once") == 1


def test_the_same_idempotency_key_of_another_tenant_is_another(keyed: KeyedServer) -> None:
    headers = {"idempotency_key": f"shared-{time.time()}"}
    assert keyed.alice.create(TINY, **headers) != keyed.bob.create({**TINY, "seed": 1}, **headers)


def test_guessing_keys_is_throttled(keyed: KeyedServer) -> None:
    known = keyed.alice.key.rpartition("_")[0]
    with calling_from("127.0.0.2", keyed.anonymous) as client:
        answers = [
            client.get("/v1/videos", headers={"authorization": f"Bearer {known}_{guess:064x}"}) for guess in range(200)
        ]
        held = client.get("/v1/models", headers={"authorization": f"Bearer {keyed.alice.key}"})
    assert Counter(answer.status_code for answer in answers) == {401: 10, 429: 190}
    last = answers[-1]
    assert error_of(last)["code"] == "auth_throttled"
    assert 1 <= int(last.headers["retry-after"]) <= 60
    assert held.status_code == 429
    assert keyed.alice.http.get("/v1/models").status_code == 200, "another address is not held up"


def test_metrics_hold_no_ids(keyed: KeyedServer, alices: dict[str, str]) -> None:
    keyed.bob.http.get(f"/v1/videos/{alices['video']}?token=secret")
    keyed.anonymous.http.get("/v1/unknown/path/of/mine")
    text = keyed.anonymous.http.get("/metrics").text
    assert 'route="/v1/videos/{video_id}"' in text or "{video_id}" in text
    assert not re.search(r"video_[0-9A-Z]{26}|hs_|we_[0-9a-f]{8}|file-[0-9A-Za-z]{8}|req_|token=|path/of/mine", text)
    for word in ("alice", "bob", keyed.alice.key.split("_")[1], keyed.bob.key.split("_")[1], alices["file"]):
        assert word not in text
