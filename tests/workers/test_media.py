"""Untrusted media: equal to diffusers' preprocessing where it is defined, and one clear error for everything else."""

import io
import struct
import warnings
import zlib
from fractions import Fraction
from functools import cache

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from helios_serve.errors import InvalidRequestError
from helios_serve.workers import media
from helios_serve.workers.media import decode_image, decode_video
from helios_serve.workers.segment import SegmentSpec, encode_segment, progressive_mp4

SIZES = [(64, 48), (97, 61), (40, 120), (128, 64)]


def _noise(num_frames, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (num_frames, height, width, 3), np.uint8)


def _image_bytes(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _array(frames):
    return np.frombuffer(frames.data, np.uint8).reshape(frames.num_frames, frames.height, frames.width, 3)


@cache
def _video(num_frames=33, width=64, height=48, container="mp4", codec="libx264"):
    """Grey frames, each brighter than the one before."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=24)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        for index in range(num_frames):
            picture = np.full((height, width, 3), 20 + index % 33 * 6, np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode(None))
    return file.getvalue()


def _fragmented(num_frames=33):
    yuv = np.full((num_frames, 72, 64), 128, np.uint8)
    return encode_segment(yuv, SegmentSpec(width=64, height=48, fps=24.0, crf=23, codec="h264"), 0, 0)


def _refused(decode, data, expected, **options):
    with pytest.raises(InvalidRequestError, match=expected) as caught:
        decode(data, 64, 64, "crop", **options)
    assert caught.value.code == "media_invalid"
    assert caught.value.message.startswith(f"{caught.value.param}: ")


# What comes out


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_stretched_image_equals_diffusers(width, height):
    from diffusers.video_processor import VideoProcessor

    image = Image.fromarray(_noise(1, height, width)[0])
    expected = VideoProcessor(vae_scale_factor=8).preprocess(image, height=64, width=128)
    got = decode_image(_image_bytes(image), 128, 64, "stretch")
    assert torch.equal(torch.from_numpy(_array(got).copy()).permute(0, 3, 1, 2) / 255 * 2 - 1, expected)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_stretched_video_equals_diffusers(width, height):
    from diffusers.video_processor import VideoProcessor

    frames = _noise(33, height, width)
    expected = VideoProcessor(vae_scale_factor=8).preprocess_video(
        [Image.fromarray(frame) for frame in frames], height=64, width=128
    )
    got = decode_video(_npy(frames), 128, 64, "stretch", allow_npy=True)
    assert torch.equal(torch.from_numpy(_array(got).copy()).permute(3, 0, 1, 2)[None] / 255 * 2 - 1, expected)


def test_crop_keeps_the_aspect_ratio_and_the_centre():
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 40:80] = 255  # the centre square
    assert _array(decode_image(_image_bytes(Image.fromarray(wide)), 64, 64, "crop"))[:, :, 4:-4].min() == 255
    assert _array(decode_image(_image_bytes(Image.fromarray(wide)), 64, 64, "stretch")).min() == 0
    tall = wide.transpose(1, 0, 2)
    assert _array(decode_image(_image_bytes(Image.fromarray(tall)), 64, 64, "crop"))[:, 4:-4].min() == 255


def test_crop_equals_stretch_when_the_aspect_ratios_agree():
    data = _image_bytes(Image.fromarray(_noise(1, 96, 144)[0]))
    assert decode_image(data, 96, 64, "crop") == decode_image(data, 96, 64, "stretch")


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 20), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_any_size_fits_any_size(width, height, columns, rows):
    data = _image_bytes(Image.new("RGB", (width, height), (10, 200, 30)))
    frames = decode_image(data, 16 * columns, 16 * rows, "crop")
    assert (frames.num_frames, frames.width, frames.height) == (1, 16 * columns, 16 * rows)
    assert np.unique(_array(frames).reshape(-1, 3), axis=0).tolist() == [[10, 200, 30]]


def test_same_size_is_not_touched():
    pixels = _noise(1, 64, 128)
    for data in (
        _image_bytes(Image.fromarray(pixels[0])),
        _image_bytes(Image.fromarray(pixels[0]), "WEBP", lossless=True),
    ):
        assert np.array_equal(_array(decode_image(data, 128, 64, "crop")), pixels)
    assert np.array_equal(_array(decode_image(_npy(pixels), 128, 64, "crop", allow_npy=True)), pixels)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "I;16", "CMYK"])
def test_modes_are_converted_as_pillow_does(mode):
    rgba = np.concatenate([_noise(1, 16, 16)[0], _noise(1, 16, 16, seed=1)[0, :, :, :1]], axis=2)
    image = Image.fromarray(rgba)
    image = image.convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)
    data = _image_bytes(image, "JPEG" if mode == "CMYK" else "PNG")
    with warnings.catch_warnings(action="ignore"):  # Pillow's advice on palettes with alpha
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(_array(decode_image(data, 16, 16, "crop"))[0], expected)


def test_palette_with_transparency_per_entry():
    image = Image.fromarray(_noise(1, 16, 16)[0]).quantize(8)
    data = _image_bytes(image, transparency=bytes(range(8)))
    assert np.array_equal(_array(decode_image(data, 16, 16, "crop"))[0], np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_first_picture_of_an_animation(kind):
    first, second = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    data = _image_bytes(first, kind, save_all=True, append_images=[second], lossless=True)
    assert np.unique(_array(decode_image(data, 16, 16, "crop")).reshape(-1, 3), axis=0).tolist() == [[255, 0, 0]]


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16] = 255
    data = _image_bytes(Image.fromarray(pixels), "JPEG", exif=exif.tobytes(), quality=95)
    shown = _array(decode_image(data, 32, 32, "crop"))[0]  # turned a quarter clockwise: top becomes right
    assert shown[:, -8:].min() > 240
    assert shown[:, :8].max() < 15


@pytest.mark.parametrize(
    ("container", "codec"), [("mp4", "libx264"), ("mp4", "libx265"), ("webm", "libvpx-vp9"), ("webm", "libvpx")]
)
def test_every_frame_in_order(container, codec):
    frames = _array(decode_video(_video(40, container=container, codec=codec), 64, 48, "crop"))
    assert frames.shape == (40, 48, 64, 3)
    assert np.abs(frames.mean((1, 2, 3)) - [20 + index % 33 * 6 for index in range(40)]).max() < 4


@pytest.mark.parametrize("fps", [24.0, 12.5, 60.0])
def test_own_output_is_input(fps):
    spec = SegmentSpec(width=64, height=48, fps=fps, crf=23, codec="h264")
    red = np.full((33, 72, 64), 0, np.uint8)
    red[:, :48], red[:, 48:60], red[:, 60:] = 63, 102, 240
    parts = [encode_segment(red, spec, chunk, 33 * chunk) for chunk in range(2)]
    for data in (parts[0][0] + parts[0][1] + parts[1][1], progressive_mp4(parts[0][0], [part[1] for part in parts])):
        frames = _array(decode_video(data, 64, 48, "crop"))
        assert len(frames) == 66
        assert np.abs(frames.astype(int) - (255, 0, 0)).max() <= 4


@pytest.mark.parametrize(("matrix", "space"), [("itu601", 6), ("itu709", 1)])
@pytest.mark.parametrize("colour_range", [1, 2])
def test_colour_tags_are_obeyed(matrix, space, colour_range):
    picture = np.full((48, 64, 3), (200, 40, 60), np.uint8)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=24, options={"qp": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = space, colour_range
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
            format="yuv420p", dst_colorspace=matrix, src_color_range=2, dst_color_range=colour_range
        )
        for index in range(33):
            frame.pts, frame.time_base = index, Fraction(1, 24)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    frames = _array(decode_video(file.getvalue(), 64, 48, "crop"))
    assert np.abs(frames.astype(int) - (200, 40, 60)).max() <= 5


# What is refused

TEXT_FILES = {
    "empty": b"",
    "text": b"hello, this is not a picture\n" * 20,
    "svg": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "pdf": b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\n",
    "gif": _image_bytes(Image.new("RGB", (8, 8)), "GIF"),
    "bmp": _image_bytes(Image.new("RGB", (8, 8)), "BMP"),
    "tiff": _image_bytes(Image.new("RGB", (8, 8)), "TIFF"),
    "playlist": b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n",
    "concat": b"ffconcat version 1.0\nfile /etc/passwd\n",
}


@pytest.mark.parametrize("name", TEXT_FILES)
def test_other_files_are_refused(name):
    expected = "empty" if name == "empty" else "not a"
    _refused(decode_image, TEXT_FILES[name], expected, param="input_reference")
    _refused(decode_video, TEXT_FILES[name], expected, param="video_reference")


def test_images_and_videos_are_told_apart():
    _refused(decode_video, _image_bytes(Image.new("RGB", (8, 8))), "not an MP4 or WebM video")
    _refused(decode_image, _video(), "not a PNG, JPEG or WebP image")
    _refused(decode_image, _npy(_noise(1, 8, 8)), "not a PNG, JPEG or WebP image")
    _refused(decode_video, _npy(_noise(33, 8, 8)), "not an MP4 or WebM video")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_truncated_images(kind):
    data = _image_bytes(Image.fromarray(_noise(1, 64, 64)[0]), kind)
    for part in (0.01, 0.1, 0.5, 0.9):
        _refused(decode_image, data[: int(len(data) * part)], "damaged|not a")


@pytest.mark.parametrize("container", ["mp4", "webm"])
def test_truncated_videos(container):
    data = _video(40, container=container, codec="libx264" if container == "mp4" else "libvpx-vp9")
    for part in (0.01, 0.3, 0.6, 0.95):
        _refused(decode_video, data[: int(len(data) * part)], "damaged|not an MP4")
    _refused(decode_video, data[:-1], "truncated")
    init, segment = _fragmented()
    _refused(decode_video, init + segment[:-1], "truncated")
    _refused(decode_video, progressive_mp4(init, [segment])[:-1], "truncated")


def _png_header(width, height):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("width", "height"), [(8000, 5001), (16385, 16), (10000, 9000), (16000, 16000), (2**31 - 1, 2**31 - 1)]
)
def test_image_bombs(width, height):
    _refused(decode_image, _png_header(width, height), "at most 40 megapixels and 16384 per side are allowed")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_image_bomb_without_warnings_as_errors():
    _refused(decode_image, _png_header(10000, 9000), "10000x9000 pixels, at most 40 megapixels")


def test_lying_image_header():
    _refused(decode_image, _png_header(512, 512), "this PNG image is damaged")


def test_too_many_bytes():
    _refused(decode_image, _image_bytes(Image.new("RGB", (8, 8))) + b"\0" * media.MAX_IMAGE_BYTES, "at most .*20 MiB")
    _refused(decode_video, _video() + b"\0" * media.MAX_VIDEO_BYTES, "at most .*50 MiB")


def test_number_of_frames():
    _refused(decode_video, _video(20), "video: 20 frames, at least 33 are needed")
    _refused(decode_video, _video(32), "video: 32 frames, at least 33 are needed")
    assert decode_video(_video(33), 64, 48, "crop").num_frames == 33
    _refused(decode_video, _video(1453, 16, 16), "1453 or more frames, at most 1452 are allowed")


def test_frame_limit_holds_when_the_header_does_not_say(monkeypatch):
    monkeypatch.setattr(media, "MAX_VIDEO_FRAMES", 40)
    _refused(decode_video, _video(48, container="webm", codec="libvpx"), "41 or more frames, at most 40")


def test_video_sides(monkeypatch):
    monkeypatch.setattr(media, "MAX_VIDEO_SIDES", (96, 64))
    assert decode_video(_video(33, 64, 96), 64, 48, "crop").num_frames == 33
    _refused(decode_video, _video(33, 98, 48), "98x48 pixels, at most 96x64 are allowed")
    _refused(decode_video, _video(33, 80, 66), "80x66 pixels, at most 96x64 are allowed")


def test_duration():
    spec = SegmentSpec(width=64, height=48, fps=1.0, crf=23, codec="h264")
    yuv = np.full((33, 72, 64), 128, np.uint8)
    (init, first), (_, second), (_, third) = (encode_segment(yuv, spec, chunk, 33 * chunk) for chunk in range(3))
    assert decode_video(init + first + second, 64, 48, "crop").num_frames == 66
    _refused(decode_video, progressive_mp4(init, [first, second, third]), "99.0 seconds, at most 91 are allowed")


def test_other_codecs_and_tracks():
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("mjpeg", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for _ in range(33):
            output.mux(stream.encode(av.VideoFrame(64, 48, "yuvj420p")))
        output.mux(stream.encode(None))
    _refused(decode_video, file.getvalue(), "codec mjpeg; allowed are av1, h264")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=8000, layout="mono")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        samples.sample_rate = 8000
        output.mux(stream.encode(samples))
        output.mux(stream.encode(None))
    _refused(decode_video, file.getvalue(), "no video track")


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.zeros((33, 8, 8, 3), np.float32), r"float32 \[33, 8, 8, 3\], uint8 \[T, H, W, 3\] is needed"),
        (np.zeros((33, 8, 8), np.uint8), "is needed"),
        (np.zeros((33, 8, 8, 4), np.uint8), "is needed"),
        (np.zeros((33, 0, 8, 3), np.uint8), "is needed"),
        (np.zeros((20, 8, 8, 3), np.uint8), "20 frames, at least 33"),
        (np.zeros((1453, 2, 2, 3), np.uint8), "at most 1452"),
        (np.array([{"a": 1}], dtype=object), "is needed"),
    ],
)
def test_npy_of_another_kind(array, expected):
    _refused(decode_video, _npy(array), expected, allow_npy=True)


def test_npy_lengths_and_orders():
    frames = _noise(33, 16, 16)
    assert np.array_equal(_array(decode_video(_npy(np.asfortranarray(frames)), 16, 16, "crop", allow_npy=True)), frames)
    _refused(decode_video, _npy(frames)[:-1], "were announced", allow_npy=True)
    _refused(decode_video, _npy(frames)[:40], "damaged", allow_npy=True)
    _refused(decode_image, _npy(frames), "33 frames, exactly 1 is needed", allow_npy=True)


# Whatever the bytes are, there is a result or one kind of error

VALID = {
    "png": _image_bytes(Image.fromarray(_noise(1, 24, 24)[0])),
    "jpeg": _image_bytes(Image.fromarray(_noise(1, 24, 24)[0]), "JPEG"),
    "webp": _image_bytes(Image.fromarray(_noise(1, 24, 24)[0]), "WEBP"),
    "npy": _npy(_noise(1, 8, 8)),
    "mp4": _video(),
    "fmp4": b"".join(_fragmented()),
    "webm": _video(container="webm", codec="libvpx-vp9"),
    "npy33": _npy(_noise(33, 8, 8)),
}


def _survives(data):
    for decode in (decode_image, decode_video):
        try:
            frames = decode(data, 32, 32, "crop", allow_npy=True)
        except InvalidRequestError:
            continue
        assert len(frames.data) == frames.num_frames * 32 * 32 * 3


@given(
    st.sampled_from(
        [
            b"",
            b"\x89PNG\r\n\x1a\n",
            b"\xff\xd8\xff",
            b"RIFF\0\0\0\0WEBP",
            b"\0\0\0\x18ftyp",
            b"\x1a\x45\xdf\xa3\x87\x42\x82\x84webm",
            b"\x93NUMPY\x01\0",
        ]
    ),
    st.binary(max_size=400),
)
@settings(max_examples=300, deadline=None)
def test_random_bytes(magic, rest):
    _survives(magic + rest)


@pytest.mark.parametrize("name", VALID)
@given(st.data())
@settings(max_examples=40, deadline=None)
def test_mutated_files(name, data):
    content = bytearray(VALID[name])
    ends = st.integers(0, min(600, len(content) - 1)) | st.integers(max(0, len(content) - 1500), len(content) - 1)
    for position in data.draw(st.lists(ends | st.integers(0, len(content) - 1), min_size=1, max_size=6)):
        content[position] = data.draw(st.integers(0, 255))
    cut = data.draw(st.none() | st.integers(0, len(content)))
    _survives(bytes(content[:cut]))
