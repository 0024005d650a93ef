"""The ranks of one DiT group and what they tell each other.

Knows ranks, sizes, time-outs and tensors; knows no nouns. Small decisions travel as pickled objects between all ranks
(RankGroup), rows of tensors along one axis of the mesh (Axis). Every collective is the identity at size 1.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

TIMEOUT_S = 30.0
"""Patience with another rank, in seconds; after it the group is beyond repair."""


class GroupBrokenError(RuntimeError):
    """A rank has left a forward that the others are in, or never entered it: only a new group helps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankGroup:
    """This process's place in a group. With more than one rank the default process group must exist.

    ranks_per_node: so many ranks in a row share a node; None if all do.
    """

    rank: int = 0
    size: int = 1
    timeout_s: float = TIMEOUT_S
    ranks_per_node: int | None = None

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
        """Leaves the group, and every axis made of it. The others hear of it once nobody here refers to these axes."""
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


def connect_torchrun(timeout_s: float = TIMEOUT_S) -> RankGroup:
    """Meets the processes that torchrun started together with this one, as it says in their environment; without
    torchrun a process is alone. Where there are GPUs, the calling thread takes the one of its place on its node.

    Raises: RuntimeError when the others do not come in time.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return RankGroup()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo", init_method="env://", timeout=timedelta(seconds=timeout_s))
    return RankGroup(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        timeout_s=timeout_s,
        ranks_per_node=int(os.environ["LOCAL_WORLD_SIZE"]),
    )


class Waitable(Protocol):
    """`dist.Work`, or what behaves like it."""

    def wait(self) -> object: ...


@dataclass(frozen=True, slots=True)
class Transfer:
    """Rows on their way between two ranks. Both tensors belong to it until `wait` returns."""

    works: tuple[Waitable, ...] = ()

    def wait(self) -> None:
        """Until what was received may be read and what was sent may be overwritten: by the host on CPU, by what is
        launched from now on on a GPU.

        Raises: RuntimeError when the other rank is gone.
        """
        for work in self.works:
            work.wait()


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """Ranks that exchange rows of tensors, and this process's place among them.

    ranks: their ranks in the default process group, in the order of the axis. group: theirs; None at size 1.
    """

    rank: int = 0
    ranks: tuple[int, ...] = (0,)
    group: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        return len(self.ranks)

    def meet(self, device: torch.device) -> None:
        """Hears once from every rank, so that the first exchange does not wait for links to be made.

        Raises: RuntimeError when a rank cannot be reached.
        """
        met = self.all_gather(torch.tensor([self.rank], device=device)).tolist()
        assert met == list(range(self.size)), f"ranks {met}: not in the order of their axis"

    def all_to_all(self, blocks: Tensor) -> Tensor:
        """(p, ...) with block i for rank i -> (p, ...) with block i from rank i. Contiguous, one shape on all ranks."""
        if self.size == 1:
            return blocks
        received = torch.empty_like(blocks)
        self.begin_all_to_all(blocks, received).wait()
        return received

    def begin_all_to_all(self, sent: Tensor, received: Tensor) -> Transfer:
        """Begins `all_to_all`, for more than one rank. Exchanges end in the order in which they begin."""
        work = dist.all_to_all_single(received, sent, group=self.group, async_op=True)
        assert work is not None
        return Transfer((work,))

    def all_gather(self, block: Tensor) -> Tensor:
        """(N, ...) on each rank -> (p * N, ...) on all. Contiguous, one shape on all ranks."""
        if self.size == 1:
            return block
        gathered = torch.empty((self.size * len(block), *block.shape[1:]), dtype=block.dtype, device=block.device)
        dist.all_gather(list(gathered.split(len(block))), block, group=self.group)
        return gathered

    def rotate(self, sent: Tensor, received: Tensor) -> Transfer:
        """Begins to send a tensor to the next rank and to receive the previous one's. Contiguous, of one shape on all
        ranks; at size 1 nothing is received."""
        if self.size == 1:
            return Transfer()
        following, previous = self.ranks[(self.rank + 1) % self.size], self.ranks[self.rank - 1]
        steps = [
            dist.P2POp(dist.isend, sent, following, self.group),
            dist.P2POp(dist.irecv, received, previous, self.group),
        ]
        return Transfer(tuple(dist.batch_isend_irecv(steps)))


ALONE = Axis()
"""The axis of one rank."""


def backend_of(device: torch.device) -> str:
    """What carries tensors of a device: nccl for GPUs, gloo for CPUs."""
    return "nccl" if device.type == "cuda" else "gloo"


def make_axis(lines: Sequence[Sequence[int]], rank: int, backend: str, timeout_s: float = TIMEOUT_S) -> Axis:
    """The axis on whose line `rank` stands. All ranks of the default process group call it at the same time.

    Args:
        lines: ranks that exchange with each other; every rank is on one line, all lines are of one length.
        backend: gloo for CPU, nccl for GPUs.
    """
    own = Axis(ranks=(rank,))
    for line in lines:
        group = None
        if len(line) > 1:
            group = dist.new_group(list(line), timeout=timedelta(seconds=timeout_s), backend=backend)
        if rank in line:
            own = Axis(rank=line.index(rank), ranks=tuple(line), group=group)
    return own
