"""Which embedding a chunk uses: closed forms, a naive walk over the chunks, upstream's rule, and whole videos."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helios_serve.model_executor.prompt_schedule import PromptEmbedding, embedding_at
from helios_serve.offline import Helios
from helios_serve.types import PromptChange


def embedding(name: str) -> PromptEmbedding:
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return PromptEmbedding(key=name, embeds=torch.randn(3, 5, generator=generator, dtype=torch.float64))


def schedule_of(*entries: tuple[int, int]) -> tuple[PromptChange, ...]:
    """(chunk, transition_chunks) of each entry; prompts are a, b, c, ..."""
    return tuple(
        PromptChange(chunk=chunk, prompt=chr(97 + index), transition_chunks=count)
        for index, (chunk, count) in enumerate(entries)
    )


def embeddings_of(schedule: Sequence[PromptChange]) -> tuple[PromptEmbedding, ...]:
    return tuple(embedding(change.prompt) for change in schedule)


def naive(schedule: Sequence[PromptChange], prompts: Sequence[PromptEmbedding], num_chunks: int) -> list[Tensor]:
    """Walks the chunks one by one and remembers what was in force."""
    result = list[Tensor]()
    old = new = now = prompts[0].embeds
    began, length = 0, 1
    for chunk in range(num_chunks):
        for change, prompt in zip(schedule[1:], prompts[1:], strict=True):
            if change.chunk == chunk:
                old, new, began, length = now, prompt.embeds, chunk, max(1, change.transition_chunks)
        weight = min(1.0, (chunk - began + 1) / length) if new is not old else 1.0
        now = (1 - weight) * old + weight * new
        result.append(now)
    return result


@pytest.mark.parametrize("length", [2, 3, 4, 7])
def test_weights_rise_by_one_nth(length: int) -> None:
    schedule = schedule_of((0, 2), (3, length))
    a, b = prompts = embeddings_of(schedule)
    for chunk in range(3):
        assert embedding_at(chunk, schedule, prompts) is a
    for i in range(1, length):
        blend = embedding_at(3 + i - 1, schedule, prompts).embeds
        torch.testing.assert_close(blend, a.embeds + i / length * (b.embeds - a.embeds), rtol=0, atol=1e-14)
    for chunk in (3 + length - 1, 3 + length, 50):
        assert embedding_at(chunk, schedule, prompts) is b


@pytest.mark.parametrize("length", [0, 1])
def test_zero_and_one_switch_at_once(length: int) -> None:
    schedule = schedule_of((0, 2), (3, length))
    a, b = prompts = embeddings_of(schedule)
    assert embedding_at(2, schedule, prompts) is a
    assert embedding_at(3, schedule, prompts) is b


def test_a_change_in_a_transition_starts_from_the_blend_in_force() -> None:
    schedule = schedule_of((0, 2), (1, 4), (3, 2))
    a, b, c = (prompt.embeds for prompt in embeddings_of(schedule))
    half = a + 0.5 * (b - a)  # chunk 2, the second of four
    found = [embedding_at(chunk, schedule, embeddings_of(schedule)).embeds for chunk in range(5)]
    expected = [a, a + 0.25 * (b - a), half, half + 0.5 * (c - half), c]
    for ours, right in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=0, atol=1e-14)


@st.composite
def schedules(draw: st.DrawFn) -> tuple[PromptChange, ...]:
    chunks = [0, *sorted(draw(st.sets(st.integers(1, 12), max_size=4)))]
    return tuple(
        PromptChange(chunk=chunk, prompt=draw(st.sampled_from("abc")), transition_chunks=draw(st.integers(0, 6)))
        for chunk in chunks
    )


@given(schedule=schedules())
def test_equals_the_naive_walk(schedule: tuple[PromptChange, ...]) -> None:
    prompts = embeddings_of(schedule)
    for chunk, expected in enumerate(naive(schedule, prompts, 20)):
        ours = embedding_at(chunk, schedule, prompts).embeds
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@given(schedules=st.lists(schedules(), min_size=1, max_size=3))
def test_a_key_stands_for_one_content(schedules: list[tuple[PromptChange, ...]]) -> None:
    """Equal keys mean equal bits, in all requests: otherwise a cache would hand out another prompt's text."""
    contents: dict[str, Tensor] = {}
    for schedule in schedules:
        for chunk in range(20):
            found = embedding_at(chunk, schedule, embeddings_of(schedule))
            assert torch.equal(contents.setdefault(found.key, found.embeds), found.embeds)


@pytest.mark.parametrize("length", [2, 3, 5])
def test_keys_change_exactly_with_the_content(length: int) -> None:
    schedule = schedule_of((0, 2), (2, length), (4, length))
    prompts = embeddings_of(schedule)
    found = [embedding_at(chunk, schedule, prompts) for chunk in range(12)]
    again = [embedding_at(chunk, schedule, embeddings_of(schedule)) for chunk in range(12)]
    assert [one.key for one in found] == [one.key for one in again]
    for one in found:
        for other in found:
            assert (one.key == other.key) == torch.equal(one.embeds, other.embeds)


def test_a_change_to_the_same_prompt_changes_nothing() -> None:
    schedule = tuple(PromptChange(chunk=chunk, prompt="a", transition_chunks=3) for chunk in (0, 2))
    prompts = embeddings_of(schedule)
    assert {embedding_at(chunk, schedule, prompts).key for chunk in range(8)} == {"a"}


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8])
def test_equals_upstreams_interpolation(steps: int) -> None:
    """Upstream lerps over linspace(0, 1, M) from boundary b; ours is N = M - 1 from b + 1."""
    boundary = 4
    schedule = schedule_of((0, 2), (boundary + 1, steps - 1))
    a, b = prompts = tuple(
        PromptEmbedding(key=prompt.key, embeds=prompt.embeds.float()) for prompt in embeddings_of(schedule)
    )
    weights = torch.linspace(0, 1, steps)
    for chunk in range(20):
        position = chunk - boundary
        expected = b.embeds
        if position < 0:
            expected = a.embeds
        elif position < steps:
            expected = torch.lerp(a.embeds, b.embeds, weights[position])
        torch.testing.assert_close(embedding_at(chunk, schedule, prompts).embeds, expected, rtol=0, atol=1e-6)


def test_a_video_changes_from_the_chunk_of_the_change_on(tiny_distilled: Path) -> None:
    helios = Helios(tiny_distilled)
    options = {"size": "64x64", "num_frames": 165, "seed": 3, "helios": {"steps": [1, 1, 1]}}
    plain = [chunk.latents for chunk in helios.generate("a calm lake", **options)]
    entries = [{"prompt": "a calm lake"}, {"prompt": "a burning city", "chunk": 2, "transition_chunks": 2}]
    changed = [chunk.latents for chunk in helios.generate(prompts=entries, **options)]
    assert len(plain) == len(changed) == 5
    for chunk in (0, 1):
        assert torch.equal(plain[chunk], changed[chunk])
    for chunk in (2, 3, 4):
        assert (plain[chunk] - changed[chunk]).abs().max() > 1e-3
    hard = [entries[0], entries[1] | {"transition_chunks": 1}]
    switched = [chunk.latents for chunk in helios.generate(prompts=hard, **options)]
    assert not torch.equal(switched[2], changed[2])
    assert not any(torch.equal(one, other) for one, other in pairwise(switched))
