"""Processes that train together do what one process does with all of their examples."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
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


def _sleep(folder: Path, team: Team) -> None:
    (folder / f"{team.rank}.pid").write_text(str(os.getpid()), encoding="utf-8")
    time.sleep(120)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
def test_members_end_with_a_parent_that_a_shell_started_in_the_background(tmp_path: Path) -> None:
    """Such a parent, and so its members, begins with interrupts ignored."""
    code = f"from tests.quality import test_team as t; t.run_team(2, t.partial(t._sleep, t.Path({str(tmp_path)!r})))"
    code = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); {code}"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    files = [tmp_path / f"{rank}.pid" for rank in range(2)]
    _wait_until(lambda: all(file.is_file() and file.read_text() for file in files), limit_s=40)
    parent.kill()
    parent.wait()
    try:
        _wait_until(lambda: not any(_is_alive(int(file.read_text())) for file in files), limit_s=20)
    finally:
        for file in files:
            if _is_alive(int(file.read_text())):
                os.kill(int(file.read_text()), signal.SIGKILL)


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def _wait_until(is_so: Callable[[], bool], limit_s: float) -> None:
    end = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.05)
