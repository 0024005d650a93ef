"""What a viewer over gRPC wants segments to be: encoded or as pictures, whole or a few frames at a time.

Knows `OutputOptions`; knows no job and no call.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from helios_serve.api.auth import Caller, require
from helios_serve.api.grpc_convert import unknown_value
from helios_serve.api.jobs import JobSegment
from helios_serve.api.proto.helios.video.v1 import video_generation_pb2 as pb
from helios_serve.api.sub_segments import sub_frames, sub_segments
from helios_serve.api.video_files import Pixels

_PIXELS: dict[int, Pixels | None] = {
    pb.CONTAINER_UNSPECIFIED: None,
    pb.CONTAINER_FMP4: None,
    pb.CONTAINER_RAW_RGB24: "rgb24",
    pb.CONTAINER_RAW_YUV420P: "yuv420p",
}

Decode = Callable[[JobSegment, Pixels], Awaitable[JobSegment]]
"""A segment with its pictures, decoded, for its media."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """pixels: None for encoded segments. sub_chunks: 1, 4, 4, ... frames at a time."""

    pixels: Pixels | None = None
    sub_chunks: bool = False

    async def fragments(self, segment: JobSegment, decode: Decode) -> list[JobSegment]:
        """What is sent of a segment, in order."""
        if self.pixels is None:
            return sub_segments(segment) if self.sub_chunks else [segment]
        pictures = await decode(segment, self.pixels)
        return sub_frames(pictures) if self.sub_chunks else [pictures]


def output_of(options: pb.OutputOptions, caller: Caller) -> Output:
    """Raises: ScopeError for raw frames; InvalidRequestError for no container at all."""
    if options.container not in _PIXELS:
        raise unknown_value("output.container", options.container, pb.Container)
    pixels = _PIXELS[options.container]
    if pixels is not None:
        require(caller, "raw")
    return Output(pixels=pixels, sub_chunks=options.sub_chunks)
