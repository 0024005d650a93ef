"""From jobs and their events to the messages of the proto, none of them above 1 MiB. Knows no call and no service."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from google.protobuf.timestamp_pb2 import Timestamp

from helios_serve.api import schemas
from helios_serve.api.grpc_convert import STATUSES
from helios_serve.api.jobs import Job, JobProgress, JobSegment, error_detail
from helios_serve.api.jobs import Timing as JobTiming
from helios_serve.api.mime import mime_type_of
from helios_serve.api.proto.helios.video.v1 import video_generation_pb2 as pb
from helios_serve.api.realtime_messages import session_pacing
from helios_serve.api.session import PromptApplied, PromptQueued, SessionState
from helios_serve.api.video_files import VideoExpiredError
from helios_serve.errors import HeliosError
from helios_serve.types import PlayState

MAX_MESSAGE_BYTES = 1 << 20
"""Of one message to a client."""

_FRAME_BYTES = 64
"""What a message adds around the data in it, at most."""

_STATES: dict[PlayState, pb.State] = {
    "running": pb.STATE_RUNNING,
    "paused": pb.STATE_PAUSED,
    "waiting_for_credit": pb.STATE_WAITING_FOR_CREDIT,
}
_CODECS = {"h264": pb.CODEC_H264, "vp9": pb.CODEC_VP9, "av1": pb.CODEC_AV1}


def video_message(job: Job, *, url: str = "", num_bytes: int | None = None) -> pb.Video:
    """A job. An open-ended session that runs has no number of chunks and frames yet: 0."""
    params, has_length = job.request.params, not job.is_open_ended
    num_frames = job.num_frames if has_length else 0
    return pb.Video(
        id=job.id,
        model=job.model,
        status=STATUSES[job.state],
        progress=job.progress,
        created_at=_timestamp(job.created_at),
        started_at=_timestamp(job.started_at),
        completed_at=_timestamp(job.completed_at),
        expires_at=_timestamp(job.expires_at),
        prompt=job.request.prompts[0].prompt,
        width=params.width,
        height=params.height,
        fps=params.fps,
        num_frames=num_frames,
        seconds=num_frames / params.fps,
        seed=params.seed,
        approximations=params.approximations,
        num_chunks=job.num_chunks if has_length else 0,
        chunks_done=job.chunks_done,
        queue_position=job.queue_position,
        eta_seconds=job.eta_s,
        url=url if job.state == "completed" else "",
        mime_type=job.mime_type,
        size_bytes=num_bytes,
        error=_error_of(job),
        timing=_timing(job),
        remixed_from_video_id=job.remixed_from,
        extended_from_video_id=job.extended_from,
        user=job.user,
        metadata=job.metadata,
        warnings=[pb.Warning(param=warning.param, message=warning.message) for warning in job.warnings],
    )


def error_message(error: HeliosError) -> pb.Error:
    """An error that does not end the call."""
    detail = error_detail(error)
    return pb.Error(code=detail.code, message=detail.message, param=detail.param, type=detail.type)


def videos_that_fit(videos: Sequence[pb.Video]) -> Sequence[pb.Video]:
    """As many of a page as one message holds, at least one."""
    room = MAX_MESSAGE_BYTES - 1024
    for count, video in enumerate(videos):
        room -= video.ByteSize() + _FRAME_BYTES
        if room < 0:
            return videos[: max(1, count)]
    return videos


def model_message(item: schemas.ModelItem) -> pb.Model:
    """A served model."""
    details = item.helios
    return pb.Model(
        id=item.id,
        created=_timestamp(item.created),
        variant=details.variant,
        tasks=details.tasks,
        frames_per_chunk=details.frames_per_chunk,
        size_multiple=details.size_multiple,
        num_stages=details.num_stages,
        recommended_sizes=details.recommended_sizes,
        max_pixels=details.max_pixels,
        max_frames=details.max_frames,
        default_fps=details.default_fps,
        default_steps=details.default_steps,
        codecs=[_CODECS[codec] for codec in details.codecs],
        approximations=details.approximations,
    )


class Opening:
    """What a viewer is told before anything else, and again when the init segment is there, which is made with the
    first segment. `init_segment`s and data of segments, joined in order, are a valid MP4, unless these are pictures."""

    def __init__(self, *, is_raw: bool = False) -> None:
        self._is_raw = is_raw
        self._init: bytes | None = None

    def due(self, job: Job, generated_fps: float, init: bytes = b"") -> Iterator[pb.Accepted]:
        """At most one message, to be sent before what `init` came with."""
        if self._init is not None and (self._init or not init):
            return
        self._init = init
        pacing = session_pacing(job, generated_fps)
        yield pb.Accepted(
            video=video_message(job),
            mime_type=None if self._is_raw else mime_type_of(init) if init else job.mime_type,
            init_segment=init,
            recommended_preroll_seconds=pacing["recommended_preroll_seconds"],
            recommended_playback_rate=pacing["recommended_playback_rate"],
        )


def progress_message(event: JobProgress) -> pb.Progress:
    """Where a job stands. Steps count from 1 and are done; before the first one there is none."""
    job, cursor = event.job, event.cursor
    place = pb.Progress(chunk=job.chunks_done)
    if cursor is not None:
        num_steps = job.request.params.steps_in(cursor.chunk)[cursor.stage]
        place = pb.Progress(chunk=cursor.chunk, stage=cursor.stage, step=cursor.step + 1, num_steps=num_steps)
    place.MergeFrom(
        pb.Progress(
            percent=job.progress,
            phase=event.phase,
            num_chunks=0 if job.is_open_ended else job.num_chunks,
            queue_position=job.queue_position,
            eta_seconds=job.eta_s,
        )
    )
    return place


def segment_messages(segment: JobSegment) -> Iterator[pb.Segment]:
    """The parts of a segment, as few as fit."""
    head = pb.Segment(
        index=segment.index,
        start_frame=segment.start_frame,
        num_frames=segment.num_frames,
        pts_seconds=segment.start_frame / segment.fps,
        duration_seconds=segment.num_frames / segment.fps,
        is_last=segment.is_last,
        prompt=segment.prompt,
        prompt_weight=segment.prompt_weight,
        generated_ms=segment.generated_ms,
    )
    room = MAX_MESSAGE_BYTES - head.ByteSize() - _FRAME_BYTES
    num_parts = max(1, -(-len(segment.media) // room))
    for part in range(num_parts):
        message = pb.Segment(data=segment.media[part * room : (part + 1) * room], part=part, num_parts=num_parts)
        message.MergeFrom(head)
        yield message


def queued_message(queued: PromptQueued) -> pb.PromptQueued:
    return pb.PromptQueued(event_id=queued.event_id, earliest_chunk=queued.earliest_chunk)


def applied_message(applied: PromptApplied) -> pb.PromptApplied:
    return pb.PromptApplied(event_id=applied.event_id, chunk=applied.chunk, completed_chunk=applied.completed_chunk)


def state_message(state: SessionState) -> pb.StateChanged:
    return pb.StateChanged(event_id=state.event_id, state=_STATES[state.state])


def _error_of(job: Job) -> pb.Error | None:
    if job.error is not None:
        return error_message(job.error)
    if job.state == "expired":
        return error_message(VideoExpiredError(f"video {job.id}: it has expired; its bytes are deleted"))
    return None


def _timing(job: Job) -> pb.Timing:
    timing: JobTiming = job.timing
    return pb.Timing(
        queue_ms=timing.queue_ms,
        encode_ms=timing.encode_ms,
        first_segment_ms=timing.first_segment_ms,
        denoise_ms=timing.denoise_ms,
        decode_ms=timing.decode_ms,
        mux_ms=timing.mux_ms,
        total_ms=timing.total_ms,
        gpu_seconds=round(timing.device_ms / 1000, 3) if timing.device_ms > 0 else None,
        generated_fps=_generated_fps(job),
    )


def _generated_fps(job: Job) -> float | None:
    """Frames per second of a finished job once its turn had come; not of sessions, which wait for people, and not of
    extensions, which made only a part."""
    is_whole = not job.request.is_interactive and job.extended_from is None
    if job.state != "completed" or not is_whole or job.started_at is None or job.completed_at is None:
        return None
    seconds = job.completed_at - job.started_at
    return round(job.num_frames / seconds, 3) if seconds > 0 else None


def _timestamp(seconds: float | None) -> Timestamp | None:
    if seconds is None:
        return None
    stamp = Timestamp()
    stamp.FromMicroseconds(round(seconds * 1e6))
    return stamp
