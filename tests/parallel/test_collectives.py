"""Two real processes that meet through a file: what is broadcast, and what happens when one is gone or silent."""

from __future__ import annotations

import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from helios_serve.parallel.collectives import RankGroup, connect
from tests.parallel.ranks import Body, run_ranks

VALUES = [None, 7, ("fox", "owl"), {"key": [1.5, b"bytes"]}, "x" * 100_000]


def run_two(tmp_path: Path, body: Body, timeout_s: float = 30.0) -> list[list[object]]:
    return run_ranks(2, tmp_path, body, timeout_s)


def _exchange(ranks: RankGroup, end: Connection) -> None:
    for value in VALUES:
        end.send(ranks.broadcast(value if ranks.rank == 0 else "ignored"))


def _rank_1_leaves(ranks: RankGroup, end: Connection) -> None:
    assert ranks.broadcast(1) == 1
    if ranks.rank == 1:
        return
    try:
        for _ in range(1000):
            ranks.broadcast("x" * 1_000_000)
    except RuntimeError:
        end.send("failed")


def _rank_0_is_silent(ranks: RankGroup, end: Connection) -> None:
    assert ranks.broadcast(1) == 1
    started = time.monotonic()
    if ranks.rank == 0:
        time.sleep(8)
        return
    try:
        ranks.broadcast(2)
    except RuntimeError:
        end.send(time.monotonic() - started)


def test_every_rank_gets_what_rank_0_says(tmp_path: Path) -> None:
    assert run_two(tmp_path, _exchange) == [VALUES, VALUES]


def test_a_rank_that_is_gone_is_an_error_not_a_wait(tmp_path: Path) -> None:
    assert run_two(tmp_path, _rank_1_leaves) == [["failed"], []]


def test_silence_ends_with_the_time_out(tmp_path: Path) -> None:
    silence, waited = run_two(tmp_path, _rank_0_is_silent, timeout_s=3.0)
    assert silence == []
    assert waited == [pytest.approx(3.0, abs=3.0)]


def test_one_rank_talks_to_itself() -> None:
    value = object()
    alone = RankGroup()
    assert alone.broadcast(value) is value
    assert (alone.rank, alone.size) == (0, 1)
    alone.close()
    assert connect(0, 1, "nowhere") == alone
