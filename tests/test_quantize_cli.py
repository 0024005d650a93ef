"""`helios-serve quantize` as a user types it."""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path

import pytest

from helios_serve import cli
from helios_serve.model_executor.quantize import NUM_EDGE_BLOCKS
from helios_serve.quantize_cli import quantize


def _run(
    *arguments: object, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str, str]:
    """Status, and what was printed: results, then errors and logs."""
    monkeypatch.setattr(sys, "argv", ["helios-serve", "quantize", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, printed.out, printed.err


def test_a_checkpoint_is_written_in_fp8(
    tiny_distilled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "fp8"
    status, printed, _ = _run(tiny_distilled, out, "--edge-blocks", 1, capsys=capsys, monkeypatch=monkeypatch)
    assert (status, printed) == (0, f"wrote {tiny_distilled} with its transformer in FP8 to {out}\n")
    assert json.loads((out / "transformer" / "config.json").read_text())["fp8_edge_blocks"] == 1
    assert {path.name for path in out.iterdir()} == {path.name for path in tiny_distilled.iterdir()}


def test_what_cannot_be_done_is_one_line(
    tiny_distilled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments, expected in (
        ((tiny_distilled, tmp_path / "new"), "error: .*nothing would be quantised\n"),
        ((tiny_distilled, tmp_path), "error: .*exists; name a directory that does not\n"),
        ((tmp_path / "absent", tmp_path / "new"), "error: .*absent.*\n"),
    ):
        status, printed, complaint = _run(*arguments, capsys=capsys, monkeypatch=monkeypatch)
        assert (status, printed) == (2, "")
        assert re.fullmatch(expected, complaint), complaint
    assert not (tmp_path / "new").exists()


def test_default_is_the_one_of_the_library() -> None:
    assert inspect.signature(quantize).parameters["edge_blocks"].default == NUM_EDGE_BLOCKS
