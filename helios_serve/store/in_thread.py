"""Work in threads that the event loop waits for, woken once for each.

asyncio lets a thread's future and one of the loop watch each other, with locks and callbacks that cost more than the
hand-over itself; here the thread settles the loop's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import suppress
from typing import Generic, TypeVar

A = TypeVar("A")
T = TypeVar("T")


async def in_thread(pool: Executor, work: Callable[[], T]) -> T:
    """The result of `work`, called in a thread of `pool`; not at all if its caller has left by then.

    Raises: whatever `work` raises.
    """
    answer: _Answer[T] = _Answer()
    pool.submit(answer.settle, work)
    return await answer.future


async def in_turn(pool: Executor, first: Callable[[], A], then: Callable[[A], Future[T]]) -> T:
    """What the work gives that `then` begins with the result of `first`; both are called in a thread of `pool`. Begun,
    it goes on when its caller leaves.

    Raises: whatever `first`, `then` and its work raise.
    """
    answer: _Answer[T] = _Answer()
    pool.submit(_begin, first, then, answer)
    return await answer.future


def _begin(first: Callable[[], A], then: Callable[[A], Future[T]], answer: _Answer[T]) -> None:
    if answer.future.cancelled():
        return
    try:
        begun = then(first())
    except BaseException as error:
        answer.fail(error)
    else:
        begun.add_done_callback(lambda done: answer.settle(done.result))


class _Answer(Generic[T]):
    """A future of the running loop that a thread settles. Made without its type: a generic with one is slow to call."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.future: asyncio.Future[T] = self._loop.create_future()

    def settle(self, work: Callable[[], T]) -> None:
        """With what `work` returns or raises."""
        if self.future.cancelled():
            return
        try:
            result = work()
        except BaseException as error:
            self.fail(error)
        else:
            self._call(self.future.set_result, result)

    def fail(self, error: BaseException) -> None:
        """With an error."""
        self._call(self.future.set_exception, error)

    def _call(self, settle: Callable[[A], None], value: A) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._unless_cancelled, settle, value)

    def _unless_cancelled(self, settle: Callable[[A], None], value: A) -> None:
        if not self.future.cancelled():
            settle(value)
