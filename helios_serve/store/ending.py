"""How a job ends: its state, its expiry and its webhook deliveries, in the caller's transaction."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from helios_serve.store.records import EndState, State
from helios_serve.store.schema import db_now, delivery, job, webhook_endpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class JobError:
    """A code of the API's catalogue, and what to tell the caller."""

    code: str
    message: str


def end_job(
    connection: sa.Connection, job_id: str, *, old: State, epoch: int, new: EndState, error: JobError | None = None
) -> bool:
    """Whether the job was in that state and epoch, and has ended now."""
    ended = connection.execute(
        sa.update(job)
        .where(job.c.id == job_id, job.c.state == old, job.c.epoch == epoch)
        .values(
            state=new,
            owner=None,
            lease_until=None,
            in_flight=None,
            is_pause_requested=False,
            error_code=None if error is None else error.code,
            error=None if error is None else error.message,
            ended_at=db_now(),
            expires_at=db_now() + job.c.ttl_s,
        )
        .returning(job.c.tenant, job.c.webhook_url, job.c.key_id)
    ).one_or_none()
    if ended is None:
        return False
    _announce(connection, job_id, ended, "video.completed" if new == "finished" else "video.failed")
    return True


def _announce(connection: sa.Connection, job_id: str, ended: sa.Row[Any], kind: str) -> None:
    """Writes a delivery for each receiver of the event."""
    event_id = f"evt_{uuid.uuid4().hex}"
    endpoints = connection.execute(
        sa.select(webhook_endpoint).where(
            webhook_endpoint.c.tenant == ended.tenant, webhook_endpoint.c.is_disabled.is_(False)
        )
    )
    receivers = [(row.id, row.url, None) for row in endpoints if not row.event_types or kind in row.event_types]
    if ended.webhook_url is not None:
        receivers.append((None, ended.webhook_url, ended.key_id))
    for endpoint_id, url, key in receivers:
        connection.execute(
            sa.insert(delivery).values(
                id=f"dlv_{uuid.uuid4().hex}",
                tenant=ended.tenant,
                event_id=event_id,
                event_type=kind,
                job_id=job_id,
                endpoint_id=endpoint_id,
                url=url,
                key_id=key,
                state="pending",
                next_at=db_now(),
                created_at=db_now(),
            )
        )
