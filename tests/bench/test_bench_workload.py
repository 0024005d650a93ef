"""Arrivals, mixes, prompts and MP4s: the same from the same seed, refused with a reason, and as others count them."""

from __future__ import annotations

import io
import math
from fractions import Fraction
from pathlib import Path
from statistics import mean, stdev

import av
import numpy as np
import pytest
from PIL import Image

from helios_serve.bench.arrivals import ClosedLoad, OpenLoad, TraceLoad
from helios_serve.bench.mp4 import FragmentReader, frames_in_file
from helios_serve.bench.sources import built_in_image, built_in_video, read_prompts, read_trace
from helios_serve.bench.workload import Kind, Prompt, parse_kind, plan_requests
from helios_serve.errors import InvalidRequestError


@pytest.mark.parametrize(("burstiness", "variation"), [(1.0, 1.0), (0.25, 2.0), (4.0, 0.5), (math.inf, 0.0)])
def test_arrivals_have_the_rate_and_the_burstiness_that_was_asked_for(burstiness: float, variation: float) -> None:
    load = OpenLoad(rate=5.0, burstiness=burstiness)
    times = load.offsets(20_000, seed=3)
    gaps = np.diff(times)
    assert times[0] == 0
    assert (gaps >= 0).all()
    assert mean(gaps) == pytest.approx(0.2, rel=0.05)
    assert stdev(gaps) / mean(gaps) == pytest.approx(variation, rel=0.05, abs=1e-9)


def test_arrivals_come_from_the_seed_alone() -> None:
    load = OpenLoad(rate=2.0)
    assert load.offsets(50, 1) == load.offsets(50, 1) != load.offsets(50, 2)
    assert load.offsets(50, 1)[:10] == load.offsets(10, 1)
    assert load.offsets(1, 1) == [0.0]


@pytest.mark.parametrize("load", [OpenLoad(rate=2.0), OpenLoad(rate=3.0, burstiness=math.inf)])
def test_arrivals_within_a_time_are_counted(load: OpenLoad) -> None:
    count = load.count_within(7.5, 4)
    times = load.offsets(count + 1, 4)
    assert times[count - 1] < 7.5 <= times[count]


def test_a_trace_is_replayed_as_fast_as_asked(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('# seconds\n{"at": 12.0, "who": "x"}\n10.5\n\n{"timestamp": 14.5}\n')
    load = TraceLoad(times=read_trace(path), speed=2.0)
    assert load.offsets(3, 0) == load.offsets(3, 9) == [0.0, 0.75, 2.0]
    assert load.rate == 1.0
    assert [load.count_within(seconds, 0) for seconds in (0.1, 0.8, 2.1)] == [1, 2, 3]
    for text in ("soon", '{"when": 1}', "nan", '{"at": null}', "[1]"):
        path.write_text(f"1\n{text}\n")
        with pytest.raises(InvalidRequestError, match="line 2"):
            read_trace(path)
    path.write_text("")
    with pytest.raises(InvalidRequestError, match="no arrival"):
        TraceLoad(times=read_trace(path))


def test_loads_that_cannot_be_are_refused() -> None:
    for rate in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InvalidRequestError, match="rate"):
            OpenLoad(rate=rate)
    with pytest.raises(InvalidRequestError, match="burstiness"):
        OpenLoad(rate=1, burstiness=0)
    with pytest.raises(InvalidRequestError, match="concurrency"):
        ClosedLoad(concurrency=0)


def test_a_mix_is_read_and_drawn_by_weight() -> None:
    default = Kind(num_frames=66, size="128x64")
    offline = parse_kind("weight=3 class=offline task=i2v frames=33 steps=2,1,1 fps=16", default)
    assert offline == Kind(
        service_class="offline", via="jobs", task="i2v", num_frames=33, size="128x64", steps=(2, 1, 1), fps=16, weight=3
    )
    assert parse_kind("class=offline via=raw", default).via == "raw"
    assert parse_kind("frames=99", Kind(via="jobs")).via == "jobs"
    assert parse_kind("via=jobs", default).service_class == "offline"
    assert parse_kind("via=grpc", offline).service_class == "realtime"
    assert parse_kind("via=jobs class=realtime", default).service_class == "realtime"
    prompts = [Prompt(text="a"), Prompt(text="b", num_frames=240)]
    planned = plan_requests([default, offline], prompts, 4000, seed=5)
    assert planned == plan_requests([default, offline], prompts, 4000, seed=5)
    assert planned != plan_requests([default, offline], prompts, 4000, seed=6)
    assert [one.index for one in planned] == list(range(4000))
    assert sum(one.kind.task == "i2v" for one in planned) / 4000 == pytest.approx(0.75, abs=0.03)
    assert {one.kind.num_frames for one in planned if one.prompt == "b"} == {240}
    assert {one.kind.num_frames for one in planned if one.prompt == "a"} == {66, 33}
    assert len({one.seed for one in planned}) == 4000


@pytest.mark.parametrize(
    "text", ["frames", "length=3", "frames=x", "class=fast", "steps=2;2", "weight=0", "size=64", "fps=0", "task=v2x"]
)
def test_a_mix_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError):
        parse_kind(text, Kind())


def test_prompts_come_from_lines_and_from_tables(tmp_path: Path) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_text("\ufeffa fox\n\n a red, round ball \n")
    assert read_prompts(lines) == [Prompt(text="a fox"), Prompt(text="a red, round ball")]
    table = tmp_path / "bench.csv"
    table.write_text('id,prompt,duration\n1,"A street, ""wet""\nat night",120\n2,A fox,1440\n')
    assert read_prompts(table) == [Prompt(text='A street, "wet"\nat night'), Prompt(text="A fox")]
    assert [prompt.num_frames for prompt in read_prompts(table, with_lengths=True)] == [120, 1440]
    table.write_text("id,prompt,refined_prompt\n1,a fox,A red fox\n2,a ball,\n3,,\n")
    assert [prompt.text for prompt in read_prompts(table)] == ["A red fox", "a ball"]


@pytest.mark.parametrize(
    ("name", "text", "with_lengths", "message"),
    [
        ("a.csv", "id,words\n1,x\n", False, "columns"),
        ("a.csv", "id,prompt\n1,x\n", True, "duration"),
        ("a.csv", "prompt,duration\nx,long\n", True, "line 2"),
        ("a.txt", "x\n", True, "CSV"),
        ("a.txt", "\n", False, "no prompt"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused(
    tmp_path: Path, name: str, text: str, with_lengths: bool, message: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InvalidRequestError, match=message):
        read_prompts(tmp_path / name, with_lengths)
    with pytest.raises(InvalidRequestError, match="No such file"):
        read_prompts(tmp_path / "absent.txt")


def encoded(num_frames: int, movflags: str, *, with_sound: bool = False) -> bytes:
    """An MP4 by FFmpeg; the sound track, with tables of its own, comes first."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4", options={"movflags": movflags} if movflags else {}) as container:
        sound = container.add_stream("aac", rate=48000) if with_sound else None
        stream = container.add_stream("libx264", rate=Fraction(24))
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for index in range(num_frames):
            picture = np.full((64, 64, 3), index % 255, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
        if sound is not None:
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 48000), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 48000
            container.mux(sound.encode(frame))
            container.mux(sound.encode())
    return out.getvalue()


@pytest.mark.parametrize("movflags", ["", "frag_keyframe+empty_moov"])
def test_frames_of_a_file_are_those_that_ffmpeg_wrote(movflags: str) -> None:
    assert frames_in_file(encoded(37, movflags)) == 37


def test_sound_does_not_count() -> None:
    assert frames_in_file(encoded(10, "", with_sound=True)) == 10


def test_what_is_no_mp4_has_no_frames() -> None:
    whole = encoded(5, "")
    for data in (b"", b"GIF89a and so on", whole[:-10], b"\0\0\0\x08free"):
        assert frames_in_file(data) is None


@pytest.mark.parametrize("piece", [1, 7, 1000, 1 << 20])
def test_fragments_are_found_however_the_bytes_come(piece: int) -> None:
    data = encoded(30, "frag_every_frame+empty_moov")
    reader = FragmentReader()
    found = [one for start in range(0, len(data), piece) for one in reader.feed(data[start : start + piece])]
    assert [one.num_frames for one in found] == [1] * 30
    assert 0.9 * len(data) < sum(one.num_bytes for one in found) <= len(data)
    with pytest.raises(ValueError, match="MP4"):
        FragmentReader().feed(b"<html><body>not a video")


def test_the_built_in_media_are_media() -> None:
    assert Image.open(io.BytesIO(built_in_image())).size == (640, 384)
    with av.open(io.BytesIO(built_in_video()), "r") as container:
        assert sum(1 for _ in container.decode(video=0)) == 33
    assert frames_in_file(built_in_video()) == 33
