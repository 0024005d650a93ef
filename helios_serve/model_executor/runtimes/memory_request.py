"""Reads a request whose fields and media another runtime has already taken apart.

Fields go through the API's own parser, so that each means what it means over HTTP. Knows pictures in memory; knows no
runtime.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from helios_serve.api.convert import Limits, parse_named
from helios_serve.api.media_input import Media
from helios_serve.api.names import read_body
from helios_serve.errors import InvalidRequestError
from helios_serve.types import ModelInfo, VideoRequest
from helios_serve.workers.media import Decoder

Picture = Image.Image | npt.NDArray[np.uint8]
"""A PIL image, or uint8 RGB [H, W, 3]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """What a video starts from: a picture, the frames of a video, or nothing."""

    image: Picture | None = None
    video: Sequence[Picture] | npt.NDArray[np.uint8] | None = None


def read_request(fields: Mapping[str, object], pictures: Pictures, model: ModelInfo) -> VideoRequest:
    """Validates fields of `POST /v1/videos/generations` and completes them for `model`.

    Raises: InvalidRequestError with the field at fault.
    """
    body = dict(fields)
    source = _OnePicture(data=b"" if pictures.image is None else _png(pictures.image))
    if pictures.image is not None:
        body["image"] = "in memory"
    video = None
    if pictures.video is not None:
        body["video"] = "in memory"
        video = _npy(pictures.video)
    media = Media(source=source, decoder=Decoder(allow_npy=True))
    return parse_named(read_body(body), model, media, Limits(), video=video).request


@dataclass(frozen=True, slots=True, kw_only=True)
class _OnePicture:
    """A media source that has one file, whatever it is called."""

    data: bytes

    def read(self, reference: str, param: str, max_bytes: int) -> bytes:
        return self.data


def _png(picture: Picture) -> bytes:
    file = io.BytesIO()
    Image.fromarray(_pixels(picture, "image")).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _npy(frames: Sequence[Picture] | npt.NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    rows = [_pixels(frame, "video") for frame in frames]
    if len({row.shape for row in rows}) != 1:
        raise InvalidRequestError("video: its frames must be at least one, all of one size", param="video")
    np.save(file, np.stack(rows))
    return file.getvalue()


def _pixels(picture: Any, param: str) -> npt.NDArray[np.uint8]:
    """uint8 RGB [H, W, 3].

    Raises: InvalidRequestError for whatever is no picture.
    """
    if isinstance(picture, Image.Image):
        return np.asarray(picture.convert("RGB"))
    is_rgb = isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.shape[2:] == (3,)
    if not is_rgb:
        raise InvalidRequestError(
            f"{param}: {type(picture).__name__} is no picture; give PIL images or uint8 arrays [H, W, 3]", param=param
        )
    pixels: npt.NDArray[np.uint8] = picture
    return pixels
