"""Pictures taken from our own segments: thumbnail, last frame, spritesheet. What callers send is read by `media`."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Literal

import av
from PIL import Image

THUMBNAIL_WIDTH = 320
TILE_WIDTH = 160
TILE_COLUMNS = 10
MAX_TILES = 100


def thumbnail(init: bytes, media: bytes) -> bytes:
    """WebP of the first frame of a segment, 320 pixels wide."""
    return _encode(_scaled(next(_frames(init, [media])), THUMBNAIL_WIDTH), "WEBP", quality=80)


def last_frame(init: bytes, media: bytes) -> bytes:
    """PNG of the last frame of a segment, in full size: to begin another video from."""
    *_, last = _frames(init, [media])
    return _encode(last, "PNG")


def spritesheet(init: bytes, media: Sequence[bytes], frames_per_tile: int) -> bytes:
    """JPEG with a tile for every `frames_per_tile`-th frame, ten in a row, at most 100."""
    tiles = []
    for index, picture in enumerate(_frames(init, media)):
        if index % frames_per_tile == 0:
            tiles.append(_scaled(picture, TILE_WIDTH))
        if len(tiles) == MAX_TILES:
            break
    width, height = tiles[0].size
    columns = min(TILE_COLUMNS, len(tiles))
    sheet = Image.new("RGB", (columns * width, -(-len(tiles) // TILE_COLUMNS) * height))
    for index, tile in enumerate(tiles):
        sheet.paste(tile, (index % TILE_COLUMNS * width, index // TILE_COLUMNS * height))
    return _encode(sheet, "JPEG", quality=80)


def raw_frames(init: bytes, media: bytes, pixels: Literal["rgb24", "yuv420p"]) -> bytes:
    """The pictures of a segment, row by row: [F, H, W, 3], or [F, H * 3/2, W] with the planes of chroma last."""
    with av.open(io.BytesIO(init + media), "r", format="mp4") as container:
        return b"".join(frame.to_ndarray(format=pixels).tobytes() for frame in container.decode(video=0))


def _frames(init: bytes, media: Sequence[bytes]) -> Iterator[Image.Image]:
    with av.open(io.BytesIO(init + b"".join(media)), "r", format="mp4") as container:
        for frame in container.decode(video=0):
            yield Image.fromarray(frame.to_ndarray(format="rgb24"))


def _scaled(picture: Image.Image, width: int) -> Image.Image:
    return picture.resize((width, max(1, round(picture.height * width / picture.width))), Image.Resampling.LANCZOS)


def _encode(picture: Image.Image, kind: str, **options: int) -> bytes:
    output = io.BytesIO()
    picture.save(output, kind, **options)
    return output.getvalue()
