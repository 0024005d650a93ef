"""Segments: colour conversion, box structure, timestamps, concatenation and the progressive file."""

import io
import os
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from helios_serve.kernels.reference import rgb_to_yuv420, to_uint8
from helios_serve.workers.segment import SegmentSpec, encode_segment, frame_rate, progressive_mp4

WIDTH, HEIGHT = 96, 64
RATES = {
    24.0: Fraction(24),
    16.0: Fraction(16),
    25.0: Fraction(25),
    30.0: Fraction(30),
    60.0: Fraction(60),
    12.5: Fraction(25, 2),
    19.5: Fraction(39, 2),
    23.976: Fraction(24000, 1001),
    24000 / 1001: Fraction(24000, 1001),
}
CODECS = ("h264", "vp9", "av1")


def _spec(fps=24.0, codec="h264", crf=23):
    return SegmentSpec(width=WIDTH, height=HEIGHT, fps=fps, crf=crf, codec=codec)


def _clip(num_frames, start=0):
    """Smooth moving colours, [F, 3, H, W] in [-1, 1]."""
    t = torch.arange(start, start + num_frames).float()[:, None, None]
    y = torch.linspace(0, 3, HEIGHT)[None, :, None]
    x = torch.linspace(0, 4, WIDTH)[None, None]
    return torch.stack([torch.sin(x + y + 0.1 * t + phase) for phase in (0.0, 2.0, 4.0)], dim=1)


def _segments(lengths, spec):
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    return [
        encode_segment(rgb_to_yuv420(_clip(length, start)).numpy(), spec, chunk, start)
        for chunk, (length, start) in enumerate(zip(lengths, starts, strict=True))
    ]


def _decode(data):
    with av.open(io.BytesIO(data)) as container:
        return list(container.decode(video=0))


def _boxes(data):
    """All boxes, containers opened: [(path, body)]."""
    found, offset = [], 0
    while offset < len(data):
        size, kind = int.from_bytes(data[offset : offset + 4], "big"), data[offset + 4 : offset + 8].decode("latin1")
        body = data[offset + 8 : offset + size]
        found.append((kind, body))
        if kind in ("moov", "trak", "mdia", "moof", "traf"):
            found += [(f"{kind}/{path}", inner) for path, inner in _boxes(body)]
        offset += size
    return found


def _uint(data):
    return int.from_bytes(data, "big")


def test_yuv_is_within_one_code_of_float64():
    rgb = torch.rand(3, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2.4 - 1.2
    unit = np.clip(rgb.double().numpy() * 0.5 + 0.5, 0, 1)
    red, green, blue = unit[:, 0], unit[:, 1], unit[:, 2]
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    chroma = [(blue - luma) / (2 * (1 - 0.0722)), (red - luma) / (2 * (1 - 0.2126))]
    halved = [plane.reshape(3, 16, 2, 24, 2).mean((2, 4)) for plane in chroma]
    planes = [16 + 219 * luma, *(128 + 224 * plane for plane in halved)]
    expected = np.concatenate([plane.reshape(3, -1) for plane in planes], axis=1)
    got = rgb_to_yuv420(rgb).numpy()
    assert got.shape == (3, 48, 48)
    assert got.dtype == np.uint8
    assert np.abs(got.reshape(3, -1) - expected).max() < 0.51


def test_yuv_codes_of_black_white_and_grey():
    levels = torch.tensor([-1.0, 1.0, 0.0]).view(3, 1, 1, 1).expand(3, 3, 16, 16)
    yuv = rgb_to_yuv420(levels.bfloat16())
    assert yuv[:, :16].flatten(1).unique(dim=1).flatten().tolist() == [16, 235, 126]  # 125.5 rounds to even
    assert yuv[:, 16:].unique().tolist() == [128]


def test_uint8_equals_the_pil_path_of_diffusers():
    from diffusers.video_processor import VideoProcessor

    pixels = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2.2 - 1.1
    pixels[0, 0, 0, :3] = torch.tensor([0.5, 1.5, 253.5]) / 255 * 2 - 1  # half-way codes
    (expected,) = VideoProcessor().postprocess_video(pixels.transpose(0, 1)[None], output_type="pil")
    assert np.array_equal(to_uint8(pixels).numpy(), np.stack([np.asarray(image) for image in expected]))


@pytest.mark.parametrize("codec", CODECS)
def test_decoded_video_looks_like_the_clip(codec):
    clip = _clip(9)
    init, media = encode_segment(rgb_to_yuv420(clip).numpy(), _spec(codec=codec), 0, 0)
    frames = _decode(init + media)
    shown = np.stack([frame.to_ndarray(format="rgb24", src_colorspace="itu709") for frame in frames]).astype(float)
    error = np.mean((shown - to_uint8(clip).numpy()) ** 2)
    assert 10 * np.log10(255**2 / error) > 30
    assert {(frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc) for frame in frames} == {
        (1, 1, 1, 1)
    }


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("channel", "expected"), [(0, (255, 0, 0)), (1, (0, 255, 0)), (2, (0, 0, 255))])
def test_colours_survive(codec, channel, expected):
    pixels = torch.full((1, 3, HEIGHT, WIDTH), -1.0)
    pixels[:, channel] = 1.0
    init, media = encode_segment(rgb_to_yuv420(pixels).numpy(), _spec(codec=codec), 0, 0)
    (frame,) = _decode(init + media)
    assert np.abs(frame.to_ndarray(format="rgb24").astype(int) - expected).max() <= 4


def test_one_frame_is_a_video():
    init, media = encode_segment(rgb_to_yuv420(_clip(1)).numpy(), _spec(), 0, 0)
    assert len(_decode(init + media)) == 1
    assert len(_decode(progressive_mp4(init, [media]))) == 1


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("fps", "rate"), RATES.items())
def test_segments_join_at_every_prefix(codec, fps, rate):
    lengths = [9, 9, 4]
    inits, media = zip(*_segments(lengths, _spec(fps, codec)), strict=True)
    assert len(set(inits)) == 1
    timescale = _uint(dict(_boxes(inits[0]))["moov/trak/mdia/mdhd"][12:16])
    for chunk, segment in enumerate(media):
        boxes = dict(_boxes(segment))
        assert [kind for kind, _ in _boxes(segment) if "/" not in kind] == ["moof", "mdat"]
        assert _uint(boxes["moof/mfhd"][4:8]) == chunk + 1
        assert _uint(boxes["moof/traf/tfdt"][4:12]) == sum(lengths[:chunk]) * timescale / rate
    for chunk in range(len(lengths)):
        frames = _decode(inits[0] + b"".join(media[: chunk + 1]))
        times = [frame.pts * frame.time_base for frame in frames]
        assert times == [index / rate for index in range(sum(lengths[: chunk + 1]))]


@pytest.mark.parametrize("codec", CODECS)
def test_same_bytes_twice(codec):
    assert _segments([5, 3], _spec(19.5, codec)) == _segments([5, 3], _spec(19.5, codec))


def test_crf_is_used():
    sizes = [len(_segments([9], _spec(crf=crf, codec=codec))[0][1]) for codec in CODECS for crf in (10, 45)]
    assert sizes[0] > sizes[1]
    assert sizes[2] > sizes[3]
    assert sizes[4] > sizes[5]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("fps", [24.0, 12.5, 23.976])
def test_progressive_file(codec, fps):
    lengths = [5, 5]
    inits, media = zip(*_segments(lengths, _spec(fps, codec)), strict=True)
    data = progressive_mp4(inits[0], media)
    kinds = [kind for kind, _ in _boxes(data) if "/" not in kind]
    assert kinds.index("moov") < kinds.index("mdat")
    assert "moof" not in kinds
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        assert stream.frames == sum(lengths)
        assert stream.duration * stream.time_base == sum(lengths) / RATES[fps]
        assert stream.average_rate == RATES[fps]
        joined = _decode(inits[0] + b"".join(media))
        copied = list(container.decode(video=0))
    assert len(copied) == sum(lengths)
    for left, right in zip(copied, joined, strict=True):
        assert left.pts * left.time_base == right.pts * right.time_base
        assert np.array_equal(left.to_ndarray(), right.to_ndarray())


def test_frame_rates_are_exact():
    assert {fps: frame_rate(fps) for fps in RATES} == RATES
    assert frame_rate(29.97) == Fraction(30000, 1001)
    assert frame_rate(59.94) == Fraction(60000, 1001)
    assert frame_rate(1) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="scheduling policies are read on Linux only")
@pytest.mark.parametrize("codec", CODECS)
def test_an_encoder_leaves_the_priority_of_its_thread_as_it_was(codec):
    before = os.sched_getscheduler(0)
    encode_segment(np.zeros((2, HEIGHT * 3 // 2, WIDTH), np.uint8), _spec(codec=codec), 0, 0)
    assert os.sched_getscheduler(0) == before
