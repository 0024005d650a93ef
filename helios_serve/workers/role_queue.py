"""The tasks of a role that runs in a thread, and the gate that lets due decodes go before the next step.

Knows order and counts; knows nothing of what the tasks are.
"""

from __future__ import annotations

import heapq
import threading
from typing import Generic, TypeVar

W = TypeVar("W")


class RoleQueue(Generic[W]):
    """Work that waits and work in progress, by task id: due work first, then in order of arrival. Any thread may use
    it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[tuple[bool, int, str]] = []
        self._work: dict[str, W] = {}
        self._task_ids: dict[str, None] = {}
        self._num_put = 0
        self._num_moves = 0
        self._is_closed = False

    def put(self, task_id: str, work: W, *, is_due: bool = False) -> None:
        with self._changed:
            self._num_put += 1
            heapq.heappush(self._waiting, (not is_due, self._num_put, task_id))
            self._work[task_id] = work
            self._task_ids[task_id] = None
            self._changed.notify()

    def take(self) -> W | None:
        """The next piece of work; waits for it. None when the queue was closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._waiting)
            if self._is_closed:
                return None
            self._num_moves += 1
            _, _, task_id = heapq.heappop(self._waiting)
            return self._work.pop(task_id)

    def done(self, task_id: str) -> None:
        """A taken task has been answered."""
        with self._changed:
            self._num_moves += 1
            del self._task_ids[task_id]

    def close(self) -> None:
        """Nothing more is taken; what waits is lost."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    @property
    def progress(self) -> int:
        """Grows whenever a task is taken or done."""
        return self._num_moves

    @property
    def task_ids(self) -> tuple[str, ...]:
        """Tasks that were put and are not done."""
        with self._changed:
            return tuple(self._task_ids)


class DueGate:
    """Closed while due work waits for the device or is on it. Any thread may use it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._due: set[str] = set()
        self._is_open = False

    def add(self, task_id: str) -> None:
        with self._changed:
            self._due.add(task_id)

    def remove(self, task_id: str) -> None:
        """The work of a task is off the device; harmless if it was never added."""
        with self._changed:
            self._due.discard(task_id)
            self._changed.notify_all()

    def wait(self) -> None:
        """Returns when no due work is left."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_open or not self._due)

    def open(self) -> None:
        """Lets everybody through from now on."""
        with self._changed:
            self._is_open = True
            self._changed.notify_all()
