"""The boxes of an MP4 as ISO/IEC 14496-12 writes them, and its decoded frames. Knows nothing of what made the file."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import av

_CONTAINERS = frozenset({"moov", "trak", "mdia", "moof", "traf"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """One box; `body` is what follows its size and type."""

    kind: str
    body: bytes


def boxes(data: bytes) -> list[Box]:
    """The boxes at the top of `data`, which holds nothing else. Raises AssertionError where one does not fit."""
    found, at = [], 0
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        start = at + 8
        if size == 1:
            (size,), start = struct.unpack(">Q", data[at + 8 : at + 16]), at + 16
        assert size >= start - at, f"box {kind!r} of {size} bytes"
        assert at + size <= len(data), f"box {kind!r} ends behind the data"
        found.append(Box(kind=kind.decode("ascii"), body=data[start : at + size]))
        at += size
    return found


def all_of(kind: str, data: bytes) -> list[Box]:
    """Every box of a kind, at any depth, in order."""
    return [box for box in _walk(data) if box.kind == kind]


def sequence_numbers(data: bytes) -> list[int]:
    """Of each `moof`, by its `mfhd`."""
    return [struct.unpack(">I", box.body[4:8])[0] for box in all_of("mfhd", data)]


def decode_times(data: bytes) -> list[int]:
    """Of the first sample of each fragment, by `tfdt`, in units of the timescale."""
    return [
        struct.unpack(">Q", box.body[4:12])[0] if box.body[0] == 1 else struct.unpack(">I", box.body[4:8])[0]
        for box in all_of("tfdt", data)
    ]


def timescale(data: bytes) -> int:
    """Units a second of the only track, by `mdhd`."""
    (box,) = all_of("mdhd", data)
    at = 20 if box.body[0] == 1 else 12
    return int(struct.unpack(">I", box.body[at : at + 4])[0])


def times_s(data: bytes) -> list[float]:
    """When each decoded frame is shown, in seconds."""
    with av.open(io.BytesIO(data), "r") as container:
        shown = [frame.time for frame in container.decode(video=0)]
    return [time for time in shown if time is not None]


def _walk(data: bytes) -> Iterator[Box]:
    for box in boxes(data):
        yield box
        if box.kind in _CONTAINERS:
            yield from _walk(box.body)
