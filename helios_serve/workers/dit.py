"""The DiT role: one rank of a group, running chunks of many requests by continuous batching.

Knows the runner, its rank and what was asked of its tasks; knows nothing of references, transports or scheduling. At
every step boundary rank 0 decides a StepPlan and broadcasts it, and all ranks obey it, so that they stop at one step.
The runner shares each forward among them; only rank 0 answers.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from helios_serve.model_executor.batch import ChunkInput, ParkedChunk
from helios_serve.model_executor.conditioning import Conditioning, fresh_generator_state
from helios_serve.model_executor.golden import golden_digest
from helios_serve.model_executor.runner import Runner, StepResult
from helios_serve.parallel.collectives import GroupBrokenError, RankGroup
from helios_serve.types import Aborted, ChunkTask, PackLimit, Phase, Signal, StepDone, TaskFailed
from helios_serve.workers.failure import task_failed
from helios_serve.workers.step_timer import StepTimer

_MAX_EARLY_SIGNALS = 1024
"""Signals kept for tasks that are not here: not yet, or no longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkInputs:
    """What the references of a ChunkTask stand for; see there. Tensors may be on any device."""

    conditioning: Conditioning
    trail: tuple[Tensor, ...] = ()
    first: Tensor | None = None
    parked: ParkedChunk | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkResult:
    """A finished chunk: latents [C, 9, h, w] float32, complete on their device, and the generator's state after it."""

    task_id: str
    latents: Tensor
    generator_state: bytes
    phase: Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class ParkedResult:
    """A chunk that left at a step boundary, with its progress."""

    task_id: str
    state: ParkedChunk


Answer = StepDone | ChunkResult | ParkedResult | Aborted | TaskFailed | PackLimit
"""What a DiT worker says. Every task that joins gets one ChunkResult, ParkedResult, Aborted or TaskFailed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """What all ranks do at one step boundary, in this order: take in `joined`, let go of `parked` and `aborted`, forget
    whatever is not `active`, and run one step of the rest. A task may join and leave at one boundary."""

    joined: tuple[str, ...] = ()
    parked: tuple[str, ...] = ()
    aborted: tuple[str, ...] = ()
    active: tuple[str, ...] = ()
    recheck: int = 0
    """Not 0: the number of a golden check that is made before the step."""
    stop: bool = False


class DitWorker:
    """The step loop of one rank. `run` belongs to one thread; the other methods to any.

    Args:
        group: the name that answers carry.
        runner: of this rank.
        answer: called on rank 0, from the thread of `run`.
        ranks: this rank's place in its group.
        before_step: called before each step; may block to let other work on the device go first.
    """

    def __init__(
        self,
        group: str,
        runner: Runner,
        answer: Callable[[Answer], None],
        *,
        ranks: RankGroup | None = None,
        before_step: Callable[[], None] = lambda: None,
    ) -> None:
        self._group = group
        self._runner = runner
        self._answer = answer
        self._ranks = RankGroup() if ranks is None else ranks
        self._before_step = before_step
        self._timer = StepTimer(runner.transformer.device)
        self._changed = threading.Condition()
        self._inbox: dict[str, tuple[ChunkTask, ChunkInputs]] = {}
        self._started_s: dict[str, float] = {}
        self._signals: OrderedDict[str, Signal] = OrderedDict()
        self._asked_check = 0
        self._made_check: tuple[int, str | Exception] = (0, "")
        self._is_closing = False
        self._num_steps = 0

    @property
    def progress(self) -> int:
        """Steps done so far."""
        return self._num_steps

    @property
    def task_ids(self) -> tuple[str, ...]:
        """Tasks that wait for the next boundary, and those that run."""
        with self._changed:
            return (*self._started_s, *self._inbox)

    def submit(self, task: ChunkTask, inputs: ChunkInputs) -> None:
        """Lets a chunk join at the next step boundary. Every rank is given every task, in any order."""
        with self._changed:
            self._inbox[task.task_id] = (task, inputs)
            self._changed.notify_all()

    def signal(self, task_id: str, op: Signal) -> None:
        """Parks or aborts a chunk at the next step boundary; rank 0 alone is told. One that ends before that is done as
        usual; one that has not come yet leaves when it would join. An abort overrules a park."""
        with self._changed:
            if op == "abort" or task_id not in self._signals:
                self._signals[task_id] = op
                self._signals.move_to_end(task_id)
            while len(self._signals) > _MAX_EARLY_SIGNALS:
                self._signals.popitem(last=False)
            self._changed.notify_all()

    def close(self) -> None:
        """Ends `run` at the next step boundary, on all ranks if this is rank 0; running chunks are lost."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()

    def golden(self) -> str:
        """The digest of the fixed chunk, BLAKE2b-128 of its float32 latents; while `run` runs use `recheck`.

        Raises: NotFiniteError when the transformer makes NaN or infinity.
        """
        return golden_digest(self._runner.transformer, self._runner.rules)

    def recheck(self, number: int, timeout_s: float) -> str:
        """The digest of the fixed chunk, made anew at a step boundary while `run` runs. Every rank is asked, under the
        same number; numbers rise from 1.

        Raises: TimeoutError when no boundary comes; what the chunk raises.
        """
        with self._changed:
            self._asked_check = number
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._is_closing or self._made_check[0] >= number, timeout=timeout_s)
            made, found = self._made_check
            if made < number:
                raise TimeoutError(f"no step boundary within {timeout_s:g} s, or the worker ends")
        if isinstance(found, Exception):
            raise found
        return found

    def run(self) -> None:
        """Plan, obey, step, until rank 0 closes.

        Raises: RuntimeError when another rank is gone or silent, or this one cannot go on with it; TimeoutError when a
            task does not reach this rank.
        """
        while True:
            plan = self._ranks.broadcast(self._plan() if self._ranks.rank == 0 else StepPlan())
            if plan.stop:
                return
            self._obey(plan)
            if plan.recheck:
                self._make_check(plan.recheck)
            if self._runner.active:
                self._before_step()
                self._step()

    def _plan(self) -> StepPlan:
        """Rank 0's decision. Waits while there is nothing to do, but never so long that other ranks lose patience."""
        if not self._runner.active:
            self._say_timings(flush=True)
        with self._changed:
            if not self._runner.active:
                patience_s = None if self._ranks.size == 1 else self._ranks.timeout_s / 4
                self._changed.wait_for(lambda: self._is_closing or self._inbox or self._is_to_check, timeout=patience_s)
            joined, running = tuple(self._inbox), self._runner.active
            here = (*running, *joined)
            told = {task_id: self._signals.pop(task_id) for task_id in here if task_id in self._signals}
            return StepPlan(
                joined=joined,
                parked=tuple(task_id for task_id, op in told.items() if op == "park"),
                aborted=tuple(task_id for task_id, op in told.items() if op == "abort"),
                active=tuple(task_id for task_id in here if task_id not in told),
                recheck=self._asked_check if self._is_to_check else 0,
                stop=self._is_closing,
            )

    @property
    def _is_to_check(self) -> bool:
        return self._asked_check > self._made_check[0]

    def _make_check(self, number: int) -> None:
        """A chunk of its own beside those that run; whatever it raises ends nothing else."""
        self._before_step()
        found: str | Exception
        try:
            found = self.golden()
        except Exception as error:
            found = error
        with self._changed:
            self._made_check = (number, found)
            self._changed.notify_all()

    def _obey(self, plan: StepPlan) -> None:
        for task_id in plan.joined:
            task, inputs = self._take(task_id)
            if task_id not in plan.aborted:
                self._join(task, inputs)
        if plan.parked or plan.aborted:
            self._say_timings(flush=True)  # the last step of those that leave
        for task_id in plan.parked:
            state = self._runner.park(task_id)
            if state is not None:
                self._leave(task_id, ParkedResult(task_id=task_id, state=state))
        for task_id in plan.aborted:
            self._runner.abort(task_id)
            self._leave(task_id, Aborted(task_id=task_id))
        for task_id in self._runner.active:
            if task_id not in plan.active:  # rank 0 could not go on with it
                self._runner.abort(task_id)
                self._leave(task_id)

    def _take(self, task_id: str) -> tuple[ChunkTask, ChunkInputs]:
        """A joined task's inputs; on other ranks they may still be on their way."""
        with self._changed:
            if not self._changed.wait_for(lambda: task_id in self._inbox, timeout=self._ranks.timeout_s):
                raise TimeoutError(f"task {task_id} did not reach rank {self._ranks.rank}")
            self._started_s[task_id] = time.time()
            return self._inbox.pop(task_id)

    def _join(self, task: ChunkTask, inputs: ChunkInputs) -> None:
        try:
            self._runner.join(_chunk_input(task, inputs), inputs.parked)
        except GroupBrokenError:
            raise
        except Exception as error:
            self._leave(task.task_id, task_failed(task.task_id, error))

    def _step(self) -> None:
        self._timer.begin()
        result = self._runner.step()
        self._timer.end(tuple(task_id for task_id, _ in result.steps))
        self._num_steps += 1
        self._say_timings(flush=bool(result.finished or result.failed))
        self._hand_out(result)

    def _say_timings(self, *, flush: bool) -> None:
        for task_ids, device_ms in self._timer.read(flush=flush):
            if task_ids:
                self._say(StepDone(group=self._group, task_ids=task_ids, device_ms=device_ms))

    def _hand_out(self, result: StepResult) -> None:
        if result.max_tokens is not None:
            self._say(PackLimit(group=self._group, max_tokens=result.max_tokens))
        for task_id, error in result.failed:
            self._leave(task_id, task_failed(task_id, error))
        for chunk in result.finished:
            phase = Phase(name="chunk", started_s=self._started_s[chunk.task_id], ended_s=time.time())
            self._leave(
                chunk.task_id,
                ChunkResult(
                    task_id=chunk.task_id,
                    latents=chunk.latents,
                    generator_state=chunk.generator_state,
                    phase=phase,
                ),
            )

    def _leave(self, task_id: str, answer: Answer | None = None) -> None:
        with self._changed:
            self._started_s.pop(task_id, None)
            self._signals.pop(task_id, None)
        if answer is not None:
            self._say(answer)

    def _say(self, answer: Answer) -> None:
        if self._ranks.rank == 0:
            self._answer(answer)


def _chunk_input(task: ChunkTask, inputs: ChunkInputs) -> ChunkInput:
    conditioning = inputs.conditioning
    for tensor in conditioning.tensors():
        if (
            tensor.is_cuda
        ):  # it may be dropped, and its memory reused by the encoder's stream, while ours still reads it
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
    history = conditioning.history.followed_by(inputs.trail, inputs.first)
    generator_state = task.generator_state if task.seed is None else fresh_generator_state(task.seed)
    return conditioning.chunk_input(task.task_id, task.request_id, task.chunk, history, generator_state)
