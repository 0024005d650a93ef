"""What files claim, read by hand, against what the libraries that made them say."""

import io
import struct

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from helios_serve.workers.media_headers import image_type, is_whole_mp4, num_claimed_samples, webp_size
from helios_serve.workers.segment import SegmentSpec, encode_segment, progressive_mp4


def _image(kind, size, mode="RGB", **options):
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind, **options)
    return file.getvalue()


def _box(kind, body=b"", size=None):
    return struct.pack(">I", len(body) + 8 if size is None else size) + kind + body


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_type_of_an_image(kind):
    assert image_type(_image(kind, (8, 8))) == (kind if kind in ("PNG", "JPEG", "WEBP") else None)


@pytest.mark.parametrize(
    ("mode", "options"),
    [("RGB", {}), ("RGB", {"lossless": True}), ("RGBA", {}), ("RGB", {"exif": b"Exif\0\0II*\0"})],
)
@given(width=st.integers(1, 700), height=st.integers(1, 700))
@settings(max_examples=20, deadline=None)
def test_size_of_webp(mode, options, width, height):
    assert webp_size(_image("WEBP", (width, height), mode, **options)) == (width, height)


def test_size_of_an_animation():
    second = Image.new("RGB", (90, 60), "red")
    assert webp_size(_image("WEBP", (90, 60), save_all=True, append_images=[second])) == (90, 60)


def test_largest_webp():
    for lossless in (False, True):
        data = _image("WEBP", (16_383, 16), lossless=lossless, method=0, quality=0)
        assert webp_size(data) == (16_383, 16)


def test_size_of_what_is_no_webp():
    assert webp_size(b"RIFF\0\0\0\0WEBPVP8X") == (0, 0)
    assert webp_size(b"RIFF\0\0\0\0WEBPEXIF" + bytes(40)) == (0, 0)


@pytest.mark.parametrize("num_frames", [1, 33])
def test_claimed_samples(num_frames):
    yuv = np.full((num_frames, 72, 64), 128, np.uint8)
    spec = SegmentSpec(width=64, height=48, fps=24.0, crf=23, codec="h264")
    parts = [encode_segment(yuv, spec, chunk, num_frames * chunk) for chunk in range(2)]
    fragments = parts[0][0] + parts[0][1] + parts[1][1]
    whole = progressive_mp4(parts[0][0], [part[1] for part in parts])
    for data in (fragments, whole):
        with av.open(io.BytesIO(data)) as container:
            assert num_claimed_samples(data) == sum(1 for _ in container.decode(video=0)) == 2 * num_frames
        assert is_whole_mp4(data)
        assert not is_whole_mp4(data[:-1])


def test_tables_are_found_wherever_they_are():
    count = (1000).to_bytes(4, "big")
    for table in (_box(b"stsz", bytes(8) + count), _box(b"stz2", bytes(8) + count), _box(b"trun", bytes(4) + count)):
        assert num_claimed_samples(_box(b"moov", _box(b"udta", table))) == 1000
        assert num_claimed_samples(_box(b"hoov", table * 3, size=0)) == 3000
        assert num_claimed_samples(_box(b"mdat", table) + _box(b"moov", b"stsz" + table)) >= 1000
        assert num_claimed_samples(_box(b"mdat", table)) == 0
    assert num_claimed_samples(_box(b"moov", _box(b"cmov"))) > 10**9


def test_boxes_that_end_where_the_file_ends():
    ftyp = _box(b"ftyp", bytes(8))
    assert is_whole_mp4(ftyp + _box(b"mdat", bytes(9), size=0))
    assert is_whole_mp4(ftyp + _box(b"mdat", (116).to_bytes(8, "big") + bytes(100), size=1))
    assert not is_whole_mp4(ftyp + _box(b"mdat", (117).to_bytes(8, "big") + bytes(100), size=1))
    assert not is_whole_mp4(ftyp + _box(b"mdat", bytes(9), size=7))
    assert is_whole_mp4(ftyp + bytes(7))
    assert is_whole_mp4(_box(b"free") * 20_000)
    assert not is_whole_mp4(_box(b"free") * 20_001)
    assert not is_whole_mp4(b"")
