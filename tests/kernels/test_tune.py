"""The tuner's tables name what is launched, and its choice is the fastest; no time is measured here."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from helios_serve.kernels import launch, tune
from helios_serve.kernels.cases_transformer import CASES
from helios_serve.kernels.launch import RowPlan, candidate_plans
from helios_serve.kernels.tune import OPERATORS, Timing, best_plans, report

CPU = torch.device("cpu")
pytest.importorskip("triton", reason="the kernels run in Triton's interpreter, and Triton is not installed")


class _Keys(dict[str, Any]):
    """A table that is empty and remembers what was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return default


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_key_is_what_the_operator_is_launched_with(operator: tune.Tuned, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = _Keys()
    monkeypatch.setattr(launch, "tuned", lambda _table, _device: keys)
    (case,) = (case for case in CASES if case.name == operator.name)
    case.launch(*case.inputs(case.few[0], torch.bfloat16))
    assert keys.asked == {operator.key}


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_shapes_are_those_of_the_three_stages(operator: tune.Tuned) -> None:
    (case,) = (case for case in CASES if case.name == operator.name)
    width = int(operator.key.partition("/")[2])
    rows = [operator.touched(shape) / width for shape in tune._shapes(case)]
    assert rows in ([2940, 4560, 11040], [540, 2160, 8640])


def _timing(shape: tuple[int, ...], plan: RowPlan, share: float) -> Timing:
    return Timing(
        name="rms_norm",
        key="norm_rope_kernel/5120",
        shape=shape,
        block=plan.block,
        num_warps=plan.num_warps,
        microseconds=10.0,
        share=share,
    )


def test_best_plan_is_the_fastest_over_all_shapes() -> None:
    one, other, third, *_ = candidate_plans(5120)
    timings = [
        _timing((540, 5120), one, 0.9),
        _timing((8640, 5120), one, 0.4),
        _timing((540, 5120), other, 0.7),
        _timing((8640, 5120), other, 0.6),
        _timing((540, 5120), third, 0.95),  # time ran out before its second shape
    ]
    assert best_plans(timings) == {"norm_rope_kernel/5120": other}
    lines = report(3e12, timings).splitlines()
    assert lines[0] == "copy 3.00 TB/s"
    assert len(lines) == 3
    assert f"best {other.block}x{other.num_warps}w" in lines[1]


def test_without_a_device_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["tune"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        tune.main()


def test_every_plan_of_every_operator_is_tried_until_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[RowPlan] = []

    def replayed(call: Any, num_launches: int) -> float:
        call()
        tried.append(RowPlan(**launch.tuned("rows", CPU)["quantize_rows_kernel/5120"]))
        return 1e-3

    monkeypatch.setattr(tune, "_replayed", replayed)
    monkeypatch.setattr(tune, "_shapes", lambda case: [case.few[0]])
    monkeypatch.setattr(tune, "_compile_in_processes", lambda *_: None)
    monkeypatch.setattr(tune, "copy_bandwidth", lambda _device: 3e12)
    monkeypatch.setattr(tune, "NUM_LAUNCHES", 1)
    monkeypatch.setattr(tune, "OPERATORS", [one for one in OPERATORS if one.name == "quantize_rows"])
    bandwidth, timings = tune.measure(CPU, time.monotonic() + 60)
    assert bandwidth == 3e12
    assert tried == [*candidate_plans(5120)]
    assert [(one.block, one.num_warps) for one in timings] == [(plan.block, plan.num_warps) for plan in tried]
    assert timings[0].share == round(3 * 5120 / 1e-3 / 3e12, 4)
    assert tune.measure(CPU, time.monotonic()) == (3e12, [])
