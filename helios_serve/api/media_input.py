"""Fetches the picture or video that a request starts from, in whichever way the request names it.

Knows the forms of a reference, `data:` URIs, uploads and limits. Where files, finished videos and addresses are read is
plugged in; a source that is not plugged in is refused. Decodes nothing.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from helios_serve.api.names import NamedBody
from helios_serve.api.schemas import UploadedMedia
from helios_serve.errors import InvalidRequestError
from helios_serve.types import FRAMES_PER_CHUNK, Frames, ImageFit, SamplingParams

MAX_IMAGE_BYTES = 20 * 2**20
MAX_VIDEO_BYTES = 50 * 2**20
MAX_VIDEO_FRAMES = 1452


class MediaSource(Protocol):
    """Turns what names a picture or video into its bytes: a text, the id of a file, or the id of a video."""

    def read(self, reference: str, param: str, max_bytes: int) -> bytes:
        """Blocks. Raises HeliosError with `param` when `reference` is refused, unknown, unreadable or too large."""
        ...


class MediaDecoder(Protocol):
    """Decodes untrusted media to frames of the output's size; raises InvalidRequestError when it cannot."""

    def decode_image(self, data: bytes, width: int, height: int, fit: ImageFit) -> Frames:
        """One frame, `height` x `width`; `fit` is crop or stretch."""
        ...

    def decode_video(self, data: bytes, width: int, height: int, fit: ImageFit) -> Frames:
        """All frames of the first video stream, `height` x `width`; `fit` is crop or stretch."""
        ...

    def image_size(self, data: bytes) -> tuple[int, int]:
        """(width, height) of an image as it is shown."""
        ...

    def video_look(self, data: bytes) -> tuple[int, int, float]:
        """(width, height, frames per second) of the first video stream; 0 where the rate is not known."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Media:
    """Where media come from and what decodes them.

    source: reads texts, `data:` URIs and addresses. files: reads files by id. videos: reads finished videos by id, as
    MP4. Both read only what belongs to the caller; None is for a server that keeps none.
    """

    source: MediaSource
    decoder: MediaDecoder
    files: MediaSource | None = None
    videos: MediaSource | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DataUriSource:
    """Accepts base64 `data:` URIs, and addresses if there is something that fetches them.

    urls: fetches https addresses; None fetches none.
    """

    urls: MediaSource | None = None

    def read(self, reference: str, param: str, max_bytes: int) -> bytes:
        """The decoded bytes of `reference`.

        Raises:
            InvalidRequestError: `media_url_forbidden` for another scheme, `media_invalid` for bad base64 or too many
                bytes, and what `urls` raises.
        """
        scheme, colon, rest = reference.partition(":")
        if not colon or not scheme.isalnum():
            raise InvalidRequestError(
                f"{param}: must be a data: URI, like data:image/png;base64,...", param=param, code="media_invalid"
            )
        if scheme.lower() == "data":
            return _decoded(rest, param, max_bytes)
        if self.urls is not None:
            return self.urls.read(reference, param, max_bytes)
        raise InvalidRequestError(
            f"{param} {scheme[:20]}: addresses are not fetched by this server, its media_url_hosts is empty; send the "
            "bytes as a data: URI",
            param=param,
            code="media_url_forbidden",
        )


def check_media_bytes(num_bytes: int, max_bytes: int, param: str) -> None:
    """Raises InvalidRequestError when `num_bytes` is above `max_bytes`."""
    if num_bytes > max_bytes:
        raise InvalidRequestError(
            f"{param}: {num_bytes / 2**20:.1f} MiB, at most {max_bytes / 2**20:.0f} MiB are allowed",
            param=param,
            code="media_invalid",
        )


def read_image(named: NamedBody, media: Media) -> bytes | None:
    """The file of the request's image, not looked into, or None.

    Raises:
        InvalidRequestError: named in no way or in two, or too large; and whatever the source raises.
    """
    reference = named.fields.input_reference
    if reference is None:
        return None
    param = named.name("input_reference")
    sources = {
        "image_url": (reference.image_url, media.source),
        "file_id": (reference.file_id, media.files),
    }
    return _read(_only_one(sources, param), param, MAX_IMAGE_BYTES)


def image_size(data: bytes, named: NamedBody, media: Media) -> tuple[int, int]:
    """(width, height) of the image that `read_image` gave, as it is shown.

    Raises InvalidRequestError, `media_invalid`.
    """
    with _about(named.name("input_reference")):
        return media.decoder.image_size(data)


def load_image(named: NamedBody, params: SamplingParams, media: Media, data: bytes | None = None) -> Frames | None:
    """The image of the request as one uint8 frame of the output's size, or None.

    Args:
        data: what `read_image` gave, if it has been called, so that nothing is read twice.
    """
    data = read_image(named, media) if data is None else data
    if data is None:
        return None
    with _about(named.name("input_reference")):
        return media.decoder.decode_image(data, params.width, params.height, params.image_fit)


def read_video(named: NamedBody, media: Media) -> bytes | None:
    """The file of the request's video, not looked into, or None.

    Raises:
        InvalidRequestError: named in no way or in two, or too large; and whatever the source raises.
    """
    reference = named.fields.video
    if reference is None:
        return None
    param = named.name("video")
    sources = {
        "video_url": (reference.video_url, media.source),
        "file_id": (reference.file_id, media.files),
        "id": (reference.id, media.videos),
    }
    return _read(_only_one(sources, param), param, MAX_VIDEO_BYTES)


def video_look(data: bytes, named: NamedBody, media: Media) -> tuple[int, int, float]:
    """(width, height, frames per second) of the video that `read_video` gave; 0 where the rate is not known.

    Raises InvalidRequestError, `media_invalid`.
    """
    with _about(named.name("video")):
        return media.decoder.video_look(data)


def load_video(named: NamedBody, params: SamplingParams, media: Media, data: bytes | None = None) -> Frames | None:
    """The video of the request as 33 to 1,452 uint8 frames of the output's size, or None.

    Args:
        data: what `read_video` gave, if it has been called, so that nothing is read twice.
    """
    data = read_video(named, media) if data is None else data
    if data is None:
        return None
    param = named.name("video")
    with _about(param):
        frames = media.decoder.decode_video(data, params.width, params.height, params.image_fit)
    if frames.num_frames < FRAMES_PER_CHUNK:
        raise InvalidRequestError(
            f"{param}: {frames.num_frames} frames, at least {FRAMES_PER_CHUNK} are needed",
            param=param,
            code="media_invalid",
        )
    if frames.num_frames > MAX_VIDEO_FRAMES:
        raise InvalidRequestError(
            f"{param}: {frames.num_frames} frames, at most {MAX_VIDEO_FRAMES} are allowed",
            param=param,
            code="media_invalid",
        )
    return frames


@dataclass(frozen=True, slots=True, kw_only=True)
class _Named:
    """The one key of a reference that is set: its name, its value and what reads it."""

    key: str
    value: str | UploadedMedia
    source: MediaSource | None


def _only_one(sources: Mapping[str, tuple[str | UploadedMedia | None, MediaSource | None]], param: str) -> _Named:
    """The key that is set; the first one is the one to recommend."""
    given = [
        _Named(key=key, value=value, source=source) for key, (value, source) in sources.items() if value is not None
    ]
    if not given:
        message = f"{param}: {next(iter(sources))} is missing"
        raise InvalidRequestError(message, param=param, code="missing_required_parameter")
    if len(given) > 1:
        names = " and ".join(named.key for named in given)
        raise InvalidRequestError(f"{param}: {names}; give one of them", param=param, code="conflicting_parameters")
    return given[0]


def _read(named: _Named, param: str, max_bytes: int) -> bytes:
    """The bytes; what a source gave is measured again, for sources are others' code."""
    if isinstance(named.value, UploadedMedia):
        data = named.value.data
    else:
        name = param if named.key.endswith("_url") else f"{param}.{named.key}"
        if named.source is None:
            raise _not_offered(name)
        data = named.source.read(named.value, name, max_bytes)
    check_media_bytes(len(data), max_bytes, param)
    if not data:
        raise InvalidRequestError(f"{param}: the file is empty", param=param, code="media_invalid")
    return data


def _decoded(rest: str, param: str, max_bytes: int) -> bytes:
    """The bytes of a `data:` URI without its scheme."""
    header, comma, payload = rest.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise InvalidRequestError(
            f"{param}: the data: URI must be base64, like data:image/png;base64,...",
            param=param,
            code="media_invalid",
        )
    check_media_bytes(len(payload) * 3 // 4, max_bytes, param)
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequestError(
            f"{param}: the data: URI is not valid base64 ({error})", param=param, code="media_invalid"
        ) from None


def _not_offered(name: str) -> InvalidRequestError:
    message = f"{name}: stored files are not offered by this server; send a data: URI"
    return InvalidRequestError(message, param=name, code="unsupported_parameter")


@contextmanager
def _about(param: str) -> Iterator[None]:
    """Puts a decoder's complaint under the name that the client used for the field."""
    try:
        yield
    except InvalidRequestError as error:
        complaint = error.message.removeprefix(f"{error.param}: ")
        raise InvalidRequestError(f"{param}: {complaint}", param=param, code="media_invalid") from error
