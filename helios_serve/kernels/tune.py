"""Times every plan of the kernels that own one row per program, on the CUDA device at hand.

    python -m helios_serve.kernels.tune [--json FILE] [--write] [--budget-s 20]

Prints what each operator reaches of the bandwidth of a copy, with the default plan and with the best. `--write` puts
the best plans into `tuned.json` under the device's name. Knows the operators' cases and their bytes; checks no result.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helios_serve.kernels.cases_transformer import CASES
from helios_serve.kernels.launch import TUNED, RowPlan, candidate_plans, default_plan, read_tuned, tuned
from helios_serve.kernels.op_case import OpCase, Shape

ROTATED_BYTES = 200 << 20
"""Inputs of one measurement together, several times the second-level cache."""
NUM_LAUNCHES, NUM_REPLAYS = 12, 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """An operator to time, and the entry of the table `rows` that it is launched with.

    bytes_per_value: of its rows, read and written. touched: how many of them a shape has.
    """

    name: str
    key: str
    bytes_per_value: int
    touched: Callable[[Shape], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One operator at one shape with one plan; share: of the bandwidth of a copy."""

    name: str
    key: str
    shape: Shape
    block: int
    num_warps: int
    microseconds: float
    share: float


def _all_rows(shape: Shape) -> int:
    return (shape[0] + shape[1]) * shape[2]


def _current_rows(shape: Shape) -> int:
    return shape[1] * shape[2]


def _flat_rows(shape: Shape) -> int:
    return shape[0] * shape[1]


def _heads(shape: Shape) -> int:
    return math.prod(shape[:3])


OPERATORS = tuple(
    Tuned(name=name, key=key, bytes_per_value=size, touched=touched)
    for name, key, size, touched in (
        ("gated_residual_norm", "gated_residual_norm_kernel/5120", 8, _all_rows),
        ("gated_residual_split_norm", "gated_residual_norm_kernel/5120", 8, _all_rows),
        ("residual_scatter_norm", "residual_scatter_norm_kernel/5120", 8, _current_rows),
        ("qk_norm_rope", "norm_rope_kernel/5120", 8, _heads),
        ("layer_norm_modulate", "layer_norm_kernel/5120", 4, _all_rows),
        ("rms_norm", "norm_rope_kernel/5120", 4, _flat_rows),
        ("gelu_quantize_rows", "quantize_rows_kernel/13824", 3, _flat_rows),
        ("quantize_rows", "quantize_rows_kernel/5120", 3, _flat_rows),
        ("gated_residual_norm_fp8", "gated_residual_norm_kernel/5120", 7, _all_rows),
        ("layer_norm_modulate_fp8", "layer_norm_kernel/5120", 3, _all_rows),
        ("residual_scatter_norm_fp8", "residual_scatter_norm_kernel/5120", 7, _current_rows),
    )
)
"""The most expensive ones first, as time may run out."""


def measure(device: torch.device, deadline: float) -> tuple[float, list[Timing]]:
    """The bandwidth of a copy in bytes per second, and timings until `deadline`, a value of the monotonic clock."""
    bandwidth = copy_bandwidth(device)
    _compile_in_processes(device, deadline)
    timings: list[Timing] = []
    for operator in OPERATORS:
        case = _case(operator.name)
        width = _width(operator)
        for shape in _shapes(case):
            with torch.device(device):
                sets = _argument_sets(case, shape)
            for plan in candidate_plans(width):
                if time.monotonic() > deadline:
                    return bandwidth, timings
                tuned("rows", device)[operator.key] = asdict(plan)
                seconds = _seconds(case, sets)
                num_bytes = operator.bytes_per_value * operator.touched(shape)
                timings.append(
                    Timing(
                        name=operator.name,
                        key=operator.key,
                        shape=shape,
                        block=plan.block,
                        num_warps=plan.num_warps,
                        microseconds=round(1e6 * seconds, 2),
                        share=round(num_bytes / seconds / bandwidth, 4),
                    )
                )
            torch.cuda.empty_cache()
    return bandwidth, timings


def best_plans(timings: Sequence[Timing]) -> dict[str, RowPlan]:
    """For each key the plan with the largest share over all of its operators and shapes that were timed with it."""
    slowness: dict[tuple[str, RowPlan], list[float]] = defaultdict(list)
    for timing in timings:
        plan = RowPlan(block=timing.block, num_warps=timing.num_warps)
        slowness[timing.key, plan].append(1 / timing.share)
    most = {key: max(len(found) for (other, _), found in slowness.items() if other == key) for key, _ in slowness}
    best: dict[str, RowPlan] = {}
    for (key, plan), found in sorted(slowness.items(), key=lambda item: sum(item[1])):
        if len(found) == most[key]:
            best.setdefault(key, plan)
    return best


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a copy within the device."""
    source = torch.empty(1 << 29, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / _replayed(lambda: target.copy_(source), 1)


def _case(name: str) -> OpCase:
    (case,) = (case for case in CASES if case.name == name)
    return case


def _width(operator: Tuned) -> int:
    return int(operator.key.partition("/")[2])


def _shapes(case: OpCase) -> list[Shape]:
    """Of the three stages; rotations without a history scale."""
    return [shape for shape in case.served if len(shape) < 4 or shape[3] == 0]


def _argument_sets(case: OpCase, shape: Shape) -> list[list[Any]]:
    sets = [case.inputs(shape, torch.bfloat16)]
    size = sum(argument.nbytes for argument in sets[0] if isinstance(argument, Tensor))
    return sets + [case.inputs(shape, torch.bfloat16) for _ in range(min(NUM_LAUNCHES, ROTATED_BYTES // size))]


def _seconds(case: OpCase, sets: Sequence[list[Any]]) -> float:
    """Of one launch."""

    def launch_all() -> object:
        """Results are kept apart: those in one place would stay in the cache."""
        return [case.operator(*sets[index % len(sets)]) for index in range(NUM_LAUNCHES)]

    return _replayed(launch_all, NUM_LAUNCHES)


def _replayed(call: Callable[[], object], num_launches: int) -> float:
    """Median seconds of one of the launches that `call` makes, replayed from a graph so that the host is not timed."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    times = []
    for _ in range(NUM_REPLAYS + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / num_launches)
    del results
    return statistics.median(times[1:])


def _compile_in_processes(device: torch.device, deadline: float) -> None:
    """Fills Triton's cache on disk, which takes longer than all measurements."""
    jobs = [(operator.name, plan) for operator in OPERATORS for plan in candidate_plans(_width(operator))]
    num_processes = min(8, os.cpu_count() or 1)
    pool = ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn"))
    parts = [jobs[index::num_processes] for index in range(num_processes)]
    futures = [pool.submit(_compile, part, device.index or 0) for part in parts]
    done, _ = wait(futures, timeout=max(0.0, 0.6 * (deadline - time.monotonic())))
    pool.shutdown(wait=False, cancel_futures=True)
    for future in done:
        future.result()


def _compile(jobs: Sequence[tuple[str, RowPlan]], index: int) -> None:
    device = torch.device("cuda", index)
    keys = {operator.name: operator.key for operator in OPERATORS}
    for name, plan in jobs:
        tuned("rows", device)[keys[name]] = asdict(plan)
        case = _case(name)
        shape = case.few[0] if len(case.few[0]) < 4 else (*case.few[0][:3], 0)
        with torch.device(device):
            case.operator(*case.inputs(shape, torch.bfloat16))


def report(bandwidth: float, timings: Sequence[Timing]) -> str:
    """A line for each operator and shape: microseconds and share with the default plan and with the best."""
    best = best_plans(timings)
    lines = [f"copy {bandwidth / 1e12:.2f} TB/s"]
    found = {(one.name, one.shape, RowPlan(block=one.block, num_warps=one.num_warps)): one for one in timings}
    for name, shape in dict.fromkeys((one.name, one.shape) for one in timings):
        key = next(one.key for one in timings if one.name == name)
        chosen = best[key]
        texts = [f"{name:26} {'x'.join(map(str, shape)):16}"]
        for label, plan in (("default", default_plan(int(key.partition("/")[2]))), ("best", chosen)):
            timing = found.get((name, shape, plan))
            if timing is not None:
                size = f"{plan.block}x{plan.num_warps}w"
                texts.append(f"{label} {size:8} {timing.microseconds:7.1f} us {100 * timing.share:5.1f} %")
        lines.append("  ".join(texts))
    return "\n".join(lines)


def main() -> None:
    """The command. Raises SystemExit on a machine without a CUDA device."""
    parser = argparse.ArgumentParser(description="Time every plan of the kernels that own one row per program.")
    parser.add_argument("--json", type=Path, help="file for all timings and the table of the best plans")
    parser.add_argument("--write", action="store_true", help="put the best plans into tuned.json")
    parser.add_argument("--budget-s", type=float, default=20.0, help="stop after so many seconds")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tune: PyTorch sees no CUDA device here; run it on the device that is to be tuned")
    deadline = time.monotonic() + options.budget_s
    device = torch.device("cuda", torch.cuda.current_device())
    name, shipped = torch.cuda.get_device_name(device), dict(tuned("rows", device))
    with torch.inference_mode():
        bandwidth, timings = measure(device, deadline)
    tables = read_tuned()
    tables[name]["rows"] = {**shipped, **{key: asdict(plan) for key, plan in best_plans(timings).items()}}
    print(report(bandwidth, timings))
    if options.json is not None:
        measured = {"device": name, "torch": torch.__version__, "copy_bytes_per_s": bandwidth}
        content = {**measured, "tuned": {name: tables[name]}, "timings": [asdict(one) for one in timings]}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if options.write:
        TUNED.write_text(json.dumps(tables, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
