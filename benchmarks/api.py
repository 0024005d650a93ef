"""What the API does to a request and to a segment under pytest-benchmark, without a server, a store or an engine.

    pytest benchmarks/api.py

CPU of one core. What a whole request costs in a server is `overhead`'s.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pytest

from benchmarks.overhead_server import DISTILLED
from helios_serve.api.convert import Limits, parse_generation
from helios_serve.api.jobs import JobEvent, JobSegment
from helios_serve.api.media_input import DataUriSource, Media
from helios_serve.api.streaming import fmp4
from helios_serve.workers.media import Decoder

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark")

BODIES = {
    "short": {"prompt": "a fox", "num_frames": 132},
    "long": {
        "prompt": "a fox runs along a ridge " * 40,
        "num_frames": 1452,
        "size": "640x384",
        "fps": 24,
        "seed": 7,
        "stream": True,
        "metadata": {"team": "films", "take": "7"},
        "helios": {"steps": [2, 2, 2], "guidance_scale": 1.0, "service_class": "offline"},
    },
}
NUM_SEGMENTS, MEDIA_BYTES = 20, 300_000


@pytest.mark.parametrize("name", BODIES)
def test_read_a_request(benchmark: Any, name: str) -> None:
    """From the body's bytes to a complete request."""
    text = json.dumps(BODIES[name])
    media, limits = Media(source=DataUriSource(), decoder=Decoder()), Limits()
    benchmark(lambda: parse_generation(json.loads(text), DISTILLED, media, limits))


def test_stream_segments_as_fmp4(benchmark: Any) -> None:
    """Twenty segments of a stream, cut into the pieces that a connection is given."""
    media = bytes(MEDIA_BYTES)
    segments = [_segment(index, media) for index in range(NUM_SEGMENTS)]
    total = benchmark(lambda: asyncio.run(_size_of(fmp4(_each(segments)))))
    assert total == len(segments[0].init) + NUM_SEGMENTS * MEDIA_BYTES


def _segment(index: int, media: bytes) -> JobSegment:
    return JobSegment(
        index=index,
        init=b"init" * 200,
        media=media,
        start_frame=33 * index,
        num_frames=33,
        fps=24.0,
        prompt="a fox",
        prompt_weight=1.0,
        is_last=index == NUM_SEGMENTS - 1,
        generated_ms=1000 * index,
    )


async def _each(segments: list[JobSegment]) -> AsyncGenerator[JobEvent, None]:
    for segment in segments:
        yield segment


async def _size_of(pieces: AsyncIterator[bytes]) -> int:
    return sum([len(piece) async for piece in pieces])
