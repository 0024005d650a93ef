"""The engine on an event loop: submissions become async iterators, the executor's answers and a timer drive the turns.

Knows asyncio and the clock; decides nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from contextvars import Context

from helios_serve.config import EngineConfig
from helios_serve.engine.engine import Engine
from helios_serve.engine.executor import Executor
from helios_serve.engine.recorder import Recorder
from helios_serve.engine.step_cost import CostModel
from helios_serve.errors import CapacityError
from helios_serve.telemetry import Metrics
from helios_serve.tracing import Tracing
from helios_serve.types import (
    Beat,
    Completed,
    Event,
    ExecutorEvent,
    Failure,
    Resume,
    SamplingParams,
    TensorRef,
    VideoRequest,
)

logger = logging.getLogger(__name__)

TICK_S = 0.25
"""How often the groups are judged."""


class AsyncEngine:
    """Serves many requests through one executor. All methods belong to the event loop that called `start`."""

    def __init__(
        self,
        executor: Executor,
        model: CostModel,
        config: EngineConfig,
        metrics: Metrics,
        tracing: Tracing | None = None,
    ) -> None:
        self._executor = executor
        self._config = config
        self._engine = Engine(executor, model, config, self._publish, Recorder(metrics, tracing))
        self._queues: dict[str, asyncio.Queue[Event]] = {}
        self._changed = asyncio.Event()
        self._turn_is_due = False
        self._wake: asyncio.TimerHandle | None = None
        self._ticking: asyncio.Task[None] | None = None
        self._ticked_at = 0.0

    async def start(self) -> None:
        """Starts the executor; its groups come up one by one."""
        loop = asyncio.get_running_loop()

        def emit(event: ExecutorEvent) -> None:
            loop.call_soon_threadsafe(self._handle, event)

        self._executor.start(emit)
        self._ticked_at = time.monotonic()
        self._ticking = asyncio.create_task(self._tick())

    async def wait_ready(self) -> None:
        """Returns when every role has a group that takes tasks."""
        while self._engine.missing_roles():
            self._changed.clear()
            await self._changed.wait()

    async def close(self, *, at_once: bool = False) -> None:
        """Lets running chunks end, as far as they do within `drain_s`, ends all requests and stops the executor.

        Args:
            at_once: wait for no chunk, and end the wait of an earlier call.
        """
        started = time.monotonic()
        if self._ticking is None:
            return
        self._engine.drain(started)
        if not at_once:
            await self._drained()
        if self._ticking is None:  # another call was faster
            return
        self._engine.fail_all("draining", "the server is shutting down; send the request again", time.monotonic())
        self._ticking.cancel()
        self._ticking = None
        if self._wake is not None:
            self._wake.cancel()
        self._changed.set()
        left_s = 0.0 if at_once else self._config.drain_s - (time.monotonic() - started)
        await asyncio.to_thread(self._executor.close, max(0.5, left_s))

    @property
    def silent_s(self) -> float:
        """Seconds since the engine's own timer ran; it does so every `TICK_S` unless it, or the event loop, is stuck. 0
        while the engine is not to run."""
        return 0.0 if self._ticking is None else time.monotonic() - self._ticked_at

    def is_ready(self) -> bool:
        """Whether requests are taken."""
        return self._ticking is not None and not self._engine.is_draining and not self._engine.missing_roles()

    def missing(self) -> list[str]:
        """Why requests are not taken: roles without a worker, or the shutdown; empty when they are."""
        if self._ticking is None or self._engine.is_draining:
            return ["the server is shutting down" if self._engine.is_draining else "the engine is not running"]
        return [f"no {role} worker is up" for role in self._engine.missing_roles()]

    def generated_fps(self, params: SamplingParams) -> float:
        """Frames per second at which a video with these parameters would be made alone, as far as is known now."""
        return self._engine.generated_fps(params)

    def start_in_s(self, request: VideoRequest) -> float:
        """Seconds until a request would start if it were taken now; 0 for a realtime one, which does not wait."""
        return self._engine.start_in_s(request)

    @property
    def num_requests(self) -> int:
        return self._engine.num_requests

    async def submit(self, request: VideoRequest) -> AsyncGenerator[Event, None]:
        """The events of a request, ending with Completed or Failure. Closing the iterator cancels the request.

        Raises: CapacityError, QuotaError, InvalidRequestError or GenerationError when the request is not admitted.
        """
        self.check(request)
        async with aclosing(self.run(request)) as events:
            async for event in events:
                yield event

    def check(self, request: VideoRequest) -> None:
        """Whether a request would be admitted now.

        Raises: as `submit` does.
        """
        if self._ticking is None:
            raise CapacityError("the engine is not running", code="no_worker", retry_after_s=5.0)
        self._engine.check(request, time.monotonic())

    async def run(
        self,
        request: VideoRequest,
        *,
        resume: Resume | None = None,
        has_keeper: bool = False,
        allowed: int | None = None,
    ) -> AsyncGenerator[Event, None]:
        """The events of a request that was admitted before; else as `submit`.

        Args:
            resume: where it goes on that was begun before; its references are made by `put`, and given away.
            has_keeper: `committed` will be called for every ChunkReady, which is sent then only.
            allowed: chunks that it may start before `allow` says more; None for all.

        Raises: CapacityError when the engine does not run, or is closing.
        """
        if self._ticking is None:
            raise CapacityError("the engine is not running", code="no_worker", retry_after_s=5.0)
        events: asyncio.Queue[Event] = asyncio.Queue()
        self._queues[request.request_id] = events
        try:
            now = time.monotonic()
            self._engine.take(request, now, resume=resume, has_keeper=has_keeper, allowed=allowed)
            self._plan_wake()
            while True:
                event = await events.get()
                yield event
                if isinstance(event, Completed | Failure):
                    return
        finally:
            del self._queues[request.request_id]
            self._engine.cancel(request.request_id, time.monotonic())

    def read(self, ref: TensorRef) -> bytes:
        """The record of latents or of a starting history, to be kept. Blocks: for threads.

        Raises: KeyError when the reference was dropped.
        """
        return self._executor.read(ref)

    async def put(self, name: str, record: bytes) -> TensorRef:
        """Latents from their record.

        Raises: ValueError when it is no such record.
        """
        return await asyncio.to_thread(self._executor.put, name, record)

    def committed(self, request_id: str, chunk: int) -> None:
        """The latents of `chunk` and all before it are kept."""
        has_turned = self._engine.committed(request_id, chunk, time.monotonic())
        self._changed.set()
        if has_turned:
            self._plan_wake()

    def change_prompt(self, request_id: str, prompt: str, transition_chunks: int) -> int:
        """Switches a running request to another prompt; returns the chunk that begins to use it.

        Raises: ConflictError when no chunk is left to be begun.
        """
        result = self._engine.change_prompt(request_id, prompt, transition_chunks, time.monotonic())
        self._plan_wake()
        return result

    def restart(self, request_id: str, seed: int) -> int:
        """Forgets the history of a running request; returns the chunk that begins anew.

        Raises: ConflictError when no chunk is left to be begun.
        """
        result = self._engine.restart(request_id, seed, time.monotonic())
        self._plan_wake()
        return result

    def allow(self, request_id: str, num_chunks: int) -> None:
        """Lets a request start its first `num_chunks` chunks."""
        self._engine.allow(request_id, num_chunks, time.monotonic())
        self._plan_wake()

    def pause(self, request_id: str, is_paused: bool) -> None:
        """Keeps a request from starting chunks, or lets it go on."""
        self._engine.pause(request_id, is_paused, time.monotonic())
        self._plan_wake()

    def release(self, request_id: str) -> None:
        """Gives away what was reserved for a realtime request that stands still."""
        self._engine.release(request_id)

    def reserve(self, request_id: str) -> None:
        """Takes back what `release` gave away.

        Raises: as `check` does, when others have it.
        """
        self._engine.reserve(request_id, time.monotonic())

    def stop(self, request_id: str) -> int:
        """Ends a request after the chunk in flight; returns the number of chunks that it will have."""
        result = self._engine.stop(request_id, time.monotonic())
        self._plan_wake()
        return result

    def _publish(self, request_id: str, event: Event) -> None:
        queue = self._queues.get(request_id)
        if queue is not None:
            queue.put_nowait(event)

    def _handle(self, event: ExecutorEvent) -> None:
        self._engine.handle(event, time.monotonic())
        if isinstance(event, Beat):  # makes nothing possible that was not
            return
        if not self._turn_is_due:
            # Events that are already waiting are all taken in before one turn answers them.
            self._turn_is_due = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        self._turn_is_due = False
        if self._ticking is None:
            return
        self._engine.turn(time.monotonic())
        self._changed.set()
        self._plan_wake()

    def _plan_wake(self) -> None:
        if self._wake is not None:
            self._wake.cancel()
        now = time.monotonic()
        wake = self._engine.next_wake(now)
        if wake is None:
            self._wake = None
            return
        # A context of its own: a turn is not the work of the request that happened to plan it.
        self._wake = asyncio.get_running_loop().call_later(max(0.0, wake - now), self._turn, context=Context())

    async def _drained(self) -> None:
        """Returns when nothing runs any more, after `drain_s`, or when the engine was closed meanwhile."""
        try:
            async with asyncio.timeout(self._config.drain_s):
                while self._ticking is not None and not self._engine.is_drained:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            logger.warning("some chunks did not end within %g s and are given up", self._config.drain_s)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._engine.tick(time.monotonic(), TICK_S)
            self._ticked_at = time.monotonic()
