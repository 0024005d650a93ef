"""Work that threads do for an event loop: results, errors, and callers that leave."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from helios_serve.store.in_thread import in_thread, in_turn


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as made:
        yield made


def test_results_and_errors_come_back(pool: ThreadPoolExecutor) -> None:
    def fail() -> int:
        raise KeyError("lost")

    async def run() -> None:
        assert await in_thread(pool, lambda: threading.current_thread() is not threading.main_thread())
        with pytest.raises(KeyError, match="lost"):
            await in_thread(pool, fail)

    asyncio.run(run())


@pytest.mark.parametrize("where", ["first", "then", "its work"])
def test_an_error_of_either_turn_comes_back(pool: ThreadPoolExecutor, where: str) -> None:
    def at(place: str) -> Callable[..., int]:
        def work(number: int = 1) -> int:
            if place == where:
                raise ValueError(place)
            return number + 1

        return work

    with ThreadPoolExecutor(1) as second:

        def then(number: int) -> Future[int]:
            return second.submit(at("its work"), at("then")(number))

        with pytest.raises(ValueError, match=where):
            asyncio.run(_in_turn(pool, at("first"), then))


async def _in_turn(pool: ThreadPoolExecutor, first: Callable[[], int], then: Callable[[int], Future[int]]) -> int:
    return await in_turn(pool, first, then)


def test_turns_follow_each_other(pool: ThreadPoolExecutor) -> None:
    with ThreadPoolExecutor(1) as second:
        assert asyncio.run(_in_turn(pool, lambda: 2, lambda two: second.submit(lambda: two + 3))) == 5


def test_what_has_begun_goes_on_and_what_waits_is_left_out(pool: ThreadPoolExecutor) -> None:
    begun, may_end, done = threading.Event(), threading.Event(), []

    def slow() -> None:
        begun.set()
        may_end.wait(10)
        done.append("begun")

    async def run() -> None:
        running = asyncio.create_task(in_thread(pool, slow))
        waiting = asyncio.create_task(in_thread(pool, lambda: done.append("waiting")))
        turn = asyncio.create_task(in_turn(pool, lambda: done.append("turn"), lambda _: Future[None]()))
        await asyncio.to_thread(begun.wait, 10)
        for task in (running, waiting, turn):
            task.cancel()
        await asyncio.wait((running, waiting, turn))
        may_end.set()
        await in_thread(pool, lambda: None)  # behind all of them
        assert done == ["begun"]

    asyncio.run(run())


def test_a_loop_that_has_ended_is_not_told(pool: ThreadPoolExecutor) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def slow() -> str:
        begun.set()
        may_end.wait(10)
        return "late"

    async def leave() -> None:
        task = asyncio.create_task(in_thread(pool, slow))
        await asyncio.to_thread(begun.wait, 10)
        task.cancel()

    asyncio.run(leave())
    may_end.set()
    pool.submit(lambda: None).result(10)  # the thread lives on
