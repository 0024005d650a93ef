"""Projected prompts within a byte limit. Knows keys, sizes and who uses what; knows nothing of tensors' contents.

Keys name content, never an address. A prompt in use is pinned: it stays whatever the limit is, so that another user
finds it, and the addresses that a packed step reads stay good. One thread uses a pool.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from helios_serve.model_executor.packing import TextKV


@dataclass(slots=True)
class _Entry:
    text: TextKV
    num_users: int


class TextPool:
    """Keeps the prompts used last, together at most `limit_bytes` but for those in use and the one used last."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._num_bytes = 0

    def acquire(self, key: str, make: Callable[[], TextKV]) -> TextKV:
        """The prompt of `key`, made by `make` if it is not kept; it stays until it was released as often."""
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Entry(text=make(), num_users=0)
            self._num_bytes += entry.text.num_bytes
        entry.num_users += 1
        self._entries.move_to_end(key)
        self._evict()
        return entry.text

    def release(self, key: str) -> None:
        """Ends one use."""
        entry = self._entries[key]
        assert entry.num_users > 0
        entry.num_users -= 1
        self._evict()

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def __len__(self) -> int:
        return len(self._entries)

    def _evict(self) -> None:
        """Drops what nobody uses, least recently used first, until the rest fits."""
        last = next(reversed(self._entries))
        idle = [key for key, entry in self._entries.items() if entry.num_users == 0 and key != last]
        for key in idle:
            if self._num_bytes <= self._limit_bytes:
                return
            self._num_bytes -= self._entries.pop(key).text.num_bytes
