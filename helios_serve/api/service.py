"""The verbs of the API over the store and the engine: create, get, list, wait, watch, cancel, delete, content, remix,
extend, sessions. Every verb names its caller; what is another's does not exist for it.

Knows no protocol, no model and no codec: the engine makes segments, the muxer joins them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from helios_serve.api.auth import Caller
from helios_serve.api.convert import ParsedRequest
from helios_serve.api.engine_protocol import Engine
from helios_serve.api.intake import (
    DEFAULT_TTL_S,
    Extension,
    InputExtension,
    InputSegments,
    Intake,
    IntakeConfig,
)
from helios_serve.api.job_runner import JobRunner, RunnerConfig
from helios_serve.api.job_spec import read_spec
from helios_serve.api.job_view import JobViews
from helios_serve.api.jobs import (
    Created,
    Job,
    JobEvent,
    JobSegment,
    Origin,
    Page,
    StoredVideo,
)
from helios_serve.api.limits import Limiter
from helios_serve.api.live_job import LiveJob
from helios_serve.api.session import Hold, Session, SessionConfig, SessionDesk
from helios_serve.api.video_files import Muxer, Pixels, Still, Stills, VideoFiles
from helios_serve.api.watching import JobWatch
from helios_serve.errors import ConflictError, InvalidRequestError
from helios_serve.store import records
from helios_serve.store.connect import Stores
from helios_serve.store.paging import PageRequest
from helios_serve.telemetry import Metrics
from helios_serve.types import ModelInfo, SamplingParams, Segment


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceConfig:
    """ttl_s: how long a video lives after its end, unless its request says otherwise. max_session_frames: the bound of
    an open-ended session for callers without a limit of their own."""

    ttl_s: float = DEFAULT_TTL_S
    max_session_frames: int = 14_400
    session: SessionConfig = field(default_factory=SessionConfig)
    runner: RunnerConfig = field(default_factory=RunnerConfig)


class Attachment:
    """A caller's hold on a job that lives only while somebody waits for it; `keep` lets the job go on alone."""

    def __init__(self) -> None:
        self.is_kept = False

    def keep(self) -> None:
        self.is_kept = True


class VideoService:
    """One object per process; every method runs on its event loop.

    Args:
        input_segments: encodes videos of callers' own that are extended; None refuses these.
    """

    def __init__(
        self,
        *,
        stores: Stores,
        engine: Engine,
        muxer: Muxer,
        stills: Stills,
        model: ModelInfo,
        limiter: Limiter,
        metrics: Metrics,
        config: ServiceConfig,
        input_segments: InputSegments | None = None,
    ) -> None:
        self.model = model
        self.limiter = limiter
        self._stores = stores
        self._metrics = metrics
        self._engine = engine
        self._config = config
        self._runner = JobRunner(stores, engine, self._finish, self._publish, config.runner, metrics)
        self._views = JobViews(stores, self._runner)
        self._watch = JobWatch(self._runner, self._views)
        start_in_s, name = engine.start_in_s, model.name
        taking = IntakeConfig(model=name, ttl_s=config.ttl_s, start_in_s=start_in_s, input_segments=input_segments)
        self._intake = Intake(stores, engine, self._runner, self._views, taking, limiter)
        self._files = VideoFiles(stores, self._views, muxer, stills)
        self._desk = SessionDesk(
            stores=stores, engine=engine, runner=self._runner, watch=self.watch, metrics=metrics, config=config.session
        )
        self._num_attached: dict[str, int] = {}
        self._is_closing = False
        self.on_end: Callable[[], None] = lambda: None
        """Called when a job has ended and its webhook deliveries are written."""

    async def start(self) -> None:
        """Goes on with the jobs that an earlier process left."""
        await self._runner.start()
        for live in self._runner.jobs:
            if live.request.is_interactive:
                self._desk.abandoned(live.tenant, live.id)

    def refuse(self) -> None:
        """Takes no new jobs."""
        self._is_closing = self._intake.is_closed = self._watch.is_closing = True

    async def close(self) -> None:
        """Gives back what runs, as it stands, and ends all waiting; nothing is lost."""
        self.refuse()
        self._desk.close()
        await self._runner.close()

    def is_ready(self) -> bool:
        """Whether a request would be served now."""
        return not self.not_ready_reasons()

    def not_ready_reasons(self) -> list[str]:
        """Why requests would be refused now; empty when they would not."""
        if self._is_closing:
            return ["the server is shutting down"]
        problem = self._runner.store_problem
        return [*self._engine.missing(), *([] if problem is None else [problem])]

    def generated_fps(self, params: SamplingParams) -> float:
        """Frames per second at which such a video would be made alone."""
        return self._engine.generated_fps(params)

    # Making jobs.

    async def create(self, caller: Caller, parsed: ParsedRequest, origin: Origin) -> Created:
        """Accepts a job: when this returns it is durable, and a restart goes on with it.

        Raises: what the caller's limits, the engine's admission or the store refuse it with.
        """
        return self._counted(await self._intake.create(caller, parsed, origin))

    async def remix(self, caller: Caller, video_id: str, prompt: str, origin: Origin) -> Created:
        """A new job with the parameters, the seed and the pictures of an old one, under another prompt.

        Raises: as `create`; NotFoundError; ConflictError when the old one's pictures are gone.
        """
        return self._counted(await self._intake.remix(caller, video_id, prompt, origin))

    async def extend(self, caller: Caller, video_id: str, extension: Extension, origin: Origin) -> Created:
        """A new job that continues a finished one: its latents are the history, its segments are kept as they are.

        Raises: as `create`; NotFoundError; ConflictError when the video is not finished or has expired;
        InvalidRequestError when nothing would be added.
        """
        return self._counted(await self._intake.extend(caller, video_id, extension, origin))

    async def extend_input(self, caller: Caller, extension: InputExtension, origin: Origin) -> Created:
        """A new job that begins with a video of its caller's own and continues it.

        Raises: as `create`; UnsupportedOperationError when this server encodes no such video.
        """
        return self._counted(await self._intake.extend_input(caller, extension, origin))

    def _counted(self, created: Created) -> Created:
        if created.is_replayed:
            self._metrics.idempotent_replay()
        return created

    # Looking at jobs.

    async def get(self, caller: Caller, video_id: str) -> Job:
        """Raises NotFoundError when the caller has no such job."""
        return await self._views.get(caller.tenant, video_id)

    async def list(self, caller: Caller, page: Page) -> tuple[list[Job], bool]:
        """The jobs of a page, and whether more follow.

        Raises: NotFoundError for an unknown `after`.
        """
        request = PageRequest(after=page.after, limit=page.limit, order="desc" if page.newest_first else "asc")
        states = None if page.states is None else [state for name in page.states for state in _ROW_STATES[name]]
        found = await self._stores.jobs.list(caller.tenant, request, states=states)
        return await self._views.of_all(found.items), found.has_more

    async def wait(self, caller: Caller, video_id: str) -> Job:
        """The job when it has ended.

        Raises: NotFoundError, also when it is deleted meanwhile; CapacityError when the server ends first.
        """
        return await self._watch.end(caller.tenant, video_id)

    def watch(
        self, caller: Caller, video_id: str, start: int = 0, *, with_steps: bool = True
    ) -> AsyncGenerator[JobEvent, None]:
        """A job from segment `start` on, to its end; several may watch, and none of them holds the job up. Without
        steps there are only its segments and its end.

        Raises: NotFoundError, also when it is deleted meanwhile; CapacityError when the server ends first.
        """
        return self._watch.events(caller.tenant, video_id, start, with_steps=with_steps)

    def watch_or_pause(
        self, caller: Caller, video_id: str, start: int = 0, *, pause_s: float
    ) -> AsyncGenerator[JobEvent | None, None]:
        """`watch`, and None whenever nothing has happened for `pause_s`."""
        return self._watch.events_or_pauses(caller.tenant, video_id, start, pause_s=pause_s)

    @asynccontextmanager
    async def attach(self, video_id: str) -> AsyncIterator[Attachment]:
        """For callers that a job is made for: when the last of them leaves without `keep`, the job is cancelled; not
        when the server itself ends."""
        attachment = Attachment()
        self._num_attached[video_id] = self._num_attached.get(video_id, 0) + 1
        try:
            yield attachment
        finally:
            self._num_attached[video_id] -= 1
            if self._num_attached[video_id] == 0:
                del self._num_attached[video_id]
                live = self._runner.live(video_id)
                if live is not None and not (attachment.is_kept or live.has_ended or self._is_closing):
                    await asyncio.shield(self._cancel(live.tenant, video_id))

    # Ending jobs.

    async def cancel(self, caller: Caller, video_id: str) -> Job:
        """Ends a job; one that has ended is returned unchanged.

        Raises: NotFoundError.
        """
        await self._cancel(caller.tenant, video_id)
        return await self.get(caller, video_id)

    async def _cancel(self, tenant: str, video_id: str) -> None:
        before = await self._stores.jobs.get(tenant, video_id)
        if before.state not in records.ENDED:
            await self._stores.jobs.cancel(tenant, video_id)
            self._views.forget(tenant, video_id)
            await self._runner.ended(video_id)

    async def delete(self, caller: Caller, video_id: str) -> None:
        """Ends a job if it runs, and forgets it with all that it holds.

        Raises: NotFoundError.
        """
        await self._stores.jobs.delete(caller.tenant, video_id)
        self._views.forget(caller.tenant, video_id)
        await self._runner.ended(video_id)

    # Bytes.

    async def video(self, caller: Caller, video_id: str) -> StoredVideo:
        """The finished video. Raises: NotFoundError, VideoExpiredError, ConflictError when it is not finished."""
        return await self._files.video(caller.tenant, video_id)

    def read(self, video: StoredVideo, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """Bytes `start` to `end` - 1 of a video, in pieces."""
        return self._stores.blobs.stream(video.key, start, end)

    async def still(self, caller: Caller, video_id: str, variant: Still) -> tuple[bytes, str]:
        """A picture of a video, and its media type. The thumbnail is there with the first segment, the others at the
        end.

        Raises: as `video` does.
        """
        return await self._files.still(caller.tenant, video_id, variant)

    async def raw(self, segment: JobSegment, pixels: Pixels) -> JobSegment:
        """A segment with its pictures, decoded, for its media; no init segment belongs to them."""
        return await self._files.raw(segment, pixels)

    def _publish(self, live: LiveJob, segment: Segment, standing: records.Standing) -> None:
        self._views.publish(live, segment, standing)

    async def _finish(self, video_id: str, tenant: str) -> None:
        """The last segment is durable: makes the file, before somebody asks."""
        self.on_end()
        await self._files.video(tenant, video_id)

    # Sessions.

    async def open_session(self, caller: Caller, parsed: ParsedRequest, max_ahead: int | None) -> Session:
        """Begins an interactive job.

        Args:
            max_ahead: segments that may be made beyond the last acknowledged one; None: no credit is wanted.

        Raises: as `create`; TooManySessionsError.
        """
        if max_ahead is not None and not 1 <= max_ahead <= 8:
            raise InvalidRequestError(f"max_ahead_segments {max_ahead}: must be 1 to 8", param="max_ahead_segments")
        request = parsed.request
        params = request.params
        if not parsed.has_length:
            params = replace(params, num_frames=self._session_frames(caller, params.fps))
        request = replace(request, params=params, is_interactive=True, is_open_ended=not parsed.has_length)
        hold = self.limiter.session(caller)
        hold.__enter__()
        try:
            job = await self._intake.begin_session(caller, replace(parsed, request=request), max_ahead)
            return self._session(caller, job, 0, max_ahead, hold)
        except BaseException:
            hold.__exit__(None, None, None)
            raise

    async def resume_session(self, caller: Caller, video_id: str, after_segment: int) -> Session:
        """Goes on with a session whose connection was lost, behind segment `after_segment` (-1 for none).

        Raises: NotFoundError; ConflictError when the job is no session; InvalidRequestError; TooManySessionsError;
        CapacityError when others have been given its place.
        """
        row = await self._stores.jobs.get(caller.tenant, video_id)
        if not row.is_interactive:
            raise ConflictError(f"video {row.id}: not a session; watch it at its events")
        if not -1 <= after_segment <= row.next_chunk:
            raise InvalidRequestError(
                f"after_segment {after_segment}: the session has {row.next_chunk} segments, from 0; -1 for none",
                param="resume.after_segment",
            )
        hold = self.limiter.session(caller)
        hold.__enter__()
        try:
            if row.state not in records.ENDED and self._runner.live(video_id) is None:
                await self._take_over(caller.tenant, video_id)
            job = await self.get(caller, video_id)
            self._engine.reserve(video_id)
            return self._session(caller, job, after_segment + 1, read_spec(row).max_ahead, hold)
        except BaseException:
            hold.__exit__(None, None, None)
            raise

    async def _take_over(self, tenant: str, video_id: str) -> None:
        """Has a session that another replica runs given to this one, after its chunk in flight."""
        await self._stores.jobs.pause(tenant, video_id)
        for _ in range(40):
            row = await self._stores.jobs.get(tenant, video_id)
            if row.owner is None:
                break
            await asyncio.sleep(0.25)
        await self._stores.jobs.resume(tenant, video_id)
        await self._runner.run(video_id)

    def _session(self, caller: Caller, job: Job, first: int, max_ahead: int | None, hold: Hold) -> Session:
        return Session(self._desk, caller, job, first, max_ahead, hold)

    def _session_frames(self, caller: Caller, fps: float) -> int:
        if caller.limits is None:
            return self._config.max_session_frames
        return max(1, min(caller.limits.max_frames_per_job, int(caller.limits.max_session_seconds * fps)))


_ROW_STATES: dict[str, tuple[records.State, ...]] = {
    "queued": ("queued",),
    "in_progress": ("running", "paused"),
    "completed": ("finished",),
    "expired": ("finished",),
    "failed": ("failed",),
    "cancelled": ("cancelled",),
}
