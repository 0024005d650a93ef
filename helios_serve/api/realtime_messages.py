"""The JSON messages of a session's WebSocket: what clients send, read strictly, and what they are told.

Text in, frozen objects out; events in, dictionaries out. Every refusal names the field as the client wrote it. Knows no
socket and no service.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from helios_serve.api.http_request import strict_json
from helios_serve.api.jobs import Job, JobProgress, JobSegment, Links, video_object
from helios_serve.api.json_body import validated
from helios_serve.api.names import shown
from helios_serve.api.schemas import MAX_SEED, Prompt
from helios_serve.api.session import PromptApplied, PromptQueued, SessionState
from helios_serve.api.sub_segments import WHEN_SENT
from helios_serve.errors import HeliosError, InvalidRequestError
from helios_serve.types import FRAMES_PER_CHUNK, PlayState

PROTOCOL = "helios.v1"
DEFAULT_MAX_AHEAD = 2
MAX_AHEAD = 8
Json = dict[str, Any]
_STATES: dict[PlayState, str] = {
    "running": "generating",
    "paused": "paused",
    "waiting_for_credit": "waiting_for_credit",
}


def _integral(value: object) -> object:
    """3.0, as languages without integers write 3."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


EventId = Annotated[str, Field(min_length=1, max_length=256)]
Seconds = Annotated[float, Field(ge=0)]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Resume(_Message):
    """A session whose connection was lost; `after_segment` is the last one that arrived, -1 for none."""

    id: Annotated[str, Field(min_length=1, max_length=64)]
    after_segment: Annotated[int, Field(ge=-1, le=1_000_000)]


class Start(_Message):
    """`session.start` without the fields of a generation."""

    type: Literal["session.start"]
    protocol: Literal["helios.v1"] | None = None
    format: Literal["m4s"] = "m4s"
    max_ahead_segments: Annotated[int, Field(ge=1, le=MAX_AHEAD)] | None = None
    streaming_buffer_seconds: Seconds | None = None
    sub_chunks: bool = False
    resume: Resume | None = None

    def max_ahead(self, fps: float) -> int | None:
        """Segments that may be made beyond the last acknowledged one: as asked, or as many as the client's buffer
        holds; None for a client that knows no credit and is paced by its socket."""
        if self.max_ahead_segments is not None:
            return self.max_ahead_segments
        if self.protocol is None:
            return None
        if self.streaming_buffer_seconds is None:
            return DEFAULT_MAX_AHEAD
        return max(1, min(MAX_AHEAD, round(self.streaming_buffer_seconds * fps / FRAMES_PER_CHUNK)))


class PromptEvent(_Message):
    """What changes: the prompt. The negative prompt stays."""

    prompt: Prompt
    negative_prompt: None = None


class Interaction(_Message):
    """A new prompt and over how many chunks it takes over; without `event_id` the server makes one."""

    event: PromptEvent
    event_id: EventId | None = None
    transition_chunks: Annotated[int, BeforeValidator(_integral), Field(ge=0, le=1000)] | None = None


class InteractionMessage(_Message):
    type: Literal["session.interaction"]
    interaction: Interaction


class ControlMessage(_Message):
    """`seed` is the new history's, with `reset` only."""

    type: Literal["session.control"]
    action: Literal["pause", "resume", "reset", "stop"]
    event_id: EventId | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None


class AckMessage(_Message):
    """All segments up to this one were consumed."""

    type: Literal["session.ack"]
    segment: Annotated[int, Field(ge=0)]
    buffered_seconds: Seconds | None = None


class PlaybackMessage(_Message):
    """Where the player is: what was played before counts as consumed."""

    type: Literal["session.playback"]
    position_seconds: Seconds


class StopMessage(_Message):
    type: Literal["session.stop"]


class PingMessage(_Message):
    type: Literal["session.ping"]


ClientMessage = InteractionMessage | ControlMessage | AckMessage | PlaybackMessage | StopMessage | PingMessage
_MESSAGES: dict[str, type[ClientMessage]] = {
    "session.interaction": InteractionMessage,
    "session.control": ControlMessage,
    "session.ack": AckMessage,
    "session.playback": PlaybackMessage,
    "session.stop": StopMessage,
    "session.ping": PingMessage,
}


def json_message(text: str) -> Json:
    """Raises InvalidRequestError `malformed_body` unless `text` is a JSON object."""
    try:
        value = strict_json(text.encode())
    except ValueError as error:
        raise _malformed(str(error)) from None
    if not isinstance(value, dict):
        raise _malformed(f"it is {shown(value)}")
    return value


def read_start(message: Json) -> tuple[Start, Json]:
    """The first message of a client, and the fields in it that describe the video.

    Raises: InvalidRequestError.
    """
    if message.get("type") != "session.start":
        raise InvalidRequestError(
            f"type {shown(message.get('type'))}: the first message is session.start", param="type"
        )
    given = {name: value for name, value in message.items() if value is not None}
    start = validated(Start, {name: value for name, value in given.items() if name in Start.model_fields})
    body = {name: value for name, value in given.items() if name not in Start.model_fields}
    if start.resume is not None and body:
        name = next(iter(body))
        message_text = f"{name}: not beside resume; a session keeps what it was started with"
        raise InvalidRequestError(message_text, param=name, code="conflicting_parameters")
    return start, body


def read_message(message: Json) -> ClientMessage:
    """A message behind the first one.

    Raises: InvalidRequestError: an unknown type, an unknown or missing field, a wrong value.
    """
    kind = message.get("type")
    if not isinstance(kind, str) or kind not in _MESSAGES:
        hint = "; the session is started" if kind == "session.start" else ""
        raise InvalidRequestError(f"type {shown(kind)}: must be {', '.join(_MESSAGES)}{hint}", param="type")
    read = validated(_MESSAGES[kind], message)
    if isinstance(read, ControlMessage) and read.seed is not None and read.action != "reset":
        raise InvalidRequestError(f"seed {read.seed}: only with action reset", param="seed")
    return read


def event_id_of(message: Json) -> str | None:
    """The id that the client gave, whatever else is wrong with the message."""
    inner = message.get("interaction")
    given = inner.get("event_id") if isinstance(inner, dict) else message.get("event_id")
    return given if isinstance(given, str) and len(given) <= 256 else None


@dataclass(slots=True)
class PromptTrack:
    """Which prompt changes a chunk shows. One connection's; changes are noted before the chunk where they begin."""

    _changes: list[PromptApplied] = field(default_factory=list)

    def note(self, applied: PromptApplied) -> None:
        """A change that begins ends the transition of the one before where it stands."""
        self._changes = [change for change in self._changes if change.completed_chunk < applied.chunk]
        self._changes.append(applied)

    def ids_in_parts(self, chunk: int, num_parts: int) -> Iterator[dict[str, list[str]]]:
        """`ids_at` for each part of a chunk: changes begin with its first part, and are complete with its last one."""
        ids = self.ids_at(chunk)
        for part in range(num_parts):
            yield {
                "started_event_ids": ids["started_event_ids"] if part == 0 else [],
                "active_event_ids": ids["active_event_ids"],
                "completed_event_ids": ids["completed_event_ids"] if part == num_parts - 1 else [],
            }

    def ids_at(self, chunk: int) -> dict[str, list[str]]:
        """Changes that begin with the chunk, that it belongs to the transition of, and that are complete with it."""
        active = [change for change in self._changes if change.chunk <= chunk <= change.completed_chunk]
        self._changes = [change for change in self._changes if change.completed_chunk > chunk]
        return {
            "started_event_ids": [change.event_id for change in active if change.chunk == chunk],
            "active_event_ids": [change.event_id for change in active],
            "completed_event_ids": [change.event_id for change in active if change.completed_chunk == chunk],
        }


def start_message(job: Job, start: Start, generated_fps: float) -> Json:
    """`video.start`: what the session will make, complete. Lengths are null where it has no end."""
    params = job.request.params
    warnings = [{"param": warning.param, "message": warning.message} for warning in job.warnings]
    if start.sub_chunks:
        warnings.append({"param": "sub_chunks", "message": WHEN_SENT})
    config = {
        "model": job.model,
        "prompt": job.request.prompts[0].prompt,
        "size": f"{params.width}x{params.height}",
        "width": params.width,
        "height": params.height,
        "fps": _plain(params.fps),
        "num_frames": None if job.is_open_ended else job.num_frames,
        "seed": params.seed,
        "steps": list(params.steps),
        "guidance_scale": params.guidance_scale,
        "codec": params.codec,
        "service_class": job.request.service_class,
        "warnings": warnings,
    }
    return {
        "type": "video.start",
        "request_id": job.id,
        "format": start.format,
        "config": {name: value for name, value in config.items() if value is not None},
        "mime_type": job.mime_type,
        "num_chunks": None if job.is_open_ended else job.num_chunks,
        **session_pacing(job, generated_fps),
    }


def session_pacing(job: Job, generated_fps: float) -> dict[str, float]:
    """How a player avoids a stall: seconds to wait after the first segment, or the rate to play at. A session without
    an end cannot wait for all of it, and waits for one segment more."""
    params = job.request.params
    seconds = FRAMES_PER_CHUNK / params.fps
    if not job.is_open_ended:
        lag = FRAMES_PER_CHUNK * (1 / generated_fps - 1 / params.fps)
        seconds = max(0.0, (params.num_chunks - 1) * lag)
    return {
        "recommended_preroll_seconds": round(seconds, 3),
        "recommended_playback_rate": round(min(1.0, generated_fps / params.fps), 3),
    }


def metadata_message(
    video_id: str, segment: JobSegment, num_bytes: int, ids: Mapping[str, list[str]], number: int
) -> Json:
    """`video.chunk_metadata`: what the binary frame behind it holds, of `num_bytes`; `number` of the frame."""
    return {
        "type": "video.chunk_metadata",
        "request_id": video_id,
        "kind": "media",
        "transport_chunk_index": number,
        "generation_chunk_index": segment.index,
        "num_frames": segment.num_frames,
        "byte_length": num_bytes,
        **ids,
        "start_frame": segment.start_frame,
        "pts_seconds": segment.start_frame / segment.fps,
        "duration": segment.num_frames / segment.fps,
        "prompt_weight": segment.prompt_weight,
    }


def queued_message(video_id: str, queued: PromptQueued) -> Json:
    return {
        "type": "session.interaction.queued",
        "request_id": video_id,
        "event_id": queued.event_id,
        "earliest_chunk": queued.earliest_chunk,
    }


def applied_message(video_id: str, applied: PromptApplied) -> Json:
    return {
        "type": "session.interaction.applied",
        "request_id": video_id,
        "event_id": applied.event_id,
        "chunk": applied.chunk,
        "start_frame": applied.start_frame,
    }


def state_message(state: SessionState) -> Json:
    event_id = {} if state.event_id is None else {"event_id": state.event_id}
    return {"type": "session.state", "state": _STATES[state.state], **event_id}


def progress_message(event: JobProgress, playback_rate: float) -> Json | None:
    """`session.state` while the job waits, then `video.progress`; None when there is nothing to tell yet. Steps count
    from 1 and are done."""
    job, cursor = event.job, event.cursor
    if event.phase == "queued":
        wait = {"queue_position": job.queue_position, "eta_seconds": _rounded(job.eta_s)}
        return {"type": "session.state", "state": "queued", **wait}
    place: Json = {"chunk": job.chunks_done, "stage": None, "step": None, "num_steps": None}
    if cursor is not None:
        num_steps = job.request.params.steps_in(cursor.chunk)[cursor.stage]
        place = {"chunk": cursor.chunk, "stage": cursor.stage, "step": cursor.step + 1, "num_steps": num_steps}
    elif event.phase == "denoise":
        return None
    return {
        "type": "video.progress",
        "phase": event.phase,
        "progress": job.progress,
        "num_chunks": None if job.is_open_ended else job.num_chunks,
        **place,
        "eta_seconds": _rounded(job.eta_s),
        "recommended_playback_rate": playback_rate,
    }


def done_message(job: Job, links: Links) -> Json:
    """`session.done`. `stopped`: it ended before the length that it was started with, or had none."""
    return {
        "type": "session.done",
        "request_id": job.id,
        "chunks": job.num_chunks,
        "stopped": was_stopped(job),
        "video": video_object(job, links).model_dump(),
    }


def was_stopped(job: Job) -> bool:
    """Whether an ended job has less than it might have had."""
    return job.num_chunks < job.request.params.num_chunks


def error_message(error: HeliosError, event_id: str | None = None) -> Json:
    """`error`: flat, as this protocol's clients read it."""
    told: Json = {"type": "error", "code": error.code, "message": error.message}
    if event_id is not None:
        told["event_id"] = event_id
    if error.param is not None:
        told["param"] = error.param
    return told


def _malformed(problem: str) -> InvalidRequestError:
    return InvalidRequestError(f"message: not a JSON object: {problem}", code="malformed_body")


def _plain(number: float) -> int | float:
    return int(number) if number.is_integer() else number


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)
