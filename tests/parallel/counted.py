"""A mesh that sends nothing and notes what it would send, for tensors without memory."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from helios_serve.parallel.collectives import Axis, Transfer
from helios_serve.parallel.mesh import Degrees, Mesh


@dataclass(frozen=True, slots=True, kw_only=True)
class CountedAxis(Axis):
    """Sends nothing, and notes the bytes that would have left this rank in each call."""

    sent: list[int] = field(default_factory=list, compare=False)

    def begin_all_to_all(self, sent: Tensor, received: Tensor) -> Transfer:
        assert sent.shape == received.shape
        self.sent.append(sent.nbytes // self.size * (self.size - 1))
        return Transfer()

    def all_gather(self, block: Tensor) -> Tensor:
        self.sent.append(block.nbytes * (self.size - 1))
        return block.new_empty((self.size * len(block), *block.shape[1:]))

    def rotate(self, sent: Tensor, received: Tensor) -> Transfer:
        assert sent.shape == received.shape
        self.sent.append(sent.nbytes)
        return Transfer()


def counted_mesh(degrees: Degrees, rank: int = 0) -> Mesh:
    """The place of a rank. Ulysses is innermost, the halves of guidance outermost."""
    both = degrees.ring * degrees.ulysses
    place = rank % both

    def axis(own: int, size: int) -> CountedAxis:
        return CountedAxis(rank=own, ranks=tuple(range(size)))

    return Mesh(
        cfg=axis(rank // both, degrees.cfg),
        ring=axis(place // degrees.ulysses, degrees.ring),
        ulysses=axis(place % degrees.ulysses, degrees.ulysses),
        tokens=axis(place, both),
    )


def sent_by(axis: Axis) -> list[int]:
    assert isinstance(axis, CountedAxis)
    return axis.sent
