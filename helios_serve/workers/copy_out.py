"""Takes tensors off their device while it goes on: host buffers in a ring, filled on a stream of their own.

Knows streams, events and bytes; knows nothing of pictures. On a CPU the same is done with plain buffers, at once.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

NUM_BUFFERS = 3
"""One is filled, one is read, and one is free for the chunk that comes next."""

_ALIGNMENT = 256  # bytes


class Fence(Protocol):
    """A point in a device's work."""

    def synchronize(self) -> None:
        """Returns when the device has passed it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Fences:
    """computed: the sources are there. copied: the targets are filled, too."""

    computed: Fence
    copied: Fence


class Lane(Protocol):
    """The way from one device to host memory."""

    def buffer(self, num_bytes: int) -> Tensor:
        """Host memory that copies may fill: [num_bytes] uint8."""
        ...

    def begin(self, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> Fences:
        """Queues a copy of each source into its target behind what the calling thread has queued; does not wait."""
        ...


class _Past:
    def synchronize(self) -> None:
        return


class HostLane:
    """From host memory to host memory, before `begin` returns."""

    def buffer(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def begin(self, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> Fences:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)
        return Fences(computed=_Past(), copied=_Past())


class CudaLane:
    """From a CUDA device to pinned memory, on a stream of its own: the device computes on."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def buffer(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def begin(self, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> Fences:
        computed, copied = torch.cuda.Event(blocking=True), torch.cuda.Event(blocking=True)
        computed.record(torch.cuda.current_stream(self._stream.device))
        self._stream.wait_event(computed)
        with torch.cuda.stream(self._stream):
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source, non_blocking=True)
                if source.is_cuda:
                    source.record_stream(self._stream)  # its memory is not given away before the copy is done
            copied.record(self._stream)
        return Fences(computed=computed, copied=copied)


def lane_of(device: torch.device) -> Lane:
    return CudaLane(device) if device.type == "cuda" else HostLane()


class CopyRing:
    """Starts copies into buffers that are used in turn. Any thread may start, read and release them.

    It never waits for a buffer: a copy that nobody released costs a new one. How many are alive is up to the caller;
    at most `num_buffers` free ones are kept.
    """

    def __init__(self, lane: Lane, num_buffers: int = NUM_BUFFERS) -> None:
        self._lane = lane
        self._num_buffers = num_buffers
        self._lock = threading.Lock()
        self._free: deque[Tensor] = deque()

    @torch.inference_mode()
    def start(self, *tensors: Tensor) -> HostCopy:
        """Begins to copy what the calling thread's stream computes; returns before it is there."""
        starts = [0]
        for tensor in tensors:
            starts.append(starts[-1] + math.ceil(tensor.nbytes / _ALIGNMENT) * _ALIGNMENT)
        buffer = self._take(starts[-1])
        targets = tuple(_view(buffer, start, tensor) for start, tensor in zip(starts, tensors, strict=False))
        return HostCopy(self, buffer, targets, self._lane.begin(tensors, targets))

    def give_back(self, buffer: Tensor) -> None:
        """Lets the next copies overwrite a buffer."""
        with self._lock:
            if len(self._free) < self._num_buffers:
                self._free.append(buffer)

    def _take(self, num_bytes: int) -> Tensor:
        """The buffer that was given back first; one that is too small gives way to a larger one."""
        with self._lock:
            buffer = self._free.popleft() if self._free else None
        return buffer if buffer is not None and len(buffer) >= num_bytes else self._lane.buffer(num_bytes)


class HostCopy:
    """Tensors on their way into a buffer, which is theirs until they were read.

    with copy as (pictures, latents):  # waits until they are there
        ...  # the views are good here, and overwritten afterwards
    """

    def __init__(self, ring: CopyRing, buffer: Tensor, targets: tuple[Tensor, ...], fences: Fences) -> None:
        self._ring = ring
        self._buffer: Tensor | None = buffer
        self._targets = targets
        self._fences = fences

    def wait_computed(self) -> None:
        """Returns when the device has made the tensors; they may still be on their way."""
        self._fences.computed.synchronize()

    def __enter__(self) -> tuple[Tensor, ...]:
        assert self._buffer is not None, "a copy is read once"
        self._fences.copied.synchronize()
        return self._targets

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        buffer, self._buffer, self._targets = self._buffer, None, ()
        assert buffer is not None
        self._ring.give_back(buffer)


def _view(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)
