"""One client's connection to one session: messages in, events out, until one of them ends it.

Knows what a client may do wrong and how each end of a session is told; knows no route, no engine and no store.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import assert_never

from starlette.websockets import WebSocket

from helios_serve.api.auth import Caller
from helios_serve.api.jobs import Job, JobEnded, JobProgress, JobSegment, Links
from helios_serve.api.realtime_messages import (
    PROTOCOL,
    AckMessage,
    ClientMessage,
    ControlMessage,
    InteractionMessage,
    Json,
    PingMessage,
    PlaybackMessage,
    PromptTrack,
    Start,
    StopMessage,
    applied_message,
    done_message,
    error_message,
    event_id_of,
    json_message,
    metadata_message,
    progress_message,
    queued_message,
    read_message,
    session_pacing,
    start_message,
    state_message,
    was_stopped,
)
from helios_serve.api.realtime_outbox import Closing, Outbox, send_all
from helios_serve.api.service import VideoService
from helios_serve.api.session import PromptApplied, Session, SessionEvent, SessionState
from helios_serve.api.sub_segments import MAX_PARTS, sub_segments
from helios_serve.errors import BodyTooLargeError, ConflictError, HeliosError, InvalidRequestError
from helios_serve.types import FRAMES_PER_CHUNK, PlayState

logger = logging.getLogger(__name__)

LinksOf = Callable[[Job], Links]
"""Where the bytes of a session's video can be read, as its client reaches this server."""

DONE = Closing(code=1000)
RESTART = Closing(code=1012, reason="the server restarts; resume the session")
SLOW_READER = Closing(code=1012, reason="nothing was read for too long; resume the session")
REPLACED = Closing(code=4400, reason="another connection goes on with this session")
IDLE = Closing(code=4408, reason="the session stood still for too long and has ended")


class ProtocolError(HeliosError):
    """A message that no client of this protocol sends; it ends the connection (HTTP 400)."""

    status, grpc_status, code, retryable = 400, "INVALID_ARGUMENT", "protocol_error", False


@dataclass(frozen=True, slots=True, kw_only=True)
class RealtimeSettings:
    """Bounds of one connection. send_timeout_s: how long a message may wait for the socket. max_buffered_bytes: of
    segments that wait for it. max_start_chars: of the first message, which may hold an image; max_message_chars: of the
    others."""

    start_timeout_s: float = 10.0
    send_timeout_s: float = 30.0
    close_timeout_s: float = 5.0
    max_buffered_bytes: int = 8 << 20
    max_start_chars: int = 32 << 20
    max_message_chars: int = 512 << 10


class Connection:
    """One client's connection to one session, from `video.start` on."""

    def __init__(
        self, service: VideoService, caller: Caller, session: Session, start: Start, settings: RealtimeSettings
    ) -> None:
        self._service = service
        self._caller = caller
        self._session = session
        self._start = start
        self._settings = settings
        self._job = session.job
        self._outbox = Outbox(settings.max_buffered_bytes)
        self._receipts = asyncio.Lock()  # `queued` is told before `applied`
        self._track = PromptTrack()
        self._last_segment = session.first_segment - 1
        self._has_init = False
        self._last_progress: Json = {}
        self._play_state: PlayState = "running"
        self._is_asked_to_stop = False
        self._is_replaced = asyncio.Event()
        self._has_left = asyncio.Event()

    def is_of(self, caller: Caller, video_id: str) -> bool:
        return self._job.id == video_id and self._caller.tenant == caller.tenant

    async def run(self, websocket: WebSocket, links: LinksOf) -> Closing | None:
        """To the end; returns how to close, None when the client has left."""
        fps = self._service.generated_fps(self._job.request.params)
        await self._tell(start_message(self._job, self._start, fps))
        limit_s = self._settings.send_timeout_s
        writer = asyncio.create_task(send_all(websocket, self._outbox, limit_s, SLOW_READER))
        reader = asyncio.create_task(self._read(websocket))
        follower = asyncio.create_task(self._follow(links))
        replaced = asyncio.create_task(self._is_replaced.wait())
        try:
            await asyncio.wait({writer, reader, replaced}, return_when=asyncio.FIRST_COMPLETED)
            if replaced.done():
                return REPLACED
            return writer.result() if writer.done() else None
        finally:
            tasks = (writer, reader, follower, replaced)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def restart(self) -> None:
        await self._outbox.close(RESTART, at_once=True)

    async def replace(self) -> None:
        """Ends it although it may hang in its socket; returns when its session is left."""
        self._is_replaced.set()
        await self._has_left.wait()

    async def leave(self) -> None:
        try:
            await self._session.leave()
        finally:
            self._has_left.set()

    # What the session does.

    async def _follow(self, links: LinksOf) -> None:
        """Tells the session's events; its end, or a failure, closes the connection."""
        try:
            async with aclosing(self._session.events()) as events:
                async for event in events:
                    await self._on(event, links)
            await self._outbox.close(RESTART)
        except HeliosError as error:
            await self._end(error)
        except Exception:
            logger.exception("session %s failed", self._job.id)
            await self._end(_defect())

    async def _on(self, event: SessionEvent, links: LinksOf) -> None:
        match event:
            case JobSegment():
                await self._on_segment(event)
            case JobProgress():
                await self._on_progress(event)
            case PromptApplied():
                self._track.note(event)
                async with self._receipts:
                    await self._tell_ours(applied_message(self._job.id, event))
            case SessionState():
                self._play_state = event.state
                await self._tell_ours(state_message(event))
            case JobEnded():
                await self._on_end(event.job, links)
            case _:
                assert_never(event)

    async def _on_segment(self, segment: JobSegment) -> None:
        parts = sub_segments(segment) if self._start.sub_chunks else [segment]
        first = segment.index * (MAX_PARTS if self._start.sub_chunks else 1)
        self._last_segment = segment.index
        ids_of_parts = self._track.ids_in_parts(segment.index, len(parts))
        for number, (part, ids) in enumerate(zip(parts, ids_of_parts, strict=True), first):
            media = part.media if self._has_init else part.init + part.media
            metadata = metadata_message(self._job.id, part, len(media), ids, number)
            self._has_init = True
            await self._outbox.put(text_of(metadata), media)

    async def _on_progress(self, event: JobProgress) -> None:
        if self._start.protocol != PROTOCOL:
            return
        pacing = session_pacing(event.job, self._service.generated_fps(event.job.request.params))
        message = progress_message(event, pacing["recommended_playback_rate"])
        if message is not None and message != self._last_progress:
            self._last_progress = message
            await self._outbox.offer(text_of(message))

    async def _on_end(self, job: Job, links: LinksOf) -> None:
        """A failure has its error; every other end has `session.done`, also that of a session nobody attended to."""
        if job.error is not None:
            await self._end(job.error)
            return
        await self._tell(done_message(job, links(job)))
        was_idle = was_stopped(job) and self._play_state != "running" and not self._is_asked_to_stop
        await self._outbox.close(IDLE if was_idle else DONE)

    async def _end(self, error: HeliosError) -> None:
        """A restart is told by its code alone: an error would read as the end of the session."""
        closing = closing_of(error)
        if closing is not RESTART:
            await self._tell(error_message(error))
        await self._outbox.close(closing)

    # What the client asks for.

    async def _read(self, websocket: WebSocket) -> None:
        """Obeys messages, one after the other, until the client leaves."""
        while True:
            message = await websocket.receive()
            if message["type"] == "websocket.disconnect":
                return
            if not self._outbox.is_closing:
                await self._answer(message.get("text"))

    async def _answer(self, text: str | None) -> None:
        message: Json = {}
        try:
            message = object_of(text, self._settings.max_message_chars)
            await self._obey(read_message(message))
        except ProtocolError as error:
            await self._end(error)
        except HeliosError as error:
            await self._tell(error_message(error, event_id_of(message)))
        except Exception:
            logger.exception("session %s: a message was not understood", self._job.id)
            await self._end(_defect())

    async def _obey(self, message: ClientMessage) -> None:
        match message:
            case InteractionMessage():
                await self._change_prompt(message)
            case ControlMessage():
                await self._control(message)
            case StopMessage():
                await self._control(ControlMessage(type="session.control", action="stop"))
            case AckMessage():
                self._ack(message.segment)
            case PlaybackMessage():
                frame = message.position_seconds * self._job.request.params.fps + 0.5
                played = min(int(min(frame, 1e9)) // FRAMES_PER_CHUNK - 1, self._last_segment)
                if played >= 0:
                    self._session.ack(played)
            case PingMessage():
                await self._tell({"type": "session.pong"})
            case _:
                assert_never(message)

    async def _change_prompt(self, message: InteractionMessage) -> None:
        asked = message.interaction
        async with self._receipts:
            queued = await self._session.change_prompt(asked.event.prompt, asked.transition_chunks, asked.event_id)
            await self._tell(queued_message(self._job.id, queued))

    async def _control(self, message: ControlMessage) -> None:
        self._is_asked_to_stop = self._is_asked_to_stop or message.action == "stop"
        try:
            await self._session.control(message.action, message.event_id, message.seed)
        except ConflictError:
            # It has ended, which is about to be told; without an id the error would read as the session's own.
            if message.event_id is not None:
                raise

    def _ack(self, segment: int) -> None:
        if segment > self._last_segment:
            message = f"segment {segment}: the last one that was sent is {self._last_segment}"
            raise InvalidRequestError(message, param="segment")
        self._session.ack(segment)

    async def _tell(self, message: Json) -> None:
        await self._outbox.put(text_of(message))

    async def _tell_ours(self, message: Json) -> None:
        """What only clients of our protocol know."""
        if self._start.protocol == PROTOCOL:
            await self._tell(message)


def object_of(text: str | None, max_chars: int) -> Json:
    """A message of a client, None for a binary one.

    Raises: ProtocolError, BodyTooLargeError, InvalidRequestError.
    """
    if text is None:
        raise ProtocolError("a binary message; clients send text messages, each a JSON object")
    if len(text) > max_chars:
        raise BodyTooLargeError(f"message: {len(text)} characters; at most {max_chars}")
    return json_message(text)


def closing_of(error: HeliosError) -> Closing:
    """The code that tells a client what to do next; the reason repeats the error for those that read no messages."""
    if error.code == "draining":
        return RESTART
    if error.code == "session_idle":
        return IDLE
    if error.code == "cancelled":
        return Closing(code=1000, reason=error.message)
    if error.status in (401, 403):
        return Closing(code=1008, reason=error.message)
    if error.status in (429, 503, 507):
        return Closing(code=1013, reason=error.message)
    return Closing(code=4400 if error.status < 500 else 1011, reason=error.message)


def _defect() -> HeliosError:
    return HeliosError("a defect of the server; its log has the cause")


def text_of(message: Json) -> str:
    """A message as it is sent."""
    return json.dumps(message, separators=(",", ":"))
