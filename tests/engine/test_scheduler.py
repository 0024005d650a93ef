"""Every rule of `plan`: tiers, slack, ageing, shares, packing, preemption, pacing, triage."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helios_serve.engine.fairness import AgeCredit, Tenants
from helios_serve.engine.pack_gate import Desk, slack_after
from helios_serve.engine.request_state import Arrival, GroupState, RequestState
from helios_serve.engine.scheduler import Action, Join, Park, SchedulerConfig, Start, new_state, next_wake, plan
from helios_serve.engine.step_cost import CostModel, DevicePrior, ModelShape
from helios_serve.types import PromptChange, SamplingParams, VideoRequest

EAGER = DevicePrior(floor_s=0.5)
"""A device on which a forward takes half a second whatever it holds: packing always gains."""


@dataclass
class Shop:
    """A scheduler's surroundings."""

    num_groups: int = 1
    num_ranks: int = 4
    cfg: SchedulerConfig = field(default_factory=lambda: SchedulerConfig(batching="off"))
    prior: DevicePrior = field(default_factory=DevicePrior)
    balance_s: float = 0.0

    def __post_init__(self) -> None:
        self.model = CostModel(ModelShape(), self.prior)
        self.tenants = Tenants()
        self.credit = AgeCredit(rate=0.0, balance_s=self.balance_s)
        self.groups = [GroupState(group_id=f"g{i}", order=i, num_ranks=self.num_ranks) for i in range(self.num_groups)]
        self.jobs: list[RequestState] = []

    def add(self, name: str, *, at: float = 0.0, **changes: object) -> RequestState:
        options: dict[str, object] = {
            "live": False,
            "tenant": "a",
            "priority": 0,
            "strict": False,
            "interactive": False,
        }
        assert set(changes) <= set(options)
        options |= changes
        request = VideoRequest(
            request_id=name,
            prompts=(PromptChange(chunk=0, prompt=""),),
            params=SamplingParams(
                width=640,
                height=384,
                num_frames=33 * 20,
                fps=24.0,
                seed=0,
                steps=(2, 2, 2),
                guidance_scale=1.0,
            ),
            service_class="realtime" if options["live"] else "offline",
            tenant=str(options["tenant"]),
            priority=int(str(options["priority"])),
        )
        arrival = Arrival(
            seq=len(self.jobs),
            at=at,
            num_ranks=self.num_ranks,
            is_interactive=bool(options["interactive"]),
            is_strict=bool(options["strict"]),
        )
        job = new_state(request, arrival, self.tenants.get(request.tenant), self.model, self.cfg)
        if not job.live:
            self.tenants.enter(job.tenant)
        job.is_ready = True
        self.jobs.append(job)
        return job

    def playing(self, name: str, *, since: float, made: int, **changes: object) -> RequestState:
        """A live job whose segment 0 came at `since` and that has made `made` chunks."""
        job = self.add(name, live=True, **changes)  # type: ignore[arg-type]
        for _ in range(made):
            job.chunk_done(since, self.model)
        job.published(0, since)
        return job

    def plan(self, now: float) -> list[Action]:
        actions = plan(now, self.jobs, self.groups, self.model, self.cfg, self.credit)
        for group in self.groups:
            if group.jobs and not any(job.in_forward for job in group.jobs):
                group.forward_began(now, self.model)
        return actions

    def finish(self, group: GroupState, now: float) -> None:
        """Run the group's chunks to their ends."""
        for job in list(group.jobs):
            while not job.step_done():
                pass
            group.released(job)
            job.chunk_done(now, self.model)


def started(actions: list[Action]) -> list[list[str]]:
    return [[task.request_id for task in action.tasks] for action in actions if isinstance(action, Start)]


def parked(actions: list[Action]) -> list[tuple[str, str]]:
    return [(action.group, action.task.request_id) for action in actions if isinstance(action, Park)]


def test_due_live_goes_before_offline_and_offline_before_run_ahead() -> None:
    shop = Shop()
    shop.add("offline")
    shop.playing("ahead", since=0.0, made=6)
    shop.add("due", live=True)
    order = []
    for now in (0.0, 0.1, 0.2):
        order += started(shop.plan(now))
        shop.groups[0].released(shop.groups[0].jobs[0])
    assert order == [["due"], ["offline"], ["ahead"]]


def test_least_slack_first() -> None:
    shop = Shop()
    shop.add("late", at=0.0, live=True)
    shop.add("later", at=1.0, live=True)
    shop.playing("urgent", since=-10.0, made=4)
    assert started(shop.plan(1.0)) == [["urgent"]]


def test_slack_counts_the_work_left() -> None:
    shop = Shop()
    fresh, nearly = shop.add("fresh", live=True), shop.add("nearly", live=True, at=-0.1)
    nearly.step = 5
    assert nearly.deadline < fresh.deadline
    assert started(shop.plan(0.0)) == [["fresh"]]


@pytest.mark.parametrize("live", [True, False])
def test_nothing_runs_before_its_conditioning_or_when_held_or_cancelled(live: bool) -> None:
    shop = Shop()
    shop.add("waits", live=live).is_ready = False
    shop.add("held", live=live).is_held = True
    shop.add("cancelled", live=live).is_cancelled = True
    assert shop.plan(0.0) == []


def test_a_group_of_another_size_is_left_alone() -> None:
    shop = Shop()
    shop.add("job")
    shop.groups[0].num_ranks = 2
    assert shop.plan(0.0) == []


def test_unhealthy_groups_get_nothing() -> None:
    shop = Shop(num_groups=2)
    shop.add("a")
    shop.groups[0].is_healthy = False
    (action,) = shop.plan(0.0)
    assert isinstance(action, Start)
    assert action.group == "g1"


def test_offline_order_is_virtual_time_then_priority_then_arrival() -> None:
    shop = Shop(num_groups=4)
    shop.add("first", tenant="a")
    shop.add("urgent", tenant="a", priority=-1)
    shop.add("other", tenant="b", priority=5)
    shop.tenants.get("b").charge(10.0)
    shop.add("second", tenant="a")
    assert started(shop.plan(0.0)) == [["urgent"], ["other"], ["first"], ["second"]]


def test_equal_tenants_get_equal_service_whatever_they_submit() -> None:
    shop = Shop()
    for index in range(30):
        shop.add(f"many{index}", tenant="many")
    for index in range(3):
        shop.add(f"few{index}", tenant="few")
    chunk = shop.jobs[0].steady.tflop_left[0]
    for now in range(40):
        shop.plan(float(now))
        shop.finish(shop.groups[0], now + 0.5)
        done = {name: shop.tenants.get(name).charged_tflop for name in ("many", "few")}
        assert abs(done["many"] - done["few"]) <= 2 * chunk + 1e-6


def test_weights_scale_shares() -> None:
    shop = Shop()
    shop.tenants.get("heavy", weight=3.0)
    for index in range(10):
        shop.add(f"h{index}", tenant="heavy")
        shop.add(f"l{index}", tenant="light")
    for now in range(40):
        shop.plan(float(now))
        shop.finish(shop.groups[0], now + 0.5)
    assert shop.tenants.get("heavy").charged_tflop == pytest.approx(
        3 * shop.tenants.get("light").charged_tflop, rel=0.1
    )


def test_a_tenant_that_was_idle_saves_up_no_share() -> None:
    tenants = Tenants()
    busy, idle = tenants.get("busy"), tenants.get("idle")
    tenants.enter(busy)
    busy.charge(100.0)
    tenants.enter(idle)
    assert idle.vtime == 100.0
    tenants.leave(idle)
    idle.charge(50.0)
    busy.charge(300.0)
    tenants.leave(busy)
    late = tenants.get("late")
    tenants.enter(late)
    assert late.vtime == 400.0


def test_park_refunds_what_was_not_run_and_resume_charges_it_again() -> None:
    shop = Shop()
    job = shop.add("job")
    shop.plan(0.0)
    job.step_done()
    job.step_done()
    shop.groups[0].released(job)
    job.parked(1.0)
    tenant, timing = job.tenant, job.timing
    assert tenant.charged_tflop - tenant.refunded_tflop == pytest.approx(timing.tflop_left[0] - timing.tflop_left[2])
    (action,) = shop.plan(1.0)
    assert isinstance(action, Start)
    assert action.tasks[0].step == 2
    assert action.tasks[0].predicted_s == pytest.approx(timing.remaining_s[2])
    assert tenant.charged_tflop - tenant.refunded_tflop == pytest.approx(timing.tflop_left[0])


def test_a_lost_chunk_starts_again_with_a_new_attempt() -> None:
    shop = Shop()
    job = shop.add("job")
    shop.plan(0.0)
    job.step_done()
    assert shop.groups[0].condemned(1.0) == [job]
    assert (job.step, job.attempt, job.group_id) == (0, 1, None)
    assert job.tenant.charged_tflop - job.tenant.refunded_tflop == pytest.approx(job.executed_tflop)


def test_ageing_lifts_a_starved_job_once_per_chunk_and_pays() -> None:
    shop = Shop(balance_s=0.3)
    old = shop.add("old", at=0.0)
    shop.add("due", at=70.0, live=True)
    assert started(shop.plan(70.0)) == [["old"]]
    assert old.aged
    assert shop.credit.balance_s == pytest.approx(0.3 - old.timing.remaining_s[0])
    assert parked(shop.plan(70.1)) == []  # bought time is not preempted
    shop.finish(shop.groups[0], 71.0)
    assert not old.aged
    assert started(shop.plan(200.0)) == [["due"]]  # the credit is used up


def test_no_ageing_before_a_minute() -> None:
    shop = Shop(balance_s=10.0)
    shop.add("young", at=0.0)
    shop.add("due", at=50.0, live=True)
    assert started(shop.plan(59.0)) == [["due"]]


def test_age_credit_refills_with_groups_and_is_capped() -> None:
    credit = AgeCredit()
    assert credit.refill(10.0, 2) == pytest.approx(1.0)
    assert credit.refill(1000.0, 2) == pytest.approx(6.0)


def test_a_due_live_job_parks_the_group_with_the_nearest_boundary_once() -> None:
    shop = Shop(num_groups=2)
    shop.add("a")
    shop.add("b")
    shop.plan(0.0)
    shop.groups[0].next_boundary, shop.groups[1].next_boundary = 0.4, 0.2
    shop.add("due", live=True)
    assert parked(shop.plan(0.1)) == [("g1", "b")]
    assert parked(shop.plan(0.15)) == []
    shop.add("due too", live=True)
    assert parked(shop.plan(0.16)) == [("g0", "a")]


def test_a_group_that_the_waiting_job_cannot_use_is_not_parked() -> None:
    shop = Shop(num_groups=2)
    shop.add("runs")
    shop.plan(0.0)
    shop.num_ranks = 2
    shop.add("due", live=True)
    assert shop.plan(0.1) == []


def test_live_work_is_not_parked_for_live_work() -> None:
    shop = Shop()
    shop.add("first", live=True)
    shop.plan(0.0)
    shop.add("second", live=True)
    assert shop.plan(0.1) == []


def test_run_ahead_is_parked_for_due_work() -> None:
    shop = Shop()
    shop.playing("ahead", since=0.0, made=6)
    assert started(shop.plan(0.0)) == [["ahead"]]
    shop.add("due", live=True)
    assert parked(shop.plan(0.1)) == [("g0", "ahead")]


def test_a_chunk_in_its_last_step_is_not_parked() -> None:
    shop = Shop()
    job = shop.add("job")
    shop.plan(0.0)
    for _ in range(5):
        job.step_done()
    shop.add("due", live=True)
    assert shop.plan(0.1) == []


def test_at_most_so_many_chunks_are_parked() -> None:
    shop = Shop(cfg=SchedulerConfig(batching="off", max_parked=1))
    shop.add("was parked").step = 3
    shop.jobs[0].is_held = True
    shop.add("runs")
    shop.plan(0.0)
    shop.add("due", live=True)
    assert shop.plan(0.1) == []


def test_pacing_and_wake_up() -> None:
    shop = Shop()
    job = shop.playing("plain", since=0.0, made=10)
    period = job.period_s
    assert next_wake(0.0, shop.jobs, shop.cfg) == pytest.approx(period)
    assert shop.plan(0.9 * period) == []
    assert started(shop.plan(1.01 * period)) == [["plain"]]
    assert job.tier == 3


def test_interactive_jobs_stay_two_chunks_ahead() -> None:
    shop = Shop()
    job = shop.playing("game", since=0.0, made=4, interactive=True)
    assert shop.plan(0.9 * job.period_s) == []
    assert started(shop.plan(1.01 * job.period_s)) == [["game"]]
    assert job.tier == 0


def test_a_standing_player_freezes_the_deadline() -> None:
    shop = Shop()
    job = shop.playing("paused", since=0.0, made=10)
    job.pause(0.0)
    assert shop.plan(100.0) == []
    job.resume(100.0)
    assert job.deadline == pytest.approx(100.0 + 10 * job.period_s)
    assert job.stalled_s == 0.0


def test_late_segments_count_as_stall_and_move_the_deadline() -> None:
    shop = Shop()
    job = shop.playing("stream", since=0.0, made=2)
    job.published(1, job.period_s + 0.5)
    assert job.stalled_s == pytest.approx(0.5)
    assert job.deadline == pytest.approx(2 * job.period_s + 0.5)


def test_triage_keeps_playing_jobs_whole_and_demotes_the_newest() -> None:
    shop = Shop()
    jobs = [shop.playing(f"p{i}", since=-9.0, made=3, at=float(i)) for i in range(2)]
    jobs += [shop.add(f"new{i}", live=True, at=float(2 + i)) for i in range(2)]
    shop.plan(3.0)
    assert [job.demoted for job in jobs] == [False, False, True, True]  # 0.32 of a group each, 0.95 to give
    shop.jobs.remove(jobs[0])
    shop.plan(3.1)
    assert [job.demoted for job in jobs[1:]] == [False, False, True]
    shop.jobs.remove(jobs[1])
    shop.plan(3.2)
    assert [job.demoted for job in jobs[2:]] == [False, False]


def test_demoted_jobs_come_after_full_service_and_are_parked_for_it() -> None:
    shop = Shop()
    jobs = [shop.playing(f"p{i}", since=-9.0, made=3, at=float(i)) for i in range(4)]
    for job in jobs[:3]:
        job.is_held = True
    assert started(shop.plan(0.0)) == [["p3"]]
    assert jobs[3].tier == 1
    jobs[0].is_held = False
    assert parked(shop.plan(0.1)) == [("g0", "p3")]


def packing(mode: str = "auto", **changes: object) -> SchedulerConfig:
    return SchedulerConfig(batching=mode, **changes)  # type: ignore[arg-type]


def test_auto_packs_where_a_forward_costs_the_same_whatever_it_holds() -> None:
    shop = Shop(cfg=packing(max_pack=3), prior=EAGER)
    for index in range(5):
        shop.add(f"j{index}")
    assert started(shop.plan(0.0)) == [["j0", "j1", "j2"]]


def test_auto_does_not_pack_where_nothing_is_gained() -> None:
    shop = Shop(cfg=packing())
    shop.add("a")
    shop.add("b")
    assert started(shop.plan(0.0)) == [["a"]]


def test_auto_spreads_before_it_packs() -> None:
    shop = Shop(num_groups=2, cfg=packing(), prior=EAGER)
    shop.add("a")
    shop.add("b")
    assert started(shop.plan(0.0)) == [["a"], ["b"]]


def test_always_packs_and_off_does_not() -> None:
    for mode, expected in (("always", [["a", "b"]]), ("off", [["a"]])):
        shop = Shop(cfg=packing(mode))
        shop.add("a")
        shop.add("b")
        assert started(shop.plan(0.0)) == expected


@pytest.mark.parametrize("mode", ["auto", "always"])
def test_strict_and_suspect_jobs_run_alone(mode: str) -> None:
    shop = Shop(cfg=packing(mode), prior=EAGER)
    shop.add("strict", strict=True)
    shop.add("suspect").is_suspect = True
    shop.add("a")
    assert started(shop.plan(0.0)) == [["strict"]]
    assert shop.plan(0.1) == []
    shop.finish(shop.groups[0], 1.0)
    shop.jobs[0].is_held = True
    assert started(shop.plan(1.0)) == [["suspect"]]
    shop.finish(shop.groups[0], 2.0)
    shop.jobs[1].is_held = True
    assert started(shop.plan(2.0)) == [["a"]]


def test_live_members_ask_for_a_larger_gain() -> None:
    for gain, expected in ((0.6, [["live", "off"]]), (0.4, [["live"]])):
        shop = Shop(cfg=packing(pack_gain_live=gain), prior=DevicePrior(floor_s=0.2))
        shop.add("live", live=True)
        shop.add("off")
        assert started(shop.plan(0.0)) == expected


def test_no_pack_that_would_make_a_live_member_late() -> None:
    for at, expected in ((-1.4, [["live"]]), (0.0, [["live", "off"]])):  # alone 1.2 s, together 1.4 s
        shop = Shop(cfg=packing(), prior=DevicePrior(floor_s=0.2))
        shop.add("live", live=True, at=at)
        shop.add("off")
        assert started(shop.plan(0.0)) == expected


def test_memory_limits_a_pack() -> None:
    shop = Shop(cfg=packing(), prior=EAGER)
    for index in range(4):
        shop.add(f"j{index}")
    shop.groups[0].max_tokens = 2 * 11_040
    assert started(shop.plan(0.0)) == [["j0", "j1"]]


def test_a_waiting_job_joins_a_running_pack() -> None:
    shop = Shop(cfg=packing(), prior=EAGER)
    first = shop.add("first")
    shop.plan(0.0)
    first.step_done()
    shop.groups[0].forward_began(0.5, shop.model)
    second = shop.add("second")
    (action,) = shop.plan(0.6)
    assert isinstance(action, Join)
    assert (action.group, action.task.request_id, action.task.chunk) == ("g0", "second", 0)
    assert shop.groups[0].jobs == [first, second]
    assert (first.in_forward, second.in_forward) == (True, False)


def test_nobody_joins_a_pack_that_is_being_parked() -> None:
    shop = Shop(cfg=packing(), prior=EAGER)
    shop.add("first")
    shop.plan(0.0)
    shop.groups[0].park_pending = True
    shop.add("second")
    assert shop.plan(0.1) == []


def test_config_refuses_limits_that_contradict() -> None:
    with pytest.raises(ValueError, match="run-ahead"):
        SchedulerConfig(run_ahead=9)
    with pytest.raises(ValueError, match="max_pack"):
        SchedulerConfig(max_pack=0)


JOBS = st.lists(
    st.tuples(st.booleans(), st.integers(0, 5), st.floats(0, 5), st.sampled_from("abc"), st.booleans()),
    min_size=1,
    max_size=12,
)


def crowd(jobs: list[tuple[bool, int, float, str, bool]], cfg: SchedulerConfig) -> Shop:
    shop = Shop(num_groups=3, cfg=cfg, prior=DevicePrior(floor_s=0.3))
    for index, (live, step, at, tenant, strict) in enumerate(jobs):
        shop.add(f"j{index}", live=live, at=at, tenant=tenant, strict=strict).step = step
    return shop


@settings(max_examples=60, deadline=None)
@given(JOBS, st.floats(0, 8))
def test_property_no_accepted_pack_breaks_a_deadline(
    jobs: list[tuple[bool, int, float, str, bool]], now: float
) -> None:
    shop = crowd(jobs, packing(pack_gain_live=0.99))
    shop.plan(now)
    desk = Desk(now=now, model=shop.model, cfg=shop.cfg, credit=shop.credit)
    for group in shop.groups:
        if len(group.jobs) < 2:
            continue
        assert not any(job.arrival.is_strict for job in group.jobs)
        finish = shop.model.pack_finish_s([(job.timing, job.step) for job in group.jobs])
        for job, seconds in zip(group.jobs, finish, strict=True):
            assert not job.live or slack_after(job, desk, seconds) >= 0.0


@settings(max_examples=40, deadline=None)
@given(JOBS, st.floats(0, 8))
def test_property_same_state_same_actions(jobs: list[tuple[bool, int, float, str, bool]], now: float) -> None:
    assert crowd(jobs, packing()).plan(now) == crowd(jobs, packing()).plan(now)


@settings(max_examples=60, deadline=None)
@given(JOBS, st.lists(st.sampled_from(["step", "park", "lose", "plan"]), max_size=60))
def test_property_charges_less_refunds_is_what_was_executed(
    jobs: list[tuple[bool, int, float, str, bool]], events: list[str]
) -> None:
    shop = crowd([(live, 0, at, tenant, strict) for live, _, at, tenant, strict in jobs], packing())
    for now, event in enumerate(events):
        busy = [group for group in shop.groups if group.jobs]
        if event == "plan" or not busy:
            shop.plan(float(now))
        elif event == "lose":
            busy[0].condemned(float(now))
            busy[0].is_healthy = True
        else:
            _advance(shop, busy[now % len(busy)], float(now), park=event == "park")
    for group in shop.groups:
        group.condemned(1e3)
    for name in "abc":
        account = shop.tenants.get(name)
        executed = sum(job.executed_tflop for job in shop.jobs if job.tenant is account and not job.live)
        assert account.charged_tflop - account.refunded_tflop == pytest.approx(executed)


def _advance(shop: Shop, group: GroupState, now: float, *, park: bool) -> None:
    for job in list(group.jobs):
        if job.step_done():
            group.released(job)
            job.chunk_done(now, shop.model)
        elif park:
            group.released(job)
            job.parked(now)
