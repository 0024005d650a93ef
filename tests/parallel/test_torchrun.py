"""Ranks that torchrun has started make the videos of one process; without it a process is alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helios_serve.parallel.collectives import RankGroup, connect_torchrun
from helios_serve.parallel.mesh import SOLO
from tests.conftest import MakeCheckpoint
from tests.parallel.test_sharded_videos import CASES, assert_same, make_videos

CASE = "guided-2"


def test_ranks_of_torchrun_make_the_same_videos(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint, file = make_checkpoint(CASES[CASE].variant), tmp_path / "made.pt"
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *("-m", "tests.parallel.under_torchrun", str(checkpoint), CASE, str(file)),
        ],
        check=True,
        cwd=Path(__file__).parents[2],
        timeout=200,
    )
    found = torch.load(file)
    assert (found["ranks"], found["ranks_per_node"]) == (2, 2)
    assert_same(found["made"], make_videos(checkpoint, CASES[CASE], SOLO))


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert connect_torchrun() == RankGroup()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert connect_torchrun() == RankGroup()
