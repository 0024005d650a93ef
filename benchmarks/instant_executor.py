"""An executor whose devices take no time: what remains of a run over it is what the engine and the API cost.

Knows tasks, answers and their order; computes nothing. Everything happens on the event loop that starts it.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from helios_serve.types import (
    FRAMES_PER_CHUNK,
    Aborted,
    Beat,
    ChunkTask,
    Decoded,
    DecodeTask,
    Encoded,
    EncodeTask,
    ExecutorEvent,
    GoldenCheck,
    GroupUp,
    Parked,
    Phase,
    Role,
    RoleTask,
    Segment,
    Signal,
    StepDone,
    TaskDone,
    TensorRef,
)

BEAT_S = 0.5
LATENT_BYTES = 16 * 9 * 48 * 80 * 4
"""Of a chunk at 640x384."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Canned:
    """What every request gets. media: of its chunks, in order. step_ms: what a step says that it took. num_steps: of
    each chunk."""

    init: bytes = b"init"
    media: tuple[bytes, ...] = (bytes(1000),) * 100
    step_ms: float = 300.0
    num_steps: int = 6


@dataclass(slots=True, kw_only=True, eq=False)
class _Group:
    """A DiT group: tasks by id with the steps that they still need."""

    name: str
    running: dict[str, int] = field(default_factory=dict)
    tasks: dict[str, ChunkTask] = field(default_factory=dict)
    signals: list[tuple[str, Signal]] = field(default_factory=list)
    is_stepping: bool = False


class InstantExecutor:
    """Groups of all roles; each answer comes in a turn of the event loop of its own, as from a worker's thread."""

    def __init__(self, canned: Canned, *, num_dits: int = 1, num_vaes: int = 1) -> None:
        self.num_steps = 0
        self._canned = canned
        self._dits = {f"dit-{index}": _Group(name=f"dit-{index}") for index in range(num_dits)}
        self._num_vaes = num_vaes
        self._latents = bytes(LATENT_BYTES)
        self._digest = hashlib.blake2b(self._latents, digest_size=16).hexdigest()
        self._numbers = itertools.count()
        self._ready: defaultdict[int, list[bytes]] = defaultdict(list)
        self._names: list[str] = []
        self._is_closed = False
        self._listener: Callable[[ExecutorEvent], None] = lambda _: None

    def make_ready(self, num_requests: int, num_chunks: int) -> None:
        """Makes the segments of so many requests ahead: on a server a worker takes the time and the memory for it, not
        the event loop."""
        for chunk in range(num_chunks):
            self._ready[chunk] = [self._media(chunk) for _ in range(num_requests)]

    def start(self, emit: Callable[[ExecutorEvent], None]) -> None:
        self._listener = emit
        self._up("encoder-0", "encoder")
        for name in self._dits:
            self._up(name, "dit")
        for index in range(self._num_vaes):
            self._up(f"vae-{index}", "vae")
        self._beat()

    def submit(self, group: str, tasks: Sequence[RoleTask]) -> None:
        for task in tasks:
            if isinstance(task, ChunkTask):
                self._join(self._dits[group], task)
            elif isinstance(task, EncodeTask):
                self._later(self._encoded, task)
            else:
                self._later(self._decoded, task)

    def signal(self, group: str, task_id: str, op: Signal) -> None:
        self._dits[group].signals.append((task_id, op))

    def condemn(self, group: str, why: str) -> None:
        raise AssertionError(f"{group} was condemned: {why}")

    def drop(self, refs: Sequence[TensorRef]) -> None:
        pass

    def read(self, ref: TensorRef) -> bytes:
        unlike_others = ref.key.encode()  # the store keeps equal contents once
        return unlike_others + self._latents[len(unlike_others) :]

    def put(self, name: str, record: bytes) -> TensorRef:
        return self._ref(name)

    def recheck(self, timeout_s: float) -> tuple[GoldenCheck, ...]:
        return ()

    def close(self, drain_s: float) -> None:
        self._is_closed = True

    def _emit(self, event: ExecutorEvent) -> None:
        if not self._is_closed:
            self._listener(event)

    def _beat(self) -> None:
        """Every group is alive, twice a second; progress and tasks are told by the answers."""
        for name in self._names:
            tasks = tuple(self._dits[name].running) if name in self._dits else ()
            self._emit(Beat(group=name, incarnation=0, progress=self.num_steps, task_ids=tasks))
        if not self._is_closed:
            asyncio.get_running_loop().call_later(BEAT_S, self._beat)

    def _up(self, group: str, role: Role) -> None:
        self._names.append(group)
        golden = "golden" if role == "dit" else None
        self._emit(GroupUp(group=group, role=role, num_ranks=1, incarnation=0, golden=golden))

    def _join(self, group: _Group, task: ChunkTask) -> None:
        group.running[task.task_id] = self._canned.num_steps
        group.tasks[task.task_id] = task
        if not group.is_stepping:
            group.is_stepping = True
            self._later(self._step, group)

    def _step(self, group: _Group) -> None:
        """A step boundary: signals, one step of all, and the next step if any are left."""
        for task_id, op in group.signals:
            if group.running.pop(task_id, None) is not None:
                parked = Parked(task_id=task_id, state=self._ref(task_id))
                self._emit(parked if op == "park" else Aborted(task_id=task_id))
        group.signals.clear()
        group.is_stepping = bool(group.running)
        if not group.running:
            return
        self.num_steps += 1
        self._emit(StepDone(group=group.name, task_ids=tuple(group.running), device_ms=self._canned.step_ms))
        for task_id in tuple(group.running):
            group.running[task_id] -= 1
            if group.running[task_id] == 0:
                del group.running[task_id]
                self._emit(self._chunk_done(group.tasks.pop(task_id)))
        self._later(self._step, group)

    def _chunk_done(self, task: ChunkTask) -> TaskDone:
        return TaskDone(
            task_id=task.task_id,
            latents=self._ref(task.task_id),
            generator_state=b"state",
            phase=Phase(name="chunk", started_s=0.0, ended_s=self._canned.num_steps * self._canned.step_ms / 1000),
        )

    def _encoded(self, task: EncodeTask) -> None:
        phases = (Phase(name="text_encode", started_s=0.0, ended_s=0.01),)
        ref = self._ref(task.task_id)
        self._emit(Encoded(task_id=task.task_id, conditioning=ref, generator_state=b"state", phases=phases))

    def _media(self, chunk: int) -> bytes:
        media = self._canned.media[chunk]
        unlike_others = b"#%d" % next(self._numbers)  # at the end of the picture data, which nobody decodes
        return media[: -len(unlike_others)] + unlike_others

    def _decoded(self, task: DecodeTask) -> None:
        ready = self._ready[task.chunk]
        segment = Segment(
            request_id=task.request_id,
            chunk=task.chunk,
            start_frame=FRAMES_PER_CHUNK * task.chunk,
            num_frames=task.params.frames_in(task.chunk),
            init=self._canned.init,
            media=ready.pop() if ready else self._media(task.chunk),
        )
        phases = (Phase(name="decode", started_s=0.0, ended_s=0.15), Phase(name="mux", started_s=0.0, ended_s=0.03))
        self._emit(Decoded(task_id=task.task_id, segment=segment, latents_digest=self._digest, phases=phases))

    def _ref(self, name: str) -> TensorRef:
        return TensorRef(key=f"{name}#{next(self._numbers)}", num_bytes=LATENT_BYTES)

    def _later(self, answer: Callable[..., None], *arguments: object) -> None:
        asyncio.get_running_loop().call_soon(answer, *arguments)
