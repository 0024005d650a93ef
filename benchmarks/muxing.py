"""Segments under pytest-benchmark: encoding a chunk's frames, joining segments into a file, and what a digest costs.

    pytest benchmarks/muxing.py

CPU of one core, 33 frames of 640x384 unless said otherwise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from helios_serve.store.blob_key import key_of
from helios_serve.types import FRAMES_PER_CHUNK, Codec
from helios_serve.workers.segment import SegmentSpec, encode_segment, progressive_mp4

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark")

SIZES = [(640, 384), (1280, 704)]
LATENT_BYTES = 16 * 9 * 48 * 80 * 4


def moving(width: int, height: int) -> npt.NDArray[np.uint8]:
    """[33, H * 3/2, W] uint8: a moving gradient with a little noise."""
    rows, columns = np.mgrid[0 : height * 3 // 2, 0:width]
    noise = np.random.default_rng(0).integers(0, 4, rows.shape)
    frames = [60 + (rows + columns + 4 * shown) // 8 % 120 + noise for shown in range(FRAMES_PER_CHUNK)]
    return np.stack(frames).astype(np.uint8)


def spec_of(width: int, height: int, codec: Codec = "h264") -> SegmentSpec:
    return SegmentSpec(width=width, height=height, fps=24.0, crf=23, codec=codec)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("codec", ["h264", "vp9", "av1"])
def test_encode_a_segment(benchmark: Any, codec: Codec, size: tuple[int, int]) -> None:
    frames = moving(*size)
    init, media = benchmark.pedantic(
        encode_segment, args=(frames, spec_of(*size, codec), 0, 0), rounds=3, warmup_rounds=1
    )
    benchmark.extra_info.update(init_bytes=len(init), media_bytes=len(media))


@pytest.mark.parametrize("num_segments", [4, 40])
def test_join_segments(benchmark: Any, num_segments: int) -> None:
    frames, spec = moving(*SIZES[0]), spec_of(*SIZES[0])
    made = [encode_segment(frames, spec, chunk, FRAMES_PER_CHUNK * chunk) for chunk in range(num_segments)]
    benchmark.pedantic(progressive_mp4, args=(made[0][0], [media for _, media in made]), rounds=3)


def test_key_of_latents(benchmark: Any) -> None:
    """The digest under which a chunk's latents are kept."""
    benchmark(key_of, bytes(LATENT_BYTES))
