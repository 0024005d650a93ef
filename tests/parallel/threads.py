"""A mesh whose ranks are threads of one process, on one stream of a GPU: what they exchange is copied between them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from helios_serve.parallel.collectives import ALONE, Axis, Transfer
from helios_serve.parallel.mesh import Degrees, Mesh

T = TypeVar("T")

WAIT_S = 120.0


class Board:
    """Where the ranks of one line put what the others take."""

    def __init__(self, size: int) -> None:
        self._slots: list[Tensor] = [torch.empty(0)] * size
        self._barrier = threading.Barrier(size)

    def exchange(self, rank: int, given: Tensor, take: Callable[[list[Tensor]], T]) -> T:
        """Puts down `given`, and takes once everybody has put something down; nobody goes on before all have taken."""
        self._slots[rank] = given
        self._barrier.wait(WAIT_S)
        taken = take(self._slots)
        self._barrier.wait(WAIT_S)
        return taken


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadAxis(Axis):
    """The ranks that share a board."""

    board: Board

    def begin_all_to_all(self, sent: Tensor, received: Tensor) -> Transfer:
        self.board.exchange(
            self.rank, sent, lambda blocks: torch.stack([each[self.rank] for each in blocks], out=received)
        )
        return Transfer()

    def all_gather(self, block: Tensor) -> Tensor:
        return self.board.exchange(self.rank, block, torch.cat)

    def rotate(self, sent: Tensor, received: Tensor) -> Transfer:
        self.board.exchange(self.rank, sent, lambda blocks: received.copy_(blocks[self.rank - 1]))
        return Transfer()


def run_threads(degrees: Degrees, body: Callable[[Mesh], T]) -> list[T]:
    """What `body` returns on each rank of a ring x Ulysses mesh."""
    ring, ulysses = degrees.ring, degrees.ulysses
    size = ring * ulysses
    rings = [Board(ring) for _ in range(ulysses)]
    lines = [Board(ulysses) for _ in range(ring)]
    everybody = Board(size)

    def axis(board: Board, rank: int, count: int) -> Axis:
        return ALONE if count == 1 else ThreadAxis(rank=rank, ranks=tuple(range(count)), board=board)

    meshes = [
        Mesh(
            ring=axis(rings[rank % ulysses], rank // ulysses, ring),
            ulysses=axis(lines[rank // ulysses], rank % ulysses, ulysses),
            tokens=axis(everybody, rank, size),
        )
        for rank in range(size)
    ]
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(body, meshes))
