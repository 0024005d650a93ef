"""Makes what callers see of jobs from rows of the store and from what this process knows of those that it runs. Reads
only."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

from helios_serve.api.job_runner import JobRunner
from helios_serve.api.job_spec import JobSpec, read_spec, with_controls
from helios_serve.api.jobs import Job, JobProgress, JobSegment, State, Timing
from helios_serve.api.live_job import LiveJob, stats_of
from helios_serve.api.mime import mime_type_of
from helios_serve.api.shared_reads import InFlight, Recent, SegmentCache
from helios_serve.errors import CapacityError, ConflictError, GenerationError, HeliosError, NotFoundError
from helios_serve.store import records
from helios_serve.store.connect import Stores
from helios_serve.store.errors import BlobMissingError, DataLossError
from helios_serve.types import FRAMES_PER_CHUNK, Segment, VideoRequest

NUM_KEPT_INITS = 256
MAX_SHARED_BYTES = 64 << 20
"""Of segments that viewers share while their job runs."""
LIVE_AGE_S = 1.0
"""How old an answer of the store about a job that runs here may be, as this process knows its own changes."""
AWAY_AGE_S = 0.1
"""About any other job."""

_STATES: dict[records.State, State] = {
    "queued": "queued",
    "running": "in_progress",
    "paused": "in_progress",
    "finished": "completed",
    "failed": "failed",
    "cancelled": "cancelled",
}


class JobViews:
    """One for each service."""

    def __init__(self, stores: Stores, runner: JobRunner) -> None:
        self._stores = stores
        self._runner = runner
        self._inits: OrderedDict[str, bytes] = OrderedDict()
        self._init_reads: InFlight[str, bytes] = InFlight()
        self._standings: Recent[records.Standing] = Recent()
        self._shown: Recent[JobProgress] = Recent()
        self._reads: InFlight[tuple[str, int], JobSegment] = InFlight()
        self._segments = SegmentCache(MAX_SHARED_BYTES)

    async def get(self, tenant: str, job_id: str) -> Job:
        """Raises NotFoundError."""
        return await self._view(await self._stores.chunks.standing(tenant, job_id))

    async def of(self, row: records.Job) -> Job:
        return (await self.of_all([row]))[0]

    async def of_all(self, rows: Sequence[records.Job]) -> list[Job]:
        return [await self._view(standing) for standing in await self._stores.chunks.standings(rows)]

    # What viewers share.

    async def standing(self, tenant: str, job_id: str) -> records.Standing:
        """How a job stands: for a job that runs here at most a second old in what other processes did to it, and never
        older than what this one did. Raises NotFoundError."""
        live = self._runner.live(job_id)
        return await self._standings.get(
            tenant,
            job_id,
            lambda: self._stores.chunks.standing(tenant, job_id),
            mark=None if live is None else _mark(live),
            max_age_s=AWAY_AGE_S if live is None else LIVE_AGE_S,
        )

    async def get_shared(self, tenant: str, job_id: str) -> Job:
        """Raises NotFoundError."""
        return await self._view(await self.standing(tenant, job_id))

    async def ended(self, standing: records.Standing) -> Job:
        """The job at its end, behind which few ask for its segments."""
        self._segments.forget(standing.job.id)
        return await self._view(standing)

    async def progress(self, standing: records.Standing, step: object) -> JobProgress:
        """Where a job stands, made once for each `step`."""
        row, mark = standing.job, (standing, step)
        made = self._shown.kept(row.tenant, row.id, mark=mark, max_age_s=LIVE_AGE_S)
        if made is None:
            made = await self._progress(standing)
            self._shown.put(row.tenant, row.id, made, mark=mark)
        return made

    async def _progress(self, standing: records.Standing) -> JobProgress:
        job, live = await self._view(standing), self._runner.live(standing.job.id)
        if live is None:
            return JobProgress(job=job, cursor=None, phase="queued" if job.state == "queued" else "denoise")
        return JobProgress(job=job, cursor=live.cursor, phase=live.phase)

    def step(self, standing: records.Standing) -> object:
        """What `progress` tells apart: the same as long as it has nothing new to say."""
        row, live = standing.job, self._runner.live(standing.job.id)
        if live is None:
            return row.state
        position = self._queue_position(live) if row.state == "queued" else None
        return row.state, position, live.cursor, live.phase, live.play_state

    async def published(self, standing: records.Standing, index: int) -> JobSegment:
        """Segment `index`, below `num_published`. Viewers of a job that runs here share one reading of it, all others
        only at the same moment.

        Raises: DataLossError when its bytes are damaged; NotFoundError when the job was deleted just now.
        """
        row, live = standing.job, self._runner.live(standing.job.id)
        segment = None if live is None else self._segments.get(row.id, index)
        if segment is None:
            segment = await self._reads.get((row.id, index), lambda: self._published(row, index))
        is_last = index + 1 == row.num_chunks  # of a session this is known only at its end
        return segment if segment.is_last == is_last else replace(segment, is_last=is_last)

    async def _published(self, row: records.Job, index: int) -> JobSegment:
        chunk = await self._stores.chunks.chunk(row.id, index)
        if chunk is None or chunk.seg_blob is None:
            raise NotFoundError(f"video {row.id}: segment {index} is deleted")
        segment = await self.segment(row, chunk)
        if self._runner.live(row.id) is not None:
            self._segments.add(row.id, segment)
        return segment

    def forget(self, tenant: str, job_id: str) -> None:
        """This process changed the job's row, or no longer runs it: nothing that was read of it counts any more."""
        self._standings.forget(tenant, job_id)
        self._shown.forget(tenant, job_id)
        self._segments.forget(job_id)

    def publish(self, live: LiveJob, segment: Segment, standing: records.Standing) -> None:
        """A segment of a job that runs here is durable: whoever watches is shown both without asking the store."""
        row = standing.job
        self._standings.put(row.tenant, row.id, standing, mark=_mark(live))
        if not live.is_watched:
            return
        made_ms = live.stats.generated_ms
        shown = _shown(live.request, segment.chunk, segment.init, segment.media, segment.num_frames, made_ms)
        self._segments.add(row.id, shown)

    # Bytes.

    async def segment(self, row: records.Job, chunk: records.Chunk) -> JobSegment:
        """A published segment. Raises: as `segments`."""
        return (await self.segments(row, [chunk]))[0]

    async def segments(self, row: records.Job, chunks: Sequence[records.Chunk]) -> list[JobSegment]:
        """Published segments, their bytes read in one go.

        Raises: DataLossError when those of one are damaged.
        """
        request = await self._request(row)
        try:
            media = await self._stores.blobs.get_all([chunk.seg_blob for chunk in chunks if chunk.seg_blob is not None])
            init = await self._init(row)
        except BlobMissingError as error:
            index = next((chunk for chunk in chunks if chunk.seg_blob == error.key), chunks[0]).idx
            await self._stores.leases.lose_data(row.id, f"video {row.id}: segment {index} is damaged")
            raise DataLossError(f"video {row.id}: segment {index} is damaged") from error
        return [
            _shown(request, chunk.idx, init, data, chunk.seg_frames, stats_of(chunk.vae_stats).generated_ms)
            for chunk, data in zip(chunks, media, strict=True)
        ]

    async def _request(self, row: records.Job) -> VideoRequest:
        live = self._runner.live(row.id)
        if live is not None:
            return live.request
        request = read_spec(row).request(row)
        if not row.is_interactive:
            return request
        controls = await self._stores.chunks.controls(row.id)
        return with_controls(request, controls, row.next_chunk)

    async def _init(self, row: records.Job) -> bytes:
        key = row.init_blob
        assert key is not None
        init = self._inits.get(key)
        if init is None:
            init = await self._init_reads.get(key, lambda: self._stores.blobs.get(key))
            self._inits[key] = init
            if len(self._inits) > NUM_KEPT_INITS:
                self._inits.popitem(last=False)
        return init

    async def _view(self, standing: records.Standing) -> Job:
        row, live = standing.job, self._runner.live(standing.job.id)
        spec = read_spec(row) if live is None else live.spec
        request = spec.request(row) if live is None else live.asked
        state: State = "expired" if row.is_expired and row.state == "finished" else _STATES[row.state]
        num_chunks = request.params.num_chunks if row.num_chunks is None else row.num_chunks
        return Job(
            id=row.id,
            model=spec.model,
            state=state,
            request=request,
            warnings=spec.warnings,
            user=spec.user,
            metadata=spec.metadata,
            with_segments=spec.with_segments,
            created_at=row.created_at,
            started_at=row.started_at,
            completed_at=row.ended_at,
            expires_at=row.expires_at,
            chunks_done=standing.num_published,
            progress=_progress(state, standing, num_chunks, live),
            queue_position=self._queue_position(live) if state == "queued" else None,
            eta_s=None if live is None or state != "in_progress" else live.eta_s(time.monotonic()),
            timing=_timing(standing, live),
            error=_error_of(row),
            is_open_ended=row.num_chunks is None,
            num_chunks=num_chunks,
            num_frames=min(request.params.num_output_frames, FRAMES_PER_CHUNK * num_chunks),
            remixed_from=spec.remixed_from,
            extended_from=spec.extended_from,
            mime_type=None if row.init_blob is None or row.is_expired else mime_type_of(await self._init(row)),
            continued_frames=_continued(spec),
        )

    def _queue_position(self, live: LiveJob | None) -> int | None:
        """Jobs of this process that came before and wait too: 0 is next."""
        if live is None:
            return None
        return sum(not other.has_started and other.seq < live.seq for other in self._runner.jobs)


def _continued(spec: JobSpec) -> range | None:
    first = spec.num_left_out
    return range(first, first + FRAMES_PER_CHUNK * spec.num_given) if spec.num_given else None


def _mark(live: LiveJob) -> object:
    """What this process knows of a job beyond the store: an answer of the store under another mark is old."""
    return live.lease.epoch, live.num_published, live.has_started


def _shown(
    request: VideoRequest, index: int, init: bytes, media: bytes, num_frames: int, generated_ms: float | None
) -> JobSegment:
    """A segment for viewers; whether it is the last one `published` says."""
    return JobSegment(
        index=index,
        init=init,
        media=media,
        start_frame=FRAMES_PER_CHUNK * index,
        num_frames=num_frames,
        fps=request.params.fps,
        prompt=request.prompt_at(index),
        prompt_weight=request.prompt_weight(index),
        is_last=False,
        generated_ms=round(generated_ms or 0),
    )


def _progress(state: State, standing: records.Standing, num_chunks: int, live: LiveJob | None) -> int:
    """Percent of the steps that are done; 100 only when the video can be read."""
    if state in ("completed", "expired"):
        return 100
    share = standing.job.next_chunk / max(1, num_chunks)
    num_steps = 0 if live is None else live.total_steps
    if live is not None and num_steps > 0:
        done = live.first_chunk / max(1, num_chunks)
        share = max(share, done + (1 - done) * live.steps_done / num_steps)
    return min(99, int(100 * share))


def _timing(standing: records.Standing, live: LiveJob | None) -> Timing:
    row, last = standing.job, standing.last
    stats = live.stats if live is not None else stats_of(None if last is None else last.vae_stats)
    return Timing(
        queue_ms=None if row.started_at is None else round(1000 * max(0.0, row.started_at - row.created_at)),
        encode_ms=_whole(stats.encode_ms),
        first_segment_ms=None if stats.first_segment_ms is None else round(stats.first_segment_ms),
        denoise_ms=_whole(stats.denoise_ms),
        decode_ms=_whole(stats.decode_ms),
        mux_ms=_whole(stats.mux_ms),
        total_ms=None if row.ended_at is None else round(1000 * max(0.0, row.ended_at - row.created_at)),
        device_ms=stats.device_ms,
    )


def _whole(milliseconds: float) -> int | None:
    return round(milliseconds) if milliseconds > 0 else None


def _error_of(row: records.Job) -> HeliosError | None:
    if row.error_code is None:
        return None
    message, code = row.error or "", row.error_code
    if code == "internal_error":
        return HeliosError(message)
    if code == "cancelled":
        return ConflictError(message, code=code)
    if code in ("worker_lost", "no_worker", "storage_unavailable", "storage_full"):
        return CapacityError(message, code=code)
    if code in ("queue_timeout", "generation_timeout"):
        return _TimedOutError(message, code=code)
    if code in ("invalid_value", "media_invalid", "conflicting_parameters"):
        return _RefusedError(message, code=code)
    return GenerationError(message, code=code)


class _TimedOutError(HeliosError):
    """The job waited or ran too long (HTTP 504)."""

    status, grpc_status, retryable = 504, "DEADLINE_EXCEEDED", False


class _RefusedError(HeliosError):
    """What was asked for turned out to be impossible (HTTP 400)."""

    status, grpc_status, retryable = 400, "INVALID_ARGUMENT", False
