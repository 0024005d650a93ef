"""What a caller may use: rates by token bucket, standing amounts, and the bounds of one job. Refusals say what was
asked, what is allowed and when to try again.

Counts in memory, for this process, by a monotonic clock. How many jobs wait and how much is stored it is told. A caller
without limits, the anonymous one, passes everything.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from helios_serve.api.auth import AccessError, Caller, ScopeError
from helios_serve.errors import BodyTooLargeError, InvalidRequestError

MAX_RETRY_AFTER_S = 120.0
"""Where the wait for a standing amount is unknown or long; clients give up on a longer one."""

_QUEUE_RETRY_S = 10.0
_STREAM_RETRY_S = 5.0
_ROUNDING = 1e-6  # of one unit, so that a bucket that was drained by hundreds of roundings still counts as empty


@dataclass(frozen=True, slots=True, kw_only=True)
class JobAsk:
    """What one job asks for. expires_after: seconds its output is kept, None for the server's default."""

    num_frames: int
    priority: int = 0
    expires_after: float | None = None
    is_realtime: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What the tenant has in the store now. next_start_s: when one of its waiting jobs is expected to start."""

    num_queued_jobs: int
    stored_bytes: int = 0
    next_start_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameBudget:
    """The tenant's frames under the caller's limit: `reset_s` until all `limit` of them are back."""

    limit: int
    remaining: int
    reset_s: float

    def headers(self) -> dict[str, str]:
        return {
            "x-ratelimit-limit-frames": str(self.limit),
            "x-ratelimit-remaining-frames": str(self.remaining),
            "x-ratelimit-reset-frames": str(math.ceil(self.reset_s)),
        }


class LimitError(AccessError):
    """A limit of the key is reached (HTTP 429)."""

    status, grpc_status, code, retryable = 429, "RESOURCE_EXHAUSTED", "quota_exceeded", True

    def __init__(self, message: str, *, retry_after_s: float, param: str | None = None) -> None:
        super().__init__(message, param=param, retry_after_s=retry_after_s)


class RateLimitError(LimitError):
    """More than the key's rate; `budget` where frames are counted (HTTP 429)."""

    code = "rate_limit_exceeded"

    def __init__(
        self, message: str, *, retry_after_s: float, param: str | None = None, budget: FrameBudget | None = None
    ) -> None:
        super().__init__(message, retry_after_s=retry_after_s, param=param)
        self.budget = budget

    @property
    def headers(self) -> Mapping[str, str]:
        return {} if self.budget is None else self.budget.headers()


class TooManySessionsError(LimitError):
    """As many interactive sessions as the key allows are open (HTTP 429)."""

    code = "too_many_sessions"


class Limiter:
    """One object per process, for HTTP and gRPC. Safe to call from any thread. Remembers a few numbers per tenant that
    has a key."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._requests = TokenBuckets(period_s=1.0)
        self._frames = TokenBuckets(period_s=60.0)
        self._media = TokenBuckets(period_s=3600.0)
        self._sessions: dict[str, list[float]] = {}  # when each open one ends at the latest
        self._num_streams: dict[str, int] = {}

    def admit_request(self, caller: Caller) -> None:
        """Counts one request. Raises RateLimitError."""
        if caller.limits is None:
            return
        limit = caller.limits.requests_per_second
        wait_s = self._take(self._requests, caller.tenant, limit, 1)
        if wait_s > 0:
            raise RateLimitError(
                f"more than {limit} requests a second, as many as this key allows; try again in {_in_words(wait_s)}",
                retry_after_s=wait_s,
            )

    def admit_job(self, caller: Caller, ask: JobAsk, usage: Usage) -> FrameBudget | None:
        """Checks everything about a new job and takes its frames; None without limits. A job that is not made after
        all: `give_back`.

        Frames are taken in one step. For the number of waiting jobs to hold, nobody else may write a row between
        reading `usage` and writing this job's.

        Raises:
            InvalidRequestError, ScopeError: as `check_job`.
            LimitError: too many jobs wait, or too much is stored.
            RateLimitError: the minute's frames are used up.
        """
        check_job(caller, ask)
        check_usage(caller, usage)
        return self.admit_frames(caller, ask.num_frames)

    def admit_frames(self, caller: Caller, num_frames: int) -> FrameBudget | None:
        """Takes frames, at most a minute's; of a session without an end, each chunk's. Raises RateLimitError."""
        if caller.limits is None:
            return None
        limit = caller.limits.frames_per_minute
        wait_s = self._take(self._frames, caller.tenant, limit, num_frames)
        budget = self._budget(caller.tenant, limit)
        if wait_s > 0:
            raise RateLimitError(
                f"num_frames {num_frames}: {budget.remaining} of {limit} frames a minute are left for this key; "
                f"try again in {_in_words(wait_s)}",
                param="num_frames",
                retry_after_s=wait_s,
                budget=budget,
            )
        return budget

    def budget(self, caller: Caller) -> FrameBudget | None:
        """The tenant's frames as they stand; None without limits."""
        return None if caller.limits is None else self._budget(caller.tenant, caller.limits.frames_per_minute)

    def give_back(self, caller: Caller, num_frames: int) -> None:
        """Returns the frames of a job that was not made: its row was not written, or it was a repetition."""
        with self._lock:
            self._frames.give_back(caller.tenant, num_frames)

    def admit_media(self, caller: Caller, num_bytes: int) -> None:
        """Counts uploaded or fetched media. Raises RateLimitError; BodyTooLargeError beyond what an hour allows."""
        if caller.limits is None:
            return
        limit = caller.limits.media_bytes_per_hour
        if num_bytes > limit:
            raise BodyTooLargeError(f"media of {num_bytes} bytes: this key allows {limit} an hour")
        wait_s = self._take(self._media, caller.tenant, limit, num_bytes)
        if wait_s > 0:
            raise RateLimitError(
                f"media of {num_bytes} bytes: of the {limit} bytes an hour that this key allows too few are left; "
                f"try again in {_in_words(wait_s)}",
                retry_after_s=wait_s,
            )

    @contextlib.contextmanager
    def session(self, caller: Caller) -> Iterator[None]:
        """Surrounds an interactive session. Raises TooManySessionsError; its end after `max_session_seconds` is the
        session's own business."""
        if caller.limits is None:
            yield
            return
        now, limit = self._clock(), caller.limits.max_sessions
        ends_at = now + caller.limits.max_session_seconds
        with self._lock:
            open_ones = self._sessions.setdefault(caller.tenant, [])
            if len(open_ones) >= limit:
                raise _too_many_sessions(open_ones, limit, now)
            open_ones.append(ends_at)
        try:
            yield
        finally:
            with self._lock:
                open_ones.remove(ends_at)

    @contextlib.contextmanager
    def stream(self, caller: Caller) -> Iterator[None]:
        """Surrounds an answer that lasts: SSE, live video, a watch. Raises LimitError."""
        if caller.limits is None:
            yield
            return
        limit = caller.limits.max_concurrent_streams
        with self._lock:
            num_open = self._num_streams.get(caller.tenant, 0)
            if num_open >= limit:
                raise LimitError(
                    f"{num_open} streams are open, and this key allows {limit}; close one, or try again in "
                    f"{_in_words(_STREAM_RETRY_S)}",
                    retry_after_s=_STREAM_RETRY_S,
                )
            self._num_streams[caller.tenant] = num_open + 1
        try:
            yield
        finally:
            with self._lock:
                self._num_streams[caller.tenant] -= 1

    def _budget(self, tenant: str, limit: int) -> FrameBudget:
        with self._lock:
            used = self._frames.used(tenant, limit, self._clock())
        remaining = max(0, math.floor(limit - used + _ROUNDING))
        return FrameBudget(limit=limit, remaining=remaining, reset_s=60 * used / limit)

    def _take(self, buckets: TokenBuckets, tenant: str, size: int, cost: int) -> float:
        with self._lock:
            return buckets.take(tenant, size, cost, self._clock())


def check_job(caller: Caller, ask: JobAsk) -> None:
    """The bounds of one job.

    Raises:
        InvalidRequestError: more frames, more urgent or kept longer than the key allows; trying again does not help.
        ScopeError: the realtime class, which the key may not use.
    """
    limits = caller.limits
    if limits is None:
        return
    if ask.num_frames > limits.max_frames_per_job:
        message = f"num_frames {ask.num_frames}: at most {limits.max_frames_per_job} for this key"
        raise InvalidRequestError(message, param="num_frames")
    if ask.num_frames > limits.frames_per_minute:
        message = f"num_frames {ask.num_frames}: at most {limits.frames_per_minute}, this key's frames a minute"
        raise InvalidRequestError(message, param="num_frames")
    if ask.priority < limits.min_priority:
        message = f"priority {ask.priority}: at least {limits.min_priority} for this key; lower runs first"
        raise InvalidRequestError(message, param="priority")
    if ask.expires_after is not None and ask.expires_after > limits.max_expires_after:
        message = f"expires_after {ask.expires_after:g}: at most {limits.max_expires_after} seconds for this key"
        raise InvalidRequestError(message, param="expires_after")
    if ask.is_realtime and not limits.may_use_realtime:
        raise ScopeError(
            "service_class realtime: not for this key; set service_class to offline", param="service_class"
        )


def check_usage(caller: Caller, usage: Usage) -> None:
    """The standing amounts; a store may call it inside the transaction that writes the job. Raises LimitError."""
    limits = caller.limits
    if limits is None:
        return
    if usage.num_queued_jobs >= limits.max_queued_jobs:
        wait_s = _QUEUE_RETRY_S if usage.next_start_s is None else min(MAX_RETRY_AFTER_S, max(1.0, usage.next_start_s))
        raise LimitError(
            f"{usage.num_queued_jobs} jobs wait, and this key allows {limits.max_queued_jobs} (max_queued_jobs); "
            f"cancel one, or try again in {_in_words(wait_s)}",
            retry_after_s=wait_s,
        )
    if usage.stored_bytes >= limits.max_stored_bytes:
        raise LimitError(
            f"{usage.stored_bytes} bytes are stored, and this key allows {limits.max_stored_bytes} (max_stored_bytes); "
            f"delete videos, or try again in {_in_words(MAX_RETRY_AFTER_S)}",
            retry_after_s=MAX_RETRY_AFTER_S,
        )


@dataclass(slots=True)
class _Bucket:
    used: float
    updated_s: float


class TokenBuckets:
    """Token buckets of one period: a tenant's bucket of a size refills by its size in a period.

    Keys of one tenant may have different sizes. What any of them takes is taken from all of the tenant's buckets, each
    of which is then full at most, so that each key's limit holds for the tenant's whole use.
    """

    def __init__(self, *, period_s: float) -> None:
        self._period_s = period_s
        self._by_tenant: dict[str, dict[int, _Bucket]] = {}

    def take(self, tenant: str, size: int, cost: int, now: float) -> float:
        """Takes `cost`, at most `size`, and returns 0; or takes nothing and returns the seconds until it is there."""
        assert 0 <= cost <= size
        missing = self.used(tenant, size, now) + cost - size
        if missing > _ROUNDING:
            return missing * self._period_s / size
        for each, bucket in self._by_tenant[tenant].items():
            bucket.used = min(each, self.used(tenant, each, now) + cost)
        return 0.0

    def give_back(self, tenant: str, cost: int) -> None:
        for bucket in self._by_tenant.get(tenant, {}).values():
            bucket.used = max(0.0, bucket.used - cost)

    def used(self, tenant: str, size: int, now: float) -> float:
        """What is missing in the tenant's bucket of this size; a new one starts as the fullest of the others."""
        buckets = self._by_tenant.setdefault(tenant, {})
        bucket = buckets.get(size)
        if bucket is None:
            others = [self.used(tenant, each, now) for each in buckets]
            bucket = buckets[size] = _Bucket(min(size, max(others, default=0.0)), now)
        bucket.used = max(0.0, bucket.used - max(0.0, now - bucket.updated_s) * size / self._period_s)
        bucket.updated_s = now
        return bucket.used


def _too_many_sessions(ends: list[float], limit: int, now: float) -> TooManySessionsError:
    """ends: when the open ones end at the latest, by the limiter's clock."""
    if limit == 0:
        return TooManySessionsError(
            "this key allows no sessions; create a video instead", retry_after_s=MAX_RETRY_AFTER_S
        )
    left_s = max(1.0, min(ends) - now)
    return TooManySessionsError(
        f"{len(ends)} sessions are open, and this key allows {limit}; end one, or try again in {_in_words(left_s)}",
        retry_after_s=min(MAX_RETRY_AFTER_S, left_s),
    )


def _in_words(seconds: float) -> str:
    return f"{math.ceil(seconds)} s"
