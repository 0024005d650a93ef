"""The queue and the members of a role whose workers keep no state between tasks: encoders, and VAE workers.

Knows order, slots and retries; knows nothing of requests' content, of executors or of a clock.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field

from helios_serve.types import RoleTask


@dataclass(slots=True, kw_only=True, eq=False)
class PoolJob:
    """One piece of work until it is done, through all its attempts.

    make_task: a task id -> the task. expected_s: predicted seconds. lost_alone: (group, incarnation) of those that were
    lost while they ran it alone.
    """

    request_id: str
    name: str
    deadline: float
    timeout_s: float
    expected_s: float
    make_task: Callable[[str], RoleTask]
    attempt: int = 0
    is_suspect: bool = False
    is_abandoned: bool = False
    lost_alone: set[tuple[str, int]] = field(default_factory=set)
    group: str | None = None
    started_at: float = 0.0

    @property
    def task_id(self) -> str:
        return f"{self.request_id}/{self.name}.{self.attempt}"


class RolePool:
    """Gives waiting jobs to members in order of their deadlines, at most `slots` to each; a suspect one runs alone."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._members: dict[str, dict[str, PoolJob]] = {}
        self._waiting: list[tuple[float, int, PoolJob]] = []
        self._num_added = 0

    @property
    def num_members(self) -> int:
        return len(self._members)

    @property
    def num_waiting(self) -> int:
        return sum(not job.is_abandoned for _, _, job in self._waiting)

    @property
    def waiting_s(self) -> float:
        """Predicted seconds of the waiting jobs together."""
        return sum(job.expected_s for _, _, job in self._waiting if not job.is_abandoned)

    @property
    def is_idle(self) -> bool:
        """Whether no member has anything to do."""
        return not any(self._members.values())

    def up(self, group: str) -> None:
        self._members[group] = {}

    def lost(self, group: str) -> list[PoolJob]:
        """The jobs that a lost member was running; abandoned ones are not among them."""
        return [job for job in self._members.pop(group, {}).values() if not job.is_abandoned]

    def add(self, job: PoolJob) -> None:
        """Queues a job, for the first time or again."""
        job.group = None
        self._num_added += 1
        heapq.heappush(self._waiting, (job.deadline, self._num_added, job))

    def assign(self, now: float) -> list[tuple[str, PoolJob]]:
        """Takes jobs from the queue for members with room, the emptiest first."""
        found: list[tuple[str, PoolJob]] = []
        while self._waiting:
            job = self._waiting[0][2]
            if job.is_abandoned:
                heapq.heappop(self._waiting)
                continue
            group = self._room_for(job)
            if group is None:
                break
            heapq.heappop(self._waiting)
            job.group, job.started_at = group, now
            self._members[group][job.task_id] = job
            found.append((group, job))
        return found

    def finish(self, task_id: str) -> PoolJob | None:
        """The running job of this task, which leaves its member; None for a stale task."""
        for jobs in self._members.values():
            if task_id in jobs:
                return jobs.pop(task_id)
        return None

    def abandon(self, request_id: str) -> None:
        """Nobody wants this request's jobs any more: waiting ones are dropped, the results of running ones too."""
        for _, _, job in self._waiting:
            if job.request_id == request_id:
                job.is_abandoned = True
        for jobs in self._members.values():
            for job in jobs.values():
                if job.request_id == request_id:
                    job.is_abandoned = True

    def overdue(self, now: float) -> list[tuple[str, str]]:
        """(group, why) of members that take longer over a job than it is given."""
        found = []
        for group, jobs in self._members.items():
            late = [job for job in jobs.values() if now - job.started_at > self._slots * job.timeout_s]
            if late:
                found.append((group, f"{late[0].task_id} takes longer than {self._slots * late[0].timeout_s:.0f} s"))
        return found

    def _room_for(self, job: PoolJob) -> str | None:
        open_members = {
            group: jobs
            for group, jobs in self._members.items()
            if len(jobs) < self._slots and not any(other.is_suspect for other in jobs.values())
        }
        if not open_members:
            return None
        group = min(open_members, key=lambda name: len(open_members[name]))
        return None if job.is_suspect and open_members[group] else group
