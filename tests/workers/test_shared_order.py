"""Work in one order: alone it is a queue; two real ranks, to whom tasks come in different orders, do them in rank 0's;
and what ends a group."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import Future
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from helios_serve.parallel.collectives import GroupBrokenError, RankGroup
from helios_serve.workers.shared_order import SharedOrder
from tests.parallel.ranks import run_ranks

NAMES = [f"task-{index}" for index in range(40)]
WAIT_S = 60.0


def test_alone_it_is_a_queue_that_outlives_what_fails() -> None:
    order = SharedOrder(RankGroup())
    thread = threading.Thread(target=order.run)
    done: list[str] = []
    futures = [order.submit(name, partial(done.append, name)) for name in NAMES]
    broken: Future[None] = order.submit("broken", partial(_fail, "of its own"))
    thread.start()
    assert order.submit("answer", lambda: 42).result(WAIT_S) == 42
    with pytest.raises(ValueError, match="of its own"):
        broken.result(WAIT_S)
    assert all(future.done() for future in futures)
    assert done == NAMES
    order.close()
    thread.join(WAIT_S)
    assert not thread.is_alive()
    with pytest.raises(GroupBrokenError, match="late: the group ended before its turn"):
        order.submit("late", lambda: None).result(WAIT_S)


def _fail(why: str) -> None:
    raise ValueError(why)


def _shuffled(ranks: RankGroup, end: Connection) -> None:
    """Submits while earlier work is done; on rank 1 some of it comes late."""
    order, done = SharedOrder(ranks), list[str]()
    names = random.Random(ranks.rank).sample(NAMES, len(NAMES))
    thread = threading.Thread(target=order.run)
    thread.start()
    for name in names:
        order.submit(name, partial(done.append, name))
        time.sleep(0.002 * ranks.rank)
    if ranks.rank == 0:
        order.submit("last", order.close)
    else:
        order.submit("last", lambda: None)
    thread.join(WAIT_S)
    end.send((names, done))


def test_all_ranks_take_turns_in_the_order_of_rank_0(tmp_path: Path) -> None:
    ((first, done), (second, also_done)) = (answer for (answer,) in run_ranks(2, tmp_path, _shuffled))  # type: ignore[misc]
    assert first != second
    assert done == also_done == first


def _nobody_comes(ranks: RankGroup, end: Connection) -> None:
    """Longer than anybody's patience without work; then one rank fails, or never hears of the work."""
    order = SharedOrder(ranks)
    ended: list[BaseException] = []

    def run() -> None:
        try:
            order.run()
        except Exception as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    time.sleep(2.5 * ranks.timeout_s)
    end.send(thread.is_alive())
    future = order.submit("task", partial(_fail, "here alone") if ranks.rank == 1 else lambda: None)
    if ranks.rank == 1:
        with pytest.raises(GroupBrokenError, match="one of 2 ranks could not do its part: here alone"):
            future.result(WAIT_S)
    else:
        future.result(WAIT_S)
    thread.join(WAIT_S)
    end.send(type(ended[0]).__name__)


def test_a_rank_that_fails_ends_its_group(tmp_path: Path) -> None:
    """The one that failed at once, the other when it wants to go on."""
    answers = run_ranks(2, tmp_path, _nobody_comes, timeout_s=2.0)
    assert [alive for alive, _ in answers] == [True, True]
    assert answers[1][1] == "GroupBrokenError"
    assert answers[0][1] in ("RuntimeError", "DistBackendError")


def test_work_that_never_comes_ends_the_group(tmp_path: Path) -> None:
    """Rank 0 does its part; rank 1 was never given it."""
    answers = run_ranks(2, tmp_path, _missing, timeout_s=2.0)
    assert answers[1] == ["task did not reach rank 1"]
    assert len(answers[0]) == 1


def _missing(ranks: RankGroup, end: Connection) -> None:
    order = SharedOrder(ranks)
    if ranks.rank == 0:
        order.submit("task", lambda: None)
    try:
        order.run()
    except (RuntimeError, TimeoutError) as error:
        end.send(str(error))
