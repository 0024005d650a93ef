"""What all viewers of one job read once: how it stands, and its segments, both bounded. Knows keys, ages and sizes;
decides nothing about jobs and reads nothing by itself."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from helios_serve.api.jobs import JobSegment

K = TypeVar("K")
V = TypeVar("V")

Read = Callable[[], Coroutine[Any, Any, V]]

MAX_RECENT = 1024


class InFlight(Generic[K, V]):
    """Reads of one key at the same time are one. It goes on when who began it leaves."""

    def __init__(self) -> None:
        self._tasks: dict[K, asyncio.Task[V]] = {}

    async def get(self, key: K, read: Read[V]) -> V:
        """Raises: what `read` raises, for everybody who waits for it."""
        task = self._tasks.get(key)
        if task is None:
            task = self._tasks[key] = asyncio.create_task(read())
            task.add_done_callback(lambda done: self._ended(key, done))
        return await asyncio.shield(task)

    def forget(self, key: K) -> None:
        """Who asks from now on gets a read that begins later."""
        self._tasks.pop(key, None)

    def _ended(self, key: K, task: asyncio.Task[V]) -> None:
        if self._tasks.get(key) is task:
            del self._tasks[key]
        if not task.cancelled():
            task.exception()  # those who waited may all have left


@dataclass(frozen=True, slots=True, kw_only=True)
class _Dated(Generic[V]):
    value: V
    mark: object
    begun_at: float


class Recent(Generic[V]):
    """Answers of the store by job, given again while they are young and nothing is known to have changed."""

    def __init__(self) -> None:
        self._reads: InFlight[tuple[str, str], _Dated[V]] = InFlight()
        self._kept: OrderedDict[tuple[str, str], _Dated[V]] = OrderedDict()

    async def get(self, tenant: str, job_id: str, read: Read[V], *, mark: object, max_age_s: float) -> V:
        """
        Args:
            mark: what this process knows of the job; another one makes an older answer worthless.
        """
        kept = self.kept(tenant, job_id, mark=mark, max_age_s=max_age_s)
        if kept is not None:
            return kept
        key = tenant, job_id
        found = await self._reads.get(key, lambda: self._read(key, mark, read))
        if found.mark != mark:  # begun before what is known now
            found = await self._read(key, mark, read)
        return found.value

    def kept(self, tenant: str, job_id: str, *, mark: object, max_age_s: float) -> V | None:
        """As `get`, without asking."""
        kept = self._kept.get((tenant, job_id))
        if kept is not None and kept.mark == mark and time.monotonic() - kept.begun_at < max_age_s:
            return kept.value
        return None

    def put(self, tenant: str, job_id: str, value: V, *, mark: object) -> None:
        """An answer that somebody else read just now."""
        self._keep((tenant, job_id), _Dated(value=value, mark=mark, begun_at=time.monotonic()))

    def forget(self, tenant: str, job_id: str) -> None:
        """The job's row has changed."""
        self._kept.pop((tenant, job_id), None)
        self._reads.forget((tenant, job_id))

    async def _read(self, key: tuple[str, str], mark: object, read: Read[V]) -> _Dated[V]:
        begun_at = time.monotonic()
        found = _Dated(value=await read(), mark=mark, begun_at=begun_at)
        self._keep(key, found)
        return found

    def _keep(self, key: tuple[str, str], found: _Dated[V]) -> None:
        kept = self._kept.get(key)
        if kept is not None and kept.begun_at > found.begun_at:
            return
        self._kept[key] = found
        self._kept.move_to_end(key)
        if len(self._kept) > MAX_RECENT:
            self._kept.popitem(last=False)


class SegmentCache:
    """Segments of jobs that are watched while they run, least recently used out first.

    Args:
        max_bytes: of all together.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._kept: OrderedDict[tuple[str, int], JobSegment] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def get(self, job_id: str, index: int) -> JobSegment | None:
        segment = self._kept.get((job_id, index))
        if segment is not None:
            self._kept.move_to_end((job_id, index))
        return segment

    def add(self, job_id: str, segment: JobSegment) -> None:
        self._drop((job_id, segment.index))
        self._kept[job_id, segment.index] = segment
        self._num_bytes += len(segment.media)
        while self._num_bytes > self._max_bytes:
            self._drop(next(iter(self._kept)))

    def forget(self, job_id: str) -> None:
        """Drops a job's segments."""
        for key in [key for key in self._kept if key[0] == job_id]:
            self._drop(key)

    def _drop(self, key: tuple[str, int]) -> None:
        segment = self._kept.pop(key, None)
        if segment is not None:
            self._num_bytes -= len(segment.media)
