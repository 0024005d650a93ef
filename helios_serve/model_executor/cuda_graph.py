"""CUDA graphs of the transformer's forward: recorded once for each shape of a pack, from then on started in one launch.

A graph reads and writes fixed memory, so what a step brings is copied in before it runs, and what it gives is copied
out behind it. A key that was not seen before runs as usual, which also warms up whatever it launches, and is recorded
when it comes again. Knows keys, limits and who was used last; knows nothing of requests, schedules or guidance. One
thread uses the graphs of a transformer, whose parameters stay where they are.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from helios_serve.kernels.attention import used_bounds
from helios_serve.model_executor.graph_inputs import GraphKey, KeptMemory, StaticInputs
from helios_serve.model_executor.packing import PackedBatch, PackedText
from helios_serve.model_executor.transformer import HeliosTransformer

logger = logging.getLogger(__name__)


class Recording(Protocol):
    """Work that was recorded."""

    @property
    def out(self) -> Tensor:
        """The result, which each replay writes anew."""

    def replay(self) -> None:
        """Does the work again, on the memory that it was recorded with."""

    def release(self) -> None:
        """Gives up what it holds; it is not replayed any more."""


class Recorder(Protocol):
    """Records work on a device."""

    def record(self, run: Callable[[], Tensor]) -> Recording:
        """`run` is called once, and nothing is computed. It was done before, with other tensors of the same shapes.

        Raises: whatever the device says of work that it cannot record.
        """

    @property
    def num_bytes(self) -> int:
        """Device memory that all recordings hold together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaRecording:
    """A CUDA graph and its result. forgotten: called when it is given up."""

    graph: torch.cuda.CUDAGraph
    out: Tensor
    forgotten: Callable[[], None]

    def replay(self) -> None:
        """See `Recording`."""
        self.graph.replay()

    def release(self) -> None:
        """See `Recording`; waits, as the graph may be running."""
        torch.cuda.synchronize(self.out.device)
        self.graph.reset()
        self.forgotten()


class CudaRecorder:
    """Records CUDA graphs on a stream of its own. They share one pool of memory, since each result is copied out before
    another graph runs."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._num_recordings = 0

    def record(self, run: Callable[[], Tensor]) -> CudaRecording:
        """See `Recorder`. Other threads may use the device meanwhile."""
        if self._num_recordings == 0:  # a pool that nothing holds any more is gone
            self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()  # while it records, the allocator cannot give back what others have left unused
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                out = run()
            except Exception:
                self._abandon(graph)
                raise
            graph.capture_end()
        self._num_recordings += 1
        return CudaRecording(graph=graph, out=out, forgotten=self._forget)

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Ends what failed. One that the device has given up ends in an error, before PyTorch tells its allocator: it
        would never again give back memory when there is too little, nor what other streams are done with."""
        try:
            graph.capture_end()
        except RuntimeError:
            with suppress(RuntimeError):  # it was told
                torch._C._cuda_endAllocateToPool(self._stream.device_index, self._pool)
                torch._C._cuda_releasePool(self._stream.device_index, self._pool)

    def _forget(self) -> None:
        self._num_recordings -= 1

    @property
    def num_bytes(self) -> int:
        if self._num_recordings == 0:
            return 0
        return sum(segment["total_size"] for segment in torch.cuda.memory.memory_snapshot(self._pool))


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphLimits:
    """num_graphs: kept at a time; 34 are all packs of up to four sequences at three stages. num_bytes: of device memory
    that graphs and their inputs take; a pack of four at the last stage of 640x384 needs 3 GB. num_known: keys that are
    remembered."""

    num_graphs: int = 34
    num_bytes: int = 8 << 30
    num_known: int = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class _Graph:
    inputs: StaticInputs
    recording: Recording
    bounds: tuple[Tensor, ...]
    """What attention reads beside its inputs; held for as long as the graph is."""


class ForwardGraphs:
    """Runs the forwards of one transformer, by graphs where it has them."""

    def __init__(self, transformer: HeliosTransformer, recorder: Recorder, limits: GraphLimits = GraphLimits()) -> None:
        self._transformer = transformer
        self._recorder = recorder
        self._limits = limits
        self._graphs: OrderedDict[GraphKey, _Graph] = OrderedDict()
        self._known: OrderedDict[GraphKey, bool] = OrderedDict()  # whether it may be recorded
        self._kept = KeptMemory()
        self._max_tokens: int | None = None
        self._may_record = True

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def num_bytes(self) -> int:
        """Device memory of all graphs and their inputs."""
        inputs = sum(graph.inputs.num_bytes for graph in self._graphs.values())
        return self._recorder.num_bytes + self._kept.num_bytes + inputs

    def begin_step(self) -> None:
        """A step may have several forwards, of which at most one is recorded."""
        self._may_record = True

    def __call__(self, batch: PackedBatch, text: PackedText) -> Tensor:
        """`HeliosTransformer.forward`, bit for bit: [M, patch * C]."""
        key = GraphKey.of(self._transformer, batch, text)
        graph = self._graphs.get(key)
        if graph is None and self._is_due(key):
            graph = self._record(key, batch, text)
        if graph is None:
            rows: Tensor = self._transformer(batch, text)
            self._remember(key)
            return rows
        self._graphs.move_to_end(key)
        graph.inputs.load(batch, text)
        graph.recording.replay()
        graph.inputs.store(batch)
        return graph.recording.out.clone()

    def release(self) -> None:
        """Gives up all graphs, as memory is short. Forwards as large as the largest of them are not recorded again."""
        if self._graphs:
            self._max_tokens = max(key.num_tokens for key in self._graphs) - 1
            logger.warning(
                "released %d CUDA graphs for want of memory; forwards of more than %d tokens have none from now on",
                len(self),
                self._max_tokens,
            )
        while self._graphs:
            self._evict()
        self._known.clear()
        self._kept = KeptMemory()

    def _is_due(self, key: GraphKey) -> bool:
        is_small = self._max_tokens is None or key.num_tokens <= self._max_tokens
        return self._may_record and is_small and self._known.get(key, False)

    def _remember(self, key: GraphKey) -> None:
        """That a forward was done without a graph."""
        self._known.setdefault(key, key.is_recordable)
        self._known.move_to_end(key)
        while len(self._known) > self._limits.num_known:
            self._known.popitem(last=False)

    def _record(self, key: GraphKey, batch: PackedBatch, text: PackedText) -> _Graph | None:
        """Makes room and records; None if that is not possible."""
        self._may_record = False
        while len(self) >= self._limits.num_graphs:
            self._evict()
        try:
            inputs = StaticInputs.like(self._transformer, batch, text, self._kept)
            with used_bounds() as bounds:
                recording = self._recorder.record(partial(self._transformer, inputs.batch, inputs.text))
        except Exception as error:  # what a device does not record, it may well run
            logger.warning("no CUDA graph for %s: %s", key, error)
            self._known[key] = False
            return None
        graph = self._graphs[key] = _Graph(inputs=inputs, recording=recording, bounds=tuple(bounds))
        if self.num_bytes > self._limits.num_bytes:
            self.release()
            return None
        return graph

    def _evict(self) -> None:
        """Gives up the graph whose last use is longest ago."""
        _, graph = self._graphs.popitem(last=False)
        graph.recording.release()


def graphs_of(transformer: HeliosTransformer) -> ForwardGraphs | None:
    """None unless the transformer is to run by graphs."""
    return ForwardGraphs(transformer, CudaRecorder(transformer.device)) if transformer.has_graphs else None
