"""What the engine and the API cost beside the work on devices: CPU time of a step, and of a streamed segment.

    python -m benchmarks.overhead --out benchmarks/results/overhead.json

Each number is the difference of two runs that differ in nothing but what is measured, taken in turn; with its spread.
Knows loads and clocks; the devices are `instant_executor`'s and the virtual clock's, which take no time.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from benchmarks import engine_load, paired
from benchmarks.check_figures import Figure
from benchmarks.paired import Spread
from benchmarks.scheduler_sim import environment

ROOT = Path(__file__).resolve().parents[1]
STEP_GOAL_MS, SEGMENT_GOAL_MS = 1.0, 2.0
NUM_CONCURRENT = 64
SHORT, LONG = 2, 22
"""Segments of the two kinds of streams whose difference gives the cost of one segment."""

Via = Literal["raw", "sse"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """CPU milliseconds of one unit of work. ratio: in yardsticks, by the thousand. goal_ms: None without a goal."""

    name: str
    ms: Spread
    ratio: Spread
    goal_ms: float | None = None

    @property
    def meets_goal(self) -> bool:
        return self.goal_ms is None or self.ms.median < self.goal_ms


def cost_of(name: str, readings: Sequence[tuple[float, float]], goal_ms: float | None = None) -> Cost:
    """readings: CPU seconds of one unit, and those of the yardstick beside it."""
    return Cost(
        name=name,
        ms=paired.spread([1000 * seconds for seconds, _ in readings]),
        ratio=paired.spread([1000 * seconds / own for seconds, own in readings]),
        goal_ms=goal_ms,
    )


def engine_costs(pairs: int) -> list[Cost]:
    """Of one forward, with 64 requests in the engine: its decisions alone, and all that it does on an event loop."""
    found = []
    for label, num_groups in (("8 groups", 8), ("one group", 1)):
        decided = _in_turn(lambda n=num_groups: engine_load.decisions_s(NUM_CONCURRENT, n), pairs)  # type: ignore[misc]
        found.append(cost_of(f"engine step, decisions, {label}", decided, STEP_GOAL_MS))
        whole = _in_turn(lambda n=num_groups: engine_load.whole_s(NUM_CONCURRENT, n), pairs)  # type: ignore[misc]
        found.append(cost_of(f"engine step, with its event loop, {label}", whole, STEP_GOAL_MS))
    return found


def _in_turn(run: Callable[[], float], pairs: int) -> list[tuple[float, float]]:
    run()
    found = []
    for _ in range(pairs):
        before, seconds = paired.thread_cpu_s(paired.yardstick), run()
        found.append((seconds, (before + paired.thread_cpu_s(paired.yardstick)) / 2))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Used:
    """CPU seconds of a process: of the thread with its event loop, and of all."""

    loop: float
    all: float

    def __sub__(self, other: _Used) -> _Used:
        return _Used(loop=self.loop - other.loop, all=self.all - other.all)

    def over(self, number: float) -> _Used:
        return _Used(loop=self.loop / number, all=self.all / number)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Child:
    process: subprocess.Popen[str]
    port: int

    def used_by(self, run: Callable[[int, int], None], num_requests: int, num_chunks: int) -> _Used:
        """What the child spends while this runs, its segments made before."""
        self._ask("ready", num_requests, num_chunks)
        before = self._used()
        run(num_requests, num_chunks)
        return self._used() - before

    def _used(self) -> _Used:
        pid = self.process.pid
        return _Used(loop=paired.main_thread_cpu_s(pid), all=paired.process_cpu_s(pid))

    def directly(self, num_requests: int, num_chunks: int) -> None:
        """Requests through the child's engine alone."""
        self._ask("direct", num_requests, num_chunks)

    def _ask(self, what: str, num_requests: int, num_chunks: int) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{what} {num_requests} {num_chunks}\n")
        self.process.stdin.flush()
        told = self.process.stdout.readline().strip()
        assert told == "done", told

    def over_http(self, via: Via, num_requests: int, num_chunks: int) -> None:
        """The same requests as streams, each read to its end."""
        accept = {"raw": "video/mp4", "sse": "text/event-stream"}[via]
        body = json.dumps(
            {
                "prompt": "a fox",
                "num_frames": 33 * num_chunks,
                "stream": True,
                "seed": 0,
                "helios": {"service_class": "offline"},  # a realtime one is paced, and waits
            }
        )
        for _ in range(num_requests):
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
            connection.request(
                "POST",
                "/v1/videos/generations",
                body,
                {"content-type": "application/json", "accept": accept},
            )
            answer = connection.getresponse()
            content = answer.read()
            assert answer.status == 200, content[:500]
            assert content.count(b"moof" if via == "raw" else b"partial_video\n") == num_chunks
            connection.close()


@contextmanager
def _child() -> Iterator[_Child]:
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.overhead_server", folder],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield _Child(process=process, port=int(process.stdout.readline()))
        finally:
            process.stdin.close()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def api_costs(pairs: int, num_requests: int = 3, vias: Sequence[Via] = ("raw", "sse")) -> list[Cost]:
    """Of one segment that is made, kept and streamed to one viewer, and of a request beside its segments: on the event
    loop, and in all threads, among them those that make latents and segments durable. What the engine takes for the
    same is taken off; nothing is encoded."""
    found = []
    with _child() as child:
        for via in vias:
            _api_reading(child, 1, via)
            readings = [_api_reading(child, num_requests, via) for _ in range(pairs)]
            found += [
                cost_of(f"API segment, {via}", [(one.loop, own) for one, _, own in readings], SEGMENT_GOAL_MS),
                cost_of(f"API segment with its store, {via}", [(one.all, own) for one, _, own in readings]),
                cost_of(f"API request, {via}", [(one.loop, own) for _, one, own in readings]),
            ]
    return found


def _api_reading(child: _Child, num_requests: int, via: Via) -> tuple[_Used, _Used, float]:
    """Of a segment, and of a request without its segments; and the yardstick's seconds."""
    own = [paired.thread_cpu_s(paired.yardstick)]
    beyond = {}
    for num_chunks in (SHORT, LONG):
        served = child.used_by(partial(child.over_http, via), num_requests, num_chunks)
        direct = child.used_by(child.directly, num_requests, num_chunks)
        beyond[num_chunks] = (served - direct).over(num_requests)
        own.append(paired.thread_cpu_s(paired.yardstick))
    segment = (beyond[LONG] - beyond[SHORT]).over(LONG - SHORT)
    request = beyond[SHORT] - segment.over(1 / SHORT)
    return segment, request, sum(own) / len(own)


def overhead_figures(pairs: int = 5) -> list[Figure]:
    """For the regression check: bytecode instructions of the engine's decisions, and CPU in yardsticks."""
    counted = [
        Figure(
            name=f"overhead/engine/{label}/bytecodes",
            value=engine_load.decision_bytecodes(NUM_CONCURRENT, num_groups),
            unit="a step",
            margin=0.03,
        )
        for label, num_groups in (("8_groups", 8), ("1_group", 1))
    ]
    costs = [*engine_costs(pairs), *api_costs(pairs)]
    timed = [
        Figure(name=_figure_name(cost), value=cost.ratio.median, unit="yardsticks/1000", margin=0.35, slack=2.0)
        for cost in costs
    ]
    return counted + timed


def _figure_name(cost: Cost) -> str:
    return "overhead/" + cost.name.replace(", ", "/").replace(" ", "_").lower() + "/cpu"


def show(costs: Sequence[Cost]) -> Table:
    """The table of the command."""
    table = Table(title="CPU time beside the work on devices: medians of pairs, with their range", title_justify="left")
    for title in ("", "ms", "p10", "p90", "lowest", "highest", "pairs", "goal"):
        table.add_column(title, justify="left" if title == "" else "right")
    for cost in costs:
        numbers = (
            cost.ms.median,
            cost.ms.quantile(0.1),
            cost.ms.quantile(0.9),
            cost.ms.lowest,
            cost.ms.highest,
        )
        goal = "" if cost.goal_ms is None else f"< {cost.goal_ms:g}: {'met' if cost.meets_goal else 'MISSED'}"
        table.add_row(cost.name, *(f"{number:.3f}" for number in numbers), str(len(cost.ms.values)), goal)
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what engine and API cost beside the work on devices.")
    parser.add_argument("--pairs", type=int, default=11, help="readings of each number")
    parser.add_argument("--out", type=Path, default=None, help="write the result as JSON")
    options = parser.parse_args()
    costs = [*engine_costs(options.pairs), *api_costs(options.pairs)]
    Console(width=120).print(show(costs))
    if options.out is not None:
        workload = {"requests": NUM_CONCURRENT, "segments": [SHORT, LONG]}
        load = [round(one, 2) for one in os.getloadavg()]
        result = environment() | {"load_average": load, "workload": workload, "costs": [asdict(cost) for cost in costs]}
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(cost.meets_goal for cost in costs) else 1


if __name__ == "__main__":
    sys.exit(main())
