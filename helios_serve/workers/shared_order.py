"""One device's work in one order: that of rank 0, on every rank of a group.

Knows names, ranks and threads; knows nothing of what the work is. What ranks exchange has no name, so they must come to
it in one order, while tasks reach each of them in an order of their own. At size 1 it is a queue.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from helios_serve.parallel.collectives import GroupBrokenError, RankGroup

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Turn:
    """What all ranks do next: the work of that name, or nothing, so that no rank loses patience; or they stop."""

    name: str | None = None
    stop: bool = False


class SharedOrder:
    """`run` belongs to one thread; the other methods to any.

    Args:
        ranks: this rank's place in its group.
    """

    def __init__(self, ranks: RankGroup) -> None:
        self._ranks = ranks
        self._changed = threading.Condition()
        self._waiting: dict[str, tuple[Callable[[], Any], Future[Any]]] = {}
        self._is_closing = False
        self._has_ended = False

    def submit(self, name: str, work: Callable[[], T]) -> Future[T]:
        """Lets `work` be done when its turn comes. Every rank is given work of every name, in any order.

        The future may hold what `work` raised, on one of several ranks a GroupBrokenError, as when `run` ends before.
        """
        future: Future[T] = Future()
        with self._changed:
            self._waiting[name] = (work, future)
            if self._has_ended:
                self._give_up()
            self._changed.notify_all()
        return future

    def close(self) -> None:
        """Ends `run` before the next turn, on all ranks if this is rank 0."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()

    def run(self) -> None:
        """One turn after the other, until rank 0 closes.

        Raises: GroupBrokenError when work failed on one of several ranks; RuntimeError when another rank is gone or
            silent; TimeoutError when work does not reach this rank.
        """
        try:
            self._take_turns()
        finally:
            with self._changed:
                self._has_ended = True
                self._give_up()

    def _take_turns(self) -> None:
        while True:
            turn = self._ranks.broadcast(self._next_turn() if self._ranks.rank == 0 else _Turn())
            if turn.stop:
                return
            if turn.name is not None:
                self._do(*self._take(turn.name))

    def _give_up(self) -> None:
        """Answers whoever waits."""
        for name, (_, future) in self._waiting.items():
            future.set_exception(GroupBrokenError(f"{name}: the group ended before its turn"))
        self._waiting.clear()

    def _next_turn(self) -> _Turn:
        """Rank 0's decision: the work that has waited longest. Waits for it, but never so long that others give up."""
        patience_s = None if self._ranks.size == 1 else self._ranks.timeout_s / 4
        with self._changed:
            self._changed.wait_for(lambda: self._is_closing or self._waiting, timeout=patience_s)
            return _Turn(name=next(iter(self._waiting), None), stop=self._is_closing)

    def _take(self, name: str) -> tuple[Callable[[], Any], Future[Any]]:
        """On other ranks work may still be on its way."""
        with self._changed:
            if not self._changed.wait_for(lambda: name in self._waiting, timeout=self._ranks.timeout_s):
                raise TimeoutError(f"{name} did not reach rank {self._ranks.rank}")
            return self._waiting.pop(name)

    def _do(self, work: Callable[[], Any], future: Future[Any]) -> None:
        try:
            future.set_result(work())
        except Exception as error:
            if self._ranks.size == 1:
                future.set_exception(error)
                return
            broken = GroupBrokenError(f"one of {self._ranks.size} ranks could not do its part: {error}")
            future.set_exception(broken)
            raise broken from error
