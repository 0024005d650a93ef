"""A least-recently-used cache with a byte limit. Knows keys and sizes; knows nothing of what it keeps.

Keys name content, never an address: memory is reused, content is not. A value in use stays alive through its owner's
reference even after it was evicted. One thread uses a cache.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """A value that knows its size."""

    @property
    def num_bytes(self) -> int: ...


V = TypeVar("V", bound=Sized)


class ByteCache(Generic[V]):
    """Keeps the values used last, together at most `limit_bytes` (the newest is kept whatever its size)."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._values: OrderedDict[str, V] = OrderedDict()
        self._num_bytes = 0

    def get(self, key: str, make: Callable[[], V]) -> V:
        """The value of `key`, made by `make` if it is not kept."""
        found = self._values.get(key)
        if found is not None:
            self._values.move_to_end(key)
            return found
        made = make()
        self._values[key] = made
        self._num_bytes += made.num_bytes
        while self._num_bytes > self._limit_bytes and len(self._values) > 1:
            _, evicted = self._values.popitem(last=False)
            self._num_bytes -= evicted.num_bytes
        return made

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def __len__(self) -> int:
        return len(self._values)
