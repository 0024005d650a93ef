"""Drives an executor by hand: submits tasks, hears events, kills processes. And the same video without an executor."""

from __future__ import annotations

import itertools
import os
import queue
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from helios_serve.model_executor.digest import latents_digest
from helios_serve.model_executor.model import HeliosModel
from helios_serve.model_executor.runner import Runner
from helios_serve.types import (
    Beat,
    ChunkTask,
    Decoded,
    DecodeTask,
    Encoded,
    EncodeTask,
    ExecutorEvent,
    GroupLost,
    GroupUp,
    PromptChange,
    SamplingParams,
    Segment,
    TaskDone,
    TaskFailed,
    TensorRef,
    VideoRequest,
)
from helios_serve.workers.encoder import EncoderWorker
from helios_serve.workers.processes import descendants
from helios_serve.workers.ray_executor import RayExecutor
from helios_serve.workers.vae import VaeWorker

E = TypeVar("E")
WAIT_S = 60.0


def make_request(name: str, *, prompt: str = "a fox", num_frames: int = 99, guidance: float = 1.0) -> VideoRequest:
    params = SamplingParams(
        width=64, height=64, num_frames=num_frames, fps=24, seed=7, steps=(1, 1, 1), guidance_scale=guidance
    )
    return VideoRequest(request_id=name, prompts=(PromptChange(chunk=0, prompt=prompt),), params=params, is_strict=True)


@dataclass(frozen=True)
class Heard:
    """An event, and when it was emitted."""

    at: float
    event: ExecutorEvent


class Driver:
    """An executor, what it emitted, and the tasks of simple requests."""

    def __init__(self, executor: RayExecutor) -> None:
        self.executor = executor
        self.history: list[Heard] = []
        self._queue: queue.SimpleQueue[Heard] = queue.SimpleQueue()
        self._others = descendants(os.getpid())
        executor.start(lambda event: self._queue.put(Heard(time.monotonic(), event)))

    def hear(self, kind: type[E], match: Callable[[E], bool] = lambda _: True, wait_s: float = WAIT_S) -> E:
        """The next event of a kind; those before it are in `history`."""
        deadline = time.monotonic() + patience(wait_s)
        while True:
            self.history.append(self._queue.get(timeout=max(0.0, deadline - time.monotonic())))
            event = self.history[-1].event
            if isinstance(event, kind) and match(event):
                return event

    def hear_for(self, seconds: float) -> list[ExecutorEvent]:
        """Everything within a while."""
        mark, deadline = len(self.history), time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            try:
                self.history.append(self._queue.get(timeout=left))
            except queue.Empty:
                break
        return [heard.event for heard in self.history[mark:]]

    @property
    def golden(self) -> str | None:
        """What the first DiT group said."""
        return next(h.event.golden for h in self.history if isinstance(h.event, GroupUp) and h.event.role == "dit")

    def has_answer(self, task_id: str) -> bool:
        return any(isinstance(h.event, TaskDone | TaskFailed) and h.event.task_id == task_id for h in self.history)

    def heard_at(self, event: object) -> float:
        return next(heard.at for heard in reversed(self.history) if heard.event is event)

    def encode(self, video: VideoRequest) -> Encoded:
        task = encode_task(video)
        self.executor.submit("encoder-0", [task])
        return self.hear(Encoded, lambda event: event.task_id == task.task_id)

    def finish(self, group: str, task: ChunkTask) -> TaskDone:
        self.executor.submit(group, [task])
        return self.hear(TaskDone, lambda event: event.task_id == task.task_id)

    def decode(self, video: VideoRequest, chunk: int, latents: TensorRef) -> Decoded:
        task = decode_task(video, chunk, latents)
        self.executor.submit("vae-0", [task])
        return self.hear(Decoded, lambda event: event.task_id == task.task_id)

    def lost(self, group: str) -> GroupLost:
        return self.hear(GroupLost, lambda event: event.group == group)

    def back(self, lost: GroupLost) -> GroupUp:
        """A lost group in its next incarnation, now or a while ago."""

        def is_back(event: GroupUp) -> bool:
            return (event.group, event.incarnation) == (lost.group, lost.incarnation + 1)

        for heard in self.history:
            if isinstance(heard.event, GroupUp) and is_back(heard.event):
                return heard.event
        return self.hear(GroupUp, is_back)

    def report(self, what: str, since: float, *events: ExecutorEvent) -> None:
        """Prints how long after `since` events came; `pytest -s` shows it."""
        times = ", ".join(f"{type(event).__name__} {self.heard_at(event) - since:.3f} s" for event in events)
        print(f"[{what}] {times}")

    def pids(self) -> list[int]:
        """The processes below this one that began with the executor or later."""
        return [process.pid for process in descendants(os.getpid()) if process not in self._others]

    def kill(self, group: str, rank: int = 0, kind: signal.Signals = signal.SIGKILL) -> int:
        pid = self.executor.processes(group)[rank].pid
        os.kill(pid, kind)
        return pid

    def wait_until_busy(self, group: str, task_id: str) -> None:
        self.hear(Beat, lambda event: event.group == group and task_id in event.task_ids)


_SERIAL = itertools.count()
"""Makes every task id another one."""


def encode_task(video: VideoRequest) -> EncodeTask:
    return EncodeTask(task_id=f"{video.request_id}/encode.{next(_SERIAL)}", request=video)


def chunk_task(
    start: Encoded, chunk: int = 0, trail: tuple[TaskDone, ...] = (), parked: TensorRef | None = None
) -> ChunkTask:
    request_id = start.task_id.split("/")[0]
    return ChunkTask(
        task_id=f"{request_id}/chunk-{chunk}.{next(_SERIAL)}",
        request_id=request_id,
        chunk=chunk,
        conditioning=start.conditioning,
        trail=tuple(done.latents for done in trail[-3:]),
        first=trail[0].latents if trail else None,
        generator_state=trail[-1].generator_state if trail else start.generator_state,
        parked=parked,
        predicted_s=0.1,
    )


def decode_task(video: VideoRequest, chunk: int, latents: TensorRef) -> DecodeTask:
    return DecodeTask(
        task_id=f"{video.request_id}/decode-{chunk}.{next(_SERIAL)}",
        request_id=video.request_id,
        chunk=chunk,
        params=video.params,
        latents=latents,
        is_due=False,
    )


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until_gone(pid: int, wait_s: float) -> float:
    """Seconds until a process is gone."""
    started = time.monotonic()
    while not is_gone(pid):
        assert time.monotonic() - started < wait_s
        time.sleep(0.005)
    return time.monotonic() - started


def patience(seconds: float) -> float:
    """What an idle machine may take, stretched as far as this one is overloaded."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


@dataclass(frozen=True)
class Local:
    """The same video without executor or processes."""

    digests: list[str]
    segments: list[Segment]


def run_locally(model: HeliosModel, video: VideoRequest) -> Local:
    encoded = EncoderWorker(model.text_encoder, model.vae).encode(video)
    runner, vae = Runner(model.transformer, model.rules), VaeWorker(model.vae)
    digests, segments, trail, state = [], [], [], encoded.generator_state
    for chunk in range(video.params.num_chunks):
        history = encoded.conditioning.history.followed_by(tuple(trail[-3:]), trail[0] if trail else None)
        runner.join(encoded.conditioning.chunk_input("local", video.request_id, chunk, history, state))
        while not (result := runner.step()).finished:
            assert not result.failed
        latents, state = result.finished[0].latents, result.finished[0].generator_state
        trail.append(latents)
        digests.append(latents_digest(latents))
        segments.append(vae.run(decode_task(video, chunk, TensorRef(key="unused")), latents).segment)
    return Local(digests=digests, segments=segments)
