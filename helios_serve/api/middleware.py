"""What surrounds every HTTP request: a count, an id on each answer, a limit on each body, an answer to each defect.

Pure ASGI: a wrapper that runs the application in another task would hide the client's disconnect from it.
"""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from helios_serve.api import schemas
from helios_serve.api.jobs import error_detail
from helios_serve.api.service import InternalError
from helios_serve.errors import BodyTooLargeError, HeliosError
from helios_serve.telemetry import Metrics

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 1
MAX_RETRY_AFTER_S = 120
"""Seconds that a client is told to wait, where nobody knows better, and at most."""

OTHER = "other"
"""Label of what clients make up: paths without a route, and methods that HTTP does not know."""

NO_ANSWER = 499
"""Status that stands for a client that left before any answer."""

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"})


def error_response(error: HeliosError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Every error answer: OpenAI's shape, and whether a retry can help."""
    if error.retryable:
        seconds = RETRY_AFTER_S if error.retry_after_s is None else min(MAX_RETRY_AFTER_S, error.retry_after_s)
        retry = {"retry-after": str(math.ceil(seconds))}
    else:
        retry = {"x-should-retry": "false"}
    answer = schemas.ErrorAnswer(error=error_detail(error))
    return JSONResponse(answer.model_dump(), status_code=error.status, headers=retry | dict(headers or {}))


class RequestCount:
    """Counts every request and its time until the last byte of the answer is sent. The outermost layer."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s, status = time.monotonic(), NO_ANSWER

        async def send_noting_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_noting_status)
        finally:
            method = scope["method"] if scope["method"] in _METHODS else OTHER
            self._metrics.http_request(_template(scope), method, status, time.monotonic() - started_s)


class RequestBoundary:
    """Puts `x-request-id` on every answer and turns an unexpected exception into a logged 500."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope).get("x-request-id"))
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            logger.info("request %s: the client left while it was sending", request_id)
        except Exception:
            logger.exception("request %s failed", request_id)
            if started:
                raise
            error = InternalError("a defect of the server; its log has the cause under this request's id")
            await error_response(error)(scope, receive, send_with_id)


class BodyLimit:
    """Counts the bytes of each body as it is read, announced or chunked, and answers 413 beyond the limit."""

    def __init__(self, app: ASGIApp, *, default_bytes: int, bytes_by_path: Mapping[str, int]) -> None:
        self._app = app
        self._default_bytes = default_bytes
        self._bytes_by_path = bytes_by_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._bytes_by_path.get(scope["path"], self._default_bytes)
        error = BodyTooLargeError(f"body: at most {limit} bytes are allowed on this route")
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isascii() and announced.isdigit() and int(announced[:20]) > limit:
            await error_response(error, {"connection": "close"})(scope, receive, send)
            return
        received = 0

        async def counted_receive() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > limit:
                    raise error
            return message

        await self._app(scope, counted_receive, send)


def _template(scope: Scope) -> str:
    """The route's template. Matched here, because a body that is refused never reaches the router."""
    for route in scope["app"].routes:
        if route.matches(scope)[0] is not Match.NONE:
            return str(route.path)
    return OTHER


def _request_id(given: str | None) -> str:
    """The caller's id if it is 1 to 128 printable ASCII characters, else a new one."""
    if given is not None and 1 <= len(given) <= 128 and given.isascii() and given.isprintable():
        return given
    return f"req_{uuid.uuid4().hex}"
