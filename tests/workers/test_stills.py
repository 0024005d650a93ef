"""Pictures of segments whose frames have known grey values."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from helios_serve.workers import stills
from helios_serve.workers.segment import SegmentSpec, encode_segment

SPEC = SegmentSpec(width=128, height=64, fps=24, crf=10, codec="h264")


def segment(chunk: int, luma: list[int]) -> tuple[bytes, bytes]:
    yuv = np.full((len(luma), 96, 128), 128, np.uint8)
    for index, value in enumerate(luma):
        yuv[index, :64] = value
    return encode_segment(yuv, SPEC, chunk, 33 * chunk)


def grey(picture: Image.Image) -> float:
    return float(np.asarray(picture.convert("L"), dtype=np.float64).mean())


def expected(luma: int) -> float:
    """Limited range to full range."""
    return (luma - 16) * 255 / 219


def test_thumbnail_is_the_first_frame() -> None:
    init, media = segment(0, [60, 200, 200])
    picture = Image.open(io.BytesIO(stills.thumbnail(init, media)))
    assert (picture.format, picture.size) == ("WEBP", (320, 160))
    assert grey(picture) == pytest.approx(expected(60), abs=4)


def test_raw_frames() -> None:
    init, media = segment(0, [60, 60, 200])
    planes = np.frombuffer(stills.raw_frames(init, media, "yuv420p"), np.uint8).reshape(3, 96, 128)
    assert planes[:, :64].mean((1, 2)) == pytest.approx([60, 60, 200], abs=3)
    assert planes[:, 64:].mean() == pytest.approx(128, abs=1)
    pictures = np.frombuffer(stills.raw_frames(init, media, "rgb24"), np.uint8).reshape(3, 64, 128, 3)
    assert pictures.mean((1, 2, 3)) == pytest.approx([expected(60), expected(60), expected(200)], abs=4)


def test_last_frame_is_the_last_frame() -> None:
    init, media = segment(2, [60, 60, 200])
    picture = Image.open(io.BytesIO(stills.last_frame(init, media)))
    assert (picture.format, picture.size) == ("PNG", (128, 64))
    assert grey(picture) == pytest.approx(expected(200), abs=4)


def test_spritesheet_has_one_tile_a_second_ten_in_a_row() -> None:
    init, first = segment(0, [40 + 5 * index for index in range(33)])
    _, second = segment(1, [100] * 33)
    picture = Image.open(io.BytesIO(stills.spritesheet(init, [first, second], 3)))
    assert (picture.format, picture.size) == ("JPEG", (1600, 3 * 80))
    tile = picture.crop((160, 0, 320, 80))
    assert grey(tile) == pytest.approx(expected(40 + 15), abs=5)


def test_spritesheet_stops_at_a_hundred_tiles() -> None:
    init, media = segment(0, [100] * 120)
    picture = Image.open(io.BytesIO(stills.spritesheet(init, [media], 1)))
    assert picture.size == (1600, 800)
