"""How many frames there are in MP4 bytes, whole or as they come.

Knows boxes and sample counts; decodes nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

_CONTAINERS = frozenset({b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf"})
_LONG = b"\0\0\0\1"
"""In place of a size: 64 bits of it follow the kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fragment:
    """A `moof` with its `mdat`, complete."""

    num_frames: int
    num_bytes: int


@dataclass(slots=True)
class FragmentReader:
    """Finds the fragments of a stream as its bytes come."""

    _pending: bytearray = field(default_factory=bytearray)
    _header_bytes: int = 0
    """Of the boxes since the last fragment, which belong to the next."""
    _num_frames: int = 0
    _has_begun: bool = False

    @property
    def is_complete(self) -> bool:
        """Whether a stream that ended here would end between two fragments."""
        return not self._pending and self._header_bytes == 0

    def feed(self, data: bytes) -> list[Fragment]:
        """The fragments that `data` completes.

        Raises: ValueError when the stream does not begin as MP4 does, or goes on as MP4 cannot.
        """
        self._pending += data
        if not self._has_begun and len(self._pending) >= 8:
            if bytes(self._pending[4:8]) not in (b"ftyp", b"styp"):
                raise ValueError("the stream does not begin as MP4 does")
            self._has_begun = True
        found = []
        while (size := _size(self._pending)) is not None and len(self._pending) >= size:
            kind = bytes(self._pending[4:8])
            self._header_bytes += size
            if kind == b"moof":
                self._num_frames += frames_in_fragments(bytes(self._pending[:size]))
            elif kind == b"mdat":
                found.append(Fragment(num_frames=self._num_frames, num_bytes=self._header_bytes))
                self._header_bytes, self._num_frames = 0, 0
            del self._pending[:size]
        return found


def frames_in_fragments(data: bytes) -> int:
    """Samples of all fragments (`trun`) in whole boxes; 0 where there are none.

    Raises: ValueError when `data` is not a row of MP4 boxes.
    """
    return sum(struct.unpack_from(">I", body, 4)[0] for kind, body in _walk(memoryview(data)) if kind == b"trun")


def frames_in_file(data: bytes) -> int | None:
    """Frames of a finished MP4, fragmented or not; None when this is no MP4, or has no video track."""
    try:
        in_fragments = frames_in_fragments(data)
        return in_fragments or _frames_in_tables(memoryview(data))
    except (ValueError, struct.error):
        return None


def _frames_in_tables(data: memoryview) -> int | None:
    """`stsz` of the first track whose `hdlr` is `vide`; sound tracks have tables too."""
    is_video = False
    for kind, body in _walk(data):
        if kind == b"hdlr":
            is_video = bytes(body[8:12]) == b"vide"
        elif kind == b"stsz" and is_video:
            count: int = struct.unpack_from(">I", body, 8)[0]
            return count
    return None


def _walk(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Kind and body of each box, those inside of containers too, in file order."""
    while len(data):
        size = _size(data)
        if size is None or size > len(data):
            raise ValueError("cut MP4 box")
        kind = bytes(data[4:8])
        body = data[16 if bytes(data[:4]) == _LONG else 8 : size]
        yield kind, body
        if kind in _CONTAINERS:
            yield from _walk(body)
        data = data[size:]


def _size(data: bytearray | memoryview) -> int | None:
    """Of the first box, its header included; None when its header is not there yet."""
    if len(data) < 8:
        return None
    size: int = struct.unpack_from(">I", data)[0]
    if size == 1:
        if len(data) < 16:
            return None
        size = struct.unpack_from(">Q", data, 8)[0]
    if size < 8 or not all(32 <= letter < 127 or letter == 0xA9 for letter in data[4:8]):
        raise ValueError("not an MP4 box")
    return size
