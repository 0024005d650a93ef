"""One rank of a DiT group in a process of its own. Knows its worker and payloads; knows nothing of transports."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import dataclass

from helios_serve.model_executor.byte_cache import ByteCache
from helios_serve.model_executor.conditioning import Conditioning
from helios_serve.model_executor.model import Checkpoint, load_transformer
from helios_serve.model_executor.runner import Runner
from helios_serve.model_executor.spread import join_mesh
from helios_serve.parallel.collectives import connect
from helios_serve.types import (
    Aborted,
    ChunkTask,
    ExecutorEvent,
    PackLimit,
    Parked,
    RoleTask,
    Signal,
    StepDone,
    TaskDone,
    TaskFailed,
    TensorRef,
)
from helios_serve.workers.dit import Answer, ChunkInputs, ChunkResult, DitWorker, ParkedResult
from helios_serve.workers.failure import task_failed
from helios_serve.workers.host import Fetch, wait_for_memory
from helios_serve.workers.payload import Payload, num_bytes, pack, unpack
from helios_serve.workers.ray_wire import HostSpec, Outbox

Ending = Aborted | ChunkResult | ParkedResult | TaskFailed
"""How a chunk task ends on a DiT worker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    conditioning: Conditioning
    num_bytes: int


class DitHost:
    """One rank of a DiT group. Every rank is given every task; rank 0 answers."""

    def __init__(self, spec: HostSpec, checkpoint: Checkpoint, outbox: Outbox, address: str) -> None:
        self._outbox = outbox
        self._rank = spec.rank
        ranks = connect(spec.rank, spec.num_ranks, address)
        mesh = join_mesh(ranks, checkpoint.config, checkpoint.device, spec.degrees)
        wait_for_memory(checkpoint, "transformer")
        runner = Runner(load_transformer(checkpoint), checkpoint.rules, faults=spec.faults, mesh=mesh)
        self._worker = DitWorker(spec.group, runner, self._hear, ranks=ranks)
        self._golden = self._worker.golden()
        self._thread = threading.Thread(target=self._run_steps, name="helios-dit", daemon=True)
        self._ended: Exception | None = None
        self._lock = threading.Lock()
        self._kept = ByteCache[_Kept](spec.cache_bytes)
        self._endings: dict[str, Future[Ending]] = {}

    @property
    def golden(self) -> str | None:
        return self._golden

    @property
    def progress(self) -> int:
        return self._worker.progress

    @property
    def task_ids(self) -> tuple[str, ...]:
        return self._worker.task_ids

    def start(self) -> None:
        self._thread.start()

    def run(self, task: RoleTask, fetch: Fetch, key: str) -> tuple[ExecutorEvent | None, Payload | None]:
        assert isinstance(task, ChunkTask)
        try:
            inputs = self._inputs(task, fetch)
        except Exception as error:
            if self._rank > 0:
                raise  # rank 0 may count on this rank
            return task_failed(task.task_id, error), None
        if self._rank > 0:
            self._worker.submit(task, inputs)
            return None, None
        ending = self._endings[task.task_id] = Future()
        self._worker.submit(task, inputs)
        return _answer(ending.result(), key)

    def signal(self, task_id: str, op: Signal) -> None:
        self._worker.signal(task_id, op)

    def recheck(self, number: int, timeout_s: float) -> str:
        return self._worker.recheck(number, timeout_s)

    def join(self) -> None:
        self._thread.join()
        raise RuntimeError(f"the step loop of rank {self._rank} ended: {self._ended!r}") from self._ended

    def _run_steps(self) -> None:
        try:
            self._worker.run()
        except Exception as error:
            self._ended = error

    def _hear(self, answer: Answer) -> None:
        """What rank 0 says, on the thread of its step loop."""
        if isinstance(answer, StepDone | PackLimit):
            self._outbox.put(answer)
        else:
            self._endings.pop(answer.task_id).set_result(answer)

    def _inputs(self, task: ChunkTask, fetch: Fetch) -> ChunkInputs:
        ref = task.conditioning
        with self._lock:  # of the cache, and so that a conditioning is fetched once
            kept = self._kept.get(ref.key, lambda: _keep(fetch(ref)))
        return ChunkInputs(
            conditioning=kept.conditioning,
            trail=tuple(unpack(fetch(latents)) for latents in task.trail),
            first=None if task.first is None else unpack(fetch(task.first)),
            parked=None if task.parked is None else unpack(fetch(task.parked)),
        )


def _keep(payload: Payload) -> _Kept:
    """A copy of a conditioning, so that the object store can let go of it."""
    return _Kept(conditioning=unpack(payload, copy=True), num_bytes=num_bytes(payload))


def _answer(ending: Ending, key: str) -> tuple[ExecutorEvent, Payload | None]:
    if isinstance(ending, ChunkResult):
        payload = pack(ending.latents)
        done = TaskDone(
            task_id=ending.task_id,
            latents=TensorRef(key=key, num_bytes=num_bytes(payload)),
            generator_state=ending.generator_state,
            phase=ending.phase,
        )
        return done, payload
    if isinstance(ending, ParkedResult):
        payload = pack(ending.state)
        return Parked(task_id=ending.task_id, state=TensorRef(key=key, num_bytes=num_bytes(payload))), payload
    return ending, None
