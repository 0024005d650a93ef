"""Serves the bytes of a stored video over HTTP: whole, one range of it, or not at all if the client has them."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Mapping

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse

from helios_serve.api.jobs import StoredVideo
from helios_serve.errors import HeliosError

Read = Callable[[StoredVideo, int, int], AsyncIterator[bytes]]
"""Bytes `start` to `end` - 1 of a video."""

_CACHE = "private, max-age=3600, immutable"


class RangeNotSatisfiableError(HeliosError):
    """The range starts beyond the end of the file (HTTP 416)."""

    status, grpc_status, code, retryable = 416, "OUT_OF_RANGE", "range_not_satisfiable", False

    def __init__(self, requested: str, num_bytes: int) -> None:
        super().__init__(f"range {requested[:64]}: the video has {num_bytes} bytes")
        self.num_bytes = num_bytes


def video_response(request: Request, video: StoredVideo, read: Read, headers: Mapping[str, str]) -> Response:
    """The answer to GET or HEAD; honours Range (one range), If-Range and If-None-Match.

    Raises:
        RangeNotSatisfiableError: the range starts beyond the end.
    """
    common = {
        "etag": video.etag,
        "accept-ranges": "bytes",
        "cache-control": _CACHE,
        **headers,
    }
    if client_has(request, video):
        return Response(status_code=304, headers=common)
    wanted = request.headers.get("range")
    if wanted is not None and request.headers.get("if-range") in (None, video.etag):
        span = parse_range(wanted, video.num_bytes)
    else:
        span = None
    if span is not None:
        common["content-range"] = f"bytes {span.start}-{span.stop - 1}/{video.num_bytes}"
    served = range(video.num_bytes) if span is None else span
    common["content-length"] = str(len(served))
    status = 200 if span is None else 206
    if request.method == "HEAD":
        return Response(status_code=status, headers=common, media_type="video/mp4")
    return StreamingResponse(
        read(video, served.start, served.stop), status_code=status, headers=common, media_type="video/mp4"
    )


def redirect(url: str, headers: Mapping[str, str]) -> Response:
    """302 to the blob store. The address is good for a while only, so nobody keeps it."""
    return RedirectResponse(url, status_code=302, headers={"cache-control": "no-store", **headers})


def client_has(request: Request, video: StoredVideo) -> bool:
    """Whether If-None-Match names the video."""
    header = request.headers.get("if-none-match")
    if header is None:
        return False
    tags = [tag.strip().removeprefix("W/") for tag in header.split(",")]
    return video.etag in tags or "*" in tags


def whole_video(video: StoredVideo, read: Read, headers: Mapping[str, str]) -> Response:
    """The finished file as the answer to a generation."""
    return StreamingResponse(
        read(video, 0, video.num_bytes),
        headers={"content-length": str(video.num_bytes), "etag": video.etag, **headers},
        media_type="video/mp4",
    )


def parse_range(header: str, num_bytes: int) -> range | None:
    """The bytes that a Range header asks for; None (the whole file) for several ranges or an unreadable header.

    Raises:
        RangeNotSatisfiableError: the range starts beyond the end, or is a suffix of no bytes.
    """
    match = re.fullmatch(r"bytes=([0-9]{0,18})-([0-9]{0,18})", header.strip(), flags=re.IGNORECASE)
    if match is None or match[0].endswith("=-"):
        return None
    first, last = match[1], match[2]
    if not first:
        start, stop = max(0, num_bytes - int(last)), num_bytes
    else:
        start, stop = int(first), num_bytes if not last else min(num_bytes, int(last) + 1)
        if last and int(last) < start:
            return None
    if start >= num_bytes:
        raise RangeNotSatisfiableError(header, num_bytes)
    return range(start, stop)
