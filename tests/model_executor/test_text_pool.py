"""The pool of projected prompts: what stays, what goes, and that nothing goes that is in use."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from helios_serve.model_executor.packing import TextKV
from helios_serve.model_executor.text_pool import TextPool

ROW_BYTES = 2 * 4  # one key and one value of one float32


def text_of(num_rows: int) -> TextKV:
    rows = torch.zeros(1, num_rows, 1, 1)
    return TextKV(keys=rows, values=rows.clone())


class Maker:
    """Makes prompts of as many rows as their names say, and counts."""

    def __init__(self, pool: TextPool) -> None:
        self.pool = pool
        self.made: list[str] = []

    def acquire(self, key: str) -> TextKV:
        def make() -> TextKV:
            self.made.append(key)
            return text_of(int(key.split("-")[1]))

        return self.pool.acquire(key, make)


def test_a_kept_prompt_is_made_once() -> None:
    maker = Maker(TextPool(100 * ROW_BYTES))
    first = maker.acquire("fox-10")
    assert maker.acquire("fox-10") is first
    maker.pool.release("fox-10")
    maker.pool.release("fox-10")
    assert maker.acquire("fox-10") is first
    assert maker.made == ["fox-10"]
    assert maker.pool.num_bytes == 10 * ROW_BYTES


def test_the_least_recently_used_goes_first() -> None:
    maker = Maker(TextPool(30 * ROW_BYTES))
    for key in ("a-10", "b-10", "c-10", "a-10", "d-10"):
        maker.acquire(key)
        maker.pool.release(key)
    for key in ("a-10", "c-10", "d-10"):
        maker.acquire(key)
    assert maker.made == ["a-10", "b-10", "c-10", "d-10"]
    maker.acquire("b-10")
    assert maker.made.count("b-10") == 2


def test_what_is_in_use_stays_beyond_the_limit_and_goes_when_released() -> None:
    maker = Maker(TextPool(15 * ROW_BYTES))
    held = [maker.acquire(key) for key in ("a-10", "b-10", "c-10")]
    assert maker.pool.num_bytes == 30 * ROW_BYTES
    assert [maker.acquire(key) for key in ("a-10", "b-10", "c-10")] == held
    for key in ("a-10", "b-10"):
        maker.pool.release(key)
    assert len(maker.pool) == 3  # each has another user
    for key in ("a-10", "b-10"):
        maker.pool.release(key)
    assert len(maker.pool) == 1
    assert maker.made == ["a-10", "b-10", "c-10"]


def test_a_prompt_larger_than_the_pool_is_served_and_kept_until_the_next() -> None:
    maker = Maker(TextPool(0))
    for key in ("a-10", "a-10", "b-5"):
        maker.acquire(key)
        maker.pool.release(key)
    assert maker.made == ["a-10", "b-5"]
    assert maker.pool.num_bytes == 5 * ROW_BYTES


def test_a_prompt_that_cannot_be_made_leaves_nothing() -> None:
    pool = TextPool(100)

    def fail() -> TextKV:
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        pool.acquire("a", fail)
    assert (len(pool), pool.num_bytes) == (0, 0)
    assert pool.acquire("a", lambda: text_of(3)).num_tokens == 3


def test_releasing_more_often_than_acquiring_is_a_fault() -> None:
    maker = Maker(TextPool(100))
    maker.acquire("a-1")
    maker.pool.release("a-1")
    with pytest.raises(AssertionError):
        maker.pool.release("a-1")


@pytest.mark.parametrize("seed", range(5))
def test_under_load_pins_and_limit_hold(seed: int) -> None:
    """Random users; what one holds is always what another finds, and the limit is broken by pins alone."""
    rng, limit = random.Random(seed), 60 * ROW_BYTES
    maker = Maker(TextPool(limit))
    keys = [f"{name}-{rng.randint(1, 20)}" for name in range(20)]
    users: Counter[str] = Counter()
    held: dict[str, TextKV] = {}
    for _ in range(2000):
        in_use = [key for key, count in users.items() if count]
        if in_use and rng.random() < 0.5 + 0.05 * (len(in_use) - 5):
            key = rng.choice(in_use)
            maker.pool.release(key)
            users[key] -= 1
        else:
            key = rng.choice(keys)
            text = maker.acquire(key)
            assert not users[key] or text is held[key]
            held[key] = text
            users[key] += 1
        pinned = sum(int(key.split("-")[1]) for key, count in users.items() if count) * ROW_BYTES
        assert pinned <= maker.pool.num_bytes <= max(limit, pinned + 20 * ROW_BYTES)
    assert len(keys) < len(maker.made) < 1500
