"""Which blend of prompts a chunk uses. Knows schedules of prompt changes; knows nothing of text encoders or steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from helios_serve.types import PromptChange


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptEmbedding:
    """A prompt as the transformer takes it: `embeds` [L, text_dim]; `key` names its content, for caches."""

    key: str
    embeds: Tensor

    @property
    def num_bytes(self) -> int:
        return self.embeds.nbytes


def embedding_at(chunk: int, schedule: Sequence[PromptChange], prompts: Sequence[PromptEmbedding]) -> PromptEmbedding:
    """The embedding in force at `chunk`.

    In the i-th chunk of a transition over N chunks it is old + i/N (new - old), linear in the embeddings' dtype, where
    old is whatever was in force just before; N of 0 or 1 switches at once.

    Args:
        schedule: rising in `chunk`, the first entry at 0.
        prompts: one embedding per entry.
    """
    current = prompts[0]
    for index in range(1, len(schedule)):
        change = schedule[index]
        if change.chunk > chunk:
            break
        is_last = index + 1 == len(schedule)
        until = chunk if is_last else min(chunk, schedule[index + 1].chunk - 1)
        current = _blend(current, prompts[index], until - change.chunk + 1, change.transition_chunks)
    return current


def _blend(old: PromptEmbedding, new: PromptEmbedding, position: int, transition_chunks: int) -> PromptEmbedding:
    if position >= transition_chunks or old.key == new.key:
        return new
    weight = position / transition_chunks
    embeds = torch.lerp(old.embeds, new.embeds, weight)
    return PromptEmbedding(key=f"({old.key} {new.key} {weight!r})", embeds=embeds)
