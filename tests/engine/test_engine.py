"""What the engine decides under a virtual clock: order, shares, room for realtime requests, cancelling, draining."""

from __future__ import annotations

from dataclasses import replace

import pytest

from helios_serve.config import EngineConfig
from helios_serve.errors import CapacityError, InvalidRequestError
from helios_serve.types import Completed, Failure, Progress, SegmentReady, VideoRequest
from tests.engine.simulation import World, digest, expected_segments, video

ALONE = EngineConfig(batching="off")
STEP_S = 0.36
"""The longest step of one chunk alone."""


def live(name: str, *, fps: float = 8.0, **options: object) -> VideoRequest:
    request = video(name, service_class="realtime", **options)
    return replace(request, params=replace(request.params, fps=fps))


def ready(world: World) -> World:
    world.run_for(0.1)
    return world


def test_a_request_runs_through_all_roles() -> None:
    world = ready(World())
    request = world.submit(video("one", num_chunks=3))
    world.run()
    world.check_history()
    events = world.seen["one"]
    assert isinstance(events[-1], Completed)
    steps = [event.cursor for event in events if isinstance(event, Progress)]
    cursor = steps[0]
    for following in steps[1:]:
        cursor = cursor.next(request.params)
        assert following == cursor
    assert len(steps) == request.params.total_steps
    world.check_nothing_is_held()


def test_the_history_of_a_chunk_is_the_trail_and_the_pinned_frame() -> None:
    """The machine hashes what it is given: the expected chain holds only if every reference was the right one."""
    world = ready(World())
    request = video("one", num_chunks=7)
    world.submit(replace(request, params=replace(request.params, skip_first_chunk=True)))
    world.submit(video("two", num_chunks=7))
    world.run()
    world.check_history()
    assert expected_segments(world.requests["one"])[2] != digest("media", digest("x"))
    assert [s.media for s in world.segments("two")] == expected_segments(world.requests["two"])


def test_decoding_overlaps_with_denoising_the_next_chunk() -> None:
    world = ready(World(num_dits=1))
    world.machine.decode_s = 1.0
    world.submit(video("one", num_chunks=3))
    world.run()
    times = list(zip(world.times["one"], world.seen["one"], strict=True))
    first_segment = next(at for at, event in times if isinstance(event, SegmentReady))
    second_chunk = next(at for at, event in times if isinstance(event, Progress) and event.cursor.chunk == 1)
    assert second_chunk < first_segment


def test_requests_of_different_stages_share_forwards() -> None:
    world = ready(World(num_dits=1, config=EngineConfig(batching="always")))
    for index in range(5):
        world.submit(video(f"r{index}", num_chunks=2, steps=(index + 1, 1, 1)))
    world.run()
    world.check_history()
    assert world.machine.max_pack_seen >= 4


def test_a_strict_request_never_shares() -> None:
    world = ready(World(num_dits=1, config=EngineConfig(batching="always")))
    world.submit(video("strict", num_chunks=2, is_strict=True))
    for index in range(3):
        world.submit(video(f"r{index}", num_chunks=2))
    group = world.machine.groups["dit-0"]
    while world.engine.num_requests:
        world.run_for(0.05)
        names = {running.task.task_id.split("/")[0] for running in group.running.values()}
        assert "strict" not in names or names == {"strict"}
    world.check_history()


def test_two_backlogged_tenants_share_equally() -> None:
    world = ready(World(num_dits=1, config=ALONE))
    for index in range(10):
        world.submit(video(f"many{index}", num_chunks=2, tenant="many"))
    for index in range(3):
        world.submit(video(f"few{index}", num_chunks=2, tenant="few"))
    world.run(lambda: all(world.end(f"few{index}") is not None for index in range(3)))
    done = sum(len(world.segments(f"many{index}")) for index in range(10))
    assert 4 <= done <= 8, "six chunks of each tenant, give or take one and those in flight"
    world.run()
    world.check_history()


def test_priority_orders_the_requests_of_a_tenant() -> None:
    world = ready(World(num_dits=1, config=ALONE))
    world.submit(video("first", num_chunks=1))
    world.submit(video("late", num_chunks=1, priority=5))
    world.submit(video("urgent", num_chunks=1, priority=-5))
    world.run()
    assert world.first_step_at["urgent"] < world.first_step_at["late"]


def test_an_offline_request_is_not_starved_by_realtime_ones() -> None:
    """Without ageing the stream, which always runs behind its clock, would keep the only group for good."""
    world = ready(World(num_dits=1, config=EngineConfig(batching="off", ttfc_target_s=60.0)))
    world.submit(live("stream", num_chunks=120, fps=18.0))
    world.run_for(1.0)
    world.machine.step_s = 0.5  # slower than it was admitted for: due at all times
    world.submit(video("offline", num_chunks=1))
    world.run(lambda: world.end("offline") is not None, limit_s=400.0)
    waited = world.first_step_at["offline"] - 1.1
    assert 55.0 <= waited <= 75.0, "bounded ageing: after a minute, one chunk"


def test_a_realtime_request_parks_an_offline_chunk_at_its_next_step() -> None:
    world = ready(World(num_dits=1, config=ALONE))
    world.submit(video("offline", num_chunks=2, steps=(10, 10, 10)))
    world.run(lambda: len([e for e in world.seen["offline"] if isinstance(e, Progress)]) == 4)
    began = world.now
    world.submit(live("live", num_chunks=2, steps=(1, 1, 1)))
    world.run(lambda: "live" in world.first_step_at)
    assert world.first_step_at["live"] - began <= 0.3 + 2 * STEP_S + 0.1, "encoding, the running step, its own step"
    world.run()
    world.check_history()
    assert world.machine.num_steps_run["offline", 0] == 30, "the parked chunk went on where it was"
    world.check_nothing_is_held()


def test_cancelling_stops_within_one_step() -> None:
    world = ready(World(num_dits=1, config=ALONE))
    world.submit(video("one", num_chunks=3, steps=(10, 10, 10)))
    world.run(lambda: len([e for e in world.seen["one"] if isinstance(e, Progress)]) == 5)
    world.cancel("one")
    cancelled_at = world.now
    world.submit(video("two", num_chunks=1))
    world.run(lambda: not any("one/" in t for t in world.machine.groups["dit-0"].running))
    assert world.now - cancelled_at <= STEP_S
    world.run()
    world.check_history()
    assert world.machine.num_steps_run["one", 0] <= 6
    world.check_nothing_is_held()


@pytest.mark.parametrize("moment", [0.0, 0.15, 1.0, 2.2, 2.4])
def test_a_request_can_be_cancelled_at_any_moment(moment: float) -> None:
    world = ready(World())
    world.submit(video("one", num_chunks=4))
    world.submit(video("other", num_chunks=4))
    world.run_for(moment)
    world.cancel("one")
    world.run()
    world.check_history()
    assert isinstance(world.end("other"), Completed)
    world.check_nothing_is_held()


def test_without_a_worker_nothing_is_admitted() -> None:
    world = World()
    with pytest.raises(CapacityError) as caught:
        world.submit(video("early"))
    assert caught.value.code == "no_worker"
    assert caught.value.retry_after_s is not None


def test_a_realtime_request_that_cannot_be_sustained_is_refused_with_the_highest_rate() -> None:
    world = ready(World(num_dits=1))
    with pytest.raises(InvalidRequestError, match="highest: ") as caught:
        world.submit(live("fast", fps=60.0))
    assert caught.value.code == "rate_not_sustainable"
    assert caught.value.param == "fps"


def test_realtime_requests_beyond_the_capacity_are_refused_for_now() -> None:
    world = ready(World(num_dits=1, config=EngineConfig(ttfc_target_s=60.0)))
    admitted = 0

    def fill() -> None:
        nonlocal admitted
        while True:
            world.submit(live(f"r{admitted}", num_chunks=20, fps=8.0))
            admitted += 1

    with pytest.raises(CapacityError) as caught:
        fill()
    assert admitted >= 1
    assert caught.value.code == "capacity_exceeded"
    assert caught.value.retry_after_s is not None
    assert 1.0 <= caught.value.retry_after_s <= 120.0


def test_an_offline_request_that_would_start_too_late_is_refused_for_now() -> None:
    world = ready(World(num_dits=1, config=EngineConfig(max_queue_wait_s=100.0)))

    def fill() -> None:
        for index in range(200):
            world.submit(video(f"r{index}", num_chunks=10))

    with pytest.raises(CapacityError, match="estimated start") as caught:
        fill()
    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s >= 1.0


def test_a_full_engine_refuses_and_takes_again() -> None:
    world = ready(World(config=EngineConfig(max_requests=2)))
    world.submit(video("a"))
    world.submit(video("b"))
    with pytest.raises(CapacityError):
        world.submit(video("c"))
    world.run()
    world.submit(video("c"))
    world.run()
    assert isinstance(world.end("c"), Completed)


def test_requests_do_not_run_ahead_of_the_vaes() -> None:
    world = ready(World(num_dits=1, num_vaes=1))
    world.machine.decode_s = 10.0
    for index in range(3):
        world.submit(video(f"r{index}", num_chunks=6, steps=(1, 1, 1)))
    most = 0
    while world.engine.num_requests:
        world.run_for(0.1)
        most = max([most, *(run.num_undecoded for run in world.engine._runs.all)])
    world.check_history()
    assert most == 2


def test_a_long_video_keeps_a_bounded_number_of_references() -> None:
    world = ready(World())
    world.submit(video("long", num_chunks=60, steps=(1, 1, 1)))
    most = 0
    while world.engine.num_requests:
        world.run_for(0.2)
        most = max(most, len(world.machine.values))
    world.check_history()
    assert most <= 8, "conditioning, pinned, three of the trail, and those being decoded"


def test_draining_ends_the_running_chunk_and_starts_no_other() -> None:
    world = ready(World(num_dits=1))
    world.submit(video("one", num_chunks=5))
    world.submit(video("waiting", num_chunks=1, steps=(10, 10, 10)))
    world.run(lambda: len(world.segments("one")) == 1)
    began = world.now
    world.engine.drain(world.now)
    with pytest.raises(CapacityError) as caught:
        world.submit(video("late"))
    assert caught.value.code == "draining"
    world.run(lambda: world.engine.is_drained)
    assert world.now - began <= 10.0
    world.engine.fail_all("draining", "the server is shutting down", world.now)
    for name in ("one", "waiting"):
        end = world.end(name)
        assert isinstance(end, Failure)
        assert end.code == "draining"
    world.check_history()
    assert len(world.segments("one")) >= 2


def test_draining_stops_a_chunk_that_would_take_too_long_at_a_step_boundary() -> None:
    world = ready(World(num_dits=1, config=EngineConfig(drain_s=2.0)))
    world.submit(video("slow", num_chunks=1, steps=(20, 20, 20)))
    world.run(lambda: "slow" in world.first_step_at)
    began = world.now
    world.engine.drain(world.now)
    world.run(lambda: world.engine.is_drained)
    assert world.now - began <= STEP_S


def test_metrics_tell_what_happened() -> None:
    world = ready(World(num_dits=2, config=EngineConfig(ttfc_target_s=30.0)))
    world.submit(video("offline", num_chunks=2))
    world.submit(live("live", num_chunks=2))
    world.run(lambda: len(world.segments("live")) == 1)
    world.machine.kill("dit-0")
    world.submit(video("gone", num_chunks=2))
    world.cancel("gone")
    world.run()
    world.run_for(1.0)
    text = world.metrics.render(openmetrics=False)[0].decode()

    def value(line: str) -> float:
        rows = [row for row in text.splitlines() if row.startswith(line)]
        assert len(rows) == 1, (line, rows)
        return float(rows[0].split()[-1])

    model = 'model_name="simulated"'
    assert value(f'helios:request_success_total{{finished_reason="stop",{model}}}') == 2
    assert value(f'helios:request_success_total{{finished_reason="abort",{model}}}') == 1
    assert value(f"helios:num_requests_running{{{model}}}") == 0
    assert value(f"helios:frames_generated_total{{{model}}}") == 4 * 33
    assert value(f'helios:time_to_first_segment_seconds_count{{{model},service_class="realtime"}}') == 1
    assert value(f'helios:realtime_factor_count{{{model},service_class="offline"}}') == 1
    assert value(f'helios:worker_restarts_total{{{model},role="dit",worker="0"}}') == 1
    assert value(f'helios:denoise_step_seconds_count{{{model},stage="2"}}') >= 8
    assert value(f'helios:phase_duration_seconds_count{{{model},phase="decode"}}') == 4


def small(name: str, **options: object) -> VideoRequest:
    """A request whose steps pay to be packed."""
    request = video(name, **options)  # type: ignore[arg-type]
    return replace(request, params=replace(request.params, width=128, height=128))


def test_a_chunk_may_join_a_pack_that_is_parked_in_the_same_plan() -> None:
    world = ready(World(num_dits=1, num_encoders=2, config=EngineConfig(ttfc_target_s=30.0)))
    world.jitter = lambda: 1.0  # type: ignore[method-assign]
    world.submit(small("one", num_chunks=2, steps=(10, 10, 10)))
    world.run(lambda: "one" in world.first_step_at)
    world.submit(live("live", num_chunks=2, steps=(1, 1, 1)))
    world.submit(small("two", num_chunks=2, steps=(10, 10, 10)))
    asked_at = world.now
    world.run(lambda: "live" in world.first_step_at)
    assert world.first_step_at["live"] - asked_at <= 2.0
    world.run()
    world.check_history()


@pytest.mark.parametrize("is_strict", [False, True])
def test_who_runs_alone_is_not_overtaken_for_ever(is_strict: bool) -> None:
    world = ready(World(num_dits=1, config=EngineConfig(batching="always", max_queue_wait_s=1e9)))
    for index in range(3):
        world.submit(video(f"r{index}", num_chunks=100, steps=(2 + index, 2, 2), tenant=f"t{index}"))
    world.run_for(1.0)
    world.submit(video("late", num_chunks=1, is_strict=is_strict, tenant="me"))
    asked_at = world.now
    world.run(lambda: world.end("late") is not None)
    assert world.first_step_at["late"] - asked_at <= 15.0


@pytest.mark.parametrize(("step_s", "max_pack"), [(0.4, 8), (0.5, 8), (0.3, 16)])
def test_a_chunk_that_outlives_its_pack_is_not_overdue(step_s: float, max_pack: int) -> None:
    config = EngineConfig(batching="always", max_pack=max_pack, max_queue_wait_s=1e9)
    world = ready(World(num_dits=1, num_encoders=16, config=config))
    world.jitter = lambda: 1.0  # type: ignore[method-assign]
    world.machine.step_s = step_s
    world.submit(video("long", num_chunks=1, steps=(10, 10, 10)))
    for index in range(max_pack - 1):
        world.submit(video(f"r{index}", num_chunks=1, steps=(10, 10, 8)))
    world.run()
    assert world.machine.num_condemned == 0


def test_refusals_are_counted_whatever_their_reason() -> None:
    world = ready(World(config=EngineConfig(max_requests=1)))
    world.submit(video("a"))
    with pytest.raises(CapacityError):
        world.submit(video("b"))
    world.engine.drain(world.now)
    with pytest.raises(CapacityError):
        world.submit(video("c"))
    text = world.metrics.render(openmetrics=False)[0].decode()
    for reason in ("capacity_exceeded", "draining"):
        assert f'helios:admission_rejected_total{{model_name="simulated",reason="{reason}"}} 1.0' in text
