"""The tables of the job store: one metadata for SQLite and Postgres.

Times are seconds of the Unix epoch by the database's clock. Blobs are keys of `blobs`. A change here comes with a
migration in `migrations`.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

VERSION = 4
"""The schema that this code reads and writes."""

metadata = sa.MetaData()


class db_now(FunctionElement[float]):  # noqa: N801  # reads as SQL
    """The database's clock, in seconds of the Unix epoch."""

    type = sa.Double()
    inherit_cache = True


@compiles(db_now, "sqlite")
def _sqlite_now(element: db_now, compiler: Any, **options: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(db_now, "postgresql")
def _postgres_now(element: db_now, compiler: Any, **options: Any) -> str:
    return "CAST(EXTRACT(EPOCH FROM clock_timestamp()) AS DOUBLE PRECISION)"


def _json(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.JSON(none_as_null=True))


def _text(name: str, *, required: bool = True) -> sa.Column[Any]:
    return sa.Column(name, sa.Text, nullable=not required)


def _time(name: str, *, required: bool = False) -> sa.Column[Any]:
    return sa.Column(name, sa.Double, nullable=not required)


def _count(name: str, key: str | None = None) -> sa.Column[Any]:
    return sa.Column(name, sa.BigInteger, key=key or name, nullable=False, server_default="0")


def _flag(name: str, key: str) -> sa.Column[Any]:
    return sa.Column(name, sa.Boolean, key=key, nullable=False, server_default=sa.false())


def _job_id() -> sa.Column[Any]:
    return sa.Column("job", sa.Text, sa.ForeignKey("job.id", ondelete="CASCADE"), key="job_id", primary_key=True)


job = sa.Table(
    "job",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    _text("tenant"),
    _text("route"),  # the verb, the same over HTTP and gRPC
    sa.Column("class", sa.Text, key="service_class", nullable=False),
    _flag("interactive", "is_interactive"),
    _json("spec"),
    _text("spec_hash"),
    _json("pinned"),
    _text("state"),
    _count("epoch"),
    _text("owner", required=False),
    _time("lease_until"),
    _count("next_chunk"),
    sa.Column("n_chunks", sa.BigInteger, key="num_chunks"),  # null: open-ended
    sa.Column("pinned_chunk", sa.BigInteger),  # whose first frame every later history holds; null: the input's own
    _count("attempts"),  # dispatches of the next chunk without a commit
    _flag("suspect", "is_suspect"),
    _flag("pause", "is_pause_requested"),
    sa.Column("cost_tflop", sa.Double, nullable=False, server_default="0"),
    _text("input_blob", required=False),
    _text("seed_blob", required=False),
    sa.Column("seed_rng", sa.LargeBinary),  # generator state that chunk 0 begins from
    _text("init_blob", required=False),
    _text("video_blob", required=False),
    _count("bytes_stored"),
    _text("webhook_url", required=False),
    _text("key_id", required=False),
    _text("error_code", required=False),
    _text("error", required=False),
    sa.Column("ttl_s", sa.Double, nullable=False),
    _time("created_at", required=True),
    _time("started_at"),
    _time("ended_at"),
    _time("expires_at"),
    # Since schema 2.
    _text("first_blob", required=False),
    _time("purged_at"),
    sa.Column("in_flight", sa.BigInteger),  # size of the pack that holds the next chunk; null: not dispatched
    _count("solo_crashes"),
    _flag("pruned", "is_pruned"),
    sa.Index("ix_job_tenant", "tenant", "created_at", "id"),
    sa.Index("ix_job_state", "state"),
    sa.Index("ix_job_spec_hash", "spec_hash"),
    sa.Index("ix_job_expires_at", "expires_at"),
)

_UNDECODED = sa.text("seg_blob IS NULL")

chunk = sa.Table(
    "chunk",
    metadata,
    _job_id(),
    sa.Column("idx", sa.BigInteger, primary_key=True, autoincrement=False),
    _count("epoch"),
    _count("attempt"),
    _text("lat_blob", required=False),  # null: pruned after the end
    _count("lat_bytes"),
    sa.Column("rng", sa.LargeBinary),  # generator state after the chunk
    _count("ctl_seq"),
    _json("dit_stats"),
    _text("seg_blob", required=False),  # null: not decoded yet
    _count("seg_bytes"),
    _count("seg_frames"),
    _json("vae_stats"),
    # Since schema 4: how far a job is published is asked at each commit, of a session with thousands of chunks too.
    sa.Index("ix_chunk_undecoded", "job_id", "idx", sqlite_where=_UNDECODED, postgresql_where=_UNDECODED),
)

control = sa.Table(
    "control",
    metadata,
    _job_id(),
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    _text("event_id", required=False),
    _text("kind"),
    _json("payload"),
    _text("payload_blob", required=False),
    _time("received_at", required=True),
    sa.Column("applied_chunk", sa.BigInteger),
    sa.UniqueConstraint("job_id", "event_id", name="uq_control_event_id"),
)

idem = sa.Table(
    "idem",
    metadata,
    sa.Column("tenant", sa.Text, primary_key=True),
    sa.Column("route", sa.Text, primary_key=True),
    sa.Column("key", sa.Text, primary_key=True),
    _text("body_hash"),
    sa.Column(
        "job",
        sa.Text,
        sa.ForeignKey("job.id", ondelete="CASCADE", deferrable=True, initially="DEFERRED"),  # the key comes first
        key="job_id",
        nullable=False,
    ),
    _time("expires_at", required=True),
    sa.Index("ix_idem_job", "job_id"),
)

tenant = sa.Table(
    "tenant",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("weight", sa.Double, nullable=False, server_default="1"),
    sa.Column("vtime", sa.Double, nullable=False, server_default="0"),
    _json("limits"),
)

meta = sa.Table("meta", metadata, sa.Column("key", sa.Text, primary_key=True), _text("value"))

api_key = sa.Table(
    "api_key",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    _text("tenant"),
    _text("name"),
    sa.Column("secret_sha256", sa.LargeBinary, nullable=False),
    _json("scopes"),
    _json("limits"),
    _text("webhook_secret", required=False),
    _time("created_at", required=True),
    _time("expires_at"),
    _time("revoked_at"),
)

file = sa.Table(
    "file",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    _text("tenant"),
    _text("filename"),
    _text("purpose"),
    _text("content_type"),
    _count("num_bytes"),
    _text("blob"),
    _time("created_at", required=True),
    _time("expires_at", required=True),
    sa.Index("ix_file_tenant", "tenant", "created_at", "id"),
)

webhook_endpoint = sa.Table(
    "webhook_endpoint",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    _text("tenant"),
    _text("url"),
    _text("secret"),
    _text("previous_secret", required=False),
    _time("rotated_at"),
    _json("event_types"),
    _flag("disabled", "is_disabled"),
    _time("created_at", required=True),
    _text("name", required=False),  # since schema 3
    sa.Index("ix_webhook_endpoint_tenant", "tenant", "created_at", "id"),
)

delivery = sa.Table(
    "delivery",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    _text("tenant"),
    _text("event_id"),
    _text("event_type"),
    sa.Column("job", sa.Text, key="job_id", nullable=False),
    sa.Column("endpoint", sa.Text, sa.ForeignKey("webhook_endpoint.id", ondelete="CASCADE"), key="endpoint_id"),
    _text("url"),
    _text("key_id", required=False),
    _text("state"),
    _count("attempt"),
    _time("next_at", required=True),
    sa.Column("last_status", sa.BigInteger),
    _time("created_at", required=True),
    sa.Index("ix_delivery_due", "state", "next_at"),
    sa.Index("ix_delivery_tenant", "tenant", "created_at", "id"),
)
