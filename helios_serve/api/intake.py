"""How a request becomes a durable job: limits, admission, idempotency and the row; and how a job is made from another.

Knows the store and the engine's admission; runs nothing itself.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from helios_serve.api.auth import Caller
from helios_serve.api.convert import ParsedRequest, new_video_id
from helios_serve.api.engine_protocol import Engine
from helios_serve.api.job_runner import JobRunner
from helios_serve.api.job_spec import JobSpec, pictures_record, read_spec, spec_from, spec_hash, with_controls
from helios_serve.api.job_view import JobViews
from helios_serve.api.jobs import Created, Job, Origin
from helios_serve.api.limits import JobAsk, Limiter, Usage, check_job
from helios_serve.errors import (
    CapacityError,
    ConflictError,
    HeliosError,
    InvalidRequestError,
    QuotaError,
    UnsupportedOperationError,
)
from helios_serve.store import records
from helios_serve.store.connect import Stores
from helios_serve.types import FRAMES_PER_CHUNK, Frames, PromptChange, SamplingParams, VideoRequest

DEFAULT_TTL_S = 86_400.0
MAX_ENCODING = 2
"""Videos of callers' own that are encoded at once; each takes a processor core."""
DEFAULT_ADDED_S = 5.5
"""What is added to a video that is extended, in seconds, when nothing is said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Extension:
    """What is to be added to a finished video: frames, under a prompt that takes over where it begins. max_frames: of
    the result."""

    prompt: str
    num_frames: int | None
    seconds: float | None
    max_frames: int
    transition_chunks: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class InputExtension:
    """A video of its caller's own, in `parsed`, of which `num_given` whole chunks begin the video that continues it.

    parsed: the request for the whole video. num_left_out: frames of the input before those chunks. extended_from: the
    job that made the input, if one did.
    """

    parsed: ParsedRequest
    num_given: int
    num_left_out: int
    extended_from: str | None


InputSegments = Callable[[Frames, SamplingParams], tuple[bytes, Sequence[bytes]]]
"""(frames, parameters) -> the init and the media of their last whole chunks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IntakeConfig:
    """model: the served name. ttl_s: how long a video lives after its end, unless its request says otherwise.
    start_in_s: seconds until a request would start if it were taken now; by default nothing waits. input_segments:
    encodes the beginning of a video that continues one of its caller's own; None for a server that takes none."""

    model: str
    ttl_s: float = DEFAULT_TTL_S
    start_in_s: Callable[[VideoRequest], float] = lambda _: 0.0
    input_segments: InputSegments | None = None


class Intake:
    """One for each service. is_closed: nothing new is taken."""

    def __init__(
        self, stores: Stores, engine: Engine, runner: JobRunner, views: JobViews, config: IntakeConfig, limiter: Limiter
    ) -> None:
        self.is_closed = False
        self._stores = stores
        self._engine = engine
        self._runner = runner
        self._views = views
        self._config = config
        self._limiter = limiter
        self._creating = asyncio.Lock()
        self._encoding = asyncio.Semaphore(MAX_ENCODING)

    async def create(self, caller: Caller, parsed: ParsedRequest, origin: Origin) -> Created:
        """Accepts a job: when this returns it is durable, and a restart goes on with it.

        Raises: what the caller's limits, the engine's admission or the store refuse it with.
        """
        spec = spec_from(parsed, self._config.model, _max_running(caller))
        new = await self._new_job(caller, parsed, spec, origin)
        return await self._accept(caller, parsed, new, origin)

    async def remix(self, caller: Caller, video_id: str, prompt: str, origin: Origin) -> Created:
        """A new job with the parameters, the seed and the pictures of an old one, under another prompt.

        Raises: as `create`; NotFoundError; ConflictError when the old one's pictures are gone.
        """
        old = await self._stores.jobs.get(caller.tenant, video_id)
        spec = read_spec(old)
        if spec.num_given and old.state != "finished":
            raise ConflictError(f"video {old.id}: it continues another video, and can be remixed when it is finished")
        if spec.task != "t2v" and (old.seed_blob is None or old.seed_rng is None):
            raise ConflictError(f"video {old.id}: its pictures are not kept any more; send them with a new request")
        spec = replace(
            spec,
            prompts=(PromptChange(chunk=0, prompt=prompt),),
            remixed_from=old.id,
            extended_from=None,
            num_inherited=spec.num_given,
            max_running_jobs=_max_running(caller),
        )
        parsed = _parsed_again(spec, old)
        new = replace(await self._new_job(caller, parsed, spec, origin), seed_blob=old.seed_blob, seed_rng=old.seed_rng)
        if spec.num_given:
            given = records.Source(job_id=old.id, num_chunks=spec.num_given, num_segments=spec.num_given)
            new = replace(new, source=given)
        return await self._accept(caller, parsed, new, origin)

    async def extend(self, caller: Caller, video_id: str, extension: Extension, origin: Origin) -> Created:
        """A new job that continues a finished one: its latents are the history, its segments are kept as they are.

        Raises: as `create`; NotFoundError; ConflictError when the video is not finished or has expired;
        InvalidRequestError when nothing would be added.
        """
        old = await self._stores.jobs.get(caller.tenant, video_id)
        if old.state != "finished" or old.is_expired:
            raise ConflictError(f"video {old.id}: only a finished video that has not expired can be extended")
        spec = read_spec(old)
        if old.is_interactive:
            played = with_controls(spec.request(old), await self._stores.chunks.controls(old.id), old.next_chunk)
            spec = replace(spec, prompts=played.prompts, params=played.params)
        num_frames = spec.params.num_output_frames if not spec.is_open_ended else FRAMES_PER_CHUNK * old.next_chunk
        added = _added_frames(extension, spec.params.fps)
        if num_frames + added > extension.max_frames:
            raise InvalidRequestError(
                f"num_frames: {num_frames} frames and {added} more are {num_frames + added}; at most "
                f"{extension.max_frames} for this key",
                param="num_frames" if extension.seconds is None else "seconds",
            )
        params = replace(spec.params, num_frames=num_frames + added)
        first = old.next_chunk
        prompts = spec.prompts
        if params.num_chunks > first:
            change = PromptChange(chunk=first, prompt=extension.prompt, transition_chunks=extension.transition_chunks)
            prompts = (*(change for change in prompts if change.chunk < first), change)
        spec = replace(
            spec,
            params=params,
            prompts=prompts,
            is_open_ended=False,
            remixed_from=None,
            extended_from=old.id,
            num_inherited=first,
            max_running_jobs=_max_running(caller),
        )
        parsed = _parsed_again(spec, old)
        new = await self._new_job(caller, parsed, spec, origin)
        num_whole = sum(params.frames_in(chunk) == read_spec(old).params.frames_in(chunk) for chunk in range(first))
        source = records.Source(job_id=old.id, num_chunks=first, num_segments=num_whole)
        return await self._accept(caller, parsed, replace(new, source=source), origin)

    async def extend_input(self, caller: Caller, extension: InputExtension, origin: Origin) -> Created:
        """A new job that begins with a video of its caller's own and continues it.

        Raises: as `create`; UnsupportedOperationError when this server encodes no such video.
        """
        parsed, encode = extension.parsed, self._config.input_segments
        request = parsed.request
        assert request.video is not None
        if encode is None:
            raise UnsupportedOperationError("video: only an own finished video can be extended here", param="video")
        spec = replace(
            spec_from(parsed, self._config.model, _max_running(caller)),
            extended_from=extension.extended_from,
            num_inherited=extension.num_given,
            num_given=extension.num_given,
            num_left_out=extension.num_left_out,
        )
        new = await self._new_job(caller, parsed, spec, origin)
        async with self._encoding:
            init, media = await asyncio.to_thread(encode, request.video, request.params)
        put = self._stores.blobs.put
        given = records.Given(init=await put(init), segments=tuple([await put(segment) for segment in media]))
        return await self._accept(caller, parsed, replace(new, given=given), origin)

    async def begin_session(self, caller: Caller, parsed: ParsedRequest, max_ahead: int | None) -> Job:
        """An interactive job; it makes no chunk before a session gives it credit. Raises: as `create`."""
        origin = Origin(route="session")
        spec = replace(spec_from(parsed, self._config.model, None), max_ahead=max_ahead)
        new = await self._new_job(caller, parsed, spec, origin)
        return (await self._accept(caller, parsed, new, origin)).job

    async def _new_job(self, caller: Caller, parsed: ParsedRequest, spec: JobSpec, origin: Origin) -> records.NewJob:
        request = parsed.request
        pictures = await asyncio.to_thread(pictures_record, request)
        ttl_s = self._config.ttl_s if parsed.expires_after_s is None else parsed.expires_after_s
        return records.NewJob(
            id=request.request_id,
            tenant=caller.tenant,
            route=origin.route,
            service_class=request.service_class,
            spec=spec.to_json(),
            spec_hash=await asyncio.to_thread(spec_hash, spec, parsed),
            pinned={},
            num_chunks=None if request.is_open_ended else request.params.num_chunks,
            pinned_chunk=request.pinned_chunk(max(2, request.params.num_chunks)),
            is_interactive=request.is_interactive,
            ttl_s=ttl_s,
            input_blob=None if pictures is None else await self._stores.blobs.put(pictures),
            webhook_url=parsed.webhook_url,
            key_id=caller.key_id,
        )

    async def _accept(self, caller: Caller, parsed: ParsedRequest, new: records.NewJob, origin: Origin) -> Created:
        """Admits and writes a job, and begins to run it. One at a time, so that limits hold."""
        store, key, is_retry = self._stores.jobs, origin.idempotency_key, origin.is_retry
        request = replace(parsed.request, tenant=caller.tenant)
        ask = JobAsk(
            num_frames=request.params.num_output_frames,
            priority=request.priority,
            expires_after=parsed.expires_after_s,
            is_realtime=request.service_class == "realtime",
        )
        async with self._creating:
            found = await store.find(new, idempotency_key=key, is_retry=is_retry)
            if found is not None:
                job = await self._views.of(found)
                return Created(job=job, is_replayed=True, budget=self._limiter.budget(caller))
            if self.is_closed:
                raise draining()
            request, new, ask = self._admitted(caller, parsed, request, new, ask)
            self._check_queue(parsed, request)
            budget = self._limiter.admit_job(caller, ask, await self._usage(caller))
            try:
                created = await store.create(new, idempotency_key=key, is_retry=is_retry)
            except BaseException:
                self._limiter.give_back(caller, ask.num_frames)
                raise
        if created.is_replayed:
            self._limiter.give_back(caller, ask.num_frames)
            budget = self._limiter.budget(caller)
        else:
            await self._runner.run(new.id)
        job = await self._views.get(caller.tenant, created.job.id)
        return Created(job=job, is_replayed=created.is_replayed, budget=budget)

    def _admitted(
        self, caller: Caller, parsed: ParsedRequest, request: VideoRequest, new: records.NewJob, ask: JobAsk
    ) -> tuple[VideoRequest, records.NewJob, JobAsk]:
        """The job as the engine takes it: one that is realtime by default only is offline where that cannot be had."""
        try:
            check_job(caller, ask)
            self._engine.check(request)
            return request, new, ask
        except HeliosError as error:
            if parsed.has_class or request.service_class == "offline" or error.code in ("draining", "no_worker"):
                raise
            reason = error.message
        request, ask = replace(request, service_class="offline"), replace(ask, is_realtime=False)
        check_job(caller, ask)
        self._engine.check(request)
        message = f"made offline, without a promise to keep up with its playback: {reason}"
        warnings = [*new.spec["warnings"], {"param": "service_class", "message": message}]
        return request, replace(new, service_class="offline", spec={**new.spec, "warnings": warnings}), ask

    def _check_queue(self, parsed: ParsedRequest, request: VideoRequest) -> None:
        """Raises QuotaError when the caller would be gone before its video is made, because of what waits before it."""
        if parsed.patience_s is None:
            return
        wait_s = self._config.start_in_s(request)
        run_s = request.params.num_output_frames / self._engine.generated_fps(request.params)
        late_s = wait_s + run_s - parsed.patience_s
        if late_s > 0 and wait_s > 0:
            raise QuotaError(
                f"it would start in about {math.ceil(wait_s)} s and take {math.ceil(run_s)} s, and this client waits "
                f"{parsed.patience_s:.0f} s; try again later, or send Prefer: respond-async",
                code="queue_wait_too_long",
                retry_after_s=max(1.0, late_s),
            )

    async def _usage(self, caller: Caller) -> Usage:
        if caller.limits is None:
            return Usage(num_queued_jobs=0)
        counts = await self._stores.jobs.counts(caller.tenant)
        return Usage(
            num_queued_jobs=counts.get("queued", 0), stored_bytes=await self._stores.jobs.bytes_stored(caller.tenant)
        )


def draining() -> CapacityError:
    """The server ends, and takes nothing new."""
    return CapacityError("the server is shutting down; try again shortly", code="draining", retry_after_s=1.0)


def _max_running(caller: Caller) -> int | None:
    return None if caller.limits is None else caller.limits.max_running_jobs


def _added_frames(extension: Extension, fps: float) -> int:
    if extension.num_frames is not None:
        added, param, given = extension.num_frames, "num_frames", f"{extension.num_frames}"
    else:
        seconds = DEFAULT_ADDED_S if extension.seconds is None else extension.seconds
        added, param, given = round(seconds * fps), "seconds", f"{seconds:g}"
    if added < 1:
        raise InvalidRequestError(f"{param} {given}: must add at least one frame", param=param)
    return added


def _parsed_again(spec: JobSpec, old: records.Job) -> ParsedRequest:
    """A request that is made from an earlier one's, as if it had been sent."""
    request = replace(
        spec.request(old),
        request_id=new_video_id(),
        is_interactive=False,
        is_open_ended=False,
        service_class="offline",
    )
    return ParsedRequest(
        request=request,
        warnings=(),
        response_format="url",
        detach=False,
        stream=False,
        is_async=True,
        with_segments=True,
        has_seed=True,
        has_length=True,
        has_class=True,
        user=spec.user,
        metadata=spec.metadata,
        queue_timeout_s=None,
        webhook_url=None,
        expires_after_s=None,
    )
