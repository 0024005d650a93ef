"""The forms in which a request may name its picture or video, and what each of them reads."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field, replace

import pytest

from helios_serve.api.media_input import (
    MAX_IMAGE_BYTES,
    MAX_VIDEO_BYTES,
    DataUriSource,
    Media,
    image_size,
    load_image,
    load_video,
    read_image,
)
from helios_serve.api.names import read_body
from helios_serve.api.schemas import UploadedMedia
from helios_serve.errors import ConflictError, InvalidRequestError, NotFoundError
from helios_serve.types import Frames, SamplingParams

PARAMS = SamplingParams(
    width=64, height=64, num_frames=33, fps=24, seed=0, steps=(1, 1, 1), guidance_scale=1.0, image_fit="stretch"
)
PNG = b"\x89PNG"
MP4 = b"frames=40"


class FakeDecoder:
    """Notes what it is given; pictures begin as PNG files do, videos say how many frames they have."""

    def __init__(self) -> None:
        self.given: list[tuple[bytes, str]] = []

    def decode_image(self, data: bytes, width: int, height: int, fit: str) -> Frames:
        self.given.append((data, fit))
        self.image_size(data)
        return Frames(data=bytes(width * height * 3), num_frames=1, height=height, width=width)

    def decode_video(self, data: bytes, width: int, height: int, fit: str) -> Frames:
        self.given.append((data, fit))
        if not data.startswith(b"frames="):
            raise InvalidRequestError("video: not a video", param="video", code="media_invalid")
        return Frames(data=b"", num_frames=int(data[7:]), height=height, width=width)

    def video_look(self, data: bytes) -> tuple[int, int, float]:
        if not data.startswith(b"frames="):
            raise InvalidRequestError("video: not a video", param="video", code="media_invalid")
        return 30, 20, 25.0

    def image_size(self, data: bytes) -> tuple[int, int]:
        if not data.startswith(PNG):
            raise InvalidRequestError("image: not an image", param="image", code="media_invalid")
        return 30, 20


@dataclass(slots=True)
class FakeReader:
    """Knows files by their id and notes what it is asked."""

    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, str, int]] = field(default_factory=list)

    def read(self, reference: str, param: str, max_bytes: int) -> bytes:
        self.asked.append((reference, param, max_bytes))
        if reference == "pending":
            raise ConflictError(f"{param} pending: not finished", param=param)
        if reference not in self.files:
            raise NotFoundError(f"{param} {reference}: no such file", param=param, code="file_not_found")
        return self.files[reference]


@pytest.fixture
def decoder() -> FakeDecoder:
    return FakeDecoder()


@pytest.fixture
def reader() -> FakeReader:
    big = bytes(MAX_IMAGE_BYTES + 1)
    return FakeReader({"png": PNG, "mp4": MP4, "empty": b"", "big": big, "short": b"frames=32"})


@pytest.fixture
def media(decoder: FakeDecoder, reader: FakeReader) -> Media:
    """Everything from one reader."""
    return Media(source=DataUriSource(urls=reader), decoder=decoder, files=reader, videos=reader)  # type: ignore[arg-type]


def uri(data: bytes) -> str:
    return "data:application/octet-stream;base64," + base64.b64encode(data).decode()


@pytest.mark.parametrize(
    "reference",
    [
        uri(PNG),
        {"image_url": uri(PNG)},
        UploadedMedia(PNG, "image/png"),
        {"image_url": UploadedMedia(PNG, "image/png")},
        {"file_id": "png"},
    ],
)
def test_images(media: Media, decoder: FakeDecoder, reference: object) -> None:
    named = read_body({"prompt": "p", "image": reference})
    frames = load_image(named, PARAMS, media)
    assert frames is not None
    assert (frames.width, frames.height, frames.num_frames) == (64, 64, 1)
    assert decoder.given == [(PNG, "stretch")]
    assert load_video(named, PARAMS, media) is None


@pytest.mark.parametrize(
    "reference",
    [uri(MP4), {"video_url": uri(MP4)}, UploadedMedia(MP4, "video/mp4"), {"file_id": "mp4"}, {"id": "mp4"}],
)
def test_videos(media: Media, decoder: FakeDecoder, reference: object) -> None:
    named = read_body({"prompt": "p", "video": reference})
    frames = load_video(named, PARAMS, media)
    assert frames is not None
    assert frames.num_frames == 40
    assert decoder.given == [(MP4, "stretch")]
    assert load_image(named, PARAMS, media) is None


def test_readers_are_told_the_field_and_the_limit(media: Media, reader: FakeReader) -> None:
    load_image(read_body({"first_frame": {"file_id": "png"}}), PARAMS, media)
    load_video(read_body({"video_reference": {"file_id": "mp4"}}), PARAMS, media)
    load_video(read_body({"video": {"id": "mp4"}}), PARAMS, media)
    reader.files["https://a.example/x"] = PNG
    load_image(read_body({"image_url": "https://a.example/x"}), PARAMS, media)
    assert reader.asked == [
        ("png", "first_frame.file_id", MAX_IMAGE_BYTES),
        ("mp4", "video_reference.file_id", MAX_VIDEO_BYTES),
        ("mp4", "video.id", MAX_VIDEO_BYTES),
        ("https://a.example/x", "image_url", MAX_IMAGE_BYTES),
    ]


@pytest.mark.parametrize(
    ("body", "param", "code", "message"),
    [
        ({"image": {}}, "image", "missing_required_parameter", "image: image_url is missing"),
        ({"video": {}}, "video", "missing_required_parameter", "video: video_url is missing"),
        (
            {"image": {"image_url": uri(PNG), "file_id": "png"}},
            "image",
            "conflicting_parameters",
            "image: image_url and file_id; give one of them",
        ),
        ({"video": {"id": "a", "file_id": "b"}}, "video", "conflicting_parameters", "file_id and id; give one"),
        ({"image": {"file_id": "empty"}}, "image", "media_invalid", "image: the file is empty"),
        ({"image": UploadedMedia(b"", "image/png")}, "image", "media_invalid", "image: the file is empty"),
        ({"image": uri(b"")}, "image", "media_invalid", "image: the file is empty"),
        ({"image": {"file_id": "big"}}, "image", "media_invalid", "image: 20.0 MiB, at most 20 MiB are allowed"),
        ({"first_frame": {"file_id": "mp4"}}, "first_frame", "media_invalid", "first_frame: not an image"),
        ({"image": uri(MP4)}, "image", "media_invalid", "image: not an image"),
        ({"video": {"id": "png"}}, "video", "media_invalid", "video: not a video"),
        ({"video": {"id": "short"}}, "video", "media_invalid", "video: 32 frames, at least 33 are needed"),
        ({"image": "ftp://a.example/x"}, "image", "file_not_found", "image ftp://a.example/x: no such file"),
    ],
)
def test_what_is_refused(media: Media, body: dict[str, object], param: str, code: str, message: str) -> None:
    named = read_body(body)
    with pytest.raises((InvalidRequestError, NotFoundError)) as caught:
        load_image(named, PARAMS, media) or load_video(named, PARAMS, media)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert message in caught.value.message


def test_errors_of_readers_pass(media: Media) -> None:
    with pytest.raises(NotFoundError, match=r"^image.file_id lost: no such file"):
        load_image(read_body({"image": {"file_id": "lost"}}), PARAMS, media)
    with pytest.raises(ConflictError, match=r"^video.id pending: not finished"):
        load_video(read_body({"video": {"id": "pending"}}), PARAMS, media)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"image": {"file_id": "png"}}, "image.file_id"),
        ({"video": {"file_id": "mp4"}}, "video.file_id"),
        ({"video": {"id": "mp4"}}, "video.id"),
    ],
)
def test_what_is_not_plugged_in_is_refused(media: Media, body: dict[str, object], param: str) -> None:
    bare, named = replace(media, source=DataUriSource(), files=None, videos=None), read_body(body)
    with pytest.raises(InvalidRequestError, match="not offered by this server; send a data: URI") as caught:
        load_image(named, PARAMS, bare) or load_video(named, PARAMS, bare)
    assert (caught.value.param, caught.value.code) == (param, "unsupported_parameter")


def test_addresses_are_refused_where_nothing_fetches_them() -> None:
    for address in ("https://a.example/x.png", "file:///etc/passwd", "gopher://a.example"):
        with pytest.raises(InvalidRequestError, match="media_url_hosts is empty") as caught:
            DataUriSource().read(address, "image", 100)
        assert caught.value.code == "media_url_forbidden"


def test_an_image_is_read_once_for_its_size_and_its_pixels(media: Media, reader: FakeReader) -> None:
    named = read_body({"image": {"file_id": "png"}})
    data = read_image(named, media)
    assert data == PNG
    assert image_size(data, named, media) == (30, 20)
    assert load_image(named, PARAMS, media, data) is not None
    assert len(reader.asked) == 1
    assert read_image(read_body({"prompt": "p"}), media) is None
    with pytest.raises(InvalidRequestError, match=r"^image: not an image"):
        image_size(MP4, named, media)
