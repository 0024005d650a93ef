"""What a request asks for in its headers, query and body: the reading side of HTTP. Knows no service and no route."""

from __future__ import annotations

import json
import re

from fastapi import Request
from starlette.requests import HTTPConnection

from helios_serve.api.jobs import Origin, Page, State
from helios_serve.api.names import shown
from helios_serve.errors import HeliosError, InvalidRequestError, UnsupportedMediaTypeError

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class NotAcceptableError(HeliosError):
    """The client accepts neither JSON nor MP4 (HTTP 406)."""

    status, grpc_status, code, retryable = 406, "INVALID_ARGUMENT", "not_acceptable", False


def content_type_of(request: Request) -> str:
    """The media type of the body, without parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_body(request: Request) -> bytes:
    """Raises UnsupportedMediaTypeError unless the body is application/json."""
    content_type = content_type_of(request)
    if content_type != "application/json":
        raise UnsupportedMediaTypeError(
            f"content-type {shown(content_type)}: only application/json and multipart/form-data"
        )
    return await request.body()


def json_object(raw: bytes) -> dict[str, object]:
    """Raises InvalidRequestError `malformed_body` unless `raw` is a JSON object that can be written again."""
    try:
        body = strict_json(raw)
    except ValueError as error:
        raise _malformed(str(error)) from None
    if not isinstance(body, dict):
        raise _malformed(f"it is {shown(body)}")
    return body


def strict_json(raw: bytes) -> object:
    """Raises ValueError, fit to be shown, unless `raw` is JSON that says one thing and can be written again."""
    try:
        value: object = json.loads(raw, object_pairs_hook=_object, parse_constant=_refuse_constant)
        if _SURROGATE.search(raw) is not None:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("a string has an unpaired surrogate") from None
    except ValueError as error:
        raise ValueError(str(error)[:200]) from None
    return value


def wants_mp4(request: Request) -> bool:
    """Whether the Accept header prefers MP4; JSON wins a tie."""
    weights = accept_weights(request, "application/json", "text/event-stream", "video/mp4")
    if not any(quality > 0 for quality, _ in weights.values()):
        accept = request.headers["accept"]
        raise NotAcceptableError(f"accept {shown(accept)}: only application/json and video/mp4", param="accept")
    return weights["video/mp4"] > max(weights["application/json"], weights["text/event-stream"])


def accept_weights(request: Request, *kinds: str) -> dict[str, tuple[float, bool]]:
    """How much the Accept header wants each media type: its quality, then whether it is named rather than matched."""
    accept = request.headers.get("accept", "*/*") or "*/*"
    weights = dict.fromkeys(kinds, (0.0, False))
    for entry in accept.split(","):
        media_range, *parameters = (part.strip().lower() for part in entry.split(";"))
        quality = next((_quality(p[2:]) for p in parameters if p.startswith("q=")), 1.0)
        for kind in kinds:
            if quality > 0 and media_range in ("*/*", kind, kind.split("/")[0] + "/*"):
                weights[kind] = max(weights[kind], (quality, media_range == kind))
    return weights


def preferred_wait_s(request: Request) -> float | None:
    """Seconds that the caller would wait, by `Prefer: respond-async` or `wait=N`; None waits for the end."""
    preferences = [part.strip().lower() for part in request.headers.get("prefer", "").split(",")]
    waits = [part.removeprefix("wait=") for part in preferences if part.startswith("wait=")]
    if waits and waits[0].isdecimal():
        return float(waits[0][:9])
    return 0.0 if "respond-async" in preferences else None


def last_event_id(request: Request) -> int | None:
    text = request.headers.get("last-event-id")
    if text is None or text == "":
        return None
    if not text.isdecimal() or len(text) > 9:
        raise InvalidRequestError(f"last-event-id {shown(text)}: must be the id of an event", param="last-event-id")
    return int(text)


def page_of(after: str | None, limit: int, order: str, status: str | None) -> Page:
    if not 1 <= limit <= 100:
        raise InvalidRequestError(f"limit {limit}: must be 1 to 100", param="limit")
    if order not in ("asc", "desc"):
        raise InvalidRequestError(f"order {shown(order)}: must be asc or desc", param="order")
    by_status: dict[str, frozenset[State]] = {
        "queued": frozenset({"queued"}),
        "in_progress": frozenset({"in_progress"}),
        "completed": frozenset({"completed", "expired"}),
        "failed": frozenset({"failed", "cancelled"}),
    }
    if status is not None and status not in by_status:
        raise InvalidRequestError(f"status {shown(status)}: must be {', '.join(by_status)}", param="status")
    states = None if status is None else by_status[status]
    return Page(limit=limit, after=after, newest_first=order == "desc", states=states)


def origin_of(request: Request, route: str) -> Origin:
    """How a call that creates a job came in: its idempotency key, or that the client sends it again.

    Raises: InvalidRequestError for a key of no or too many characters.
    """
    key = request.headers.get("idempotency-key")
    if key is not None and not 1 <= len(key) <= 255:
        raise InvalidRequestError("idempotency-key: must have 1 to 255 characters", param="idempotency-key")
    count = request.headers.get("x-stainless-retry-count", "0")
    return Origin(route=route, idempotency_key=key, is_retry=count.isdecimal() and count.strip("0") != "")


def read_timeout_s(request: Request) -> float | None:
    """How long the client waits for a byte, where it says so."""
    text = request.headers.get("x-stainless-read-timeout", "")
    return float(text) if re.fullmatch(r"[0-9]{1,9}([.][0-9]{1,6})?", text) else None


def base_url_of(request: HTTPConnection) -> str:
    """Scheme and host as the client reaches them; a WebSocket's are those of its page."""
    base = str(request.base_url).rstrip("/")
    return base.replace("ws", "http", 1) if request.scope["type"] == "websocket" else base


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("an object has the same key twice")
    return result


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def _malformed(problem: str) -> InvalidRequestError:
    return InvalidRequestError(f"body: not a JSON object: {problem}", code="malformed_body")


def _quality(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 1.0
