"""A server that does what it is told, when it is told: streams with a timetable, refusals, cuts, jobs of two dialects.

Knows the wire format of the API and the clock; makes no video but one.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import av
import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

FRAMES = 12
"""Of each segment: half a second at 24 a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """What happens to the next request. Times are seconds after it came; a segment is sent at each of `segments_s`.

    `ending` is how a stream or a job ends: well, with the server's own error, broken off, or never.
    """

    segments_s: tuple[float, ...] = (0.05, 0.15, 0.25)
    ending: str = "well"
    status: int = 200
    body: Mapping[str, Any] | str | None = None
    preroll_s: float = 0.0
    job_s: float = 0.2


@dataclass
class ScriptedServer:
    """`script` may be changed at any time; while `num_free` streams run, `busy_script` is followed instead. `received`
    holds (seconds, fields) of each request for a video."""

    script: Script = field(default_factory=Script)
    busy_script: Script = field(default_factory=Script)
    num_free: int | None = None
    received: list[tuple[float, dict[str, Any]]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    num_running: int = 0
    max_running: int = 0
    url: str = ""
    _jobs: dict[str, tuple[float, Script]] = field(default_factory=dict)

    def app(self) -> Starlette:
        job = "/v1/videos/{id}"
        return Starlette(
            routes=[
                Route("/v1/videos/generations", self._generate, methods=["POST"]),
                Route("/v1/videos", self._create, methods=["POST"]),
                Route(job, self._get),
                Route(f"{job}/content", self._content),
                Route(f"{job}/cancel", self._cancel, methods=["POST"]),
                Route("/v1/models", lambda _: JSONResponse({"object": "list", "data": [{"id": "scripted"}]})),
            ]
        )

    async def _generate(self, request: Request) -> Response:
        script = await self._receive(request)
        if script.status != 200:
            return refusal(script)
        is_raw = request.headers["accept"] == "video/mp4"
        pieces = self._pieces(script, is_raw)
        return StreamingResponse(pieces, media_type="video/mp4" if is_raw else "text/event-stream")

    async def _pieces(self, script: Script, is_raw: bool) -> AsyncIterator[bytes]:
        if self.num_free is not None and self.num_running >= self.num_free:
            script = self.busy_script
        self.num_running += 1
        self.max_running = max(self.max_running, self.num_running)
        is_counted = True
        try:
            start = time.monotonic()
            if not is_raw:
                yield event("video_generation.created", {"id": "v1", "recommended_preroll_seconds": script.preroll_s})
                yield b": ka\n\n"
            for index, at_s in enumerate(script.segments_s):
                await asyncio.sleep(max(0.0, start + at_s - time.monotonic()))
                data = segment_bytes() if index == 0 else media_bytes()
                if is_raw:
                    yield data
                else:
                    yield event("video_generation.progress", {"chunk": index})
                    yield event("video_generation.partial_video", {"b64_json": base64.b64encode(data).decode()})
            if script.ending == "broken":
                raise ConnectionAbortedError
            if script.ending == "never":
                await asyncio.sleep(30)
            if script.ending == "half":
                yield media_bytes()[:-7]
            self.num_running -= 1  # before the client knows that it may send the next
            is_counted = False
            if not is_raw:
                yield self._end(script)
        finally:
            self.num_running -= is_counted

    @staticmethod
    def _end(script: Script) -> bytes:
        if script.ending == "failed":
            return event("error", {"error": {"code": "generation_failed", "message": "NaN"}})
        if script.ending == "silent":
            return b"retry: 500\n\n"
        timing = {"queue_ms": 3, "total_ms": 250, "encode_ms": None}
        details = {
            "num_chunks": len(script.segments_s),
            "timing": timing,
            "warnings": [{"message": "careful"}],
            "steps": [1, 1, 1],
            "fps": 24,
        }
        return event("video_generation.completed", {"video": {"size": "64x64", "helios": details}})

    async def _create(self, request: Request) -> Response:
        script = await self._receive(request)
        if script.status != 200:
            return refusal(script)
        video_id = f"video-{len(self.received)}"
        self._jobs[video_id] = (time.monotonic(), script)
        return JSONResponse({"id": video_id, "status": "queued"})

    async def _get(self, request: Request) -> Response:
        video_id = request.path_params["id"]
        start, script = self._jobs[video_id]
        if script.ending == "never" or time.monotonic() < start + script.job_s:
            return JSONResponse({"id": video_id, "status": "in_progress"})
        if script.ending == "failed":
            error = {"code": "moderation_blocked", "message": "no"}
            return JSONResponse({"id": video_id, "status": "failed", "error": error})
        return JSONResponse({"id": video_id, "status": "completed", "error": None})

    async def _content(self, request: Request) -> Response:
        assert request.path_params["id"] in self._jobs
        return Response(b"" if self.script.ending == "empty" else whole_bytes(), media_type="video/mp4")

    async def _cancel(self, request: Request) -> Response:
        self.cancelled.append(request.path_params["id"])
        return JSONResponse({})

    async def _receive(self, request: Request) -> Script:
        at_s = time.monotonic()
        if request.headers["content-type"].startswith("multipart/"):
            async with request.form() as form:
                fields = {
                    name: value if isinstance(value, str) else await value.read() for name, value in form.multi_items()
                }
        else:
            fields = await request.json()
        self.received.append((at_s, fields))
        self.headers.append(dict(request.headers))
        return self.script


def refusal(script: Script) -> Response:
    if isinstance(script.body, str):
        return PlainTextResponse(script.body, script.status)
    return JSONResponse(script.body, script.status)


def event(kind: str, data: Mapping[str, Any]) -> bytes:
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n".encode()


def whole_bytes() -> bytes:
    """A progressive MP4 of 2 x FRAMES frames."""
    return _encoded(2 * FRAMES, "")


def segment_bytes() -> bytes:
    """Init and media of FRAMES frames."""
    return _encoded(FRAMES, "frag_keyframe+empty_moov+default_base_moof+skip_trailer")


def media_bytes() -> bytes:
    data = segment_bytes()
    return data[data.index(b"moof") - 4 :]


def _encoded(num_frames: int, movflags: str) -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4", options={"movflags": movflags} if movflags else {}) as container:
        stream = container.add_stream("libx264", rate=Fraction(24))
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for _ in range(num_frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


@contextmanager
def listening(app: Starlette) -> Iterator[str]:
    """Serves an application from a thread; yields its address."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join()


@contextmanager
def serving() -> Iterator[ScriptedServer]:
    scripted = ScriptedServer()
    with listening(scripted.app()) as scripted.url:
        yield scripted
