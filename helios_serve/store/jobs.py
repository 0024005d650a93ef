"""What clients do with jobs: create once, look up, list, cancel, delete, pause, send controls. Every verb names the
tenant. Knows rows; what the owner of a job does is in `leases` and `chunks`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import fields
from typing import Any

import sqlalchemy as sa

from helios_serve.errors import ConflictError, NotFoundError, QuotaError
from helios_serve.store.beginning import add_given, copy_source
from helios_serve.store.database import Database, fields_of, insert_into
from helios_serve.store.ending import JobError, end_job
from helios_serve.store.errors import EventIdConflictError, IdempotencyKeyReusedError
from helios_serve.store.paging import Page, PageRequest, read_page
from helios_serve.store.records import (
    ENDED,
    RUNNABLE,
    UNFINISHED,
    BlobRef,
    Control,
    Created,
    Job,
    Json,
    NewJob,
    State,
)
from helios_serve.store.schema import chunk, control, db_now, file, idem, job, tenant

IDEMPOTENCY_S = 86_400.0
RETRY_WINDOW_S = 60.0
_NOT_COLUMNS = frozenset({"source", "given", "input_blob"})
MAX_PENDING_CONTROLS = 64


def canonical_hash(body: Json) -> str:
    """Equal for bodies that mean the same, whatever the order of their keys; BLAKE2b-128 in hexadecimal."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class JobStore:
    """One for each process; every verb is one transaction."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def create(self, new: NewJob, *, idempotency_key: str | None = None, is_retry: bool = False) -> Created:
        """Accepts a job, or finds the one that the same key, or the same retried request, made before.

        is_retry: the client says that this is a retry and sent no key: then the tenant's job of the same `spec_hash`
        from the last 60 s is the answer, if it still runs or ended well.

        Raises:
            IdempotencyKeyReusedError: the key belongs to another body.
            NotFoundError, ConflictError: the source of an extension is not the tenant's, or not finished.
        """
        return await self._db.write(_create, new, idempotency_key, is_retry)

    async def find(self, new: NewJob, *, idempotency_key: str | None = None, is_retry: bool = False) -> Job | None:
        """The job that `create` would find rather than make.

        Raises: IdempotencyKeyReusedError.
        """
        return await self._db.read(_find, new, idempotency_key, is_retry)

    async def get(self, tenant_id: str, job_id: str) -> Job:
        """Raises NotFoundError for unknown, deleted and other tenants' jobs."""
        return await self._db.read(_get, tenant_id, job_id)

    async def list(self, tenant_id: str, page: PageRequest, *, states: Collection[State] | None = None) -> Page[Job]:
        """The tenant's jobs, deleted ones left out."""
        return await self._db.read(_list, tenant_id, page, states)

    async def counts(self, tenant_id: str) -> dict[State, int]:
        """How many unfinished jobs the tenant has, by state; absent states are 0."""
        return await self._db.read(_counts, tenant_id)

    async def totals(self) -> tuple[dict[State, int], int]:
        """How many jobs of all tenants there are, by state (absent states are 0), and the bytes that they hold."""
        return await self._db.read(_totals)

    async def bytes_stored(self, tenant_id: str) -> int:
        """Bytes of the tenant's jobs and files; blobs that two jobs share count twice."""
        return await self._db.read(_bytes_stored, tenant_id)

    async def cancel(self, tenant_id: str, job_id: str) -> Job:
        """Ends the job at once, whoever runs it: later commits change nothing. An ended job is returned unchanged."""
        return await self._db.write(_cancel, tenant_id, job_id)

    async def delete(self, tenant_id: str, job_id: str) -> None:
        """Cancels the job, forgets what it holds and hides it; its blobs become garbage."""
        await self._db.write(_delete, tenant_id, job_id)

    async def pause(self, tenant_id: str, job_id: str) -> Job:
        """Pauses the job now when nobody runs it, else asks its owner to do so after the chunk in flight."""
        return await self._db.write(_pause, tenant_id, job_id)

    async def resume(self, tenant_id: str, job_id: str) -> Job:
        """Makes a paused job runnable; takes back a request to pause."""
        return await self._db.write(_resume, tenant_id, job_id)

    async def stop(self, tenant_id: str, job_id: str, *, num_chunks: int = 0) -> Job:
        """Ends an open-ended job with the chunks that it has, or with `num_chunks` if these are more: now when all are
        decoded, else after the last one."""
        return await self._db.write(_stop, tenant_id, job_id, num_chunks)

    async def add_control(
        self, tenant_id: str, job_id: str, *, kind: str, payload: Json, event_id: str | None = None
    ) -> Control:
        """Makes a message to a session durable; the same `event_id` and content again is the same message.

        Raises: EventIdConflictError, ConflictError when the job has ended, QuotaError with 64 messages pending.
        """
        return await self._db.write(_add_control, tenant_id, job_id, kind, payload, event_id)

    async def attach_video(self, job_id: str, video: BlobRef) -> None:
        """Names the finished file of a job that has none yet."""
        await self._db.write(_attach_video, job_id, video)


def job_record(row: sa.Row[Any]) -> Job:
    return Job(**fields_of(job, row))


def owned_row(connection: sa.Connection, tenant_id: str, job_id: str, *, is_locked: bool = False) -> Job:
    """The tenant's job, not deleted; locked, it stays as it is until the transaction's end.

    Raises: NotFoundError.
    """
    query = sa.select(job).where(is_owned(tenant_id, job_id))
    row = connection.execute(query.with_for_update() if is_locked else query).one_or_none()
    if row is None:
        raise missing(job_id)
    return job_record(row)


def is_owned(tenant_id: str, job_id: str) -> sa.ColumnElement[bool]:
    """Of the one job with that id: it is the tenant's, and not deleted."""
    return sa.and_(job.c.id == job_id, job.c.tenant == tenant_id, job.c.state != "deleted")


def missing(job_id: str) -> NotFoundError:
    """What is said of a job that is nobody's or another tenant's."""
    return NotFoundError(f"video {job_id[:64]}: not found", param="id")


def num_undecoded(connection: sa.Connection, job_id: str) -> int:
    """Committed chunks without a segment."""
    query = sa.select(sa.func.count()).where(chunk.c.job_id == job_id, chunk.c.seg_blob.is_(None))
    return connection.scalar(query) or 0


def _create(connection: sa.Connection, new: NewJob, key: str | None, is_retry: bool) -> Created:
    if key is not None:
        first_id = _take_key(connection, new, key)
        if first_id != new.id:
            return Created(job=_row(connection, first_id), is_replayed=True)
    elif is_retry:
        earlier = _earlier_try(connection, new)
        if earlier is not None:
            return Created(job=earlier, is_replayed=True)
    connection.execute(insert_into(connection, tenant).values(id=new.tenant).on_conflict_do_nothing())
    values = {item.name: getattr(new, item.name) for item in fields(new) if item.name not in _NOT_COLUMNS}
    num_bytes = 0
    if new.input_blob is not None:
        values["input_blob"], num_bytes = new.input_blob.key, new.input_blob.num_bytes
    connection.execute(sa.insert(job).values(**values, state="queued", bytes_stored=num_bytes, created_at=db_now()))
    if new.source is not None:
        copy_source(
            connection, new.id, new.source, owned_row(connection, new.tenant, new.source.job_id, is_locked=True)
        )
    if new.given is not None:
        add_given(connection, new.id, new.given)
    return Created(job=_row(connection, new.id), is_replayed=False)


def _take_key(connection: sa.Connection, new: NewJob, key: str) -> str:
    """Binds the key to the new job unless it is bound; returns the id of its job."""
    mine = sa.and_(idem.c.tenant == new.tenant, idem.c.route == new.route, idem.c.key == key)
    connection.execute(sa.delete(idem).where(mine, idem.c.expires_at < db_now()))
    connection.execute(
        insert_into(connection, idem)
        .values(
            tenant=new.tenant,
            route=new.route,
            key=key,
            body_hash=new.spec_hash,
            job_id=new.id,
            expires_at=db_now() + IDEMPOTENCY_S,
        )
        .on_conflict_do_nothing()
    )
    bound = connection.execute(sa.select(idem.c.job_id, idem.c.body_hash).where(mine)).one()
    _check_same(bound.body_hash, new, key)
    return str(bound.job_id)


def _check_same(body_hash: str, new: NewJob, key: str) -> None:
    if body_hash != new.spec_hash:
        raise IdempotencyKeyReusedError(
            f"idempotency key {key[:64]}: it was used for another request; send a new key, or the same body",
            param="Idempotency-Key",
        )


def _find(connection: sa.Connection, new: NewJob, key: str | None, is_retry: bool) -> Job | None:
    if key is None:
        return _earlier_try(connection, new) if is_retry else None
    mine = sa.and_(idem.c.tenant == new.tenant, idem.c.route == new.route, idem.c.key == key)
    query = sa.select(idem.c.job_id, idem.c.body_hash).where(mine, idem.c.expires_at >= db_now())
    bound = connection.execute(query).one_or_none()
    if bound is None:
        return None
    _check_same(bound.body_hash, new, key)
    return _row(connection, str(bound.job_id))


def _earlier_try(connection: sa.Connection, new: NewJob) -> Job | None:
    if connection.dialect.name == "postgresql":  # two retries at once must not both find nothing
        name = sa.func.hashtextextended(f"{new.tenant}/{new.spec_hash}", 0)
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(name)))
    query = (
        sa.select(job)
        .where(
            job.c.tenant == new.tenant,
            job.c.route == new.route,
            job.c.spec_hash == new.spec_hash,
            job.c.created_at > db_now() - RETRY_WINDOW_S,
            job.c.state.in_((*UNFINISHED, "finished")),
        )
        .order_by(job.c.created_at.desc())
        .limit(1)
    )
    row = connection.execute(query).one_or_none()
    return None if row is None else job_record(row)


def _row(connection: sa.Connection, job_id: str) -> Job:
    return job_record(connection.execute(sa.select(job).where(job.c.id == job_id)).one())


def _get(connection: sa.Connection, tenant_id: str, job_id: str) -> Job:
    return owned_row(connection, tenant_id, job_id)


def _list(connection: sa.Connection, tenant_id: str, page: PageRequest, states: Collection[State] | None) -> Page[Job]:
    query = sa.select(job).where(job.c.tenant == tenant_id, job.c.state != "deleted")
    if states is not None:
        query = query.where(job.c.state.in_(states))
    return read_page(connection, query, job, page, job_record)


def _counts(connection: sa.Connection, tenant_id: str) -> dict[State, int]:
    query = sa.select(job.c.state, sa.func.count()).where(job.c.tenant == tenant_id, job.c.state.in_(UNFINISHED))
    return {state: count for state, count in connection.execute(query.group_by(job.c.state))}  # noqa: C416  # typed


def _totals(connection: sa.Connection) -> tuple[dict[State, int], int]:
    rows = connection.execute(
        sa.select(job.c.state, sa.func.count(), sa.func.sum(job.c.bytes_stored))
        .where(job.c.state != "deleted")
        .group_by(job.c.state)
    ).all()
    return {row[0]: row[1] for row in rows}, sum(int(row[2] or 0) for row in rows)


def _bytes_stored(connection: sa.Connection, tenant_id: str) -> int:
    sums = (
        sa.select(sa.func.sum(table.c[name])).where(table.c.tenant == tenant_id)
        for table, name in ((job, "bytes_stored"), (file, "num_bytes"))
    )
    return sum(int(connection.scalar(query) or 0) for query in sums)


def _cancel(connection: sa.Connection, tenant_id: str, job_id: str) -> Job:
    old = owned_row(connection, tenant_id, job_id, is_locked=True)
    if old.state in UNFINISHED:
        error = JobError(code="cancelled", message=f"video {job_id}: cancelled")
        end_job(connection, job_id, old=old.state, epoch=old.epoch, new="cancelled", error=error)
    return _row(connection, job_id)


def _delete(connection: sa.Connection, tenant_id: str, job_id: str) -> None:
    old = _cancel(connection, tenant_id, job_id)
    connection.execute(sa.delete(chunk).where(chunk.c.job_id == job_id))
    connection.execute(sa.delete(control).where(control.c.job_id == job_id))
    nothing = dict.fromkeys(("input_blob", "seed_blob", "seed_rng", "init_blob", "first_blob", "video_blob", "owner"))
    connection.execute(
        sa.update(job)
        .where(job.c.id == job_id, job.c.state == old.state, job.c.epoch == old.epoch)
        .values(
            **nothing,
            state="deleted",
            spec={},
            bytes_stored=0,
            lease_until=None,
            in_flight=None,
            ended_at=sa.func.coalesce(job.c.ended_at, db_now()),
            purged_at=db_now(),
        )
    )


def _pause(connection: sa.Connection, tenant_id: str, job_id: str) -> Job:
    old = owned_row(connection, tenant_id, job_id, is_locked=True)
    same = (job.c.id == job_id, job.c.state == old.state, job.c.epoch == old.epoch)
    if old.state in RUNNABLE:
        values = {"state": "paused"} if old.owner is None else {"is_pause_requested": True}
        connection.execute(sa.update(job).where(*same).values(**values))
    return _row(connection, job_id)


def _resume(connection: sa.Connection, tenant_id: str, job_id: str) -> Job:
    old = owned_row(connection, tenant_id, job_id, is_locked=True)
    same = (job.c.id == job_id, job.c.state == old.state, job.c.epoch == old.epoch)
    if old.state in UNFINISHED:
        state = "queued" if old.state == "paused" else old.state
        connection.execute(sa.update(job).where(*same).values(state=state, is_pause_requested=False))
    return _row(connection, job_id)


def _stop(connection: sa.Connection, tenant_id: str, job_id: str, num_chunks: int) -> Job:
    old = owned_row(connection, tenant_id, job_id, is_locked=True)
    if old.state in ENDED:
        return old
    same = (job.c.id == job_id, job.c.state == old.state, job.c.epoch == old.epoch)
    end = max(old.next_chunk, num_chunks)
    connection.execute(sa.update(job).where(*same).values(num_chunks=end, is_pause_requested=False))
    if end > old.next_chunk:
        return _row(connection, job_id)
    if old.next_chunk == 0:
        error = JobError(code="cancelled", message=f"video {job_id}: stopped before its first chunk")
        end_job(connection, job_id, old=old.state, epoch=old.epoch, new="cancelled", error=error)
    elif num_undecoded(connection, job_id) == 0:
        end_job(connection, job_id, old=old.state, epoch=old.epoch, new="finished")
    elif old.state == "paused":
        connection.execute(sa.update(job).where(*same).values(state="queued"))
    return _row(connection, job_id)


def _add_control(
    connection: sa.Connection, tenant_id: str, job_id: str, kind: str, payload: Json, event_id: str | None
) -> Control:
    owner = owned_row(connection, tenant_id, job_id, is_locked=True)
    mine = control.c.job_id == job_id
    if event_id is not None:
        row = connection.execute(sa.select(control).where(mine, control.c.event_id == event_id)).one_or_none()
        if row is not None and (row.kind, row.payload) != (kind, dict(payload)):
            raise EventIdConflictError(f"event {event_id[:64]}: it was used for another message of this session")
        if row is not None:
            return Control(**fields_of(control, row))
    if owner.state not in UNFINISHED:
        raise ConflictError(f"video {job_id}: {owner.state}; it takes no more messages", code="video_failed")
    waiting = connection.scalar(sa.select(sa.func.count()).where(mine, control.c.applied_chunk.is_(None))) or 0
    if waiting >= MAX_PENDING_CONTROLS:
        raise QuotaError(f"{waiting} messages are pending, as many as a session takes", code="interaction_queue_full")
    last = connection.scalar(sa.select(sa.func.max(control.c.seq)).where(mine)) or 0
    row = connection.execute(
        sa.insert(control)
        .values(job_id=job_id, seq=last + 1, event_id=event_id, kind=kind, payload=payload, received_at=db_now())
        .returning(control)
    ).one()
    return Control(**fields_of(control, row))


def _attach_video(connection: sa.Connection, job_id: str, video: BlobRef) -> None:
    connection.execute(
        sa.update(job)
        .where(job.c.id == job_id, job.c.state == "finished", job.c.video_blob.is_(None), job.c.purged_at.is_(None))
        .values(video_blob=video.key, bytes_stored=job.c.bytes_stored + video.num_bytes)
    )
