"""Decodes images and videos from callers into RGB frames of the output size.

Knows file types, their limits and how frames are fitted. Takes bytes and returns bytes: no files, no network, no state,
so that it can run in a process of its own. The input is hostile until shown otherwise: the type comes from its first
bytes, sizes are checked before anything is decoded, and whatever a decoder raises becomes an `InvalidRequestError` with
code `media_invalid`. An image's EXIF rotation is applied, as diffusers' `load_image` does; a video's is not.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import av
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from helios_serve.errors import InvalidRequestError
from helios_serve.types import FRAMES_PER_CHUNK, Frames, ImageFit

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

_VIDEO_CODECS = frozenset({"h264", "hevc", "mpeg4", "vp8", "vp9", "av1"})
_DEMUXER_OPTIONS = {"format_whitelist": "mov,mp4,matroska,webm", "protocol_whitelist": "file"}
_NPY_MAGIC = b"\x93NUMPY"
_EBML_MAGIC = b"\x1a\x45\xdf\xa3"
_WEBM_SEGMENT = b"\x18\x53\x80\x67"


def decode_image(
    data: bytes, width: int, height: int, fit: ImageFit, *, param: str = "image", allow_npy: bool = False
) -> Frames:
    """A PNG, JPEG or WebP image (the first picture of an animation) as one frame of `width` x `height`.

    Args:
        data: the file.
        fit: "crop" scales to cover and cuts the centre out, "stretch" changes the aspect ratio; Lanczos either way.
        param: the caller's name of the field, for messages.
        allow_npy: also take a NumPy file, uint8 [1, H, W, 3].

    Raises:
        InvalidRequestError: `media_invalid`; not such an image, damaged, or over a limit of this module.
    """
    target = _Target(width=width, height=height, fit=fit)
    if allow_npy and data.startswith(_NPY_MAGIC):
        frames = load_npy(data, param=param)
        if len(frames) != 1:
            raise _invalid(f"{len(frames)} frames, exactly 1 is needed", param)
        return target.frames(Image.fromarray(frame) for frame in frames)
    _check_bytes(data, MAX_IMAGE_BYTES, param)
    kind = _image_type(data)
    if kind is None:
        raise _invalid("not a PNG, JPEG or WebP image", param)
    with _untrusted(f"{kind} image", param), Image.open(io.BytesIO(data), formats=(kind,)) as image:
        if max(image.size) > MAX_IMAGE_SIDE or image.width * image.height > MAX_IMAGE_PIXELS:
            raise _image_too_large(f"{image.width}x{image.height} pixels", param)
        image.info.pop("transparency", None)  # alpha is dropped; Pillow warns when a palette carries it
        return target.frames([ImageOps.exif_transpose(image).convert("RGB")])


def decode_video(
    data: bytes, width: int, height: int, fit: ImageFit, *, param: str = "video", allow_npy: bool = False
) -> Frames:
    """An MP4 or WebM video as frames of `width` x `height`, every frame once, without regard to its frame rate.

    Args:
        data: the file.
        fit: as in `decode_image`.
        param: the caller's name of the field, for messages.
        allow_npy: also take a NumPy file, uint8 [T, H, W, 3].

    Raises:
        InvalidRequestError: `media_invalid`; not such a video, damaged, truncated, shorter than 33 frames, or over a
            limit of this module.
    """
    target = _Target(width=width, height=height, fit=fit)
    if allow_npy and data.startswith(_NPY_MAGIC):
        frames = target.frames(Image.fromarray(frame) for frame in load_npy(data, param=param))
    else:
        _check_bytes(data, MAX_VIDEO_BYTES, param)
        with _untrusted("video", param):
            frames = _decode_container(data, target, param)
    if frames.num_frames < MIN_VIDEO_FRAMES:
        raise _invalid(f"{frames.num_frames} frames, at least {MIN_VIDEO_FRAMES} are needed", param)
    return frames


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
    """The two decoders as one object, for those who are handed one; `allow_npy` is for the caller's own files."""

    allow_npy: bool = False

    def decode_image(self, data: bytes, width: int, height: int, fit: ImageFit) -> Frames:
        return decode_image(data, width, height, fit, allow_npy=self.allow_npy)

    def decode_video(self, data: bytes, width: int, height: int, fit: ImageFit) -> Frames:
        return decode_video(data, width, height, fit, allow_npy=self.allow_npy)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    """The frames to make: size and how to get there."""

    width: int
    height: int
    fit: ImageFit

    def frames(self, images: Iterable[Image.Image]) -> Frames:
        """RGB images of any size -> `Frames` of this one; holds one source image at a time."""
        pixels, num_frames = io.BytesIO(), 0
        for image in images:
            pixels.write(self._fitted(image).tobytes())
            num_frames += 1
        return Frames(data=pixels.getvalue(), num_frames=num_frames, height=self.height, width=self.width)

    def _fitted(self, image: Image.Image) -> Image.Image:
        size = (self.width, self.height)
        if self.fit == "stretch":  # an image of this size is left as it is by either
            return image.resize(size, Image.Resampling.LANCZOS)
        return ImageOps.fit(image, size, Image.Resampling.LANCZOS)


def _image_type(data: bytes) -> str | None:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    return "WEBP" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def _decode_container(data: bytes, target: _Target, param: str) -> Frames:
    if data[4:8] == b"ftyp":
        demuxer, is_whole = "mp4", _is_whole_mp4(data)
    elif data.startswith(_EBML_MAGIC) and b"\x42\x82\x84webm" in data[:64]:
        demuxer, is_whole = "webm", _is_whole_webm(data)
    else:
        raise _invalid("not an MP4 or WebM video", param)
    if not is_whole:
        raise _invalid("the file is truncated or damaged: it ends before its own length", param)
    with av.open(io.BytesIO(data), "r", format=demuxer, options=_DEMUXER_OPTIONS) as container:
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
        stream.codec_context.options = {"max_pixels": str(MAX_VIDEO_SIDES[0] * MAX_VIDEO_SIDES[1])}
        return target.frames(_pictures(container, stream, param))


def _pictures(container: av.container.InputContainer, stream: av.VideoStream, param: str) -> Iterator[Image.Image]:
    for index, frame in enumerate(container.decode(stream)):
        _check_num_frames(index + 1, param)
        _check_video_size(frame.width, frame.height, param)
        if frame.is_corrupt:
            raise _invalid(f"frame {index} is damaged", param)
        yield Image.fromarray(frame.reformat(format="rgb24", threads=1).to_ndarray())


def _is_whole_mp4(data: bytes) -> bool:
    """Whether the top-level boxes end where the data ends; a rest too short for a box is ignored."""
    offset = 0
    while offset + 8 <= len(data):
        size = int.from_bytes(data[offset : offset + 4], "big")
        if size == 0:  # the last box, to the end of the file
            return True
        if size == 1:
            size = int.from_bytes(data[offset + 8 : offset + 16], "big")
        if size < 8:
            return False
        offset += size
    return offset <= len(data)


def _is_whole_webm(data: bytes) -> bool:
    """Whether the segment that follows the header fits in the data; one of unknown length always does."""
    header_size, offset = _ebml_size(data, len(_EBML_MAGIC))
    offset += header_size
    if data[offset : offset + 4] != _WEBM_SEGMENT:
        return False
    first = data[offset + 4]
    size, start = _ebml_size(data, offset + 4)
    num_bits = 7 * (9 - first.bit_length())
    return size == (1 << num_bits) - 1 or start + size <= len(data)


def _ebml_size(data: bytes, offset: int) -> tuple[int, int]:
    """The variable-length number at `offset` and the offset behind it."""
    length = 9 - data[offset].bit_length()
    value = int.from_bytes(data[offset : offset + length], "big") & ((1 << 7 * length) - 1)
    return value, offset + length


def _check_bytes(data: bytes, limit: int, param: str) -> None:
    if not data:
        raise _invalid("the file is empty", param)
    if len(data) > limit:
        raise _invalid(f"{len(data)} bytes, at most {limit} ({limit >> 20} MiB) are allowed", param)


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
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _image_too_large("too many pixels", param) from error
    except Exception as error:  # on damaged input, decoders raise whatever they come across
        raise _invalid(f"this {what} is damaged and cannot be decoded", param) from error


def _image_too_large(given: str, param: str) -> InvalidRequestError:
    limit = f"at most {MAX_IMAGE_PIXELS // 10**6} megapixels and {MAX_IMAGE_SIDE} per side are allowed"
    return _invalid(f"{given}, {limit}", param)


def _invalid(message: str, param: str) -> InvalidRequestError:
    return InvalidRequestError(f"{param}: {message}", param=param, code="media_invalid")
