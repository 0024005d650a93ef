"""What the recorder asks of PyTorch, by stand-ins for its streams, pools and graphs; a GPU is in tests/gpu."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from helios_serve.model_executor.cuda_graph import CudaRecorder

DEVICE = torch.device("cuda", 0)


class _Graph:
    """torch.cuda.CUDAGraph, with the signature of the real one."""

    def __init__(self, calls: list[Any], end_fails: bool) -> None:
        self._calls, self._end_fails = calls, end_fails

    def capture_begin(
        self, pool: Any = None, capture_error_mode: str = "global", check_input_liveness: bool = False
    ) -> None:
        self._calls.append(("begin", pool, capture_error_mode))

    def capture_end(self) -> None:
        self._calls.append("end")
        if self._end_fails:
            raise RuntimeError("capture failed for some earlier reason")

    def replay(self) -> None:
        self._calls.append("replay")

    def reset(self) -> None:
        self._calls.append("reset")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    made: list[Any] = []
    pools = iter(range(9))

    def noting(name: str) -> Callable[..., None]:
        return lambda *_: made.append(name)

    monkeypatch.setattr(torch.cuda, "Stream", lambda _: SimpleNamespace(device_index=0))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", noting("end of pool"), raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", noting("pool released"), raising=False)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: ("pool", next(pools)))
    monkeypatch.setattr(torch.cuda, "empty_cache", noting("empty_cache"))
    monkeypatch.setattr(torch.cuda, "synchronize", noting("synchronize"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: _Graph(made, end_fails=False))
    monkeypatch.setattr(torch.cuda.memory, "memory_snapshot", lambda pool: [{"total_size": 40}, {"total_size": 2}])
    return made


def _work(calls: list[Any]) -> Tensor:
    calls.append("work")
    return torch.ones(2)


def test_work_is_recorded_once_and_replayed(calls: list[Any]) -> None:
    """Other threads may use the device meanwhile, and what they have left unused is given back before."""
    recorder = CudaRecorder(DEVICE)
    assert recorder.num_bytes == 0
    recording = recorder.record(lambda: _work(calls))
    recording.replay()
    recording.replay()
    begin = ("begin", calls[1][1], "thread_local")
    assert calls == ["empty_cache", begin, "work", "end", "replay", "replay"]
    assert torch.equal(recording.out, torch.ones(2))
    assert recorder.num_bytes == 42


def test_recordings_share_a_pool_until_the_last_is_gone(calls: list[Any]) -> None:
    recorder = CudaRecorder(DEVICE)
    recordings = [recorder.record(lambda: _work(calls)) for _ in range(2)]
    recordings[0].release()
    recordings.append(recorder.record(lambda: _work(calls)))
    for recording in recordings[1:]:
        recording.release()
    assert recorder.num_bytes == 0
    recorder.record(lambda: _work(calls))
    first, second, third, fourth = (each[1] for each in calls if isinstance(each, tuple))
    assert first == second == third != fourth
    assert calls.count("reset") == calls.count("synchronize") == 3


def test_the_first_error_is_told(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the one with which the capture ends after it; the stream is no longer capturing, and the allocator knows."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: _Graph(calls, end_fails=True))
    recorder = CudaRecorder(DEVICE)

    def fails() -> Tensor:
        raise ValueError("waits for the device")

    with pytest.raises(ValueError, match="waits for the device"):
        recorder.record(fails)
    assert calls[-3:] == ["end", "end of pool", "pool released"]
    with pytest.raises(RuntimeError, match="some earlier reason"):
        recorder.record(lambda: _work(calls))
    assert recorder.num_bytes == 0
