"""The gRPC server: its port, its options, health, reflection, and its end. Shares the event loop with HTTP; it is
started after all processes are, as gRPC does not survive a fork.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from helios_serve.api.auth import is_loopback
from helios_serve.api.grpc_access import GrpcAccess
from helios_serve.api.grpc_boundary import Boundary
from helios_serve.api.grpc_service import GrpcDesk, GrpcMethods
from helios_serve.api.grpc_session import GrpcSessions
from helios_serve.api.probes import Pulse
from helios_serve.api.proto.helios.video.v1 import video_generation_pb2 as pb
from helios_serve.errors import HeliosError
from helios_serve.telemetry import Metrics
from helios_serve.tracing import Tracing

logger = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["VideoGenerationService"]
_SERVING, _NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
READY_POLL_S = 0.5
STOP_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpcSettings:
    """Where the server listens, and what it takes.

    port: 0 takes a free one. tls_cert, tls_key: PEM files, both or none; tls_client_ca: clients need a certificate of
    its. reflection: None is on where only this machine can call. Times in milliseconds, as gRPC counts them;
    max_connection_age_grace_ms is what open calls get then.
    """

    host: str = "127.0.0.1"
    port: int = 0
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    reflection: bool | None = None
    max_receive_bytes: int = 64 << 20
    keepalive_time_ms: int = 20_000
    min_ping_interval_ms: int = 10_000
    max_connection_age_ms: int = 1_800_000
    max_connection_age_grace_ms: int = 600_000
    max_streams_per_connection: int = 256

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key: give both or none")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca: only together with tls_cert and tls_key")

    @property
    def has_reflection(self) -> bool:
        return is_loopback(self.host) if self.reflection is None else self.reflection

    def options(self) -> list[tuple[str, int]]:
        """As gRPC's core takes them."""
        return [
            ("grpc.max_receive_message_length", self.max_receive_bytes),
            ("grpc.keepalive_time_ms", self.keepalive_time_ms),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", self.min_ping_interval_ms),
            ("grpc.max_connection_age_ms", self.max_connection_age_ms),
            ("grpc.max_connection_age_grace_ms", self.max_connection_age_grace_ms),
            ("grpc.max_concurrent_streams", self.max_streams_per_connection),
            ("grpc.so_reuseport", 0),
        ]


class GrpcServer:
    """One for each process: `start`, then `drain` and `stop`. All on one event loop.

    Health: "" is SERVING while the process lives, as `pulse` says; the service is while the video service is ready and
    `set_ready` says nothing else.
    """

    def __init__(
        self,
        desk: GrpcDesk,
        access: GrpcAccess,
        metrics: Metrics,
        settings: GrpcSettings,
        *,
        pulse: Pulse | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self._service = desk.service
        self._settings = settings
        self._pulse = Pulse() if pulse is None else pulse
        self._boundary = Boundary(access, metrics, tracing)
        self._methods = {**GrpcMethods(desk).table(), "Session": GrpcSessions(desk).method()}
        self._health = _Health()
        self._is_allowed = True
        self._shown: dict[str, bool] = {}
        self._server: grpc.aio.Server | None = None
        self._watching: asyncio.Task[None] | None = None

    @property
    def num_open_calls(self) -> int:
        """Calls of the video service that have begun and not ended."""
        return self._boundary.num_open_calls

    async def start(self) -> int:
        """Listens; returns the port.

        Raises: HeliosError when the address is taken or a TLS file cannot be used.
        """
        server = grpc.aio.server(options=self._settings.options())
        server.add_generic_rpc_handlers((self._boundary.handler(SERVICE, self._methods),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if self._settings.has_reflection:
            names = (SERVICE.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, server)
        port = _listen(server, self._settings)
        await self._show()
        await server.start()
        self._server = server
        self._watching = asyncio.create_task(self._watch_ready())
        return port

    async def set_ready(self, is_ready: bool) -> None:
        """False shows NOT_SERVING whatever the video service says."""
        self._is_allowed = is_ready
        await self._show()

    async def drain(self, grace_s: float) -> None:
        """Shows NOT_SERVING, refuses new calls, and ends all others: sessions at once, the rest when they do not end by
        themselves within `grace_s`. They end with UNAVAILABLE and when to come back; no job is cancelled by it."""
        self._boundary.refuse()
        await self.set_ready(False)
        await self._boundary.finish(grace_s)

    async def stop(self) -> None:
        """Closes the port and all connections. Calls that `drain` did not end are cancelled."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await self._health.end()
        if self._server is not None:
            await self._server.stop(STOP_S)

    async def _watch_ready(self) -> None:
        while True:
            await asyncio.sleep(READY_POLL_S)
            await self._show()

    async def _show(self) -> None:
        is_ready = self._is_allowed and self._service.is_ready()
        for name, is_serving in {"": not self._pulse.problems(), SERVICE.full_name: is_ready}.items():
            if is_serving == self._shown.get(name):
                continue
            # A watcher that reads nothing holds the others up; the next look tries again.
            with suppress(TimeoutError):
                async with asyncio.timeout(STOP_S):
                    await self._health.set(name, _SERVING if is_serving else _NOT_SERVING)
                    self._shown[name] = is_serving


class _Health(health.aio.HealthServicer):
    """Tells those who watch that the server ends. The library leaves them to be cut, which takes as long as may be
    waited for, and is logged as a failure of the server's."""

    def __init__(self) -> None:
        super().__init__()
        self._watchers: set[asyncio.Task[Any]] = set()
        self._is_ending = False

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:  # noqa: N802  # as in the proto
        """Raises what ends the call."""
        task = asyncio.current_task()
        assert task is not None
        self._watchers.add(task)
        try:
            if not self._is_ending:
                await super().Watch(request, context)
        except asyncio.CancelledError:
            if not self._is_ending or context.cancelled():
                raise
        finally:
            self._watchers.discard(task)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is shutting down")

    async def end(self) -> None:
        """Ends all watching."""
        self._is_ending = True
        for task in [*self._watchers]:
            task.cancel()
        if self._watchers:
            await asyncio.wait([*self._watchers], timeout=STOP_S)


def _listen(server: grpc.aio.Server, settings: GrpcSettings) -> int:
    address = f"{_in_brackets(settings.host)}:{settings.port}"
    try:
        if settings.tls_cert is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, _credentials(settings))
    except RuntimeError as error:
        raise HeliosError(
            f"cannot serve gRPC on {address}: {error}; choose another port, or check the TLS files"
        ) from None


def _credentials(settings: GrpcSettings) -> grpc.ServerCredentials:
    assert settings.tls_cert is not None
    assert settings.tls_key is not None
    try:
        key, cert = settings.tls_key.read_bytes(), settings.tls_cert.read_bytes()
        client_ca = None if settings.tls_client_ca is None else settings.tls_client_ca.read_bytes()
    except OSError as error:
        raise HeliosError(f"TLS file {error.filename}: {error.strerror}") from error
    return grpc.ssl_server_credentials([(key, cert)], client_ca, require_client_auth=client_ca is not None)


def _in_brackets(host: str) -> str:
    try:
        return f"[{host}]" if ip_address(host).version == 6 else host
    except ValueError:
        return host
