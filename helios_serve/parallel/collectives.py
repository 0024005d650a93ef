"""The ranks of one DiT group and what they tell each other.

Knows ranks, sizes and time-outs; knows no nouns. Until context parallelism every rank of a group computes the whole
forward, so that small decisions are all that travels.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

TIMEOUT_S = 30.0
"""Patience with another rank, in seconds; after it the group is beyond repair."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankGroup:
    """This process's place in a group. With more than one rank the default process group must exist."""

    rank: int = 0
    size: int = 1
    timeout_s: float = TIMEOUT_S

    def broadcast(self, value: T) -> T:
        """Rank 0's value on every rank; the identity at size 1. What the other ranks pass is ignored.

        For small Python objects: they are pickled, and every rank waits for rank 0.

        Raises: RuntimeError when a rank is gone, or rank 0 says nothing for `timeout_s`.
        """
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def close(self) -> None:
        """Leaves the group."""
        if self.size > 1:
            dist.destroy_process_group()


def connect(rank: int, size: int, address: str, timeout_s: float = TIMEOUT_S) -> RankGroup:
    """Meets the other ranks of a group, and waits for them.

    Args:
        address: where they meet, `tcp://host:port` of rank 0 or `file:///path` of a new file.
        timeout_s: of this meeting and of each broadcast.
    """
    if size > 1:
        timeout = timedelta(seconds=timeout_s)
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=size, timeout=timeout)
    return RankGroup(rank=rank, size=size, timeout_s=timeout_s)
