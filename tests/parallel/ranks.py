"""Real processes that meet through a file, and what each of them sent back."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch

from helios_serve.parallel.collectives import RankGroup, connect

JOIN_S = 240.0
PRELOADED = [
    "pytest",
    "helios_serve.model_executor.model",
    "helios_serve.workers.encoder",
    "helios_serve.parallel.context_parallel",
]
"""Imported once, before the ranks are forked."""

Body = Callable[[RankGroup, Connection], None]


def run_ranks(size: int, folder: Path, body: Body, timeout_s: float = 30.0) -> list[list[object]]:
    """Runs `body`, which can be pickled, on every rank; what each sent, by rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    address = f"file://{folder}/meeting"
    ends, processes, ready = [], [], context.Barrier(size)
    for rank in range(size):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(rank, address, timeout_s, ready, body, there))
        process.start()
        there.close()
        ends.append(here)
        processes.append(process)
    try:
        return _everything(ends)
    finally:
        for process in processes:
            process.join(JOIN_S)
            process.kill()
            process.join()
            process.close()
        for end in ends:
            end.close()


def _rank(rank: int, address: str, timeout_s: float, ready: Barrier, body: Body, end: Connection) -> None:
    torch.set_num_threads(1)
    ready.wait(JOIN_S)
    ranks = connect(rank, ready.parties, address, timeout_s)
    body(ranks, end)
    end.close()
    ranks.close()


def _everything(ends: Sequence[Connection]) -> list[list[object]]:
    """Reads all pipes at once: a rank whose pipe is full would keep the others waiting."""
    received: dict[Connection, list[object]] = {end: [] for end in ends}
    deadline, still_open = time.monotonic() + JOIN_S, list(ends)
    while still_open:
        ready = wait(still_open, max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError("a rank did not end")
        for end in ready:
            assert isinstance(end, Connection)
            try:
                received[end].append(end.recv())
            except EOFError:
                still_open.remove(end)
    return [received[end] for end in ends]
