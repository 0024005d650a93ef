"""`helios-serve bench latency` as it is typed, with the tiny checkpoint on the CPU, and its arithmetic."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from helios_serve.bench.cli import bench_app
from helios_serve.bench.latency import latency_table
from helios_serve.bench.rank_engine import ChunkTimes, VideoTimes
from helios_serve.errors import InvalidRequestError


def times(chunk: int, *, factor: float = 1.0) -> ChunkTimes:
    return ChunkTimes(
        chunk=chunk,
        stages=(0.1 * factor, 0.2 * factor, 0.4 * factor),
        steps=(1, 1, 1),
        decode_s=0.2 * factor,
        mux_s=0.1 * factor,
    )


def test_parts_add_up() -> None:
    video = VideoTimes(encode_s=0.5, chunks=(times(0), times(1)))
    assert times(0).denoise_s == pytest.approx(0.7)
    assert times(0).total_s == pytest.approx(1.0)
    assert video.total_s == pytest.approx(2.5)


def test_the_table_has_medians_and_the_range_of_the_repeats() -> None:
    videos = [VideoTimes(encode_s=0.5, chunks=(times(0, factor=factor),)) for factor in (1.0, 2.0, 6.0)]
    console = Console(width=150, record=True, file=io.StringIO())
    console.print(latency_table(videos, fps=16.5))
    row = next(line for line in console.export_text().split("\n") if line.lstrip().startswith("0 "))
    assert row.split() == [
        *("0", "1,1,1", "200.0", "400.0", "800.0", "1400.0", "400.0", "200.0", "2000.0", "1000.0..6000.0", "1.00")
    ]


def test_a_stream_of_the_tiny_checkpoint(tiny_distilled: Path, tmp_path: Path) -> None:
    out = tmp_path / "latency.json"
    flags = (
        "--size",
        "64x64",
        "--steps",
        "1,2,1",
        "--chunks",
        "2",
        "--warmup",
        "0",
        "--repeat",
        "2",
        "--device",
        "cpu",
    )
    ran = CliRunner().invoke(
        bench_app, ["latency", "--model", str(tiny_distilled), *flags, "--out", str(out)], catch_exceptions=False
    )
    assert ran.exit_code == 0, ran.output
    result = json.loads(out.read_text())
    assert result["params"]["size"] == "64x64"
    assert (result["ranks"], result["device"], result["dtype"]) == (1, "cpu", "float32")
    assert len(result["videos"]) == 2
    for video in result["videos"]:
        assert [chunk["steps"] for chunk in video["chunks"]] == [[2, 4, 2], [1, 2, 1]]  # the first is amplified
        for chunk in video["chunks"]:
            assert len(chunk["stages"]) == 3
            assert min(*chunk["stages"], chunk["decode_s"], chunk["mux_s"]) > 0
        assert video["encode_s"] > 0
    assert "x realtime" in ran.output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--ranks", "1,2"), "one number here"),
        (("--ranks", "two"), "whole numbers from 1"),
        (("--size", "65x64"), "multiples of 64"),
    ],
)
def test_what_cannot_be_measured_is_said(tiny_distilled: Path, flags: tuple[str, str], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        CliRunner().invoke(
            bench_app, ["latency", "--model", str(tiny_distilled), "--device", "cpu", *flags], catch_exceptions=False
        )
