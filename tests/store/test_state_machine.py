"""Any sequence of verbs, by clients, owners and owners that lost their jobs, does what a model of ten lines says."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from helios_serve.errors import NotFoundError
from helios_serve.store.chunks import Chunks
from helios_serve.store.connect import StoreConfig, open_stores
from helios_serve.store.ending import JobError
from helios_serve.store.leases import Leases
from helios_serve.store.records import ENDED, RUNNABLE, UNFINISHED, BlobRef, LatentsCommit, Lease, SegmentCommit, State
from tests.store.helpers import new_job

T = TypeVar("T")
JOBS = st.integers(0, 2)
CHUNKS = st.integers(0, 3)
BACK = st.integers(0, 1)


@dataclass
class Model:
    """What a job should look like."""

    id: str
    num_chunks: int | None
    state: State = "queued"
    epoch: int = 0
    owner: str | None = None
    next_chunk: int = 0
    segments: set[int] = field(default_factory=set)
    wants_pause: bool = False
    shown: list[str] = field(default_factory=list)

    @property
    def num_published(self) -> int:
        return next(idx for idx in range(self.next_chunk + 1) if idx not in self.segments)

    def owns(self, lease: Lease) -> bool:
        return lease.epoch == self.epoch and self.state in RUNNABLE

    def end(self, state: State) -> None:
        self.state, self.owner, self.wants_pause = state, None, False


def blob(*words: object) -> BlobRef:
    return BlobRef(key="/".join(map(str, words)), num_bytes=1)


class Verbs(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.path = Path(tempfile.mkdtemp(prefix="helios-store-"))
        self.stores = open_stores(StoreConfig(data_dir=self.path))
        self.runner = asyncio.Runner()
        self.leases = self.stores.leases
        self.models: list[Model] = []

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def teardown(self) -> None:
        self.runner.close()
        self.stores.close()
        shutil.rmtree(self.path)

    @initialize(lengths=st.lists(st.sampled_from([1, 2, 3, None]), min_size=3, max_size=3))
    def create(self, lengths: list[int | None]) -> None:
        for length in lengths:
            new = new_job(num_chunks=length)
            self.run(self.stores.jobs.create(new))
            self.models.append(Model(id=new.id, num_chunks=length))

    def lease(self, model: Model, back: int) -> Lease:
        """Of the current owner, or of the one before it."""
        return Lease(job_id=model.id, epoch=model.epoch - back)

    @rule()
    def restart(self) -> None:
        self.leases = Leases(self.stores.database)

    @rule(limit=st.integers(1, 3))
    def claim(self, limit: int) -> None:
        free = [model for model in self.models if model.state in RUNNABLE and model.owner != self.leases.owner]
        claimed = self.run(self.leases.claim(limit))
        assert len(claimed) == min(limit, len(free))
        for job in claimed:
            (model,) = [model for model in free if model.id == job.id]
            model.epoch, model.owner = model.epoch + 1, self.leases.owner
            assert (job.epoch, job.next_chunk) == (model.epoch, model.next_chunk)

    @rule(number=JOBS, back=BACK)
    def start(self, number: int, back: int) -> None:
        model = self.models[number]
        may = back == 0 and model.state in RUNNABLE
        assert self.run(self.leases.start(self.lease(model, back))) == may
        if may:
            model.state = "running"

    @rule(number=JOBS, idx=CHUNKS, back=BACK)
    def latents(self, number: int, idx: int, back: int) -> None:
        model = self.models[number]
        commit = LatentsCommit(chunk=idx, latents=blob("l", number, idx), rng=b"r")
        lease = self.lease(model, back)
        is_next = model.state == "running" and idx == model.next_chunk and idx != model.num_chunks
        is_known = idx < model.next_chunk and model.state != "deleted"
        done = self.run(Chunks(self.stores.database, self.leases, self.stores.blobs).commit_latents(lease, commit))
        assert done == (back == 0 and (is_next or is_known))
        if back == 0 and is_next:
            model.next_chunk += 1

    @rule(number=JOBS, idx=CHUNKS, back=BACK)
    def segment(self, number: int, idx: int, back: int) -> None:
        model = self.models[number]
        commit = SegmentCommit(chunk=idx, segment=blob("s", number, idx), init=blob("i"), num_frames=33)
        is_new = model.state == "running" and idx < model.next_chunk and idx not in model.segments
        is_known = idx in model.segments and model.state != "deleted"
        done = self.run(self.stores.chunks.commit_segment(self.lease(model, back), commit))
        assert (done is not None) == (back == 0 and (is_new or is_known))
        if back == 0 and is_new:
            model.segments.add(idx)
            if len(model.segments) == model.next_chunk == model.num_chunks:
                model.end("finished")
        if done is not None:
            assert (done.num_published, done.is_finished) == (model.num_published, model.state == "finished")

    @rule(number=JOBS, idx=CHUNKS, back=BACK)
    def step_back(self, number: int, idx: int, back: int) -> None:
        model = self.models[number]
        lease = self.lease(model, back)
        may = model.owns(lease) and model.num_published <= idx < model.next_chunk
        assert self.run(self.stores.chunks.step_back(lease, idx)) == may
        if may:
            model.next_chunk = idx
            model.segments = {segment for segment in model.segments if segment < idx}

    @rule(number=JOBS, back=BACK)
    def owner_pauses(self, number: int, back: int) -> None:
        model = self.models[number]
        lease = self.lease(model, back)
        may = model.owns(lease)
        assert self.run(self.leases.paused(lease)) == may
        if may:
            model.end("paused")

    @rule(number=JOBS, back=BACK)
    def release(self, number: int, back: int) -> None:
        model = self.models[number]
        lease = self.lease(model, back)
        self.run(self.leases.release([lease]))
        if model.owns(lease):
            model.owner = None
            if model.wants_pause:
                model.end("paused")

    @rule(number=JOBS, back=BACK)
    def fail(self, number: int, back: int) -> None:
        model = self.models[number]
        lease = self.lease(model, back)
        may = model.owns(lease)
        assert self.run(self.leases.fail(lease, JobError(code="x", message="y"))) == may
        if may:
            model.end("failed")

    def client(self, number: int, verb: str) -> Model | None:
        """Calls a client's verb; None when the job is deleted."""
        model = self.models[number]
        call = getattr(self.stores.jobs, verb)("a", model.id)
        if model.state != "deleted":
            self.run(call)
            return model
        with contextlib.suppress(NotFoundError):
            self.run(call)
            raise AssertionError("a deleted job was found")
        return None

    @rule(number=JOBS)
    def cancel(self, number: int) -> None:
        model = self.client(number, "cancel")
        if model is not None and model.state in UNFINISHED:
            model.end("cancelled")

    @precondition(lambda self: sum(model.state == "deleted" for model in self.models) < 2)
    @rule(number=JOBS)
    def delete(self, number: int) -> None:
        model = self.client(number, "delete")
        if model is not None:
            model.end("deleted")
            model.segments, model.shown = set(), []

    @rule(number=JOBS)
    def pause(self, number: int) -> None:
        model = self.client(number, "pause")
        if model is not None and model.state in RUNNABLE:
            if model.owner is None:
                model.state = "paused"
            else:
                model.wants_pause = True

    @rule(number=JOBS)
    def resume(self, number: int) -> None:
        model = self.client(number, "resume")
        if model is not None and model.state in UNFINISHED:
            model.wants_pause = False
            if model.state == "paused":
                model.state = "queued"

    @rule(number=JOBS)
    def stop(self, number: int) -> None:
        model = self.client(number, "stop")
        if model is None or model.state in ENDED:
            return
        model.num_chunks, model.wants_pause = model.next_chunk, False
        if model.next_chunk == 0:
            model.end("cancelled")
        elif len(model.segments) == model.next_chunk:
            model.end("finished")
        elif model.state == "paused":
            model.state = "queued"

    @invariant()
    def rows_are_as_the_model_says(self) -> None:
        for model in self.models:
            if model.state == "deleted":
                continue
            page = self.run(self.stores.chunks.segments("a", model.id, 0))
            job = page.job
            assert (job.state, job.epoch, job.owner) == (model.state, model.epoch, model.owner)
            assert (job.next_chunk, job.num_chunks) == (model.next_chunk, model.num_chunks)
            assert job.is_pause_requested == model.wants_pause
            keys = [str(row.seg_blob) for row in page.chunks]
            assert len(keys) == model.num_published
            assert keys[: len(model.shown)] == model.shown  # what was published never changes
            model.shown = keys
            assert job.bytes_stored == model.next_chunk + len(model.segments) + (1 if job.init_blob else 0)


Verbs.TestCase.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
test_any_sequence_of_verbs = Verbs.TestCase
