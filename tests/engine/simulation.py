"""The shipped engine over a simulated machine under a virtual clock: same seed, same history.

`Machine` is an `Executor` whose groups compute hashes in place of tensors: the "latents" of a chunk are the hash of
everything that decides them (request, chunk, conditioning, trail, pinned frame, generator state), so a chunk that was
given the wrong history shows in the bytes of its segment and of all that follow.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from random import Random

from helios_serve.config import EngineConfig
from helios_serve.engine.engine import Engine
from helios_serve.engine.recorder import Recorder
from helios_serve.engine.request_run import RequestRun
from helios_serve.engine.step_cost import CostModel, DevicePrior, ModelShape
from helios_serve.telemetry import Metrics
from helios_serve.types import (
    Aborted,
    Beat,
    ChunkReady,
    ChunkRecord,
    ChunkTask,
    Completed,
    Decoded,
    DecodeTask,
    Encoded,
    EncodeTask,
    Event,
    ExecutorEvent,
    Failure,
    GoldenCheck,
    GroupLost,
    GroupUp,
    PackLimit,
    Parked,
    Phase,
    Progress,
    PromptChange,
    Resume,
    Role,
    RoleTask,
    SamplingParams,
    Segment,
    SegmentReady,
    Signal,
    StepDone,
    TaskDone,
    TaskFailed,
    TensorRef,
    VideoRequest,
)

TICK_S = 0.25
GOLDEN = "golden"


def digest(*parts: object) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def video(name: str, *, num_chunks: int = 3, steps: tuple[int, ...] = (2, 2, 2), **options: object) -> VideoRequest:
    """A request of the reference size; `options` are fields of VideoRequest."""
    params = SamplingParams(
        width=640, height=384, num_frames=33 * num_chunks, fps=24, seed=7, steps=steps, guidance_scale=1.0
    )
    return VideoRequest(request_id=name, prompts=(PromptChange(chunk=0, prompt=name),), params=params, **options)  # type: ignore[arg-type]


def expected_segments(request: VideoRequest) -> list[bytes]:
    """What an undisturbed run makes of a request."""
    conditioning, state = digest("conditioning", request.request_id), digest("generator", request.request_id).encode()
    latents: list[str] = []
    for chunk in range(request.params.num_chunks):
        pinned = request.pinned_chunk(chunk)
        first = None if pinned is None else latents[pinned]
        latents.append(digest(request.request_id, chunk, conditioning, tuple(latents[-3:]), first, state))
        state = digest("state", latents[-1]).encode()
    return [digest("media", value).encode() for value in latents]


@dataclass(slots=True, kw_only=True, eq=False)
class Running:
    """One task on a group; for chunks `step` is the next one."""

    task: RoleTask
    step: int = 0
    num_steps: int = 1


@dataclass(slots=True, kw_only=True, eq=False)
class Group:
    """One simulated group. `joining` and `signals` are taken at the next boundary."""

    name: str
    role: Role
    incarnation: int = 0
    is_up: bool = False
    is_frozen: bool = False
    golden: str = GOLDEN
    progress: int = 0
    running: dict[str, Running] = field(default_factory=dict)
    joining: list[ChunkTask] = field(default_factory=list)
    signals: list[tuple[str, Signal]] = field(default_factory=list)
    is_stepping: bool = False


Verdict = Callable[[RoleTask], str | None]
"""What becomes of a task when it is touched: None, "nan", "error", "kill" or "request"."""


class Machine:
    """The executor: groups, references and time. Everything happens in `at` events of the world."""

    def __init__(self, world: World, counts: dict[Role, int]) -> None:
        self.world = world
        self.groups = {
            f"{role}-{i}": Group(name=f"{role}-{i}", role=role) for role in counts for i in range(counts[role])
        }
        self.values: dict[str, str] = {}
        self._put_numbers = itertools.count()
        self.verdict: Verdict = lambda _: None
        self.restart_s = 3.0
        self.step_s = 0.3
        self.decode_s = 0.2
        self.max_pack_seen = 0
        self.num_steps_run: Counter[tuple[str, int]] = Counter()
        self.num_condemned = 0
        self.lost_alone: Counter[str] = Counter()
        """How often a group was lost that was running this piece of work and nothing else."""
        self._emit: Callable[[ExecutorEvent], None] = lambda _: None

    def start(self, emit: Callable[[ExecutorEvent], None]) -> None:
        self._emit = emit
        for group in self.groups.values():
            self._come_up(group)
        self._beat()

    def submit(self, group: str, tasks: Sequence[RoleTask]) -> None:
        target = self.groups[group]
        for task in tasks:
            for ref in _refs(task):
                assert ref.key in self.values, f"{task.task_id} reads {ref.key}, which was dropped"
        if not target.is_up:
            return
        for task in tasks:
            if isinstance(task, ChunkTask):
                target.joining.append(task)
            else:
                target.running[task.task_id] = Running(task=task)
                self._later(target, self.decode_s * self.world.jitter(), lambda task=task: self._finish(target, task))
        if target.role == "dit":
            self._begin_step(target)

    def signal(self, group: str, task_id: str, op: Signal) -> None:
        self.groups[group].signals.append((task_id, op))

    def condemn(self, group: str, why: str) -> None:
        self.num_condemned += 1
        self.kill(group, why)

    def recheck(self, timeout_s: float) -> tuple[GoldenCheck, ...]:
        return ()

    def drop(self, refs: Sequence[TensorRef]) -> None:
        for ref in refs:
            assert ref.key in self.values, f"{ref.key} dropped twice"
            del self.values[ref.key]

    def read(self, ref: TensorRef) -> bytes:
        return self.values[ref.key].encode()

    def put(self, name: str, record: bytes) -> TensorRef:
        return self._put(f"{name}#{next(self._put_numbers)}", record.decode())

    def close(self, drain_s: float) -> None:
        for group in self.groups.values():
            group.is_up = False

    def kill(self, name: str, why: str = "killed") -> None:
        """The group dies now; it is seen at once and comes back after `restart_s`."""
        group = self.groups[name]
        tasks = [running.task.task_id for running in group.running.values()] + [task.task_id for task in group.joining]
        if len(tasks) == 1:
            self.lost_alone[tasks[0].rpartition(".")[0]] += 1
        lost = GroupLost(group=name, incarnation=group.incarnation, why=why)
        group.incarnation += 1
        group.is_up = group.is_frozen = group.is_stepping = False
        group.running.clear()
        group.joining.clear()
        group.signals.clear()
        self._emit(lost)
        incarnation = group.incarnation
        self.world.at(self.restart_s, lambda: self._come_up(group) if group.incarnation == incarnation else None)

    def freeze(self, name: str) -> None:
        """The group stands still: no beats, no answers, until it is condemned."""
        self.groups[name].is_frozen = True

    def _come_up(self, group: Group) -> None:
        group.is_up = True
        golden = group.golden if group.role == "dit" else None
        self._emit(
            GroupUp(group=group.name, role=group.role, num_ranks=1, incarnation=group.incarnation, golden=golden)
        )

    def _beat(self) -> None:
        for group in self.groups.values():
            if group.is_up and not group.is_frozen:
                beat = Beat(
                    group=group.name,
                    incarnation=group.incarnation,
                    progress=group.progress,
                    task_ids=tuple(group.running),
                )
                self._emit(beat)
        self.world.at(0.5, self._beat)

    def _later(self, group: Group, delay: float, work: Callable[[], None]) -> None:
        """Runs `work` of a group unless it died; a frozen group's work is done after it thaws, which it never does."""
        incarnation = group.incarnation

        def run() -> None:
            if group.incarnation == incarnation and not group.is_frozen:
                work()

        self.world.at(delay, run)

    def _put(self, key: str, value: str) -> TensorRef:
        assert key not in self.values, f"{key} made twice"
        self.values[key] = value
        return TensorRef(key=key, num_bytes=8)

    def _phase(self, name: str, seconds: float) -> Phase:
        return Phase(name=name, started_s=self.world.now - seconds, ended_s=self.world.now)  # type: ignore[arg-type]

    def _finish(self, group: Group, task: RoleTask) -> None:
        """An encoder or a VAE worker ends a task."""
        if self._is_spoilt(group, task):
            return
        del group.running[task.task_id]
        group.progress += 1
        if isinstance(task, EncodeTask):
            name = task.request.request_id
            self._emit(
                Encoded(
                    task_id=task.task_id,
                    conditioning=self._put(f"{task.task_id}/conditioning", digest("conditioning", name)),
                    generator_state=digest("generator", name).encode(),
                    phases=(self._phase("text_encode", 0.05),),
                )
            )
        elif isinstance(task, DecodeTask):
            latents = self.values.get(task.latents.key, "dropped: its request has ended")
            segment = Segment(
                request_id=task.request_id,
                chunk=task.chunk,
                start_frame=33 * task.chunk,
                num_frames=33,
                init=b"init",
                media=digest("media", latents).encode(),
            )
            phases = (self._phase("decode", self.decode_s),)
            self._emit(Decoded(task_id=task.task_id, segment=segment, latents_digest=latents, phases=phases))

    def _begin_step(self, group: Group) -> None:
        """A step boundary: newcomers join, signals are obeyed, and the next forward begins."""
        if group.is_stepping or not group.is_up:
            return
        for task in group.joining:
            step = 0 if task.parked is None else int(self.values.get(task.parked.key, "parked:0").split(":")[1])
            num_steps = sum(self.world.requests[task.request_id].params.steps_in(task.chunk))
            group.running[task.task_id] = Running(task=task, step=step, num_steps=num_steps)
        group.joining.clear()
        for task_id, op in group.signals:
            running = group.running.pop(task_id, None)
            if running is None:
                continue
            if op == "abort":
                self._emit(Aborted(task_id=task_id))
            else:
                state = self._put(f"{task_id}/parked", f"parked:{running.step}")
                self._emit(Parked(task_id=task_id, state=state))
        group.signals.clear()
        if not group.running:
            return
        group.is_stepping = True
        self.max_pack_seen = max(self.max_pack_seen, len(group.running))
        seconds = self.step_s * len(group.running) ** 0.9 * self.world.jitter()
        members = tuple(group.running)
        self._later(group, seconds, lambda: self._end_step(group, members, seconds))

    def _end_step(self, group: Group, members: tuple[str, ...], seconds: float) -> None:
        group.is_stepping = False
        group.progress += 1
        if self.world.max_tokens is not None and len(members) > 1:
            self._emit(PackLimit(group=group.name, max_tokens=self.world.max_tokens))
        failed = [task_id for task_id in members if self._is_spoilt(group, group.running[task_id].task)]
        if not group.is_up:
            return
        moved = tuple(task_id for task_id in members if task_id not in failed)
        self._emit(StepDone(group=group.name, task_ids=moved, device_ms=1000 * seconds))
        for task_id in moved:
            running = group.running[task_id]
            running.step += 1
            assert isinstance(running.task, ChunkTask)
            self.num_steps_run[running.task.request_id, running.task.chunk] += 1
            if running.step == running.num_steps:
                del group.running[task_id]
                self._end_chunk(running.task)
        self._begin_step(group)

    def _end_chunk(self, task: ChunkTask) -> None:
        trail = tuple(self.values.get(ref.key) for ref in task.trail)
        first = None if task.first is None else self.values.get(task.first.key)
        conditioning = self.values.get(task.conditioning.key)
        state = task.generator_state if task.seed is None else digest("seed", task.seed).encode()
        value = digest(task.request_id, task.chunk, conditioning, trail, first, state)
        self._emit(
            TaskDone(
                task_id=task.task_id,
                latents=self._put(f"{task.task_id}/latents", value),
                generator_state=digest("state", value).encode(),
                phase=self._phase("chunk", 1.0),
            )
        )

    def _is_spoilt(self, group: Group, task: RoleTask) -> bool:
        verdict = self.verdict(task)
        if verdict is None:
            return False
        if verdict == "kill":
            if group.is_up:
                self.kill(group.name, "crashed")
            return True
        del group.running[task.task_id]
        fault = {"nan": "nan", "error": "error", "request": "request"}[verdict]
        code = "invalid_value" if fault == "request" else "generation_failed"
        self._emit(TaskFailed(task_id=task.task_id, fault=fault, code=code, message=verdict))  # type: ignore[arg-type]
        return True


def _refs(task: RoleTask) -> list[TensorRef]:
    if isinstance(task, EncodeTask):
        return [] if task.conditioning is None else [task.conditioning]
    if isinstance(task, DecodeTask):
        return [task.latents]
    return [task.conditioning, *task.trail, *(ref for ref in (task.first, task.parked) if ref is not None)]


class World:
    """A virtual clock, the engine and its machine; afterwards `seen` holds the events of each request."""

    def __init__(
        self,
        *,
        seed: int = 0,
        num_dits: int = 2,
        num_vaes: int = 2,
        num_encoders: int = 1,
        config: EngineConfig | None = None,
    ) -> None:
        self.now = 0.0
        self.random = Random(seed)
        self.requests: dict[str, VideoRequest] = {}
        self.cancelled: set[str] = set()
        self.seen: dict[str, list[Event]] = {}
        self.times: dict[str, list[float]] = {}
        self.first_step_at: dict[str, float] = {}
        self.max_tokens: int | None = None
        self.metrics = Metrics("simulated")
        self.kept: dict[str, list[ChunkRecord]] = {}
        """Of requests with a keeper: the records of the chunks that are committed, latents by their value."""
        self._unkept: defaultdict[str, deque[Event]] = defaultdict(deque)
        self._counts: dict[Role, int] = {"encoder": num_encoders, "dit": num_dits, "vae": num_vaes}
        self._config = config or EngineConfig()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._num_events = 0
        self._num_starts = 0
        self.committing_at = 0.0
        self._turn_is_due = False
        self._start()

    def _start(self) -> None:
        self._num_starts += 1
        self.machine = Machine(self, self._counts)
        self.model = CostModel(ModelShape(), replace(DevicePrior(), floor_s=0.05))
        self.engine = Engine(self.machine, self.model, self._config, self._publish, Recorder(self.metrics))
        self.machine.start(self._emit)
        self._tick()

    def crash(self) -> None:
        """The process of engine and executor ends at once; a new one goes on with what was committed."""
        self._events.clear()
        self._unkept.clear()
        self._turn_is_due = False
        self._start()
        self.run_for(0.01)
        for request_id in self.kept:
            if self.end(request_id) is None and request_id not in self.cancelled:
                request = self.requests[request_id]
                self.engine.take(request, self.now, resume=self._resume_point(request), has_keeper=True)

    def _resume_point(self, request: VideoRequest) -> Resume:
        kept = self.kept[request.request_id]
        following, shown = len(kept), {segment.chunk for segment in self.segments(request.request_id)}
        undecoded = tuple(chunk for chunk in range(following) if chunk not in shown)
        needed = {request.pinned_chunk(following), *undecoded, *range(max(0, following - 3), following)} - {None}
        return Resume(
            next_chunk=following,
            records=tuple(
                replace(
                    kept[chunk],
                    latents=self.machine.put(f"{request.request_id}/{chunk}", kept[chunk].latents.key.encode()),
                )
                for chunk in sorted(chunk for chunk in needed if chunk is not None and chunk < following)
            ),
            generator_state=kept[-1].generator_state if kept else b"",
            undecoded=undecoded,
        )

    def keep(self, request: VideoRequest, *, allowed: int | None = None) -> VideoRequest:
        """Submits a request whose chunks are committed, each a moment after it was made."""
        self.requests[request.request_id] = request
        self.seen[request.request_id], self.times[request.request_id], self.kept[request.request_id] = [], [], []
        self.engine.check(request, self.now)
        self.engine.take(request, self.now, has_keeper=True, allowed=allowed)
        return request

    def _keep_next(self, request_id: str, num_starts: int) -> None:
        """The keeper takes the next event of a request: one after the other, each when the last is durable."""
        waiting = self._unkept[request_id]
        if num_starts != self._num_starts or not waiting or request_id in self.cancelled:
            return
        event = waiting.popleft()
        if isinstance(event, ChunkReady):
            kept = self.kept[request_id]
            assert event.record.chunk == len(kept), "commits are in order"
            value = self.machine.read(event.record.latents).decode()
            kept.append(replace(event.record, latents=TensorRef(key=value)))
        self._see(request_id, event)
        if isinstance(event, ChunkReady):
            self.engine.committed(request_id, event.record.chunk, self.now)
        if waiting:
            self._keep_later(request_id)

    def _keep_later(self, request_id: str) -> None:
        starts, slow_s = self._num_starts, isinstance(self._unkept[request_id][0], ChunkReady) * 0.6
        delay = max(self.random.uniform(0.0, slow_s), self.committing_at - self.now)
        self.at(delay, lambda: self._keep_next(request_id, starts))

    def jitter(self) -> float:
        return self.random.uniform(0.8, 1.2)

    def at(self, delay: float, work: Callable[[], None]) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (self.now + delay, self._num_events, work))

    def submit(self, request: VideoRequest) -> VideoRequest:
        """Raises what the engine raises when it refuses."""
        self.requests[request.request_id] = request
        self.seen[request.request_id] = []
        self.times[request.request_id] = []
        try:
            self.engine.submit(request, self.now)
        except Exception:
            del self.requests[request.request_id], self.seen[request.request_id]
            raise
        return request

    def runs(self) -> list[RequestRun]:
        """The engine's own view of its requests."""
        return self.engine._runs.all

    def cancel(self, request_id: str) -> None:
        self.cancelled.add(request_id)
        self.engine.cancel(request_id, self.now)

    def _is_at_rest(self) -> bool:
        return self.engine.num_requests == 0 and not any(self._unkept.values())

    def run(self, until: Callable[[], bool] | None = None, limit_s: float = 3600.0) -> None:
        """Plays events until `until`, by default until no request is left."""
        done = until if until is not None else self._is_at_rest
        end = self.now + limit_s
        while not done():
            assert self._events, "nothing will ever happen again"
            self.now, _, work = heapq.heappop(self._events)
            assert self.now <= end, f"not done after {limit_s} virtual seconds"
            work()

    def run_for(self, seconds: float) -> None:
        end = self.now + seconds
        self.run(lambda: self._events[0][0] > end)
        self.now = end

    def segments(self, request_id: str) -> list[Segment]:
        return [event.segment for event in self.seen[request_id] if isinstance(event, SegmentReady)]

    def end(self, request_id: str) -> Completed | Failure | None:
        last = self.seen[request_id][-1] if self.seen[request_id] else None
        return last if isinstance(last, Completed | Failure) else None

    def check_history(self) -> None:
        """Every accepted request ended once; its segments are in order, without gap or duplicate, and as expected."""
        for request_id, request in self.requests.items():
            events = self.seen[request_id]
            ends = [event for event in events if isinstance(event, Completed | Failure)]
            assert len(ends) <= 1, f"{request_id} ended twice"
            assert ends or request_id in self.cancelled, f"{request_id} was lost"
            assert not ends or events[-1] is ends[0], f"{request_id} went on after its end"
            segments = self.segments(request_id)
            assert [s.chunk for s in segments] == list(range(len(segments))), f"{request_id}: gap, disorder or double"
            expected = expected_segments(request)
            assert [s.media for s in segments] == expected[: len(segments)], f"{request_id}: other content"
            if ends and isinstance(ends[0], Completed):
                assert len(segments) == request.params.num_chunks

    def check_nothing_is_held(self) -> None:
        """Once all has come to rest no reference is left."""
        self.run_for(30.0)
        assert self.machine.values == {}

    def _publish(self, request_id: str, event: Event) -> None:
        assert request_id not in self.cancelled, f"{request_id} was cancelled"
        if request_id in self.kept:
            self._unkept[request_id].append(event)
            if len(self._unkept[request_id]) == 1:
                self._keep_later(request_id)
        else:
            self._see(request_id, event)

    def _see(self, request_id: str, event: Event) -> None:
        self.seen[request_id].append(event)
        self.times[request_id].append(self.now)
        if isinstance(event, Progress):
            self.first_step_at.setdefault(request_id, self.now)

    def _emit(self, event: ExecutorEvent) -> None:
        """As the event loop has it: answers are handled one by one, and one turn follows those of the same moment."""
        self.at(0.0, lambda: self._handle(event))

    def _handle(self, event: ExecutorEvent) -> None:
        self.engine.handle(event, self.now)
        if not self._turn_is_due:
            self._turn_is_due = True
            self.at(0.0, self._turn)

    def _turn(self) -> None:
        self._turn_is_due = False
        self.engine.turn(self.now)
        wake = self.engine.next_wake(self.now)
        if wake is not None:
            self.at(max(0.0, wake - self.now), lambda: self.engine.turn(self.now))

    def _tick(self) -> None:
        self.engine.tick(self.now, TICK_S)
        self.at(TICK_S, self._tick)
