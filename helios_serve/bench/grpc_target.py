"""helios_serve over gRPC: one `Generate` call for each video.

Knows the proto and the statuses of gRPC; what was seen goes into a `Recording`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from helios_serve.api.proto.helios.video.v1 import video_generation_pb2 as pb
from helios_serve.api.proto.helios.video.v1.video_generation_pb2_grpc import VideoGenerationServiceStub
from helios_serve.bench.mp4 import frames_in_fragments
from helios_serve.bench.observed import Recording
from helios_serve.bench.targets import FailedError
from helios_serve.bench.workload import Planned
from helios_serve.errors import InvalidRequestError

_OPTIONS = (("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1))
"""A proxy would be measured, too; and each channel is a connection of its own, as those of many viewers are."""
_TIMINGS = ("queue_ms", "encode_ms", "first_segment_ms", "denoise_ms", "decode_ms", "mux_ms", "total_ms")


@dataclass(slots=True, kw_only=True)
class Channels:
    """Connections to one address; each has one call at a time, and those that are free are used again."""

    address: str
    is_tls: bool = False
    _free: list[grpc.aio.Channel] = field(default_factory=list)

    @asynccontextmanager
    async def one(self) -> AsyncIterator[grpc.aio.Channel]:
        """A channel; one whose call did not end well is closed."""
        channel = self._free.pop() if self._free else self._new()
        try:
            yield channel
        except BaseException:
            await channel.close()
            raise
        self._free.append(channel)

    def _new(self) -> grpc.aio.Channel:
        if self.is_tls:
            return grpc.aio.secure_channel(self.address, grpc.ssl_channel_credentials(), _OPTIONS)
        return grpc.aio.insecure_channel(self.address, _OPTIONS)

    async def aclose(self) -> None:
        for channel in self._free:
            await channel.close()


def parse_grpc_url(text: str) -> Channels:
    """`grpc://host:port`, `grpcs://host:port` with TLS, or `host:port`. Raises: InvalidRequestError."""
    scheme, _, address = text.rpartition("://")
    host, _, port = address.rpartition(":")
    if scheme not in ("", "grpc", "grpcs") or not host or not port.isdecimal():
        raise InvalidRequestError(f"grpc {text}: must be grpc://host:port, or grpcs:// with TLS", param="grpc")
    return Channels(address=address, is_tls=scheme == "grpcs")


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpcTarget:
    """`key` is sent as bearer token; `image` and `video` are files."""

    channels: Channels
    image: bytes
    video: bytes
    model: str | None = None
    key: str | None = None

    async def make(self, planned: Planned, recording: Recording) -> None:
        metadata = () if self.key is None else (("authorization", f"Bearer {self.key}"),)
        try:
            async with self.channels.one() as channel:
                stub: Any = VideoGenerationServiceStub
                call = stub(channel).Generate(pb.GenerateRequest(spec=self._spec(planned)), metadata=metadata)
                await _read(call, recording)
        except grpc.aio.AioRpcError as error:
            raise _failure(error, is_begun=recording.video_id is not None) from error
        except ValueError as error:
            raise FailedError("unreadable_answer", repr(error)) from error

    def _spec(self, planned: Planned) -> pb.VideoSpec:
        kind = planned.kind
        spec = pb.VideoSpec(
            model=self.model or "", prompt=planned.prompt, num_frames=kind.num_frames, fps=kind.fps, seed=planned.seed
        )
        if kind.size is not None:
            spec.width, spec.height = map(int, kind.size.split("x"))
        if kind.steps is not None:
            spec.helios.steps.extend(kind.steps)
        if kind.service_class == "offline":
            spec.helios.service_class = pb.SERVICE_CLASS_OFFLINE  # the call is realtime by itself
        if kind.task == "i2v":
            spec.image.data = self.image
        elif kind.task == "v2v":
            spec.video.data = self.video
        return spec


async def _read(call: AsyncIterator[pb.GenerateResponse], recording: Recording) -> None:
    parts: list[bytes] = []
    is_completed = False
    async for message in call:
        at_s = recording.now_s()
        kind = message.WhichOneof("event")
        if kind == "accepted":
            recording.video_id = message.accepted.video.id
            recording.num_bytes += len(message.accepted.init_segment)
            if recording.preroll_s is None:
                recording.preroll_s = message.accepted.recommended_preroll_seconds
        elif kind == "segment":
            parts.append(message.segment.data)
            if message.segment.part == message.segment.num_parts - 1:
                data = b"".join(parts)
                parts.clear()
                recording.add_segment(at_s, frames_in_fragments(data), len(data))
        elif kind == "failed":
            raise FailedError(message.failed.error.code or "failed", message.failed.error.message)
        elif kind == "completed":
            _note_video(message.completed, recording)
            is_completed = True
    if not is_completed:
        raise FailedError("cut", "the call ended before the video was complete")


def _note_video(video: pb.Video, recording: Recording) -> None:
    recording.num_chunks = video.num_chunks
    timing = {descriptor.name: value for descriptor, value in video.timing.ListFields()}
    recording.server_timing_ms = {name: timing[name] for name in _TIMINGS if name in timing}
    warnings: Any = video.warnings  # the generated types take `Warning` for Python's own
    recording.warnings = tuple(warning.message for warning in warnings)
    recording.made_as = f"{video.width}x{video.height}, {video.fps:g} fps"


def _failure(error: grpc.aio.AioRpcError, *, is_begun: bool) -> FailedError:
    """The server's own code from the details of the status, where it gave one."""
    message = error.details() or ""
    if (reason := _reason(error)) is not None:
        return FailedError(reason, message)
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        return FailedError("cut" if is_begun else "connect", message)
    return FailedError(f"grpc_{error.code().name.lower()}", message)


def _reason(error: grpc.aio.AioRpcError) -> str | None:
    packed = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin")
    info = ErrorInfo()
    if isinstance(packed, bytes):
        try:
            if any(detail.Unpack(info) for detail in Status.FromString(packed).details):
                return str(info.reason)
        except DecodeError:
            return None
    return None
