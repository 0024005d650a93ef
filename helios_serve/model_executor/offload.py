"""Layers that live in host memory and visit the device one after the other, so that a model larger than the device's
memory runs.

Knows layers, flat buffers and streams; knows no architecture. The copy of the next layer runs beside the computation of
this one: two buffers on the device take turns. Without a CUDA device the same steps are taken in order, with plain
memory.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

NUM_BUFFERS = 2
_ALIGNMENT_BYTES = 256

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a parameter stands in its layer's flat buffer, in bytes."""

    parameter: nn.Parameter
    start: int

    def view(self, flat: Tensor) -> Tensor:
        """The parameter's value in `flat` [bytes] uint8."""
        like = self.parameter
        part = flat[self.start : self.start + like.numel() * like.element_size()]
        return part.view(like.dtype).view(like.shape)


def offload_sequence(layers: Sequence[nn.Module], device: torch.device) -> LayerOffload[nn.Module]:
    """Offloads layers that some other module calls in order, as a stack of transformer layers does."""
    offload = LayerOffload(layers, device)
    passes: list[Generator[nn.Module]] = []

    def enter(layer: nn.Module, _: object) -> None:
        if layer is layers[0]:
            passes[:] = [offload.each()]
        assert next(passes[0]) is layer

    def leave(*_: object) -> None:
        passes.pop().close()

    for layer in layers:
        layer.register_forward_pre_hook(enter)
    layers[-1].register_forward_hook(leave)
    return offload


class LayerOffload(Generic[M]):
    """Owns the parameters of layers that run one after the other.

    Args:
        layers: their parameters, in any memory, are moved to host memory: pinned where there is a CUDA device.
        device: where they run. Two buffers of the largest layer's size are kept there.
    """

    def __init__(self, layers: Sequence[M], device: torch.device) -> None:
        self._layers = list(layers)
        self._places = [_places(layer) for layer in self._layers]
        sizes = [_end(places) for places in self._places]
        is_cuda = device.type == "cuda"
        self._host = [
            _move_to_host(places, size, is_pinned=is_cuda) for places, size in zip(self._places, sizes, strict=True)
        ]
        self._buffers = [torch.empty(max(sizes), dtype=torch.uint8, device=device) for _ in range(NUM_BUFFERS)]
        self._lane: _CudaLane | _HostLane = _CudaLane(device) if is_cuda else _HostLane()

    @property
    def device_bytes(self) -> int:
        """What the layers take on the device."""
        return sum(buffer.nbytes for buffer in self._buffers)

    @property
    def host_bytes(self) -> int:
        return sum(flat.nbytes for flat in self._host)

    def each(self) -> Generator[M]:
        """The layers in order, each on the device until the next one is asked for. One pass at a time; one that is
        given up leaves no layer on the device."""
        try:
            self._fetch(0)
            for index, layer in enumerate(self._layers):
                if index + 1 < len(self._layers):
                    self._fetch(index + 1)
                self._lane.wait_copied(index % NUM_BUFFERS)
                yield layer
                self._lane.mark_used(index % NUM_BUFFERS)
        finally:
            for index, flat in enumerate(self._host):
                self._bind(index, flat)

    def _fetch(self, index: int) -> None:
        """Begins to copy a layer into the buffer that is next; waits, on the device, until that was used."""
        flat, buffer = self._host[index], self._buffers[index % NUM_BUFFERS]
        with self._lane.copying(index % NUM_BUFFERS):
            buffer[: len(flat)].copy_(flat, non_blocking=True)
        self._bind(index, buffer)

    def _bind(self, index: int, flat: Tensor) -> None:
        for place in self._places[index]:
            place.parameter.data = place.view(flat)


def _places(layer: nn.Module) -> list[_Place]:
    parameters = list(layer.parameters())
    sizes = (-(-p.numel() * p.element_size() // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for p in parameters)
    starts = accumulate(sizes, initial=0)
    return [_Place(parameter=parameter, start=start) for parameter, start in zip(parameters, starts, strict=False)]


def _end(places: Sequence[_Place]) -> int:
    last = places[-1]
    return last.start + last.parameter.numel() * last.parameter.element_size()


def _move_to_host(places: Sequence[_Place], num_bytes: int, *, is_pinned: bool) -> Tensor:
    flat = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_pinned)
    for place in places:
        target = place.view(flat)
        target.copy_(place.parameter.data)
        place.parameter.data = target
    return flat


class _CudaLane:
    """Copies on a stream of their own; events keep a buffer from being read too early or overwritten too early."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._copied = [torch.cuda.Event() for _ in range(NUM_BUFFERS)]
        self._used = [torch.cuda.Event() for _ in range(NUM_BUFFERS)]

    def copying(self, buffer: int) -> AbstractContextManager[object]:
        self._stream.wait_event(self._used[buffer])
        return _Recorded(self._stream, self._copied[buffer])

    def wait_copied(self, buffer: int) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._copied[buffer])

    def mark_used(self, buffer: int) -> None:
        self._used[buffer].record(torch.cuda.current_stream(self._device))


class _Recorded:
    """A stream to work on; the event is recorded when the work was given to it."""

    def __init__(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        self._stream, self._event = torch.cuda.stream(stream), event
        self._on = stream

    def __enter__(self) -> None:
        self._stream.__enter__()

    def __exit__(self, *error: object) -> None:
        self._event.record(self._on)
        self._stream.__exit__(*error)


class _HostLane:
    """Everything happens at once and in order."""

    def copying(self, _buffer: int) -> AbstractContextManager[object]:
        return nullcontext()

    def wait_copied(self, _buffer: int) -> None:
        pass

    def mark_used(self, _buffer: int) -> None:
        pass
