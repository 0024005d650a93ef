"""What surrounds every HTTP request: a count, an id on each answer, a limit on each body, an answer to each defect.

Pure ASGI: a wrapper that runs the application in another task would hide the client's disconnect from it.
"""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Awaitable, Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from helios_serve.api import schemas
from helios_serve.api.jobs import error_detail
from helios_serve.errors import BodyTooLargeError, HeliosError, InvalidRequestError
from helios_serve.logs import PROBES, Access, bind_request_id, current_request_id, log_access
from helios_serve.telemetry import Metrics
from helios_serve.tracing import NoTracing, Tracing, bind_context, context_from

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 1
MAX_RETRY_AFTER_S = 120
"""Seconds that a client is told to wait, where nobody knows better, and at most."""

OTHER = "other"
"""Label of what clients make up: paths without a route, and methods that HTTP does not know."""

NO_ANSWER = 499
"""Status that stands for a client that left before any answer."""

WEBSOCKET = "WEBSOCKET"
_CUT, _SERVER_FAULT = 1006, 1011  # RFC 6455: no close frame came; what the server did not foresee

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"})


class InternalError(HeliosError):
    """A defect on our side; the log has the cause (HTTP 500)."""


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
    """Counts every request and its time until the last byte of the answer is sent, with a line in the log and a span; a
    WebSocket has these two when it ends. The outermost layer: all that is logged and traced inside belongs to the
    request's id."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, tracing: Tracing | None = None) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = NoTracing() if tracing is None else tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        recorded = self._recorded if scope["type"] == "http" else self._recorded_socket
        with bind_request_id(_request_id(Headers(scope=scope).get("x-request-id"))):
            await recorded(scope, receive, send)

    async def _recorded(self, scope: Scope, receive: Receive, send: Send) -> None:
        started_s, status, num_bytes = time.monotonic(), NO_ANSWER, 0
        method, template = scope["method"] if scope["method"] in _METHODS else OTHER, _template(scope)
        tracing = NoTracing() if template in PROBES else self._tracing
        span = tracing.begin(
            f"{method} {template}",
            parent=context_from(Headers(scope=scope)),
            kind="server",
            attributes={"http.request.method": method, "http.route": template},
        )

        def send_noting_status(message: Message) -> Awaitable[None]:
            nonlocal status, num_bytes
            if message["type"] == "http.response.start":
                status = message["status"]
            num_bytes += len(message.get("body", b""))
            return send(message)

        try:
            with bind_context(span.context):
                await self._app(scope, receive, send_noting_status)
        finally:
            seconds = time.monotonic() - started_s
            self._metrics.http_request(template, method, status, seconds)
            access = Access(
                method=method,
                path=scope["path"],
                template=template,
                status=status,
                seconds=seconds,
                num_bytes=num_bytes,
                client=_client_of(scope),
            )
            log_access(access)
            span.end(error=str(status) if status >= 500 else None, attributes={"http.response.status_code": status})

    async def _recorded_socket(self, scope: Scope, receive: Receive, send: Send) -> None:
        started_s, template, note = time.monotonic(), _template(scope), _SocketNote()
        span = self._tracing.begin(
            f"{WEBSOCKET} {template}",
            parent=context_from(Headers(scope=scope)),
            kind="server",
            attributes={"http.request.method": "GET", "http.route": template, "network.protocol.name": "websocket"},
        )

        async def noting_receive() -> Message:
            message = await receive()
            note.take(message)
            return message

        async def noting_send(message: Message) -> None:
            note.take(message)
            await send(message)

        is_fault = False
        try:
            with bind_context(span.context):
                await self._app(scope, noting_receive, noting_send)
        except Exception:
            is_fault = True
            raise
        finally:
            access = Access(
                method=WEBSOCKET,
                path=scope["path"],
                template=template,
                status=note.code,
                seconds=time.monotonic() - started_s,
                num_bytes=note.num_bytes,
                client=_client_of(scope),
            )
            log_access(access)
            is_fault = is_fault or note.code == _SERVER_FAULT or 500 <= note.code < 600
            span.end(error=str(note.code) if is_fault else None, attributes={"websocket.close_code": note.code})


class _SocketNote:
    """How a WebSocket ended, from the messages that pass: the first one that says so counts."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._code: int | None = None
        self._is_open = False

    @property
    def code(self) -> int:
        """1006 where nothing was said."""
        return _CUT if self._code is None else self._code

    def take(self, message: Message) -> None:
        kind = message["type"]
        if kind == "websocket.send":
            self.num_bytes += len(message.get("bytes") or b"") + len((message.get("text") or "").encode())
        elif kind == "websocket.accept":
            self._is_open = True
        elif self._code is None and kind == "websocket.close":
            self._code = message.get("code", 1000) if self._is_open else 403
        elif self._code is None and kind == "websocket.http.response.start":
            self._code = message["status"]
        elif self._code is None and kind == "websocket.disconnect":
            self._code = message.get("code", _CUT)


class RequestBoundary:
    """Puts `x-request-id` on every answer and turns an unexpected exception into a logged 500."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = current_request_id() or _request_id(Headers(scope=scope).get("x-request-id"))
        started = False

        def send_with_id(message: Message) -> Awaitable[None]:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            return send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            logger.info("request %s: the client left, or reads nothing", request_id)
            if started:
                raise
        except Exception:
            logger.exception("request %s failed", request_id)
            if started:
                raise
            error = InternalError("a defect of the server; its log has the cause under this request's id")
            await error_response(error)(scope, receive, send_with_id)


class HeadTooLargeError(HeliosError):
    """The headers exceed their limit (HTTP 431)."""

    status, grpc_status, code, retryable = 431, "RESOURCE_EXHAUSTED", "headers_too_large", False


class HeadLimit:
    """Refuses heads that are too large, or that do not name one host: what a proxy in front may have read otherwise."""

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (error := self._problem(scope)) is not None:
            await error_response(error, {"connection": "close"})(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _problem(self, scope: Scope) -> HeliosError | None:
        headers = scope["headers"]
        if sum(len(name) + len(value) for name, value in headers) > self._max_bytes:
            return HeadTooLargeError(f"headers: at most {self._max_bytes} bytes are allowed together")
        num_hosts = sum(name == b"host" for name, _ in headers)
        if num_hosts != 1 and scope.get("http_version") == "1.1":
            message = f"host: {num_hosts} headers name one; exactly one is needed"
            return InvalidRequestError(message, param="host", code="malformed_body")
        return None


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


def _client_of(scope: Scope) -> str | None:
    return scope["client"][0] if scope["client"] else None


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
