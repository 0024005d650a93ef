"""The deadlines of connections, at uvicorn itself with an application of a few lines; seconds are cut to tenths."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, closing
from typing import Any, ClassVar

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from helios_serve.api.connections import ConnectionLimits, HttpConnection, WebSocketConnection

SHORT = ConnectionLimits(head_s=0.4, body_idle_s=0.4, body_s=1.5, drain_s=0.5, max_answer_bytes=1 << 20, check_s=0.05)
CUT_S = 1.2
"""When one of these must be over; a busy machine is late."""
LARGE = bytes(8 << 20)
UPGRADE = (
    b"GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)


class ShortHttp(HttpConnection):
    limits: ClassVar[ConnectionLimits] = SHORT


class ShortWebSocket(WebSocketConnection):
    limits: ClassVar[ConnectionLimits] = SHORT


class App:
    """Answers `/large` with more than a socket holds, `/late` after a while, anything else with the body's size."""

    def __init__(self) -> None:
        self.num_running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.num_running += 1
        try:
            await (self._http if scope["type"] == "http" else self._websocket)(scope, receive, send)
        finally:
            self.num_running -= 1

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        num_bytes, has_more = 0, True
        while has_more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            num_bytes, has_more = num_bytes + len(message["body"]), message["more_body"]
        if scope["path"] == "/late":
            await asyncio.sleep(2 * SHORT.head_s)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(4 if scope["path"] == "/large" else 0):
            await send({"type": "http.response.body", "body": LARGE, "more_body": True})
        await send({"type": "http.response.body", "body": b"%d" % num_bytes})

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        if "large" in scope["query_string"].decode():
            await send({"type": "websocket.send", "bytes": LARGE})
        while (await receive())["type"] != "websocket.disconnect":
            pass


class Running:
    """A server on a port of its own, and its application."""

    def __init__(self, server: uvicorn.Server, app: App, port: int) -> None:
        self.app = app
        self.port = port
        self._server = server

    @property
    def num_connections(self) -> int:
        return len(self._server.server_state.connections)

    async def connect(self, data: bytes, receive_bytes: int = 1 << 20) -> socket.socket:
        """A client that reads what a test reads by itself, and `data` sent on it."""
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, ("127.0.0.1", self.port))
        await loop.sock_sendall(client, data)
        await asyncio.sleep(0.1)
        return client

    async def is_cut(self) -> bool:
        """Whether no connection is left, nor the application's task for one, soon enough."""
        deadline = asyncio.get_running_loop().time() + CUT_S
        while self.num_connections > 0 or self.app.num_running > 0:
            if asyncio.get_running_loop().time() > deadline:
                return False
            await asyncio.sleep(0.02)
        return True


@asynccontextmanager
async def running() -> AsyncIterator[Running]:
    app = App()
    config = uvicorn.Config(
        app, http=ShortHttp, ws=ShortWebSocket, log_config=None, lifespan="off", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        try:
            yield Running(server, app, listener.getsockname()[1])
        finally:
            server.should_exit = True
            await serving


def run(scenario: Callable[[Running], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(20), running() as server:
            await scenario(server)

    asyncio.run(main())


async def drip(client: socket.socket, data: bytes, seconds: float) -> None:
    """A byte every 50 ms, as long as the other side takes them."""
    loop = asyncio.get_running_loop()
    for position in range(round(seconds / 0.05)):
        try:
            await loop.sock_sendall(client, data[position % len(data) : position % len(data) + 1])
        except OSError:
            return
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("data", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: a\r\n"], ids=["none", "line", "headers"])
def test_a_head_that_does_not_end_is_cut(data: bytes) -> None:
    async def scenario(server: Running) -> None:
        with closing(await server.connect(data)):
            assert server.num_connections == 1
            assert await server.is_cut()

    run(scenario)


@pytest.mark.parametrize("text", [b"a", b"\r\n"], ids=["header", "empty lines"])
def test_a_head_that_drips_is_cut(text: bytes) -> None:
    async def scenario(server: Running) -> None:
        start = b"GET / HTTP/1.1\r\nX: " if text == b"a" else b""
        with closing(await server.connect(start)) as client:
            dripping = asyncio.create_task(drip(client, text, 3.0))
            assert await server.is_cut()
            await dripping

    run(scenario)


def test_the_second_head_has_a_deadline_too() -> None:
    async def scenario(server: Running) -> None:
        with closing(await server.connect(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")) as client:
            assert b"200 OK" in await asyncio.get_running_loop().sock_recv(client, 1000)
            await asyncio.get_running_loop().sock_sendall(client, b"GET")
            assert await server.is_cut()

    run(scenario)


def test_a_body_that_stops_is_cut_and_its_task_ends() -> None:
    async def scenario(server: Running) -> None:
        with closing(await server.connect(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nabc")):
            assert server.app.num_running == 1
            assert await server.is_cut()

    run(scenario)


def test_a_body_that_drips_has_a_total_deadline() -> None:
    async def scenario(server: Running) -> None:
        head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n"
        with closing(await server.connect(head)) as client:
            dripping = asyncio.create_task(drip(client, b"x", 4.0))
            assert not await server.is_cut(), "it still sends"
            await asyncio.sleep(max(0.0, SHORT.body_s - CUT_S))
            assert await server.is_cut()
            await dripping

    run(scenario)


def test_a_slow_body_is_taken() -> None:
    async def scenario(server: Running) -> None:
        head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 16\r\n\r\n"
        with closing(await server.connect(head)) as client:
            await drip(client, b"x", 0.8)
            assert (await asyncio.get_running_loop().sock_recv(client, 1000)).endswith(b"2\r\n16\r\n0\r\n\r\n")

    run(scenario)


def test_a_late_answer_is_waited_for() -> None:
    """Also by a client that sends an empty line behind its body, as some do."""

    async def scenario(server: Running) -> None:
        with closing(await server.connect(b"GET /late HTTP/1.1\r\nHost: a\r\n\r\n\r\n")) as client:
            assert b"200 OK" in await asyncio.get_running_loop().sock_recv(client, 1000)

    run(scenario)


def test_who_reads_nothing_is_cut() -> None:
    async def scenario(server: Running) -> None:
        with closing(await server.connect(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n", 2048)):
            assert server.app.num_running == 1
            assert await server.is_cut()

    run(scenario)


def test_who_reads_slowly_is_served() -> None:
    async def scenario(server: Running) -> None:
        loop, num_bytes = asyncio.get_running_loop(), 0
        with closing(await server.connect(b"GET /large HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")) as client:
            while piece := await loop.sock_recv(client, 1 << 20):
                num_bytes += len(piece)
                await asyncio.sleep(0.01)
        assert num_bytes > 4 * len(LARGE)

    run(scenario)


def test_a_websocket_that_reads_nothing_is_cut() -> None:
    async def scenario(server: Running) -> None:
        with closing(await server.connect(UPGRADE.replace(b"/ws", b"/ws?large"), 2048)):
            assert server.app.num_running == 1
            assert await server.is_cut()

    run(scenario)


def test_a_websocket_outlives_the_deadlines_of_requests() -> None:
    async def scenario(server: Running) -> None:
        with closing(await server.connect(UPGRADE)):
            assert not await server.is_cut()
            assert server.num_connections == 1

    run(scenario)


def test_pings_without_reading_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pongs are answered below the application, which cannot hold them back."""
    monkeypatch.setattr(
        ShortWebSocket, "limits", ConnectionLimits(drain_s=60.0, max_answer_bytes=1 << 20, check_s=0.05)
    )

    async def scenario(server: Running) -> None:
        ping = b"\x89\xfd" + bytes(4) + bytes(125)  # masked with zeros
        with closing(await server.connect(UPGRADE, 2048)) as client:
            with pytest.raises(OSError, match=r"reset|Broken pipe"):
                await asyncio.get_running_loop().sock_sendall(client, ping * 1_000_000)
            assert await server.is_cut()

    run(scenario)
