"""The step loop of one rank: joining, leaving, failing, and the answers."""

from __future__ import annotations

import dataclasses
import gc
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from helios_serve.config import ModelConfig
from helios_serve.errors import InvalidRequestError
from helios_serve.faults import NO_FAULTS, Fault, FaultPlan
from helios_serve.model_executor.batch import NotFiniteError
from helios_serve.model_executor.digest import latents_digest
from helios_serve.model_executor.model import HeliosModel, load_model, load_transformer, open_checkpoint
from helios_serve.model_executor.packing import PackedBatch, PackedText
from helios_serve.model_executor.runner import Runner
from helios_serve.parallel.collectives import RankGroup
from helios_serve.types import Aborted, ChunkTask, PackLimit, StepDone, TaskFailed
from helios_serve.workers.dit import Answer, ChunkResult, DitWorker, ParkedResult, StepPlan
from tests.workers.chunks import assert_close, encode, latents_of, request

WAIT_S = 30
A = TypeVar("A")


class Driven:
    """A worker on a thread, what it answered, and a brake before each step."""

    def __init__(self, model: HeliosModel, faults: FaultPlan = NO_FAULTS, ranks: RankGroup | None = None) -> None:
        self.answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self._may_step = threading.Semaphore(0)
        self._is_free = False
        self.at_brake = threading.Event()
        runner = Runner(model.transformer, model.rules, faults=faults)
        self.worker = DitWorker("dit-0", runner, self.answers.put, ranks=ranks, before_step=self._brake)
        self.failure: Exception | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.worker.run()
        except Exception as error:
            self.failure = error

    def _brake(self) -> None:
        if not self._is_free:
            self.at_brake.set()
            assert self._may_step.acquire(timeout=WAIT_S)

    def step(self, count: int = 1) -> None:
        """Lets `count` steps go, and waits for the boundary behind them."""
        for _ in range(count):
            assert self.at_brake.wait(WAIT_S)
            self.at_brake.clear()
            self._may_step.release()

    def free(self) -> None:
        """From now on steps go as they can."""
        self._is_free = True
        self._may_step.release()

    def next(self, kind: type[A], task: ChunkTask | None = None) -> A:
        """The next answer of a kind (to a task); others are passed over."""
        deadline = time.monotonic() + WAIT_S
        while True:
            answer = self.answers.get(timeout=max(0.0, deadline - time.monotonic()))
            if isinstance(answer, kind) and (task is None or answer.task_id == task.task_id):  # type: ignore[attr-defined]
                return answer

    def rest(self) -> list[Answer]:
        found = []
        while not self.answers.empty():
            found.append(self.answers.get())
        return found

    def close(self) -> None:
        self.worker.close()
        self.free()
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()


@pytest.fixture(scope="module")
def model(tiny_distilled: Path) -> HeliosModel:
    return load_model(ModelConfig(model=str(tiny_distilled)))


@pytest.fixture
def drive(model: HeliosModel) -> Iterator[Callable[..., Driven]]:
    made = list[Driven]()

    def make(*faults: Fault, ranks: RankGroup | None = None) -> Driven:
        made.append(Driven(model, FaultPlan(*faults), ranks))
        return made[-1]

    yield make
    for driven in made:
        driven.close()
        assert driven.failure is None


Drive = Callable[..., Driven]


def test_a_video_chunk_by_chunk(model: HeliosModel, drive: Drive) -> None:
    video, driven = encode(model, request("fox", num_frames=165, steps=(1, 2, 1))), drive()
    driven.free()
    made, state = list[Tensor](), None
    for chunk in range(5):
        task, before_s = video.task(chunk, state), time.time()
        driven.worker.submit(task, video.inputs(made))
        steps = [driven.answers.get(timeout=WAIT_S) for _ in range(4)]
        assert all(step.device_ms > 0 for step in steps if isinstance(step, StepDone))
        assert [(step.group, step.task_ids) for step in steps if isinstance(step, StepDone)] == [
            ("dit-0", (task.task_id,))
        ] * 4
        result = driven.answers.get(timeout=WAIT_S)
        assert isinstance(result, ChunkResult)
        assert result.task_id == task.task_id
        assert result.phase.name == "chunk"
        assert before_s <= result.phase.started_s < result.phase.ended_s <= time.time()
        assert driven.worker.progress == 4 * (chunk + 1)
        assert driven.worker.task_ids == ()
        made.append(result.latents)
        state = result.generator_state
    assert all(latents.dtype == torch.float32 for latents in made)
    assert all(torch.equal(*pair) for pair in zip(made, latents_of(model, video.request), strict=True))


def test_chunks_join_at_step_boundaries(model: HeliosModel, drive: Drive) -> None:
    fox, owl, driven = encode(model, request("fox", steps=(2, 2, 2))), encode(model, request("owl", width=128)), drive()
    first, second = fox.task(), owl.task()
    driven.worker.submit(first, fox.inputs())
    driven.step(2)
    driven.worker.submit(second, owl.inputs())
    assert driven.worker.task_ids == (first.task_id, second.task_id)
    driven.free()
    results = {task.task_id: driven.next(ChunkResult) for task in (second, first)}
    assert_close(results[first.task_id].latents, latents_of(model, fox.request)[0])
    assert_close(results[second.task_id].latents, latents_of(model, owl.request)[0])


def test_steps_are_shared(model: HeliosModel, drive: Drive) -> None:
    videos, driven = [encode(model, request(name, steps=(2, 2, 2))) for name in ("fox", "owl", "elk")], drive()
    tasks = [video.task() for video in videos]
    for task, video in zip(tasks, videos, strict=True):
        driven.worker.submit(task, video.inputs())
    driven.step(2)
    steps = [driven.next(StepDone) for _ in range(2)]
    assert len(steps[-1].task_ids) == 3
    driven.free()


@pytest.mark.parametrize("boundary", range(6))
def test_a_parked_chunk_goes_on_in_another_worker(model: HeliosModel, drive: Drive, boundary: int) -> None:
    video, here, there = encode(model, request("fox", steps=(2, 2, 2))), drive(), drive()
    task = video.task()
    here.worker.submit(task, video.inputs())
    here.step(boundary)
    assert here.at_brake.wait(WAIT_S)
    here.worker.signal(task.task_id, "park")
    here.free()  # the step at the brake is done: the boundary behind it is the next one
    if boundary == 5:
        assert torch.equal(here.next(ChunkResult, task).latents, latents_of(model, video.request)[0])
        assert not any(isinstance(answer, ParkedResult) for answer in here.rest())
        return
    parked = here.next(ParkedResult, task).state
    assert here.worker.task_ids == ()
    again = video.task()
    there.free()
    there.worker.submit(again, video.inputs(parked=parked))
    assert torch.equal(there.next(ChunkResult, again).latents, latents_of(model, video.request)[0])
    assert there.worker.progress + here.worker.progress == 6


def test_an_aborted_chunk_leaves_at_the_next_boundary(model: HeliosModel, drive: Drive) -> None:
    video, driven = encode(model, request("fox", steps=(9, 9, 9))), drive()
    task, mate = video.task(), video.task()
    for one in (task, mate):
        driven.worker.submit(one, video.inputs())
    driven.step(3)
    assert driven.at_brake.wait(WAIT_S)
    driven.worker.signal(task.task_id, "park")
    driven.worker.signal(task.task_id, "abort")
    driven.worker.signal(task.task_id, "park")  # an abort is final
    driven.free()
    assert driven.next(Aborted).task_id == task.task_id
    left_at = driven.worker.progress
    assert left_at <= 5
    driven.next(ChunkResult, mate)
    assert not any(isinstance(answer, ParkedResult | Aborted) for answer in driven.rest())


@pytest.mark.parametrize("when", ["before it is submitted", "while it waits"])
def test_a_signal_that_comes_before_its_task_is_obeyed_when_that_joins(
    model: HeliosModel, drive: Drive, when: str
) -> None:
    video, driven = encode(model, request("fox")), drive()
    blocker, parked, aborted = video.task(), video.task(), video.task()
    driven.worker.submit(blocker, video.inputs())
    assert driven.at_brake.wait(WAIT_S)

    def signal() -> None:
        driven.worker.signal(parked.task_id, "park")
        driven.worker.signal(aborted.task_id, "abort")

    if when == "before it is submitted":
        signal()
    for task in (parked, aborted):
        driven.worker.submit(task, video.inputs())
    if when == "while it waits":
        signal()
    driven.free()
    state = driven.next(ParkedResult, parked).state
    assert driven.next(Aborted).task_id == aborted.task_id
    assert (state.cursor.stage, state.cursor.step) == (0, 0)
    driven.next(ChunkResult, blocker)
    again = video.task()
    driven.worker.submit(again, video.inputs(parked=state))
    assert torch.equal(driven.next(ChunkResult, again).latents, latents_of(model, video.request)[0])
    assert driven.worker.progress == 6


def test_a_signal_for_a_task_that_ended_is_ignored(model: HeliosModel, drive: Drive) -> None:
    video, driven = encode(model, request("fox")), drive()
    driven.free()
    task = video.task()
    driven.worker.submit(task, video.inputs())
    driven.next(ChunkResult)
    for op in ("park", "abort"):
        driven.worker.signal(task.task_id, op)
    another = video.task()
    driven.worker.submit(another, video.inputs())
    driven.next(ChunkResult, another)
    assert driven.rest() == []


def test_signals_for_nobody_do_not_pile_up(model: HeliosModel, drive: Drive) -> None:
    driven = drive()
    for number in range(3000):
        driven.worker.signal(f"nobody-{number}", "abort")
    assert len(driven.worker._signals) == 1024


def test_nan_fails_its_chunk_alone(model: HeliosModel, drive: Drive) -> None:
    bad, fox = encode(model, request("bad")), encode(model, request("fox"))
    driven = drive(Fault(point="dit.step", action="nan", where={"request_id": "bad", "step": 1}))
    tasks = (bad.task(), fox.task())
    driven.worker.submit(tasks[0], bad.inputs())
    driven.worker.submit(tasks[1], fox.inputs())
    driven.free()
    failed = driven.next(TaskFailed)
    assert (failed.task_id, failed.fault, failed.code) == (tasks[0].task_id, "nan", "generation_failed")
    assert "not finite" in failed.message
    assert_close(driven.next(ChunkResult, tasks[1]).latents, latents_of(model, fox.request)[0])
    retried = bad.task()
    driven.worker.submit(retried, bad.inputs())
    assert torch.equal(driven.next(ChunkResult, retried).latents, latents_of(model, bad.request)[0])


@pytest.mark.parametrize(
    ("error", "fault", "code", "message"),
    [
        (InvalidRequestError("no such prompt", code="invalid_value"), "request", "invalid_value", "no such prompt"),
        (RuntimeError("out of luck"), "error", "generation_failed", "generation failed: RuntimeError: out of luck"),
        (torch.OutOfMemoryError("full"), "out_of_memory", "generation_failed", "generation failed: out of memory"),
    ],
)
def test_an_exception_fails_its_chunk_alone(
    model: HeliosModel, drive: Drive, error: Exception, fault: str, code: str, message: str
) -> None:
    bad, fox = encode(model, request("bad")), encode(model, request("fox", steps=(3, 1, 1)))
    driven = drive(Fault(point="dit.step", action="raise", error=error, times=99, where={"request_id": "bad"}))
    task = fox.task()
    driven.worker.submit(task, fox.inputs())
    driven.worker.submit(bad.task(), bad.inputs())
    driven.free()
    failed = driven.next(TaskFailed)
    assert (failed.fault, failed.code) == (fault, code)
    assert failed.message.startswith(message)
    assert_close(driven.next(ChunkResult, task).latents, latents_of(model, fox.request)[0])
    assert driven.worker.task_ids == ()


def test_a_chunk_that_cannot_join_fails_alone(model: HeliosModel, drive: Drive) -> None:
    video, driven = encode(model, request("fox")), drive()
    driven.free()
    broken, task = dataclasses.replace(video.task(), generator_state=b"short"), video.task()
    driven.worker.submit(broken, video.inputs())
    driven.worker.submit(task, video.inputs())
    driven.worker.signal(broken.task_id, "park")
    assert driven.next(TaskFailed).task_id == broken.task_id
    driven.next(ChunkResult, task)
    assert driven.worker.task_ids == ()


def test_a_pack_that_does_not_fit_is_reported(
    model: HeliosModel, drive: Drive, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict = model.transformer.forward

    def forward(batch: PackedBatch, text: PackedText) -> Tensor:
        if len(batch.grids) > 2:
            raise torch.OutOfMemoryError("full")
        return predict(batch, text)

    monkeypatch.setattr(model.transformer, "forward", forward)
    videos, driven = [encode(model, request(name)) for name in ("fox", "owl", "elk", "cod")], drive()
    driven.worker.submit(videos[0].task(), videos[0].inputs())
    assert driven.at_brake.wait(WAIT_S)
    for video in videos[1:]:
        driven.worker.submit(video.task(), video.inputs())
    driven.free()
    limit = driven.next(PackLimit)
    assert limit.group == "dit-0"
    assert limit.max_tokens > 0
    assert len([driven.next(ChunkResult) for _ in videos]) == 4


def test_a_broken_device_ends_the_loop(model: HeliosModel) -> None:
    video = encode(model, request("fox"))
    driven = Driven(
        model, FaultPlan(Fault(point="dit.step", action="raise", error=torch.AcceleratorError("launch failure")))
    )
    driven.free()
    driven.worker.submit(video.task(), video.inputs())
    driven.thread.join(WAIT_S)
    assert isinstance(driven.failure, torch.AcceleratorError)


def test_close_ends_the_loop_in_the_middle_of_work(model: HeliosModel) -> None:
    video, driven = encode(model, request("fox", steps=(400, 1, 1))), Driven(model)
    driven.worker.submit(video.task(), video.inputs())
    driven.step(2)
    driven.close()
    assert driven.worker.progress <= 4
    assert not any(isinstance(answer, ChunkResult | TaskFailed) for answer in driven.rest())


def test_an_idle_worker_waits_without_work(model: HeliosModel, drive: Drive, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = []
    plan = DitWorker._plan

    def counted(worker: DitWorker) -> StepPlan:
        plans.append(plan(worker))
        return plans[-1]

    monkeypatch.setattr(DitWorker, "_plan", counted)
    driven = drive()
    time.sleep(0.3)
    assert plans == []
    driven.close()
    assert plans == [StepPlan(stop=True)]


def test_the_golden_chunk_is_always_the_same_and_tells_weights_apart(tiny_distilled: Path, tiny_mid: Path) -> None:
    def worker(path: Path) -> DitWorker:
        checkpoint = open_checkpoint(ModelConfig(model=str(path)))
        return DitWorker("dit-0", Runner(load_transformer(checkpoint), checkpoint.rules), lambda _: None)

    one, same, other = worker(tiny_distilled), worker(tiny_distilled), worker(tiny_mid)
    digest = one.golden()
    assert len(bytes.fromhex(digest)) == 16
    torch.manual_seed(3)
    assert digest == one.golden() == same.golden() != other.golden()
    weight = same._runner.transformer.proj_out.weight
    with torch.no_grad():
        weight[0, 0] += 1e-3
        assert same.golden() != digest
        weight[0, 0] = torch.nan
    with pytest.raises(NotFiniteError):
        same.golden()


def test_a_digest_is_of_the_float32_values() -> None:
    latents = torch.arange(24, dtype=torch.float32).view(2, 3, 4)
    assert latents_digest(latents) == latents_digest(latents.bfloat16()) != latents_digest(latents + 1)
    assert latents_digest(latents.transpose(0, 2).contiguous().transpose(0, 2)) == latents_digest(latents)


def test_a_long_video_holds_memory_flat(model: HeliosModel, drive: Drive) -> None:
    video, driven = encode(model, request("fox", num_frames=20 * 33)), drive()
    driven.free()
    made, state, held = dict[int, Tensor](), None, list[int]()
    for chunk in range(20):
        window = [made.get(index, torch.empty(0)) for index in range(chunk)]
        driven.worker.submit(video.task(chunk, state), video.inputs(window))
        result = driven.next(ChunkResult)
        made[chunk], state = result.latents, result.generator_state
        made = {index: latents for index, latents in made.items() if index > chunk - 3 or index == 0}
        del window, result
        if chunk >= 4 and chunk % 5 == 4:
            held.append(_tensor_bytes())
    assert held == [held[0]] * 4


def _tensor_bytes() -> int:
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if issubclass(type(item), torch.Tensor):
            storage = item.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


# Several ranks, on threads


class FakeRanks(RankGroup):
    """A group whose ranks are threads of this process."""

    __slots__ = ("plans",)

    def __init__(self, rank: int, plans: queue.SimpleQueue[StepPlan]) -> None:
        super().__init__(rank=rank, size=2, timeout_s=2.0)
        object.__setattr__(self, "plans", plans)

    def broadcast(self, value: A) -> A:
        if self.rank == 0:
            self.plans.put(value)  # type: ignore[arg-type]
            return value
        return self.plans.get(timeout=self.timeout_s)  # type: ignore[return-value]


def pair(drive: Drive) -> tuple[Driven, Driven]:
    plans: queue.SimpleQueue[StepPlan] = queue.SimpleQueue()
    zero, one = (drive(ranks=FakeRanks(rank, plans)) for rank in range(2))
    zero.free()
    one.free()
    return zero, one


def test_a_rank_waits_for_the_inputs_of_a_joined_task(model: HeliosModel, drive: Drive) -> None:
    video, (zero, one) = encode(model, request("fox")), pair(drive)
    task = video.task()
    zero.worker.submit(task, video.inputs())
    result = zero.next(ChunkResult)
    assert one.worker.progress == 0
    one.worker.submit(task, video.inputs())
    deadline = time.monotonic() + WAIT_S
    while one.worker.progress < 3 or one.worker.task_ids:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    assert one.rest() == []
    assert torch.equal(result.latents, latents_of(model, video.request)[0])


def test_an_aborted_task_is_waited_for_and_forgotten(model: HeliosModel, drive: Drive) -> None:
    video, (zero, one) = encode(model, request("fox")), pair(drive)
    task = video.task()
    zero.worker.signal(task.task_id, "abort")
    zero.worker.submit(task, video.inputs())
    assert zero.next(Aborted).task_id == task.task_id
    one.worker.submit(task, video.inputs())
    deadline = time.monotonic() + WAIT_S
    while one.worker.task_ids:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    assert (one.worker.progress, one.rest()) == (0, [])


def test_idle_ranks_hear_of_each_other_before_they_lose_patience(drive: Drive) -> None:
    zero, one = pair(drive)
    time.sleep(2.5)
    assert zero.thread.is_alive()
    assert one.thread.is_alive()
    assert one.failure is None


def test_a_task_that_never_reaches_a_rank_ends_that_rank(model: HeliosModel) -> None:
    video, plans = encode(model, request("fox")), queue.SimpleQueue[StepPlan]()
    zero, one = (Driven(model, ranks=FakeRanks(rank, plans)) for rank in range(2))
    zero.free()
    one.free()
    task = video.task()
    zero.worker.submit(task, video.inputs())
    one.thread.join(WAIT_S)
    assert isinstance(one.failure, TimeoutError)
    assert task.task_id in str(one.failure)
    zero.close()


def test_a_rank_drops_what_rank_0_could_not_go_on_with(model: HeliosModel) -> None:
    """A fault of rank 0 alone: the others must not step on with that chunk."""
    video, plans = encode(model, request("bad", steps=(9, 9, 9))), queue.SimpleQueue[StepPlan]()
    faults = FaultPlan(Fault(point="dit.step", action="raise", times=9, where={"step": 2}))
    zero, one = Driven(model, faults, FakeRanks(0, plans)), Driven(model, ranks=FakeRanks(1, plans))
    zero.free()
    one.free()
    task = video.task()
    for driven in (one, zero):
        driven.worker.submit(task, video.inputs())
    assert zero.next(TaskFailed).fault == "error"
    deadline = time.monotonic() + WAIT_S
    while one.worker.task_ids:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    assert one.worker.progress == 3
    zero.close()
    one.close()
    assert one.failure is None
