"""Which rows of a packed batch each rank holds, and in which order they stand once they meet again.

Knows lengths and ranks; knows nothing of heads or networks. A sequence is made of components (its history, its current
tokens), each of which is sharded by itself: sharding their concatenation would give all current tokens to the last
ranks, and cross-attention, which runs for those alone, to nobody else. A rank's rows stand request-major, and within a
request in the order of the components, as those of the whole pack do.

Shards of a component differ by one row at most, and so do all rows of two ranks. Blocks of one size travel, so a rank
that holds a row less sends a pad at the tail of its block; nobody reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from helios_serve.parallel.collectives import Axis

Lengths = tuple[tuple[int, ...], ...]
"""Rows of each component of each sequence."""


@dataclass(frozen=True, slots=True)
class Shards:
    """bounds[sequence][component]: running sums, p + 1 of them; rank r holds rows bounds[r]:bounds[r + 1]."""

    bounds: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def num_ranks(self) -> int:
        return len(self.bounds[0][0]) - 1

    def of_rank(self, rank: int) -> tuple[tuple[slice, ...], ...]:
        """The rows of each component of each sequence that a rank holds."""
        return tuple(tuple(slice(bound[rank], bound[rank + 1]) for bound in components) for components in self.bounds)

    def num_rows(self, rank: int) -> int:
        return sum(part.stop - part.start for parts in self.of_rank(rank) for part in parts)

    @property
    def max_rows(self) -> int:
        """The rows of a block that travels: the most that any rank holds."""
        return max(self.num_rows(rank) for rank in range(self.num_ranks))

    def only(self, component: int) -> Shards:
        """The shards of one component of every sequence."""
        return Shards(tuple((components[component],) for components in self.bounds))

    def cu_rows(self, first: int, stop: int) -> tuple[int, ...]:
        """Running sums over the sequences of the rows that ranks first:stop hold together."""
        rows = (sum(bound[stop] - bound[first] for bound in components) for components in self.bounds)
        return (0, *accumulate(rows))

    def places(self, first: int, stop: int, stride: int) -> Tensor:
        """Where to find the rows of ranks first:stop in the order of the whole pack, when each of these ranks wrote
        what it holds to the beginning of a block of `stride` rows: [rows] int64 on the host."""
        at = [stride * block for block in range(stop - first)]
        runs = [torch.empty(0, dtype=torch.int64)]
        for bound in (bound for components in self.bounds for bound in components):
            for block, (start, end) in enumerate(pairwise(bound[first : stop + 1])):
                runs.append(torch.arange(at[block], at[block] + end - start))
                at[block] += end - start
        return torch.cat(runs)


@lru_cache(maxsize=256)
def shard(lengths: Lengths, num_ranks: int) -> Shards:
    """Cuts each component into shards as even as can be. Rows that are left over go to one rank after the other,
    across components and sequences, so that no rank gathers them."""
    bounds: list[tuple[tuple[int, ...], ...]] = []
    spare = 0  # the rank that is next to take a row more
    for components in lengths:
        cut = []
        for length in components:
            even, rest = divmod(length, num_ranks)
            takers = {(spare + index) % num_ranks for index in range(rest)}
            spare = (spare + rest) % num_ranks
            cut.append((0, *accumulate(even + (rank in takers) for rank in range(num_ranks))))
        bounds.append(tuple(cut))
    return Shards(tuple(bounds))


@lru_cache(maxsize=256)
def share(lengths: Lengths, num_ranks: int) -> Shards:
    """Gives whole sequences to ranks, the longest first, each to the rank that has the fewest rows: for the two
    sequences of guidance. With fewer sequences than ranks some rank holds none."""
    loads, owners = [0] * num_ranks, [0] * len(lengths)
    for index in sorted(range(len(lengths)), key=lambda index: -sum(lengths[index])):
        owners[index] = min(range(num_ranks), key=loads.__getitem__)
        loads[owners[index]] += sum(lengths[index])
    return Shards(
        tuple(
            tuple((0,) * (owner + 1) + (length,) * (num_ranks - owner) for length in components)
            for owner, components in zip(owners, lengths, strict=True)
        )
    )


def take(rows: Sequence[Sequence[Tensor]], shards: Shards, rank: int) -> Tensor:
    """What a rank holds of a pack, given rows [N, ...] of each component of each sequence."""
    return torch.cat(
        [
            component[part]
            for components, parts in zip(rows, shards.of_rank(rank), strict=True)
            for component, part in zip(components, parts, strict=True)
        ]
    )


def gather(rows: Tensor, shards: Shards, axis: Axis) -> Tensor:
    """(N/p, ...) on each rank -> (N, ...) on all, in the order of the whole pack."""
    if axis.size == 1:
        return rows
    block = torch.empty((shards.max_rows, *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
    block[: len(rows)] = rows
    return axis.all_gather(block).index_select(0, _gather_places(shards, rows.device))


@lru_cache(maxsize=256)
def _gather_places(shards: Shards, device: torch.device) -> Tensor:
    return upload(shards.places(0, shards.num_ranks, shards.max_rows), device)


def upload(host: Tensor, device: torch.device) -> Tensor:
    """Copies a host tensor to the device without waiting for it."""
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)
