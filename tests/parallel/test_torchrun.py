"""Ranks that torchrun has started make the videos of one process, and the offline benchmark shares its VAE among them;
without torchrun a process is alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helios_serve.config import ModelConfig
from helios_serve.model_executor.model import load_vae, open_checkpoint
from helios_serve.parallel.collectives import RankGroup, connect_torchrun
from helios_serve.parallel.mesh import SOLO
from helios_serve.workers.vae import VaeWorker
from tests.conftest import MakeCheckpoint
from tests.parallel.test_sharded_videos import CASES, assert_same, make_videos

CASE = "guided-2"


def on_two_ranks(module: str, *arguments: str) -> None:
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    subprocess.run([*launch, "-m", module, *arguments], check=True, cwd=Path(__file__).parents[2], timeout=200)


def test_ranks_of_torchrun_make_the_same_videos(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint, file = make_checkpoint(CASES[CASE].variant), tmp_path / "made.pt"
    on_two_ranks("tests.parallel.under_torchrun", str(checkpoint), CASE, str(file))
    found = torch.load(file)
    assert (found["ranks"], found["ranks_per_node"]) == (2, 2)
    assert_same(found["made"], make_videos(checkpoint, CASES[CASE], SOLO))


def test_the_offline_benchmark_decodes_on_all_ranks(tiny_distilled: Path, tmp_path: Path) -> None:
    """Its figures hold what one rank decodes of each chunk, and rank 0 makes the segments of whole pictures."""
    file = tmp_path / "kept.pt"
    on_two_ranks("tests.parallel.bench_under_torchrun", str(tiny_distilled), str(file))
    found = torch.load(file)
    alone = VaeWorker(load_vae(open_checkpoint(ModelConfig(model=str(tiny_distilled)))))
    assert len(found["kept"]) == 2
    for latents, pixels in found["kept"]:
        assert (pixels - alone.decode(latents)).abs().max() < 1e-5
    assert found["own_columns"] == [32, 32]  # of 64
    assert min(found["mux_s"]) > 0


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert connect_torchrun() == RankGroup()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert connect_torchrun() == RankGroup()
