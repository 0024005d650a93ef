"""Work of one pool of threads and then of another, for which the event loop is woken once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import TypeVar

A = TypeVar("A")
T = TypeVar("T")


async def in_turn(pool: Executor, first: Callable[[], A], then: Callable[[A], Future[T]]) -> T:
    """What the work gives that `then` begins with the result of `first`; both are called in a thread of `pool`. It goes
    on when its caller leaves.

    Raises: whatever `first`, `then` and its work raise.
    """
    answer: Future[T] = Future()
    pool.submit(_begin, first, then, answer)
    return await asyncio.wrap_future(answer)


def _begin(first: Callable[[], A], then: Callable[[A], Future[T]], answer: Future[T]) -> None:
    if not answer.set_running_or_notify_cancel():
        return
    try:
        begun = then(first())
    except BaseException as error:
        answer.set_exception(error)
    else:
        begun.add_done_callback(lambda done: _hand_over(done, answer))


def _hand_over(done: Future[T], answer: Future[T]) -> None:
    try:
        result = done.result()
    except BaseException as error:
        answer.set_exception(error)
    else:
        answer.set_result(result)
