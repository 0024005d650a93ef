"""Encodes the frames of one chunk as a self-contained fMP4 segment, and joins segments into a progressive MP4.

Knows codecs, boxes and timestamps. Knows nothing of jobs, devices or where the bytes go. Every segment has a fresh
encoder and a fresh muxer, so it is a closed GOP, any worker can encode it, and a repeated call gives the same bytes.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
import numpy.typing as npt
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

from helios_serve.types import Codec

_MUXER_OPTIONS = {
    "movflags": "empty_moov+default_base_moof+frag_discont+skip_trailer",
    "use_editlist": "0",
    "avoid_negative_ts": "disabled",
}
os.environ.setdefault("SVT_LOG", "1")  # SVT-AV1 prints its settings for each encoder; 1 leaves its errors
_ENCODERS: dict[Codec, str] = {"h264": "libx264", "vp9": "libvpx-vp9", "av1": "libsvtav1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentSpec:
    """How the segments of one video are encoded; the same for all of them.

    `width` and `height` are even pixel counts, `fps` is the playback rate, `crf` the encoder's quality (0 best, 51
    worst) and `preset` the speed preset of x264.
    """

    width: int
    height: int
    fps: float
    crf: int
    codec: Codec
    preset: str = "ultrafast"


def frame_rate(fps: float) -> Fraction:
    """The exact rate that a rounded one stands for: 23.976 -> 24000/1001, 12.5 -> 25/2."""
    ntsc = Fraction(round(fps) * 1000, 1001)
    return ntsc if abs(float(ntsc) - fps) < 5e-4 else Fraction(fps).limit_denominator(1001)


def encode_segment(yuv: npt.NDArray[np.uint8], spec: SegmentSpec, chunk: int, start_frame: int) -> tuple[bytes, bytes]:
    """Encodes the frames of one chunk.

    Args:
        yuv: [F, H*3/2, W] uint8, F >= 1, planar 4:2:0 in BT.709 limited range.
        chunk: index in the video; becomes the fragment's sequence number `chunk` + 1.
        start_frame: index in the video of the first frame; gives the decode time of the fragment.

    Returns: (init, media). `init` is ftyp + moov, equal for every segment of one spec; `media` is moof + mdat.
        init + media 0 + media 1 + ... is a valid MP4 after every segment.
    """
    assert yuv.dtype == np.uint8
    assert yuv.shape[1:] == (spec.height * 3 // 2, spec.width)
    assert len(yuv) > 0
    output = io.BytesIO()
    options = _MUXER_OPTIONS | {"fragment_index": str(chunk + 1)}
    with _own_priority(), av.open(output, "w", format="mp4", options=options) as container:
        stream = container.add_stream(_ENCODERS[spec.codec], rate=frame_rate(spec.fps))
        assert isinstance(stream, av.VideoStream)
        _configure(stream, spec)
        for index, picture in enumerate(yuv):
            container.mux(stream.encode(_frame(picture, spec, start_frame + index)))
        container.mux(stream.encode(None))
    boxes = list(_boxes(output.getvalue()))
    assert [kind for kind, _ in boxes] == [b"ftyp", b"moov", b"moof", b"mdat"]
    ftyp, moov, moof, mdat = (content for _, content in boxes)
    return ftyp + moov, moof + mdat


@contextmanager
def _own_priority() -> Iterator[None]:
    """Gives the calling thread its scheduling back: SVT-AV1 makes it a real-time one where it may, as root, and it and
    all threads that it starts would keep everything else from running."""
    if sys.platform != "linux":
        yield
        return
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        if os.sched_getscheduler(0) != policy:
            os.sched_setscheduler(0, policy, parameters)


def progressive_mp4(init: bytes, media: Sequence[bytes]) -> bytes:
    """The finished video as one seekable MP4 with its index first; packets are copied, not encoded again.

    Args:
        init: the init segment that all of `media` share.
        media: the media of all segments, in order, from chunk 0.
    """
    with tempfile.TemporaryDirectory(prefix="helios-") as folder:
        path = os.path.join(folder, "video.mp4")  # the muxer reopens its output by name to move the index
        with (
            av.open(io.BytesIO(init + b"".join(media)), "r", format="mp4") as source,
            av.open(path, "w", format="mp4", options={"movflags": "faststart"}) as target,
        ):
            track = source.streams.video[0]
            assert track.average_rate is not None
            stream = target.add_stream_from_template(track, opaque=True)
            for packet in source.demux(track):
                if packet.dts is not None:  # the demuxer ends with an empty packet
                    packet.duration = round(1 / (track.average_rate * packet.time_base))  # VP9 packets carry none
                    packet.stream = stream
                    target.mux(packet)
        with open(path, "rb") as file:
            return file.read()


def _configure(stream: av.VideoStream, spec: SegmentSpec) -> None:
    context = stream.codec_context
    context.width, context.height, context.pix_fmt = spec.width, spec.height, "yuv420p"
    context.time_base = 1 / frame_rate(spec.fps)
    stream.time_base = context.time_base
    context.max_b_frames = 0
    context.thread_count = 1  # the bitstream depends on the number of threads
    context.color_primaries = ColorPrimaries.BT709
    context.color_trc = ColorTrc.BT709
    context.colorspace = Colorspace.ITU709
    context.color_range = ColorRange.MPEG
    context.options = _encoder_options(spec)


def _encoder_options(spec: SegmentSpec) -> dict[str, str]:
    if spec.codec == "h264":
        return {
            "preset": spec.preset,
            "tune": "zerolatency",
            # Lossless is in one profile only, which few browsers play.
            "profile": "high444" if spec.crf == 0 else "baseline",
            "crf": str(spec.crf),
            "x264-params": "scenecut=0:keyint=infinite:repeat-headers=0",
        }
    if spec.codec == "vp9":
        return {"deadline": "realtime", "cpu-used": "8", "lag-in-frames": "0", "crf": str(spec.crf), "b": "0"}
    return {
        "preset": "12",
        "crf": str(spec.crf),
        "svtav1-params": "pred-struct=1:rtc=1:lookahead=0:lp=1",
    }


def _frame(picture: npt.NDArray[np.uint8], spec: SegmentSpec, index: int) -> VideoFrame:
    frame = VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="yuv420p")
    frame.pts, frame.time_base = index, 1 / frame_rate(spec.fps)
    return frame


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The top-level boxes in order: (four-character type, whole box)."""
    offset = 0
    while offset < len(data):
        size = int.from_bytes(data[offset : offset + 4], "big")
        assert size >= 8, "a box of 4 GiB or of unknown size cannot occur in a segment"
        yield data[offset + 4 : offset + 8], data[offset : offset + size]
        offset += size
