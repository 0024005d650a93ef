"""GPUs that are not there, joined as a test says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class FakeGpus:
    """nvlinks_each: between any two, None if nobody can tell; `between` has exceptions. apart: pairs without peer
    access."""

    count: int
    nvlinks_each: int | None = 0
    between: Mapping[tuple[int, int], int] = field(default_factory=dict)
    apart: frozenset[tuple[int, int]] = frozenset()
    gb_per_s: float = 25.0

    def can_access(self, first: int, second: int) -> bool:
        return (first, second) not in self.apart

    def nvlinks(self, first: int, second: int) -> int | None:
        return self.between.get((first, second), self.nvlinks_each)

    def nvlink_gb_per_s(self) -> float:
        return self.gb_per_s
