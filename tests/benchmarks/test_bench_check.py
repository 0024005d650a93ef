"""The regression check: verdicts, the command, and three regressions that are planted and must be seen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import check, engine_load, paired
from benchmarks.check_counts import model_figures, wire_figures
from benchmarks.check_figures import Before, Figure, Verdict, compare, read_baseline, values_of, write_baseline
from benchmarks.check_process import ROOT, import_figures
from helios_serve.engine.engine import Engine
from helios_serve.model_executor import layers
from helios_serve.parallel.context_parallel import attend_sharded
from helios_serve.parallel.mesh import Degrees

BASELINE = read_baseline(check.BASELINE)
EIGHT = Degrees(ulysses=8)


def verdicts_on(figures: list[Figure]) -> dict[str, Verdict]:
    """Against the committed baseline."""
    return {verdict.name: verdict for verdict in compare(figures, values_of(BASELINE), [])}


def rose(figures: list[Figure]) -> set[str]:
    return {name for name, verdict in verdicts_on(figures).items() if verdict.state == "rose"}


def test_the_committed_baseline_is_what_the_model_costs() -> None:
    states = {verdict.state for verdict in verdicts_on(model_figures([0])).values()}
    assert states == {"same"}


def test_an_extra_elementwise_pass_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = layers.Block.feed

    def with_a_pass(self: layers.Block, stream: layers.Stream, attended: torch.Tensor, *rest: Any) -> torch.Tensor:
        return plain(self, stream, attended * 1.0, *rest)

    monkeypatch.setattr(layers.Block, "feed", with_a_pass)
    assert rose(model_figures([0])) == {"model/stage0/launches", "model/stage0/elementwise"}


def test_one_more_product_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = layers.FeedForward.up

    def twice(self: layers.FeedForward, *arguments: Any) -> Any:
        plain(self, *arguments)
        return plain(self, *arguments)

    monkeypatch.setattr(layers.FeedForward, "up", twice)
    assert "model/stage0/flops" in rose(model_figures([0]))


def test_an_extra_exchange_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rose(wire_figures([EIGHT])) == set()

    def with_an_exchange(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Any) -> torch.Tensor:
        size = segments.mesh.ulysses.size
        segments.mesh.ulysses.all_to_all(k.new_empty((size, len(k) // size, *k.shape[1:])))
        return attend_sharded(q, k, v, segments)

    monkeypatch.setattr("helios_serve.model_executor.layers.attend_sharded", with_an_exchange)
    assert rose(wire_figures([EIGHT])) == {"wire/ring1_ulysses8/bytes", "wire/ring1_ulysses8/exchanges"}


@pytest.fixture
def copy_of_the_package(tmp_path: Path) -> Path:
    ignored = shutil.ignore_patterns("__pycache__", "*.md", "playground", "tests")
    shutil.copytree(ROOT / "helios_serve", tmp_path / "helios_serve", ignore=ignored)
    return tmp_path


def test_a_heavy_import_is_seen(copy_of_the_package: Path) -> None:
    quick: dict[str, Any] = {"repeats": 1, "counts_instructions": False, "entries": ["helios_serve.cli"]}
    names = {"import/helios_serve.cli/modules", "import/helios_serve.cli/heavy"}
    assert not rose(import_figures(copy_of_the_package, **quick)) & names
    with (copy_of_the_package / "helios_serve" / "errors.py").open("a") as file:
        file.write("\nimport numpy\n")
    assert rose(import_figures(copy_of_the_package, **quick)) >= names


def test_a_slower_plan_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytecodes are nearly equal at each run, so that more than the margin of the check is not taken for noise."""
    counted = [engine_load.decision_bytecodes(8, 1, num_steps=20) for _ in range(2)]
    assert counted[0] == pytest.approx(counted[1], rel=1e-3)
    plain = Engine.turn

    def slower(self: Engine, now: float) -> None:
        for _ in self._runs.all:
            self._runs.get("nobody")
        plain(self, now)

    monkeypatch.setattr(Engine, "turn", slower)
    assert engine_load.decision_bytecodes(8, 1, num_steps=20) > 1.03 * counted[0] > 0


def figure(name: str, value: float, *, margin: float = 0.0, slack: float = 0.0) -> Figure:
    return Figure(name=name, value=value, unit="B", margin=margin, slack=slack)


@pytest.mark.parametrize(
    ("before", "now", "margins", "state"),
    [
        (100.0, 100.0, {}, "same"),
        (100.0, 101.0, {}, "rose"),
        (100.0, 99.0, {}, "fell"),
        (100.0, 104.9, {"margin": 0.05}, "within"),
        (100.0, 105.1, {"margin": 0.05}, "rose"),
        (0.0, 0.4, {"slack": 0.5}, "within"),
        (0.0, 0.6, {"slack": 0.5}, "rose"),
        (None, 5.0, {}, "new"),
    ],
)
def test_verdicts(before: float | None, now: float, margins: dict[str, float], state: str) -> None:
    known = {} if before is None else {"a/b": Before(value=before)}
    (verdict,) = compare([figure("a/b", now, **margins)], known, ["a"])
    assert verdict.state == state
    assert verdict.is_bad == (state == "rose")


def test_a_figure_that_nobody_makes_any_more_is_bad_in_its_section_alone() -> None:
    known = {name: Before(value=1.0) for name in ("a/b", "c/d")} | {"a/tool": Before(value=1.0, needs="no-such-tool")}
    verdicts = compare([figure("a/x", 1.0)], known, ["a"])
    states = {verdict.name: verdict.state for verdict in verdicts}
    assert states == {"a/x": "new", "a/b": "gone", "a/tool": "not here"}
    assert [verdict.name for verdict in verdicts if verdict.is_bad] == ["a/b"]


def test_an_update_keeps_other_sections(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    write_baseline(path, [figure("a/b", 3.0), figure("c/d", 123456789.0)], {"python": "3"}, ["a", "c"])
    write_baseline(path, [figure("a/b", 4.25)], {"python": "4"}, ["a"])
    content = json.loads(path.read_text())
    assert values_of(content) == {"a/b": Before(value=4.25), "c/d": Before(value=123456789)}
    assert content["environment"] == {"python": "4"}
    path.write_text('{"format": 7}')
    with pytest.raises(ValueError, match="is of format 7"):
        read_baseline(path)


def test_the_command_fails_and_is_satisfied_by_an_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = [figure("vae/decode/launches", 113.0)]
    monkeypatch.setattr("benchmarks.check_counts.vae_figures", lambda: figures)
    command = ["--only", "vae", "--baseline", str(tmp_path / "baseline.json")]
    assert check.main([*command, "--update"]) == 0
    assert check.main(command) == 0
    figures[0] = figure("vae/decode/launches", 114.0)
    assert check.main(command) == 1
    assert "rose from 113 to 114 B, at most 113 is allowed" in capsys.readouterr().out
    assert check.main([*command, "--update"]) == 0
    assert check.main(command) == 0


def test_every_section_of_the_baseline_is_checked() -> None:
    assert {name.partition("/")[0] for name in values_of(BASELINE)} == set(check.SECTIONS)


def test_spreads() -> None:
    found = paired.spread([3.0, 1.0, 2.0, 10.0])
    assert (found.median, found.lowest, found.highest) == (2.5, 1.0, 10.0)
    assert found.quantile(0.5) == 2.5
    assert found.quantile(1.0) == 10.0


def test_the_yardstick_is_what_it_was() -> None:
    """Ratios of the baseline mean nothing with another one."""
    assert paired.yardstick() == 10_073_863
