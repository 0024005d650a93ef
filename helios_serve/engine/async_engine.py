"""The engine's loop: events in, plan, submit, route finished chunks. Knows requests and chunks; sees references, never
tensors, and knows nothing of HTTP, stores or devices.

Requests take turns chunk by chunk in the order in which they became ready; up to `max_pack` of them share their
forwards.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from helios_serve.config import EngineConfig
from helios_serve.engine.executor import Executor
from helios_serve.errors import CapacityError
from helios_serve.types import (
    ChunkTask,
    Completed,
    Decoded,
    DecodeTask,
    Encoded,
    Event,
    ExecutorEvent,
    Failure,
    Progress,
    SegmentReady,
    StepDone,
    TaskDone,
    TaskFailed,
    TensorRef,
    VideoRequest,
)

MAX_UNDECODED_CHUNKS = 2
"""Chunks of one request that may wait for the VAE before its next chunk is held back."""


@dataclass(slots=True)
class RequestRun:
    """The mutable state of one accepted request, owned by the engine's loop."""

    request: VideoRequest
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    conditioning: TensorRef | None = None
    continuation: TensorRef | None = None
    next_chunk: int = 0
    num_undecoded: int = 0
    is_running: bool = False

    @property
    def is_runnable(self) -> bool:
        return (
            self.continuation is not None
            and not self.is_running
            and self.next_chunk < self.request.params.num_chunks
            and self.num_undecoded < MAX_UNDECODED_CHUNKS
        )


class AsyncEngine:
    """Serves many requests through one executor. All methods belong to the event loop that called `start`."""

    def __init__(self, executor: Executor, config: EngineConfig) -> None:
        self._executor = executor
        self._config = config
        self._runs: dict[str, RequestRun] = {}
        self._turns: deque[str] = deque()
        self._is_started = False

    async def start(self) -> None:
        """Starts the executor; its events are handled on the running loop."""
        loop = asyncio.get_running_loop()

        def emit(event: ExecutorEvent) -> None:
            loop.call_soon_threadsafe(self._handle, event)

        self._executor.start(emit)
        self._is_started = True

    async def close(self) -> None:
        """Ends all requests with a failure and stops the executor."""
        self._is_started = False
        for request_id in list(self._runs):
            self._fail(request_id, "draining", "the server is shutting down; send the request again")
        await asyncio.to_thread(self._executor.close)

    def is_ready(self) -> bool:
        """Whether requests are taken."""
        return self._is_started

    @property
    def num_requests(self) -> int:
        return len(self._runs)

    async def submit(self, request: VideoRequest) -> AsyncGenerator[Event, None]:
        """The events of a request, ending with Completed or Failure. Closing the iterator cancels the request.

        Raises: CapacityError when the engine is full or stopped.
        """
        if not self._is_started:
            raise CapacityError("the engine is not running", code="no_worker")
        if len(self._runs) >= self._config.max_requests:
            raise CapacityError(f"{len(self._runs)} requests are waiting or running; try again later")
        run = RequestRun(request=request)
        self._runs[request.request_id] = run
        try:
            self._executor.encode(request)
            while True:
                event = await run.events.get()
                yield event
                if isinstance(event, Completed | Failure):
                    return
        finally:
            self._end(request.request_id)

    def _handle(self, event: ExecutorEvent) -> None:
        match event:
            case StepDone():
                self._report_progress(event)
            case Encoded():
                self._on_encoded(event)
            case TaskDone():
                self._on_chunk(event)
            case Decoded():
                self._on_segment(event)
            case TaskFailed():
                self._fail(event.request_id, event.code, event.message)
        self._dispatch()

    def _dispatch(self) -> None:
        """Gives chunks to the DiT group in turn until `max_pack` are running."""
        num_running = sum(run.is_running for run in self._runs.values())
        for request_id in list(self._turns):
            if num_running == self._config.max_pack:
                return
            run = self._runs[request_id]
            if not run.is_runnable:
                continue
            assert run.conditioning is not None
            assert run.continuation is not None
            task = ChunkTask(
                request_id=request_id,
                chunk=run.next_chunk,
                conditioning=run.conditioning,
                continuation=run.continuation,
            )
            run.is_running = True
            num_running += 1
            self._executor.submit(task)

    def _on_encoded(self, event: Encoded) -> None:
        run = self._runs.get(event.request_id)
        if run is None:
            return
        run.conditioning, run.continuation = event.conditioning, event.continuation
        self._turns.append(event.request_id)

    def _report_progress(self, event: StepDone) -> None:
        for request_id, cursor in event.steps:
            run = self._runs.get(request_id)
            if run is not None:
                run.events.put_nowait(Progress(request_id=request_id, cursor=cursor, device_ms=event.device_ms))

    def _on_chunk(self, event: TaskDone) -> None:
        run = self._runs.get(event.request_id)
        if run is None:
            return
        run.continuation = event.continuation
        run.next_chunk = event.chunk + 1
        run.is_running = False
        run.num_undecoded += 1
        self._turns.remove(event.request_id)
        self._turns.append(event.request_id)
        params = run.request.params
        self._executor.decode(
            DecodeTask(request_id=event.request_id, chunk=event.chunk, params=params, latents=event.latents)
        )

    def _on_segment(self, event: Decoded) -> None:
        segment = event.segment
        run = self._runs.get(segment.request_id)
        if run is None:
            return
        run.num_undecoded -= 1
        run.events.put_nowait(SegmentReady(segment=segment))
        if segment.chunk + 1 == run.request.params.num_chunks:
            run.events.put_nowait(Completed(request_id=segment.request_id))

    def _fail(self, request_id: str, code: str, message: str) -> None:
        run = self._runs.get(request_id)
        if run is not None:
            run.events.put_nowait(Failure(request_id=request_id, code=code, message=message))

    def _end(self, request_id: str) -> None:
        del self._runs[request_id]
        if request_id in self._turns:
            self._turns.remove(request_id)
        self._executor.release(request_id)
        self._dispatch()
