"""The server as a user starts it: the printed command, several clients, bad requests, and both signals."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import grpc
import httpx2
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from helios_serve import __version__
from helios_serve.api.signed_urls import UrlSigner, signing_keys_from

PROGRAM = Path(sys.executable).with_name("helios-serve")
START_S = 90
STOP_S = 10


@dataclass
class Server:
    """A running process and what it printed."""

    process: subprocess.Popen[str]
    url: str = ""
    curl: str = ""
    welcome: str = ""
    errors: list[str] = field(default_factory=list)

    def stop(self, number: signal.Signals) -> int:
        """Sends a signal and waits; returns the exit status."""
        self.process.send_signal(number)
        return self.process.wait(timeout=STOP_S)


@contextmanager
def serving(data_dir: Path, *arguments: str) -> Iterator[Server]:
    command = [str(PROGRAM), "serve", *arguments, "--port", "0", "--data-dir", str(data_dir)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "IMAGE_REVISION": "c0ffee"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:  # type: ignore[call-overload]
        watchdog = threading.Timer(START_S, process.kill)
        watchdog.start()
        server = Server(process=process)
        reader = threading.Thread(target=lambda: server.errors.extend(process.stderr))
        reader.start()
        try:
            server.welcome = _read_welcome(process)
            server.url, server.curl = _address_and_command(server.welcome)
            watchdog.cancel()
            yield server
        finally:
            watchdog.cancel()
            process.kill()
            reader.join()
            print("".join(server.errors)[-4000:])  # shown when a test fails


def _read_welcome(process: subprocess.Popen[str]) -> str:
    text = ""
    assert process.stdout is not None
    for line in process.stdout:
        text += line
        if "Stop with Ctrl-C" in line:
            break
    return text


def _address_and_command(text: str) -> tuple[str, str]:
    address = re.search(r"at (https?://127\.0\.0\.1:\d+)$", text, re.MULTILINE)
    command = re.search(r"curl .*?-o video\.mp4", text, re.DOTALL)
    assert address is not None, text
    assert command is not None, text
    return address[1], command[0]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared, so that the embedded checkpoint is made once."""
    return tmp_path_factory.mktemp("data")


def num_frames(video: bytes) -> int:
    with av.open(io.BytesIO(video), "r") as container:
        return sum(1 for _ in container.decode(video=0))


def make(server: Server, **body: object) -> httpx2.Response:
    return httpx2.post(
        f"{server.url}/v1/videos/generations",
        json={"prompt": "a fox", "num_frames": 33, "size": "128x64", **body},
        headers={"accept": "video/mp4"},
        timeout=60,
    )


def test_a_server_from_start_to_ctrl_c(data_dir: Path, tmp_path: Path) -> None:
    with serving(data_dir) as server:
        assert httpx2.get(f"{server.url}/health").json() == {"status": "ok"}
        (model,) = httpx2.get(f"{server.url}/v1/models").json()["data"]
        assert (model["id"], model["helios"]["default_steps"]) == ("helios-tiny", [1, 1, 1])
        assert json.dumps(model["helios"]["example_prompt"]) in server.curl
        about = httpx2.get(f"{server.url}/version").json()
        assert (about["version"], about["device"], about["dtype"]) == (__version__, "cpu", "float32")
        assert about["commit"] == "c0ffee"
        assert about["roles"] == {"encoder": 1, "dit": 1, "vae": 1}

        words = shlex.split(server.curl.replace("\\\n", " "))
        assert (words[:2], words[-2:]) == (["curl", f"{server.url}/v1/videos/generations"], ["-o", "video.mp4"])
        started = time.monotonic()
        subprocess.run(["bash", "-c", server.curl], cwd=tmp_path, check=True, capture_output=True, timeout=60)
        assert time.monotonic() - started < 15
        assert num_frames((tmp_path / "video.mp4").read_bytes()) == 33

        wanted = (33, 1, 40, 66)
        with ThreadPoolExecutor(4) as clients:
            answers = list(clients.map(lambda count: make(server, num_frames=count, seed=count), wanted))
        assert [answer.status_code for answer in answers] == [200] * 4
        assert [num_frames(answer.content) for answer in answers] == list(wanted)

        bad = make(server, size="130x64")
        assert (bad.status_code, bad.json()["error"]["param"]) == (400, "size")
        good = make(server)
        assert (good.status_code, good.headers["content-type"]) == (200, "video/mp4")

        live = make(server, num_frames=70, stream=True)
        assert live.headers["x-video-id"].startswith("video_")
        assert num_frames(live.content) == 70
        stored = httpx2.get(f"{server.url}/v1/videos/{live.headers['x-video-id']}/content")
        assert num_frames(stored.content) == 70
        poster = httpx2.get(stored.url, params={"variant": "thumbnail"})
        assert poster.content[8:12] == b"WEBP"

        assert server.stop(signal.SIGINT) == 0
    assert "Traceback" not in "".join(server.errors)
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{server.url}/health")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_busy_server_and_the_next_one_goes_on(data_dir: Path, number: signal.Signals) -> None:
    """The running request is answered with 503 `draining`; its job loses nothing."""
    with serving(data_dir) as server, ThreadPoolExecutor(1) as clients:
        running = clients.submit(make, server, num_frames=660, prompt=f"signal {number}")
        video = until(server, lambda newest: newest["prompt"] == f"signal {number}" and chunks_done(newest) >= 1)
        assert not running.done()
        assert server.stop(number) == 0
        answer = running.result()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
        assert answer.headers["retry-after"] == "1"
    assert "Traceback" not in "".join(server.errors)
    with serving(data_dir) as server:
        found = newest(server)
        assert (found["id"], found["status"]) == (video["id"], "in_progress")
        assert chunks_done(found) >= chunks_done(video)
        until(server, lambda newest: newest["status"] == "completed")
        content = httpx2.get(f"{server.url}/v1/videos/{video['id']}/content")
        assert num_frames(content.content) == 660
        assert server.stop(number) == 0
    assert "Traceback" not in "".join(server.errors)


def newest(server: Server) -> dict[str, Any]:
    found: list[dict[str, Any]] = httpx2.get(f"{server.url}/v1/videos", params={"limit": 1}).json()["data"]
    return found[0] if found else {"prompt": "", "status": "", "helios": {"chunks_done": 0}}


def chunks_done(video: dict[str, Any]) -> int:
    count: int = video["helios"]["chunks_done"]
    return count


def until(server: Server, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The newest job, when it is so."""
    deadline = time.monotonic() + 120
    while not condition(video := newest(server)):
        assert time.monotonic() < deadline, video
        time.sleep(0.05)
    return video


def test_the_greeting_means_that_it_listens(data_dir: Path) -> None:
    with serving(data_dir, "--warmup", "none") as server:
        socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))).close()
        assert server.stop(signal.SIGTERM) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--port", "{port}"), r"cannot listen on 127\.0\.0\.1:{port}: .*; choose another --port"),
        (
            ("--port", "0", "--grpc-port", "{port}"),
            r"cannot serve gRPC on 127\.0\.0\.1:{port}: .*; choose another --grpc-port",
        ),
        (
            ("--port", "0", "--admin-bind", "127.0.0.1:{port}"),
            r"cannot listen on 127\.0\.0\.1:{port}: .*; choose another --admin-bind",
        ),
        (("--port", "0", "--tls-cert", "/no/such", "--tls-key", __file__), r"TLS file /no/such: No such file.*"),
        (("--port", "0", "--tls-cert", __file__, "--tls-key", __file__), r"tls_cert .*: .*; give PEM files .*"),
    ],
)
def test_what_cannot_be_had_is_one_clear_error_before_the_model_is_looked_at(
    tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    with socket_on_free_port() as port:
        words = [word.format(port=port) for word in options]
        done = subprocess.run(
            [str(PROGRAM), "serve", "/no/such/model", "--data-dir", str(tmp_path), *words],
            capture_output=True,
            text=True,
            timeout=START_S,
        )
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert re.fullmatch("error: " + message.format(port=port), line)


def test_probes_have_a_port_of_their_own_that_answers_until_the_end(data_dir: Path) -> None:
    with (
        serving(data_dir, "--admin-bind", "127.0.0.1:0", "--warmup", "none") as server,
        ThreadPoolExecutor(1) as clients,
    ):
        admin = _found(r"Probes and metrics: (http://127\.0\.0\.1:\d+)", server.welcome)
        assert httpx2.get(f"{server.url}/live").status_code == 404
        assert httpx2.get(f"{server.url}/docs").status_code == 200
        assert httpx2.get(f"{admin}/ready").status_code == 200
        deep = httpx2.get(f"{admin}/health", params={"deep": 1}, timeout=60)
        assert (deep.status_code, [group["status"] for group in deep.json()["groups"]]) == (200, ["ok"])
        running = clients.submit(make, server, num_frames=1320, prompt="admin")
        until(server, lambda newest: newest["prompt"] == "admin" and chunks_done(newest) >= 1)
        assert httpx2.get(f"{admin}/health", params={"deep": 1}, timeout=60).status_code == 200
        server.process.send_signal(signal.SIGTERM)
        seen: list[tuple[int, int]] = []
        while (pair := _probed(admin)) is not None:
            seen.append(pair)
        assert server.process.wait(timeout=STOP_S) == 0
        assert running.result().json()["error"]["code"] == "draining"
    drained = [pair for pair in seen if pair != (200, 200)]
    assert drained, "the server was gone before it said that it goes"
    assert set(drained) == {(503, 200)}
    assert "Traceback" not in "".join(server.errors)


def _probed(admin: str) -> tuple[int, int] | None:
    """/ready and /live; None when nobody answers any more."""
    try:
        return httpx2.get(f"{admin}/ready").status_code, httpx2.get(f"{admin}/live").status_code
    except httpx2.TransportError:
        return None


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match is not None, text
    return match[1]


@pytest.fixture
def pem(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate of this machine, which is its own authority, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    names = "subjectAltName=DNS:localhost,IP:127.0.0.1"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", names, "-keyout", key, "-out", cert],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


def test_tls_with_client_certificates_and_signing_keys_of_all_replicas(
    data_dir: Path, tmp_path: Path, pem: tuple[Path, Path]
) -> None:
    """HTTP, a WebSocket and gRPC, as their own clients see them. One test, as each start takes seconds."""
    cert, key = map(str, pem)
    (signing := tmp_path / "signing").write_text(f"{'b' * 32}\n{'a' * 32}\n")
    signing.chmod(0o600)
    tls = ("--tls-cert", cert, "--tls-key", key, "--tls-client-ca", cert, "--admin-bind", "127.0.0.1:0")
    with serving(
        data_dir,
        *tls,
        "--grpc-port",
        "0",
        "--warmup",
        "none",
        "--signing-keys-file",
        str(signing),
        "--log-format",
        "json",
    ) as server:
        assert server.url.startswith("https://")
        stranger = ssl.create_default_context(cafile=cert)
        friend = ssl.create_default_context(cafile=cert)
        friend.load_cert_chain(cert, key)
        with pytest.raises(httpx2.TransportError):
            httpx2.get(f"{server.url}/v1/models", verify=stranger)
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"{server.url}/v1/models", verify=ssl.create_default_context())
        with httpx2.Client(verify=friend, timeout=60) as client:
            assert client.get(f"{server.url}/v1/models").json()["data"][0]["id"] == "helios-tiny"
            body = {"prompt": "a fox", "num_frames": 33, "size": "64x64"}
            video = client.post(f"{server.url}/v1/videos/generations", json=body).json()
            assert num_frames(client.get(f"{server.url}/v1/videos/{video['id']}/content").content) == 33
            at = f"{server.url}/v1/videos/{video['id']}/content"
            for secrets, status in (("a" * 32, 200), ("b" * 32, 200), ("c" * 32, 401)):
                token = UrlSigner(signing_keys_from(secrets)).sign(video["id"], "content", time.time())
                assert client.get(at, params={"token": token}).status_code == status
        admin = _found(r"Probes and metrics: (http://127\.0\.0\.1:\d+)", server.welcome)
        assert httpx2.get(f"{admin}/ready").status_code == 200
        with connect(f"wss{server.url[5:]}/v1/realtime/video", ssl=friend, proxy=None, open_timeout=60) as websocket:
            websocket.send("no message")
            with pytest.raises(ConnectionClosed):
                _read_all(websocket)
        address = _found(r"gRPC: (127\.0\.0\.1:\d+)", server.welcome)
        pair = (Path(key).read_bytes(), Path(cert).read_bytes())
        root = Path(cert).read_bytes()
        assert _listed(address, grpc.ssl_channel_credentials(root, *pair)) == grpc.StatusCode.OK
        assert _listed(address, grpc.ssl_channel_credentials(root)) == grpc.StatusCode.UNAVAILABLE
        assert server.stop(signal.SIGTERM) == 0
    lines = [json.loads(line) for line in server.errors if line.startswith("{")]  # gRPC's core writes lines of its own
    told = [line["message"] for line in lines if line["logger"] == "helios_serve.access"]
    assert any(message.startswith("WEBSOCKET /v1/realtime/video 4") for message in told)
    assert "GRPC /helios.video.v1.VideoGenerationService/ListModels OK" in told
    assert not [line for line in lines if line["level"] in ("error", "critical")]
    assert "token=" not in "".join(told)


def _read_all(websocket: ClientConnection) -> None:
    while True:
        websocket.recv(timeout=20)


def _listed(address: str, credentials: grpc.ChannelCredentials) -> grpc.StatusCode:
    with grpc.secure_channel(address, credentials, (("grpc.enable_http_proxy", 0),)) as channel:
        call: Any = channel.unary_unary("/helios.video.v1.VideoGenerationService/ListModels")
        try:
            call(b"", timeout=10)
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            return code
    return grpc.StatusCode.OK


@contextmanager
def socket_on_free_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]
