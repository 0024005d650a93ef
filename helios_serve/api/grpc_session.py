"""`Session`: interactive generation over one call. Messages in, events out, until one of them ends it.

Knows what a client may do wrong and how each end of a session is told; knows no engine and no store.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import assert_never

from helios_serve.api.grpc_boundary import Call, DialogueMethod, undone_if_left
from helios_serve.api.grpc_convert import action_of, check_nothing_beside, named, named_as_in_proto
from helios_serve.api.grpc_messages import (
    Opening,
    applied_message,
    error_message,
    progress_message,
    queued_message,
    segment_messages,
    state_message,
)
from helios_serve.api.grpc_output import Output, output_of
from helios_serve.api.grpc_service import GrpcDesk
from helios_serve.api.intake import draining
from helios_serve.api.jobs import JobEnded, JobProgress, JobSegment
from helios_serve.api.middleware import InternalError
from helios_serve.api.proto.helios.video.v1 import video_generation_pb2 as pb
from helios_serve.api.session import PromptApplied, Session, SessionEvent, SessionState
from helios_serve.errors import ConflictError, HeliosError, InvalidRequestError

logger = logging.getLogger(__name__)

START_S = 10.0
LINGER_S = 1.0
"""How long the end of a call waits for what its client sent before it knew."""

DEFAULT_MAX_AHEAD = 2
MAX_AHEAD = 8
MAX_EVENT_ID_CHARS = 256
MAX_WAITING = 64
MAX_WAITING_BYTES = 8 << 20
"""Messages, and bytes of segments in them, that wait for the client to read."""


class StartTimeoutError(HeliosError):
    """A session was not started in time (HTTP 504)."""

    status, grpc_status, code, retryable = 504, "DEADLINE_EXCEEDED", "session_idle", False


class GrpcSessions:
    """One for each server."""

    def __init__(self, desk: GrpcDesk, *, start_s: float = START_S) -> None:
        self._desk = desk
        self._start_s = start_s
        self._open: set[_Conversation] = set()

    def method(self) -> DialogueMethod:
        """`Session`, with the scope that it wants."""
        return DialogueMethod(scope="realtime", answer=self.session)

    async def session(
        self, requests: AsyncIterator[pb.SessionRequest], call: Call
    ) -> AsyncGenerator[pb.SessionResponse, None]:
        """One call from its first message to its end. A client that leaves can come back with `resume`."""
        start = await self._start(requests)
        with named_as_in_proto("start.spec"):
            session = await self._opened(start, call)
        conversation = _Conversation(self._desk, call, session, output_of(start.spec.output, call.caller))
        self._open.add(conversation)
        try:
            async with aclosing(conversation.run(requests)) as responses:
                async for response in responses:
                    yield response
        finally:
            self._open.discard(conversation)
            await conversation.leave()

    async def _start(self, requests: AsyncIterator[pb.SessionRequest]) -> pb.SessionStart:
        try:
            async with asyncio.timeout(self._start_s):
                first = await anext(requests, None)
        except TimeoutError:
            raise StartTimeoutError(f"start: not sent within {self._start_s:g} seconds") from None
        if first is None or first.WhichOneof("event") != "start":
            given = "nothing" if first is None else first.WhichOneof("event") or "nothing"
            raise InvalidRequestError(
                f"{given}: the first message is start", param="start", code="missing_required_parameter"
            )
        return first.start

    async def _opened(self, start: pb.SessionStart, call: Call) -> Session:
        service = self._desk.service
        if start.HasField("resume"):
            reason = "not beside resume; a session keeps what it was started with"
            check_nothing_beside(start, frozenset({"resume"}), "start.", reason)
            resume = start.resume
            await self._replace(call, resume.id)
            try:
                with named("id", "start.resume.id"):
                    resuming = service.resume_session(call.caller, resume.id, resume.from_segment - 1)
                    return await undone_if_left(resuming, lambda session: session.leave())
            except InvalidRequestError as error:
                problem = error.message.partition(": ")[2]
                raise InvalidRequestError(
                    f"from_segment {resume.from_segment}: {problem}", param="start.resume.from_segment"
                ) from error
        max_ahead = start.max_ahead_segments if start.HasField("max_ahead_segments") else DEFAULT_MAX_AHEAD
        if not 1 <= max_ahead <= MAX_AHEAD:
            message = f"max_ahead_segments {max_ahead}: must be 1 to {MAX_AHEAD}"
            raise InvalidRequestError(message, param="start.max_ahead_segments")
        parsed = await self._desk.parsed_spec(call, start.spec, {}, is_live=True)
        opening = service.open_session(call.caller, parsed, max_ahead)
        return await undone_if_left(opening, lambda session: session.leave())

    async def _replace(self, call: Call, video_id: str) -> None:
        """Ends what is left of a lost connection, which the server may notice much later than the client."""
        for conversation in [*self._open]:
            if conversation.is_of(call, video_id):
                await conversation.replace()


class _Conversation:
    """One call's connection to one session, from `started` on."""

    def __init__(self, desk: GrpcDesk, call: Call, session: Session, output: Output) -> None:
        self._desk = desk
        self._output = output
        self._call = call
        self._session = session
        self._job = session.job
        self._fps = desk.service.generated_fps(session.job.request.params)
        self._opening = Opening(is_raw=output.pixels is not None)
        self._outbox = _Outbox()
        self._receipts = asyncio.Lock()  # prompt_queued is told before prompt_applied
        self._last_segment = session.first_segment - 1
        self._last_progress = pb.Progress()
        self._has_left = asyncio.Event()
        self._is_caught_up = asyncio.Event()  # everything that was sent is acknowledged
        self._is_caught_up.set()

    def is_of(self, call: Call, video_id: str) -> bool:
        return self._job.id == video_id and self._call.caller.tenant == call.caller.tenant

    async def replace(self) -> None:
        """Ends the call although its client may hang; returns when its session is left."""
        self._call.end(ConflictError("another call goes on with this session", code="protocol_error"))
        await self._has_left.wait()

    async def leave(self) -> None:
        try:
            await self._session.leave()
        finally:
            self._has_left.set()

    async def run(self, requests: AsyncIterator[pb.SessionRequest]) -> AsyncGenerator[pb.SessionResponse, None]:
        """What the client is told, to the end of the session. Raises what ends the call otherwise."""
        if self._job.chunks_done <= self._session.first_segment:
            for accepted in self._opening.due(self._job, self._fps):
                yield pb.SessionResponse(started=accepted)
        tasks = (asyncio.create_task(self._follow()), asyncio.create_task(self._read(requests)))
        try:
            while True:
                response = await self._outbox.get()
                if response is None:
                    await self._linger(tasks[1])
                    return
                yield response
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _linger(self, reading: asyncio.Task[None]) -> None:
        """Lets the client hear of the end before the call is over: clients in Python lose what they have not read when
        a call ends while they write, and the last segment is acknowledged just then."""
        catching_up = asyncio.ensure_future(self._is_caught_up.wait())
        try:
            await asyncio.wait({reading, catching_up}, timeout=LINGER_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            catching_up.cancel()

    # What the session does.

    async def _follow(self) -> None:
        """Tells the session's events; its end, or a failure, ends the call."""
        try:
            async with aclosing(self._session.events()) as events:
                async for event in events:
                    await self._on(event)
                    if isinstance(event, JobEnded):
                        self._outbox.close(None)
                        return
            self._outbox.close(draining())
        except HeliosError as error:
            self._outbox.close(error)
        except Exception:
            logger.exception("session %s failed", self._job.id)
            self._outbox.close(_defect())

    async def _on(self, event: SessionEvent) -> None:
        match event:
            case JobSegment():
                self._is_caught_up.clear()
                for fragment in await self._output.fragments(event, self._desk.service.raw):
                    await self._open_with(fragment.init)
                    for part in segment_messages(fragment):
                        await self._outbox.put(pb.SessionResponse(segment=part))
                self._last_segment = event.index
            case JobProgress():
                self._job = event.job
                progress = progress_message(event)
                if progress != self._last_progress:
                    self._last_progress = progress
                    self._outbox.offer(pb.SessionResponse(progress=progress))
            case PromptApplied():
                async with self._receipts:
                    await self._outbox.put(pb.SessionResponse(prompt_applied=applied_message(event)))
            case SessionState():
                await self._outbox.put(pb.SessionResponse(state_changed=state_message(event)))
            case JobEnded():
                self._job = event.job
                await self._open_with(b"")
                await self._outbox.put(pb.SessionResponse(ended=self._desk.video(event.job)))
            case _:
                assert_never(event)

    async def _open_with(self, init: bytes) -> None:
        for accepted in self._opening.due(self._job, self._fps, init):
            await self._outbox.put(pb.SessionResponse(started=accepted))

    # What the client asks for.

    async def _read(self, requests: AsyncIterator[pb.SessionRequest]) -> None:
        """Obeys messages, one after the other, until the client sends no more."""
        try:
            async for request in requests:
                await self._answer(request)
        except HeliosError as error:
            self._outbox.close(error)
        except Exception:
            logger.exception("session %s: a message was not understood", self._job.id)
            self._outbox.close(_defect())

    async def _answer(self, request: pb.SessionRequest) -> None:
        event_id = request.event_id[:MAX_EVENT_ID_CHARS]
        try:
            if len(request.event_id) > MAX_EVENT_ID_CHARS:
                raise InvalidRequestError(f"event_id: at most {MAX_EVENT_ID_CHARS} characters", param="event_id")
            await self._obey(request)
        except HeliosError as error:
            rejected = pb.Rejected(event_id=event_id, error=error_message(error))
            await self._outbox.put(pb.SessionResponse(rejected=rejected))

    async def _obey(self, request: pb.SessionRequest) -> None:
        match request.WhichOneof("event"):
            case "prompt":
                await self._change_prompt(request)
            case "control":
                await self._control(request)
            case "ack":
                self._ack(request.ack.segment)
            case "start":
                message = "start: the session is started; send prompt, control or ack"
                raise InvalidRequestError(message, param="start")
            case _:
                message = "event: none of prompt, control, ack is set"
                raise InvalidRequestError(message, param="event", code="missing_required_parameter")

    async def _change_prompt(self, request: pb.SessionRequest) -> None:
        asked = request.prompt
        transition = asked.transition_chunks if asked.HasField("transition_chunks") else None
        async with self._receipts:
            try:
                queued = await self._session.change_prompt(asked.prompt, transition, request.event_id or None)
            except HeliosError as error:
                if error.param is not None:
                    error.param = f"prompt.{error.param}"
                raise
            await self._outbox.put(pb.SessionResponse(prompt_queued=queued_message(queued)))

    async def _control(self, request: pb.SessionRequest) -> None:
        control = request.control
        seed = control.seed if control.HasField("seed") else None
        try:
            await self._session.control(action_of(control.action), request.event_id or None, seed)
        except ConflictError:
            # It has ended, which is about to be told; without an id the error would read as the session's own.
            if request.event_id:
                raise

    def _ack(self, segment: int) -> None:
        if not 0 <= segment <= self._last_segment:
            message = f"segment {segment}: the last one that was sent is {self._last_segment}"
            raise InvalidRequestError(message, param="ack.segment")
        self._session.ack(segment)
        if segment == self._last_segment:
            self._is_caught_up.set()


class _Outbox:
    """Messages that wait to be written, in order and bounded. Filled by two tasks, emptied by one."""

    def __init__(self) -> None:
        self._messages: deque[pb.SessionResponse] = deque()
        self._num_bytes = 0
        self._changed = asyncio.Event()
        self._is_closed = False
        self._error: HeliosError | None = None

    async def put(self, message: pb.SessionResponse) -> None:
        """Waits while it is full. After `close` messages are dropped."""
        size = len(message.segment.data)
        while not (self._is_closed or self._has_room(size)):
            await self._changed.wait()
        self._add(message)

    def offer(self, message: pb.SessionResponse) -> None:
        """For what is soon out of date: dropped while others wait."""
        if len(self._messages) < MAX_WAITING // 4:
            self._add(message)

    def close(self, error: HeliosError | None) -> None:
        """Ends it behind what waits, with `error` if there is one. The first call counts."""
        if not self._is_closed:
            self._is_closed, self._error = True, error
            self._wake()

    async def get(self) -> pb.SessionResponse | None:
        """The next message; None at the end. Raises the error that it was closed with."""
        while not self._messages:
            if self._error is not None:
                raise self._error
            if self._is_closed:
                return None
            await self._changed.wait()
        message = self._messages.popleft()
        self._num_bytes -= len(message.segment.data)
        self._wake()
        return message

    def _has_room(self, size: int) -> bool:
        if len(self._messages) >= MAX_WAITING:
            return False
        return size == 0 or self._num_bytes == 0 or self._num_bytes + size <= MAX_WAITING_BYTES

    def _add(self, message: pb.SessionResponse) -> None:
        if not self._is_closed:
            self._messages.append(message)
            self._num_bytes += len(message.segment.data)
            self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _defect() -> HeliosError:
    return InternalError("a defect of the server; its log has the cause under this call's id")
