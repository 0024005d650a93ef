"""Connections to this server end in time, whatever their clients do or leave undone. For uvicorn, which by itself waits
for ever: for the rest of a request, and for a client that reads nothing, even behind `close`.

Knows bytes, states of a request and times; knows no route. Who completes no TLS handshake is cut by asyncio after 60 s.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """Seconds, each over by at most `check_s`, and bytes.

    head_s: from the start of a connection, or from a request's first byte, to the end of its headers. body_idle_s:
    without a byte of a body. body_s: for a body in all. drain_s: until of what was sent so little waits that more is
    taken, or, behind the end, nothing. max_answer_bytes: of pongs and the like that wait behind a message.
    """

    head_s: float = 20.0
    body_idle_s: float = 30.0
    body_s: float = 600.0
    drain_s: float = 30.0
    max_answer_bytes: int = 8 << 20
    check_s: float = 2.0


class _Unsent:
    """What a transport still has to send, and since when it did not get rid of it."""

    def __init__(self, limits: ConnectionLimits, transport: asyncio.Transport) -> None:
        self._limits = limits
        self._transport = transport
        self._full_since: float | None = None
        self._full_bytes = 0

    def full(self, now: float) -> None:
        """From here on the application sends nothing, until `drained`."""
        if self._full_since is None:
            self._full_since, self._full_bytes = now, self._transport.get_write_buffer_size()

    def drained(self) -> None:
        self._full_since = None

    def problem(self, now: float) -> str | None:
        """Why the connection is to be cut."""
        if self._transport.is_closing():
            self.full(now)  # nothing more is sent, so whatever waits must leave
        if self._full_since is None:
            return None
        if now - self._full_since >= self._limits.drain_s:
            return "it reads nothing, or too slowly"
        if self._transport.get_write_buffer_size() > self._full_bytes + self._limits.max_answer_bytes:
            return "it asks for answers and does not read them"
        return None


class _Watch:
    """Asks every so often whether a connection is to be cut, and cuts it: what waits is thrown away."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport, problem: Callable[[float], str | None]
    ) -> None:
        self._loop = loop
        self._transport = transport
        self._problem = problem
        self._timer: asyncio.TimerHandle | None = None

    def again_in(self, seconds: float) -> None:
        self._timer = self._loop.call_later(seconds, self._look, seconds)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self, seconds: float) -> None:
        problem = self._problem(self._loop.time())
        if problem is None:
            self.again_in(seconds)
            return
        logger.info("a connection is cut: %s", problem)
        self._timer = None
        self._transport.abort()


class HttpConnection(HttpToolsProtocol):
    """HTTP/1.1 with deadlines. Another `limits` needs a subclass, as uvicorn makes the objects."""

    limits: ClassVar[ConnectionLimits] = ConnectionLimits()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        made = cast(asyncio.Transport, transport)
        super().connection_made(made)
        self._head_since: float | None = self.loop.time()
        self._body_since: float | None = None
        self._heard_at = self.loop.time()
        self._unsent = _Unsent(self.limits, made)
        self._watch = _Watch(self.loop, made, self._problem)
        self._watch.again_in(self.limits.check_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._watch.stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._heard_at = self.loop.time()
        if self._body_since is None and self._head_since is None:
            self._head_since = self._heard_at
        super().data_received(data)

    def on_headers_complete(self) -> None:
        self._head_since, self._body_since = None, self._heard_at
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._body_since = None
        super().on_message_complete()

    def handle_websocket_upgrade(self) -> None:
        self._watch.stop()
        super().handle_websocket_upgrade()

    def pause_writing(self) -> None:
        self._unsent.full(self.loop.time())
        super().pause_writing()

    def resume_writing(self) -> None:
        self._unsent.drained()
        super().resume_writing()

    def _problem(self, now: float) -> str | None:
        problem = self._unsent.problem(now)
        if problem is not None or self.flow.read_paused:  # it may send more than is wanted now
            return problem
        limits = self.limits
        if self._body_since is not None:
            if now - self._heard_at >= limits.body_idle_s or now - self._body_since >= limits.body_s:
                return "its request's body does not end"
        elif self.cycle is not None and not self.cycle.response_complete:
            self._head_since = None if self._head_since is None else now  # the next request has time until the answer
        elif self._head_since is not None and now - self._head_since >= limits.head_s:
            return "its request does not begin, or has no end of its headers"
        return None


class WebSocketConnection(WebSocketsSansIOProtocol):
    """A WebSocket with deadlines; those of its messages are the application's."""

    limits: ClassVar[ConnectionLimits] = ConnectionLimits()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        made = cast(asyncio.Transport, transport)
        super().connection_made(made)
        self._unsent = _Unsent(self.limits, made)
        self._watch = _Watch(self.loop, made, self._unsent.problem)
        self._watch.again_in(self.limits.check_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._watch.stop()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        self._unsent.full(self.loop.time())
        super().pause_writing()

    def resume_writing(self) -> None:
        self._unsent.drained()
        super().resume_writing()
