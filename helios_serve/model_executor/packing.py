"""Packs sequences of different lengths into one batch and back, or the part of it that one rank holds. Knows token
counts, patches and modulation rows; knows nothing of schedules or guidance.

The packed stream is request-major: history of sequence 0, current tokens of sequence 0, history of sequence 1, ...
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from helios_serve.kernels import Segments, attention_scale
from helios_serve.kernels.cross_attention import PackedText as PackedText
from helios_serve.kernels.cross_attention import places_of
from helios_serve.model_executor.history import HistoryTokens
from helios_serve.model_executor.history_reuse import HistoryKV, PackedHistoryKV, pack_history_kv
from helios_serve.model_executor.rope import Grid
from helios_serve.model_executor.step_cache import StepCache
from helios_serve.parallel.context_parallel import SpreadSegments, spread_segments
from helios_serve.parallel.mesh import SOLO, Mesh
from helios_serve.parallel.shards import Shards, shard, upload


@dataclass(frozen=True, slots=True, kw_only=True)
class TextKV:
    """Cross-attention keys and values of one prompt for all layers, projected once: each [layers, L, H, Dh].

    repeats: how many equal tokens the last one stands for.
    """

    keys: Tensor
    values: Tensor
    repeats: int = 1

    @property
    def num_tokens(self) -> int:
        return self.keys.shape[1]

    @property
    def num_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSequence:
    """One sequence of a step: what is denoised, what it sees, and at which timestep.

    `x` is [C, T, h, w]; `rotary` [T * h/2 * w/2, 2, Dh/2] belongs to its patch grid. What is kept from step to step is
    None without that approximation.
    """

    history: HistoryTokens
    x: Tensor
    rotary: Tensor
    timestep: float
    text: TextKV
    history_kv: HistoryKV | None = None
    step_cache: StepCache | None = None

    @property
    def num_history(self) -> int:
        """History tokens that go through the transformer: none once their keys and values are kept."""
        return 0 if self.history_kv is not None and self.history_kv.is_sealed else len(self.history.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where the tokens of a pack stand; depends on lengths alone, so that the steps of a stage share one.

    row: [N] int32 modulation row of each token: 0 for history, 1 + i for the current tokens of sequence i.
    history_index [sum of Nh], current_index [M]: int64 places in the packed stream.
    current_place: [N] int32 place of each token among the current ones, -1 for history.
    cu_tokens, cu_current: running sums over all tokens and over the current ones.
    current_only: the layout of a stream that holds the current tokens alone; None in that layout itself.
    """

    row: Tensor
    history_index: Tensor
    current_index: Tensor
    current_place: Tensor
    cu_tokens: tuple[int, ...]
    cu_current: tuple[int, ...]
    current_only: Layout | None = None

    @property
    def num_current(self) -> int:
        return self.cu_current[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """The tokens of all sequences of a step that this rank holds, back to back, without padding.

    history: [sum of Nh, D] embedded history tokens. patches: [M, C * patch] current latents, not yet embedded.
    rotary: [N, 2, Dh/2] float32. timesteps: [1 + sequences] float32, the first one, 0, being the history's.
    self_attention over the tokens of all ranks, current_attention for the current ones alone. shards: of history and
    current tokens over the ranks. grids: (T, h, w) of each sequence in patches. history_kv, step_caches: what sequences
    keep between steps, None without those approximations.
    """

    history: Tensor
    patches: Tensor
    rotary: Tensor
    timesteps: Tensor
    layout: Layout
    self_attention: SpreadSegments
    current_attention: SpreadSegments
    shards: Shards
    grids: tuple[Grid, ...]
    history_kv: PackedHistoryKV | None
    step_caches: tuple[StepCache | None, ...]

    @property
    def num_tokens(self) -> int:
        return self.layout.cu_tokens[-1]

    def with_kept(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """What self-attention sees, given keys and values [N, H, Dh] of this batch: those that are kept are added."""
        return (k, v) if self.history_kv is None else self.history_kv.complete(layer, k, v)

    def attended_by(self, backend: str) -> PackedBatch:
        """The same, whose self-attention is computed by the backend of that name."""
        of_all, of_current = self.self_attention.by(backend), self.current_attention.by(backend)
        return replace(self, self_attention=of_all, current_attention=of_current)


def pack(sequences: Many[TokenSequence], patch: Grid, mesh: Mesh = SOLO) -> tuple[PackedBatch, PackedText]:
    """Lays the tokens of `sequences` back to back.

    Args:
        sequences: at least one, on one device and of one dtype; the same on all ranks of `mesh.tokens`.
        patch: the transformer's patch size (1, ph, pw).
    """
    device = sequences[0].x.device
    shards = shard(tuple((s.num_history, len(s.rotary)) for s in sequences), mesh.tokens.size)
    history_kv, keys = pack_history_kv([s.history_kv for s in sequences], shards, mesh.tokens.rank)
    parts = [(s, past, now) for s, (past, now) in zip(sequences, shards.of_rank(mesh.tokens.rank), strict=True)]
    layout = _layout(
        tuple(past.stop - past.start for _, past, _ in parts), tuple(now.stop - now.start for *_, now in parts), device
    )
    scale = attention_scale(2 * sequences[0].rotary.shape[-1])
    batch = PackedBatch(
        history=torch.cat([s.history.tokens[past] for s, past, _ in parts]),
        patches=torch.cat([patchify(s.x, patch)[now] for s, _, now in parts]),
        rotary=torch.cat([rows for s, past, now in parts for rows in (s.history.rotary[past], s.rotary[now])]),
        timesteps=upload(torch.tensor([0.0, *(s.timestep for s in sequences)]), device),
        layout=layout,
        self_attention=_attention(shards, keys, scale, mesh, device),
        current_attention=_attention(shards.only(1), keys, scale, mesh, device),
        shards=shards,
        grids=grids_of(sequences, patch),
        history_kv=history_kv,
        step_caches=tuple(s.step_cache for s in sequences),
    )
    return batch, _pack_text([s.text for s in sequences], layout, scale, device)


def unpack(rows: Tensor, batch: PackedBatch, patch: Grid) -> list[Tensor]:
    """The transformer's output rows [M, patch * C], of all ranks, as one flow [C, T, h, w] per sequence."""
    return split_flows(rows, batch.grids, patch)


def split_flows(rows: Tensor, grids: Many[Grid], patch: Grid) -> list[Tensor]:
    """Output rows [sum of T * h * w, patch * C] as one flow [C, T, h, w] per patch grid."""
    lengths = [t * h * w for t, h, w in grids]
    return [unpatchify(part, grid, patch) for part, grid in zip(rows.split(lengths), grids, strict=True)]


def grids_of(sequences: Many[TokenSequence], patch: Grid) -> tuple[Grid, ...]:
    """(T, h, w) of each sequence in patches."""
    return tuple((s.x.shape[1] // patch[0], s.x.shape[2] // patch[1], s.x.shape[3] // patch[2]) for s in sequences)


def patchify(x: Tensor, patch: Grid) -> Tensor:
    """[C, T, h, w] -> [tokens, C * pt * ph * pw], channel outermost as a convolution weight has it."""
    c, t, h, w = x.shape
    pt, ph, pw = patch
    blocks = x.view(c, t // pt, pt, h // ph, ph, w // pw, pw)
    return blocks.permute(1, 3, 5, 0, 2, 4, 6).reshape(-1, c * pt * ph * pw)


def unpatchify(rows: Tensor, grid: Grid, patch: Grid) -> Tensor:
    """[tokens, pt * ph * pw * C] -> [C, T, h, w], channel innermost in a row."""
    blocks = rows.view(*grid, *patch, -1).permute(6, 0, 3, 1, 4, 2, 5)
    return blocks.reshape(blocks.shape[0], *(n * p for n, p in zip(grid, patch, strict=True)))


def _attention(queries: Shards, keys: Shards, scale: float, mesh: Mesh, device: torch.device) -> SpreadSegments:
    last = mesh.tokens.size
    whole = Segments(cu_q=queries.cu_rows(0, last), cu_k=keys.cu_rows(0, last), scale=scale)
    return spread_segments(whole, queries, keys, mesh, device)


def _pack_text(texts: Many[TextKV], layout: Layout, scale: float, device: torch.device) -> PackedText:
    keys, values = tuple(text.keys for text in texts), tuple(text.values for text in texts)
    cu_q, repeats = layout.cu_current, tuple(text.repeats for text in texts)
    places = upload(places_of(keys, values, cu_q, repeats), device) if device.type == "cuda" else None
    return PackedText(keys=keys, values=values, repeats=repeats, cu_q=cu_q, scale=scale, places=places)


@lru_cache(maxsize=256)
def _layout(history_lengths: tuple[int, ...], current_lengths: tuple[int, ...], device: torch.device) -> Layout:
    kinds = [length for pair in zip(history_lengths, current_lengths, strict=True) for length in pair]
    rows = [row for index in range(len(history_lengths)) for row in (0, 1 + index)]
    row = torch.tensor(rows, dtype=torch.int32).repeat_interleave(torch.tensor(kinds))
    cu_tokens = _running_sum(h + c for h, c in zip(history_lengths, current_lengths, strict=True))
    cu_current = _running_sum(current_lengths)
    of_current = _layout_of(row[row != 0], cu_current, cu_current, device)
    return replace(_layout_of(row, cu_tokens, cu_current, device), current_only=of_current)


def _layout_of(row: Tensor, cu_tokens: tuple[int, ...], cu_current: tuple[int, ...], device: torch.device) -> Layout:
    is_current = row != 0
    place = torch.where(is_current, is_current.cumsum(0) - 1, -1)
    return Layout(
        row=upload(row, device),
        history_index=upload((~is_current).nonzero()[:, 0], device),
        current_index=upload(is_current.nonzero()[:, 0], device),
        current_place=upload(place.to(torch.int32), device),
        cu_tokens=cu_tokens,
        cu_current=cu_current,
    )


def _running_sum(lengths: Iterable[int]) -> tuple[int, ...]:
    return (0, *accumulate(lengths))
