"""The flows of a step, of which some may be left to what is kept in a `StepCache`.

Knows sequences and both ends of the transformer; knows no schedule, guidance or rank. Without a cache it is the given
forward and nothing else. Shape letters: M current tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from helios_serve import kernels
from helios_serve.model_executor.layers import Modulation
from helios_serve.model_executor.packing import TokenSequence, grids_of, patchify, split_flows
from helios_serve.model_executor.step_cache import StepCache
from helios_serve.model_executor.transformer import HeliosTransformer

Forward = Callable[[list[TokenSequence]], list[Tensor]]
"""The flows [C, T, h, w] of sequences, all computed."""


def predict_cached(
    transformer: HeliosTransformer, sequences: Sequence[TokenSequence], forward: Forward
) -> list[Tensor]:
    """The flow of each sequence, [C, T, h, w]: by `forward`, or by what is kept. Waits for the device once, if any
    sequence has a cache."""
    _plan(transformer, [(s, s.step_cache) for s in sequences if s.step_cache is not None])
    flows = iter(forward([s for s in sequences if _reused(s) is None]))
    return [
        next(flows) if cache is None else _flow_of(transformer, s, cache)
        for s, cache in ((s, _reused(s)) for s in sequences)
    ]


def _reused(sequence: TokenSequence) -> StepCache | None:
    """The cache that the flow is taken from; None if it is to be computed."""
    cache = sequence.step_cache
    return cache if cache is not None and cache.is_reused else None


def _plan(transformer: HeliosTransformer, cached: Sequence[tuple[TokenSequence, StepCache]]) -> None:
    if not cached:
        return
    changes = torch.stack([cache.change_of(_modulated_input(transformer, sequence)) for sequence, cache in cached])
    for (_, cache), change in zip(cached, changes.tolist(), strict=True):
        cache.plan(change)


def _modulated_input(transformer: HeliosTransformer, sequence: TokenSequence) -> Tensor:
    """What the first block's attention takes of the current tokens: [M, D]."""
    x = _embed(transformer, sequence)
    time = transformer.condition_embedder.embed_time(_timestep(sequence))
    (first,) = kernels.modulation_table(transformer.scale_shift_tables[:1], time.modulation)
    modulation = Modulation.of(first)
    return kernels.layer_norm_modulate(x, modulation.shift, modulation.scale, _one_row(x), transformer.config.eps)


def _flow_of(transformer: HeliosTransformer, sequence: TokenSequence, cache: StepCache) -> Tensor:
    """The transformer without its blocks, in whose place stands what they added in the last forward."""
    x = _embed(transformer, sequence) + cache.residual
    shift, scale = transformer.norm_out(transformer.condition_embedder.embed_time(_timestep(sequence)).hidden)
    rows = transformer.proj_out(kernels.layer_norm_modulate(x, shift, scale, _one_row(x), transformer.config.eps))
    (flow,) = split_flows(rows, grids_of([sequence], transformer.patch), transformer.patch)
    return flow


def _embed(transformer: HeliosTransformer, sequence: TokenSequence) -> Tensor:
    return transformer.embed_current(patchify(sequence.x, transformer.patch))


def _timestep(sequence: TokenSequence) -> Tensor:
    return torch.full((1,), sequence.timestep, device=sequence.x.device)


def _one_row(x: Tensor) -> Tensor:
    """All tokens have row 0 of the modulation."""
    return torch.zeros(len(x), dtype=torch.int32, device=x.device)
