"""The frames of a caller's own video as the first segments of one that continues it.

Knows pictures and the segment encoder; knows no model and no job. Runs on the CPU, in the caller's thread.
"""

from __future__ import annotations

import torch
from torch import Tensor

from helios_serve.kernels.yuv import rgb_to_yuv420
from helios_serve.types import FRAMES_PER_CHUNK, Frames, SamplingParams
from helios_serve.workers.segment import SegmentSpec, encode_segment

_SLAB_FRAMES = 4
"""Converted at a time: a few stay in a processor's cache, all of a chunk take four times as long."""


@torch.inference_mode()
def input_segments(frames: Frames, params: SamplingParams) -> tuple[bytes, list[bytes]]:
    """The last whole chunks of `frames` as segments from 0 on; the frames before them are left out.

    Args:
        frames: at least 33, of the size that `params` says.
        params: of the video that the segments begin; those that are made behind them share their init.

    Returns: (init, media of each segment).
    """
    spec = SegmentSpec(width=params.width, height=params.height, fps=params.fps, crf=params.crf, codec=params.codec)
    num_chunks = frames.num_frames // FRAMES_PER_CHUNK
    assert num_chunks > 0
    frame_bytes = frames.height * frames.width * 3
    first = frames.num_frames - FRAMES_PER_CHUNK * num_chunks
    init, media = b"", []
    for chunk in range(num_chunks):
        start = (first + FRAMES_PER_CHUNK * chunk) * frame_bytes
        yuv = _to_yuv(frames, memoryview(frames.data)[start : start + FRAMES_PER_CHUNK * frame_bytes])
        init, segment = encode_segment(yuv.numpy(), spec, chunk, FRAMES_PER_CHUNK * chunk)
        media.append(segment)
    return init, media


def _to_yuv(frames: Frames, data: memoryview) -> Tensor:
    """uint8 RGB of the size of `frames` -> [F, H * 3/2, W] uint8."""
    rgb = torch.frombuffer(bytearray(data), dtype=torch.uint8)  # a copy: the bytes are not to be written to
    slabs = rgb.view(-1, frames.height, frames.width, 3).permute(0, 3, 1, 2).split(_SLAB_FRAMES)
    return torch.cat([rgb_to_yuv420(slab.float() / 127.5 - 1.0) for slab in slabs])
