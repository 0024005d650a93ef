"""Whether one more chunk may enter a pack: gain, memory and the deadlines of everyone in it.

Knows the scheduler's settings and the cost model's predictions; starts nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from helios_serve.engine.fairness import AgeCredit
from helios_serve.engine.request_state import GroupState, RequestState
from helios_serve.engine.step_cost import CostModel

Batching = Literal["auto", "always", "off"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """The scheduler's settings, times in seconds; RELIABILITY.md 4 and 6 give the reasons for the defaults."""

    ttfc_target_s: float = 3.0
    margin_s: float = 0.05
    run_ahead: int = 4
    run_ahead_interactive: int = 2
    run_ahead_max: int = 8
    """Chunks a playing stream may be ahead: when due, when interactive, and when nothing else is ready."""
    age_after_s: float = 60.0
    triage: float = 0.95
    batching: Batching = "auto"
    max_pack: int = 8
    pack_gain_offline: float = 0.98
    pack_gain_live: float = 0.90
    """A pack must take less than this share of the time its parts would take one after the other."""
    pack_candidates: int = 8
    max_parked: int = 64

    def __post_init__(self) -> None:
        """Raises ValueError for settings that cannot work together."""
        if not 1 <= self.run_ahead_interactive <= self.run_ahead <= self.run_ahead_max:
            raise ValueError("run-ahead limits must rise: 1 <= interactive <= plain <= max")
        if self.max_pack < 1 or self.pack_candidates < 1 or self.max_parked < 0:
            raise ValueError("max_pack and pack_candidates must be at least 1, max_parked at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """What one round of planning has on its table."""

    now: float
    model: CostModel
    cfg: SchedulerConfig
    credit: AgeCredit
    gains: dict[tuple[object, ...], tuple[float, ...] | None] = field(default_factory=dict)
    """Answers of `_gains` in this round: many groups and chunks are alike."""


def pack_pays(pack: list[RequestState], job: RequestState, group: GroupState, desk: Desk) -> bool:
    """Whether `job` may enter `pack`: it gains enough, fits, and no live member is late or worse off for it."""
    if job.runs_alone or not _fits(pack, job, group):
        return False
    if desk.cfg.batching == "always":
        return True
    has_live = job.live or any(member.live for member in pack)
    key = (has_live, job.timing.key, job.step, *[(m.timing.key, m.step, m.in_forward) for m in pack])
    if key not in desk.gains:
        desk.gains[key] = _gains(pack, job, has_live, desk)
    finish = desk.gains[key]
    if finish is None:
        return False
    wait_s = max(0.0, group.next_boundary - desk.now) if group.jobs else 0.0
    return all(
        slack_after(member, desk, wait_s + seconds) >= 0.0
        for member, seconds in zip([*pack, job], finish, strict=True)
        if member.live
    )


def _gains(pack: list[RequestState], job: RequestState, has_live: bool, desk: Desk) -> tuple[float, ...] | None:
    """Seconds from the next boundary until each member and `job` finish; None when packing saves too little."""
    members = [(member.timing, member.step + int(member.in_forward)) for member in pack]
    alone = (job.timing, job.step)
    before = max(desk.model.pack_finish_s(members))
    solo = desk.model.pack_finish_s([alone])[0]
    finish = desk.model.pack_finish_s([*members, alone])
    share = desk.cfg.pack_gain_live if has_live else desk.cfg.pack_gain_offline
    if before == 0.0 or max(finish) >= share * (before + solo) or finish[-1] > before + solo:
        return None
    return finish


def slack_after(job: RequestState, desk: Desk, finish_s: float) -> float:
    """Slack of a live job whose chunk makes its last step `finish_s` from now; 2 sigma and the decode still to come."""
    reserve = job.timing.lead_s[job.step] - job.timing.remaining_s[job.step]  # 2 sigma + decode + commit
    return job.deadline_at(desk.now) - desk.now - finish_s - reserve - desk.model.vae_queue_s - desk.cfg.margin_s


def _fits(pack: list[RequestState], job: RequestState, group: GroupState) -> bool:
    """Whether the largest forwards of all members fit the memory together."""
    if group.max_tokens is None:
        return True
    return sum(_peak_tokens(member) for member in [*pack, job]) <= group.max_tokens


def _peak_tokens(job: RequestState) -> int:
    return max((step.num_tokens for step in job.timing.steps[job.step :]), default=0)
