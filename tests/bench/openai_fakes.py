"""What vLLM-Omni 0.30.0 and SGLang-Diffusion 0.5.23 make of /v1/videos, as read in their sources: which fields they
take, what they answer, and which routes they do not have. No more than that is here.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.bench.scripted_server import listening, whole_bytes

JOB_S = 0.2


@dataclass
class FakeVideos:
    """What both have. `failing` and `never_ends` say what becomes of the next jobs; `received` holds their forms."""

    url: str = ""
    failing: bool = False
    never_ends: bool = False
    received: list[dict[str, Any]] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    _made_at: dict[str, float] = field(default_factory=dict)

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/videos", self.create, methods=["POST"]),
                Route("/v1/videos/{id}", self.retrieve),
                Route("/v1/videos/{id}", self.delete, methods=["DELETE"]),
                Route("/v1/videos/{id}/content", self.content),
            ]
        )

    async def create(self, request: Request) -> Response:
        if not request.headers["content-type"].startswith("multipart/form-data"):
            return self.refusal(400, "not a form")
        async with request.form() as form:
            fields = {
                name: value if isinstance(value, str) else await value.read() for name, value in form.multi_items()
            }
        if (fault := self.fault(fields)) is not None:
            return self.refusal(400, fault)
        self.received.append(fields)
        video_id = f"video_gen_{len(self.received)}"
        self._made_at[video_id] = time.monotonic()
        return JSONResponse(self.job(video_id, "queued"))

    async def retrieve(self, request: Request) -> Response:
        video_id = request.path_params["id"]
        if video_id not in self._made_at:
            return self.refusal(404, "Video not found")
        if self.never_ends or time.monotonic() < self._made_at[video_id] + JOB_S:
            return JSONResponse(self.job(video_id, "in_progress"))
        return self.failed(video_id) if self.failing else JSONResponse(self.job(video_id, "completed"))

    async def delete(self, request: Request) -> Response:
        self.deleted.append(request.path_params["id"])
        return JSONResponse({})

    async def content(self, request: Request) -> Response:
        return Response(whole_bytes(), media_type="video/mp4")

    def job(self, video_id: str, status: str) -> dict[str, Any]:
        taken_s = 0.15 if status == "completed" else None
        return {"id": video_id, "object": "video", "status": status, "progress": 0, "inference_time_s": taken_s}

    def fault(self, fields: dict[str, Any]) -> str | None:
        raise NotImplementedError

    def refusal(self, status: int, message: str) -> Response:
        raise NotImplementedError

    def failed(self, video_id: str) -> Response:
        raise NotImplementedError


class FakeVllmOmni(FakeVideos):
    """`seconds` is a whole number as text; a job that failed is answered with an error's status; DELETE aborts."""

    def fault(self, fields: dict[str, Any]) -> str | None:
        if "seconds" in fields and re.fullmatch(r"[1-9]\d*", fields["seconds"]) is None:
            return "seconds: String should match pattern '^[1-9]\\d*$'"
        return None

    def refusal(self, status: int, message: str) -> Response:
        error = {"message": message, "type": "BadRequestError", "param": None, "code": status}
        return JSONResponse({"error": error}, status)

    def failed(self, video_id: str) -> Response:
        return JSONResponse({**self.job(video_id, "failed"), "error": {"code": 500, "message": "out of memory"}}, 500)


class FakeSglang(FakeVideos):
    """`seconds` and `fps` are integers; errors are FastAPI's; a failed job has a message and no code."""

    def fault(self, fields: dict[str, Any]) -> str | None:
        whole = (name for name in ("seconds", "fps", "num_frames", "seed") if name in fields)
        return next((f"{name}: not an integer" for name in whole if not fields[name].isdecimal()), None)

    def refusal(self, status: int, message: str) -> Response:
        return JSONResponse({"detail": message}, status)

    def failed(self, video_id: str) -> Response:
        return JSONResponse({**self.job(video_id, "failed"), "error": {"message": "out of memory"}})


@contextmanager
def serving_fake(fake: FakeVideos) -> Iterator[FakeVideos]:
    with listening(fake.app()) as fake.url:
        yield fake
