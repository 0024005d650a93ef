"""The table of what approximations do to quality, and the moving picture of the README."""

from __future__ import annotations

import sys
from pathlib import Path

import av
import pytest
import torch
from PIL import Image

from benchmarks import quality
from helios_serve.config import ModelConfig
from helios_serve.offline import Helios
from tools.tiny_checkpoint import evaluate, picture


def test_every_row_of_the_table_is_run_as_it_says(barely_trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "LONG_CHUNKS", 2)
    asked: list[ModelConfig] = []
    configured = Helios.configured
    monkeypatch.setattr(Helios, "configured", lambda config: asked.append(config) or configured(config))
    rows = [row for row in quality.ROWS if row.fp8_edge_blocks is None]  # two blocks are too few for FP8
    table = quality.render(1, 1, rows, barely_trained)
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {row.name}" for row in rows]
    assert all(line.count("%") == 5 for line in lines[2:])
    assert [config.approximations for config in asked] == [row.settings.get("approximations", ()) for row in rows]
    assert {(config.dtype, config.attention_precision) for config in asked} == {
        ("float32", None),
        ("bfloat16", None),
        ("float32", "fp8"),
    }


@pytest.mark.parametrize("row", [row for row in quality.ROWS if row.bug is not None], ids=lambda row: row.name)
def test_a_planted_bug_changes_the_video(barely_trained: Path, row: quality.Row) -> None:
    """Of the second chunk at least: the first one has no history to be wrong about."""
    made = []
    for each in (quality.Row(name="float32"), row):
        chunks = quality._helios(each, barely_trained).generate("a red circle", num_frames=66)
        made.append([chunk.latents for chunk in chunks][-1])
    assert not torch.equal(*made)


def test_a_moving_picture_has_the_frames_of_its_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video, out = tmp_path / "video.mp4", tmp_path / "video.gif"
    with av.open(video, "w") as container:
        stream = container.add_stream("h264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
        for shade in (0, 120, 240):
            frame = av.VideoFrame.from_image(Image.new("RGB", (128, 64), (shade, 0, 0)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    monkeypatch.setattr(sys, "argv", ["picture", str(video), str(out)])
    picture.main()
    with Image.open(out) as made:
        assert (made.size, made.n_frames, made.info["duration"]) == ((384, 192), 3, 40)
