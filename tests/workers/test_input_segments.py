"""The segments of a caller's own video: whole chunks from its end, in the form of those that are made."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from helios_serve.kernels.reference import rgb_to_yuv420
from helios_serve.types import Frames, SamplingParams
from helios_serve.workers.input_segments import input_segments
from helios_serve.workers.segment import SegmentSpec, encode_segment

WIDTH, HEIGHT = 96, 64


def _clip(num_frames):
    """Smooth moving colours, [F, H, W, 3]."""
    t, y, x = np.meshgrid(
        np.arange(num_frames) / 10, np.linspace(0, 3, HEIGHT), np.linspace(0, 4, WIDTH), indexing="ij"
    )
    return np.round(127.5 + 100 * np.stack([np.sin(x + y + t + phase) for phase in (0.0, 2.0, 4.0)], -1)).astype("u1")


def _params(**changes):
    return SamplingParams(
        **{
            "width": WIDTH,
            "height": HEIGHT,
            "num_frames": 33,
            "fps": 25.0,
            "seed": 0,
            "steps": (1,),
            "guidance_scale": 1.0,
        }
        | changes
    )


def _frames(clip):
    return Frames(data=clip.tobytes(), num_frames=len(clip), height=HEIGHT, width=WIDTH)


@pytest.mark.parametrize("codec", ["h264", "vp9", "av1"])
def test_a_made_segment_follows_them(codec):
    clip = _clip(80)
    init, media = input_segments(_frames(clip), _params(codec=codec))
    spec = SegmentSpec(width=WIDTH, height=HEIGHT, fps=25.0, crf=23, codec=codec)
    made = torch.zeros(10, 3, HEIGHT, WIDTH)
    made_init, made_media = encode_segment(rgb_to_yuv420(made).numpy(), spec, 2, 66)
    assert (init, len(media)) == (made_init, 2)
    with av.open(io.BytesIO(b"".join((init, *media, made_media)))) as container:
        shown = list(container.decode(video=0))
    assert [frame.pts * frame.time_base for frame in shown] == [Fraction(index, 25) for index in range(76)]
    pictures = np.stack([frame.to_ndarray(format="rgb24") for frame in shown[:66]])
    error = np.mean((pictures.astype(float) - clip[14:]) ** 2)
    assert 10 * np.log10(255**2 / error) > 32
    assert shown[-1].to_ndarray(format="rgb24").std() < 2


def test_the_same_frames_give_the_same_bytes():
    frames = _frames(_clip(33))
    assert input_segments(frames, _params()) == input_segments(frames, _params())
