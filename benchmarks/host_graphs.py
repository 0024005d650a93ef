"""What stands in for CUDA graphs on a CPU: a recorder that runs the same Python again on the same memory, and
cross-attention that finds its prompts by the table of addresses alone, as the kernel does.

For rehearsals and tests. Knows how forwards by graphs are put together; measures nothing.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from unittest import mock

import torch
from torch import Tensor

from helios_serve.kernels import reference_cross
from helios_serve.kernels.cross_attention import PackedText, places_of
from helios_serve.model_executor import cuda_graph, layers, spread
from helios_serve.model_executor.packing import PackedBatch, TokenSequence, pack
from helios_serve.model_executor.rope import Grid
from helios_serve.parallel.mesh import SOLO, Mesh


@dataclass(slots=True)
class HostRecording:
    """Until its first replay, its result is what a capture leaves behind, nothing of use."""

    run: Callable[[], Tensor]
    out: Tensor
    num_replays: int = 0
    is_released: bool = False

    def replay(self) -> None:
        assert not self.is_released
        self.num_replays += 1
        self.out.copy_(self.run())

    def release(self) -> None:
        assert not self.is_released
        self.is_released = True


@dataclass(slots=True)
class HostRecorder:
    """bytes_each: what each recording is said to hold. failure: raised instead of recording."""

    bytes_each: int = 0
    failure: Exception | None = None
    recordings: list[HostRecording] = field(default_factory=list)
    num_tries: int = 0

    def record(self, run: Callable[[], Tensor]) -> HostRecording:
        self.num_tries += 1
        if self.failure is not None:
            raise self.failure
        # Nothing is computed: the table was not written yet, and ranks exchange nothing.
        with (
            mock.patch.object(layers, "cross_attend", _not_computed),
            mock.patch.object(layers, "attend_sharded", _not_computed),
        ):
            out = torch.full_like(run(), math.nan)
        self.recordings.append(HostRecording(run=run, out=out))
        return self.recordings[-1]

    @property
    def num_bytes(self) -> int:
        return self.bytes_each * sum(not recording.is_released for recording in self.recordings)

    @property
    def num_replays(self) -> int:
        return sum(recording.num_replays for recording in self.recordings)


def _not_computed(q: Tensor, *_: object) -> Tensor:
    return torch.full_like(q, math.nan)


@contextmanager
def recording_on_host() -> Iterator[list[HostRecorder]]:
    """Lets transformers run on a CPU as by graphs on a GPU; gives the recorders of the runners that are made."""
    made: list[HostRecorder] = []

    def make(_: torch.device) -> HostRecorder:
        made.append(HostRecorder())
        return made[-1]

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(layers, "cross_attend", cross_attend_by_places))
        patches.enter_context(mock.patch.object(spread, "pack", pack_with_places))
        patches.enter_context(mock.patch.object(cuda_graph, "CudaRecorder", make))
        yield made


def with_places(text: PackedText) -> PackedText:
    """As it is on a CUDA device."""
    return replace(text, places=places_of(text.keys, text.values, text.cu_q, text.repeats))


def pack_with_places(
    sequences: Sequence[TokenSequence], patch: Grid, mesh: Mesh = SOLO
) -> tuple[PackedBatch, PackedText]:
    """`packing.pack`, as it is on a CUDA device."""
    batch, text = pack(sequences, patch, mesh)
    return batch, with_places(text)


def cross_attend_by_places(q: Tensor, text: PackedText, layer: int) -> Tensor:
    """`cross_attend` with nothing but the table."""
    assert text.places is not None
    out = torch.empty_like(q)
    for start, stop, num_keys, repeat, *addresses in text.places[layer].tolist():
        key, value = (_at(address, (1, num_keys, *q.shape[1:]), q.dtype) for address in addresses)
        own = q[start:stop]
        out[start:stop] = reference_cross.cross_attend(
            own, [key], [value], 0, (0, len(own)), [repeat], text.scale, None
        )
    return out


def _at(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    assert address, "a table that was not written"
    memory = (ctypes.c_char * (math.prod(shape) * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
