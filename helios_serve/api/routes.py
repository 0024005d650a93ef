"""What the groups of HTTP routes share: the service, the settings and how a call is read and answered."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol, TypeVar
from urllib.parse import urlsplit

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.requests import HTTPConnection

from helios_serve.api.auth import Caller
from helios_serve.api.convert import Limits, ParsedRequest, parse_generation
from helios_serve.api.extension import parse_input_extension
from helios_serve.api.forms import FORM_TYPE, read_form
from helios_serve.api.http_access import HttpAccess
from helios_serve.api.http_request import base_url_of, content_type_of, json_object, read_body
from helios_serve.api.intake import InputExtension
from helios_serve.api.jobs import Job, Links, video_object
from helios_serve.api.media_input import Media
from helios_serve.api.service import VideoService
from helios_serve.api.webhooks import WebhookSender
from helios_serve.telemetry import Metrics
from helios_serve.tracing import NoTracing, Tracing

T = TypeVar("T")

VIDEOS = "/v1/videos"
GENERATIONS = "/v1/videos/generations"


Presign = Callable[[str, float], Awaitable[str | None]]
"""(blob, seconds) -> an address at which anybody can read it for so long; None where the blobs have none."""


class MediaFor(Protocol):
    """Where the media of one caller's requests comes from."""

    def __call__(self, caller: Caller) -> Media: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """What the HTTP surface needs beside the service. Without `metrics` it counts its requests in its own."""

    version: str
    about: Mapping[str, object] = field(default_factory=dict)
    metrics: Metrics | None = None
    tracing: Tracing = field(default_factory=NoTracing)
    limits: Limits = field(default_factory=Limits)
    max_body_bytes: int = 64 * 2**20
    max_other_body_bytes: int = 2**20
    max_head_bytes: int = 32 * 2**10


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """One for each application. parsing: the threads in which requests are read, as decoding media waits there.
    presign: where finished videos are read from the blob store itself; None where this server passes them on."""

    service: VideoService
    access: HttpAccess
    settings: ServerSettings
    media_for: MediaFor
    webhooks: WebhookSender
    presign: Presign | None = None
    parsing: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(8, "helios-parse"))

    async def body(self, request: Request) -> Mapping[str, object]:
        """The fields of a JSON body or a form."""
        if content_type_of(request) == FORM_TYPE:
            return await read_form(request)
        raw = await read_body(request)
        return await self._in_thread(lambda: json_object(raw))

    async def parsed(self, body: Mapping[str, object], caller: Caller) -> ParsedRequest:
        """The request, validated."""
        return await self._parsed(body, caller, is_live=False)

    async def parsed_live(self, body: Mapping[str, object], caller: Caller) -> ParsedRequest:
        """The request of a session, validated."""
        return await self._parsed(body, caller, is_live=True)

    async def _parsed(self, body: Mapping[str, object], caller: Caller, *, is_live: bool) -> ParsedRequest:
        model, limits, media = self.service.model, self.settings.limits, self.media_for(caller)
        parsed = await self._in_thread(lambda: parse_generation(body, model, media, limits, is_live=is_live))
        self._check_webhook(parsed)
        return parsed

    async def parsed_input_extension(self, body: Mapping[str, object], caller: Caller) -> InputExtension:
        """What continues a video of the caller's own, validated."""
        model, limits, media = self.service.model, self.settings.limits, self.media_for(caller)
        extension = await self._in_thread(lambda: parse_input_extension(body, model, media, limits))
        self._check_webhook(extension.parsed)
        return extension

    def _check_webhook(self, parsed: ParsedRequest) -> None:
        if parsed.webhook_url is not None:
            self.webhooks.check(parsed.webhook_url, "webhook_url")

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Decoding a video takes long enough to stall every other client."""
        return await asyncio.get_running_loop().run_in_executor(self.parsing, work)

    def links(self, request: HTTPConnection) -> Callable[[Job], Links]:
        """Makes the addresses of a job's bytes as this client reaches them, with tokens where keys are in use."""
        base = base_url_of(request)

        def of(job: Job) -> Links:
            at = f"{base}{VIDEOS}/{job.id}"
            if self.access.is_keyless:
                return Links(
                    content=f"{at}/content", stream=f"{at}/stream", events=f"{at}/events", hls=f"{at}/hls/index.m3u8"
                )
            sign = self.access.sign
            return Links(
                content=f"{at}/content?token={sign(job.id, 'content')}",
                stream=f"{at}/stream?token={sign(job.id, 'stream')}",
                events=f"{at}/events?token={sign(job.id, 'events')}",
                hls=f"{at}/hls/index.m3u8?token={sign(job.id, 'hls')}",
            )

        return of

    async def redirect_origins(self) -> tuple[str, ...]:
        """Where `content` sends clients: the origin of the bucket's addresses, if it does."""
        url = None if self.presign is None else await self.presign("origin", 1.0)
        if url is None:
            return ()
        parts = urlsplit(url)
        return (f"{parts.scheme}://{parts.netloc}",)

    def content_url(self, base: str, video_id: str) -> str:
        """The address of a finished video, with a token where keys are in use."""
        at = f"{base}{VIDEOS}/{video_id}/content"
        return at if self.access.is_keyless else f"{at}?token={self.access.sign(video_id, 'content')}"

    def video(
        self, request: Request, job: Job, headers: Mapping[str, str] | None = None, status: int = 200
    ) -> Response:
        """The `Video` object as an answer."""
        body = video_object(job, self.links(request)(job)).model_dump()
        return JSONResponse(body, status_code=status, headers={**poll_headers(job), **(headers or {})})


def poll_headers(job: Job) -> dict[str, str]:
    """When to ask for an unfinished job again."""
    headers = {"cache-control": "no-store"}
    if not job.has_ended:
        eta_ms = 8000.0 if job.eta_s is None else 1000 * job.eta_s
        headers["openai-poll-after-ms"] = str(round(min(5000.0, max(250.0, eta_ms / 8))))
    return headers
