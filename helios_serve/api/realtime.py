"""`WS /v1/realtime/video`: interactive sessions over a WebSocket. Opens and resumes sessions, refuses who may not, and
says how each connection ended. Knows callers and the first message; what follows is `realtime_connection`'s.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from starlette.websockets import WebSocket, WebSocketDisconnect

from helios_serve.api.auth import Caller
from helios_serve.api.convert import ParsedRequest
from helios_serve.api.realtime_connection import (
    RESTART,
    Connection,
    LinksOf,
    RealtimeSettings,
    closing_of,
    object_of,
    text_of,
)
from helios_serve.api.realtime_messages import Start, error_message, read_start
from helios_serve.api.realtime_outbox import Closing, close_socket, send_frame
from helios_serve.api.service import VideoService
from helios_serve.api.session import Session
from helios_serve.errors import CapacityError, HeliosError

logger = logging.getLogger(__name__)

Parse = Callable[[Mapping[str, object], Caller], Awaitable[ParsedRequest]]
"""Validates the fields of a generation that is watched while it is made."""

Access = Callable[[WebSocket], Awaitable[Caller]]
"""Finds the caller of a WebSocket. Raises AccessError."""

LinksFor = Callable[[WebSocket], LinksOf]
"""Makes the addresses of a job's bytes as the client of a WebSocket reaches them."""


class RealtimeRoute:
    """One for each server: `app.add_api_websocket_route("/v1/realtime/video", route.serve)`."""

    def __init__(
        self, service: VideoService, parse: Parse, access: Access, links: LinksFor, settings: RealtimeSettings
    ) -> None:
        self._service = service
        self._parse = parse
        self._access = access
        self._links = links
        self._settings = settings
        self._connections: set[Connection] = set()
        self._is_restarting = False

    async def serve(self, websocket: WebSocket) -> None:
        """One connection from its first message to its end."""
        await websocket.accept()
        try:
            closing = await self._serve(websocket)
        except WebSocketDisconnect:
            closing = None
        except Exception:
            logger.exception("a session's connection failed")
            closing = Closing(code=1011, reason="a defect of the server; its log has the cause")
        if closing is not None:
            await close_socket(websocket, closing, self._settings.close_timeout_s)

    async def restart(self) -> None:
        """Ends all connections with 1012, as the server is about to end: their clients resume at the next one."""
        self._is_restarting = True
        for connection in [*self._connections]:
            await connection.restart()

    async def _serve(self, websocket: WebSocket) -> Closing | None:
        """Returns how to close; None when the client has left."""
        try:
            caller = await self._access(websocket)
        except HeliosError as error:
            return closing_of(error)
        limit_s = self._settings.start_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                message = await websocket.receive()
        except TimeoutError:
            return Closing(code=4408, reason=f"no session.start within {limit_s:g} seconds")
        if message["type"] == "websocket.disconnect":
            return None
        try:
            start, session = await self._session_of(caller, message.get("text"))
        except HeliosError as error:
            closing = closing_of(error)
            if closing is not RESTART:
                await send_frame(websocket, text_of(error_message(error)), self._settings.close_timeout_s)
            return closing
        return await self._run(websocket, Connection(self._service, caller, session, start, self._settings))

    async def _session_of(self, caller: Caller, text: str | None) -> tuple[Start, Session]:
        start, body = read_start(object_of(text, self._settings.max_start_chars))
        if self._is_restarting:
            raise CapacityError("the server is shutting down; try again shortly", code="draining", retry_after_s=1.0)
        if start.resume is not None:
            resume = start.resume
            await self._replace(caller, resume.id)
            return start, await self._service.resume_session(caller, resume.id, resume.after_segment)
        parsed = await self._parse(body, caller)
        max_ahead = start.max_ahead(parsed.request.params.fps)
        return start, await self._service.open_session(caller, parsed, max_ahead)

    async def _replace(self, caller: Caller, video_id: str) -> None:
        """Ends what is left of a lost connection, which the server may notice much later than the client."""
        for connection in [*self._connections]:
            if connection.is_of(caller, video_id):
                await connection.replace()

    async def _run(self, websocket: WebSocket, connection: Connection) -> Closing | None:
        self._connections.add(connection)
        try:
            if self._is_restarting:
                await connection.restart()
            return await connection.run(websocket, self._links(websocket))
        finally:
            self._connections.discard(connection)
            await connection.leave()


def realtime_route(
    service: VideoService,
    parse: Parse,
    access: Access,
    links: LinksFor,
    settings: RealtimeSettings | None = None,
) -> RealtimeRoute:
    """The route of interactive sessions; its `serve` is the endpoint, and a drain calls its `restart`."""
    return RealtimeRoute(service, parse, access, links, RealtimeSettings() if settings is None else settings)
