"""Builds, checks and times everything on one GPU, in one command and within a budget of time.

    python -m benchmarks.gpu --name first --budget-s 520 --wheels wheels
    python -m benchmarks.gpu --rehearse

Needs PyTorch and Triton; no network and no checkpoint. Writes JSON after every step, prints a short table last. Exits
with 1 for a red gate, 2 for a call that cannot run here, 3 for a result that may not be kept, 4 if time ran out.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks import environment, outcome, report
from benchmarks.outcome import GateOutcome, RefusedError, Result, SectionOutcome, Status
from benchmarks.plan import FULL, TINY, Bench, Check, Gate, Measurement, Section, UnavailableError
from benchmarks.timing import clock_of, is_lost

_GRACE_S = 20.0  # behind the budget, then the process ends whatever it does
_SHARE = 2.0  # of what a section is expected to take: it must come to an end then
_WHEELS = "HELIOS_BENCH_WHEELS"
_NOT_REPEATED = ("resume", "budget_s")


def gates() -> tuple[Gate, ...]:
    """All that must be green, in the order in which they run."""
    from benchmarks.gates import GATES  # takes a while, and a call may be refused before

    return GATES


def sections() -> tuple[Section, ...]:
    """All measurements, the most valuable first."""
    from benchmarks import fp8_attention, graphs, micro, model, rivals  # see above

    found = (*micro.SECTIONS, *model.SECTIONS, *graphs.SECTIONS, *fp8_attention.SECTIONS, *rivals.SECTIONS)
    return tuple(sorted(found, key=lambda section: section.value_rank))


def main(argv: Sequence[str]) -> int:
    """The command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    started = time.monotonic()
    scratch = Path(os.environ.get("OUT") or arguments.out or tempfile.mkdtemp(prefix="bench-gpu-"))
    if not arguments.rehearse and not torch.cuda.is_available():
        print("No CUDA device: --rehearse runs everything at a tiny size on the CPU", file=sys.stderr)
        return 2
    if arguments.wheels is not None:
        _use_wheels(arguments.wheels, argv)
    device = torch.device("cpu") if arguments.rehearse else torch.device("cuda", 0)
    if arguments.rehearse:
        torch.set_num_threads(1)  # more are slower on a machine that does other work
    result = outcome.read(arguments.resume) if arguments.resume else _new_result(arguments, device)
    if result.source.dirty and not (arguments.allow_dirty or arguments.rehearse):
        print("The tree has changes that its commit lacks: commit them, or --allow-dirty", file=sys.stderr)
        return 3
    run = _Run(result, _bench(arguments, device, started), scratch / "result.json", list(argv))
    with _ended_after(arguments.budget_s + _GRACE_S, run):
        run.all(arguments)
    print(report.terminal(result), flush=True)
    return _finish(arguments, result, run.path)


def _use_wheels(folder: Path, argv: Sequence[str]) -> None:
    """Starts anew with the packages in PYTHONPATH, unless they are there: what is imported already may ask for them."""
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if os.environ.get(_WHEELS) in paths:
        return
    unpacked = tempfile.mkdtemp(prefix="wheels-")
    environment.unpack_wheels(folder, Path(unpacked))
    os.environ |= {_WHEELS: unpacked, "PYTHONPATH": os.pathsep.join([*filter(None, paths), unpacked])}
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu", *argv])


def _new_result(arguments: argparse.Namespace, device: torch.device) -> Result:
    sizes = TINY if arguments.rehearse else FULL
    return Result(
        name=arguments.name,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        rehearsal=arguments.rehearse,
        source=environment.source(arguments.commit, is_dirty=arguments.allow_dirty),
        environment=environment.describe(device),
        workload={**asdict(sizes), "dtype": str(sizes.dtype)},
        options={key: str(value) for key, value in vars(arguments).items() if key not in _NOT_REPEATED},
        num_gates=len(gates()),
    )


def _bench(arguments: argparse.Namespace, device: torch.device, started: float) -> Bench:
    return Bench(
        device=device,
        clock=clock_of(device),
        sizes=TINY if arguments.rehearse else FULL,
        deadline=started + arguments.budget_s,
    )


class _Run:
    """Gates, then sections; what is in the result already is not run again."""

    def __init__(self, result: Result, bench: Bench, path: Path, argv: list[str]) -> None:
        self.result, self.bench, self.path, self._argv = result, bench, path, argv

    def all(self, arguments: argparse.Namespace) -> None:
        self.bench.sampler.start(self.bench.device)
        torch.manual_seed(0)
        with torch.no_grad():
            self._gates()
            if self.result.is_green or arguments.past_red_gate:
                self._sections(arguments.only)
        self.bench.sampler.stop()

    def write(self) -> None:
        outcome.write(self.result, self.path)

    def _gates(self) -> None:
        done = {gate.name for gate in self.result.gates}
        for gate in gates():
            if gate.name not in done:
                self.result.gates.append(_passed(gate, self.bench))
                self._say(gate.name, "green" if self.result.gates[-1].is_green else "RED")

    def _sections(self, only: Sequence[str]) -> None:
        done = {section.name for section in self.result.sections}
        for section in _in_order(sections(), only):
            if section.name not in done:
                self.result.sections.append(_measured(section, self.bench))
                last = self.result.sections[-1]
                self._say(section.name, f"{last.status} in {last.seconds:.1f} s {last.reason}")

    def _say(self, name: str, what: str) -> None:
        print(f"{self.bench.remaining_s:6.1f} s left  {name}: {what[:300]}", flush=True)
        self.write()
        if is_lost(self.bench.device):
            self._start_anew()
        _free(self.bench.device)

    def _start_anew(self) -> None:
        """In a process that can use the device again."""
        print("The device is lost to this process: going on in a new one", flush=True)
        rest = [
            "--out",
            str(self.path.parent),
            "--resume",
            str(self.path),
            "--budget-s",
            f"{self.bench.remaining_s:.1f}",
        ]
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu", *self._argv, *rest])


def _in_order(known: Sequence[Section], only: Sequence[str]) -> list[Section]:
    """Those whose names begin with one of `only`, in its order; all, if there is none."""
    named = [section for prefix in only or ("",) for section in known if section.name.startswith(prefix)]
    return list({section.name: section for section in named}.values())


def _passed(gate: Gate, bench: Bench) -> GateOutcome:
    start, checks, reason = time.monotonic(), list[Check](), ""
    try:
        checks = gate.run(replace(bench, deadline=_deadline(bench, gate.expected_s)))
        bench.clock.synchronize()
    except Exception as error:  # whatever it is, the gate is red
        reason = _reason(error)
    return GateOutcome(name=gate.name, checks=tuple(checks), reason=reason, seconds=time.monotonic() - start)


def _measured(section: Section, bench: Bench) -> SectionOutcome:
    start, made, status, reason = time.monotonic(), list[Measurement](), "measured", ""
    notes: dict[str, str] = {}
    if bench.sizes.is_full and section.expected_s > bench.remaining_s:
        status, reason = "cut", f"takes {section.expected_s:.0f} s, {bench.remaining_s:.0f} s were left"
    else:
        try:
            made = section.run(replace(bench, deadline=_deadline(bench, section.expected_s), notes=notes))
            bench.clock.synchronize()
        except UnavailableError as error:
            status, reason = "unavailable", str(error)
        except Exception as error:  # the other sections go on
            status, reason = "failed", _reason(error)
    return SectionOutcome(
        name=section.name,
        status=_status(status),
        reason=reason,
        seconds=time.monotonic() - start,
        clocks=bench.sampler.since(start),
        notes=notes,
        measurements=tuple(made),
    )


def _status(name: str) -> Status:
    """For the type checker."""
    known: dict[str, Status] = {one: one for one in ("measured", "failed", "unavailable", "cut")}
    return known[name]


def _deadline(bench: Bench, expected_s: float) -> float:
    return min(bench.deadline, time.monotonic() + _SHARE * expected_s)


def _reason(error: Exception) -> str:
    """The error and where it came from; the whole trace goes to the terminal's other stream."""
    traceback.print_exception(error, limit=-6)
    places = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(places[-1].filename).name}:{places[-1].lineno})" if places else ""
    return f"{type(error).__name__}: {error}"[:500] + place


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class _ended_after:  # noqa: N801
    """Ends the process when the time is over, with what has been measured until then."""

    def __init__(self, seconds: float, run: _Run) -> None:
        self._run = run
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def _end(self) -> None:
        self._run.write()
        print(report.terminal(self._run.result))
        print("The time is over.", flush=True)
        os._exit(4)


def _finish(arguments: argparse.Namespace, result: Result, path: Path) -> int:
    outcome.write(result, path)
    print(f"Written to {path}")
    if not result.is_green:
        return 1
    if arguments.rehearse or arguments.allow_dirty:
        return 0
    try:
        print(f"Kept as {outcome.save(result)}")
    except RefusedError as refused:
        print(f"Not kept: {refused}", file=sys.stderr)
        return 3
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--name", default="all", help="of the run, part of its file's name")
    parser.add_argument("--budget-s", type=float, default=520.0, help="sections that do not fit are cut")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="PREFIX", help="measure these, in this order; all gates run"
    )
    parser.add_argument("--rehearse", action="store_true", help="everything at a tiny size, on the CPU")
    parser.add_argument("--wheels", type=Path, help="folder of packages to compare with")
    parser.add_argument("--allow-dirty", action="store_true", help="run on uncommitted source, keep nothing")
    parser.add_argument("--past-red-gate", action="store_true", help="measure anyway, into the scratch file only")
    parser.add_argument("--commit", help="of a copy of the tree that has no git")
    parser.add_argument("--out", type=Path, help="folder for the scratch file; the variable OUT goes before it")
    parser.add_argument("--resume", type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
