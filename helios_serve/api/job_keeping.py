"""Makes durable what the engine made of a job: its start, the latents and the segment of each chunk.

Knows blobs, commits and leases; knows no queue and no caller.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import TypeVar

from helios_serve.api.engine_protocol import Engine
from helios_serve.api.live_job import LiveJob
from helios_serve.errors import CapacityError, HeliosError
from helios_serve.store.connect import Stores
from helios_serve.store.records import BlobRef, LatentsCommit, SegmentCommit, Standing
from helios_serve.telemetry import Metrics
from helios_serve.types import ChunkReady, Prepared, Segment, SegmentReady, TensorRef

logger = logging.getLogger(__name__)

T = TypeVar("T")

Publish = Callable[[LiveJob, Segment, Standing], None]

STORE_RETRY_S = (0.1, 0.3, 1.0, 3.0, 5.0, 5.0, 5.0, 5.0, 5.0)
"""Waits while the store does not answer; then the job is left to whoever claims it next."""


class FencedError(Exception):
    """The job is no longer this process's to run: cancelled, deleted, paused or taken over."""


class JobKeeper:
    """One for each process."""

    def __init__(self, stores: Stores, engine: Engine, publish: Publish, metrics: Metrics) -> None:
        self._stores = stores
        self._engine = engine
        self._publish = publish
        self._metrics = metrics

    async def keep_start(self, event: Prepared, live: LiveJob) -> None:
        """What the encoder made of the pictures. Raises: FencedError."""
        record = await asyncio.to_thread(self._read, event.conditioning)
        blob = await patiently(lambda: self._stores.blobs.put(record))
        state = event.generator_state
        if not await patiently(lambda: self._stores.leases.attach(live.lease, "seed", blob, rng=state)):
            raise FencedError

    async def keep_latents(self, event: ChunkReady, live: LiveJob) -> None:
        """The DiT half of a chunk; the engine may forget it then. Raises: FencedError."""
        chunk = event.record.chunk
        live.stats.denoise_ms += 1000 * event.seconds
        started_s = time.monotonic()
        commit = partial(
            LatentsCommit,
            chunk=chunk,
            rng=event.record.generator_state,
            attempt=event.attempt,
            ctl_seq=live.control_at(chunk),
            pinned_chunk=live.request.pinned_chunk(chunk + 1) if live.request.params.restarts else None,
            stats=live.stats.to_json(),
        )
        keep, latents = self._stores.chunks.keep_latents, event.record.latents
        if not await patiently(
            lambda: keep(live.lease, lambda: self._read(latents), lambda blob: commit(latents=blob))
        ):
            raise FencedError
        self._engine.committed(live.id, chunk)
        self._metrics.phase("store", time.monotonic() - started_s)

    def _read(self, ref: TensorRef) -> bytes:
        try:
            return self._engine.read(ref)
        except KeyError:  # the engine has let go of the request, which its next event says
            raise CapacityError("the engine ended before a chunk was kept", code="draining") from None

    async def _keep_init(self, init: bytes, live: LiveJob) -> BlobRef:
        """Written with the first segment; the others have the same."""
        if live.init is None or live.init[0] != init:
            live.init = (init, await patiently(lambda: self._stores.blobs.put(init)))
        return live.init[1]

    async def keep_segment(self, event: SegmentReady, live: LiveJob) -> None:
        """The VAE half of a chunk, which is shown then. Raises: FencedError."""
        segment, stats, started_s = event.segment, live.stats, time.monotonic()
        stats.decode_ms += 1000 * event.seconds[0]
        stats.mux_ms += 1000 * event.seconds[1]
        init = await self._keep_init(segment.init, live)
        stats.generated_ms = 1000 * max(0.0, time.time() - live.created_at)
        if stats.first_segment_ms is None:
            stats.first_segment_ms = stats.generated_ms
        commit = partial(
            SegmentCommit, chunk=segment.chunk, init=init, num_frames=segment.num_frames, stats=stats.to_json()
        )
        keep = self._stores.chunks.keep_segment
        committed = await patiently(lambda: keep(live.lease, segment.media, lambda blob: commit(segment=blob)))
        if committed is None or not self._stores.leases.may_publish(live.lease, chunk=segment.chunk):
            raise FencedError
        self._metrics.phase("store", time.monotonic() - started_s)
        live.num_published = committed.num_published
        self._publish(live, segment, committed.standing)
        live.changed()


async def patiently(work: Callable[[], Coroutine[None, None, T]]) -> T:
    """The result of a verb of the store, which is tried again while the store does not answer."""
    for wait_s in STORE_RETRY_S:
        try:
            return await work()
        except HeliosError as error:
            if error.code not in ("storage_unavailable", "storage_full"):
                raise
            logger.warning("the store does not take a commit, trying again: %s", error.message)
            await asyncio.sleep(wait_s)
    return await work()
