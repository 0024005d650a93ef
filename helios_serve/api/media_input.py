"""Fetches the picture or video that a request starts from. Knows `data:` URIs, uploads and limits; decodes nothing."""

from __future__ import annotations

import base64
import binascii
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
    """Turns the string that names a picture or video into its bytes."""

    def read(self, reference: str, param: str, max_bytes: int) -> bytes:
        """Raises InvalidRequestError with `param` when the reference is refused, unreadable or above `max_bytes`."""
        ...


class MediaDecoder(Protocol):
    """Decodes untrusted media to frames of the output's size; raises InvalidRequestError when it cannot."""

    def decode_image(self, data: bytes, width: int, height: int, fit: ImageFit) -> Frames:
        """One frame, `height` x `width`; `fit` is crop or stretch."""
        ...

    def decode_video(self, data: bytes, width: int, height: int, fit: ImageFit) -> Frames:
        """All frames of the first video stream, `height` x `width`; `fit` is crop or stretch."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Media:
    """Where media come from and what decodes them."""

    source: MediaSource
    decoder: MediaDecoder


class DataUriSource:
    """Accepts base64 `data:` URIs and nothing else: no address is ever fetched."""

    def read(self, reference: str, param: str, max_bytes: int) -> bytes:
        """The decoded bytes of `reference`.

        Raises:
            InvalidRequestError: `media_url_forbidden` for another scheme, `media_invalid` for bad base64 or too many
                bytes.
        """
        scheme, colon, rest = reference.partition(":")
        if not colon or not scheme.isalnum():
            raise InvalidRequestError(
                f"{param}: must be a data: URI, like data:image/png;base64,...", param=param, code="media_invalid"
            )
        if scheme.lower() != "data":
            raise InvalidRequestError(
                f"{param} {scheme[:20]}: addresses are not fetched by this server; send the bytes as a data: URI",
                param=param,
                code="media_url_forbidden",
            )
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


def check_media_bytes(num_bytes: int, max_bytes: int, param: str) -> None:
    """Raises InvalidRequestError when `num_bytes` is above `max_bytes`."""
    if num_bytes > max_bytes:
        raise InvalidRequestError(
            f"{param}: {num_bytes / 2**20:.1f} MiB, at most {max_bytes / 2**20:.0f} MiB are allowed",
            param=param,
            code="media_invalid",
        )


def load_image(named: NamedBody, params: SamplingParams, media: Media) -> Frames | None:
    """The image of the request as one uint8 frame of the output's size, or None."""
    reference = named.fields.input_reference
    if reference is None:
        return None
    param = named.name("input_reference")
    if reference.file_id is not None:
        raise _not_offered(f"{param}.file_id")
    if reference.image_url is None:
        raise InvalidRequestError(f"{param}: image_url is missing", param=param, code="missing_required_parameter")
    data = _bytes_of(reference.image_url, media.source, param, MAX_IMAGE_BYTES)
    try:
        return media.decoder.decode_image(data, params.width, params.height, params.image_fit)
    except InvalidRequestError as error:
        raise _about(error, param) from error


def load_video(named: NamedBody, params: SamplingParams, media: Media) -> Frames | None:
    """The video of the request as 33 to 1,452 uint8 frames of the output's size, or None."""
    reference = named.fields.video
    if reference is None:
        return None
    param = named.name("video")
    for key, value in (("file_id", reference.file_id), ("id", reference.id)):
        if value is not None:
            raise _not_offered(f"{param}.{key}")
    if reference.video_url is None:
        raise InvalidRequestError(f"{param}: video_url is missing", param=param, code="missing_required_parameter")
    data = _bytes_of(reference.video_url, media.source, param, MAX_VIDEO_BYTES)
    try:
        frames = media.decoder.decode_video(data, params.width, params.height, params.image_fit)
    except InvalidRequestError as error:
        raise _about(error, param) from error
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


def _bytes_of(reference: str | UploadedMedia, source: MediaSource, param: str, max_bytes: int) -> bytes:
    if isinstance(reference, str):
        return source.read(reference, param, max_bytes)
    check_media_bytes(len(reference.data), max_bytes, param)
    if not reference.data:
        raise InvalidRequestError(f"{param}: the file is empty", param=param, code="media_invalid")
    return reference.data


def _not_offered(name: str) -> InvalidRequestError:
    message = f"{name}: stored files are not offered by this server; send a data: URI"
    return InvalidRequestError(message, param=name, code="unsupported_parameter")


def _about(error: InvalidRequestError, param: str) -> InvalidRequestError:
    """A decoder's complaint under the name that the client used for the field."""
    message = error.message if error.message.startswith(f"{param}:") else f"{param}: {error.message}"
    return InvalidRequestError(message, param=param, code="media_invalid")
