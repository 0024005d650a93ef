"""Rates, standing amounts and bounds, by a clock that the test moves."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helios_serve.api.auth import ANONYMOUS, Caller, ScopeError
from helios_serve.api.keys import SCOPES, KeyLimits
from helios_serve.api.limits import (
    JobAsk,
    Limiter,
    LimitError,
    RateLimitError,
    TokenBuckets,
    TooManySessionsError,
    Usage,
    check_job,
    check_usage,
)
from helios_serve.errors import BodyTooLargeError, HeliosError, InvalidRequestError

IDLE = Usage(num_queued_jobs=0)


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def limiter(clock: Clock) -> Limiter:
    return Limiter(clock=clock)


def caller(tenant: str = "studio", key_id: str = "aaaa", **limits: object) -> Caller:
    return Caller(tenant=tenant, key_id=key_id, scopes=frozenset(SCOPES), limits=KeyLimits(**limits))  # type: ignore[arg-type]


def admit(limiter: Limiter, who: Caller, num_frames: int) -> dict[str, str]:
    budget = limiter.admit_job(who, JobAsk(num_frames=num_frames), IDLE)
    assert budget is not None
    return budget.headers()


def test_frames_are_a_token_bucket_with_headers(limiter: Limiter, clock: Clock) -> None:
    who = caller(frames_per_minute=600)
    assert admit(limiter, who, 132) == {
        "x-ratelimit-limit-frames": "600",
        "x-ratelimit-remaining-frames": "468",
        "x-ratelimit-reset-frames": "14",
    }
    admit(limiter, who, 468)
    with pytest.raises(RateLimitError) as caught:
        admit(limiter, who, 33)
    error = caught.value
    assert (error.status, error.grpc_status, error.code) == (429, "RESOURCE_EXHAUSTED", "rate_limit_exceeded")
    assert error.message == "num_frames 33: 0 of 600 frames a minute are left for this key; try again in 4 s"
    assert error.retry_after_s == pytest.approx(3.3)
    assert error.headers["x-ratelimit-remaining-frames"] == "0"
    clock.now += error.retry_after_s
    assert admit(limiter, who, 33)["x-ratelimit-remaining-frames"] == "0"
    clock.now += 1000
    assert admit(limiter, who, 600)["x-ratelimit-remaining-frames"] == "0"


def test_a_refused_job_takes_nothing(limiter: Limiter) -> None:
    who = caller(frames_per_minute=600)
    admit(limiter, who, 500)
    for _ in range(50):
        with pytest.raises(RateLimitError):
            admit(limiter, who, 101)
    with pytest.raises(LimitError):
        limiter.admit_job(who, JobAsk(num_frames=100), Usage(num_queued_jobs=100))
    admit(limiter, who, 100)


def test_frames_given_back(limiter: Limiter) -> None:
    who = caller(frames_per_minute=600)
    admit(limiter, who, 600)
    limiter.give_back(who, 132)
    assert admit(limiter, who, 100)["x-ratelimit-remaining-frames"] == "32"
    limiter.give_back(who, 10_000)
    assert admit(limiter, who, 600)["x-ratelimit-remaining-frames"] == "0"


def test_keys_of_a_tenant_share_and_tenants_do_not(limiter: Limiter) -> None:
    admit(limiter, caller(key_id="aaaa", frames_per_minute=600), 600)
    with pytest.raises(RateLimitError):
        admit(limiter, caller(key_id="bbbb", frames_per_minute=600), 1)
    admit(limiter, caller(tenant="other", frames_per_minute=600), 600)


def test_each_keys_limit_holds_for_the_tenants_whole_use(limiter: Limiter, clock: Clock) -> None:
    small, large = caller(key_id="aaaa", frames_per_minute=60), caller(key_id="bbbb", frames_per_minute=6000)
    admit(limiter, large, 600)
    with pytest.raises(RateLimitError):
        admit(limiter, small, 1)  # the tenant used more than this key allows
    admit(limiter, large, 5400)
    clock.now += 1.0
    assert admit(limiter, small, 1)["x-ratelimit-remaining-frames"] == "0"
    assert admit(limiter, large, 99)["x-ratelimit-remaining-frames"] == "0"
    clock.now += 60.0
    admit(limiter, small, 60)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 20), st.sampled_from([60, 600]), st.integers(1, 60)), max_size=60))
def test_no_key_gets_more_than_its_bucket_and_its_rate(events: list[tuple[float, int, int]]) -> None:
    """In any stretch of time at most the size and what refills meanwhile; and the wait it names is the right one."""
    buckets, now, taken = TokenBuckets(period_s=60.0), 0.0, list[tuple[float, int, int]]()
    for pause, size, cost in events:
        now += pause
        wait_s = buckets.take("t", size, cost, now)
        if wait_s > 0:
            if wait_s > 2e-3:
                now += wait_s - 1e-3
                assert buckets.take("t", size, cost, now) > 0
            now += 2e-3
            assert buckets.take("t", size, cost, now) == 0
        taken.append((now, size, cost))
        for start, (since, _, _) in enumerate(taken):
            own = sum(cost for _, each, cost in taken[start:] if each == size)
            assert own <= size + size * (now - since) / 60 + 1e-3


def test_a_hundred_concurrent_checks_never_exceed_the_bucket() -> None:
    limiter = Limiter(clock=Clock())
    who = caller(frames_per_minute=1000, requests_per_second=30)
    barrier = threading.Barrier(20)

    def one(number: int) -> bool:
        if number < 20:
            barrier.wait(30)
        try:
            admit(limiter, who, 33)
        except RateLimitError:
            return False
        return True

    with ThreadPoolExecutor(20) as pool:
        assert sum(pool.map(one, range(100))) == 30

    async def ask() -> bool:
        await asyncio.sleep(0)
        try:
            limiter.admit_request(who)
        except RateLimitError:
            return False
        return True

    async def ask_all() -> list[bool]:
        return await asyncio.gather(*(ask() for _ in range(100)))

    assert sum(asyncio.run(ask_all())) == 30


def test_requests_per_second(limiter: Limiter, clock: Clock) -> None:
    who = caller(requests_per_second=5)
    for _ in range(5):
        limiter.admit_request(who)
    with pytest.raises(RateLimitError, match="more than 5 requests a second") as caught:
        limiter.admit_request(who)
    assert caught.value.headers == {}
    assert caught.value.retry_after_s == pytest.approx(0.2)
    clock.now += 0.2
    limiter.admit_request(who)


def test_a_clock_that_stands_or_goes_back_gives_nothing(limiter: Limiter, clock: Clock) -> None:
    who = caller(requests_per_second=1)
    clock.now = 100
    limiter.admit_request(who)
    clock.now = 50
    with pytest.raises(RateLimitError):
        limiter.admit_request(who)
    clock.now = 51
    limiter.admit_request(who)


def test_media_bytes(limiter: Limiter, clock: Clock) -> None:
    who = caller(media_bytes_per_hour=1000)
    limiter.admit_media(who, 900)
    with pytest.raises(RateLimitError, match=r"media of 200 bytes: .* 1000 bytes an hour .* try again in 360 s"):
        limiter.admit_media(who, 200)
    clock.now += 360
    limiter.admit_media(who, 200)
    with pytest.raises(BodyTooLargeError, match="1000 an hour"):
        limiter.admit_media(who, 1001)
    with pytest.raises(BodyTooLargeError):
        limiter.admit_media(caller(tenant="none", media_bytes_per_hour=0), 1)
    limiter.admit_media(caller(tenant="none", media_bytes_per_hour=0), 0)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (JobAsk(num_frames=9000), "num_frames 9000: at most 7260 for this key"),
        (JobAsk(num_frames=7000), "num_frames 7000: at most 6000, this key's frames a minute"),
        (JobAsk(num_frames=1, priority=-1), "priority -1: at least 0 for this key; lower runs first"),
        (JobAsk(num_frames=1, expires_after=604_801), "expires_after 604801: at most 604800 seconds for this key"),
    ],
)
def test_bounds_of_a_job(limiter: Limiter, ask: JobAsk, message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        limiter.admit_job(caller(frames_per_minute=6000), ask, IDLE)
    assert caught.value.message == message
    assert caught.value.param == message.split()[0]
    assert not caught.value.retryable


def test_bounds_themselves_are_allowed() -> None:
    check_job(caller(min_priority=-5), JobAsk(num_frames=7260, priority=-5, expires_after=604_800, is_realtime=True))


def test_a_key_may_be_kept_from_the_realtime_class() -> None:
    with pytest.raises(ScopeError, match="service_class realtime: not for this key") as caught:
        check_job(caller(may_use_realtime=False), JobAsk(num_frames=1, is_realtime=True))
    assert (caught.value.code, caught.value.param) == ("insufficient_scope", "service_class")


@pytest.mark.parametrize(
    ("usage", "message", "retry_after_s"),
    [
        (
            Usage(num_queued_jobs=3),
            "3 jobs wait, and this key allows 3 (max_queued_jobs); cancel one, or try again in 10 s",
            10,
        ),
        (Usage(num_queued_jobs=3, next_start_s=41.5), "try again in 42 s", 41.5),
        (Usage(num_queued_jobs=3, next_start_s=900), "try again in 120 s", 120),
        (Usage(num_queued_jobs=0, stored_bytes=2000), "2000 bytes are stored, and this key allows 2000", 120),
    ],
)
def test_standing_amounts(usage: Usage, message: str, retry_after_s: float) -> None:
    who = caller(max_queued_jobs=3, max_stored_bytes=2000)
    check_usage(who, Usage(num_queued_jobs=2, stored_bytes=1999))
    with pytest.raises(LimitError) as caught:
        check_usage(who, usage)
    assert message in caught.value.message
    assert (caught.value.code, caught.value.status, caught.value.retryable) == ("quota_exceeded", 429, True)
    assert caught.value.retry_after_s == retry_after_s


def test_sessions_are_counted_per_tenant_and_come_back(limiter: Limiter, clock: Clock) -> None:
    who = caller(max_sessions=2, max_session_seconds=100)
    with ExitStack() as stack:
        stack.enter_context(limiter.session(who))
        clock.now += 30
        stack.enter_context(limiter.session(replace(who, key_id="bbbb")))
        with pytest.raises(TooManySessionsError) as caught, limiter.session(who):
            pass
        assert caught.value.message == "2 sessions are open, and this key allows 2; end one, or try again in 70 s"
        assert (caught.value.code, caught.value.retry_after_s) == ("too_many_sessions", 70)
        with limiter.session(caller(tenant="other")):
            pass
    with pytest.raises(KeyError), limiter.session(who):
        raise KeyError
    with limiter.session(who), limiter.session(who):
        pass
    with pytest.raises(TooManySessionsError, match="allows no sessions"), limiter.session(caller(max_sessions=0)):
        pass


def test_streams(limiter: Limiter) -> None:
    who = caller(max_concurrent_streams=1)
    for _ in range(3):
        refused = pytest.raises(LimitError, match="1 streams are open, and this key allows 1")
        with limiter.stream(who), refused, limiter.stream(who):
            pass


def test_a_caller_without_limits_passes(limiter: Limiter) -> None:
    for _ in range(200):
        limiter.admit_request(ANONYMOUS)
        limiter.admit_media(ANONYMOUS, 1 << 40)
    ask = JobAsk(num_frames=10**6, priority=-100, expires_after=10**9, is_realtime=True)
    assert limiter.admit_job(ANONYMOUS, ask, Usage(num_queued_jobs=10**6, stored_bytes=1 << 60)) is None
    limiter.give_back(ANONYMOUS, 10)
    with limiter.session(ANONYMOUS), limiter.session(ANONYMOUS), limiter.stream(ANONYMOUS):
        pass


def test_every_refusal_can_be_answered() -> None:
    for kind in (LimitError, RateLimitError, TooManySessionsError):
        error: HeliosError = kind("no", retry_after_s=1.0)
        assert error.type == "rate_limit_error"
