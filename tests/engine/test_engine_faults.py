"""Random faults under a virtual clock: no chunk is lost, doubled or out of order, whatever dies, hangs or fails."""

from __future__ import annotations

from random import Random

import pytest

from helios_serve.config import EngineConfig
from helios_serve.errors import CapacityError
from helios_serve.types import (
    ChunkTask,
    Completed,
    Decoded,
    DecodeTask,
    EncodeTask,
    Failure,
    RoleTask,
    Segment,
    TaskDone,
    TensorRef,
)
from tests.engine.simulation import World, video

LONG = EngineConfig(stuck_floor_s=5.0, chunk_floor_s=10.0, max_attempts=8)
"""Many attempts: random kills may hit the same chunk more often than real ones would."""


class Chaos:
    """Does one random thing every few seconds."""

    def __init__(self, world: World, seed: int, num_faults: int) -> None:
        self.world, self.random, self.num_left = world, Random(seed), num_faults
        self.kinds: list[str] = []
        self._spoil: dict[str, str] = {}
        world.machine.verdict = self._verdict
        self._plan_next()

    def _plan_next(self) -> None:
        if self.num_left > 0:
            self.num_left -= 1
            self.world.at(self.random.uniform(0.2, 6.0), self._strike)

    def _strike(self) -> None:
        kind = self.random.choice(("kill", "kill", "freeze", "nan", "error", "late", "slow", "memory", "cancel"))
        self.kinds.append(kind)
        groups = [name for name, group in self.world.machine.groups.items() if group.is_up]
        if kind == "kill" and groups:
            self.world.machine.kill(self.random.choice(groups))
        elif kind == "freeze" and groups:
            self.world.machine.freeze(self.random.choice(groups))
        elif kind in ("nan", "error"):
            self._spoil[self.random.choice(("c", "d", "encode"))] = kind
        elif kind == "late":
            self._late_answer()
        elif kind == "slow":
            self.world.machine.step_s = self.random.uniform(0.1, 0.6)
        elif kind == "memory":
            self.world.max_tokens = 30_000
        elif kind == "cancel":
            running = [name for name in self.world.requests if self.world.end(name) is None]
            if len(running) > 3:
                self.world.cancel(self.random.choice(running))
        self._plan_next()

    def _verdict(self, task: RoleTask) -> str | None:
        name = task.task_id.rpartition("/")[2]
        for prefix in list(self._spoil):
            if name.startswith(prefix):
                return self._spoil.pop(prefix)
        return None

    def _late_answer(self) -> None:
        """What an earlier attempt of some chunk made arrives after all."""
        machine = self.world.machine
        running = [r.task for g in machine.groups.values() for r in g.running.values() if isinstance(r.task, ChunkTask)]
        if running:
            task_id = self.random.choice(running).task_id.rpartition(".")[0] + ".0"
            key = f"{task_id}/late-{self.world.now}"
            machine.values[key] = "late"
            phase = machine._phase("chunk", 1.0)
            self.world._emit(
                TaskDone(task_id=task_id, latents=TensorRef(key=key), generator_state=b"late", phase=phase)
            )


def mixed_requests(world: World, seed: int) -> None:
    random = Random(seed)
    for index in range(12):
        steps = random.choice(((1, 1, 1), (2, 2, 2), (4, 2, 1)))
        request = video(
            f"r{index}",
            num_chunks=random.randrange(1, 7),
            steps=steps,
            tenant=f"t{random.randrange(3)}",
            is_strict=random.random() < 0.2,
        )
        world.at(random.uniform(0.0, 8.0), lambda request=request: _try(world, request))  # type: ignore[misc]


def _try(world: World, request: object) -> None:
    try:
        world.submit(request)  # type: ignore[arg-type]
    except CapacityError:
        world.at(2.0, lambda: _try(world, request))


@pytest.mark.parametrize("seed", range(200))
def test_random_faults_lose_double_and_reorder_nothing(seed: int) -> None:
    world = World(seed=seed, num_dits=2 + seed % 3, num_vaes=1 + seed % 2, num_encoders=1 + seed % 2, config=LONG)
    world.run_for(0.1)
    mixed_requests(world, seed)
    chaos = Chaos(world, seed, num_faults=12)
    world.run(lambda: len(world.requests) == 12 and world.engine.num_requests == 0 and chaos.num_left == 0)
    world.check_history()
    unlucky = {work.partition("/")[0] for work, count in world.machine.lost_alone.items() if count >= 2}
    for name in world.requests:
        end = world.end(name)
        if isinstance(end, Failure):
            assert (end.code, name in unlucky) == ("request_poisoned", True), end
    world.check_nothing_is_held()


def test_the_same_seed_gives_the_same_history() -> None:
    def history() -> object:
        world = World(seed=5, config=LONG)
        world.run_for(0.1)
        mixed_requests(world, 5)
        Chaos(world, 5, num_faults=12)
        world.run(lambda: len(world.requests) == 12 and world.engine.num_requests == 0)
        return world.now, world.seen

    assert history() == history()


def test_a_lost_group_costs_the_chunk_in_flight_alone() -> None:
    world = World(num_dits=2)
    world.run_for(0.1)
    request = world.submit(video("one", num_chunks=4))
    world.run(lambda: world.machine.num_steps_run["one", 2] == 3)
    group = next(g.name for g in world.machine.groups.values() if g.running and g.role == "dit")
    began = world.now
    world.machine.kill(group)
    world.run_for(0.01)
    assert any(g.running or g.joining for g in world.machine.groups.values() if g.role == "dit" and g.name != group)
    world.run()
    world.check_history()
    assert world.now - began < 3.0 + 2 * 6 * 0.36 + 1
    steps = sum(request.params.steps_in(1))
    redone = [world.machine.num_steps_run["one", chunk] for chunk in range(4)]
    assert sum(redone) <= 4 * steps + steps
    assert sum(count > steps for count in redone) == 1


def test_a_frozen_group_is_condemned_within_its_window() -> None:
    world = World(num_dits=2)
    world.run_for(0.1)
    world.submit(video("one", num_chunks=2))
    world.run(lambda: "one" in world.first_step_at)
    group = next(g.name for g in world.machine.groups.values() if g.running and g.role == "dit")
    world.machine.freeze(group)
    frozen_at = world.now
    world.run(lambda: world.machine.num_condemned == 1)
    assert 1.5 <= world.now - frozen_at <= 2.5
    world.run()
    world.check_history()


def test_a_stuck_group_beats_but_stands_still() -> None:
    world = World(num_dits=2)
    world.run_for(0.1)
    world.submit(video("one", num_chunks=2))
    world.run(lambda: "one" in world.first_step_at)
    group = next(g for g in world.machine.groups.values() if g.running and g.role == "dit")
    group.is_stepping = True
    group_incarnation = group.incarnation
    world.machine._later = lambda *_: None  # type: ignore[method-assign]
    stuck_at = world.now
    world.run(lambda: group.incarnation > group_incarnation)
    assert 5.0 <= world.now - stuck_at <= 6.5


def test_a_late_loop_condemns_nobody() -> None:
    world = World()
    world.run_for(5.0)
    world.now += 5.0  # the loop was blocked: beats of five seconds are waiting
    world._events = [(max(world.now, when), n, work) for when, n, work in world._events]
    world.run_for(3.0)
    assert world.machine.num_condemned == 0


def test_a_group_is_condemned_once_until_its_loss_is_told() -> None:
    """Telling may take longer than a tick; a second verdict would hit the group that was made anew."""
    world = World()
    world.run_for(0.1)
    condemned: list[str] = []
    world.machine.condemn = lambda group, _: condemned.append(group)  # type: ignore[method-assign]
    world.submit(video("one", num_chunks=2))
    world.run(lambda: "one" in world.first_step_at)
    world.machine.groups["dit-0"].is_frozen = world.machine.groups["dit-1"].is_frozen = True
    world.run_for(60.0)
    assert sorted(condemned) == ["dit-0", "dit-1"]


def test_a_late_decoding_of_an_earlier_attempt_is_ignored() -> None:
    world = World(num_vaes=2)
    world.run_for(0.1)
    world.machine.decode_s = 5.0
    world.submit(video("one", num_chunks=2))
    vaes = [group for group in world.machine.groups.values() if group.role == "vae"]
    world.run(lambda: any(group.running for group in vaes))
    busy = next(group for group in vaes if group.running)
    (task,) = [running.task for running in busy.running.values()]
    assert isinstance(task, DecodeTask)
    world.machine.kill(busy.name)
    world.run_for(0.1)
    stale = Segment(request_id="one", chunk=0, start_frame=0, num_frames=33, init=b"init", media=b"stale")
    world._emit(Decoded(task_id=task.task_id, segment=stale, latents_digest="", phases=()))
    world.run()
    world.check_history()


def test_a_request_that_recovered_shares_forwards_again() -> None:
    world = World(num_dits=1, config=EngineConfig(batching="always"))
    world.run_for(0.1)
    failed: list[str] = []

    def verdict(task: RoleTask) -> str | None:
        if isinstance(task, ChunkTask) and task.request_id == "one" and not failed:
            failed.append(task.task_id)
            return "nan"
        return None

    world.machine.verdict = verdict
    for name in ("one", "other"):
        world.submit(video(name, num_chunks=6))
    group = world.machine.groups["dit-0"]
    together = 0
    while world.engine.num_requests:
        world.run_for(0.1)
        chunks = {r.task.request_id: r.task.chunk for r in group.running.values() if isinstance(r.task, ChunkTask)}
        together = max(together, chunks.get("one", 0) if len(chunks) == 2 else 0)
    world.check_history()
    assert together >= 2, "after its first chunk, made alone, it was packed again"


@pytest.mark.parametrize("verdict", ["nan", "error"])
def test_a_chunk_that_always_fails_ends_its_request_alone(verdict: str) -> None:
    world = World(num_dits=1)
    world.run_for(0.1)
    for name in ("good", "bad", "also-good"):
        world.submit(video(name, num_chunks=3))
    world.machine.verdict = lambda task: (
        verdict if isinstance(task, ChunkTask) and task.request_id == "bad" and task.chunk == 1 else None
    )
    world.run()
    world.check_history()
    end = world.end("bad")
    assert isinstance(end, Failure)
    assert end.code == "generation_failed"
    assert len(world.segments("bad")) == 1
    assert isinstance(world.end("good"), Completed)
    assert isinstance(world.end("also-good"), Completed)
    assert world.machine.num_steps_run["bad", 1] == 0


def test_a_fault_of_the_caller_is_not_tried_again() -> None:
    world = World()
    world.run_for(0.1)
    tries: list[str] = []

    def verdict(task: RoleTask) -> str | None:
        if isinstance(task, EncodeTask):
            tries.append(task.task_id)
            return "request"
        return None

    world.machine.verdict = verdict
    world.submit(video("bad"))
    world.run()
    end = world.end("bad")
    assert isinstance(end, Failure)
    assert end.code == "invalid_value"
    assert len(tries) == 1


@pytest.mark.parametrize("kind", [ChunkTask, EncodeTask, DecodeTask])
def test_a_request_that_kills_its_workers_is_poison(kind: type[RoleTask]) -> None:
    world = World(num_dits=2, num_vaes=2, num_encoders=2)
    world.run_for(0.1)
    names = ["good", "bad", "fine"]
    requests = {name: video(name, num_chunks=2) for name in names}

    def verdict(task: RoleTask) -> str | None:
        return "kill" if isinstance(task, kind) and task.task_id.startswith("bad/") else None

    world.machine.verdict = verdict
    for request in requests.values():
        world.submit(request)
    world.run()
    world.check_history()
    end = world.end("bad")
    assert isinstance(end, Failure)
    assert end.code == "request_poisoned"
    assert isinstance(world.end("good"), Completed)
    assert isinstance(world.end("fine"), Completed)
    with pytest.raises(Exception, match="same content ended two workers"):
        world.submit(video("bad", num_chunks=2))
    world.run_for(700.0)
    world.machine.verdict = lambda _: None
    world.submit(video("bad", num_chunks=2))
    world.run()
    assert isinstance(world.end("bad"), Completed)


def test_a_group_on_which_everybody_fails_is_made_anew() -> None:
    world = World(num_dits=2)
    world.run_for(0.1)
    broken = world.machine.groups["dit-0"]

    def verdict(task: RoleTask) -> str | None:
        return "nan" if task.task_id in broken.running and broken.incarnation == 0 else None

    world.machine.verdict = verdict
    for index in range(8):
        world.submit(video(f"r{index}", num_chunks=2))
    world.run()
    world.check_history()
    assert all(isinstance(world.end(f"r{index}"), Completed) for index in range(8))
    assert broken.incarnation == 1


@pytest.mark.parametrize("fault", ["request", "nan"])
def test_failing_requests_do_not_end_the_only_group(fault: str) -> None:
    """Nor does what is wrong with requests speak against a group that has company."""
    for num_dits in (1, 2) if fault == "request" else (1,):
        world = World(num_dits=num_dits)
        world.run_for(0.1)
        world.machine.verdict = lambda task: fault if isinstance(task, ChunkTask) else None
        for index in range(5):
            world.submit(video(f"bad{index}", num_chunks=1))
            world.run()
        assert world.machine.num_condemned == 0


def test_a_lost_vae_ends_a_request_once_though_it_had_two_of_its_chunks() -> None:
    world = World(num_dits=1, num_vaes=1, config=EngineConfig(max_attempts=1))
    world.run_for(0.1)
    world.machine.decode_s = 20.0
    world.submit(video("one", num_chunks=4, steps=(1, 1, 1)))
    world.run(lambda: len(world.machine.groups["vae-0"].running) == 2)
    world.machine.kill("vae-0")
    world.run()
    world.check_history()


def test_a_group_with_another_golden_chunk_gets_no_work() -> None:
    world = World(num_dits=2)
    world.run_for(0.1)
    world.machine.groups["dit-1"].golden = "different"
    world.machine.kill("dit-1")
    for index in range(4):
        world.submit(video(f"r{index}", num_chunks=2))
    world.run()
    world.check_history()
    assert world.machine.groups["dit-1"].incarnation > 2
    assert not world.machine.groups["dit-1"].running
