"""Bearer keys, scopes, the throttle and origins, without a server."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import tracemalloc
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helios_serve.api import auth
from helios_serve.api.auth import (
    ANONYMOUS,
    MAX_FAILURES,
    AuthenticationError,
    Authenticator,
    Caller,
    FailureThrottle,
    OriginError,
    OriginPolicy,
    ScopeError,
    ThrottledError,
    check_origin,
    grpc_peer_host,
    require,
)
from helios_serve.api.keys import Key, KeyLimits, KeyRing, new_key

NOW = 1_800_000_000.0
PEER = "198.51.100.7"


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def authenticate(authenticator: Authenticator, header: str | None, peer: str | None = PEER, now: float = NOW) -> Caller:
    return asyncio.run(authenticator.authenticate(header, peer, now))


def keyed(*keys: Key, clock: Clock | None = None) -> Authenticator:
    return Authenticator([KeyRing(keys)], FailureThrottle(clock=clock or Clock()))


def test_a_key_gives_its_tenant_scopes_and_limits() -> None:
    limits = KeyLimits(frames_per_minute=500, weight=2.0)
    plain, key = new_key(tenant="studio", scopes=["read"], limits=limits)
    caller = authenticate(keyed(key), f"Bearer {plain}")
    assert caller == Caller(tenant="studio", key_id=key.id, scopes=frozenset({"read"}), limits=limits, weight=2.0)
    assert authenticate(keyed(key), f"bearer  {plain} ") == caller


def test_keys_are_found_in_every_source() -> None:
    plain, key = new_key()
    other = new_key()[1]
    authenticator = Authenticator([KeyRing([other]), KeyRing([key])])
    assert authenticate(authenticator, f"Bearer {plain}").key_id == key.id


def test_a_missing_header_is_named_and_not_counted_as_guessing() -> None:
    authenticator = keyed(new_key()[1])
    for _ in range(3 * MAX_FAILURES):
        with pytest.raises(AuthenticationError, match="no API key was sent") as caught:
            authenticate(authenticator, None)
    assert (caught.value.status, caught.value.grpc_status, caught.value.code) == (
        401,
        "UNAUTHENTICATED",
        "invalid_api_key",
    )
    assert caught.value.headers == {"www-authenticate": "Bearer"}
    assert not caught.value.retryable


def _wrong_headers(plain: str, key: Key) -> dict[str, str]:
    secret = plain.rpartition("_")[2]
    return {
        "wrong secret": f"Bearer hs_{key.id}_{'0' * 64}",
        "unknown id": f"Bearer hs_000000000000_{secret}",
        "short secret": f"Bearer hs_{key.id}_{secret[:-1]}",
        "long secret": f"Bearer hs_{key.id}_{secret}0",
        "upper case": f"Bearer {plain.upper()}",
        "no prefix": f"Bearer {plain[3:]}",
        "other scheme": f"Basic {plain}",
        "no scheme": plain,
        "empty": "",
        "two keys": f"Bearer {plain} {plain}",
        "not ASCII": f"Bearer hs_{key.id}_é",
        "the hash itself": f"Bearer hs_{key.id}_{key.secret_sha256}",
        "huge": "Bearer hs_" + "a" * 30_000,
    }


@pytest.mark.parametrize("case", list(_wrong_headers(*new_key())))
def test_all_wrong_keys_get_the_same_answer(case: str) -> None:
    plain, key = new_key()
    with pytest.raises(AuthenticationError) as caught:
        authenticate(keyed(key), _wrong_headers(plain, key)[case])
    assert caught.value.message == "the API key is not valid; the header reads Authorization: Bearer hs_<id>_<secret>"


def test_every_attempt_costs_one_lookup_one_hash_of_64_bytes_and_one_comparison(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Counts work, because a wall clock on a shared machine proves nothing."""
    plain, key = new_key()
    calls: list[str] = []

    class CountingRing(KeyRing):
        async def find(self, key_id: str) -> Key | None:
            calls.append("find")
            return await super().find(key_id)

    class CountingHashlib:
        @staticmethod
        def sha256(data: bytes) -> Any:
            calls.append(f"hash {len(data)}")
            return hashlib.sha256(data)

    class CountingHmac:
        @staticmethod
        def compare_digest(a: str, b: str) -> bool:
            calls.append(f"compare {len(a)} {len(b)}")
            return hmac.compare_digest(a, b)

    monkeypatch.setattr(auth, "hashlib", CountingHashlib)
    monkeypatch.setattr(auth, "hmac", CountingHmac)
    expected = ["find", "hash 64", "compare 64 64"]
    for case, header in {"right": f"Bearer {plain}", **_wrong_headers(plain, key)}.items():
        calls.clear()
        authenticator = Authenticator([CountingRing([key])])
        if case == "right":
            authenticate(authenticator, header)
        else:
            with pytest.raises(AuthenticationError):
                authenticate(authenticator, header)
        assert calls == expected, case


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_changed_key_is_valid(data: st.DataObject) -> None:
    plain, key = _FIXED
    position = data.draw(st.integers(0, len(plain) - 1))
    replacement = data.draw(st.characters(codec="ascii"))
    changed = plain[:position] + replacement + plain[position + 1 :]
    if changed == plain:
        return
    with pytest.raises(AuthenticationError):
        authenticate(keyed(key), f"Bearer {changed}")


_FIXED = new_key()


def test_an_expired_key_says_so_only_to_its_holder_and_is_not_guessing() -> None:
    plain, key = new_key(expires_at=NOW)
    authenticator = keyed(key)
    assert authenticate(authenticator, f"Bearer {plain}", now=NOW - 1).key_id == key.id
    for _ in range(2 * MAX_FAILURES):
        with pytest.raises(AuthenticationError, match="expired"):
            authenticate(authenticator, f"Bearer {plain}")
    with pytest.raises(AuthenticationError, match="not valid"):
        authenticate(authenticator, f"Bearer hs_{key.id}_{'0' * 64}")


def test_ten_failures_close_an_address_for_a_minute_to_valid_keys_too(clock: Clock) -> None:
    plain, key = new_key()
    authenticator = keyed(key, clock=clock)
    for _ in range(MAX_FAILURES):
        clock.now += 5.9
        with pytest.raises(AuthenticationError):
            authenticate(authenticator, "Bearer guess")
    last = clock.now
    for at in (last, last + 30, last + 59.9):
        clock.now = at
        for header in ("Bearer guess", f"Bearer {plain}", None):
            with pytest.raises(ThrottledError, match="try again in") as caught:
                authenticate(authenticator, header)
            assert caught.value.retry_after_s == pytest.approx(last + 60 - at)
    assert (caught.value.status, caught.value.code, caught.value.retryable) == (429, "auth_throttled", True)
    assert authenticate(authenticator, f"Bearer {plain}", peer="198.51.100.8").key_id == key.id
    clock.now = last + 60
    assert authenticate(authenticator, f"Bearer {plain}").key_id == key.id


def test_ten_failures_spread_over_more_than_a_minute_close_nothing(clock: Clock) -> None:
    authenticator = keyed(new_key()[1], clock=clock)
    for _ in range(50):
        clock.now += 6.7
        with pytest.raises(AuthenticationError):
            authenticate(authenticator, "Bearer guess")


def test_two_hundred_guesses_in_one_burst_reach_the_keys_ten_times(clock: Clock) -> None:
    found: list[str] = []

    class CountingRing(KeyRing):
        async def find(self, key_id: str) -> Key | None:
            found.append(key_id)
            return None

    authenticator = Authenticator([CountingRing([])], FailureThrottle(clock=clock))
    for _ in range(200):
        with pytest.raises((AuthenticationError, ThrottledError)):
            authenticate(authenticator, "Bearer guess")
    assert len(found) == MAX_FAILURES


def test_the_wall_clock_does_not_move_the_throttle(clock: Clock) -> None:
    authenticator = keyed(new_key()[1], clock=clock)
    for _ in range(MAX_FAILURES):
        with pytest.raises(AuthenticationError):
            authenticate(authenticator, "Bearer guess")
    with pytest.raises(ThrottledError):
        authenticate(authenticator, "Bearer guess", now=NOW + 3600)
    clock.now += 60
    with pytest.raises(AuthenticationError):
        authenticate(authenticator, "Bearer guess", now=NOW - 3600)


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("2001:db8::1", "2001:db8::ffff", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:198.51.100.7", "198.51.100.7", True),
        ("198.51.100.7", "198.51.100.6", False),
        ("fe80::1%eth0", "fe80::2%eth1", True),
        (None, None, True),
    ],
)
def test_which_addresses_count_together(first: str | None, second: str | None, same: bool) -> None:
    throttle = FailureThrottle(clock=Clock())
    for _ in range(MAX_FAILURES):
        throttle.note_failure(first)
    if same:
        with pytest.raises(ThrottledError):
            throttle.check(second)
    else:
        throttle.check(second)


def test_the_table_stays_bounded_under_100k_addresses(clock: Clock) -> None:
    throttle = FailureThrottle(max_addresses=1000, clock=clock)
    tracemalloc.start()
    try:
        for number in range(100_000):
            throttle.note_failure(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
            if number == 1000:
                full = tracemalloc.get_traced_memory()[0]
        grown = tracemalloc.get_traced_memory()[0] - full
    finally:
        tracemalloc.stop()
    assert len(throttle) == 1000
    assert grown < 100_000  # bytes
    for _ in range(MAX_FAILURES):
        throttle.note_failure("192.0.2.1")
    with pytest.raises(ThrottledError):
        throttle.check("192.0.2.1")


def test_without_keys_only_this_machine_is_answered() -> None:
    authenticator = Authenticator([])
    assert authenticator.is_keyless
    for peer in ("127.0.0.1", "127.3.2.1", "::1", "::ffff:127.0.0.1", "unix"):
        assert authenticate(authenticator, "Bearer whatever an SDK sends", peer=peer) is ANONYMOUS
    for peer in ("192.0.2.1", "::ffff:192.0.2.1", "0.0.0.0", "", "testclient", None):
        with pytest.raises(AuthenticationError, match="no API keys"):
            authenticate(authenticator, None, peer=peer)
    assert ANONYMOUS.is_anonymous
    assert ANONYMOUS.limits is None
    with pytest.raises(ScopeError):
        require(ANONYMOUS, "admin")
    require(ANONYMOUS, "raw")


def test_an_emptied_key_ring_is_not_a_keyless_server() -> None:
    with pytest.raises(AuthenticationError):
        authenticate(keyed(), None, peer="127.0.0.1")


def test_scopes() -> None:
    caller = authenticate(keyed(_FIXED[1]), f"Bearer {_FIXED[0]}")
    for scope in ("generate", "read", "realtime", "webhooks"):
        require(caller, scope)
    with pytest.raises(ScopeError) as caught:
        require(replace(caller, scopes=frozenset({"read", "generate"})), "webhooks")
    assert caught.value.message == "scope webhooks is needed; this key has: generate, read"
    assert (caught.value.status, caught.value.grpc_status, caught.value.code) == (
        403,
        "PERMISSION_DENIED",
        "insufficient_scope",
    )


def test_a_caller_by_id_needs_a_living_key() -> None:
    plain, key = new_key(expires_at=NOW + 10)
    authenticator = keyed(key)

    def by_id(key_id: str | None, now: float = NOW) -> Caller:
        return asyncio.run(authenticator.caller_by_id(key_id, PEER, now))

    assert by_id(key.id) == authenticate(authenticator, f"Bearer {plain}")
    for key_id in ("000000000000", None):
        with pytest.raises(AuthenticationError):
            by_id(key_id)
    with pytest.raises(AuthenticationError):
        by_id(key.id, NOW + 10)
    keyless = Authenticator([])
    assert asyncio.run(keyless.caller_by_id(None, "127.0.0.1", NOW)) is ANONYMOUS
    with pytest.raises(AuthenticationError):
        asyncio.run(keyless.caller_by_id(key.id, "127.0.0.1", NOW))


OWN = "http://127.0.0.1:8000"
KEYLESS = OriginPolicy(is_keyless=True, allowed=frozenset({"https://App.example:443", "http://localhost:3000"}))
KEYED = replace(KEYLESS, is_keyless=False)


@pytest.mark.parametrize("policy", [KEYLESS, KEYED])
@pytest.mark.parametrize("is_websocket", [False, True])
def test_listed_origins_and_callers_that_are_no_page_are_answered(policy: OriginPolicy, is_websocket: bool) -> None:
    assert check_origin(None, OWN, policy, is_websocket=is_websocket) is None
    assert check_origin(OWN, OWN, policy, is_websocket=is_websocket) is None
    for listed in ("https://app.example", "https://app.example:443", "http://localhost:3000"):
        assert check_origin(listed, OWN, policy, is_websocket=is_websocket) == listed


FOREIGN = [
    "https://evil.example",
    "http://app.example",
    "https://app.example:444",
    "https://app.example.evil.example",
    "http://127.0.0.1:8001",
    "https://127.0.0.1:8000",
    "http://localhost:8000",
    "null",
    "",
    "*",
    "http://127.0.0.1:8000/",
    "http://127.0.0.1:8000@evil.example",
    "http://[zz]",
    "é" * 500,
]


@pytest.mark.parametrize("origin", FOREIGN)
def test_foreign_origins_are_refused_without_keys_and_on_websockets(origin: str) -> None:
    for policy, is_websocket in ((KEYLESS, False), (KEYLESS, True), (KEYED, True)):
        with pytest.raises(OriginError) as caught:
            check_origin(origin, OWN, policy, is_websocket=is_websocket)
        assert (caught.value.status, caught.value.code) == (403, "origin_not_allowed")
        assert len(caught.value.message) < 300
    assert check_origin(origin, OWN, KEYED) is None  # no CORS header: the browser keeps the answer from the page


@pytest.mark.parametrize("name", ["evil.example:8000", "unix", "[::ffff:192.0.2.1]", "192.0.2.1", "[::g]"])
def test_a_page_whose_name_was_pointed_at_loopback_is_foreign(name: str) -> None:
    with pytest.raises(OriginError):
        check_origin(f"http://{name}", f"http://{name}", KEYLESS)


@pytest.mark.parametrize("name", ["localhost", "LOCALHOST:8000", "[::1]:8000", "127.0.0.1:80"])
def test_the_own_page_under_a_loopback_name(name: str) -> None:
    assert check_origin(f"http://{name}".lower(), f"http://{name}", KEYLESS) is None


@pytest.mark.parametrize("entry", ["*", "null", "app.example", "https://app.example/", "https://a b", "ftp://a", ""])
def test_an_allow_list_holds_origins_only(entry: str) -> None:
    with pytest.raises(ValueError, match="CORS origin"):
        OriginPolicy(is_keyless=False, allowed=frozenset({entry}))


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("ipv4:192.0.2.1:4711", "192.0.2.1"),
        ("ipv6:[2001:db8::1]:4711", "2001:db8::1"),
        ("ipv6:%5B::1%5D:4711", "::1"),
        ("unix:/run/helios.sock", "unix"),
        ("unix:", "unix"),
        ("", ""),
    ],
)
def test_grpc_peers(peer: str, host: str) -> None:
    assert grpc_peer_host(peer) == host
