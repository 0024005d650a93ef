"""HTTP as a hostile, slow or leaving client speaks it, raw bytes on a socket, and what a process holds while it does.

Knows no route and no answer that would be right.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

JSON = "application/json"
BOUNDARY = "xxBOUNDARYxx"
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One HTTP answer; names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def code(self) -> str | None:
        """The code of an error of ours; None for what the HTTP parser itself refused."""
        try:
            error = json.loads(self.body)["error"]
        except (ValueError, KeyError, TypeError):
            return None
        return str(error["code"])

    @property
    def json(self) -> dict[str, object]:
        value: dict[str, object] = json.loads(self.body)
        return value


def request(method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> bytes:
    """A well-formed request; `headers` add to and replace Host and Content-Length."""
    all_headers = {"Host": "127.0.0.1", "Content-Length": str(len(body)), **(headers or {})}
    lines = "".join(f"{name}: {value}\r\n" for name, value in all_headers.items())
    return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode("latin-1") + body


def json_request(method: str, path: str, value: object, headers: Mapping[str, str] | None = None) -> bytes:
    return request(method, path, json.dumps(value).encode(), {"Content-Type": JSON, **(headers or {})})


def form_request(path: str, parts: Mapping[str, str | bytes], *, end: str = "--\r\n") -> bytes:
    """A multipart form: text is a field, bytes a file. `end` closes the last boundary."""
    body = b""
    for name, value in parts.items():
        is_file = isinstance(value, bytes)
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"'
        head += '; filename="x.bin"\r\nContent-Type: application/octet-stream' if is_file else ""
        body += f"{head}\r\n\r\n".encode() + (value if isinstance(value, bytes) else value.encode()) + b"\r\n"
    body += f"--{BOUNDARY}{end}".encode()
    return request("POST", path, body, {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"})


def exchange(
    port: int, data: bytes, *, timeout_s: float = 60.0, ends: bool = False, source: str = "127.0.0.1"
) -> Answer | None:
    """Sends bytes and reads one answer; None when the server closes without one.

    Args:
        ends: whether the client says that it has sent everything.
        source: the client's address.

    Raises: TimeoutError when nothing comes for `timeout_s`.
    """
    with socket.create_connection(("127.0.0.1", port), timeout_s, source_address=(source, 0)) as client:
        try:
            client.sendall(data)
            if ends:
                client.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass  # refused before everything was read: its answer may be there
        return read_answer(client, data.split(b" ", 1)[0].decode("latin-1"))


def read_answer(client: socket.socket, method: str = "GET") -> Answer | None:
    """The next answer on a connection; None when it is closed."""
    response = http.client.HTTPResponse(client, method=method)
    try:
        response.begin()
        while response.status == 100:
            response.begin()
        body = response.read()
    except (http.client.BadStatusLine, http.client.IncompleteRead, ConnectionResetError):
        return None
    finally:
        response.close()
    return Answer(status=response.status, headers={k.lower(): v for k, v in response.getheaders()}, body=body)


def slow_socket(port: int, data: bytes, *, receive_bytes: int = 2048) -> socket.socket:
    """A connection with the smallest receive buffer that the kernel gives, on which `data` was sent."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    client.settimeout(60)
    client.connect(("127.0.0.1", port))
    client.sendall(data)
    return client


def reset(client: socket.socket) -> None:
    """Leaves as a client that is killed or loses its network does."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


@dataclass(frozen=True, slots=True)
class Process:
    """What the kernel says of a process."""

    pid: int

    @property
    def rss_bytes(self) -> int:
        return self._status_kb("VmRSS") * 1024

    @property
    def num_threads(self) -> int:
        return self._status_kb("Threads")

    @property
    def num_fds(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    @property
    def num_sockets(self) -> int:
        """Open sockets, the listening one among them."""
        links = []
        for name in os.listdir(f"/proc/{self.pid}/fd"):
            try:
                links.append(os.readlink(f"/proc/{self.pid}/fd/{name}"))
            except FileNotFoundError:
                continue
        return sum(link.startswith("socket:") for link in links)

    @property
    def children(self) -> list[int]:
        found = []
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            try:
                found += [int(pid) for pid in (task / "children").read_text().split()]
            except (FileNotFoundError, ProcessLookupError):
                continue
        return found

    @property
    def child_cpu_s(self) -> float:
        """CPU seconds of children that have ended."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[13]) + int(fields[14])) / TICKS

    def _status_kb(self, name: str) -> int:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


@dataclass
class PeakRss:
    """The largest resident memory of any child seen so far, and of the process itself."""

    child_bytes: int = 0
    own_bytes: int = 0
    _done: threading.Event = field(default_factory=threading.Event)

    def follow(self, process: Process) -> None:
        while not self._done.wait(0.005):
            self.own_bytes = max(self.own_bytes, process.rss_bytes)
            for pid in process.children:
                try:
                    if Path(f"/proc/{pid}/cmdline").read_bytes() == Path(f"/proc/{process.pid}/cmdline").read_bytes():
                        continue  # forked, and still the parent's image
                    self.child_bytes = max(self.child_bytes, Process(pid).rss_bytes)
                except (FileNotFoundError, ProcessLookupError, StopIteration):
                    continue  # it has just ended

    def stop(self) -> None:
        self._done.set()


@contextmanager
def watched(process: Process) -> Iterator[PeakRss]:
    """Follows the memory of a process and its children meanwhile."""
    peak = PeakRss()
    thread = threading.Thread(target=peak.follow, args=(process,))
    thread.start()
    try:
        yield peak
    finally:
        peak.stop()
        thread.join()


def settles(read: Callable[[], int], limit: int, seconds: float) -> float | None:
    """Seconds until `read` is at most `limit`; None when that takes longer than `seconds`."""
    started = time.monotonic()
    while read() > limit:
        if time.monotonic() - started > seconds:
            return None
        time.sleep(0.05)
    return time.monotonic() - started


def open_websocket(port: int, path: str, text: str, *, receive_bytes: int = 65536) -> socket.socket:
    """A WebSocket on which one text message was sent; whatever comes on it is left to the caller.

    Raises: ConnectionError when the server does not take it.
    """
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": base64.b64encode(os.urandom(16)).decode(),
    }
    client = slow_socket(port, request("GET", path, b"", upgrade), receive_bytes=receive_bytes)
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        piece = client.recv(1)
        if not piece:
            client.close()
            raise ConnectionError(head.decode("latin-1"))
        head += piece
    payload, mask = text.encode(), bytes(4)  # a mask of zeros is a mask
    client.sendall(struct.pack(">BBH", 0x81, 0x80 | 126, len(payload)) + mask + payload)
    return client
