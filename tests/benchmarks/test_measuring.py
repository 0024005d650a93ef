"""How readings become numbers: quantiles, rotation, bytes of operators, poison, and that variants of a convolution are
one function."""

from __future__ import annotations

import math
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import micro_conv, micro_fused
from benchmarks.environment import Sampler, missing, source, tree_digest, unpack_wheels
from benchmarks.plan import TINY, Bench, Measurement, single
from benchmarks.timing import HostClock, Samples, clock_of, num_sets, poison, twice
from benchmarks.traffic import traffic
from helios_serve.kernels.fp8 import FP8
from helios_serve.kernels.op_case import OpCase

_CASES = {case.name: case for case in micro_fused.all_cases()}


def _bench(seconds: float = 60) -> Bench:
    device = torch.device("cpu")
    return Bench(device=device, clock=HostClock(), sizes=TINY, deadline=time.monotonic() + seconds)


@pytest.mark.parametrize("count", [1, 2, 7, 20])
def test_quantiles_are_those_of_numpy(count: int) -> None:
    values = np.random.default_rng(count).random(count)
    samples = Samples(values=tuple(values.tolist()))
    found = [samples.p10, samples.median, samples.p90]
    assert found == pytest.approx(np.quantile(values, [0.1, 0.5, 0.9]).tolist())


def test_rate_of_a_reading_in_milliseconds() -> None:
    assert Samples(values=(2.0, 4.0)).per_second(8.0).values == (4000.0, 2000.0)


def test_clock_passes_each_call_its_number() -> None:
    seen: list[int] = []
    samples = HostClock().measure(seen.append, repetitions=3, calls=2)
    assert samples.count == 3
    assert seen == [0, 0, 1, 2, 3, 4, 5]  # the first to warm up


def test_two_rounds_are_joined_and_compared() -> None:
    rounds = iter([Samples(values=(1.0, 1.0)), Samples(values=(3.0, 3.0))])
    joined, spread = twice(lambda: next(rounds))
    assert joined.values == (1.0, 1.0, 3.0, 3.0)
    assert spread == 1.0


def test_inputs_are_more_than_a_cache_holds() -> None:
    for size in (1 << 20, 30 << 20, 1 << 30):
        assert num_sets(size, limit=1000) * size > 120e6


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8, torch.int32, torch.uint8])
def test_poison_reaches_every_element(dtype: torch.dtype) -> None:
    values = torch.ones(37).to(dtype)
    poison(values)
    left = values.float()
    assert bool(left.isnan().all() if dtype.is_floating_point else (left == 77).all())


@pytest.mark.parametrize("name", sorted(_CASES))
def test_bytes_of_operators_are_counted(name: str) -> None:
    """By hand for some, at their second odd shape in bfloat16; the others move something."""
    case = _CASES[name]
    moved = _moved(case)
    counted = _by_hand().get(name)
    assert moved > 0
    if counted is not None:
        assert moved == counted


def _moved(case: OpCase) -> int:
    return traffic(case, case.inputs(case.odd[1], torch.bfloat16))


def _by_hand() -> dict[str, int]:
    history, current, width = 27, 40, 96
    tokens, table = history + current, 3 * 96 * 4
    x, row = tokens * width * 2, tokens * 4
    heads, dim, scales = 5, 8, 5
    rotated = 67 * heads * dim * 2
    return {
        "layer_norm_modulate": 2 * x + 2 * table + row,
        "gated_residual_norm": 4 * x + 3 * table + row,
        "gated_residual_split_norm": 4 * x + 2 * row,
        "residual_scatter_norm": 4 * current * width * 2 + current * 8,
        "layer_norm_modulate_fp8": x + x // 2 + 4 * tokens + 2 * table + row,
        "add_bias": 3 * 67 * 24 * 2 + 24 * 2,
        "norm_rows": 2 * (67 + 10 + (10 + 67)) * 24 * 2 + 2 * 24 * 2,
        "qk_norm_rope": 4 * rotated + 2 * heads * dim * 2 + 67 * dim * 4 + scales * 4 + 67 * 4,
    }


@pytest.mark.parametrize("variant", micro_conv.VARIANTS, ids=lambda variant: variant.__name__)
def test_convolutions_are_one_function(variant: micro_conv.Convolve) -> None:
    x, weight = micro_conv.draw(micro_conv.TINY_GRIDS[0], torch.device("cpu"), torch.float64)
    expected = torch.nn.functional.conv3d(x, weight, padding=(0, 1, 1))
    given = micro_conv.side_by_side(x, weight) if variant is micro_conv.windowed else (x, weight)
    out = variant(*given)
    if out.dim() == 4:
        out = out.transpose(0, 1)[None]
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_what_fails_is_left_out_with_a_note() -> None:
    bench = _bench()

    def fail() -> Measurement:
        raise ValueError("no such kernel")

    assert bench.attempt("a", fail) == []
    assert len(bench.attempt("b", lambda: single("b", "ms", 1.0))) == 1
    assert bench.notes == {"a": "ValueError: no such kernel"}
    late = _bench(seconds=-1)
    assert late.attempt("c", fail) == []
    assert late.notes == {"c": "no time was left"}


def test_digest_covers_names_and_bytes(tmp_path_factory: pytest.TempPathFactory) -> None:
    digests = set()
    for name, text in (("a", "x = 1\n"), ("b", "x = 1\n"), ("a", "x = 2\n")):
        root = tmp_path_factory.mktemp("tree")
        (root / "helios_serve").mkdir()
        (root / "helios_serve" / f"{name}.py").write_text(text)
        digests.add(tree_digest(root))
    assert len(digests) == 3


def test_git_goes_before_a_named_commit() -> None:
    found = source("0" * 40)
    assert found.commit is not None
    assert found.dirty is not None


def test_missing_versions_are_named() -> None:
    versions = {"torch": "2.11", "triton": "3.6", "cuda": "13.0", "cudnn": "None"}
    assert missing({"versions": versions, "driver": "absent"}) == ["cudnn", "driver"]


def test_wheels_are_importable(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "rival_of_ours-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("rival_of_ours.py", "print('one module')\n")
    unpack_wheels(tmp_path, tmp_path / "unpacked")
    command = [sys.executable, "-c", "import rival_of_ours"]
    printed = subprocess.run(command, env={"PYTHONPATH": str(tmp_path / "unpacked")}, capture_output=True, check=True)
    assert printed.stdout == b"one module\n"


def test_clocks_of_a_window() -> None:
    sampler = Sampler(times=[1.0, 2.0, 3.0], rows=[(100, 1, 1, 1), (300, 2, 2, 2), (200, 3, 3, 3)])
    assert sampler.since(1.5)["sm_mhz"] == [200, 300, 300]
    assert sampler.since(9.0) == {}


class _Device:
    """A device with a queue: a call takes 5 ms once it runs, and nothing runs while it is being paused."""

    def __init__(self) -> None:
        self.now_ms = 0.0
        self.pauses: list[int] = []

    def synchronize(self, _: object = None) -> None:
        return

    def pause(self, cycles: int) -> None:
        self.pauses.append(cycles)
        self.now_ms += 1000

    def call(self, _: int) -> None:
        self.now_ms += 5

    def event(self, *, enable_timing: bool) -> _Event:
        assert enable_timing
        return _Event(self)


class _Event:
    def __init__(self, device: _Device) -> None:
        self._device = device
        self.moment_ms = math.nan

    def record(self) -> None:
        self.moment_ms = self._device.now_ms

    def synchronize(self) -> None:
        return

    def elapsed_time(self, end: _Event) -> float:
        return end.moment_ms - self.moment_ms


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> _Device:
    made = _Device()
    monkeypatch.setattr(torch.cuda, "Event", made.event)
    monkeypatch.setattr(torch.cuda, "_sleep", made.pause)
    monkeypatch.setattr(torch.cuda, "synchronize", made.synchronize)
    return made


def test_events_time_the_calls_and_not_the_pause(device: _Device) -> None:
    clock = clock_of(torch.device("cuda"))
    assert clock.measure(device.call, repetitions=3, calls=4).values == (5.0, 5.0, 5.0)
    assert clock.measure_for(device.call, duration_s=0.0, calls=2).values == (5.0, 5.0, 5.0)
    assert len(device.pauses) == 6
    assert min(device.pauses) > 1e5  # cycles: the host queues at least a few launches meanwhile


def test_wall_clock_waits_for_the_device(device: _Device) -> None:
    assert clock_of(torch.device("cuda")).wall(device.call, repetitions=2, warm_ups=1).count == 2
    assert device.now_ms == 15
