"""What waits to be sent over one WebSocket, in order and bounded, and the sending of it. Knows bytes and time-outs;
knows no message."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from dataclasses import dataclass

from starlette.websockets import WebSocket, WebSocketDisconnect

MAX_REASON_BYTES = 123
MAX_WAITING = 64
"""Messages that wait; with a quarter of it, those that can be left out are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Closing:
    """How a connection ends: a code of RFC 6455 or of ours, and a sentence."""

    code: int
    reason: str = ""


Frames = tuple[str | bytes, ...]
"""Frames with nothing between them: text is a text frame, bytes a binary one."""


class Outbox:
    """Filled by several tasks, emptied by one. Frames of one `put` leave together.

    Args:
        max_bytes: of binary frames that wait; a single one may be larger.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._items: deque[Frames | Closing] = deque()
        self._num_bytes = 0
        self._changed = asyncio.Condition()
        self._is_closing = False

    @property
    def is_closing(self) -> bool:
        """Whether nothing is taken any more, as the end is in sight."""
        return self._is_closing

    async def put(self, *frames: str | bytes) -> None:
        """Waits while it is full. After `close` frames are dropped."""
        size = _binary_bytes(frames)
        async with self._changed:
            await self._changed.wait_for(lambda: self._is_closing or self._has_room(size))
            if not self._is_closing:
                self._add(frames)

    async def offer(self, frame: str) -> None:
        """For what is soon out of date: dropped while others wait."""
        async with self._changed:
            if not self._is_closing and len(self._items) < MAX_WAITING // 4:
                self._add((frame,))

    async def close(self, closing: Closing, *, at_once: bool = False) -> None:
        """Ends it behind what waits, or `at_once`. The first call counts."""
        async with self._changed:
            if self._is_closing:
                return
            self._is_closing = True
            if at_once:
                self._items.clear()
            self._items.append(closing)
            self._changed.notify_all()

    async def get(self) -> Frames | Closing:
        async with self._changed:
            await self._changed.wait_for(lambda: self._items)
            item = self._items.popleft()
            if not isinstance(item, Closing):
                self._num_bytes -= _binary_bytes(item)
            self._changed.notify_all()
            return item

    def _has_room(self, size: int) -> bool:
        if len(self._items) >= MAX_WAITING:
            return False
        return size == 0 or self._num_bytes == 0 or self._num_bytes + size <= self._max_bytes

    def _add(self, frames: Frames) -> None:
        self._items.append(frames)
        self._num_bytes += _binary_bytes(frames)
        self._changed.notify_all()


async def send_all(websocket: WebSocket, outbox: Outbox, timeout_s: float, slow: Closing) -> Closing | None:
    """Sends what comes until the end of `outbox`.

    Returns: how to close; `slow` when the socket took nothing for `timeout_s`; None when the client has left.
    """
    while True:
        item = await outbox.get()
        if isinstance(item, Closing):
            return item
        try:
            for frame in item:
                await send_frame(websocket, frame, timeout_s)
        except TimeoutError:
            return slow
        except WebSocketDisconnect:
            return None


async def close_socket(websocket: WebSocket, closing: Closing, timeout_s: float) -> None:
    """Says how the connection ends, to a client that still listens. A longer reason is cut to what a frame holds."""
    reason = closing.reason.encode()[:MAX_REASON_BYTES].decode(errors="ignore")
    # RuntimeError: the client's own closing was already read.
    with suppress(TimeoutError, WebSocketDisconnect, RuntimeError):
        async with asyncio.timeout(timeout_s):
            await websocket.close(closing.code, reason)


async def send_frame(websocket: WebSocket, frame: str | bytes, timeout_s: float) -> None:
    """Raises: TimeoutError when the socket took nothing for `timeout_s`; WebSocketDisconnect."""
    async with asyncio.timeout(timeout_s):
        if isinstance(frame, str):
            await websocket.send_text(frame)
        else:
            await websocket.send_bytes(frame)


def _binary_bytes(frames: Frames) -> int:
    return sum(len(frame) for frame in frames if isinstance(frame, bytes))
