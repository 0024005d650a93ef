"""The DiT groups as the engine drives them: what each one runs, and the scheduler's plans carried out.

Knows groups, tasks in flight and the cost model; knows nothing of encoding, decoding or clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from helios_serve.config import EngineConfig
from helios_serve.engine.executor import Executor
from helios_serve.engine.fairness import AgeCredit
from helios_serve.engine.request_run import RequestRun
from helios_serve.engine.request_state import GroupState
from helios_serve.engine.scheduler import Park, SchedulerConfig, Start, next_wake, plan
from helios_serve.engine.step_cost import CostModel, StepSample
from helios_serve.types import ChunkTask, GroupLost, GroupUp, PackLimit, StepCursor, StepDone

QUARANTINE_AFTER = 3
"""Distinct requests that fail on a group, none succeeding between them, before the group itself is suspected."""


@dataclass(slots=True)
class _Flight:
    """A chunk that a group is running."""

    run: RequestRun
    task: ChunkTask
    group: str
    started_at: float
    sharing: int = 1
    """The most chunks that its pack held at a tick."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShare:
    """One request's part of a forward: the step that it made, and its share of the time by operations."""

    run: RequestRun
    cursor: StepCursor
    device_ms: float


class DitGroups:
    """Owns the scheduler's groups. Methods take the time as an argument; only `dispatch` starts work."""

    def __init__(self, executor: Executor, model: CostModel, config: EngineConfig) -> None:
        self._executor = executor
        self._model = model
        self._config = config
        self._scheduler = SchedulerConfig(
            batching=config.batching,
            max_pack=config.max_pack,
            ttfc_target_s=config.ttfc_target_s,
            age_after_s=config.age_after_s,
        )
        self._credit = AgeCredit()
        self._groups: dict[str, GroupState] = {}
        self._flights: dict[str, _Flight] = {}
        self._steps_since_load: dict[str, int] = {}
        self._failed_on: dict[str, set[str]] = {}
        self._golden: dict[int, str] = {}

    @property
    def states(self) -> list[GroupState]:
        return list(self._groups.values())

    @property
    def scheduler_config(self) -> SchedulerConfig:
        return self._scheduler

    @property
    def num_ranks(self) -> int:
        """Ranks of each group; 1 before the first one is up."""
        return next((group.num_ranks for group in self._groups.values()), 1)

    @property
    def num_healthy(self) -> int:
        return sum(group.is_healthy for group in self._groups.values())

    @property
    def is_idle(self) -> bool:
        return not self._flights

    def up(self, event: GroupUp) -> bool:
        """A group came up; False when its golden chunk differs from that of its like, and it must not be used."""
        if event.golden is not None and self._golden.setdefault(event.num_ranks, event.golden) != event.golden:
            return False
        group = self._groups.get(event.group)
        if group is None:
            group = GroupState(group_id=event.group, order=len(self._groups), num_ranks=event.num_ranks)
            self._groups[event.group] = group
        group.is_healthy, group.park_pending = True, False
        self._steps_since_load[event.group] = 0
        self._failed_on[event.group] = set()
        return True

    def lost(self, event: GroupLost, now: float) -> list[RequestRun]:
        """A group is gone: the runs whose chunks it takes with it, to be run again. Whoever was in a pack runs alone
        next; whoever was alone gets it noted."""
        flights = [flight for flight in self._flights.values() if flight.group == event.group]
        for flight in flights:
            del self._flights[flight.task.task_id]
        group = self._groups.get(event.group)
        if group is None:
            return []
        group.condemned(now)
        for flight in flights:
            flight.run.state.is_suspect = True
            if len(flights) == 1:
                flight.run.lost_alone.add((event.group, event.incarnation))
        return [flight.run for flight in flights if not flight.run.is_over]

    def dispatch(self, runs: Sequence[RequestRun], now: float) -> list[tuple[RequestRun, int]]:
        """Plans for this moment and does what the plan says; returns the runs whose chunks were given out, each with
        the number of chunks that its group then has."""
        if not self._groups:
            return []
        if self.num_healthy == 1:  # nowhere else to go
            for run in runs:
                run.state.avoided_group = None
        actions = plan(
            now, [run.state for run in runs], list(self._groups.values()), self._model, self._scheduler, self._credit
        )
        if not actions:
            return []
        by_id = {run.request_id: run for run in runs}
        flying = {flight.run.request_id: task_id for task_id, flight in self._flights.items()}
        started: list[tuple[RequestRun, GroupState]] = []
        for action in actions:
            group = self._groups[action.group]
            if isinstance(action, Park):
                self._executor.signal(action.group, flying[action.task.request_id], "park")
                continue
            is_start = isinstance(action, Start)
            planned = action.tasks if isinstance(action, Start) else (action.task,)
            tasks = []
            for item in planned:
                run = by_id[item.request_id]
                task = run.next_task(item.predicted_s)
                self._flights[task.task_id] = _Flight(run=run, task=task, group=action.group, started_at=now)
                if run.started_at is None:
                    run.started_at = now
                tasks.append(task)
                started.append((run, group))
                flying[item.request_id] = task.task_id
            if is_start:
                group.forward_began(now, self._model)
            self._executor.submit(action.group, tasks)
        return [(run, len(group.jobs)) for run, group in started]

    def next_wake(self, runs: Sequence[RequestRun], now: float) -> float | None:
        """When planning again may find something to do though nothing happened."""
        return next_wake(now, [run.state for run in runs], self._scheduler)

    def stepped(self, event: StepDone, now: float) -> list[StepShare]:
        """One forward is done: progress of each run in it, and a sample for the cost model."""
        flights = [self._flights[task_id] for task_id in event.task_ids if task_id in self._flights]
        flights = [f for f in flights if f.group == event.group and f.run.state.step < len(f.run.state.timing.steps)]
        if not flights:
            return []
        group = self._groups[event.group]
        shapes = tuple(flight.run.state.step_shape for flight in flights)
        if len(flights) == len(event.task_ids):
            since_load = self._steps_since_load[event.group]
            self._steps_since_load[event.group] = since_load + 1
            self._model.observe(
                StepSample(
                    num_ranks=group.num_ranks,
                    steps=shapes,
                    seconds=max(1e-6, event.device_ms / 1000),
                    steps_since_load=since_load,
                )
            )
        total = sum(shape.flops for shape in shapes) or 1.0  # of steps without a forward
        shares = []
        for flight, shape in zip(flights, shapes, strict=True):
            state = flight.run.state
            shares.append(
                StepShare(run=flight.run, cursor=state.cursor, device_ms=event.device_ms * shape.flops / total)
            )
            state.step_done()
        group.forward_began(now, self._model)
        return shares

    def done(self, task_id: str, now: float) -> RequestRun | None:
        """A chunk is denoised: its run, or None for a stale task."""
        flight = self._land(task_id)
        if flight is None:
            return None
        self._failed_on[flight.group].clear()
        state = flight.run.state
        state.is_suspect = False
        flight.run.lost_alone.clear()
        state.chunk_done(now, self._model)
        return flight.run

    def parked(self, task_id: str, now: float) -> RequestRun | None:
        """A chunk left its group with its progress."""
        flight = self._land(task_id)
        if flight is None:
            return None
        flight.run.state.parked(now)
        return flight.run

    def aborted(self, task_id: str, now: float) -> RequestRun | None:
        """A chunk left its group and lost its progress: its request is over, or the server shuts down."""
        flight = self._land(task_id)
        if flight is None:
            return None
        flight.run.state.lost(now)
        return flight.run

    def failed(self, task_id: str, now: float, *, is_callers_fault: bool) -> RequestRun | None:
        """A chunk failed on a group that goes on: it runs alone next, and elsewhere if there is another group."""
        flight = self._land(task_id)
        if flight is None:
            return None
        if not is_callers_fault:
            self._failed_on[flight.group].add(flight.run.request_id)
        flight.run.state.lost(now)
        flight.run.state.is_suspect, flight.run.state.avoided_group = True, flight.group
        return flight.run

    def limited(self, event: PackLimit) -> None:
        group = self._groups.get(event.group)
        if group is not None:
            known = group.max_tokens
            group.max_tokens = event.max_tokens if known is None else min(known, event.max_tokens)

    def abort(self, run: RequestRun) -> None:
        """Tells a run's group to stop its chunk at the next step boundary, if it has one."""
        for task_id, flight in self._flights.items():
            if flight.run is run:
                self._executor.signal(flight.group, task_id, "abort")

    def abort_slower_than(self, seconds: float) -> None:
        """Stops chunks at a step boundary that would not end within `seconds`."""
        for task_id, flight in self._flights.items():
            if flight.run.state.chunk_left_s > seconds:
                self._executor.signal(flight.group, task_id, "abort")

    def suspects(self) -> list[tuple[str, str]]:
        """(group, why) of groups on which so many requests failed in a row that the group may be at fault; never the
        only one, which would take every other request with it."""
        if self.num_healthy < 2:
            return []
        return [
            (group, f"{len(failed)} requests failed on it in a row")
            for group, failed in self._failed_on.items()
            if len(failed) >= QUARANTINE_AFTER and self._groups[group].is_healthy
        ]

    def overdue(self, now: float) -> list[tuple[str, str]]:
        """(group, why) of groups that take far longer over a chunk than predicted for their whole pack."""
        found = []
        for flight in self._flights.values():
            flight.sharing = max(flight.sharing, len(self._groups[flight.group].jobs))
            limit = max(self._config.chunk_floor_s, 8 * flight.task.predicted_s * flight.sharing)
            if now - flight.started_at > limit:
                found.append((flight.group, f"{flight.task.task_id} takes longer than {limit:.0f} s"))
        return found

    def stuck_s(self, group_id: str) -> float:
        """How long a running forward may take before the group counts as stuck."""
        group = self._groups[group_id]
        shapes = tuple(job.step_shape for job in group.stepping)
        predicted = self._model.forward_s(group.num_ranks, shapes) if shapes else 0.0
        return max(self._config.stuck_floor_s, 5 * predicted)

    def _land(self, task_id: str) -> _Flight | None:
        flight = self._flights.pop(task_id, None)
        if flight is not None:
            self._groups[flight.group].released(flight.run.state)
        return flight
