"""What a recorded forward depends on: the key under which it may be run again, and the memory that it reads.

Knows packed batches, their shapes and what sequences keep from step to step; knows nothing of how a forward is
recorded. Prompts are not copied: the table that cross-attention reads says where they lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from helios_serve.kernels import Segments
from helios_serve.kernels.attention import backend_for, backend_named
from helios_serve.model_executor.history_reuse import HistoryKV, PackedHistoryKV
from helios_serve.model_executor.model_config import TransformerConfig
from helios_serve.model_executor.packing import PackedBatch, PackedText
from helios_serve.model_executor.step_cache import StepCache
from helios_serve.model_executor.transformer import HeliosTransformer, Shortcuts
from helios_serve.parallel.collectives import Axis
from helios_serve.parallel.shards import Shards


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphKey:
    """All that decides what a forward launches, on which shapes and with which numbers of the host.

    rows: history and current tokens of each sequence that go through the transformer on this rank; shards: of all
    ranks. kept: of each sequence, whether its history is read (True) or written (False), and its rows on each rank;
    None without `history_reuse`. has_step_cache: of each sequence. attention: what the blocks and what the last block
    attends to, with the backends that run. axes: size and rank along each axis of the mesh; sends_by_graph: whether a
    graph may hold its exchanges, which those cannot that keep count of memory of their own. tensors: dtype and width of
    what is copied in. config, shortcuts, dtype: of the transformer.
    """

    rows: tuple[tuple[int, int], ...]
    shards: Shards
    kept: tuple[tuple[bool, tuple[int, ...] | None] | None, ...]
    has_step_cache: tuple[bool, ...]
    attention: tuple[Segments, ...]
    axes: tuple[tuple[int, int], ...]
    sends_by_graph: bool
    num_head_groups: int
    tensors: tuple[tuple[torch.dtype, tuple[int, ...]], ...]
    text_scale: float
    config: TransformerConfig
    shortcuts: Shortcuts
    dtype: torch.dtype

    @classmethod
    def of(cls, transformer: HeliosTransformer, batch: PackedBatch, text: PackedText) -> GraphKey:
        """Of a forward as `transformer` would run it."""
        layout, mesh = batch.layout, batch.self_attention.mesh
        num_current = [stop - start for start, stop in pairwise(layout.cu_current)]
        num_tokens = [stop - start for start, stop in pairwise(layout.cu_tokens)]
        kept = (None,) * len(num_current) if batch.history_kv is None else batch.history_kv.kept
        axes = (mesh.cfg, mesh.ring, mesh.ulysses, mesh.tokens)
        return cls(
            rows=tuple((n - m, m) for n, m in zip(num_tokens, num_current, strict=True)),
            shards=batch.shards,
            kept=tuple(None if each is None else (each.is_sealed, each.bound) for each in kept),
            has_step_cache=tuple(cache is not None for cache in batch.step_caches),
            attention=_attention(transformer, batch),
            axes=tuple((axis.size, axis.rank) for axis in axes),
            sends_by_graph=all(type(axis) is Axis for axis in axes),
            num_head_groups=mesh.num_head_groups,
            tensors=tuple((tensor.dtype, tensor.shape[1:]) for tensor in _changing(batch)),
            text_scale=text.scale,
            config=transformer.config,
            shortcuts=transformer.shortcuts,
            dtype=transformer.dtype,
        )

    @property
    def num_tokens(self) -> int:
        return sum(history + current for history, current in self.rows)

    @property
    def is_recordable(self) -> bool:
        """Whether a graph may hold what computes the attention and what ranks exchange."""
        return self.sends_by_graph and all(backend_named(segments.backend).is_recordable for segments in self.attention)

    def __str__(self) -> str:
        sequences = ", ".join(f"{history}+{current}" for history, current in self.rows)
        backends = "/".join(dict.fromkeys(segments.backend for segments in self.attention))
        precision = str(self.dtype).removeprefix("torch.")
        kind = precision if self.config.fp8_edge_blocks is None else f"{precision} with FP8 blocks"
        return f"{sequences} history+current tokens, {kind}, attention {backends}"


def _attention(transformer: HeliosTransformer, batch: PackedBatch) -> tuple[Segments, ...]:
    """The segments of all attention, each with the name of the backend that it runs by."""
    named = batch.attended_by(transformer.attention)
    like_q = batch.history.new_empty((0, 1, transformer.config.attention_head_dim))
    blocks = (*named.self_attention.blocks, *named.current_attention.blocks)
    return tuple(replace(block, backend=backend_for(like_q, block)) for block in blocks)


def _changing(batch: PackedBatch) -> tuple[Tensor, ...]:
    """What a step brings anew, apart from what its sequences keep."""
    return batch.history, batch.patches, batch.rotary, batch.timesteps


@dataclass(frozen=True, slots=True)
class KeptMemory:
    """Memory for the kept history that graphs read and write: keys and values, each [layers, Nh, H, Dh], for each place
    in a pack and each shape. All graphs share it, as no two run at the same time."""

    _by_place: dict[object, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def stand_in(self, place: int, given: HistoryKV, shape: tuple[int, ...], like: Tensor) -> HistoryKV:
        """In the state of `given`, which is at that place of a pack, with memory of `shape` from here."""
        key = (place, shape, like.dtype)
        if key not in self._by_place:
            self._by_place[key] = like.new_empty(shape), like.new_empty(shape)
        return given.standing_in(self._by_place[key])

    @property
    def num_bytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self._by_place.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticInputs:
    """A batch and its prompts in memory that stays where it is. `text` has a table of places of its own, but neither
    keys nor values, so that no prompt is held."""

    batch: PackedBatch
    text: PackedText

    @classmethod
    def like(
        cls, transformer: HeliosTransformer, batch: PackedBatch, text: PackedText, kept: KeptMemory
    ) -> StaticInputs:
        """For whatever has the key of these; nothing is copied yet."""
        assert text.places is not None
        history, patches, rotary, timesteps = (_empty_like(tensor) for tensor in _changing(batch))
        no_keys = tuple(key.new_empty((key.shape[0], 0, *key.shape[2:])) for key in text.keys)
        static = replace(
            batch,
            history=history,
            patches=patches,
            rotary=rotary,
            timesteps=timesteps,
            history_kv=_stand_ins(transformer.config, batch, kept),
            step_caches=tuple(None if cache is None else StepCache(0.0) for cache in batch.step_caches),
        )
        return cls(batch=static, text=replace(text, keys=no_keys, values=no_keys, places=_empty_like(text.places)))

    def load(self, batch: PackedBatch, text: PackedText) -> None:
        """Copies in all that a forward reads."""
        assert self.text.places is not None
        assert text.places is not None
        for own, given in zip(_changing(self.batch), _changing(batch), strict=True):
            own.copy_(given)
        self.text.places.copy_(text.places)
        for stand_in, kept in _kept_pairs(self.batch, batch):
            if kept.is_sealed:
                stand_in.copy_from(kept)

    def store(self, batch: PackedBatch) -> None:
        """Copies out what a forward leaves for later steps."""
        for stand_in, kept in _kept_pairs(self.batch, batch):
            if not kept.is_sealed:
                kept.copy_from(stand_in)
        for stand_in_cache, cache in zip(self.batch.step_caches, batch.step_caches, strict=True):
            if stand_in_cache is not None and cache is not None:
                cache.write_from(stand_in_cache)

    @property
    def num_bytes(self) -> int:
        assert self.text.places is not None
        return sum(tensor.nbytes for tensor in (*_changing(self.batch), self.text.places))


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _stand_ins(config: TransformerConfig, batch: PackedBatch, memory: KeptMemory) -> PackedHistoryKV | None:
    """For what the sequences of a batch keep."""
    if batch.history_kv is None:
        return None
    heads = (config.num_attention_heads, config.attention_head_dim)
    stand_ins = list[HistoryKV | None]()
    for place, (kept, (num_history, _)) in enumerate(zip(batch.history_kv.kept, batch.history_kv.rows, strict=True)):
        if kept is None:
            stand_ins.append(None)
            continue
        num_rows = kept.num_rows if kept.is_sealed else num_history
        stand_ins.append(memory.stand_in(place, kept, (config.num_layers, num_rows, *heads), batch.history))
    return replace(batch.history_kv, kept=tuple(stand_ins))


def _kept_pairs(static: PackedBatch, batch: PackedBatch) -> Iterator[tuple[HistoryKV, HistoryKV]]:
    """The stand-in and the real one of each sequence that keeps its history."""
    if static.history_kv is None or batch.history_kv is None:
        return
    for stand_in, kept in zip(static.history_kv.kept, batch.history_kv.kept, strict=True):
        if stand_in is not None and kept is not None:
            yield stand_in, kept
