"""Reads from an init segment which codec it announces. Knows boxes; decodes nothing."""

from __future__ import annotations


def codec_of(init: bytes) -> str | None:
    """The RFC 6381 name of the codec in an init segment, read from its configuration box; None if it is not ours."""
    for kind in (b"avcC", b"vpcC", b"av1C"):
        at = init.find(kind)
        if at < 0:
            continue
        body = init[at + 4 :]
        if kind == b"avcC":
            return f"avc1.{body[1:4].hex()}"
        if kind == b"vpcC":
            profile, level, depth = body[4], body[5], body[6] >> 4
            return f"vp09.{profile:02d}.{level:02d}.{depth:02d}"
        tier = "H" if body[2] & 0x80 else "M"
        depth = 12 if body[2] & 0x20 else 10 if body[2] & 0x40 else 8
        return f"av01.{body[1] >> 5}.{body[1] & 31:02d}{tier}.{depth:02d}"
    return None


def mime_type_of(init: bytes) -> str:
    """The media type of a video with this init segment."""
    codec = codec_of(init)
    return "video/mp4" if codec is None else f'video/mp4; codecs="{codec}"'
