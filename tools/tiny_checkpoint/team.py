"""Several processes that train one model together, each on examples of its own. Knows gradients; knows no model.

On few cores that is faster than threads: most operations of a small model are too small to be shared.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Team:
    """A process's place among `size` of them."""

    rank: int = 0
    size: int = 1

    def agree(self, value: float) -> float:
        """The first process's value, for decisions that all must take alike."""
        if self.size == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(shared, src=0)
        return float(shared)

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replaces gradients by their means over the processes."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.size == 1 or not gradients:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        parts = (flat / self.size).split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(parts, gradients, strict=True)])


ALONE = Team()


def run_team(size: int, work: Callable[[Team], None]) -> None:
    """Runs `work`, which must be picklable, in `size` processes on this machine's cores, and waits for all."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_join, (size, Path(folder) / "store", work), nprocs=size)  # type: ignore[no-untyped-call]


def _join(rank: int, size: int, store: Path, work: Callable[[Team], None]) -> None:
    # PyTorch interrupts members whose parent has died; what a shell starts in the background would ignore that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    work(Team(rank=rank, size=size))
    dist.destroy_process_group()
