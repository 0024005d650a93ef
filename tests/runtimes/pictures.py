"""Files of the tests: lossless enough to be compared frame by frame."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
import numpy.typing as npt

Frames = npt.NDArray[np.uint8]

PIXELS = np.random.default_rng(0).integers(0, 255, (40, 8, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
"""[40, 64, 64, 3]: squares, which codecs keep."""

MAX_LUMA_ERROR = 0.1
"""Mean over pixels; the codec is lossless, another prompt is 4 away."""


def luma(data: bytes) -> npt.NDArray[np.int64]:
    """[F, H, W] of a video file."""
    with av.open(io.BytesIO(data), "r") as container:
        return np.stack([frame.to_ndarray()[: frame.height] for frame in container.decode(video=0)]).astype(int)


def luma_of(frames: Frames) -> npt.NDArray[np.int64]:
    """[F, H, W] of pictures [F, H, W, 3], as a codec is given them."""
    converted = [av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuv420p") for frame in frames]
    return np.stack([frame.to_ndarray()[: frame.height] for frame in converted]).astype(int)


def as_mp4(frames: Frames) -> bytes:
    """[F, H, W, 3] as a file."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(24), options={"crf": "1"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()
