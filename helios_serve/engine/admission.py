"""Says whether one more request may come in, why not, and when to try again.

Knows capacity, deadlines and quotas; changes nothing: the caller enters an admitted request. No clock, no I/O.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from helios_serve.engine.fairness import Tenants
from helios_serve.engine.request_state import GroupState, RequestState
from helios_serve.engine.step_cost import CostModel
from helios_serve.errors import CapacityError, InvalidRequestError, QuotaError
from helios_serve.types import FRAMES_PER_CHUNK, SamplingParams, VideoRequest

Code = Literal["rate_not_sustainable", "capacity_exceeded", "quota_exceeded", "no_worker"]

STATUS: Final[dict[Code, int]] = {
    "rate_not_sustainable": 400,
    "capacity_exceeded": 503,
    "quota_exceeded": 429,
    "no_worker": 503,
}
"""HTTP status of each refusal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionConfig:
    """Shares are of healthy groups or of VAE servers, times in seconds."""

    ttfc_target_s: float = 3.0
    live_share: float = 0.85
    live_share_large: float = 0.90
    large_from_groups: int = 16
    survive_group_loss: bool = False
    feasible_share: float = 0.90
    """Part of a chunk's playing time that computing it may take."""
    vae_share: float = 0.75
    tight_share: float = 0.20
    """When less than this part of the live capacity is free, only tenants below their share get more."""
    max_queue_wait_s: float = 600.0
    retry_min_s: float = 1.0
    retry_max_s: float = 120.0

    def live_capacity(self, num_groups: int) -> float:
        """Group-seconds per second that live jobs may reserve of `num_groups` healthy groups."""
        share = self.live_share_large if num_groups >= self.large_from_groups else self.live_share
        return share * max(0, num_groups - int(self.survive_group_loss))


@dataclass(frozen=True, slots=True, kw_only=True)
class Applicant:
    """What is asked for; None for a quota that the tenant does not have."""

    params: SamplingParams
    tenant: str
    weight: float = 1.0
    num_ranks: int = 1
    has_media: bool = False
    max_live_jobs: int | None = None
    max_queued_jobs: int | None = None
    max_queued_s: float | None = None
    """Predicted group-seconds of unfinished offline work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What there is to run on, and who uses it."""

    jobs: Sequence[RequestState]
    groups: Sequence[GroupState]
    num_vaes: int
    tenants: Tenants

    @property
    def num_groups(self) -> int:
        return sum(group.is_healthy for group in self.groups)

    def live_jobs(self) -> list[RequestState]:
        """Those for which capacity is reserved."""
        return [job for job in self.jobs if job.live and not (job.is_cancelled or job.has_released)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The answer. `max_fps` is the highest rate that this server sustains at these parameters."""

    admitted: bool
    code: Code | None = None
    reason: str = ""
    retry_after_s: float | None = None
    max_fps: float | None = None


def highest_fps(applicant: Applicant, model: CostModel, cfg: AdmissionConfig) -> float:
    """The rate at which a chunk plays as long as it takes, with reserve; rounded down to 1/100."""
    chunk_s = model.timing(applicant.params, 1, applicant.num_ranks).occupied_s
    return math.floor(100 * cfg.feasible_share * FRAMES_PER_CHUNK / chunk_s) / 100


def admit(now: float, request: VideoRequest, site: Site, model: CostModel, cfg: AdmissionConfig) -> None:
    """Admits a request of either class.

    Raises: InvalidRequestError, QuotaError or CapacityError, with when to try again.
    """
    applicant = _applicant(request, site)
    if request.service_class == "realtime":
        decision = admit_live(now, applicant, site, model, cfg)
    else:
        decision = admit_offline(applicant, site, model, cfg)
    if decision.admitted:
        return
    if decision.code == "rate_not_sustainable":
        raise InvalidRequestError(decision.reason, param="fps", code=decision.code)
    kind = QuotaError if decision.code == "quota_exceeded" else CapacityError
    raise kind(decision.reason, code=decision.code, retry_after_s=decision.retry_after_s)


def start_in_s(request: VideoRequest, site: Site, model: CostModel) -> float:
    """Seconds until an admitted request would start: 0 for a realtime one, and while groups outnumber the jobs."""
    if request.service_class == "realtime" or len(site.jobs) < site.num_groups:
        return 0.0
    return estimated_start_s(_applicant(request, site), site, model)


def _applicant(request: VideoRequest, site: Site) -> Applicant:
    return Applicant(
        params=request.params,
        tenant=request.tenant,
        num_ranks=next((group.num_ranks for group in site.groups), 1),
        has_media=request.task != "t2v",
    )


def admit_live(now: float, applicant: Applicant, site: Site, model: CostModel, cfg: AdmissionConfig) -> Decision:
    """The rules for a job with a playback clock (RELIABILITY.md 4.4); the first one broken is named."""
    if site.num_groups == 0:
        return Decision(admitted=False, code="no_worker", reason="no healthy group", retry_after_s=cfg.retry_max_s)
    return (
        _infeasible(applicant, model, cfg)
        or _over_quota(applicant, site, cfg)
        or _over_capacity(now, applicant, site, model, cfg)
        or _first_frame_late(now, applicant, site, model, cfg)
        or Decision(admitted=True)
    )


def admit_offline(applicant: Applicant, site: Site, model: CostModel, cfg: AdmissionConfig) -> Decision:
    """The rule for a job without a clock: refused when it would start too late or exceeds a quota, not by count."""
    if site.num_groups == 0:
        return Decision(admitted=False, code="no_worker", reason="no healthy group", retry_after_s=cfg.retry_max_s)
    own = [job for job in site.jobs if not job.live and job.tenant.name == applicant.tenant]
    if applicant.max_queued_jobs is not None and len(own) >= applicant.max_queued_jobs:
        return _quota(f"{len(own)} unfinished jobs; at most {applicant.max_queued_jobs}", cfg)
    if applicant.max_queued_s is not None:
        asked = model.timing(applicant.params, 1, applicant.num_ranks).remaining_s[0] * applicant.params.num_chunks
        total = asked + sum(job.work_left_s for job in own)
        if total > applicant.max_queued_s:
            return _quota(f"{total:.0f} s of queued work; at most {applicant.max_queued_s:.0f} s", cfg)
    wait_s = estimated_start_s(applicant, site, model)
    if wait_s > cfg.max_queue_wait_s:
        return Decision(
            admitted=False,
            code="capacity_exceeded",
            reason=f"the estimated start is in {wait_s:.0f} s; at most {cfg.max_queue_wait_s:.0f} s",
            retry_after_s=_clamp(wait_s - cfg.max_queue_wait_s, cfg),
        )
    return Decision(admitted=True)


def estimated_start_s(applicant: Applicant, site: Site, model: CostModel) -> float:
    """Seconds until an offline job would start: the work before it in fair order over the capacity live jobs leave.

    In fair order the tenant's own queue goes first, and every other tenant is served until its virtual time catches
    up with the one at which that queue ends.
    """
    timing = model.timing(applicant.params, 1, applicant.num_ranks)
    queued: dict[str, tuple[float, float, float]] = {}  # tenant -> (TFLOP queued, virtual time, weight)
    for job in site.jobs:
        if not job.live and not job.is_cancelled:
            tflop = queued.get(job.tenant.name, (0.0, 0.0, 0.0))[0] + job.work_left_tflop
            queued[job.tenant.name] = (tflop, job.tenant.vtime, job.tenant.weight)
    own = queued.pop(applicant.tenant, (0.0, 0.0, 0.0))[0]
    tag = site.tenants.arriving_vtime(applicant.tenant) + own / applicant.weight
    ahead = own + sum(min(tflop, max(0.0, tag - vtime) * weight) for tflop, vtime, weight in queued.values())
    reserved = sum(job.steady.occupied_s / job.period_s for job in site.live_jobs())
    free = max(0.05 * site.num_groups, site.num_groups - reserved)
    return ahead * timing.occupied_s / timing.tflop_left[0] / free


def _infeasible(applicant: Applicant, model: CostModel, cfg: AdmissionConfig) -> Decision | None:
    """(a), and (d) on an empty server: waiting would not help."""
    best = highest_fps(applicant, model, cfg)
    if applicant.params.fps > best:
        return Decision(
            admitted=False,
            code="rate_not_sustainable",
            reason=f"fps {applicant.params.fps:g} is more than this server sustains at this size and these steps; "
            f"highest: {best:g}",
            max_fps=best,
        )
    first_s = _first_frame_s(applicant, model)
    if first_s > cfg.ttfc_target_s:
        return Decision(
            admitted=False,
            code="rate_not_sustainable",
            reason=f"the first chunk alone takes {first_s:.1f} s; the target for the first frame is "
            f"{cfg.ttfc_target_s:.1f} s",
        )
    return None


def _over_quota(applicant: Applicant, site: Site, cfg: AdmissionConfig) -> Decision | None:
    """(e), the tenant's own limit."""
    running = sum(job.tenant.name == applicant.tenant for job in site.live_jobs())
    if applicant.max_live_jobs is None or running < applicant.max_live_jobs:
        return None
    return _quota(f"{running} live jobs; at most {applicant.max_live_jobs}", cfg)


def _over_capacity(
    now: float, applicant: Applicant, site: Site, model: CostModel, cfg: AdmissionConfig
) -> Decision | None:
    """(b) groups, (c) VAE servers, (e) fair shares when little is free."""
    timing = model.timing(applicant.params, 1, applicant.num_ranks)
    period = FRAMES_PER_CHUNK / applicant.params.fps
    asked = timing.occupied_s / period
    live = site.live_jobs()
    occupancy = {job.seq: job.steady.occupied_s / job.period_s for job in live}
    used, capacity = sum(occupancy.values()), cfg.live_capacity(site.num_groups)
    over = used + asked - capacity
    if over > 0:
        return _full(
            f"live streams would use {used + asked:.2f} of {capacity:.2f} groups", _frees_s(now, live, over), cfg
        )
    if not model.prior.vae_on_device:
        decoding = sum(model.decode_s(job.steady.pixel_ratio) / job.period_s for job in live)
        over = decoding + model.decode_s(timing.pixel_ratio) / period - cfg.vae_share * site.num_vaes
        if over > 0:
            over_groups = over * asked * period / model.decode_s(timing.pixel_ratio)
            return _full("decoding would use more than its share of the VAEs", _frees_s(now, live, over_groups), cfg)
    if capacity - used < cfg.tight_share * capacity:
        weights = {job.tenant.name: job.tenant.weight for job in live} | {applicant.tenant: applicant.weight}
        share = capacity * applicant.weight / sum(weights.values())
        own = sum(occupancy[job.seq] for job in live if job.tenant.name == applicant.tenant)
        if own >= share:
            return _full("little is free and this tenant has its share", _frees_s(now, live, asked), cfg)
    return None


def _first_frame_late(
    now: float, applicant: Applicant, site: Site, model: CostModel, cfg: AdmissionConfig
) -> Decision | None:
    """(d): due live work goes first."""
    due = sum(job.chunk_left_s for job in site.live_jobs() if job.is_due(now))
    expected = due / site.num_groups + _first_frame_s(applicant, model)
    if expected <= cfg.ttfc_target_s:
        return None
    return _full(
        f"the first frame would come after {expected:.1f} s; the target is {cfg.ttfc_target_s:.1f} s",
        expected - cfg.ttfc_target_s,
        cfg,
    )


def _first_frame_s(applicant: Applicant, model: CostModel) -> float:
    timing = model.timing(applicant.params, 0, applicant.num_ranks)
    encode = model.text_s() + (model.media_s() if applicant.has_media else 0.0)
    return encode + timing.remaining_s[0] + model.decode_s(timing.pixel_ratio)


def _frees_s(now: float, live: Sequence[RequestState], needed: float) -> float:
    """Seconds until live jobs that end by then will have given back `needed` groups."""
    freed = 0.0
    for ends_at, occupancy in sorted((job.ends_at(now), job.steady.occupied_s / job.period_s) for job in live):
        freed += occupancy
        if freed >= needed:
            return ends_at - now
    return math.inf


def _full(reason: str, retry_after_s: float, cfg: AdmissionConfig) -> Decision:
    return Decision(admitted=False, code="capacity_exceeded", reason=reason, retry_after_s=_clamp(retry_after_s, cfg))


def _quota(reason: str, cfg: AdmissionConfig) -> Decision:
    return Decision(admitted=False, code="quota_exceeded", reason=reason, retry_after_s=cfg.retry_min_s)


def _clamp(seconds: float, cfg: AdmissionConfig) -> float:
    return min(cfg.retry_max_s, max(cfg.retry_min_s, seconds))
