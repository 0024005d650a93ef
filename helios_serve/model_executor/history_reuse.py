"""Keys and values of a chunk's history, kept from its first forward for the later ones: an approximation.

History tokens attend to the current ones, so their keys and values change from step to step; this takes them as if they
did not. Later forwards of the chunk then have current tokens alone. Knows keys, values and where sequences stand in a
pack; knows nothing of steps, chunks or requests. Shape letters: N tokens, Nh history tokens, H heads, Dh head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from helios_serve.parallel.shards import Shards


class HistoryKV:
    """What one sequence keeps in one chunk, on one rank. Mutable: a forward writes it layer by layer, its owner seals
    it when that forward has succeeded, and from then on forwards read it.

    Args:
        num_layers: of the transformer.
        memory: for keys and values, each [layers, Nh, H, Dh]; it makes its own if that is None or of another shape.

    `bound`: running sums over the ranks of the history rows that each one holds; None before the first forward.
    """

    def __init__(self, num_layers: int, memory: tuple[Tensor, Tensor] | None = None) -> None:
        self._num_layers = num_layers
        self._stored = memory
        self.bound: tuple[int, ...] | None = None
        self.is_sealed = False

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Keeps a copy of one layer's [Nh, H, Dh] each, normed and rotated."""
        assert not self.is_sealed
        shape = (self._num_layers, *k.shape)
        if self._stored is None or self._stored[0].shape != shape:
            self._stored = k.new_empty(shape), v.new_empty(shape)
        keys, values = self._stored
        keys[layer].copy_(k)
        values[layer].copy_(v)

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """What `write` was given."""
        assert self.is_sealed
        assert self._stored is not None
        keys, values = self._stored
        return keys[layer], values[layer]

    def seal(self) -> None:
        """The forward that wrote it has succeeded."""
        assert self._stored is not None
        self.is_sealed = True

    def standing_in(self, memory: tuple[Tensor, Tensor]) -> HistoryKV:
        """Another one in the same state, whose keys and values are in `memory`."""
        other = HistoryKV(self._num_layers, memory)
        other.bound, other.is_sealed = self.bound, self.is_sealed
        return other

    def copy_from(self, other: HistoryKV) -> None:
        """Has all that the other one has, in memory of its own."""
        assert other._stored is not None
        if self._stored is None or self._stored[0].shape != other._stored[0].shape:
            keys, values = other._stored
            self._stored = torch.empty_like(keys), torch.empty_like(values)
        for own, theirs in zip(self._stored, other._stored, strict=True):
            own.copy_(theirs)

    @property
    def num_rows(self) -> int:
        """Nh, 0 before the first forward."""
        return 0 if self._stored is None else self._stored[0].shape[1]

    @property
    def num_bytes(self) -> int:
        return 0 if self._stored is None else sum(each.nbytes for each in self._stored)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedHistoryKV:
    """What the sequences of a pack keep, and how many history and current rows each has in this rank's packed stream; a
    sequence whose history is kept has none of it there."""

    kept: tuple[HistoryKV | None, ...]
    rows: tuple[tuple[int, int], ...]

    def complete(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the whole pack from those of the packed stream, each [N, H, Dh]: kept history goes before
        the current rows of its sequence, and what is to be kept is copied."""
        parts: list[tuple[Tensor, Tensor]] = []
        at = 0
        for kept, (num_history, num_current) in zip(self.kept, self.rows, strict=True):
            end = at + num_history + num_current
            if kept is not None and kept.is_sealed:
                parts.append(kept.read(layer))
            elif kept is not None:
                kept.write(layer, k[at : at + num_history], v[at : at + num_history])
            parts.append((k[at:end], v[at:end]))
            at = end
        if len(parts) == len(self.rows):
            return k, v
        return torch.cat([keys for keys, _ in parts]), torch.cat([values for _, values in parts])


def pack_history_kv(
    kept: Sequence[HistoryKV | None], stream: Shards, rank: int
) -> tuple[PackedHistoryKV | None, Shards]:
    """What a pack keeps, None if nothing, and where the keys of its self-attention stand.

    Args:
        kept: of each sequence.
        stream: history and current rows of the packed stream. Kept history stays on the ranks where it was computed,
            whatever the pack of a later step would have given them.
    """
    if not any(kept):
        return None, stream
    bounds = []
    for each, (past, now) in zip(kept, stream.bounds, strict=True):
        if each is not None and not each.is_sealed:
            each.bound = past
        bounds.append((past if each is None or each.bound is None else each.bound, now))
    rows = tuple((past.stop - past.start, now.stop - now.start) for past, now in stream.of_rank(rank))
    return PackedHistoryKV(kept=tuple(kept), rows=rows), Shards(tuple(bounds))
