"""The rows of the store as frozen records, and what its verbs take. Data only; fields are named as in `schema`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from helios_serve.types import ServiceClass

State = Literal["queued", "running", "paused", "finished", "failed", "cancelled", "deleted"]
EndState = Literal["finished", "failed", "cancelled"]
JobBlob = Literal["input", "seed", "init", "first", "video"]
Json = Mapping[str, Any]

RUNNABLE: tuple[State, ...] = ("queued", "running")
UNFINISHED: tuple[State, ...] = ("queued", "running", "paused")
ENDED: tuple[State, ...] = get_args(EndState)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobRef:
    """A durable blob: its key says what it holds."""

    key: str
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The right to run a job: commits that name another epoch change nothing."""

    job_id: str
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """A job to be accepted.

    route: the verb, for idempotency. spec: what the caller asked for, as the API writes it; `spec_hash` by
    `canonical_hash` of what makes two requests the same one. pinned: numeric configuration that every worker must
    honour. num_chunks: None for an open-ended session. pinned_chunk: the chunk whose first frame every later history
    holds. seed_blob, seed_rng: another job's, whose pictures this one begins from too.
    ttl_s: how long outputs live after the end. source: another job of the tenant that this one extends. given: what it
    begins with otherwise, before its first own chunk.
    """

    id: str
    tenant: str
    route: str
    service_class: ServiceClass
    spec: Json
    spec_hash: str
    pinned: Json
    num_chunks: int | None
    pinned_chunk: int | None = None
    is_interactive: bool = False
    ttl_s: float = 86_400.0
    cost_tflop: float = 0.0
    input_blob: BlobRef | None = None
    seed_blob: str | None = None
    seed_rng: bytes | None = None
    webhook_url: str | None = None
    key_id: str | None = None
    source: Source | None = None
    given: Given | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """The frames of a caller's own video, encoded: the first segments of the job that continues it, whole chunks all of
    them. No latents belong to these chunks."""

    init: BlobRef
    segments: tuple[BlobRef, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What an extension begins with: the first `num_chunks` chunks of a finished job, `num_segments` of them with their
    segments; a last segment that was cut is made again."""

    job_id: str
    num_chunks: int
    num_segments: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job's row."""

    id: str
    tenant: str
    route: str
    service_class: ServiceClass
    is_interactive: bool
    spec: Json
    spec_hash: str
    pinned: Json
    state: State
    epoch: int
    owner: str | None
    lease_until: float | None
    next_chunk: int
    num_chunks: int | None
    pinned_chunk: int | None
    attempts: int
    is_suspect: bool
    is_pause_requested: bool
    cost_tflop: float
    input_blob: str | None
    seed_blob: str | None
    seed_rng: bytes | None
    init_blob: str | None
    video_blob: str | None
    bytes_stored: int
    webhook_url: str | None
    key_id: str | None
    error_code: str | None
    error: str | None
    ttl_s: float
    created_at: float
    started_at: float | None
    ended_at: float | None
    expires_at: float | None
    first_blob: str | None
    purged_at: float | None
    in_flight: int | None
    solo_crashes: int
    is_pruned: bool

    @property
    def lease(self) -> Lease:
        """What the owner's verbs take; only the claimer may use it."""
        return Lease(job_id=self.id, epoch=self.epoch)

    @property
    def is_expired(self) -> bool:
        """Whether the outputs are gone; the row stays a while."""
        return self.purged_at is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Created:
    """is_replayed: the job existed, by its idempotency key or as the same request's earlier try."""

    job: Job
    is_replayed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentsCommit:
    """The DiT half of a chunk. latents: its 9 latent frames in float32. rng: generator state after it. ctl_seq: the
    last control that is in force. pinned_chunk: the chunk whose first frame later histories hold, where it changes."""

    chunk: int
    latents: BlobRef
    rng: bytes
    attempt: int = 0
    ctl_seq: int = 0
    pinned_chunk: int | None = None
    stats: Json = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentCommit:
    """The VAE half of a chunk. init: the initialisation segment, the same in every commit of a job."""

    chunk: int
    segment: BlobRef
    init: BlobRef
    num_frames: int
    stats: Json = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """What is durable now: the job as the commit left it, of which segments 0 to `num_published` - 1 may be shown."""

    standing: Standing

    @property
    def num_published(self) -> int:
        return self.standing.num_published

    @property
    def is_finished(self) -> bool:
        return self.standing.job.state == "finished"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A chunk's row."""

    job_id: str
    idx: int
    epoch: int
    attempt: int
    lat_blob: str | None
    lat_bytes: int
    rng: bytes | None
    ctl_seq: int
    dit_stats: Json | None
    seg_blob: str | None
    seg_bytes: int
    seg_frames: int
    vae_stats: Json | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """One message to a running session, and the chunk that it was applied to."""

    job_id: str
    seq: int
    event_id: str | None
    kind: str
    payload: Json
    payload_blob: str | None
    received_at: float
    applied_chunk: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumePoint:
    """Where a job goes on after a restart.

    rng: generator state before `next_chunk`; None when it is what the conditioning leaves. trail: the last three
    chunks. pinned: the chunk whose first frame the history holds. undecoded: chunks without a segment.
    """

    next_chunk: int
    rng: bytes | None
    trail: tuple[Chunk, ...]
    pinned: Chunk | None
    undecoded: tuple[Chunk, ...]
    num_published: int
    controls: tuple[Control, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A job, how many of its segments are published, and the last one of these."""

    job: Job
    num_published: int
    last: Chunk | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """Published segments of a job from some position on, in order, and the job as it stood then."""

    job: Job
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    id: str
    tenant: str
    name: str
    secret_sha256: bytes
    scopes: tuple[str, ...]
    limits: Json
    webhook_secret: str | None
    created_at: float
    expires_at: float | None
    revoked_at: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    id: str
    tenant: str
    filename: str
    purpose: str
    content_type: str
    num_bytes: int
    blob: str
    created_at: float
    expires_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookEndpoint:
    """event_types: empty for all. previous_secret: still signs while a rotation is young. name: its owner's word."""

    id: str
    tenant: str
    url: str
    secret: str
    previous_secret: str | None
    rotated_at: float | None
    event_types: tuple[str, ...]
    is_disabled: bool
    created_at: float
    name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """One event for one receiver. endpoint_id: None for a job's own `webhook_url`, which `key_id` signs."""

    id: str
    tenant: str
    event_id: str
    event_type: str
    job_id: str
    endpoint_id: str | None
    url: str
    key_id: str | None
    state: Literal["pending", "delivered", "dead"]
    attempt: int
    next_at: float
    last_status: int | None
    created_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    id: str
    weight: float
    vtime: float
    limits: Json | None
