"""Timings on a CPU, and on a GPU whose events are written down: what the host waits for, and when."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from helios_serve.workers.step_timer import StepTimer


def test_a_cpu_is_timed_by_the_wall() -> None:
    timer = StepTimer(torch.device("cpu"))
    for name, seconds in (("fox", 0.02), ("owl", 0.0)):
        timer.begin()
        time.sleep(seconds)
        timer.end((name,))
    (first, first_ms), (second, second_ms) = timer.read(flush=False)
    assert (first, second) == (("fox",), ("owl",))
    assert first_ms >= 20 > second_ms >= 0
    assert timer.read(flush=True) == []


class FakeEvent:
    """The n-th event happens at n * n ms."""

    made: list[FakeEvent]
    waited: list[int]

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.number = len(self.made)
        self.made.append(self)

    def record(self, stream: object) -> None:
        assert stream == "ours"

    def synchronize(self) -> None:
        self.waited.append(self.number)

    def elapsed_time(self, later: FakeEvent) -> float:
        assert later.number in self.waited
        return float(later.number**2 - self.number**2)


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    FakeEvent.made, FakeEvent.waited = [], []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: "ours")
    return FakeEvent.waited


def test_the_host_is_one_step_ahead_of_a_gpu(waited: list[int]) -> None:
    timer = StepTimer(torch.device("cuda"))
    told = []
    for step in range(3):
        timer.begin()
        timer.end((f"{step}",))
        assert waited == [2 * earlier + 1 for earlier in range(step)]  # the ends of the steps before
        told.append(timer.read(flush=False))
    assert told == [[], [(("0",), 1.0)], [(("1",), 5.0)]]
    assert timer.read(flush=True) == [(("2",), 9.0)]
    assert waited == [1, 3, 5]
