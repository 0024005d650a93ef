"""Processes that train together do what one process does with all of their examples."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch

from tools.tiny_checkpoint.team import ALONE, Team, run_team

DEVIATIONS = ([1.0, 4.0], [3.0, -2.0])


def _work(folder: Path, team: Team) -> None:
    weight, unused = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))
    (weight * torch.tensor(DEVIATIONS[team.rank])).sum().backward()
    team.average_gradients([weight, unused])
    assert weight.grad is not None
    found = {"gradient": weight.grad.tolist(), "share": team.agree(0.25 + team.rank), "unused": unused.grad is None}
    (folder / f"{team.rank}.json").write_text(json.dumps(found), encoding="utf-8")


def test_gradients_are_averaged_and_decisions_are_the_first_process_s(tmp_path: Path) -> None:
    run_team(2, partial(_work, tmp_path))
    found = [json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    assert found == [{"gradient": [2.0, 1.0], "share": 0.25, "unused": True}] * 2


def test_one_process_alone_needs_no_group(tmp_path: Path) -> None:
    _work(tmp_path, ALONE)
    assert json.loads((tmp_path / "0.json").read_text(encoding="utf-8"))["gradient"] == DEVIATIONS[0]
