"""Reads a message in protobuf's binary form; refuses what is none, and what would be one of millions of parts.

Parsing takes up to thirty times the memory of the bytes and holds the event loop, so larger messages are looked over
first: they may be large by texts and media, not by the number of their fields. Knows the wire format and descriptors.
"""

from __future__ import annotations

from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

from helios_serve.errors import BodyTooLargeError, InvalidRequestError

MAX_PLAIN_BYTES = 1 << 20
"""Of a message that holds no media."""

SMALL_BYTES = 64 << 10
"""Of a message that is not looked over."""

MAX_FIELDS = 20_000
"""Of a message that is larger than that."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_VARINT_BYTES = 10

M = TypeVar("M", bound=Message)
AnyDescriptor = Any
"""A Descriptor of whichever implementation protobuf runs on."""


def parse_message(kind: type[M], raw: bytes, *, may_hold_media: bool = False) -> M:
    """The message.

    Raises: InvalidRequestError `malformed_body`; BodyTooLargeError.
    """
    name = kind.DESCRIPTOR.full_name
    if len(raw) > MAX_PLAIN_BYTES and not may_hold_media:
        raise BodyTooLargeError(f"message: {len(raw)} bytes; at most {MAX_PLAIN_BYTES} for a {name}")
    if len(raw) > SMALL_BYTES and _has_more_fields(raw, kind.DESCRIPTOR, MAX_FIELDS):
        raise BodyTooLargeError(f"message: more than {MAX_FIELDS} fields; a {name} of this size may have no more")
    try:
        return kind.FromString(raw)
    except (DecodeError, RecursionError):
        raise _malformed(name) from None


def _has_more_fields(raw: bytes, descriptor: AnyDescriptor, limit: int) -> bool:
    """Whether there are more fields than `limit`, those of the messages in it included."""
    count = 0
    waiting: list[tuple[int, int, AnyDescriptor]] = [(0, len(raw), descriptor)]
    while waiting:
        at, end, kind = waiting.pop()
        while at < end:
            count += 1
            if count > limit:
                return True
            tag, at = _varint(raw, at, kind)
            number, wire = tag >> 3, tag & 7
            if wire == _VARINT:
                _, at = _varint(raw, at, kind)
            elif wire == _BYTES:
                size, at = _varint(raw, at, kind)
                field = kind.fields_by_number.get(number)
                if field is not None and field.message_type is not None:
                    waiting.append((at, min(end, at + size), field.message_type))
                elif field is not None and field.is_repeated and field.cpp_type != field.CPPTYPE_STRING:
                    count += size  # numbers in a row, a byte or more each
                at += size
            elif wire in (_FIXED64, _FIXED32):
                at += 8 if wire == _FIXED64 else 4
            else:
                raise _malformed(kind.full_name)
    return count > limit


def _varint(raw: bytes, at: int, kind: AnyDescriptor) -> tuple[int, int]:
    """A number at `at`, and where it ends."""
    value = 0
    for shift, byte in enumerate(raw[at : at + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << (7 * shift)
        if byte < 0x80:
            return value, at + shift + 1
    raise _malformed(kind.full_name)


def _malformed(name: str) -> InvalidRequestError:
    return InvalidRequestError(f"message: not a {name} in protobuf's binary form", code="malformed_body")
