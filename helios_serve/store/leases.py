"""Ownership of jobs: claim, renew, release, and what only the owner may do. An epoch fences every verb. Knows the
database's clock for leases and the monotonic one for publishing; never the wall clock.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa

from helios_serve.faults import NO_FAULTS, FaultPlan
from helios_serve.store.database import Database
from helios_serve.store.ending import JobError, end_job
from helios_serve.store.jobs import job_record
from helios_serve.store.records import ENDED, RUNNABLE, BlobRef, Job, JobBlob, Lease
from helios_serve.store.schema import db_now, job

LEASE_S = 10.0
RENEW_S = 3.0
PUBLISH_MARGIN = 0.2
"""Share of a lease, before its end, in which nothing is published: 2 s of 10."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """The owner shall stop running a job: it is another's or was deleted (`lost`), has ended, or is to be paused."""

    lease: Lease
    why: Literal["lost", "ended", "pause"]


class Leases:
    """The leases of one process, which is one owner. On SQLite the lock of the data directory is the lease: jobs of
    earlier owners are free at once, and time plays no part.

    Args:
        clock: monotonic seconds.
    """

    def __init__(
        self,
        database: Database,
        *,
        lease_s: float = LEASE_S,
        faults: FaultPlan = NO_FAULTS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.owner = uuid.uuid4().hex
        self.lease_s = lease_s
        self._db = database
        self._faults = faults
        self._clock = clock
        self._renewed_at: dict[Lease, float] = {}
        self._finished: set[Lease] = set()

    @property
    def held(self) -> tuple[Lease, ...]:
        """What this process believes to own."""
        return tuple(lease for lease in self._renewed_at if lease not in self._finished)

    async def claim(self, limit: int, *, job_id: str | None = None, after_crash: bool = True) -> list[Job]:
        """Takes up to `limit` free runnable jobs, realtime and older ones first, or the one named if it is free. A job
        that was dispatched when its last owner vanished is suspect from now on, unless that owner is known to have been
        killed from outside (`after_crash` false)."""
        sent_at = self._clock()
        jobs = await self._db.write(_claim, self.owner, self.lease_s, limit, job_id, after_crash)
        for claimed in jobs:
            self._renewed_at[claimed.lease] = sent_at
        return jobs

    async def renew(self) -> list[Lease]:
        """Prolongs all leases that are still this owner's; returns, and forgets, the others. Call it every 3 s."""
        sent_at, believed, finished = self._clock(), set(self.held), set(self._finished)
        kept = await self._db.write(_renew, self.owner, self.lease_s)
        lost = [lease for lease in believed if lease not in kept and lease not in self._finished]
        self._forget(*lost, *finished)
        for lease in kept & believed:
            self.renewed(lease, sent_at)
        return lost

    async def notices(self) -> list[Notice]:
        """What other processes did to the jobs of this one; cheap enough to ask every 250 ms."""
        return await self._db.read(_notices, self.held)

    async def release(self, leases: Iterable[Lease]) -> None:
        """Gives jobs back unharmed, for a drain or because they are no longer wanted here."""
        given = _sorted(leases)
        await self._db.write(_release, given)
        self._forget(*given)

    def may_publish(self, lease: Lease, **facts: object) -> bool:
        """Whether this process surely owns the job still; ask just before a segment is shown. Visits `publish`."""
        self._faults.at("publish", job_id=lease.job_id, **facts)
        renewed_at = self._renewed_at.get(lease)
        if renewed_at is None:
            return False
        return not self._db.is_postgres or self._clock() - renewed_at < self.lease_s * (1 - PUBLISH_MARGIN)

    def renewed(self, lease: Lease, sent_at: float) -> None:
        """A commit prolonged the lease; `sent_at` is the clock before it was sent."""
        if lease in self._renewed_at:
            self._renewed_at[lease] = max(sent_at, self._renewed_at[lease])

    def finished(self, lease: Lease) -> None:
        """A commit of this owner ended the job; its last segment may be shown until the lease would have ended."""
        if lease in self._renewed_at:
            self._finished.add(lease)

    def now(self) -> float:
        """The monotonic clock, in seconds."""
        return self._clock()

    async def start(self, lease: Lease) -> bool:
        """The first step is dispatched: queued becomes running. False: fenced."""
        return await self._db.write(_start, lease)

    async def dispatched(self, leases: Collection[Lease], num_sharing: int | None = None) -> set[Lease]:
        """Notes, before a crash can come, that these jobs' next chunks run together, in a pack of `num_sharing` if that
        is more; returns those that still may. For executors whose crash ends this process: after it the jobs are
        claimed as suspects."""
        return await self._db.write(_dispatched, _sorted(leases), num_sharing or len(leases))

    async def undispatched(self, leases: Collection[Lease]) -> None:
        """The chunks were given up in good order: it costs no attempt and raises no suspicion."""
        await self._db.write(_undispatched, _sorted(leases))

    async def attach(self, lease: Lease, kind: JobBlob, blob: BlobRef, *, rng: bytes | None = None) -> bool:
        """Names a blob of the job; with `seed`, `rng` is the generator state before chunk 0. False: fenced."""
        return await self._db.write(_attach, lease, kind, blob, rng)

    async def paused(self, lease: Lease) -> bool:
        """The chunk in flight is committed, or given up: the job is paused and free. False: fenced."""
        is_paused = await self._db.write(_paused, lease)
        self._forget(lease)
        return is_paused

    async def fail(self, lease: Lease, error: JobError) -> bool:
        """Ends the job without a result. False: fenced, or it has ended."""
        has_failed = await self._db.write(_fail, lease, error)
        self._forget(lease)
        return has_failed

    async def lose_data(self, job_id: str, message: str) -> bool:
        """A blob of the job is gone for good: fails it, also when it was finished. False: it failed before."""
        return await self._db.write(_lose_data, job_id, JobError(code="data_loss", message=message))

    def _forget(self, *leases: Lease) -> None:
        for lease in leases:
            self._renewed_at.pop(lease, None)
            self._finished.discard(lease)


def fence(lease: Lease) -> sa.ColumnElement[bool]:
    """Holds while the lease is good and the job is runnable."""
    return sa.and_(job.c.id == lease.job_id, job.c.epoch == lease.epoch, job.c.state.in_(RUNNABLE))


def _claim(
    connection: sa.Connection, owner: str, lease_s: float, limit: int, job_id: str | None, after_crash: bool
) -> list[Job]:
    if connection.dialect.name == "postgresql":
        free = sa.or_(job.c.lease_until.is_(None), job.c.lease_until < db_now())
    else:
        free = sa.or_(job.c.owner.is_(None), job.c.owner != owner)
    query = sa.select(job.c.id).where(job.c.state.in_(RUNNABLE), free)
    if job_id is not None:
        query = query.where(job.c.id == job_id)
    live_first = sa.case((job.c.service_class == "realtime", 0), else_=1)
    query = query.order_by(live_first, job.c.created_at, job.c.id).limit(limit)
    candidates = query.with_for_update(skip_locked=True).cte("candidates")  # a locking CTE is run once
    rows = connection.execute(
        sa.update(job)
        .where(job.c.id.in_(sa.select(candidates.c.id)))
        .values(
            epoch=job.c.epoch + 1,
            owner=owner,
            lease_until=db_now() + lease_s,
            in_flight=None,
            **(_suspicion() if after_crash else {}),
        )
        .returning(job)
    )
    jobs = [job_record(row) for row in rows]
    return sorted(jobs, key=lambda claimed: (claimed.service_class != "realtime", claimed.created_at, claimed.id))


def _suspicion() -> dict[str, sa.ColumnElement[Any]]:
    return {
        "is_suspect": sa.or_(job.c.is_suspect, job.c.in_flight.is_not(None)),
        "solo_crashes": job.c.solo_crashes + sa.case((job.c.in_flight == 1, 1), else_=0),
    }


def _renew(connection: sa.Connection, owner: str, lease_s: float) -> set[Lease]:
    query = sa.select(job.c.id).where(job.c.owner == owner, job.c.state.in_(RUNNABLE)).order_by(job.c.id)
    mine = query.with_for_update().cte("mine")  # in one order everywhere, so that transactions cannot block each other
    rows = connection.execute(
        sa.update(job)
        .where(job.c.id.in_(sa.select(mine.c.id)))
        .values(lease_until=db_now() + lease_s)
        .returning(job.c.id, job.c.epoch)
    )
    return {Lease(job_id=row.id, epoch=row.epoch) for row in rows}


def _notices(connection: sa.Connection, held: Collection[Lease]) -> list[Notice]:
    columns = (job.c.id, job.c.epoch, job.c.state, job.c.is_pause_requested)
    rows = connection.execute(sa.select(*columns).where(job.c.id.in_([lease.job_id for lease in held])))
    found = {row.id: row for row in rows}
    notices = []
    for lease in held:
        row = found.get(lease.job_id)
        if row is None or row.epoch != lease.epoch or row.state == "deleted":
            notices.append(Notice(lease=lease, why="lost"))
        elif row.state in ENDED:
            notices.append(Notice(lease=lease, why="ended"))
        elif row.is_pause_requested:
            notices.append(Notice(lease=lease, why="pause"))
    return notices


def _release(connection: sa.Connection, leases: tuple[Lease, ...]) -> None:
    for lease in leases:
        given = sa.update(job).where(fence(lease)).values(owner=None, lease_until=None, is_pause_requested=False)
        connection.execute(given.values(state=sa.case((job.c.is_pause_requested, "paused"), else_=job.c.state)))
    _undispatched(connection, leases)


def _start(connection: sa.Connection, lease: Lease) -> bool:
    started = sa.func.coalesce(job.c.started_at, db_now())
    return _one(connection, sa.update(job).where(fence(lease)).values(state="running", started_at=started))


def _dispatched(connection: sa.Connection, leases: tuple[Lease, ...], num_sharing: int) -> set[Lease]:
    values = {"in_flight": num_sharing, "attempts": job.c.attempts + 1}
    return {lease for lease in leases if _one(connection, sa.update(job).where(fence(lease)).values(**values))}


def _undispatched(connection: sa.Connection, leases: tuple[Lease, ...]) -> None:
    for lease in leases:
        same = (job.c.id == lease.job_id, job.c.epoch == lease.epoch, job.c.in_flight.is_not(None))
        connection.execute(sa.update(job).where(*same).values(in_flight=None, attempts=job.c.attempts - 1))


def _attach(connection: sa.Connection, lease: Lease, kind: JobBlob, blob: BlobRef, rng: bytes | None) -> bool:
    column = job.c[f"{kind}_blob"]
    added = sa.case((column == blob.key, 0), else_=blob.num_bytes)
    values = {column.key: blob.key, "bytes_stored": job.c.bytes_stored + added}
    if rng is not None:
        values["seed_rng"] = rng
    return _one(connection, sa.update(job).where(fence(lease)).values(**values))


def _paused(connection: sa.Connection, lease: Lease) -> bool:
    values = {"state": "paused", "is_pause_requested": False, "owner": None, "lease_until": None, "in_flight": None}
    return _one(connection, sa.update(job).where(fence(lease)).values(**values))


def _fail(connection: sa.Connection, lease: Lease, error: JobError) -> bool:
    return any(
        end_job(connection, lease.job_id, old=old, epoch=lease.epoch, new="failed", error=error) for old in RUNNABLE
    )


def _lose_data(connection: sa.Connection, job_id: str, error: JobError) -> bool:
    row = connection.execute(sa.select(job.c.state, job.c.epoch).where(job.c.id == job_id).with_for_update()).one()
    if row.state not in (*RUNNABLE, "paused", "finished"):
        return False
    return end_job(connection, job_id, old=row.state, epoch=row.epoch, new="failed", error=error)


def _sorted(leases: Iterable[Lease]) -> tuple[Lease, ...]:
    return tuple(sorted(leases, key=lambda lease: lease.job_id))


def _one(connection: sa.Connection, statement: sa.Update) -> bool:
    return connection.execute(statement).rowcount == 1
