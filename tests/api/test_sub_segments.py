"""Segments in parts: the same pictures at the same times, in more boxes."""

from __future__ import annotations

import io
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import av
import numpy as np
import pytest

from helios_serve.api.jobs import JobSegment
from helios_serve.api.sub_segments import sub_segments
from helios_serve.types import Codec
from helios_serve.workers.segment import SegmentSpec, encode_segment


def segment(
    index: int, num_frames: int, codec: Codec = "h264", fps: float = 24.0, *, is_last: bool = False
) -> JobSegment:
    """Moving noise, so that pictures differ in size."""
    random = np.random.default_rng(index)
    yuv = np.stack([np.roll(random.integers(0, 255, (96, 64), np.uint8), shift, 1) for shift in range(num_frames)])
    spec = SegmentSpec(width=64, height=64, fps=fps, crf=30, codec=codec)
    init, media = encode_segment(yuv, spec, index, 33 * index)
    return JobSegment(
        index=index,
        init=init,
        media=media,
        start_frame=33 * index,
        num_frames=num_frames,
        fps=fps,
        prompt="p",
        prompt_weight=1.0,
        is_last=is_last,
        generated_ms=1,
    )


def shown(init: bytes, media: list[bytes]) -> list[tuple[Fraction, bool, bytes]]:
    """Time, whether it stands alone, and pixels of each picture."""
    with av.open(io.BytesIO(init + b"".join(media)), "r") as container:
        found = []
        for frame in container.decode(video=0):
            assert frame.pts is not None
            assert frame.time_base is not None
            found.append((frame.pts * frame.time_base, frame.key_frame, frame.to_ndarray(format="yuv420p").tobytes()))
        return found


@pytest.mark.parametrize("codec", ["h264", "vp9", "av1"])
@pytest.mark.parametrize("fps", [24.0, 16.0, 23.976])
def test_parts_show_what_the_segments_show(codec: Codec, fps: float) -> None:
    whole = [segment(0, 33, codec, fps), segment(1, 33, codec, fps), segment(2, 8, codec, fps, is_last=True)]
    parts = [part for one in whole for part in sub_segments(one)]
    expected = shown(whole[0].init, [one.media for one in whole])
    assert len(expected) == 74
    assert shown(whole[0].init, [part.media for part in parts]) == expected
    assert [part.num_frames for part in parts] == [*(2 * [1, *[4] * 8]), 1, 4, 3]
    assert all(one.start_frame + one.num_frames == other.start_frame for one, other in pairwise(parts))
    assert [part.index for part in parts] == [0] * 9 + [1] * 9 + [2] * 3
    assert [part.is_last for part in parts] == [False] * 20 + [True]
    numbers = [int.from_bytes(part.media[20:24], "big") for part in parts]
    assert numbers == list(range(1, 22))


def test_every_prefix_is_a_video() -> None:
    one = segment(0, 33)
    parts = sub_segments(one)
    counts = [len(shown(one.init, [part.media for part in parts[:end]])) for end in range(1, 10)]
    assert counts == [1, 5, 9, 13, 17, 21, 25, 29, 33]


def test_a_segment_of_one_frame() -> None:
    one = segment(3, 1, is_last=True)
    (part,) = sub_segments(one)
    assert replace(part, media=b"") == replace(one, media=b"")
    assert shown(one.init, [part.media]) == shown(one.init, [one.media])
