"""Requests that no client should send, at a real server that works for others meanwhile: refused, and nobody notices.

HELIOS_TEST_ATTACKS: malformed requests, 200; 1,000 by hand. HELIOS_TEST_SEED: what they are made from, 1.
HELIOS_TEST_LONG=1 waits for the minute after which an address that guessed keys is heard again, and half a
minute for half-open connections to be closed.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from tests.faults.attacks import CREATE, GENERATE, PRIVATE_URLS, Attack, attacks, bombs
from tests.faults.conftest import NewServer
from tests.faults.raw_http import Answer, Process, exchange, form_request, json_request, request, settles, watched
from tests.faults.server_process import Server

pytestmark = pytest.mark.server

NUM_ATTACKS = int(os.environ.get("HELIOS_TEST_ATTACKS", "200"))
SEED = int(os.environ.get("HELIOS_TEST_SEED", "1"))
IS_LONG = os.environ.get("HELIOS_TEST_LONG") == "1"
NUM_GOOD = 20
NUM_HALF_OPEN = 100
MAX_GROWTH_BYTES = 96 << 20
"""Of resident memory under attack, behind a warm-up with other attacks: the allocator keeps some for each thread."""
HEADER_LIMIT_BYTES = 32 << 10


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for all tests that need no options: whatever is sent, it works on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    made = Server(model=tiny_model, data_dir=tmp_path_factory.mktemp("data"), port=port)
    made.start()
    yield made
    made.kill()


def pid_of(server: Server) -> int:
    assert server.process is not None
    return server.process.pid


def good(seed: int) -> bytes:
    body = {"prompt": f"video {seed}", "seed": seed, "num_frames": 33 * (1 + seed % 3), "size": "64x64"}
    return json_request("POST", GENERATE, {**body, "helios": {"reproducible": "strict"}}, {"Accept": "video/mp4"})


def video(server: Server, seed: int) -> bytes:
    answer = exchange(server.port, good(seed), timeout_s=120)
    assert answer is not None
    assert answer.status == 200, answer.body
    return answer.body


def is_refused(attack: Attack, answer: Answer | None) -> bool:
    return attack.may_be_cut if answer is None else 400 <= answer.status < 500


def attack_all(server: Server, todo: list[Attack]) -> list[str]:
    """What was not refused, in words."""

    def one(attack: Attack) -> str | None:
        answer = exchange(server.port, attack.data, ends=attack.ends)
        if is_refused(attack, answer):
            return None
        return f"{attack.name}: {'closed' if answer is None else (answer.status, answer.body[:200])}"

    with ThreadPoolExecutor(4) as attackers:
        return [problem for problem in attackers.map(one, todo) if problem is not None]


@contextmanager
def half_open(server: Server, count: int) -> Iterator[list[socket.socket]]:
    """Connections whose requests come a byte now and then, and never end."""
    text = request("POST", CREATE, b"", {"Content-Length": "100"})
    clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(count)]
    ended = threading.Event()

    def drip() -> None:
        for position in range(len(text) - 4):
            for client in clients:
                with suppress(OSError):
                    client.send(text[position : position + 1])
            if ended.wait(0.2):
                return

    dripping = threading.Thread(target=drip)
    dripping.start()
    try:
        yield clients
    finally:
        ended.set()
        dripping.join()
        for client in clients:
            client.close()


def test_malformed_requests_change_nothing_for_the_others(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """Matrix rows 17, 21 and 23."""
    document = server.get("/openapi.json")
    undisturbed = [video(server, seed) for seed in range(NUM_GOOD)]
    assert attack_all(server, attacks(document, SEED + 1, 150)) == []
    process, version = Process(pid_of(server)), server.get("/version")
    before, num_fds, num_threads = process.rss_bytes, process.num_fds, process.num_threads
    started = time.monotonic()
    with ThreadPoolExecutor(2) as clients, half_open(server, NUM_HALF_OPEN):
        disturbed = clients.map(lambda seed: video(server, seed), range(NUM_GOOD))
        assert attack_all(server, attacks(document, SEED, NUM_ATTACKS)) == []
        assert list(disturbed) == undisturbed
    grown = process.rss_bytes - before
    with capsys.disabled():
        print(f"\n  {NUM_ATTACKS} attacks in {time.monotonic() - started:.1f} s, RSS {grown / 2**20:+.1f} MiB", end=" ")
    assert grown <= MAX_GROWTH_BYTES
    assert settles(lambda: process.num_fds, num_fds + 2, 5.0) is not None
    assert process.num_threads <= num_threads + 4
    assert server.get("/version") == version
    assert server.process is not None
    assert server.process.poll() is None
    assert server.get("/ready") == {"status": "ok"}


def test_bombs_are_refused_cheaply(server: Server) -> None:
    """Matrix row 21: no decoding process uses 256 MiB, and lies in headers cost no 2 s of CPU."""
    process = Process(pid_of(server))
    fields = {"prompt": "a", "num_frames": "33", "size": "64x64"}
    exchange(server.port, form_request(CREATE, {**fields, "input_reference": bombs()[1][2]}))  # loads what it needs
    for name, field, data in bombs():
        cpu_s = process.child_cpu_s
        with watched(process) as peak:
            answer = exchange(server.port, form_request(CREATE, {**fields, field: data}))
        assert answer is not None
        assert answer.status == 400, (name, answer.body)
        assert peak.child_bytes <= 256 << 20, name
        assert process.child_cpu_s - cpu_s <= 2.0, name


def test_no_address_inside_is_asked(new_server: NewServer) -> None:
    """Matrix row 22: even hosts that are allowed by name are not asked when their address is private."""
    with closing(socket.create_server(("127.0.0.1", 0))) as canary:
        canary.setblocking(False)
        port = canary.getsockname()[1]
        server = new_server("data", *(f"--media-url-host={host}" for host in ("127.0.0.1", "localhost", "0x7f.1")))
        server.start()
        own = [f"https://{host}:{port}/x.png" for host in ("127.0.0.1", "localhost", "0x7f.1", "[::ffff:127.0.0.1]")]
        for url in (*own, *PRIVATE_URLS):
            for field in ("image_url", "video_url"):
                answer = exchange(server.port, json_request("POST", CREATE, {"prompt": "a", field: url}))
                assert answer is not None
                assert answer.status == 400, (url, answer.body)
                assert answer.code in ("media_url_forbidden", "media_fetch_failed", "media_invalid"), answer.body
                assert b"secret" not in answer.body
        with pytest.raises(BlockingIOError):
            canary.accept()


def test_headers_have_a_limit(server: Server) -> None:
    answer = exchange(server.port, request("GET", "/version", b"", {"X": "a" * (4 * HEADER_LIMIT_BYTES)}))
    assert answer is None or answer.status in (400, 431)


@pytest.mark.skipif(not IS_LONG, reason="HELIOS_TEST_LONG=1 waits for half a minute")
def test_half_open_connections_are_closed(server: Server) -> None:
    """Matrix row 23, slowloris: a request whose head is not there after 30 s will never be."""
    process = Process(pid_of(server))
    num_sockets = process.num_sockets
    with half_open(server, NUM_HALF_OPEN):
        assert settles(lambda: process.num_sockets, num_sockets + NUM_HALF_OPEN // 2, 31.0) is not None


@pytest.mark.parametrize("hosts", ["", "Host: 127.0.0.1\r\nHost: localhost\r\n"])
def test_a_request_names_one_host(server: Server, hosts: str) -> None:
    """RFC 9112 3.2: 400."""
    answer = exchange(server.port, f"GET /version HTTP/1.1\r\n{hosts}\r\n".encode())
    assert answer is not None
    assert answer.status == 400


def test_the_best_quality_is_made(server: Server) -> None:
    body = {"prompt": "a", "num_frames": 33, "size": "64x64", "helios": {"crf": 0}}
    answer = exchange(server.port, json_request("POST", GENERATE, body))
    assert answer is not None
    assert answer.status in (200, 400), answer.body


# Access.


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


def new_key(keys_file: Path, tenant: str, limit: str = "requests_per_second=1000") -> str:
    command = [sys.executable, "-m", "helios_serve.cli", "keys", "create", "--keys-file", str(keys_file)]
    done = subprocess.run([*command, "--tenant", tenant, "--limit", limit], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def keyed(new_server: NewServer, keys_file: Path) -> tuple[Server, str, str]:
    """A server with two tenants, and a key of each."""
    keys = new_key(keys_file, "one"), new_key(keys_file, "two")
    server = new_server("data", "--keys-file", str(keys_file))
    server.call = with_key(server, keys[0])  # type: ignore[method-assign]
    server.start()
    return server, *keys


def with_key(server: Server, key: str) -> Callable[..., bytes | None]:
    def call(method: str, path: str, body: object = None) -> bytes | None:
        try:
            answer = exchange(server.port, json_request(method, path, body, bearer(key)))
        except ConnectionRefusedError:
            return None
        return answer.body if answer is not None and answer.status == 200 else None

    return call


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_guessed_keys(keyed: tuple[Server, str, str]) -> None:
    """Matrix row 24: 200 wrong keys from one address; others are not disturbed, nor is the address for ever."""
    server, key, _ = keyed
    wrong = [f"{key[:-4]}{number:04d}" for number in range(200)]
    wrong[50] = "hs_" + "x" * 5000
    answers = [exchange(server.port, request("GET", CREATE, b"", bearer(each))) for each in wrong]
    statuses = [answer.status for answer in answers if answer is not None]
    assert statuses[:10] == [401] * 10
    assert statuses[11:] == [429] * 189
    last = answers[-1]
    assert last is not None
    assert (last.code, 1 <= int(last.headers["retry-after"]) <= 60) == ("auth_throttled", True)
    other = exchange(server.port, request("GET", CREATE, b"", bearer(key)), source="127.0.0.2")
    assert other is not None
    assert other.status == 200
    if IS_LONG:
        time.sleep(61)
        again = exchange(server.port, request("GET", CREATE, b"", bearer(key)))
        assert again is not None
        assert again.status == 200


def test_what_is_another_tenants_does_not_exist(keyed: tuple[Server, str, str]) -> None:
    """Matrix row 25: 404 for everything, in the time of an unknown id."""
    server, mine, theirs = keyed
    made = exchange(server.port, json_request("POST", GENERATE, {"prompt": "a", "num_frames": 33}, bearer(theirs)))
    assert made is not None
    assert made.status == 200
    video_id, unknown = str(made.json["id"]), "video_01JD0000000000000000000000"
    times: dict[str, list[float]] = {video_id: [], unknown: []}
    for method, path, body in (
        ("GET", "", None), ("GET", "/content", None), ("GET", "/events", None), ("GET", "/stream", None),
        ("GET", "/hls/index.m3u8", None), ("GET", "/hls/init.mp4", None), ("GET", "/hls/seg0.m4s", None),
        ("POST", "/cancel", None), ("POST", "/remix", {"prompt": "b"}), ("DELETE", "", None),
    ):  # fmt: skip
        for each in (video_id, unknown):
            answer = exchange(server.port, json_request(method, f"{CREATE}/{each}{path}", body, bearer(mine)))
            assert answer is not None
            assert (answer.status, answer.code) == (404, "video_not_found"), (method, path)
    for _ in range(60):
        for each, taken in times.items():
            started = time.perf_counter()
            exchange(server.port, request("GET", f"{CREATE}/{each}/content", b"", bearer(mine)))
            taken.append(time.perf_counter() - started)
    theirs_s, unknown_s = (statistics.median(taken) for taken in times.values())
    assert abs(theirs_s - unknown_s) <= 0.5 * max(theirs_s, unknown_s)
    kept = exchange(server.port, request("GET", f"{CREATE}/{video_id}/content", b"", bearer(theirs)))
    assert kept is not None
    assert kept.status == 200


def test_a_hundred_replays_make_one_job(server: Server) -> None:
    """Matrix row 26."""
    barrier = threading.Barrier(100)

    def create(prompt: str) -> Answer:
        data = json_request("POST", CREATE, {"prompt": prompt, "num_frames": 33}, {"Idempotency-Key": "one"})
        barrier.wait(30)
        answer = exchange(server.port, data)
        assert answer is not None
        return answer

    with ThreadPoolExecutor(100) as clients:
        answers = list(clients.map(create, ["replayed"] * 100))
    assert {answer.status for answer in answers} == {200}
    assert len({answer.json["id"] for answer in answers}) == 1
    assert sum("idempotent-replayed" not in answer.headers for answer in answers) == 1
    barrier = threading.Barrier(1)
    other = create("another")
    assert (other.status, other.code) == (422, "idempotency_key_reused")
    listed = server.get(f"{CREATE}?limit=100")["data"]
    assert isinstance(listed, list)
    assert sum(job["prompt"] == "replayed" for job in listed) == 1
