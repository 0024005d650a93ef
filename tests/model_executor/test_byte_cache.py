"""The cache against a naive model, and the promises its owners rely on."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios_serve.model_executor.byte_cache import ByteCache


@dataclass(frozen=True)
class Item:
    name: str
    num_bytes: int


def make_never() -> Item:
    raise AssertionError("made again although it is kept")


def test_a_kept_value_is_not_made_again() -> None:
    cache = ByteCache[Item](10)
    first = cache.get("a", lambda: Item("a", 4))
    assert cache.get("a", make_never) is first
    assert (len(cache), cache.num_bytes) == (1, 4)


def test_the_one_used_longest_ago_goes_first() -> None:
    cache = ByteCache[Item](10)
    for name in "ab":
        cache.get(name, lambda name=name: Item(name, 5))  # type: ignore[misc]
    cache.get("a", make_never)
    cache.get("c", lambda: Item("c", 5))
    assert cache.get("a", make_never).name == "a"
    assert cache.get("c", make_never).name == "c"
    assert cache.get("b", lambda: Item("b again", 5)).name == "b again"


def test_the_limit_itself_is_allowed_and_one_byte_more_is_not() -> None:
    cache = ByteCache[Item](10)
    cache.get("a", lambda: Item("a", 5))
    cache.get("b", lambda: Item("b", 5))
    assert len(cache) == 2
    cache.get("c", lambda: Item("c", 1))
    assert (len(cache), cache.num_bytes) == (2, 6)


def test_the_newest_is_kept_whatever_its_size() -> None:
    cache = ByteCache[Item](10)
    cache.get("a", lambda: Item("a", 5))
    cache.get("big", lambda: Item("big", 99))
    assert cache.get("big", make_never).num_bytes == 99
    assert (len(cache), cache.num_bytes) == (1, 99)
    cache.get("c", lambda: Item("c", 1))
    assert (len(cache), cache.num_bytes) == (1, 1)


def test_a_failed_make_leaves_the_cache_unchanged() -> None:
    cache = ByteCache[Item](10)
    cache.get("a", lambda: Item("a", 5))
    with pytest.raises(AssertionError):
        cache.get("b", make_never)
    assert (len(cache), cache.num_bytes) == (1, 5)
    assert cache.get("b", lambda: Item("b", 1)).name == "b"


def test_an_evicted_value_lives_as_long_as_its_owner() -> None:
    cache = ByteCache[Item](5)
    owned = cache.get("a", lambda: Item("a", 5))
    watch = weakref.ref(owned)
    cache.get("b", lambda: Item("b", 5))
    assert len(cache) == 1
    assert owned.name == "a"
    del owned
    gc.collect()
    assert watch() is None


@given(
    limit=st.integers(0, 12),
    sizes=st.lists(st.integers(0, 6), min_size=4, max_size=4),
    uses=st.lists(st.integers(0, 3), max_size=30),
)
def test_equals_a_naive_cache(limit: int, sizes: list[int], uses: list[int]) -> None:
    cache, naive = ByteCache[Item](limit), list[int]()
    for use in uses:
        made = []

        def make(use: int = use, made: list[int] = made) -> Item:
            made.append(use)
            return Item(str(use), sizes[use])

        assert cache.get(str(use), make).name == str(use)
        assert bool(made) == (use not in naive)
        naive = [other for other in naive if other != use] + [use]
        while made and len(naive) > 1 and sum(sizes[kept] for kept in naive) > limit:
            naive.pop(0)
        assert (len(cache), cache.num_bytes) == (len(naive), sum(sizes[kept] for kept in naive))
