"""What the tuner of attention makes of its timings; the timings themselves need a GPU."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from helios_serve.kernels import tune_attention
from helios_serve.kernels.attention.triton_attention import CANDIDATES, Tiles
from helios_serve.kernels.tune_attention import Timing, report, tables_of


def _timing(name: str, lengths: tuple[int, ...], milliseconds: float, tiles: Tiles | None = None) -> Timing:
    return Timing(name=name, lengths=lengths, tiles=tiles, milliseconds=milliseconds)


TIMINGS = (
    _timing("cudnn", (2940,), 0.31),
    _timing("fa3", (2940,), 0.32),
    _timing("flash", (2940,), 0.1),  # and never again: time was over
    _timing("cudnn", (11040,), 4.4),
    _timing("fa3", (11040,), 4.1),
    _timing("fa3", (2940, 2940), 0.6),
    _timing("cudnn", (2940, 2940), 0.7),
    _timing("triton", (2940,), 0.5, CANDIDATES[0]),
    _timing("triton", (2940,), 0.4, CANDIDATES[2]),
)


def test_tables_put_the_fastest_first() -> None:
    assert tables_of(TIMINGS) == {
        "attention": {"dense": ["fa3", "cudnn"], "packed": ["fa3", "cudnn"]},
        "attention_tiles": {"128": asdict(CANDIDATES[2])},
    }
    assert tables_of(()) == {}


def test_report_has_a_line_for_each_timing() -> None:
    lines = report(TIMINGS).splitlines()
    assert len(lines) == len(TIMINGS)
    assert lines[3].split() == ["cudnn", "11040", "4.400", "ms", "567", "TFLOP/s"]
    assert lines[7].endswith("128x128 8w 2s")


def test_command_needs_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["tune_attention"])
    monkeypatch.setattr(tune_attention.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="sees no CUDA device"):
        tune_attention.main()
