"""Steps whose forward is left out, because what goes into it has hardly changed: an approximation.

As long as the modulated input of the first block stays close to that of the last forward, what all blocks together add
to the current tokens is taken from that forward. Source of the idea: Liu et al., "Timestep Embedding Tells: It's Time
to Cache for Video Diffusion Model" (TeaCache, arXiv 2411.19108), without its polynomials, which are fitted to trained
weights. Knows what one sequence keeps and when it is used; `cached_forward` computes with it.

Shape letters: M current tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Past:
    """signal: modulated input [M, D] of the step before. change: how much it has changed since the last forward, summed
    over steps. residual: what the blocks added there, [M, D]."""

    signal: Tensor
    change: float
    residual: Tensor


class StepCache:
    """What one sequence keeps in one stage of a chunk. Mutable: a step is planned and computed, repeatedly if its
    forward fails, and counts from `commit` on.

    Args:
        threshold: the relative change since the last forward, summed over steps, from which on there is another one.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._past: _Past | None = None
        self._signal: Tensor | None = None
        self._change = 0.0
        self._computed: Tensor | None = None
        self.is_reused = False

    def change_of(self, signal: Tensor) -> Tensor:
        """Takes the signal [M, D] of the step at hand; its relative change [] against the step before in float32,
        infinite in a first step."""
        self._signal = signal
        if self._past is None:
            return torch.full((), torch.inf, device=signal.device)
        before = self._past.signal.float()
        return (signal.float() - before).abs().mean() / before.abs().mean()

    def plan(self, change: float) -> None:
        """Whether the step at hand, with what `change_of` gave, is left out."""
        self._change = change + (0.0 if self._past is None else self._past.change)
        self.is_reused = self._past is not None and self._change < self._threshold

    def write(self, residual: Tensor) -> None:
        """What the blocks added in the forward of the step at hand, [M, D]."""
        self._computed = residual

    def write_from(self, other: StepCache) -> None:
        """Takes a copy of what `write` gave the other one."""
        assert other._computed is not None
        self.write(other._computed.clone())

    @property
    def residual(self) -> Tensor:
        """That of the last forward."""
        assert self._past is not None
        return self._past.residual

    def commit(self) -> None:
        """The planned step was done."""
        residual = self.residual if self.is_reused else self._computed
        assert residual is not None
        assert self._signal is not None
        change = self._change if self.is_reused else 0.0
        self._past = _Past(signal=self._signal, change=change, residual=residual)
        self._signal = self._computed = None


def write_residuals(caches: Sequence[StepCache | None], cu_current: Sequence[int], residual: Tensor) -> None:
    """Gives each sequence of a pack its rows of what the blocks added, [M, D]."""
    for cache, (start, stop) in zip(caches, pairwise(cu_current), strict=True):
        if cache is not None:
            cache.write(residual[start:stop].clone())
