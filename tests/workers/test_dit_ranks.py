"""Two real ranks that share each forward, told to park and abort at seeded moments: they must stop at one step.

The test is the executor: it gives both ranks every task, rank 0 the signals, and hears rank 0's answers.
"""

from __future__ import annotations

import multiprocessing
import pickle
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helios_serve.config import ModelConfig
from helios_serve.faults import Fault, FaultPlan
from helios_serve.model_executor.batch import ParkedChunk
from helios_serve.model_executor.digest import latents_digest
from helios_serve.model_executor.model import HeliosModel, load_model, load_transformer, open_checkpoint
from helios_serve.model_executor.runner import Runner, StepResult
from helios_serve.model_executor.spread import join_mesh
from helios_serve.parallel.collectives import connect
from helios_serve.types import Aborted, ChunkTask, StepDone
from helios_serve.workers.dit import Answer, ChunkInputs, ChunkResult, DitWorker, ParkedResult
from tests.workers.chunks import assert_close, encode, latents_of, request

NUM_SIGNALS = 30
WAIT_S = 240
TIMEOUT_S = 8.0


class LoggedRunner(Runner):
    """Writes down what it does at each step boundary."""

    log: list[tuple[object, ...]]

    def park(self, task_id: str) -> ParkedChunk | None:
        parked = super().park(task_id)
        self.log.append(("park", task_id, None if parked is None else (parked.cursor, latents_digest(parked.x))))
        return parked

    def abort(self, task_id: str) -> bool:
        found = super().abort(task_id)
        self.log.append(("abort", task_id, found))
        return found

    def step(self, task_ids: object = None) -> StepResult:
        result = super().step()
        done = tuple((chunk.task_id, latents_digest(chunk.latents)) for chunk in result.finished)
        self.log.append(("step", result.steps, done))
        return result


def _rank(rank: int, meeting: str, checkpoint_path: str, ready: Barrier, end: Connection, faults: FaultPlan) -> None:
    """A rank: its commands come through `end`, its answers and, at the end, its log go back."""
    torch.set_num_threads(1)
    checkpoint = open_checkpoint(ModelConfig(model=checkpoint_path))
    transformer = load_transformer(checkpoint)
    ready.wait(WAIT_S)
    ranks = connect(rank, 2, meeting, TIMEOUT_S)
    mesh = join_mesh(ranks, checkpoint.config, checkpoint.device)
    runner = LoggedRunner(transformer, checkpoint.rules, faults=faults, mesh=mesh)
    runner.log = []
    worker = DitWorker("dit-0", runner, lambda answer: end.send_bytes(pickle.dumps(answer)), ranks=ranks)
    listener = threading.Thread(target=_listen, args=(end, worker))
    listener.start()
    try:
        worker.run()
        end.send_bytes(pickle.dumps(runner.log))
    except RuntimeError as error:
        end.send_bytes(pickle.dumps(error))
    listener.join()
    ranks.close()


def _listen(end: Connection, worker: DitWorker) -> None:
    while True:
        verb, *arguments = pickle.loads(end.recv_bytes())
        if verb == "end":
            return
        getattr(worker, verb)(*arguments)


class Group:
    """Both ranks of a group."""

    def __init__(self, ends: list[Connection]) -> None:
        self.ends = ends

    def tell(self, rank: int, verb: str, *arguments: object) -> None:
        self.ends[rank].send_bytes(pickle.dumps((verb, *arguments)))

    def submit(self, task: ChunkTask, inputs: ChunkInputs) -> None:
        for rank in random.Random(task.task_id).sample(range(2), 2):
            self.tell(rank, "submit", task, inputs)

    def signal(self, task: ChunkTask, op: str) -> None:
        self.tell(0, "signal", task.task_id, op)

    def hear(self, rank: int = 0) -> object:
        assert self.ends[rank].poll(WAIT_S)
        return pickle.loads(self.ends[rank].recv_bytes())

    def end_of(self, task: ChunkTask) -> Answer:
        """The task's last answer."""
        while True:
            answer = self.hear()
            if isinstance(answer, ChunkResult | ParkedResult | Aborted):
                assert answer.task_id == task.task_id
                return answer
            assert isinstance(answer, StepDone)


@contextmanager
def group_of_two(checkpoint: Path, tmp_path: Path, *faults_of_1: Fault) -> Iterator[Group]:
    context = multiprocessing.get_context("spawn")
    ends, processes, ready = [], [], context.Barrier(2)
    for rank in range(2):
        here, there = context.Pipe()
        faults = FaultPlan(*faults_of_1) if rank == 1 else FaultPlan()
        arguments = (rank, f"file://{tmp_path}/meeting", str(checkpoint), ready, there, faults)
        processes.append(context.Process(target=_rank, args=arguments))
        processes[-1].start()
        there.close()
        ends.append(here)
    group = Group(ends)
    try:
        yield group
        for rank, process in enumerate(processes):
            if process.is_alive():
                group.tell(rank, "end")
            process.join(WAIT_S)
    finally:
        for process in processes:
            process.kill()
            process.join()
            process.close()
        for end in ends:
            end.close()


@pytest.fixture(scope="module")
def model(tiny_distilled: Path) -> HeliosModel:
    return load_model(ModelConfig(model=str(tiny_distilled)))


def test_park_and_abort_race_step_boundaries(model: HeliosModel, tiny_distilled: Path, tmp_path: Path) -> None:
    video = encode(model, request("fox", steps=(3, 3, 3)))
    (alone,) = latents_of(model, video.request)
    ends = {ParkedResult: 0, Aborted: 0, ChunkResult: 0}
    with group_of_two(tiny_distilled, tmp_path) as group:
        group.submit(task := video.task(), video.inputs())
        expected = _latents(group.end_of(task))
        assert_close(expected, alone)
        for seed in range(NUM_SIGNALS):
            rng = random.Random(seed)
            op, parked = rng.choice(("park", "abort")), None
            group.submit(task := video.task(), video.inputs())
            for _ in range(rng.randrange(9)):
                assert isinstance(group.hear(), StepDone)
            time.sleep(rng.uniform(0, 0.02))  # about a step
            group.signal(task, op)
            answer = group.end_of(task)
            ends[type(answer)] += 1
            if isinstance(answer, ParkedResult):
                parked = answer.state
            if not isinstance(answer, ChunkResult):
                group.submit(task := video.task(), video.inputs(parked=parked))
                answer = group.end_of(task)
            assert torch.equal(_latents(answer), expected)
        time.sleep(1.5 * TIMEOUT_S)  # idle ranks must not lose patience with each other
        group.submit(task := video.task(), video.inputs())
        assert torch.equal(_latents(group.end_of(task)), expected)
        group.tell(0, "close")
        logs = [group.hear(rank) for rank in range(2)]
    assert isinstance(logs[0], list)
    assert logs[0] == logs[1]
    assert sum(entry[0] == "step" for entry in logs[0]) >= 9 * NUM_SIGNALS
    assert min(ends.values()) > 0


def test_packs_change_alike_on_both_ranks(model: HeliosModel, tiny_distilled: Path, tmp_path: Path) -> None:
    """Four chunks at a time come and go; the ranks' steps hold the same tasks, and the same bits."""
    videos = [encode(model, request(name, steps=(2, 2, 2), seed=seed)) for seed, name in enumerate(("fox", "owl"))]
    expected = {video.request.request_id: latents_of(model, video.request)[0] for video in videos}
    rng, done = random.Random(1), 0
    with group_of_two(tiny_distilled, tmp_path) as group:
        running: dict[str, ChunkTask] = {}
        for _ in range(24):
            while len(running) < 4:
                video = rng.choice(videos)
                task = video.task()
                running[task.task_id] = task
                group.submit(task, video.inputs())
            if rng.random() < 0.7:
                group.signal(rng.choice(list(running.values())), rng.choice(("park", "abort")))
            answer = group.hear()
            while isinstance(answer, StepDone):
                assert len(answer.task_ids) <= 4
                answer = group.hear()
            assert isinstance(answer, ChunkResult | ParkedResult | Aborted)
            name = running.pop(answer.task_id).request_id
            if isinstance(answer, ChunkResult):
                assert_close(answer.latents, expected[name])
                done += 1
        group.tell(0, "close")
        logs = []
        for rank in range(2):
            while not isinstance(log := group.hear(rank), list):
                assert rank == 0  # only rank 0 answers
            logs.append(log)
    assert logs[0] == logs[1]
    assert max(len(entry[1]) for entry in logs[0] if entry[0] == "step") >= 3
    assert done > 0


def test_a_rank_that_dies_ends_the_other(model: HeliosModel, tiny_distilled: Path, tmp_path: Path) -> None:
    video = encode(model, request("fox", steps=(9, 9, 9)))
    dies = Fault(point="dit.step", action="exit", where={"step": 3})
    with group_of_two(tiny_distilled, tmp_path, dies) as group:
        group.submit(video.task(), video.inputs())
        steps = []
        while isinstance(answer := group.hear(), StepDone):
            steps.append(answer)
        assert isinstance(answer, RuntimeError)
        assert 3 <= len(steps) <= 6


def _latents(answer: Answer) -> Tensor:
    assert isinstance(answer, ChunkResult)
    return answer.latents
