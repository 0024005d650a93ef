"""What a server shows to the outside, put together from its parts: the service, and HTTP, gRPC and the open routes over
it. Knows which part needs which; opens no port.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from fastapi import FastAPI

from helios_serve import __version__
from helios_serve.api.auth import Authenticator, OriginPolicy
from helios_serve.api.caller_media import CallerMedia
from helios_serve.api.convert import Limits
from helios_serve.api.database_keys import DatabaseKeys
from helios_serve.api.files import FileService
from helios_serve.api.grpc_access import GrpcAccess
from helios_serve.api.grpc_server import GrpcServer, GrpcSettings
from helios_serve.api.grpc_service import GrpcDesk
from helios_serve.api.http_access import HttpAccess, owners_in
from helios_serve.api.http_server import Extras, create_admin_app, create_app
from helios_serve.api.job_runner import RunnerConfig
from helios_serve.api.keys import KeyFile, KeyRing, KeySource, keys_from_env
from helios_serve.api.limits import Limiter
from helios_serve.api.media_fetch import url_reader
from helios_serve.api.outgoing import Outgoing, OutgoingPolicy
from helios_serve.api.probes import GoldenProbe, Probes, Pulse
from helios_serve.api.realtime import RealtimeRoute, realtime_route
from helios_serve.api.routes import Desk, ServerSettings
from helios_serve.api.service import ServiceConfig, VideoService
from helios_serve.api.signed_urls import SigningKeys, UrlSigner
from helios_serve.api.webhooks import WebhookSender
from helios_serve.config import ServerConfig
from helios_serve.engine.async_engine import AsyncEngine
from helios_serve.engine.executor import Executor
from helios_serve.listening import Listeners
from helios_serve.store.connect import Stores
from helios_serve.telemetry import Metrics
from helios_serve.tracing import Tracing
from helios_serve.types import ModelInfo
from helios_serve.workers import stills
from helios_serve.workers.input_segments import input_segments
from helios_serve.workers.media_sandbox import SandboxDecoder, SandboxLimits
from helios_serve.workers.segment import progressive_mp4

MEDIA_LIMITS = SandboxLimits(cpu_s=60, wall_s=90.0)
"""Of one decoding: the longest video that may be sent, 1,452 frames, takes up to 45 s of CPU at 1080p."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a server is put together from. executor: the one that `engine` runs. about: what /version says of it."""

    engine: AsyncEngine
    executor: Executor
    stores: Stores
    info: ModelInfo
    server: ServerConfig
    about: Mapping[str, object]
    signing: SigningKeys
    metrics: Metrics
    tracing: Tracing
    runner: RunnerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Surfaces:
    """Everything that answers callers. admin_app: None where the open routes are in `app`. grpc: None without gRPC."""

    service: VideoService
    realtime: RealtimeRoute
    pulse: Pulse
    app: FastAPI
    admin_app: FastAPI | None
    grpc: GrpcServer | None


async def open_surfaces(parts: Parts, listeners: Listeners) -> Surfaces:
    """Makes them all; the engine runs already.

    Raises: HeliosError when this machine cannot decode media.
    """
    server, limiter, authenticator = parts.server, Limiter(), Authenticator(_key_sources(parts))
    service = _service(parts, limiter)
    origins = OriginPolicy(is_keyless=not server.has_keys, allowed=frozenset(server.cors_origins))
    access = HttpAccess(
        authenticator, origins, UrlSigner(parts.signing), limiter, owner_of=owners_in(parts.stores.database)
    )
    files = FileService(parts.stores.access, parts.stores.blobs, parts.stores.jobs, limiter)
    desk = _desk(parts, service, access, await _caller_media(server, service, files))
    pulse = Pulse(lambda: parts.engine.silent_s)
    extras = Extras(
        realtime=realtime_route(service, desk.parsed_live, access.socket_caller, desk.links),
        files=files,
        rows=parts.stores.access,
        origins=origins,
        probes=Probes(pulse=pulse, golden=GoldenProbe(parts.executor.recheck)),
        has_open_routes=listeners.admin is None,
    )
    grpc_access = GrpcAccess(authenticator, limiter)
    return Surfaces(
        service=service,
        realtime=extras.realtime,
        pulse=pulse,
        app=create_app(desk, extras),
        admin_app=None if listeners.admin is None else create_admin_app(desk, parts.metrics, extras),
        grpc=None if listeners.grpc is None else _grpc(parts, desk, grpc_access, pulse, listeners),
    )


def _service(parts: Parts, limiter: Limiter) -> VideoService:
    return VideoService(
        stores=parts.stores,
        engine=parts.engine,
        muxer=progressive_mp4,
        stills=stills,
        model=parts.info,
        limiter=limiter,
        metrics=parts.metrics,
        config=ServiceConfig(runner=parts.runner),
        input_segments=input_segments,
    )


async def _caller_media(server: ServerConfig, service: VideoService, files: FileService) -> CallerMedia:
    decoder, loop = SandboxDecoder(limits=MEDIA_LIMITS), asyncio.get_running_loop()
    await asyncio.to_thread(decoder.check)
    urls = url_reader(frozenset(server.media_url_hosts), loop)
    return CallerMedia(service, files, decoder.for_tenant, urls, loop)


def _desk(parts: Parts, service: VideoService, access: HttpAccess, media: CallerMedia) -> Desk:
    server = parts.server
    outgoing = Outgoing(OutgoingPolicy(allow_private=server.webhook_private))
    webhooks = WebhookSender(parts.stores.access, outgoing, parts.signing, metrics=parts.metrics)
    service.on_end = webhooks.wake
    settings = ServerSettings(
        version=__version__,
        about=parts.about,
        metrics=parts.metrics,
        tracing=parts.tracing,
        limits=Limits(webhook_schemes=("https", "http") if server.webhook_private else ("https",)),
    )
    return Desk(
        service=service,
        access=access,
        settings=settings,
        webhooks=webhooks,
        media_for=media,
        presign=parts.stores.blobs.presign if server.content_redirect else None,
    )


def _grpc(parts: Parts, desk: Desk, access: GrpcAccess, pulse: Pulse, listeners: Listeners) -> GrpcServer:
    server = parts.server
    settings = GrpcSettings(
        host=server.host,
        port=listeners.grpc_port,
        tls_cert=server.tls_cert,
        tls_key=server.tls_key,
        tls_client_ca=server.tls_client_ca,
        reflection=server.grpc_reflection,
    )
    grpc_desk = GrpcDesk(
        service=desk.service,
        parsed=desk.parsed,
        parsed_live=desk.parsed_live,
        limiter=desk.service.limiter,
        limits=desk.settings.limits,
        content_url=lambda video_id: desk.content_url(listeners.url, video_id),
    )
    return GrpcServer(grpc_desk, access, parts.metrics, settings, pulse=pulse, tracing=parts.tracing)


def _key_sources(parts: Parts) -> list[KeySource]:
    server = parts.server
    sources: list[KeySource] = []
    if server.keys:
        sources.append(KeyRing(keys_from_env(server.keys)))
    if server.keys_file is not None:
        sources.append(KeyFile(server.keys_file))
    if server.keys_in_database:
        sources.append(DatabaseKeys(parts.stores.access))
    return sources
