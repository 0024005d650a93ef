"""helios_serve over HTTP: streams as server-sent events or live fMP4, and jobs.

Knows the routes and fields of the API; what was seen goes into a `Recording`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2

from helios_serve.bench.http_answers import check, error_of, failures_named, finish_job, note_job
from helios_serve.bench.mp4 import FragmentReader, frames_in_fragments
from helios_serve.bench.observed import Recording
from helios_serve.bench.targets import FailedError
from helios_serve.bench.workload import Planned

_UNREAD = frozenset({b"video_generation.progress", b"video_generation.queued"})


@dataclass(frozen=True, slots=True, kw_only=True)
class HeliosTarget:
    """`sse`, `raw` and `jobs` by the kind of the request. `extra` holds more fields of the body; `image` and `video`
    are files, sent as data URIs."""

    client: httpx2.AsyncClient
    poll_s: float
    image: bytes
    video: bytes
    model: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    async def make(self, planned: Planned, recording: Recording) -> None:
        with failures_named():
            if planned.kind.via == "jobs":
                request = self.client.build_request("POST", "/v1/videos", json=self._body(planned))
                await finish_job(self.client, request, self.poll_s, recording)
            else:
                await self._stream(planned, recording)

    async def _stream(self, planned: Planned, recording: Recording) -> None:
        is_events = planned.kind.via == "sse"
        headers = {"accept": "text/event-stream" if is_events else "video/mp4"}
        body = {**self._body(planned), "stream": True}
        async with self.client.stream("POST", "/v1/videos/generations", json=body, headers=headers) as answer:
            await check(answer)
            recording.video_id = answer.headers.get("x-video-id")
            await (_read_events if is_events else _read_fragments)(answer, recording)

    def _body(self, planned: Planned) -> dict[str, Any]:
        kind = planned.kind
        body: dict[str, Any] = {"prompt": planned.prompt, "num_frames": kind.num_frames, "fps": kind.fps}
        body |= {"seed": planned.seed}
        body |= {name: value for name, value in (("model", self.model), ("size", kind.size)) if value is not None}
        details: dict[str, Any] = {}
        if kind.steps is not None:
            details["steps"] = list(kind.steps)
        if kind.is_stream != (kind.service_class == "realtime"):
            details["service_class"] = kind.service_class  # otherwise it is what the route means by itself
        if details:
            body["helios"] = details
        if kind.task == "i2v":
            body["image"] = _data_uri("image/png", self.image)
        elif kind.task == "v2v":
            body["video"] = _data_uri("video/mp4", self.video)
        return {**body, **self.extra}


async def _read_events(answer: httpx2.Response, recording: Recording) -> None:
    is_completed = False
    async for at_s, kind, data in _events(answer, recording):
        if kind == "video_generation.created":
            recording.video_id = data["id"]
            if recording.preroll_s is None:
                recording.preroll_s = float(data["recommended_preroll_seconds"])
        elif kind == "video_generation.partial_video":
            segment = base64.b64decode(data["b64_json"])
            recording.add_segment(at_s, frames_in_fragments(segment), len(segment))
        elif kind == "video_generation.completed":
            note_job(data["video"], recording)
            is_completed = True
        elif kind == "error":
            code, message = error_of(data["error"])
            raise FailedError(code or "error", message)
    if not is_completed:
        raise FailedError("cut", "the events ended before the video was complete")


async def _events(answer: httpx2.Response, recording: Recording) -> AsyncIterator[tuple[float, str, dict[str, Any]]]:
    """When its last byte came, name and data of each event; progress is read over."""
    pending = bytearray()
    async for data in answer.aiter_bytes():
        at_s = recording.now_s()
        searched = max(0, len(pending) - 1)
        pending += data
        while (end := pending.find(b"\n\n", searched)) >= 0:
            lines = bytes(pending[:end]).split(b"\n")
            del pending[: end + 2]
            searched = 0
            fields = dict(line.split(b": ", 1) for line in lines if b": " in line and not line.startswith(b":"))
            if b"event" in fields and fields[b"event"] not in _UNREAD:
                yield at_s, fields[b"event"].decode(), json.loads(fields[b"data"])


async def _read_fragments(answer: httpx2.Response, recording: Recording) -> None:
    reader = FragmentReader()
    async for data in answer.aiter_bytes():
        at_s = recording.now_s()
        for fragment in reader.feed(data):
            recording.add_segment(at_s, fragment.num_frames, fragment.num_bytes)
    if not reader.is_complete:
        raise FailedError("cut", "the stream ended inside a fragment")
    if not recording.segments:
        raise FailedError("empty_video", "the answer ended without a frame")


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
