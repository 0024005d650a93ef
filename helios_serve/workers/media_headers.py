"""What the bytes of a media file claim of themselves, read before any decoder sees them.

Pure functions of the bytes: knows where PNG, JPEG, WebP, MP4 and WebM keep their types, sizes and counts. Sets no
limits on media, decodes nothing and makes room for nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_EBML_MAGIC_BYTES = 4
_WEBM_SEGMENT = b"\x18\x53\x80\x67"
_NO_SIZE = (0, 0)
_MAX_TOP_LEVEL_BOXES = 20_000
_SAMPLE_COUNTS = re.compile(rb"(?=stsz.{8}(.{4})|stz2.{8}(.{4})|trun.{4}(.{4}))", re.DOTALL)
"""Looks ahead, so that one match cannot hide the next."""
_COMPRESSED_TABLES = re.compile(rb"cmov")
_COUNTLESS = 2**40


def image_type(data: bytes) -> str | None:
    """PNG, JPEG or WEBP by the first bytes; None for anything else."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    return "WEBP" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def webp_size(data: bytes) -> tuple[int, int]:
    """(width, height) of the canvas of a WebP file; zeros when its first chunk is none that starts one."""
    kind, body = data[12:16], data[20:30]
    if len(body) < 10:
        return _NO_SIZE
    if kind == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
    return _NO_SIZE


def is_whole_mp4(data: bytes) -> bool:
    """Whether the top-level boxes end where the data ends, and are no more than 20,000.

    A rest too short for a box is ignored.
    """
    end = -1
    for _, _, end in _top_level_boxes(data):  # noqa: B007
        pass
    return 0 <= end <= len(data)


def num_claimed_samples(data: bytes) -> int:
    """Samples of all tracks and fragments of an MP4, as its tables announce them; 2^40 if those are compressed.

    Looks for the tables anywhere outside of the media data: demuxers find them in odd places too.
    """
    num_samples = 0
    for kind, start, end in _top_level_boxes(data):
        if kind == b"mdat":
            continue
        box = memoryview(data)[start:end]
        if _COMPRESSED_TABLES.search(box):
            return _COUNTLESS
        for counts in _SAMPLE_COUNTS.findall(box):
            num_samples += int.from_bytes(b"".join(counts), "big")
    return num_samples


def is_whole_webm(data: bytes) -> bool:
    """Whether the segment that follows the header fits in the data; one of unknown length always does."""
    header_size, offset = _ebml_size(data, _EBML_MAGIC_BYTES)
    offset += header_size
    if data[offset : offset + 4] != _WEBM_SEGMENT:
        return False
    first = data[offset + 4]
    size, start = _ebml_size(data, offset + 4)
    num_bits = 7 * (9 - first.bit_length())
    return size == (1 << num_bits) - 1 or start + size <= len(data)


def _top_level_boxes(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(type, start, end) of each box; the end of the last is -1 if it is too small to be one, or one too many."""
    offset, num_boxes = 0, 0
    while offset + 8 <= len(data):
        kind, size = data[offset + 4 : offset + 8], int.from_bytes(data[offset : offset + 4], "big")
        if size == 0:  # the last box, to the end of the file
            size = len(data) - offset
        elif size == 1:
            size = int.from_bytes(data[offset + 8 : offset + 16], "big")
        num_boxes += 1
        if size < 8 or num_boxes > _MAX_TOP_LEVEL_BOXES:
            yield kind, offset, -1
            return
        yield kind, offset, offset + size
        offset += size


def _ebml_size(data: bytes, offset: int) -> tuple[int, int]:
    """The variable-length number at `offset` and the offset behind it."""
    length = 9 - data[offset].bit_length()
    value = int.from_bytes(data[offset : offset + length], "big") & ((1 << 7 * length) - 1)
    return value, offset + length
