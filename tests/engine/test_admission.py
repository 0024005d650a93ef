"""Who is let in: each rule refuses what it should, says why and when to come back."""

from __future__ import annotations

import pytest

from helios_serve.engine.admission import (
    STATUS,
    AdmissionConfig,
    Applicant,
    Decision,
    Site,
    admit_live,
    admit_offline,
    estimated_start_s,
    highest_fps,
    start_in_s,
)
from helios_serve.engine.fairness import Tenants
from helios_serve.engine.request_state import Arrival, GroupState, RequestState
from helios_serve.engine.scheduler import SchedulerConfig, new_state
from helios_serve.engine.step_cost import CostModel, DevicePrior, ModelShape
from helios_serve.types import PromptChange, SamplingParams, ServiceClass, VideoRequest

CFG = AdmissionConfig()


class Place:
    """A site that fills up."""

    def __init__(self, num_groups: int = 2, num_ranks: int = 4, num_vaes: int = 2) -> None:
        self.model = CostModel(ModelShape(), DevicePrior())
        self.tenants = Tenants()
        self.jobs: list[RequestState] = []
        self.num_ranks, self.num_vaes = num_ranks, num_vaes
        self.groups = [GroupState(group_id=f"g{i}", order=i, num_ranks=num_ranks) for i in range(num_groups)]

    @property
    def site(self) -> Site:
        return Site(jobs=self.jobs, groups=self.groups, num_vaes=self.num_vaes, tenants=self.tenants)

    def add(self, kind: ServiceClass, tenant: str, chunks: int = 20) -> RequestState:
        params = self.asks(tenant, chunks=chunks).params
        request = VideoRequest(
            request_id=f"r{len(self.jobs)}",
            prompts=(PromptChange(chunk=0, prompt=""),),
            params=params,
            service_class=kind,
            tenant=tenant,
        )
        arrival = Arrival(seq=len(self.jobs), at=0.0, num_ranks=self.num_ranks)
        job = new_state(request, arrival, self.tenants.get(tenant), self.model, SchedulerConfig())
        if kind == "offline":
            self.tenants.enter(job.tenant)
        else:
            for _ in range(6):
                job.chunk_done(0.0, self.model)
            job.published(0, 0.0)  # far ahead: reserves its rate, but is not due
        self.jobs.append(job)
        return job

    def asks(self, tenant: str, *, fps: float = 24.0, chunks: int = 20, quota: int | None = None) -> Applicant:
        params = SamplingParams(
            width=640,
            height=384,
            num_frames=33 * chunks,
            fps=fps,
            seed=0,
            steps=(2, 2, 2),
            guidance_scale=1.0,
            amplify_first_chunk=True,
        )
        return Applicant(
            params=params, tenant=tenant, num_ranks=self.num_ranks, max_live_jobs=quota, max_queued_jobs=quota
        )

    def live(self, tenant: str, cfg: AdmissionConfig = CFG, **asked: object) -> Decision:
        return admit_live(0.0, self.asks(tenant, **asked), self.site, self.model, cfg)  # type: ignore[arg-type]

    def fill(self, cfg: AdmissionConfig = CFG) -> Decision:
        """Admit streams of new tenants until one is refused."""
        while (decision := self.live(f"t{len(self.jobs)}", cfg)).admitted:
            self.add("realtime", f"t{len(self.jobs)}")
        return decision


def test_an_empty_server_lets_in() -> None:
    assert Place().live("a") == Decision(admitted=True)
    assert admit_offline(Place().asks("a"), Place().site, Place().model, CFG) == Decision(admitted=True)


def test_a_rate_that_one_gpu_cannot_make_is_refused_with_the_highest_one() -> None:
    place = Place(num_ranks=1)
    decision = place.live("a", fps=24.0)
    assert (decision.admitted, decision.code, STATUS["rate_not_sustainable"]) == (False, "rate_not_sustainable", 400)
    assert decision.max_fps == pytest.approx(0.9 * 33 / 1.548, abs=0.02)
    assert f"{decision.max_fps:g}" in decision.reason
    assert highest_fps(place.asks("a"), place.model, CFG) == decision.max_fps


def test_a_first_chunk_longer_than_the_target_is_refused_for_good() -> None:
    decision = Place(num_ranks=1).live("a", fps=16.0)
    assert (decision.code, decision.retry_after_s) == ("rate_not_sustainable", None)
    assert "first chunk" in decision.reason


def test_reservations_stop_at_the_live_share() -> None:
    place = Place()
    decision = place.fill()
    assert len(place.jobs) == 5  # 0.32 of a group each, 0.85 * 2 to give
    assert (decision.code, STATUS["capacity_exceeded"]) == ("capacity_exceeded", 503)
    assert decision.retry_after_s is not None
    assert 1.0 <= decision.retry_after_s <= 120.0


def test_capacity_counts_healthy_groups_and_the_spare_one() -> None:
    place, spare = Place(num_groups=4, num_vaes=8), Place(num_groups=5, num_vaes=8)
    place.fill()
    spare.fill(AdmissionConfig(survive_group_loss=True))
    assert len(place.jobs) == len(spare.jobs) == 10
    place.groups[0].is_healthy = False
    assert place.live("new").code == "capacity_exceeded"
    assert AdmissionConfig().live_capacity(16) == pytest.approx(0.9 * 16)


def test_without_a_healthy_group_nobody_comes_in() -> None:
    place = Place(num_groups=1)
    place.groups[0].is_healthy = False
    assert place.live("a").code == "no_worker"
    assert admit_offline(place.asks("a"), place.site, place.model, CFG).code == "no_worker"


def test_vae_servers_bound_live_streams() -> None:
    place = Place(num_groups=8, num_vaes=1)
    decision = place.fill()
    assert len(place.jobs) == 5  # 0.2 s of each 1.375 s, 0.75 to give
    assert "VAE" in decision.reason


def test_due_work_ahead_delays_the_first_frame() -> None:
    place = Place()
    for index in range(3):
        job = place.add("realtime", f"t{index}")
        job.play0, job.next_chunk = None, 0
        job.timing = place.model.timing(job.request.params, 0, 4)
    assert place.live("new").admitted
    late = place.live("new", AdmissionConfig(ttfc_target_s=2.0))
    assert "first frame" in late.reason
    assert late.code == "capacity_exceeded"


def test_a_tenants_own_limit() -> None:
    place = Place()
    place.add("realtime", "a")
    assert place.live("a", quota=2).admitted
    decision = place.live("a", quota=1)
    assert (decision.code, STATUS["quota_exceeded"]) == ("quota_exceeded", 429)
    assert place.live("b", quota=1).admitted


def test_when_little_is_free_only_tenants_below_their_share_get_more() -> None:
    place = Place(num_groups=4)
    for tenant in ["greedy"] * 8 + ["other"]:
        place.add("realtime", tenant)
    decision = place.live("greedy")
    assert decision.code == "capacity_exceeded"
    assert "share" in decision.reason
    assert place.live("modest").admitted


def test_retry_after_is_when_enough_streams_will_have_ended() -> None:
    place = Place()
    for chunks in (12, 30, 30, 30, 30):
        place.add("realtime", f"t{len(place.jobs)}", chunks=chunks)
    decision = place.live("new")
    assert decision.retry_after_s == pytest.approx(11 * 33 / 24)


def test_offline_is_refused_by_estimated_start_not_by_count() -> None:
    place = Place()
    for _ in range(300):
        place.add("offline", "a", chunks=1)
    applicant = place.asks("a")
    assert admit_offline(applicant, place.site, place.model, CFG).admitted
    for _ in range(200):
        place.add("offline", "a", chunks=15)
    decision = admit_offline(applicant, place.site, place.model, CFG)
    assert decision.code == "capacity_exceeded"
    work = (300 * 2 + 200 * 16) * 0.4393
    assert estimated_start_s(applicant, place.site, place.model) == pytest.approx(work / 2, rel=0.01)
    assert decision.retry_after_s == pytest.approx(min(120.0, work / 2 - 600), rel=0.05)


def test_fair_order_lets_another_tenant_start_at_once() -> None:
    place = Place()
    for _ in range(500):
        place.add("offline", "a", chunks=15)
    assert not admit_offline(place.asks("a"), place.site, place.model, CFG).admitted
    assert estimated_start_s(place.asks("b"), place.site, place.model) == 0.0
    assert admit_offline(place.asks("b"), place.site, place.model, CFG).admitted


def test_nothing_waits_while_groups_outnumber_the_jobs() -> None:
    place = Place()
    place.add("offline", "a", chunks=15)
    params = place.asks("a").params
    prompts = (PromptChange(chunk=0, prompt="p"),)
    ask = VideoRequest(request_id="video_0", prompts=prompts, params=params, tenant="a")
    assert estimated_start_s(place.asks("a"), place.site, place.model) > 0
    assert start_in_s(ask, place.site, place.model) == 0.0, "one of the two groups is free"
    place.add("offline", "a", chunks=15)
    waits_s = start_in_s(ask, place.site, place.model)
    assert waits_s == estimated_start_s(place.asks("a"), place.site, place.model) > 0
    live = VideoRequest(request_id="video_1", prompts=prompts, params=params, tenant="a", service_class="realtime")
    assert start_in_s(live, place.site, place.model) == 0.0


def test_live_reservations_lengthen_the_offline_wait() -> None:
    place = Place()
    for _ in range(10):
        place.add("offline", "a")
    before = estimated_start_s(place.asks("a"), place.site, place.model)
    place.add("realtime", "b")
    after = estimated_start_s(place.asks("a"), place.site, place.model)
    assert after == pytest.approx(before * 2 / (2 - 0.4393 / 1.375), rel=0.01)


def test_offline_quotas() -> None:
    place = Place()
    place.add("offline", "a")
    assert admit_offline(place.asks("a", quota=1), place.site, place.model, CFG).code == "quota_exceeded"
    assert admit_offline(place.asks("a", quota=2), place.site, place.model, CFG).admitted
    asked = place.asks("b")
    seconds = Applicant(params=asked.params, tenant="b", num_ranks=4, max_queued_s=5.0)
    assert admit_offline(seconds, place.site, place.model, CFG).code == "quota_exceeded"
