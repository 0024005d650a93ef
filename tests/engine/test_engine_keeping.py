"""Requests whose chunks somebody commits: what waits for a commit, what a crash leaves, what sessions may ask for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from helios_serve.engine.runs import MAX_UNCOMMITTED_CHUNKS
from helios_serve.errors import ConflictError
from helios_serve.types import (
    ChunkReady,
    Completed,
    Frames,
    PlayChanged,
    PromptChange,
    Restart,
    Resume,
    SegmentReady,
    VideoRequest,
)
from tests.engine.simulation import World, digest, expected_segments, video


def ready(world: World) -> World:
    """All groups are up."""
    world.run_for(0.1)
    return world


def pictured(name: str, num_chunks: int) -> VideoRequest:
    picture = Frames(data=b"", num_frames=1, height=384, width=640)
    return replace(video(name, num_chunks=num_chunks), image=picture)


def live(name: str, num_chunks: int) -> VideoRequest:
    request = video(name, num_chunks=num_chunks, service_class="realtime")
    return replace(request, params=replace(request.params, fps=12.0))


def skipping(name: str, num_chunks: int) -> VideoRequest:
    request = video(name, num_chunks=num_chunks)
    return replace(request, params=replace(request.params, skip_first_chunk=True))


def test_every_chunk_is_handed_to_the_keeper_and_readable_until_it_is_committed() -> None:
    world = ready(World())
    world.keep(video("one", num_chunks=12))
    world.run()
    world.check_history()
    made = [event.record.chunk for event in world.seen["one"] if isinstance(event, ChunkReady)]
    assert made == list(range(12))
    assert len(world.kept["one"]) == 12
    world.check_nothing_is_held()


def test_a_request_does_not_end_before_its_last_chunk_is_committed() -> None:
    world = ready(World())
    world.keep(video("one", num_chunks=2))
    world.committing_at = 500.0
    world.run()
    assert world.now >= 500.0
    assert world.end("one") == Completed(request_id="one")


def test_a_keeper_that_lags_holds_the_request_back() -> None:
    world = ready(World())
    world.keep(video("one", num_chunks=20))
    world.committing_at = 300.0
    world.run_for(250.0)
    made = {chunk for _, chunk in world.machine.num_steps_run}
    assert made == set(range(MAX_UNCOMMITTED_CHUNKS))
    world.run()
    world.check_history()


@pytest.mark.parametrize("make", [video, pictured, skipping])
@pytest.mark.parametrize("seed", range(12))
def test_crashes_lose_nothing_and_change_nothing(seed: int, make: Callable[..., VideoRequest]) -> None:
    """The engine's process ends at random moments: a new one goes on, and the video is the undisturbed one."""
    world = ready(World(seed=seed))
    for index in range(4):
        world.keep(make(f"r{index}", num_chunks=3 + index))
    while any(world.end(f"r{index}") is None for index in range(4)):
        world.run_for(world.random.uniform(0.5, 12.0))
        if world.random.random() < 0.7:
            world.crash()
    world.check_history()
    assert all(world.end(f"r{index}") == Completed(request_id=f"r{index}") for index in range(4))
    world.check_nothing_is_held()


def test_a_commit_that_lets_a_request_go_on_starts_its_next_chunk() -> None:
    world = ready(World())
    world.keep(video("one", num_chunks=20))
    world.committing_at = 300.0
    world.run_for(200.0)
    run = world.engine._runs.get("one")
    assert run is not None
    assert run.is_held_by("store")
    assert world.engine.committed("one", 0, world.now)
    assert run.state.group_id is not None
    assert not world.engine.committed("one", 1, world.now)


def test_resuming_with_a_hole_in_the_segments() -> None:
    """Chunk 1 has no segment yet while chunk 2 has: only chunk 1 is decoded, and nothing is published twice."""
    world = ready(World())
    request = world.keep(video("one", num_chunks=4))
    world.run()
    kept, expected = world.kept["one"], expected_segments(request)
    again = World()
    again.requests["one"], again.seen["one"], again.times["one"] = request, [], []
    again.kept["one"] = list(kept[:3])
    again.run_for(0.1)
    records = tuple(
        replace(kept[chunk], latents=again.machine.put(f"one/{chunk}", kept[chunk].latents.key.encode()))
        for chunk in range(3)
    )
    point = Resume(next_chunk=3, records=records, generator_state=kept[2].generator_state, undecoded=(1,))
    again.engine.take(request, again.now, resume=point, has_keeper=True)
    again.run()
    made = [event.segment for event in again.seen["one"] if isinstance(event, SegmentReady)]
    assert [segment.chunk for segment in made] == [1, 3]
    assert [segment.media for segment in made] == [expected[1], expected[3]]


@pytest.mark.parametrize("state", [b"", b"behind chunk 1"])
def test_what_begins_behind_the_callers_own_chunks(state: bytes) -> None:
    """Without a generator's state, nothing was made yet: the chunk begins from the encoder's. A chunk that begins anew
    behind one that was made draws from its seed."""
    request = pictured("one", num_chunks=4)
    request = replace(request, params=replace(request.params, restarts=(Restart(chunk=2, seed=7),)))
    world = ready(World())
    point = Resume(next_chunk=2, records=(), generator_state=state)
    world.requests["one"], world.seen["one"], world.times["one"] = request, [], []
    world.engine.take(request, world.now, resume=point, has_keeper=False)
    world.run()
    begun = digest("seed", 7) if state else digest("generator", "one")
    first = digest("one", 2, digest("conditioning", "one"), (), None, begun.encode())
    second = digest("one", 3, digest("conditioning", "one"), (first,), None, digest("state", first).encode())
    made = [event.segment.media for event in world.seen["one"] if isinstance(event, SegmentReady)]
    assert made == [digest("media", value).encode() for value in (first, second)]


def test_credit_limits_how_far_a_session_runs_ahead() -> None:
    world = ready(World())
    world.keep(replace(live("one", num_chunks=8), is_interactive=True), allowed=2)
    world.run_for(60.0)
    assert len(world.kept["one"]) == 2
    assert PlayChanged(request_id="one", state="waiting_for_credit") in world.seen["one"]
    world.engine.allow("one", 5, world.now)
    world.run_for(60.0)
    assert len(world.kept["one"]) == 5
    world.engine.allow("one", 8, world.now)
    world.run()
    world.check_history()


def test_a_viewer_that_acknowledges_in_time_is_not_kept_waiting() -> None:
    """Credit for one more chunk with each period that was played: every chunk starts as soon as it is allowed."""
    world = ready(World())
    request = world.keep(replace(live("one", num_chunks=12), is_interactive=True), allowed=2)
    world.run(lambda: len(world.segments("one")) == 2)
    for allowed in range(3, 12):
        world.run_for(33 / request.params.fps)
        world.engine.allow("one", allowed, world.now)
        (run,) = world.runs()
        assert run.state.group_id is not None, f"chunk {allowed - 1} waits though it is allowed"
    world.engine.allow("one", 12, world.now)
    world.run()
    world.check_history()
    states = [event.state for event in world.seen["one"] if isinstance(event, PlayChanged)]
    assert states[-1] == "running", "after the last chunk nothing waits for credit"


def test_pause_and_resume() -> None:
    world = ready(World())
    world.keep(replace(video("one", num_chunks=6), is_interactive=True))
    world.run(lambda: len(world.kept["one"]) == 2)
    world.engine.pause("one", True, world.now)
    world.run_for(100.0)
    assert len(world.kept["one"]) <= 4, "the chunk in flight, and those that were made before"
    stood = len(world.kept["one"])
    world.run_for(100.0)
    assert len(world.kept["one"]) == stood
    world.engine.pause("one", False, world.now)
    world.run()
    world.check_history()
    states = [event.state for event in world.seen["one"] if isinstance(event, PlayChanged)]
    assert states == ["paused", "running"]


def test_stop_ends_an_open_ended_session_after_the_chunk_in_flight() -> None:
    world = ready(World())
    world.keep(replace(video("one", num_chunks=400), is_interactive=True, is_open_ended=True))
    world.run(lambda: len(world.kept["one"]) == 3)
    end = world.engine.stop("one", world.now)
    assert 3 <= end <= 5
    world.run()
    assert world.end("one") == Completed(request_id="one")
    assert len(world.segments("one")) == end == len(world.kept["one"])
    world.check_nothing_is_held()


def test_stop_while_it_stands_still_ends_it_with_what_it_has() -> None:
    world = ready(World())
    world.keep(replace(video("one", num_chunks=400), is_interactive=True, is_open_ended=True), allowed=2)
    world.run_for(60.0)
    assert world.engine.stop("one", world.now) == 2
    world.run()
    assert world.end("one") == Completed(request_id="one")
    world.check_nothing_is_held()


def test_a_new_prompt_takes_the_first_chunk_that_has_not_begun() -> None:
    world = ready(World())
    world.keep(replace(video("one", num_chunks=6), is_interactive=True))
    world.run(lambda: any(run.state.group_id is not None and run.state.next_chunk == 2 for run in world.runs()))
    assert world.engine.change_prompt("one", "another", 2, world.now) == 3
    assert world.engine.change_prompt("one", "a third", 1, world.now) == 3, "it replaces the one that has not begun"
    (run,) = world.runs()
    assert run.request.prompts == (
        PromptChange(chunk=0, prompt="one"),
        PromptChange(chunk=3, prompt="a third", transition_chunks=1),
    )
    world.run()
    world.check_history()
    world.check_nothing_is_held()


def test_no_prompt_is_taken_once_the_last_chunk_has_begun() -> None:
    world = ready(World())
    world.keep(replace(video("one", num_chunks=1), is_interactive=True))
    world.run(lambda: any(run.state.group_id is not None for run in world.runs()))
    with pytest.raises(ConflictError, match="last chunk"):
        world.engine.change_prompt("one", "late", 2, world.now)
    world.run()
