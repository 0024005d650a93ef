"""Cuts a segment into fragments of the frames that the VAE decodes together: 1, 4, 4, ...

Knows boxes; decodes nothing. The encoded pictures stay as they are, with their times and flags, so that the fragments
behind the init segment show the same video as whole segments do. Source of the boxes: ISO/IEC 14496-12, 8.8.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace

from helios_serve.api.jobs import JobSegment

FRAMES_PER_PART = 4
MAX_PARTS = 9
"""Of a segment: one frame, then eight times four."""
WHEN_SENT = "the parts of a segment come together, when all of it is kept"
"""What a client is told that asks for them."""

_BASE_IS_MOOF = 0x020000
_HAS_OFFSET, _HAS_FIRST_FLAGS = 0x1, 0x4
_HAS_DURATION, _HAS_SIZE, _HAS_FLAGS, _HAS_SHIFT = 0x100, 0x200, 0x400, 0x800
_HAS_BASE, _HAS_DESCRIPTION = 0x1, 0x2
_DEFAULT_DURATION, _DEFAULT_SIZE, _DEFAULT_FLAGS = 0x8, 0x10, 0x20


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sample:
    """One encoded picture; duration in units of the track."""

    data: bytes
    duration: int
    flags: int


def sub_segments(segment: JobSegment) -> list[JobSegment]:
    """The same frames as fragments of 1, 4, 4, ... of them; only the last can be the last of the video."""
    track_id, time, samples = _samples_of(segment.media)
    assert len(samples) == segment.num_frames
    parts: list[JobSegment] = []
    for first, end in _spans(len(samples)):
        taken = samples[first:end]
        media = _fragment(MAX_PARTS * segment.index + len(parts) + 1, track_id, time, taken)
        parts.append(_part(segment, first, end, media))
        time += sum(sample.duration for sample in taken)
    return parts


def sub_frames(segment: JobSegment) -> list[JobSegment]:
    """The same of a segment whose media are pictures that are not encoded, all of one size."""
    size = len(segment.media) // segment.num_frames
    return [
        _part(segment, first, end, segment.media[first * size : end * size])
        for first, end in _spans(segment.num_frames)
    ]


def _spans(num_frames: int) -> Iterator[tuple[int, int]]:
    """Where each part begins and ends."""
    first, end = 0, 1
    while first < num_frames:
        yield first, min(end, num_frames)
        first, end = end, end + FRAMES_PER_PART


def _part(segment: JobSegment, first: int, end: int, media: bytes) -> JobSegment:
    return replace(
        segment,
        media=media,
        start_frame=segment.start_frame + first,
        num_frames=end - first,
        is_last=segment.is_last and end == segment.num_frames,
    )


def _samples_of(media: bytes) -> tuple[int, int, list[_Sample]]:
    """(track, decode time of the first, all samples) of moof + mdat with one track."""
    boxes = dict(_boxes(media))
    start, end = boxes[b"moof"]
    moof_at = start - 8
    ((traf_start, traf_end),) = (at for kind, at in _boxes(media, start, end) if kind == b"traf")
    inner = list(_boxes(media, traf_start, traf_end))
    ((tfhd, _),) = (at for kind, at in inner if kind == b"tfhd")
    track_id, defaults = _defaults(media, tfhd)
    ((tfdt, _),) = (at for kind, at in inner if kind == b"tfdt")
    (time,) = struct.unpack_from(">Q" if media[tfdt] else ">I", media, tfdt + 4)
    samples: list[_Sample] = []
    at = boxes[b"mdat"][0]
    for kind, (trun, _) in inner:
        if kind == b"trun":
            found, at = _run(media, trun, moof_at, at, defaults)
            samples += found
    return track_id, int(time), samples


def _defaults(media: bytes, at: int) -> tuple[int, dict[int, int]]:
    """The track of a tfhd, and what its samples have that do not say otherwise."""
    flags, track_id = struct.unpack_from(">II", media, at)
    at += 8 + 8 * bool(flags & _HAS_BASE) + 4 * bool(flags & _HAS_DESCRIPTION)
    found = {}
    for name in (_DEFAULT_DURATION, _DEFAULT_SIZE, _DEFAULT_FLAGS):
        if flags & name:
            (found[name],) = struct.unpack_from(">I", media, at)
            at += 4
    return track_id, found


def _run(media: bytes, at: int, moof_at: int, data_at: int, defaults: dict[int, int]) -> tuple[list[_Sample], int]:
    """The samples of a trun, and where the data of the next one begins. Pictures are shown in the order of decoding."""
    flags, count = struct.unpack_from(">II", media, at)
    flags &= 0xFFFFFF
    assert not flags & _HAS_SHIFT
    at += 8
    if flags & _HAS_OFFSET:
        (offset,) = struct.unpack_from(">i", media, at)
        data_at, at = moof_at + offset, at + 4
    first_flags = None
    if flags & _HAS_FIRST_FLAGS:
        (first_flags,) = struct.unpack_from(">I", media, at)
        at += 4
    samples = []
    for index in range(count):
        said: list[int] = []
        for name, default in (
            (_HAS_DURATION, _DEFAULT_DURATION),
            (_HAS_SIZE, _DEFAULT_SIZE),
            (_HAS_FLAGS, _DEFAULT_FLAGS),
        ):
            if flags & name:
                said += struct.unpack_from(">I", media, at)
                at += 4
            else:
                said.append(defaults[default])
        duration, size, own = said
        if index == 0 and first_flags is not None:
            own = first_flags
        samples.append(_Sample(data=media[data_at : data_at + size], duration=duration, flags=own))
        data_at += size
    return samples, data_at


def _fragment(number: int, track_id: int, time: int, samples: list[_Sample]) -> bytes:
    """moof + mdat; every sample says everything of itself."""
    mfhd = _full_box(b"mfhd", 0, 0, struct.pack(">I", number))
    tfhd = _full_box(b"tfhd", 0, _BASE_IS_MOOF, struct.pack(">I", track_id))
    tfdt = _full_box(b"tfdt", 1, 0, struct.pack(">Q", time))
    rows = b"".join(struct.pack(">III", sample.duration, len(sample.data), sample.flags) for sample in samples)

    def moof(offset: int) -> bytes:
        flags = _HAS_OFFSET | _HAS_DURATION | _HAS_SIZE | _HAS_FLAGS
        trun = _full_box(b"trun", 0, flags, struct.pack(">Ii", len(samples), offset) + rows)
        return _box(b"moof", mfhd + _box(b"traf", tfhd + tfdt + trun))

    return moof(len(moof(0)) + 8) + _box(b"mdat", b"".join(sample.data for sample in samples))


def _box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", 8 + len(body)) + kind + body


def _full_box(kind: bytes, version: int, flags: int, body: bytes) -> bytes:
    return _box(kind, struct.pack(">I", version << 24 | flags) + body)


def _boxes(data: bytes, start: int = 0, end: int | None = None) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """The boxes in a stretch of `data`: (type, where the body begins and ends)."""
    end = len(data) if end is None else end
    while start < end:
        (size,) = struct.unpack_from(">I", data, start)
        yield data[start + 4 : start + 8], (start + 8, start + size)
        start += size
