"""Decodes images and videos from callers into RGB frames of the output size.

Knows the limits of media and how frames are fitted. Takes and makes bytes: no files, no network, no state, so that it
can run in a process of its own (`media_child`). The input is hostile until shown otherwise: the type comes from its
first bytes, sizes are checked before anything is decoded, and whatever a decoder raises becomes an
`InvalidRequestError` with code `media_invalid`. An image's EXIF rotation is applied, as diffusers' `load_image` does; a
video's is not.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import av
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from helios_serve.errors import InvalidRequestError
from helios_serve.types import FRAMES_PER_CHUNK, Frames, ImageFit
from helios_serve.workers.media_headers import image_type, is_whole_mp4, is_whole_webm, num_claimed_samples, webp_size

MAX_IMAGE_BYTES = 20 * 2**20
MAX_IMAGE_PIXELS = 40_000_000
MAX_IMAGE_SIDE = 16_384
MAX_VIDEO_BYTES = 50 * 2**20
MAX_VIDEO_SIDES = (4096, 2304)
"""Longer and shorter side in pixels."""
MAX_VIDEO_FRAMES = 1_452
MAX_VIDEO_SECONDS = 91
"""What the most frames last at 16 frames per second."""
MIN_VIDEO_FRAMES = FRAMES_PER_CHUNK

MAX_CLAIMED_SAMPLES = 5_000_000
"""Of all tracks of an MP4: above `MAX_VIDEO_SECONDS` of PCM sound; a demuxer takes 40 bytes for each."""

_VIDEO_CODECS = frozenset({"h264", "hevc", "mpeg4", "vp8", "vp9", "av1"})
_OPTIONS = {
    "format_whitelist": "mov,mp4,matroska,webm",
    "protocol_whitelist": "file",
    "max_pixels": str(MAX_VIDEO_SIDES[0] * MAX_VIDEO_SIDES[1]),
    "threads": "1",
}
"""For the demuxer and for the decoders with which it looks at the first frames."""
_NPY_MAGIC = b"\x93NUMPY"
_EBML_MAGIC = b"\x1a\x45\xdf\xa3"
_EXIF_ORIENTATION = 0x0112
_TURNED_SIDEWAYS = frozenset({5, 6, 7, 8})


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The frames to make: size and how to get there.

    fit: "crop" scales to cover and cuts the centre out, "stretch" changes the aspect ratio; Lanczos either way.
    """

    width: int
    height: int
    fit: ImageFit

    @property
    def bytes_per_frame(self) -> int:
        return self.width * self.height * 3

    def write(self, images: Iterable[Image.Image], output: BinaryIO) -> int:
        """RGB images of any size -> frames of this one behind each other; holds one source image at a time.

        Returns the number of frames.
        """
        num_frames = 0
        for image in images:
            output.write(self._fitted(image).tobytes())
            num_frames += 1
        return num_frames

    def _fitted(self, image: Image.Image) -> Image.Image:
        size = (self.width, self.height)
        if self.fit == "stretch":  # an image of this size is left as it is by either
            return image.resize(size, Image.Resampling.LANCZOS)
        return ImageOps.fit(image, size, Image.Resampling.LANCZOS)


def write_image(data: bytes, target: Target, output: BinaryIO, *, param: str = "image", allow_npy: bool = False) -> int:
    """A PNG, JPEG or WebP image (the first picture of an animation) as one frame of `target`, written to `output`.

    Args:
        data: the file.
        output: takes uint8 RGB, [1, height, width, 3].
        param: the caller's name of the field, for messages.
        allow_npy: also take a NumPy file, uint8 [1, H, W, 3].

    Returns the number of frames, 1.

    Raises:
        InvalidRequestError: `media_invalid`; not such an image, damaged, or over a limit of this module.
    """
    if allow_npy and data.startswith(_NPY_MAGIC):
        frames = load_npy(data, param=param)
        if len(frames) != 1:
            raise _invalid(f"{len(frames)} frames, exactly 1 is needed", param)
        return target.write((Image.fromarray(frame) for frame in frames), output)
    with _opened_image(data, param) as image:
        image.info.pop("transparency", None)  # alpha is dropped; Pillow warns when a palette carries it
        ImageOps.exif_transpose(image, in_place=True)
        return target.write([image if image.mode == "RGB" else image.convert("RGB")], output)


def write_video(data: bytes, target: Target, output: BinaryIO, *, param: str = "video", allow_npy: bool = False) -> int:
    """An MP4 or WebM video as frames of `target`, every frame once, without regard to its frame rate.

    Args:
        data: the file.
        output: takes uint8 RGB, [T, height, width, 3].
        param: the caller's name of the field, for messages.
        allow_npy: also take a NumPy file, uint8 [T, H, W, 3].

    Returns the number of frames, T.

    Raises:
        InvalidRequestError: `media_invalid`; not such a video, damaged, truncated, shorter than 33 frames, or over a
            limit of this module.
    """
    if allow_npy and data.startswith(_NPY_MAGIC):
        num_frames = target.write((Image.fromarray(frame) for frame in load_npy(data, param=param)), output)
    else:
        _check_bytes(data, MAX_VIDEO_BYTES, param)
        with _untrusted("video", param):
            num_frames = _write_container(data, target, output, param)
    if num_frames < MIN_VIDEO_FRAMES:
        raise _invalid(f"{num_frames} frames, at least {MIN_VIDEO_FRAMES} are needed", param)
    return num_frames


def image_size(data: bytes, *, param: str = "image") -> tuple[int, int]:
    """(width, height) of a PNG, JPEG or WebP image as it is shown, EXIF rotation applied; reads its headers only.

    Raises:
        InvalidRequestError: `media_invalid`; not such an image, damaged, or over a limit of this module.
    """
    with _opened_image(data, param) as image:
        is_turned = image.getexif().get(_EXIF_ORIENTATION) in _TURNED_SIDEWAYS
        return (image.height, image.width) if is_turned else image.size


def video_look(data: bytes, *, param: str = "video") -> tuple[int, int, float]:
    """(width, height, frames per second) of an MP4 or WebM video; reads its headers only. The rate is 0 where the file
    does not say.

    Raises:
        InvalidRequestError: `media_invalid`; not such a video, damaged, or over a limit of this module.
    """
    _check_bytes(data, MAX_VIDEO_BYTES, param)
    with _untrusted("video", param), _opened_video(data, param) as (_, stream):
        rate = stream.average_rate
        return stream.width, stream.height, 0.0 if rate is None else round(float(rate), 3)


def decode_image(
    data: bytes, width: int, height: int, fit: ImageFit, *, param: str = "image", allow_npy: bool = False
) -> Frames:
    """`write_image` into memory."""
    target, pixels = Target(width=width, height=height, fit=fit), io.BytesIO()
    num_frames = write_image(data, target, pixels, param=param, allow_npy=allow_npy)
    return Frames(data=pixels.getvalue(), num_frames=num_frames, height=height, width=width)


def decode_video(
    data: bytes, width: int, height: int, fit: ImageFit, *, param: str = "video", allow_npy: bool = False
) -> Frames:
    """`write_video` into memory."""
    target, pixels = Target(width=width, height=height, fit=fit), io.BytesIO()
    num_frames = write_video(data, target, pixels, param=param, allow_npy=allow_npy)
    return Frames(data=pixels.getvalue(), num_frames=num_frames, height=height, width=width)


def load_npy(data: bytes, *, param: str) -> npt.NDArray[np.uint8]:
    """The array of a NumPy file, uint8 [T, H, W, 3] with T from 1 to 1,452; never unpickles.

    Raises:
        InvalidRequestError: `media_invalid`; another type or shape, or a length that the header does not announce.
    """
    file = io.BytesIO(data)
    with _untrusted("NumPy file", param):
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        else:
            shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(file)
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
        raise _invalid(f"array of {dtype} {list(shape)}, uint8 [T, H, W, 3] is needed", param)
    _check_num_frames(shape[0], param)
    _check_video_size(shape[2], shape[1], param)
    num_bytes = shape[0] * shape[1] * shape[2] * 3
    if len(data) - file.tell() != num_bytes:
        raise _invalid(f"{len(data) - file.tell()} bytes of pixels, {num_bytes} were announced", param)
    flat = np.frombuffer(data, np.uint8, offset=file.tell())
    return flat.reshape(shape, order="F" if fortran_order else "C")


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """Decoding in this process as one object, for those who are handed one; `allow_npy`: for the caller's own files."""

    allow_npy: bool = False

    def decode_image(self, data: bytes, width: int, height: int, fit: ImageFit) -> Frames:
        return decode_image(data, width, height, fit, allow_npy=self.allow_npy)

    def decode_video(self, data: bytes, width: int, height: int, fit: ImageFit) -> Frames:
        return decode_video(data, width, height, fit, allow_npy=self.allow_npy)

    def video_look(self, data: bytes) -> tuple[int, int, float]:
        if self.allow_npy and data.startswith(_NPY_MAGIC):
            _, height, width, _ = load_npy(data, param="video").shape
            return width, height, 0.0
        return video_look(data)

    def image_size(self, data: bytes) -> tuple[int, int]:
        if self.allow_npy and data.startswith(_NPY_MAGIC):
            _, height, width, _ = load_npy(data, param="image").shape
            return width, height
        return image_size(data)


@contextmanager
def _opened_image(data: bytes, param: str) -> Iterator[Image.Image]:
    """The image with its header read and checked, no pixel decoded; errors inside are the image's fault."""
    _check_bytes(data, MAX_IMAGE_BYTES, param)
    kind = image_type(data)
    if kind is None:
        raise _invalid("not a PNG, JPEG or WebP image", param)
    with _untrusted(f"{kind} image", param):
        if kind == "WEBP":  # its decoder makes room for the whole picture when it opens the file
            _check_image_size(webp_size(data), param)
        with Image.open(io.BytesIO(data), formats=(kind,)) as image:
            _check_image_size(image.size, param)
            yield image


def _write_container(data: bytes, target: Target, output: BinaryIO, param: str) -> int:
    with _opened_video(data, param) as (container, stream):
        return target.write(_pictures(container, stream, param), output)


@contextmanager
def _opened_video(data: bytes, param: str) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The file and its first video track with its headers read and checked, no frame of the output decoded."""
    demuxer = _demuxer_of(data, param)
    with av.open(io.BytesIO(data), "r", format=demuxer, options=_OPTIONS) as container:
        if not container.streams.video:
            raise _invalid("the file has no video track", param)
        stream = container.streams.video[0]
        _check_video_size(stream.width, stream.height, param)
        _check_num_frames(stream.frames, param)
        if container.duration is not None and container.duration > MAX_VIDEO_SECONDS * av.time_base:
            seconds = container.duration / av.time_base
            raise _invalid(f"{seconds:.1f} seconds, at most {MAX_VIDEO_SECONDS} are allowed", param)
        if stream.codec.canonical_name not in _VIDEO_CODECS:
            allowed = ", ".join(sorted(_VIDEO_CODECS))
            raise _invalid(f"codec {stream.codec.canonical_name}; allowed are {allowed}", param)
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"max_pixels": _OPTIONS["max_pixels"]}
        yield container, stream


def _demuxer_of(data: bytes, param: str) -> str:
    """FFmpeg's name of the container, whose own claims are checked before FFmpeg sees them."""
    if data[4:8] == b"ftyp":
        demuxer, is_whole = "mp4", is_whole_mp4(data)
        num_samples = num_claimed_samples(data)
        if num_samples > MAX_CLAIMED_SAMPLES:
            raise _invalid(f"{num_samples} samples are claimed, at most {MAX_CLAIMED_SAMPLES} are allowed", param)
    elif data.startswith(_EBML_MAGIC) and b"\x42\x82\x84webm" in data[:64]:
        demuxer, is_whole = "webm", is_whole_webm(data)
    else:
        raise _invalid("not an MP4 or WebM video", param)
    if not is_whole:
        raise _invalid("the file is truncated or damaged: it ends before its own length", param)
    return demuxer


def _pictures(container: av.container.InputContainer, stream: av.VideoStream, param: str) -> Iterator[Image.Image]:
    for index, frame in enumerate(container.decode(stream)):
        _check_num_frames(index + 1, param)
        _check_video_size(frame.width, frame.height, param)
        if frame.is_corrupt:
            raise _invalid(f"frame {index} is damaged", param)
        yield Image.fromarray(frame.reformat(format="rgb24", threads=1).to_ndarray())


def _check_bytes(data: bytes, limit: int, param: str) -> None:
    if not data:
        raise _invalid("the file is empty", param)
    if len(data) > limit:
        raise _invalid(f"{len(data)} bytes, at most {limit} ({limit >> 20} MiB) are allowed", param)


def _check_image_size(size: tuple[int, int], param: str) -> None:
    width, height = size
    if max(size) > MAX_IMAGE_SIDE or width * height > MAX_IMAGE_PIXELS:
        raise _image_too_large(f"{width}x{height} pixels", param)


def _check_num_frames(num_frames: int, param: str) -> None:
    if num_frames > MAX_VIDEO_FRAMES:
        raise _invalid(f"{num_frames} or more frames, at most {MAX_VIDEO_FRAMES} are allowed", param)


def _check_video_size(width: int, height: int, param: str) -> None:
    longer, shorter = MAX_VIDEO_SIDES
    if max(width, height) > longer or min(width, height) > shorter:
        raise _invalid(f"{width}x{height} pixels, at most {longer}x{shorter} are allowed", param)


@contextmanager
def _untrusted(what: str, param: str) -> Iterator[None]:
    try:
        yield
    except InvalidRequestError:
        raise
    except MemoryError as error:
        raise _invalid(f"this {what} needs too much memory to be decoded", param) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _image_too_large("too many pixels", param) from error
    except Exception as error:  # on damaged input, decoders raise whatever they come across
        raise _invalid(f"this {what} is damaged and cannot be decoded", param) from error


def _image_too_large(given: str, param: str) -> InvalidRequestError:
    limit = f"at most {MAX_IMAGE_PIXELS // 10**6} megapixels and {MAX_IMAGE_SIDE} per side are allowed"
    return _invalid(f"{given}, {limit}", param)


def _invalid(message: str, param: str) -> InvalidRequestError:
    return InvalidRequestError(f"{param}: {message}", param=param, code="media_invalid")
