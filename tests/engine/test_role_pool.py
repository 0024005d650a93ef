"""Order, slots, suspects and abandoned jobs of a role without state."""

from __future__ import annotations

import pytest

from helios_serve.engine.role_pool import PoolJob, RolePool
from helios_serve.types import EncodeTask
from tests.engine.simulation import video


def job(name: str, deadline: float = 0.0, *, is_suspect: bool = False) -> PoolJob:
    return PoolJob(
        request_id=name,
        name="encode",
        deadline=deadline,
        timeout_s=10.0,
        expected_s=2.0,
        make_task=lambda task_id: EncodeTask(task_id=task_id, request=video(name)),
        is_suspect=is_suspect,
    )


def given(pool: RolePool, now: float = 0.0) -> list[tuple[str, str]]:
    return [(group, item.request_id) for group, item in pool.assign(now)]


@pytest.fixture
def pool() -> RolePool:
    pool = RolePool(slots=2)
    pool.up("vae-0")
    pool.up("vae-1")
    return pool


def test_the_earliest_deadline_goes_first_and_the_emptiest_member_takes_it(pool: RolePool) -> None:
    for name, deadline in (("late", 9.0), ("early", 1.0), ("middle", 5.0)):
        pool.add(job(name, deadline))
    assert given(pool) == [("vae-0", "early"), ("vae-1", "middle"), ("vae-0", "late")]


def test_equal_deadlines_keep_their_order(pool: RolePool) -> None:
    for name in "abcd":
        pool.add(job(name, float("inf")))
    assert [name for _, name in given(pool)] == list("abcd")


def test_no_more_than_the_slots(pool: RolePool) -> None:
    for index in range(6):
        pool.add(job(f"r{index}"))
    assert len(given(pool)) == 4
    assert pool.num_waiting == 2
    assert pool.waiting_s == 4.0
    assert pool.finish("r0/encode.0") is not None
    assert given(pool) == [("vae-0", "r4")]


def test_a_suspect_runs_alone(pool: RolePool) -> None:
    pool.add(job("suspect", 0.0, is_suspect=True))
    for index in range(3):
        pool.add(job(f"r{index}", 1.0))
    assert given(pool) == [("vae-0", "suspect"), ("vae-1", "r0"), ("vae-1", "r1")]


def test_a_suspect_waits_for_an_empty_member(pool: RolePool) -> None:
    pool.add(job("a"))
    pool.add(job("b"))
    given(pool)
    pool.add(job("suspect", is_suspect=True))
    assert given(pool) == []
    pool.finish("a/encode.0")
    assert given(pool) == [("vae-0", "suspect")]


def test_a_lost_member_gives_its_jobs_back(pool: RolePool) -> None:
    pool.add(job("a"))
    given(pool)
    (lost,) = pool.lost("vae-0")
    assert lost.request_id == "a"
    assert pool.finish("a/encode.0") is None
    lost.attempt += 1
    pool.add(lost)
    assert given(pool) == [("vae-1", "a")]
    assert pool.finish("a/encode.0") is None, "the first attempt's answer is stale"
    assert pool.finish("a/encode.1") is lost


def test_abandoned_jobs_are_not_given_out_nor_given_back(pool: RolePool) -> None:
    pool.add(job("running"))
    given(pool)
    pool.add(job("waiting"))
    pool.abandon("running")
    pool.abandon("waiting")
    assert pool.num_waiting == 0
    assert given(pool) == []
    finished = pool.finish("running/encode.0")
    assert finished is not None
    assert finished.is_abandoned
    assert pool.is_idle


def test_a_member_that_takes_too_long_is_overdue(pool: RolePool) -> None:
    pool.add(job("a"))
    given(pool, now=100.0)
    assert pool.overdue(119.0) == []
    assert [group for group, _ in pool.overdue(121.0)] == ["vae-0"]
