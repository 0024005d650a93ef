"""Decides which chunk runs where and when: one function of the state it is given, `plan`.

Knows tiers, slack, ageing, shares, packing and preemption. Knows nothing of executors, tensors or sockets: no I/O, no
clock, no lock. Touches only the jobs, groups, accounts and the credit that it is given.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from helios_serve.engine.fairness import AgeCredit, TenantState
from helios_serve.engine.pack_gate import Desk, SchedulerConfig, pack_pays
from helios_serve.engine.request_state import Arrival, GroupState, PlannedTask, RequestState, period_s
from helios_serve.engine.step_cost import CostModel
from helios_serve.types import VideoRequest

DUE: Final = 0
DEMOTED: Final = 1
OFFLINE: Final = 2
AHEAD: Final = 3

JOIN_TRIES: Final = 64
"""Pairs of a running pack and a waiting chunk that one call looks at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """An idle group begins with these chunks in one pack."""

    group: str
    tasks: tuple[PlannedTask, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """A chunk enters a running pack at the group's next step boundary."""

    group: str
    task: PlannedTask


@dataclass(frozen=True, slots=True, kw_only=True)
class Park:
    """A chunk leaves its group at the next step boundary and keeps its progress."""

    group: str
    task: PlannedTask


Action = Start | Join | Park

__all__ = ["Action", "Join", "Park", "SchedulerConfig", "Start", "new_state", "next_wake", "plan"]


def new_state(
    request: VideoRequest,
    arrival: Arrival,
    tenant: TenantState,
    model: CostModel,
    cfg: SchedulerConfig,
    next_chunk: int = 0,
) -> RequestState:
    """The scheduler's state of an admitted request; offline callers also `Tenants.enter` its account.

    Args:
        next_chunk: where a request goes on that was begun before.
    """
    period = period_s(request)
    ahead = cfg.run_ahead_interactive if arrival.is_interactive else cfg.run_ahead
    spare = ahead if arrival.is_interactive else cfg.run_ahead_max
    return RequestState(
        request=request,
        arrival=arrival,
        tenant=tenant,
        live=request.service_class == "realtime",
        timing=model.timing(request.params, next_chunk, arrival.num_ranks),
        steady=model.timing(request.params, 1, arrival.num_ranks),
        period_s=period,
        due_ahead_s=(ahead + 1) * period,
        spare_ahead_s=(spare + 1) * period,
        ttfc_target_s=cfg.ttfc_target_s,
        end_chunk=None if request.is_open_ended else request.params.num_chunks,
        next_chunk=next_chunk,
        first_chunk=next_chunk,
        last_service=arrival.at,
        deadline=arrival.at + cfg.ttfc_target_s,
    )


def plan(
    now: float,
    jobs: Sequence[RequestState],
    groups: Sequence[GroupState],
    model: CostModel,
    cfg: SchedulerConfig,
    credit: AgeCredit,
) -> list[Action]:
    """Actions for this moment, already entered in the states of `jobs` and `groups`.

    Call it on arrival, task end, park, group up or lost, segment published, and at `next_wake`. `jobs` holds every
    unfinished request in order of arrival, `groups` every DiT group.
    """
    num_healthy = sum(group.is_healthy for group in groups)
    balance = credit.refill(now, num_healthy)
    if num_healthy == 0 or not any(job.waits_for_group for job in jobs):
        return []
    idle = sorted((group for group in groups if group.is_idle), key=lambda group: group.order)
    has_room = cfg.batching != "off" and any(len(group.jobs) < cfg.max_pack and group.is_open for group in groups)
    if not idle and not has_room and not any(job.live for job in jobs):
        return []  # offline jobs make no room
    ready = _collect(now, jobs, model, cfg, balance)
    ready.triage(cfg.triage * num_healthy)
    desk = Desk(now=now, model=model, cfg=cfg, credit=credit)
    actions: list[Action] = []
    for position, group in enumerate(idle):
        started = _start(group, ready, desk, num_others=len(idle) - position - 1)
        if started is not None:
            actions.append(started)
    if ready.num_left > 0 and cfg.batching != "off":
        actions += _join(groups, ready, desk)
    if ready.num_left > 0:
        actions += _park(jobs, groups, ready, cfg)
    return actions


def next_wake(now: float, jobs: Sequence[RequestState], cfg: SchedulerConfig) -> float | None:
    """When, after `now`, a waiting job next becomes due, may run ahead, or ages; None without such a job."""
    wake = float("inf")
    for job in jobs:
        if job.group_id is not None or not job.is_ready:
            continue
        if not job.live:
            if not job.aged and now < job.last_service + cfg.age_after_s < wake:
                wake = job.last_service + cfg.age_after_s
        elif job.play0 is not None and job.paused_at is None:
            for ahead in (job.spare_ahead_s, job.due_ahead_s):
                if now < job.deadline - ahead < wake:
                    wake = job.deadline - ahead
    return None if wake == float("inf") else wake


def _collect(
    now: float, jobs: Sequence[RequestState], model: CostModel, cfg: SchedulerConfig, balance: float
) -> _Ready:
    """Sort the runnable jobs into tiers; the key within a live tier is the latest start, since slack = key - const."""
    version, used = model.version, 0.0
    due: list[tuple[float, int, RequestState]] = []
    ahead: list[tuple[float, int, RequestState]] = []
    offline: list[RequestState] = []
    old: list[RequestState] = []
    live: list[RequestState] = []
    for job in jobs:
        if job.live:
            live.append(job)
            steady = job.steady
            if steady.version != version:
                model.refresh(steady)
            used += steady.occupied_s / job.period_s
            if job.group_id is not None or not job.is_ready or job.is_held or job.is_cancelled:
                continue
            timing = job.timing
            if timing.version != version:
                model.refresh(timing)
            deadline = job.deadline if job.paused_at is None else job.deadline + now - job.paused_at
            entry = (deadline - timing.lead_s[job.step], job.arrival.seq, job)
            if job.play0 is None or now >= deadline - job.due_ahead_s:
                due.append(entry)
            elif now >= deadline - job.spare_ahead_s:
                ahead.append(entry)
        elif job.group_id is None and job.is_ready and not job.is_held and not job.is_cancelled:
            if job.aged or job.last_service + cfg.age_after_s <= now:
                old.append(job)
            else:
                offline.append(job)
    aged = _grant_ageing(old, offline, balance)
    return _Ready(live=live, used=used, aged=aged, due=due, offline=offline, ahead=ahead)


def _grant_ageing(old: list[RequestState], offline: list[RequestState], balance: float) -> list[RequestState]:
    """Jobs that wait too long, oldest first, as far as the credit goes; the others stay in `offline`."""
    granted = []
    for job in old:
        if job.aged:
            granted.append(job)
        elif balance > 0:
            balance -= job.timing.remaining_s[job.step]
            granted.append(job)
        else:
            offline.append(job)
    return granted


class _Ready:
    """The waiting jobs in order, found lazily: `head(i)` is the i-th; dispatched ones are skipped."""

    def __init__(
        self,
        *,
        live: list[RequestState],
        used: float,
        aged: list[RequestState],
        due: list[tuple[float, int, RequestState]],
        offline: list[RequestState],
        ahead: list[tuple[float, int, RequestState]],
    ) -> None:
        self.num_left = len(aged) + len(due) + len(offline) + len(ahead)
        self._live, self._used = live, used
        self._aged, self._due, self._offline, self._ahead = aged, due, offline, ahead
        self._demoted: list[tuple[float, int, RequestState]] = []
        self._found: list[tuple[int, RequestState]] = []
        self._source = self._in_order()

    def triage(self, capacity: float) -> None:
        """Demote live jobs beyond `capacity` (occupancies c/T): playing ones keep service first, then by admission."""
        if self._used <= capacity:
            for job in self._live:
                job.demoted = False
            return
        used = 0.0
        playing = [job for job in self._live if job.play0 is not None]  # in order of arrival, as they were given
        for job in (*playing, *(job for job in self._live if job.play0 is None)):
            occupancy = job.steady.occupied_s / job.period_s
            job.demoted = used + occupancy > capacity
            used += 0.0 if job.demoted else occupancy
        self._demoted = [entry for entry in self._due if entry[2].demoted]
        self._due = [entry for entry in self._due if not entry[2].demoted]

    def waiting(self) -> Iterator[tuple[int, RequestState]]:
        """(tier, job) of the jobs not dispatched yet, best first."""
        position = 0
        while True:
            while position < len(self._found) and self._found[position][1].group_id is not None:
                position += 1
            if position == len(self._found):
                found = next(self._source, None)
                if found is None:
                    return
                self._found.append(found)
                continue
            yield self._found[position]
            position += 1

    def drop_dispatched(self) -> None:
        """Forget dispatched jobs at the front, so that the next look starts behind them."""
        keep = 0
        while keep < len(self._found) and self._found[keep][1].group_id is not None:
            keep += 1
        del self._found[:keep]

    def due_waiting(self) -> list[RequestState]:
        """Due live jobs that found no place."""
        return [entry[2] for entry in self._due if entry[2].group_id is None]

    def _in_order(self) -> Iterator[tuple[int, RequestState]]:
        for job in self._aged:
            yield DUE, job
        for tier, entries in ((DUE, self._due), (DEMOTED, self._demoted)):
            yield from _by_key(tier, entries)
        yield from ((OFFLINE, job) for job in _fair_order(self._offline))
        yield from _by_key(AHEAD, self._ahead)


def _by_key(tier: int, entries: list[tuple[float, int, RequestState]]) -> Iterator[tuple[int, RequestState]]:
    heap = list(entries)
    heapq.heapify(heap)
    while heap:
        yield tier, heapq.heappop(heap)[2]


def _fair_order(jobs: list[RequestState]) -> Iterator[RequestState]:
    """(tenant's virtual time, priority, arrival), each tenant's time moving on as its jobs are taken."""
    queues: dict[TenantState, list[tuple[int, int, RequestState]]] = {}
    for job in jobs:
        entry = (job.request.priority, job.arrival.seq, job)
        queue = queues.get(job.tenant)
        if queue is None:
            queues[job.tenant] = [entry]
        else:
            queue.append(entry)
    heap = []
    for tenant, queue in queues.items():
        heapq.heapify(queue)
        heap.append((tenant.vtime, *queue[0][:2], tenant))
    heapq.heapify(heap)
    while heap:
        vtime, _, _, tenant = heap[0]
        queue = queues[tenant]
        job = heapq.heappop(queue)[2]
        if queue:
            after = vtime + job.timing.tflop_left[job.step] / tenant.weight
            heapq.heapreplace(heap, (after, *queue[0][:2], tenant))
        else:
            heapq.heappop(heap)
        yield job


def _start(group: GroupState, ready: _Ready, desk: Desk, *, num_others: int) -> Start | None:
    """Give an idle group the best job it can run, and whatever pays to be packed with it."""
    pack: list[tuple[int, RequestState]] = []
    num_seen = 0
    for tier, job in ready.waiting():
        if not group.takes(job):
            continue
        if not pack:
            pack.append((tier, job))
            if job.runs_alone or desk.cfg.batching == "off" or desk.cfg.max_pack == 1:
                break
            continue
        if len(pack) == desk.cfg.max_pack or num_seen == desk.cfg.pack_candidates:
            break
        if desk.cfg.batching == "auto" and ready.num_left - len(pack) <= num_others:
            break
        num_seen += 1
        if pack_pays([member for _, member in pack], job, group, desk):
            pack.append((tier, job))
    if not pack:
        return None
    tasks = tuple(_dispatch(group, tier, job, desk) for tier, job in pack)
    ready.num_left -= len(tasks)
    ready.drop_dispatched()
    return Start(group=group.group_id, tasks=tasks)


def _dispatch(group: GroupState, tier: int, job: RequestState, desk: Desk) -> PlannedTask:
    task = job.dispatched(group.group_id, tier)
    if tier == DUE and not job.live and not job.aged:
        desk.credit.spend(task.predicted_s)
        job.aged = True
    group.jobs.append(job)
    return task


def _join(groups: Sequence[GroupState], ready: _Ready, desk: Desk) -> list[Action]:
    """Let waiting jobs into running packs where that pays; the nearest boundary first."""
    actions: list[Action] = []
    open_groups = [group for group in groups if group.is_open and len(group.jobs) < desk.cfg.max_pack]
    open_groups.sort(key=lambda group: (group.next_boundary, group.order))
    for group in open_groups[: max(1, JOIN_TRIES // desk.cfg.pack_candidates)]:
        for num_seen, (tier, job) in enumerate(ready.waiting()):
            if num_seen == desk.cfg.pack_candidates or len(group.jobs) == desk.cfg.max_pack:
                break
            if not group.takes(job):
                continue
            if pack_pays(group.jobs, job, group, desk):
                actions.append(Join(group=group.group_id, task=_dispatch(group, tier, job, desk)))
                ready.num_left -= 1
            elif job.runs_alone or (tier == DUE and not job.live):
                break  # nobody overtakes it: a pack that always grows would never make room
    return actions


def _park(
    jobs: Sequence[RequestState], groups: Sequence[GroupState], ready: _Ready, cfg: SchedulerConfig
) -> list[Action]:
    """Make room for due live jobs that found no idle group: one pack each, the nearest boundary first."""
    short = ready.due_waiting()
    if not short:
        return []
    pending = [group for group in groups if group.park_pending]
    for group in pending:
        _serve_one(short, group)
    room = cfg.max_parked - sum(job.is_parked for job in jobs) - sum(len(group.jobs) for group in pending)
    actions: list[Action] = []
    for group in sorted((g for g in groups if g.is_parkable), key=lambda g: (g.next_boundary, g.order)):
        if not _serve_one(short, group) or group.is_ending:
            continue
        room -= len(group.jobs)
        if room < 0:
            break
        group.park_pending = True
        actions += [Park(group=group.group_id, task=job.task) for job in group.jobs if job.task is not None]
    return actions


def _serve_one(short: list[RequestState], group: GroupState) -> bool:
    """Takes out of `short` a job that `group` will have room for; whether there is one."""
    for index, job in enumerate(short):
        if group.takes(job):
            del short[index]
            return True
    return False
