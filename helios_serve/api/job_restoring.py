"""Puts a job together again from what is durable of it. Knows blobs and commits; runs nothing."""

from __future__ import annotations

import asyncio
import logging

from helios_serve.api.engine_protocol import Engine
from helios_serve.api.job_keeping import FencedError
from helios_serve.api.job_spec import change_of, with_controls, with_pictures, with_start
from helios_serve.api.live_job import AppliedControl, LiveJob, stats_of
from helios_serve.store.connect import Stores
from helios_serve.store.errors import BlobMissingError, DataLossError
from helios_serve.store.records import Chunk, Job, ResumePoint
from helios_serve.types import ChunkRecord, Resume, VideoRequest

logger = logging.getLogger(__name__)


class JobRestorer:
    """One for each process."""

    def __init__(self, stores: Stores, engine: Engine) -> None:
        self._stores = stores
        self._engine = engine

    async def restored(self, job: Job, live: LiveJob) -> tuple[VideoRequest, Resume]:
        """The request as it has to go on, from what is durable of it."""
        while True:
            point = await self._stores.chunks.resume_point(live.lease)
            if point is None:
                raise FencedError
            try:
                return await self._restored_at(job, live, point)
            except BlobMissingError as error:
                await self._step_back(live, point, error)

    async def _restored_at(self, job: Job, live: LiveJob, point: ResumePoint) -> tuple[VideoRequest, Resume]:
        blobs = self._stores.blobs
        request = live.request
        live.first_chunk, live.num_published = point.next_chunk, point.num_published
        request = with_controls(request, point.controls, point.next_chunk)
        live.applied = [
            AppliedControl(seq=control.seq, event_id=control.event_id or f"event_{control.seq}", change=change)
            for control in point.controls
            if (change := change_of(control, point.next_chunk)) is not None
        ]
        if live.spec.task != "t2v":
            if job.seed_blob is not None and job.seed_rng is not None:
                request = with_start(request, live.spec.task, await blobs.get(job.seed_blob), job.seed_rng)
            elif job.input_blob is not None:
                record = await blobs.get(job.input_blob)
                request = await asyncio.to_thread(with_pictures, request, record)
            else:
                raise DataLossError(f"video {job.id}: its input pictures are gone")
        if point.trail and point.next_chunk > live.spec.num_inherited:
            live.stats = stats_of(point.trail[-1].dit_stats)
        if point.next_chunk == 0:
            return request, Resume(next_chunk=0, records=(), generator_state=b"", is_suspect=job.is_suspect)
        pinned = () if point.pinned is None else (point.pinned,)
        seen = [chunk for chunk in point.trail if chunk.idx >= request.params.start_of(point.next_chunk)]
        needed = {chunk.idx: chunk for chunk in (*point.undecoded, *seen, *pinned)}
        records = tuple([await self._record(job, chunk) for chunk in needed.values()])
        is_given = point.next_chunk == live.spec.num_given
        assert point.rng is not None or is_given
        return request, Resume(
            next_chunk=point.next_chunk,
            records=records,
            generator_state=b"" if point.rng is None else point.rng,
            undecoded=tuple(chunk.idx for chunk in point.undecoded),
            is_suspect=job.is_suspect,
        )

    async def _record(self, job: Job, chunk: Chunk) -> ChunkRecord:
        if chunk.lat_blob is None:
            raise DataLossError(f"video {job.id}: the latents of chunk {chunk.idx} are gone")
        latents = await self._engine.put(f"{job.id}/kept{chunk.idx}", await self._stores.blobs.get(chunk.lat_blob))
        return ChunkRecord(chunk=chunk.idx, latents=latents, generator_state=chunk.rng or b"")

    async def _step_back(self, live: LiveJob, point: ResumePoint, error: BlobMissingError) -> None:
        """Latents are damaged: they are made again if nobody has seen their segment."""
        rows = (*point.undecoded, *point.trail, *(() if point.pinned is None else (point.pinned,)))
        damaged = [row.idx for row in rows if row.lat_blob == error.key]
        if not damaged or not await self._stores.chunks.step_back(live.lease, min(damaged)):
            raise DataLossError(f"video {live.id}: {error}") from error
        logger.warning("job %s goes back to chunk %d: %s", live.id, min(damaged), error)
