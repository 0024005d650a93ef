"""Copies off a device: the ring with a device that copies when it is told to, and the order of calls on CUDA."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import helios_serve.workers.vae as vae_worker
from helios_serve.config import ModelConfig
from helios_serve.kernels.reference import rgb_to_yuv420
from helios_serve.model_executor.digest import latents_digest
from helios_serve.model_executor.model import HeliosModel, load_model
from helios_serve.types import DecodeTask, SamplingParams, TensorRef
from helios_serve.workers import copy_out
from helios_serve.workers.copy_out import CopyRing, CudaLane, Fences, HostLane
from helios_serve.workers.vae import VaeWorker


@dataclass
class SlowFence:
    """The device gets as far as this when somebody waits for it."""

    device: SlowLane
    place: int

    def synchronize(self) -> None:
        self.device.run_to(self.place)


@dataclass
class SlowLane:
    """A device whose work is done, in order, as far as somebody waits. Each copy comes behind its computation."""

    queue: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    buffers: list[Tensor] = field(default_factory=list)

    def buffer(self, num_bytes: int) -> Tensor:
        self.buffers.append(torch.full((num_bytes,), 77, dtype=torch.uint8))
        return self.buffers[-1]

    def begin(self, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> Fences:
        self.queue.append(("compute", *(sources[0],) * 2))
        computed = SlowFence(self, len(self.queue))
        self.queue += [("copy", source, target) for source, target in zip(sources, targets, strict=True)]
        return Fences(computed=computed, copied=SlowFence(self, len(self.queue)))

    @torch.inference_mode()
    def run_to(self, place: int) -> None:
        for what, source, target in self.queue[len(self.done) : place]:
            if what == "copy":
                target.copy_(source)
            self.done.append(what)


def chunk(value: int) -> tuple[Tensor, Tensor]:
    return torch.full((3, 6, 5), value, dtype=torch.uint8), torch.full((2, 3), value + 0.5)


def test_nothing_is_waited_for_before_it_is_read() -> None:
    lane = SlowLane()
    copy = CopyRing(lane).start(*chunk(1))
    assert lane.done == []
    copy.wait_computed()
    assert lane.done == ["compute"]
    with copy as (pictures, latents):
        assert lane.done == ["compute", "copy", "copy"]
        assert torch.equal(pictures, chunk(1)[0])
        assert torch.equal(latents, chunk(1)[1])


def test_copies_in_flight_do_not_share_memory() -> None:
    lane = SlowLane()
    ring = CopyRing(lane)
    copies = [ring.start(*chunk(value)) for value in range(5)]
    for value, copy in enumerate(copies):
        with copy as (pictures, latents):
            assert torch.equal(pictures, chunk(value)[0])
            assert torch.equal(latents, chunk(value)[1])
    assert len(lane.buffers) == 5


def test_a_buffer_is_used_again_only_when_it_was_read() -> None:
    lane = SlowLane()
    ring = CopyRing(lane)
    with ring.start(*chunk(1)) as (pictures, _):
        ring.start(*chunk(2)).wait_computed()
        lane.run_to(len(lane.queue))
        assert torch.equal(pictures, chunk(1)[0])
    ring.start(*chunk(3))
    lane.run_to(len(lane.queue))
    assert torch.equal(pictures, chunk(3)[0]), "the first buffer is free again"
    assert len(lane.buffers) == 2


def test_buffers_are_used_in_turn_and_three_are_kept() -> None:
    lane = SlowLane()
    ring = CopyRing(lane)
    for _ in range(4):
        copies = [ring.start(*chunk(value)) for value in range(3)]
        for copy in copies:
            with copy:
                pass
    assert len(lane.buffers) == 3
    for copy in [ring.start(*chunk(value)) for value in range(5)]:
        with copy:
            pass
    assert len(lane.buffers) == 5
    copies = [ring.start(*chunk(value)) for value in range(4)]
    assert len(lane.buffers) == 6, "two of the five were given up"


def test_a_larger_chunk_takes_the_place_of_a_smaller_buffer() -> None:
    lane = SlowLane()
    ring = CopyRing(lane)
    for num_values in (10, 5000, 300, 5000):
        with ring.start(torch.arange(num_values)) as (values,):
            assert torch.equal(values, torch.arange(num_values))
    assert [len(buffer) for buffer in lane.buffers] == [256, 40192]


def test_a_copy_that_nobody_reads_costs_a_buffer_and_no_more() -> None:
    lane = SlowLane()
    ring = CopyRing(lane)
    for value in range(4):
        ring.start(*chunk(value))
    with ring.start(*chunk(9)) as (pictures, _):
        assert torch.equal(pictures, chunk(9)[0])


def test_a_failing_reader_gives_the_buffer_back() -> None:
    lane = SlowLane()
    ring = CopyRing(lane)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), ring.start(*chunk(1)):
            raise ZeroDivisionError
    assert len(lane.buffers) == 1


def test_a_copy_is_read_once() -> None:
    copy = CopyRing(HostLane()).start(*chunk(1))
    with copy:
        pass
    with pytest.raises(AssertionError, match="read once"), copy:
        pass


def test_several_dtypes_and_layouts_arrive_as_they_are() -> None:
    sources = (
        torch.rand(3, 5).bfloat16(),
        torch.rand(4, 6).t(),
        torch.rand(0, 3),
        torch.randint(0, 255, (7,), dtype=torch.uint8),
        torch.rand(2, 2, dtype=torch.float64),
    )
    with CopyRing(HostLane()).start(*sources) as arrived:
        for source, target in zip(sources, arrived, strict=True):
            assert (target.dtype, target.shape) == (source.dtype, source.shape)
            assert torch.equal(target, source)
            assert target.is_contiguous()


def test_threads_share_a_ring() -> None:
    ring, wrong = CopyRing(HostLane()), []

    def work(first: int) -> None:
        for value in range(first, first + 50):
            with ring.start(*chunk(value % 256)) as (pictures, latents):
                if not (torch.equal(pictures, chunk(value % 256)[0]) and latents[0, 0] == value % 256 + 0.5):
                    wrong.append(value)

    threads = [threading.Thread(target=work, args=(100 * index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# The calls that a CUDA device would see


class FakeStream:
    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name, self.device = log, name, torch.device("cuda")

    def wait_event(self, event: FakeEvent) -> None:
        self.log.append(f"{self.name} waits for event {event.number}")


class FakeEvent:
    count = 0

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.number = FakeEvent.count = FakeEvent.count + 1

    def record(self, stream: FakeStream) -> None:
        self.log.append(f"event {self.number} on {stream.name}")

    def synchronize(self) -> None:
        self.log.append(f"host waits for event {self.number}")


class FakeSource:
    """A tensor on a device."""

    is_cuda = True
    dtype, shape, nbytes = torch.float32, torch.Size([4]), 16

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def record_stream(self, stream: FakeStream) -> None:
        self.log.append(f"source is in use on {stream.name}")


class FakeTarget:
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def copy_(self, source: FakeSource, non_blocking: bool) -> None:
        assert non_blocking
        self.log.append("copy")


def test_order_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Within:
        def __init__(self, stream: FakeStream) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            log.append(f"enter {self.stream.name}")

        def __exit__(self, *_: object) -> None:
            log.append(f"leave {self.stream.name}")

    monkeypatch.setattr(FakeEvent, "count", 0)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(log, "copying"))
    monkeypatch.setattr(torch.cuda, "Event", lambda blocking: FakeEvent(log))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream(log, "computing"))
    monkeypatch.setattr(torch.cuda, "stream", Within)
    lane = CudaLane(torch.device("cuda"))
    fences = lane.begin([FakeSource(log)], [FakeTarget(log)])  # type: ignore[list-item]
    assert log == [
        "event 1 on computing",
        "copying waits for event 1",
        "enter copying",
        "copy",
        "source is in use on copying",
        "event 2 on copying",
        "leave copying",
    ]
    fences.computed.synchronize()
    fences.copied.synchronize()
    assert log[-2:] == ["host waits for event 1", "host waits for event 2"]


def test_lanes_are_chosen_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream([], "copying"))
    assert isinstance(copy_out.lane_of(torch.device("cpu")), HostLane)
    assert isinstance(copy_out.lane_of(torch.device("cuda")), CudaLane)


# The VAE's worker over such a device


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> HeliosModel:
    return load_model(ModelConfig(model=str(tiny_base)))


def decode_task(params: SamplingParams, chunk_index: int) -> DecodeTask:
    latents = TensorRef(key="latents", num_bytes=0)
    return DecodeTask(task_id="d", request_id="r", chunk=chunk_index, latents=latents, params=params, is_due=False)


def test_worker_returns_when_computed_and_reads_when_copied(
    model: HeliosModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    lane = SlowLane()
    monkeypatch.setattr(vae_worker, "lane_of", lambda device: lane)
    worker = VaeWorker(model.vae)
    params = SamplingParams(
        width=48, height=32, num_frames=40, fps=24, seed=1, steps=(2,), guidance_scale=5.0, use_zero_init=True
    )
    latents = [torch.randn(model.config.vae.z_dim, 9, 4, 6) for _ in range(2)]
    pictures = [worker.decode_pictures(decode_task(params, index), one) for index, one in enumerate(latents)]
    assert lane.done == ["compute", "copy", "copy", "compute"], "the second chunk is still on its way"
    for index, one in enumerate(latents):
        decoded = worker.encode_pictures(decode_task(params, index), pictures[index])
        num_frames = params.frames_in(index)
        assert decoded.segment.num_frames == num_frames
        assert decoded.latents_digest == latents_digest(one)
        yuv = rgb_to_yuv420(worker.decode(one)[:num_frames])
        again = worker.encode_segment(worker.decode(one), "r", index, params)
        assert (again.init, again.media) == (decoded.segment.init, decoded.segment.media)
        assert np.array_equal(lane.buffers[index][: yuv.nbytes].numpy(), yuv.flatten().numpy())
    assert params.frames_in(1) == 7


def test_no_result_leaves_the_device_another_way() -> None:
    text = Path(vae_worker.__file__).read_text(encoding="utf-8")
    for banned in (".cpu()", ".item()", ".tolist()", 'to("cpu")'):
        assert banned not in text
