"""`python -m benchmarks.gpu --rehearse`: everything runs, what it leaves behind is complete, and what may not be kept
or shown is refused."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from benchmarks import environment, gpu, outcome, plots, report
from benchmarks.environment import Source
from benchmarks.outcome import GateOutcome, RefusedError, Result
from benchmarks.plan import Bench, Check, Gate, Measurement, Section, UnavailableError, single
from helios_serve.kernels import cases
from helios_serve.kernels.op_case import OpCase

_ABSENT_HERE = ("unavailable", "failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rehearsal:
    code: int
    output: str
    path: Path

    @property
    def data(self) -> dict[str, Any]:
        data: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        return data


def _rehearse(folder: Path, *flags: str) -> _Rehearsal:
    printed = StringIO()
    with redirect_stdout(printed):
        code = gpu.main(["--rehearse", "--out", str(folder), *flags])
    return _Rehearsal(code=code, output=printed.getvalue(), path=folder / "result.json")


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> _Rehearsal:
    """All gates and all sections, once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OUT", raising=False)
        return _rehearse(tmp_path_factory.mktemp("rehearsal"))


def test_everything_runs(rehearsal: _Rehearsal) -> None:
    sections = {section["name"]: section for section in rehearsal.data["sections"]}
    assert rehearsal.code == 0, rehearsal.output
    assert list(sections) == [section.name for section in gpu.sections()]
    bad = {name: section["reason"] for name, section in sections.items() if section["status"] != "measured"}
    assert not {name: reason for name, reason in bad.items() if "diffusers" not in reason}


def test_file_is_complete(rehearsal: _Rehearsal) -> None:
    data = rehearsal.data
    needed = {"benchmark", "commit", "dirty", "date", "device", "count", "versions", "workload", "options", "gate"}
    assert needed <= data.keys()
    assert data["rehearsal"] is True
    assert data["gate"] == "green"
    assert data["workload"]["transformer"]["num_layers"] == 3
    assert [gate["name"] for gate in data["gates"]] == [gate.name for gate in gpu.gates()]
    measured = [one for section in data["sections"] for one in section["measurements"]]
    assert len({one["name"] for one in measured}) == len(measured)
    for one in measured:
        assert one["count"] == len(one["samples"]) > 0, one["name"]
        assert all(math.isfinite(value) for value in one["samples"]), one["name"]
        assert one["p10"] <= one["median"] <= one["p90"], one["name"]


def test_file_is_read_back(rehearsal: _Rehearsal, tmp_path: Path) -> None:
    first = outcome.read(rehearsal.path)
    assert outcome.read(outcome.write(first, tmp_path / "again.json")) == first
    assert len(first.measurements) == sum(len(section["measurements"]) for section in rehearsal.data["sections"])


def test_table_names_everything_and_judges_nothing(rehearsal: _Rehearsal) -> None:
    assert "REHEARSAL" in rehearsal.output
    assert "met" not in rehearsal.output.partition("REHEARSAL")[2]
    for one in outcome.read(rehearsal.path).measurements:
        name = one.name.removeprefix("micro/")
        kind = name.rpartition("/")[0] or name if name != one.name else name
        assert kind in rehearsal.output, one.name


def test_rehearsal_is_refused(rehearsal: _Rehearsal, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="it is a rehearsal"):
        outcome.save(outcome.read(rehearsal.path), tmp_path)
    assert not list(tmp_path.iterdir())
    outcome.write(outcome.read(rehearsal.path), tmp_path / "2026-01-01_all_gpu_0.json")
    with pytest.raises(RefusedError, match="it is a rehearsal"):
        report.page(tmp_path)


def _good() -> Result:
    """What may be kept."""
    versions = {"torch": "2.11.0", "triton": "3.6.0", "cuda": "13.0", "cudnn": "91200"}
    measured = outcome.SectionOutcome(
        name="forwards",
        status="measured",
        reason="",
        seconds=1.0,
        clocks={"sm_mhz": [1500.0, 1600.0, 1980.0], "power_w": [300.0, 600.0, 700.0]},
        notes={},
        measurements=(
            single("dit/forward_ms/stage0", "ms", 120.0, gate=125.0, goal=115.0, limit=86.1),
            single("micro/gemm/qkv/S2940", "TFLOP/s", 600.0, is_better_high=True),
        ),
    )
    gate = GateOutcome(name="a", checks=(Check(name="b", error=0.0, bound=1.0),), reason="", seconds=0.1)
    return Result(
        name="all",
        date="2026-11-27T03:00:00+00:00",
        rehearsal=False,
        source=Source(commit="0123456789abcdef", dirty=False, tree_sha256="0"),
        environment={"device": "NVIDIA H100 80GB HBM3", "count": 1, "driver": "580.1", "versions": versions},
        workload={},
        options={},
        num_gates=1,
        gates=[gate],
        sections=[measured],
    )


_SPOILED: dict[str, Callable[[Result], Result]] = {
    "it is a rehearsal": lambda good: replace(good, rehearsal=True),
    "changes that the commit lacks": lambda good: replace(good, source=replace(good.source, dirty=True)),
    "the commit is not known": lambda good: replace(good, source=replace(good.source, commit=None, dirty=None)),
    "the gate a is red": lambda good: replace(
        good, gates=[replace(good.gates[0], checks=(Check(name="b", error=math.nan, bound=1.0),))]
    ),
    "0 of 1 gates ran": lambda good: replace(good, gates=[]),
    "the version of cudnn is missing": lambda good: replace(
        good, environment={**good.environment, "versions": {**good.environment["versions"], "cudnn": "absent"}}
    ),
}


@pytest.mark.parametrize("reason", _SPOILED)
def test_each_flaw_alone_is_refused(reason: str, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=reason):
        outcome.save(_SPOILED[reason](_good()), tmp_path)


def test_good_result_is_kept_and_shown(tmp_path: Path) -> None:
    path = outcome.save(_good(), tmp_path)
    assert path.name == "2026-11-27_all_nvidia-h100-80gb-hbm3_0123456789ab.json"
    page = report.page(tmp_path)
    assert "| dit/forward_ms/stage0 | ms | 120 |  | 1 | 125 | 115 | 86.1 | gate met |" in page
    assert "SM clock 1500 to 1980 MHz, power up to 700 W." in page
    assert "| forward, stage 0 | ms | 120 | 115 | 86.1 |" in report.readme_block(tmp_path)
    assert "micro" not in report.readme_block(tmp_path)


def test_result_from_elsewhere_must_be_of_this_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    brought = outcome.write(_good(), tmp_path / "result.json")
    results = tmp_path / "results"
    for here in (Source(commit="0123456789abcdef", dirty=False, tree_sha256="1"), replace(_good().source, dirty=True)):
        monkeypatch.setattr(outcome, "source", lambda here=here: here)
        with pytest.raises(RefusedError, match="this tree is not that of commit 0123456789abcdef"):
            outcome.keep(brought, results)
    monkeypatch.setattr(outcome, "source", lambda: _good().source)
    assert outcome.read(outcome.keep(brought, results)) == _good()


def test_pictures_are_well_formed(rehearsal: _Rehearsal) -> None:
    result = outcome.read(rehearsal.path)
    parts = single("dit/forward_kernel_ms/stage0", "ms", 3.0, details={"ms_by_kind": {"gemm": 2.0, "<other>": 1.0}})
    result.sections[0] = replace(result.sections[0], measurements=(*result.sections[0].measurements, parts))
    pictures = dict(plots.pictures(result))
    assert pictures.keys() == {"roofline", "parts"}
    for picture in pictures.values():
        assert ElementTree.fromstring(picture).tag.endswith("svg")
    assert "&lt;other&gt;: 1 ms" in pictures["parts"]


def test_page_without_results_says_so(tmp_path: Path) -> None:
    assert "There is no result yet." in report.page(tmp_path)


def test_wrong_kernel_turns_the_gate_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OUT", raising=False)
    kernels = gpu.gates()[0]
    monkeypatch.setattr(gpu, "gates", lambda: (kernels,))
    monkeypatch.setattr(cases, "CASES", tuple(map(_wrong, cases.CASES)))
    found = _rehearse(tmp_path)
    assert found.code == 1
    assert "RED kernels: kernel/layer_norm_modulate/" in found.output
    assert "No number is shown" in found.output
    assert found.data["sections"] == []
    assert found.data["gate"] == "red"


def _wrong(case: OpCase) -> OpCase:
    """As if one value of one kernel were off."""
    if case.name != "layer_norm_modulate":
        return case

    def run(*arguments: Any) -> torch.Tensor:
        out: torch.Tensor = case.operator(*arguments)
        out[-1, -1] += 8
        return out

    return replace(case, operator=run)


def _few(monkeypatch: pytest.MonkeyPatch, *sections: Section, error: float = 0.0) -> list[str]:
    """Runs these sections behind one gate; returns the list of what ran."""
    ran: list[str] = []

    def gate(_: Bench) -> list[Check]:
        ran.append("gate")
        return [Check(name="check", error=error, bound=0.5)]

    monkeypatch.delenv("OUT", raising=False)
    monkeypatch.setattr(gpu, "gates", lambda: (Gate(name="gate", expected_s=1, run=gate),))
    monkeypatch.setattr(gpu, "sections", lambda: sections)
    return ran


def _section(name: str, run: Callable[[Bench], list[Measurement]]) -> Section:
    return Section(name=name, value_rank=10, expected_s=1, run=run)


def _measured(_: Bench) -> list[Measurement]:
    return [single("a", "ms", 4711.0)]


def _failing(_: Bench) -> list[Measurement]:
    raise RuntimeError("no kernel image")


def _unavailable(_: Bench) -> list[Measurement]:
    raise UnavailableError("diffusers is not installed")


def test_sections_fail_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _few(monkeypatch, _section("x", _failing), _section("y", _unavailable), _section("z", _measured))
    found = _rehearse(tmp_path)
    assert found.code == 0
    assert [section["status"] for section in found.data["sections"]] == ["failed", "unavailable", "measured"]
    assert "failed: x: RuntimeError: no kernel image" in found.output
    assert "unavailable: y: diffusers is not installed" in found.output
    assert "4711" in found.output


def test_red_gate_can_be_passed_without_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _few(monkeypatch, _section("z", _measured), error=0.6)
    found = _rehearse(tmp_path, "--past-red-gate")
    assert found.code == 1
    assert "4711" not in found.output
    assert found.data["gate"] == "red"
    assert found.data["sections"][0]["measurements"][0]["median"] == 4711


def test_only_what_is_named_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = _few(monkeypatch, _section("micro/x", _failing), _section("model", _measured))
    found = _rehearse(tmp_path, "--only", "mod")
    assert ran == ["gate"]
    assert [section["name"] for section in found.data["sections"]] == ["model"]


def test_what_is_named_runs_in_that_order_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _few(monkeypatch, *(_section(name, _measured) for name in ("model", "micro/x", "micro/y", "left_out")))
    found = _rehearse(tmp_path, "--only", "micro/y", "mo", "micro")
    assert [section["name"] for section in found.data["sections"]] == ["micro/y", "model", "micro/x"]


def test_lost_device_goes_on_in_a_new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the section that lost it, with what was measured until then."""
    ran = _few(monkeypatch, _section("z", _measured), _section("last", _measured))
    commands: list[list[str]] = []

    class _Replaced(BaseException):
        """As the process is."""

    def replace_process(_: str, command: list[str]) -> None:
        commands.append(command)
        raise _Replaced

    with monkeypatch.context() as patch:
        patch.setattr(gpu, "is_lost", lambda _: len(outcome.read(tmp_path / "result.json").sections) == 1)
        patch.setattr(os, "execv", replace_process)
        with pytest.raises(_Replaced):
            _rehearse(tmp_path)
    flags = commands[0][3:]
    assert commands[0][1:3] == ["-m", "benchmarks.gpu"]
    with redirect_stdout(StringIO()):
        assert gpu.main(flags) == 0
    assert ran == ["gate"]
    assert [section.name for section in outcome.read(tmp_path / "result.json").sections] == ["z", "last"]


def test_sections_without_time_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = gpu._bench(gpu._parser().parse_args(["--budget-s", "0.5"]), torch.device("cpu"), 0.0)
    cut = gpu._measured(_section("z", _measured), bench)
    assert cut.status == "cut"
    assert cut.measurements == ()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_says_what_is_missing_without_a_device() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu"]
    done = subprocess.run(command, cwd=environment.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "No CUDA device" in done.stderr


def test_dirty_tree_is_refused_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = _few(monkeypatch, _section("z", _measured))
    dirty = replace(_good(), source=Source(commit="0", dirty=True, tree_sha256="0"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "_new_result", lambda *_: dirty)
    monkeypatch.setattr(gpu, "_bench", lambda *_: None)
    assert gpu.main(["--out", str(tmp_path)]) == 3
    assert ran == []


_BARE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"av", "diffusers", "fastapi", "ftfy", "httpx2", "pydantic", "sqlalchemy", "grpc"}:
            raise ImportError(f"{name} is not on a bare machine")

sys.meta_path.insert(0, Absent())
from benchmarks import gpu, report
assert gpu.gates() and gpu.sections()
"""


def test_imports_on_a_bare_machine() -> None:
    """PyTorch, Triton and numpy are enough."""
    command = [sys.executable, "-c", _BARE]
    done = subprocess.run(command, cwd=environment.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
