"""`helios-serve bench throughput` as it is typed, with the tiny checkpoint on the CPU, and its arithmetic."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from helios_serve.bench.cli import bench_app
from helios_serve.bench.rank_engine import ChunkTimes, RankEngine, VideoTimes
from helios_serve.bench.rank_work import Workload, cluster_of
from helios_serve.bench.throughput import Cell, Point, alone_of, merged, point_of
from helios_serve.bench.throughput_plot import scaling_plot
from helios_serve.config import ModelConfig
from helios_serve.errors import InvalidRequestError
from helios_serve.offline import Helios

ABOUT = {"model": {"name": "tiny"}, "device": "cpu", "params": {"size": "64x64", "steps": [1, 1, 1]}}
ONE = Cell(engine="helios_serve", ranks=1, degrees="alone", batch=2, precision="float32")


def point(cell: Cell = ONE, rate: float = 10.0) -> Point:
    each = (rate, rate - 1, rate + 1)
    return Point(cell=cell, dit_fps=each, fps=each, video_fps=each, chunk_s=0.1, decode_s=0.1, num_chunks=4)


def test_rates_are_of_steady_chunks_and_of_whole_videos() -> None:
    def video(factor: float) -> VideoTimes:
        slow, steady = (
            ChunkTimes(chunk=chunk, stages=(seconds, 0.0, 0.0), steps=(1, 1, 1), decode_s=0.3, mux_s=0.2)
            for chunk, seconds in ((0, 9.0), (1, 0.5 * factor))
        )
        return VideoTimes(encode_s=1.0, chunks=(slow, steady))

    found = point_of(ONE, [video(1.0), video(2.0), video(4.0)], 1, decodes=True)
    assert found.dit_fps == pytest.approx((66 / 1.0, 66 / 2.0, 66 / 0.5))
    assert found.fps == pytest.approx((66 / 1.5, 66 / 2.5, 66 / 1.0))
    assert found.video_fps == pytest.approx((132 / 12.0, 132 / 13.0, 132 / 11.5))
    assert (found.chunk_s, found.decode_s, found.num_chunks) == (1.0, 0.3, 3)
    assert point_of(ONE, [video(1.0)], 1, decodes=False).fps is None


def test_a_call_adds_to_the_file_and_replaces_its_own_cells() -> None:
    two = Cell(engine="helios_serve", ranks=2, degrees="ulysses 2", batch=2, precision="float32")
    first = merged(None, ABOUT, "a", [point()])
    second = merged(first, ABOUT, "b", [point(two, 18.0)])
    third = merged(second, ABOUT, "c", [point(ONE, 12.0)])
    assert [(one["cell"]["ranks"], one["dit_fps"][0]) for one in third["points"]] == [(1, 12.0), (2, 18.0)]
    assert alone_of(third["points"][1], third["points"]) == third["points"][0]
    with pytest.raises(InvalidRequestError, match="another model, device or workload"):
        merged(third, {**ABOUT, "device": "cuda"}, "d", [point()])


def test_the_plot_has_a_mark_for_each_point_of_the_forwards() -> None:
    eight = Cell(engine="helios_serve", ranks=8, degrees="ulysses 8", batch=2, precision="float32")
    rival = replace(point(), dit_fps=None, cell=replace(ONE, engine="diffusers 1"))
    picture = ElementTree.fromstring(scaling_plot(merged(None, ABOUT, "a", [point(), point(eight, 60.0), rival])))
    marks = picture.findall(".//{http://www.w3.org/2000/svg}circle")
    assert len(marks) == 2
    assert all(0 < float(mark.attrib["cx"]) < 760 and 60 < float(mark.attrib["cy"]) < 361 for mark in marks)


def test_a_file_of_whole_videos_alone_is_plotted() -> None:
    cell = replace(ONE, engine="helios_serve on Ray")
    points = [replace(point(replace(cell, ranks=ranks), 10.0 * ranks), dit_fps=None) for ranks in (1, 2)]
    picture = scaling_plot(merged(None, ABOUT, "a", points))
    assert "frames per second of whole videos" in picture
    assert len(ElementTree.fromstring(picture).findall(".//{http://www.w3.org/2000/svg}circle")) == 2


def test_settings_of_a_cluster_are_read_by_name() -> None:
    found = cluster_of(["num_dit_groups=2", "ulysses=auto", "gpus_per_rank=0.5", "symmetric_memory=true"])
    assert (found.num_dit_groups, found.ulysses, found.gpus_per_rank) == (2, "auto", 0.5)
    assert found.symmetric_memory
    for setting, said in (
        ("groups=2", "there are num_encoders"),
        ("num_vaes=x", "no value"),
        ("num_vaes=0", "least 1"),
    ):
        with pytest.raises(InvalidRequestError, match=said):
            cluster_of([setting])


SMALL = ("--size", "64x64", "--steps", "1,1,1", "--chunks", "2", "--warmup", "1", "--repeat", "1", "--device", "cpu")


def throughput(model: Path, out: Path, *flags: str) -> tuple[dict[str, Any], str]:
    """The result and what was printed."""
    command = ["throughput", "--model", str(model), *SMALL, "--out", str(out), *flags]
    ran = CliRunner().invoke(bench_app, command, catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    result: dict[str, Any] = json.loads(out.read_text())
    return result, ran.output


def test_batches_of_the_tiny_checkpoint(tiny_distilled: Path, tmp_path: Path) -> None:
    out = tmp_path / "throughput.json"
    result, said = throughput(tiny_distilled, out, "--batch", "1,2")
    assert [one["cell"]["batch"] for one in result["points"]] == [1, 2]
    for one in result["points"]:
        assert one["cell"]["ranks"] == 1
        assert one["dit_fps"][0] > one["fps"][0] > 0
        assert one["num_chunks"] == 1
    assert "helios_serve" in said
    ElementTree.parse(out.with_suffix(".svg"))
    out.write_text("{}")
    with pytest.raises(InvalidRequestError, match="no result of this command"):
        throughput(tiny_distilled, out)


def test_streams_of_a_batch_are_the_videos_that_they_are_alone(tiny_distilled: Path) -> None:
    """What is timed is what a caller gets."""
    engine = RankEngine(ModelConfig(model=str(tiny_distilled)))
    requests = engine.requests(Workload(num_chunks=2, batch=2, size="64x64", steps=(1, 1, 1)))
    made: dict[str, list[Any]] = {}
    engine.run(requests, on_output=lambda name, latents: made.setdefault(name, []).append(latents), decodes=False)
    alone = Helios(tiny_distilled)
    for request in requests:
        for chunk in alone.run(request):
            error = (made[request.request_id][chunk.index] - chunk.latents).abs().max()
            assert error <= 2e-4


def test_diffusers_makes_the_same_video_for_comparison(tiny_distilled: Path, tmp_path: Path) -> None:
    result, _ = throughput(tiny_distilled, tmp_path / "throughput.json", "--compare", "diffusers")
    (rival,) = [one for one in result["points"] if one["cell"]["engine"].startswith("diffusers ")]
    assert rival["video_fps"][0] > 0
    assert rival["dit_fps"] is None


def test_every_chunk_cannot_be_warm_up(tiny_distilled: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="must leave one of 2 chunks"):
        throughput(tiny_distilled, tmp_path / "a.json", "--warmup", "2")
    with pytest.raises(InvalidRequestError, match="batch 0: must be whole numbers from 1"):
        throughput(tiny_distilled, tmp_path / "a.json", "--batch", "0")


@pytest.mark.ray
@pytest.mark.xdist_group("ray")
@pytest.mark.timeout(400)
def test_on_a_cluster_whole_videos_are_timed(tiny_distilled: Path, tmp_path: Path) -> None:
    """Two DiT groups share three videos; the plot has their point."""
    out = tmp_path / "cluster.json"
    ray = [part for setting in ("num_dit_groups=2", "object_store_bytes=200000000") for part in ("--ray", setting)]
    asked = ["throughput", "--model", str(tiny_distilled), *SMALL, "--batch", "3", *ray, "--out", str(out)]
    answer = CliRunner().invoke(bench_app, asked)
    assert answer.exit_code == 0, answer.output
    (made,) = json.loads(out.read_text())["points"]
    assert made["cell"] == {
        "engine": "helios_serve on Ray",
        "ranks": 2,
        "degrees": "num_dit_groups 2",
        "batch": 3,
        "precision": "float32",
    }
    assert made["video_fps"][0] > 0
    assert made["dit_fps"] is None
    assert out.with_suffix(".svg").is_file()
