"""All roles in one process, one thread per role: the default executor.

The DiT thread runs the continuous batcher; the encoder and the VAE work beside it, so that decoding chunk k overlaps
with denoising chunk k + 1, and encoding a segment with decoding the next. References are keys of a table in memory.
Knows nothing of clients or scheduling. Nothing in this process can mend a role that is stuck or broken: then it ends,
and whoever supervises it starts it again.
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

from helios_serve.faults import NO_FAULTS, FaultPlan
from helios_serve.model_executor.batch import ParkedChunk
from helios_serve.model_executor.conditioning import Conditioning
from helios_serve.model_executor.runner import Runner
from helios_serve.types import (
    Beat,
    ChunkTask,
    DecodeTask,
    Encoded,
    EncodeTask,
    ExecutorEvent,
    GoldenCheck,
    GroupLost,
    GroupUp,
    Parked,
    Role,
    RoleTask,
    Signal,
    TaskDone,
    TensorRef,
)
from helios_serve.workers.dit import Answer, ChunkInputs, ChunkResult, DitWorker, ParkedResult
from helios_serve.workers.encoder import EncoderWorker
from helios_serve.workers.failure import task_failed
from helios_serve.workers.records import latents_of, record_of
from helios_serve.workers.role_queue import DueGate, RoleQueue
from helios_serve.workers.vae import Pictures, VaeWorker

logger = logging.getLogger(__name__)

Group = Literal["encoder-0", "dit-0", "vae-0"]
ENCODER: Group = "encoder-0"
DIT: Group = "dit-0"
VAE: Group = "vae-0"

EXIT_STATUS = 75
"""EX_TEMPFAIL: start me again."""

_ROLES: dict[Group, Role] = {ENCODER: "encoder", DIT: "dit", VAE: "vae"}
_INCARNATION = 0

V = TypeVar("V")


class TensorTable:
    """What references stand for, until they are dropped. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[str, object] = {}

    def put(self, key: str, value: object, tensors: Sequence[Tensor]) -> TensorRef:
        """Keeps a value, which is made of `tensors`."""
        with self._lock:
            assert key not in self._held
            self._held[key] = value
        return TensorRef(key=key, num_bytes=sum(tensor.nbytes for tensor in tensors))

    def get(self, ref: TensorRef, kind: type[V]) -> V:
        """Raises: KeyError when the reference was dropped."""
        with self._lock:
            value = self._held[ref.key]
        assert isinstance(value, kind)
        return value

    def drop(self, refs: Sequence[TensorRef]) -> None:
        with self._lock:
            for ref in refs:
                self._held.pop(ref.key, None)

    def clear(self) -> None:
        with self._lock:
            self._held.clear()

    @property
    def keys(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(self._held)


class _Member(Protocol):
    """What a beat is made of."""

    @property
    def progress(self) -> int: ...

    @property
    def task_ids(self) -> tuple[str, ...]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSettings:
    """beat_s: between beats. exit_process: ends the process with a status. faults: visited at `beat`, with group."""

    beat_s: float = 0.5
    exit_process: Callable[[int], object] = os._exit
    faults: FaultPlan = NO_FAULTS


class LocalExecutor:
    """An encoder, one DiT group of one rank, and a VAE worker in threads of this process."""

    def __init__(
        self, encoder: EncoderWorker, runner: Runner, vae: VaeWorker, settings: LocalSettings | None = None
    ) -> None:
        self._encoder = encoder
        self._vae = vae
        self._settings = LocalSettings() if settings is None else settings
        self._device = runner.transformer.device
        self._table = TensorTable()
        self._put_numbers = itertools.count()
        self._gate = DueGate()
        self._dit = DitWorker(DIT, runner, self._hand_on, before_step=self._gate.wait)
        self._encodes: RoleQueue[tuple[EncodeTask, Conditioning | None]] = RoleQueue()
        self._decodes: RoleQueue[tuple[DecodeTask, Tensor]] = RoleQueue()
        self._muxes: queue.SimpleQueue[tuple[DecodeTask, Pictures] | None] = queue.SimpleQueue()
        self._up: list[Group] = []
        self._golden: str | None = None
        self._check_numbers = itertools.count(1)
        self._closing = threading.Event()
        self._listener: Callable[[ExecutorEvent], None] = lambda _: None
        self._threads = [
            self._thread("encoder", ENCODER, self._run_encoder),
            self._thread("dit", DIT, self._run_dit),
            self._thread("vae", VAE, self._run_vae),
            self._thread("mux", VAE, self._run_mux),
            self._thread("beat", DIT, self._run_beat),
        ]

    def start(self, emit: Callable[[ExecutorEvent], None]) -> None:
        self._listener = emit
        for thread in self._threads:
            thread.start()

    def submit(self, group: str, tasks: Sequence[RoleTask]) -> None:
        for task in tasks:
            try:
                self._submit(group, task)
            except KeyError as error:
                self._emit(task_failed(task.task_id, RuntimeError(f"the reference {error} was dropped")))

    def signal(self, group: str, task_id: str, op: Signal) -> None:
        assert group == DIT
        self._dit.signal(task_id, op)

    def condemn(self, group: str, why: str) -> None:
        """Ends the process: threads cannot be killed."""
        self._lose(group, f"condemned: {why}")

    def drop(self, refs: Sequence[TensorRef]) -> None:
        self._table.drop(refs)

    def read(self, ref: TensorRef) -> bytes:
        return record_of(self._table.get(ref, object))

    def put(self, name: str, record: bytes) -> TensorRef:
        latents = latents_of(record).to(self._device)
        return self._table.put(f"{name}#{next(self._put_numbers)}", latents, (latents,))

    def recheck(self, timeout_s: float) -> tuple[GoldenCheck, ...]:
        if DIT not in self._up:
            return ()
        try:
            found = self._dit.recheck(next(self._check_numbers), timeout_s)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
            return (GoldenCheck(group=DIT, expected=self._golden, found=None, problem=problem),)
        return (GoldenCheck(group=DIT, expected=self._golden, found=found),)

    def close(self, drain_s: float) -> None:
        self._closing.set()
        self._dit.close()
        self._encodes.close()
        self._decodes.close()
        self._muxes.put(None)
        self._gate.open()
        deadline = time.monotonic() + drain_s
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                logger.warning("%s still works after %.1f s", thread.name, drain_s)
        self._table.clear()

    def _submit(self, group: str, task: RoleTask) -> None:
        if isinstance(task, EncodeTask):
            assert group == ENCODER
            earlier = None if task.conditioning is None else self._table.get(task.conditioning, Conditioning)
            self._encodes.put(task.task_id, (task, earlier))
        elif isinstance(task, DecodeTask):
            assert group == VAE
            latents = self._table.get(task.latents, Tensor)
            if task.is_due:
                self._gate.add(task.task_id)
            self._decodes.put(task.task_id, (task, latents), is_due=task.is_due)
        else:
            assert group == DIT
            self._dit.submit(task, self._inputs(task))

    def _inputs(self, task: ChunkTask) -> ChunkInputs:
        return ChunkInputs(
            conditioning=self._table.get(task.conditioning, Conditioning),
            trail=tuple(self._table.get(ref, Tensor) for ref in task.trail),
            first=None if task.first is None else self._table.get(task.first, Tensor),
            parked=None if task.parked is None else self._table.get(task.parked, ParkedChunk),
        )

    def _run_encoder(self) -> None:
        self._say_up(ENCODER)
        while (taken := self._encodes.take()) is not None:
            task, earlier = taken
            self._guard(task.task_id, lambda task=task, earlier=earlier: self._encode(task, earlier))  # type: ignore[misc]
            self._encodes.done(task.task_id)

    def _encode(self, task: EncodeTask, earlier: Conditioning | None) -> None:
        result = self._encoder.encode(task.request, earlier)
        conditioning = result.conditioning
        ref = self._table.put(f"{task.task_id}:conditioning", conditioning, conditioning.tensors())
        self._emit(
            Encoded(
                task_id=task.task_id,
                conditioning=ref,
                generator_state=result.generator_state,
                phases=result.phases,
            )
        )

    def _run_dit(self) -> None:
        self._golden = self._dit.golden()
        self._say_up(DIT, self._golden)
        self._dit.run()

    def _hand_on(self, answer: Answer) -> None:
        """Puts the tensors of an answer into the table; the engine gets references."""
        if isinstance(answer, ChunkResult):
            ref = self._table.put(f"{answer.task_id}:latents", answer.latents, (answer.latents,))
            self._emit(
                TaskDone(
                    task_id=answer.task_id,
                    latents=ref,
                    generator_state=answer.generator_state,
                    phase=answer.phase,
                )
            )
        elif isinstance(answer, ParkedResult):
            ref = self._table.put(f"{answer.task_id}:parked", answer.state, answer.state.tensors())
            self._emit(Parked(task_id=answer.task_id, state=ref))
        else:
            self._emit(answer)

    def _run_vae(self) -> None:
        self._say_up(VAE)
        while (taken := self._decodes.take()) is not None:
            task, latents = taken
            if not self._guard(task.task_id, lambda task=task, latents=latents: self._decode(task, latents)):  # type: ignore[misc]
                self._decodes.done(task.task_id)

    def _decode(self, task: DecodeTask, latents: Tensor) -> None:
        try:
            pictures = self._vae.decode_pictures(task, latents)
        finally:
            self._gate.remove(task.task_id)
        self._muxes.put((task, pictures))

    def _run_mux(self) -> None:
        while (taken := self._muxes.get()) is not None:
            task, pictures = taken
            self._guard(task.task_id, lambda task=task, pictures=pictures: self._mux(task, pictures))  # type: ignore[misc]
            self._decodes.done(task.task_id)

    def _mux(self, task: DecodeTask, pictures: Pictures) -> None:
        self._emit(self._vae.encode_pictures(task, pictures))

    def _run_beat(self) -> None:
        while not self._closing.wait(self._settings.beat_s):
            for group in tuple(self._up):
                self._settings.faults.at("beat", group=group)
                self._emit(self._beat(group))

    def _beat(self, group: Group) -> Beat:
        members: dict[Group, _Member] = {ENCODER: self._encodes, DIT: self._dit, VAE: self._decodes}
        progress, task_ids = members[group].progress, members[group].task_ids
        return Beat(group=group, incarnation=_INCARNATION, progress=progress, task_ids=task_ids)

    def _say_up(self, group: Group, golden: str | None = None) -> None:
        role = _ROLES[group]
        self._emit(GroupUp(group=group, role=role, num_ranks=1, incarnation=_INCARNATION, golden=golden))
        self._up.append(group)

    def _guard(self, task_id: str, work: Callable[[], None]) -> bool:
        """Runs one task's work; whatever it raises ends that task alone. Whether it went well."""
        try:
            work()
        except Exception as error:
            self._emit(task_failed(task_id, error))
            return False
        return True

    def _thread(self, name: str, group: Group, body: Callable[[], None]) -> threading.Thread:
        return threading.Thread(target=self._run_role, args=(group, body), name=f"helios-{name}", daemon=True)

    def _run_role(self, group: Group, body: Callable[[], None]) -> None:
        try:
            with _own_stream(self._device):
                body()
        except Exception as error:
            logger.critical("%s ended", threading.current_thread().name, exc_info=error)
            if not self._closing.is_set():
                self._lose(group, f"{type(error).__name__}: {error}")

    def _lose(self, group: str, why: str) -> None:
        logger.critical("group %s is lost: %s", group, why)
        self._emit(GroupLost(group=group, incarnation=_INCARNATION, why=why))
        self._settings.exit_process(EXIT_STATUS)

    def _emit(self, event: ExecutorEvent) -> None:
        if not self._closing.is_set():
            self._listener(event)


def _own_stream(device: torch.device) -> AbstractContextManager[object]:
    """The calling thread's own stream on a GPU, so that roles do not wait for each other there."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()
