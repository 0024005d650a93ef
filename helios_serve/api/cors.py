"""Lets pages of listed origins read the answers. Knows headers; what a foreign page may not even call is `auth`'s.

Pure ASGI, as every layer here is. Outside of `RequestBoundary`, so that an answer to a defect carries its headers too.
"""

from __future__ import annotations

import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from helios_serve.api.auth import EXPOSED_HEADERS, OriginError, OriginPolicy, check_origin
from helios_serve.api.middleware import RequestBoundary

MAX_AGE_S = 600
METHODS = "GET, HEAD, POST, DELETE"
_HEADER_NAMES = re.compile(r"[A-Za-z0-9_, -]{1,2048}")


class Cors:
    """Answers preflights of listed origins and marks their answers; without listed origins it does nothing.

    A page's key travels in a header that it sets itself, so no credentials of the browser are allowed.
    """

    def __init__(self, app: ASGIApp, *, policy: OriginPolicy) -> None:
        self._app = app
        self._policy = policy
        self._preflight = RequestBoundary(_answer_preflight)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._policy.allowed:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = self._listed(headers.get("origin"))

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                _mark(MutableHeaders(scope=message), origin)
            await send(message)

        is_preflight = scope["method"] == "OPTIONS" and "access-control-request-method" in headers
        app = self._preflight if is_preflight and origin is not None else self._app
        await app(scope, receive, send_marked)

    def _listed(self, origin: str | None) -> str | None:
        """The origin if it is one of the policy's."""
        try:
            return check_origin(origin, "", self._policy)
        except OriginError:
            return None


def _mark(headers: MutableHeaders, origin: str | None) -> None:
    headers.add_vary_header("origin")
    if origin is not None:
        headers["access-control-allow-origin"] = origin
        headers["access-control-expose-headers"] = ", ".join(EXPOSED_HEADERS)


async def _answer_preflight(scope: Scope, receive: Receive, send: Send) -> None:
    """Every header is allowed that the page asks for: none of them gives rights that a key does not."""
    headers = {"access-control-allow-methods": METHODS, "access-control-max-age": str(MAX_AGE_S)}
    wanted = Headers(scope=scope).get("access-control-request-headers", "")
    if _HEADER_NAMES.fullmatch(wanted):
        headers["access-control-allow-headers"] = wanted
    await Response(status_code=204, headers=headers)(scope, receive, send)
