"""A picture's columns over the ranks of an axis, for networks of 3x3 convolutions such as the VAE.

Knows latent columns, ghosts and frames; knows no layers and no weights. A rank holds neighbouring columns, at every
scale of the network, and one ghost column on each side of them. Before a convolution looks at the ghosts they are
filled: with what the neighbours hold there, with zeros at the sides of the picture. Between convolutions they hold
anything, and nothing but a ghost is ever computed from it. What needs whole frames is given to the ranks by frame.

Shape letters: B clips, C channels, T frames, H x W the grid at hand, w columns of one rank, g ghosts on one side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from helios_serve.parallel.collectives import ALONE, Axis
from helios_serve.parallel.shards import Shards, gather, shard


@dataclass(frozen=True, slots=True, kw_only=True)
class WidthShard:
    """This rank's columns of a picture. At size 1 they are all of them, there are no ghosts, and every method returns
    what it is given.

    axis: in the order of the columns, from the left. bounds: latent columns, running sums; rank r holds
    bounds[r]:bounds[r + 1], and `cell` times as many where a latent column is `cell` wide.
    """

    axis: Axis = ALONE
    bounds: tuple[int, ...] = (0, 0)

    @property
    def ghosts(self) -> int:
        """Columns on each side that belong to others."""
        return 0 if self.axis.size == 1 else 1

    def take(self, x: Tensor, cell: int = 1) -> Tensor:
        """(..., W) on each rank, the same -> its own columns and ghosts, (..., w + 2g); the ghosts are zeros."""
        if self.axis.size == 1:
            return x
        assert x.shape[-1] == cell * self.bounds[-1], f"{x.shape[-1]} columns: must be {cell * self.bounds[-1]}"
        start, stop = self.bounds[self.axis.rank : self.axis.rank + 2]
        return self.surround(x[..., cell * start : cell * stop])

    def surround(self, x: Tensor) -> Tensor:
        """(..., w) -> (..., w + 2g); the ghosts are zeros."""
        return F.pad(x, (self.ghosts, self.ghosts)) if self.ghosts else x

    def own(self, x: Tensor) -> Tensor:
        """(..., w + 2g) -> (..., w), a view. On a grid that was doubled one of two ghosts is left on each side."""
        return x[..., self.ghosts : -self.ghosts] if self.ghosts else x

    def gather(self, x: Tensor, cell: int = 1) -> Tensor:
        """(..., w) on each rank -> (..., W) on all."""
        if self.axis.size == 1:
            return x
        columns = Shards(((tuple(cell * bound for bound in self.bounds),),))
        return gather(x.movedim(-1, 0).contiguous(), columns, self.axis).movedim(0, -1)

    def fill(self, x: Tensor) -> None:
        """Writes the ghosts of x [B, C, T, H, w + 2]: one exchange with the neighbours."""
        if self.axis.size == 1:
            return
        left, right = self._exchange(x[..., 1].movedim(1, -1), x[..., -2].movedim(1, -1))
        x[..., 0] = left.movedim(-1, 1)
        x[..., -1] = right.movedim(-1, 1)

    def fill_windows(self, windows: Tensor) -> None:
        """Writes the ghosts of windows [B, T, H, w + 2, K, C], each of a frame and the K - 1 before it, oldest first.

        Only the frames themselves travel: the neighbours' earlier ones come from the windows before. In the first
        windows, what precedes the frames must be in place already, as it is when an earlier slab was filled.
        """
        if self.axis.size == 1:
            return
        newest = windows[..., -1, :]  # (B, T, H, w + 2, C)
        columns = self._exchange(newest[:, :, :, 1], newest[:, :, :, -2])
        num_frames, num_taps = windows.shape[1], windows.shape[-2]
        for place, column in zip((0, -1), columns, strict=True):
            for age in range(min(num_taps, num_frames)):
                windows[:, age:, :, place, num_taps - 1 - age] = column[:, : num_frames - age]

    def by_frame(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`function` of whole frames, shared out among the ranks: x [B, C, T, H, w + 2g] -> the same shape.

        Args:
            function: [1, C, F, H, W] -> the same shape, for any number of frames; frames do not depend on each other.
            x: with latent columns.
        """
        if self.axis.size == 1:
            return function(x)
        frames = self.own(x).movedim(1, -1).flatten(0, 1)  # (B*T, H, w, C)
        (cuts,) = shard(((len(frames),),), self.axis.size).bounds[0]
        whole = self._columns_to_frames(frames, cuts)
        if len(whole):
            whole = function(whole.movedim(-1, 0)[None])[0].movedim(0, -1)
        frames = self._frames_to_columns(whole, cuts)
        out = x.clone()
        self.own(out).copy_(frames.unflatten(0, (x.shape[0], -1)).movedim(-1, 1))
        return out

    def _exchange(self, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """The first and last own column -> those beyond them, the left neighbour's last and the right one's first.

        Columns go around in both directions, past the sides of the picture too, where zeros take their place.
        """
        axis, last_rank = self.axis, self.axis.size - 1
        backward = replace(axis, rank=last_rank - axis.rank, ranks=axis.ranks[::-1])
        first, last = first.contiguous(), last.contiguous()
        left, right = torch.empty_like(last), torch.empty_like(first)
        for transfer in (axis.rotate(last, left), backward.rotate(first, right)):
            transfer.wait()
        if axis.rank == 0:
            left.zero_()
        if axis.rank == last_rank:
            right.zero_()
        return left, right

    def _columns_to_frames(self, frames: Tensor, cuts: tuple[int, ...]) -> Tensor:
        """(F, H, w, C) on each rank -> its frames `cuts[r]:cuts[r + 1]` whole, (F/p, H, W, C)."""
        sent = self._blocks(frames, cuts)
        for block, (start, stop) in zip(sent, pairwise(cuts), strict=True):
            block[: stop - start, :, : frames.shape[2]] = frames[start:stop]
        received = self.axis.all_to_all(sent)
        num_own = cuts[self.axis.rank + 1] - cuts[self.axis.rank]
        widths = [stop - start for start, stop in pairwise(self.bounds)]
        return torch.cat([block[:num_own, :, :w] for block, w in zip(received, widths, strict=True)], dim=2)

    def _frames_to_columns(self, whole: Tensor, cuts: tuple[int, ...]) -> Tensor:
        """(F/p, H, W, C) on each rank -> its columns of all frames, (F, H, w, C)."""
        sent = self._blocks(whole, cuts)
        for block, (start, stop) in zip(sent, pairwise(self.bounds), strict=True):
            block[: len(whole), :, : stop - start] = whole[:, :, start:stop]
        received = self.axis.all_to_all(sent)
        width = self.bounds[self.axis.rank + 1] - self.bounds[self.axis.rank]
        counts = [stop - start for start, stop in pairwise(cuts)]
        return torch.cat([block[:count, :, :width] for block, count in zip(received, counts, strict=True)])

    def _blocks(self, like: Tensor, cuts: tuple[int, ...]) -> Tensor:
        """Room for what travels, one shape on all ranks; what is not written means nothing."""
        num_frames = max(stop - start for start, stop in pairwise(cuts))
        width = max(stop - start for start, stop in pairwise(self.bounds))
        shape = (self.axis.size, num_frames, like.shape[1], width, like.shape[3])
        return torch.empty(shape, dtype=like.dtype, device=like.device)


WHOLE = WidthShard()
"""All columns, on one rank."""


def shard_width(num_columns: int, axis: Axis) -> WidthShard:
    """Shards as even as can be of a picture that is `num_columns` latent columns wide.

    Raises: ValueError when there are fewer columns than ranks.
    """
    if axis.size == 1:
        return WHOLE
    if num_columns < axis.size:
        raise ValueError(f"{axis.size} ranks for {num_columns} latent columns: must be at most one for each")
    (bounds,) = shard(((num_columns,),), axis.size).bounds[0]
    return WidthShard(axis=axis, bounds=bounds)
