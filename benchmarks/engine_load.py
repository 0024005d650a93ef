"""Loads for the engine alone, and what one step of them costs it.

Two ways: its decisions, called by hand under a virtual clock; and the whole of it on a real event loop over an executor
that takes no time, against the same executor without an engine. Knows requests and steps; knows no API.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

from benchmarks import paired
from benchmarks.instant_executor import Canned, InstantExecutor
from helios_serve.config import EngineConfig
from helios_serve.engine.async_engine import AsyncEngine
from helios_serve.engine.step_cost import CostModel, DevicePrior, ModelShape
from helios_serve.telemetry import Metrics
from helios_serve.types import (
    FRAMES_PER_CHUNK,
    ChunkReady,
    ChunkTask,
    Completed,
    Decoded,
    DecodeTask,
    Encoded,
    EncodeTask,
    ExecutorEvent,
    Failure,
    PromptChange,
    Resume,
    SamplingParams,
    StepDone,
    TaskDone,
    TensorRef,
    VideoRequest,
)
from tests.engine.simulation import World

STEPS = (2, 2, 2)
NUM_CHUNKS = 6
PACKED = EngineConfig(batching="always", max_pack=8, max_queue_wait_s=1e9)
_WINDOW_STEPS = 400
_ENTRIES = ("handle", "turn", "next_wake", "committed")
"""What an event loop calls the engine by because of steps; `tick` comes with the clock."""


def request(number: int, num_chunks: int = NUM_CHUNKS) -> VideoRequest:
    """Offline, of one of eight tenants."""
    params = SamplingParams(
        width=640,
        height=384,
        num_frames=FRAMES_PER_CHUNK * num_chunks,
        fps=24,
        seed=number,
        steps=STEPS,
        guidance_scale=1.0,
    )
    prompts = (PromptChange(chunk=0, prompt=f"prompt {number}"),)
    return VideoRequest(request_id=f"r{number}", prompts=prompts, params=params, tenant=f"t{number % 8}")


def decisions_s(num_requests: int, num_groups: int) -> float:
    """CPU seconds of one step in the engine's own methods, without what reading the clock takes."""
    meter = _Meter()
    num_steps = _window(num_requests, num_groups, meter.around, _WINDOW_STEPS)
    return (meter.seconds - meter.num_calls * _clock_s()) / num_steps


def decision_bytecodes(num_requests: int, num_groups: int, num_steps: int = 100) -> int:
    """Instructions of the interpreter that one step takes in the engine's own methods; within 0.1 % at each run."""
    counter = _Bytecodes()
    counted = _window(num_requests, num_groups, counter.around, num_steps)
    return round(counter.count / counted)


Around = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Wraps a method of the engine."""


def _window(num_requests: int, num_groups: int, around: Around, num_steps: int) -> int:
    """Runs that many requests until all are under way, then some steps with the engine's methods wrapped; how many."""
    world = World(num_dits=num_groups, num_vaes=2 * num_groups, config=PACKED)
    world.run_for(0.01)
    for number in range(num_requests):
        world.keep(request(number, num_chunks=100))
    world.run_for(20.0)
    assert world.engine.num_requests == num_requests
    for name in _ENTRIES:
        setattr(world.engine, name, around(getattr(world.engine, name)))
    before = _steps_of(world)
    world.run(lambda: _steps_of(world) >= before + num_steps)
    assert world.engine.num_requests == num_requests
    return _steps_of(world) - before


def _steps_of(world: World) -> int:
    return sum(group.progress for group in world.machine.groups.values() if group.role == "dit")


@dataclass(slots=True)
class _Meter:
    """Adds up the calling thread's time in what it wraps."""

    seconds: float = 0.0
    num_calls: int = 0

    def around(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def metered(*arguments: Any, **named: Any) -> Any:
            began = time.thread_time()
            try:
                return method(*arguments, **named)
            finally:
                self.seconds += time.thread_time() - began
                self.num_calls += 1

        return metered


def _clock_s() -> float:
    """What a meter adds to a call: seconds between two readings of the clock."""
    meter = _Meter()
    empty = meter.around(lambda: None)
    for _ in range(2000):
        empty()
    return meter.seconds / meter.num_calls


@dataclass(slots=True)
class _Bytecodes:
    """Counts instructions of the interpreter in what it wraps, and in all that is called there."""

    count: int = 0

    def around(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            sys.settrace(self._enter)
            try:
                return method(*arguments, **named)
            finally:
                sys.settrace(None)

        return counted

    def _enter(self, frame: FrameType, event: str, arg: object) -> Any:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._count

    def _count(self, frame: FrameType, event: str, arg: object) -> Any:
        self.count += event == "opcode"
        return self._count


def whole_s(num_requests: int, num_groups: int) -> float:
    """CPU seconds of one step with the engine on an event loop, less those of the same tasks handed out by hand."""
    served, num_served = _cpu_of(lambda executor: _serve(executor, num_requests), num_groups)
    by_hand, num_by_hand = _cpu_of(lambda executor: _hand_out(executor, num_requests, num_groups), num_groups)
    return served / num_served - by_hand / num_by_hand


def _cpu_of(run: Callable[[InstantExecutor], Any], num_groups: int) -> tuple[float, int]:
    """CPU seconds of a run, and the steps that it took."""
    executor = InstantExecutor(Canned(num_steps=sum(STEPS)), num_dits=num_groups, num_vaes=num_groups)
    seconds = paired.thread_cpu_s(lambda: asyncio.run(run(executor)))
    return seconds, executor.num_steps


async def _serve(executor: InstantExecutor, num_requests: int) -> None:
    prior = replace(DevicePrior(), flops_per_s=1e18, floor_s=1e-4, decode_s=1e-3)
    engine = AsyncEngine(executor, CostModel(ModelShape(), prior), PACKED, Metrics("instant"))
    await engine.start()
    await engine.wait_ready()
    await asyncio.gather(*(_keep(engine, request(number)) for number in range(num_requests)))
    await engine.close(at_once=True)


async def _keep(engine: AsyncEngine, video: VideoRequest) -> None:
    """One request and its keeper, which commits each chunk at once."""
    start, last = Resume(next_chunk=0, records=(), generator_state=b""), None
    async for event in engine.run(video, resume=start, has_keeper=True):
        last = event
        if isinstance(event, ChunkReady):
            engine.committed(video.request_id, event.record.chunk)
    assert isinstance(last, Completed), f"{video.request_id} ended with {last}"
    assert not isinstance(last, Failure)


async def _hand_out(executor: InstantExecutor, num_requests: int, num_groups: int) -> None:
    """Encodes, runs and decodes the same chunks, in order, packs as full as the engine may fill them."""
    by_hand = _ByHand(executor, num_requests, num_groups)
    loop = asyncio.get_running_loop()

    def emit(event: ExecutorEvent) -> None:
        loop.call_soon_threadsafe(by_hand.take, event)

    executor.start(emit)
    by_hand.begin()
    await by_hand.ended


class _ByHand:
    """Chunks wait in one line; each group gets the next when one of its own has ended."""

    def __init__(self, executor: InstantExecutor, num_requests: int, num_groups: int) -> None:
        self.ended = asyncio.get_running_loop().create_future()
        self._executor = executor
        self._requests = [request(number) for number in range(num_requests)]
        self._left = num_requests * NUM_CHUNKS
        self._free = [f"dit-{index}" for index in range(num_groups) for _ in range(PACKED.max_pack)]
        self._waiting: deque[tuple[int, int]] = deque()
        self._group_of: dict[str, str] = {}
        self._vaes = itertools.cycle(f"vae-{index}" for index in range(num_groups))

    def begin(self) -> None:
        for number, video in enumerate(self._requests):
            self._executor.submit("encoder-0", [EncodeTask(task_id=f"{number}.e", request=video)])

    def take(self, event: ExecutorEvent) -> None:
        if isinstance(event, Encoded):
            self._waiting.append((int(event.task_id.partition(".")[0]), 0))
            self._fill()
        elif isinstance(event, TaskDone):
            self._chunk_done(event)
        elif isinstance(event, Decoded):
            self._left -= 1
            if self._left == 0:
                self.ended.set_result(None)
        else:
            assert not isinstance(event, StepDone) or event.task_ids

    def _chunk_done(self, event: TaskDone) -> None:
        number, chunk = (int(part) for part in event.task_id.split("."))
        self._free.append(self._group_of.pop(event.task_id))
        video = self._requests[number]
        decode = DecodeTask(
            task_id=f"{event.task_id}.d",
            request_id=video.request_id,
            chunk=chunk,
            params=video.params,
            latents=event.latents,
            is_due=False,
        )
        self._executor.submit(next(self._vaes), [decode])
        if chunk + 1 < NUM_CHUNKS:
            self._waiting.append((number, chunk + 1))
        self._fill()

    def _fill(self) -> None:
        while self._free and self._waiting:
            group, (number, chunk) = self._free.pop(), self._waiting.popleft()
            task = ChunkTask(
                task_id=f"{number}.{chunk}",
                request_id=f"r{number}",
                chunk=chunk,
                conditioning=TensorRef(key="conditioning"),
                trail=(),
                first=None,
                generator_state=b"",
                parked=None,
                predicted_s=1.0,
            )
            self._group_of[task.task_id] = group
            self._executor.submit(group, [task])
