"""An all-to-all in which each rank writes into the memory of the others, instead of sending.

Knows blocks, slots and PyTorch's symmetric memory; knows nothing of heads. What lies where is as with
`Axis.all_to_all`, byte for byte. On GPUs it runs on a stream of its own.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from helios_serve.parallel.collectives import Axis, Transfer

logger = logging.getLogger(__name__)

_NUM_SLOTS = 2
_ALIGNMENT = 256  # bytes


class SharedMemory(Protocol):
    """As much memory of every rank, which all ranks reach: the part of torch's `_SymmetricMemory` that is used."""

    def get_buffer(
        self, rank: int, sizes: tuple[int, ...], dtype: torch.dtype, storage_offset: int | None = 0
    ) -> Tensor:
        """A view of that rank's memory; the offset counts elements of the type."""

    def barrier(self, channel: int = 0) -> None:
        """On a GPU's stream: what comes behind it waits for what every rank queued before it."""


Rendezvous = Callable[[int], SharedMemory]
"""Shares so many bytes; all ranks call it at the same time."""


class PeerBlocks:
    """Room for blocks of every rank in every rank's memory, in two slots that exchanges use in turn. An exchange may
    write into a slot as soon as the one before has passed its barrier: by then every rank has read what the slot held.

    Args:
        rendezvous: called again for larger blocks.
    """

    def __init__(self, rank: int, size: int, rendezvous: Rendezvous) -> None:
        self._rank, self._size, self._rendezvous = rank, size, rendezvous
        self._slot_bytes, self._num_exchanges = 0, 0
        self._memory: SharedMemory | None = None

    def exchange(self, sent: Tensor, received: Tensor) -> None:
        """(p, ...) with block i for rank i -> (p, ...) with block i from rank i."""
        memory = self._room_for(sent.nbytes)
        offset = self._num_exchanges % _NUM_SLOTS * self._slot_bytes // sent.itemsize
        self._num_exchanges += 1
        for step in range(self._size):
            peer = (self._rank + step) % self._size  # not all at once to the same
            memory.get_buffer(peer, sent.shape, sent.dtype, offset)[self._rank].copy_(sent[peer])
        memory.barrier()
        received.copy_(memory.get_buffer(self._rank, sent.shape, sent.dtype, offset))

    def _room_for(self, num_bytes: int) -> SharedMemory:
        """Blocks have one size on all ranks, so that all make room at the same time."""
        if self._memory is None or num_bytes > self._slot_bytes:
            if self._memory is not None:
                self._memory.barrier()  # nobody writes into it any more
            self._slot_bytes = math.ceil(num_bytes / _ALIGNMENT) * _ALIGNMENT
            self._memory = self._rendezvous(_NUM_SLOTS * self._slot_bytes)
        return self._memory


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerAxis(Axis):
    """Ranks whose all-to-all goes through shared memory; all else is as on any axis. stream: None on a CPU, where an
    exchange is over when it has begun."""

    blocks: PeerBlocks
    stream: torch.cuda.Stream | None = None

    def begin_all_to_all(self, sent: Tensor, received: Tensor) -> Transfer:
        if self.stream is None:
            self.blocks.exchange(sent, received)
            return Transfer()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.blocks.exchange(sent, received)
        return Transfer((_StreamWork(self.stream.record_event()),))


class _StreamWork:
    """Waits on the stream that is current, as NCCL's work does; the host goes on."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self._event)


def with_peer_memory(axis: Axis, device: torch.device) -> Axis:
    """The axis with its all-to-all through symmetric memory; as it is, and a line in the log, where torch offers none.

    All ranks of the axis call it at the same time, and decide alike.
    """
    if axis.size == 1:
        return axis
    blocks = PeerBlocks(axis.rank, axis.size, _torch_rendezvous(axis, device))
    problem = _try_once(blocks, axis.size, device) if device.type == "cuda" else "a CPU has none"
    if not axis.all_gather(torch.tensor([not problem], device=device)).all():
        if axis.rank == 0:
            logger.warning("no symmetric memory, Ulysses sends instead: %s", problem or "another rank has none")
        return axis
    stream = torch.cuda.Stream(device)
    return PeerAxis(rank=axis.rank, ranks=axis.ranks, group=axis.group, blocks=blocks, stream=stream)


def _try_once(blocks: PeerBlocks, size: int, device: torch.device) -> str:
    """Why it does not go; empty if it does."""
    block = torch.zeros(size, 1, device=device)
    try:
        blocks.exchange(block, torch.empty_like(block))
    except (ImportError, RuntimeError) as error:
        return str(error).partition("\n")[0] or type(error).__name__
    return ""


def _torch_rendezvous(axis: Axis, device: torch.device) -> Rendezvous:
    """PyTorch's own; its memory lives as long as what is returned."""

    def meet(num_bytes: int) -> SharedMemory:
        from torch.distributed import _symmetric_memory

        assert isinstance(axis.group, dist.ProcessGroup)
        buffer = _symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
        shared: SharedMemory = _symmetric_memory.rendezvous(buffer, axis.group)
        return shared

    return meet
