"""Any lengths over any number of ranks: nothing is lost, nothing is doubled, nobody holds much more than another."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helios_serve.parallel.shards import Lengths, Shards, shard, share, take

LENGTHS = st.lists(st.lists(st.integers(0, 40), min_size=2, max_size=2).map(tuple), min_size=1, max_size=5).map(tuple)
DEGREES = st.integers(1, 9)

STAGE_0: Lengths = ((2400, 540),)


def rows_of(lengths: Lengths) -> tuple[list[list[Tensor]], Tensor]:
    """Rows that are numbered through, by component and as one pack."""
    pack = torch.arange(sum(map(sum, lengths)))
    rows = iter(pack.split([length for components in lengths for length in components]))
    return [[next(rows) for _ in components] for components in lengths], pack


def blocks(rows: list[list[Tensor]], shards: Shards, stride: int, pad: int) -> Tensor:
    """What all ranks send, `stride` rows each: [p * stride]."""
    sent = torch.full((shards.num_ranks, stride), pad)
    for rank in range(shards.num_ranks):
        own = take(rows, shards, rank)
        sent[rank, : len(own)] = own
    return sent.flatten()


@given(lengths=LENGTHS, size=DEGREES)
def test_shards_that_meet_again_are_the_pack(lengths: Lengths, size: int) -> None:
    rows, pack = rows_of(lengths)
    for shards in (shard(lengths, size), share(lengths, size)):
        sent = blocks(rows, shards, shards.max_rows, pad=-1)
        assert torch.equal(sent[shards.places(0, size, shards.max_rows)], pack)
        assert sum(shards.num_rows(rank) for rank in range(size)) == len(pack)


@given(lengths=LENGTHS, size=DEGREES)
def test_no_rank_holds_two_rows_more_than_another(lengths: Lengths, size: int) -> None:
    shards = shard(lengths, size)
    counts = [shards.num_rows(rank) for rank in range(size)]
    assert max(counts) - min(counts) <= 1
    assert shards.max_rows == -(-sum(map(sum, lengths)) // size)
    for components in shards.bounds:
        for bound in components:
            own = [stop - start for start, stop in pairwise(bound)]
            assert max(own) - min(own) <= 1


@given(lengths=LENGTHS, ring=st.integers(1, 3), ulysses=st.integers(1, 4))
def test_the_lines_of_a_ring_hold_the_pack_between_them(lengths: Lengths, ring: int, ulysses: int) -> None:
    rows, pack = rows_of(lengths)
    shards = shard(lengths, ring * ulysses)
    stride = shards.max_rows + 3
    sent = blocks(rows, shards, stride, pad=-1).view(ring, -1)
    sequences = pack.split([sum(components) for components in lengths])
    held: list[list[Tensor]] = [[] for _ in lengths]
    for line in range(ring):
        first = line * ulysses
        own = sent[line][shards.places(first, first + ulysses, stride)]
        cu = shards.cu_rows(first, first + ulysses)
        assert cu[-1] == len(own)
        for index, (start, stop) in enumerate(pairwise(cu)):
            held[index].append(own[start:stop])
    for parts, sequence in zip(held, sequences, strict=True):
        assert torch.equal(torch.cat(parts).sort().values, sequence)


def test_a_shard_holds_its_part_of_history_and_of_current_tokens() -> None:
    shards = shard(STAGE_0, 8)
    assert [shards.only(0).num_rows(rank) for rank in range(8)] == [300] * 8
    assert [shards.only(1).num_rows(rank) for rank in range(8)] == [68] * 4 + [67] * 4
    assert shards.only(1).max_rows * 8 == 544
    assert shards.max_rows == 368


def test_rows_left_over_go_to_one_rank_after_the_other() -> None:
    shards = shard(((5, 5), (5, 5)), 4)
    assert [shards.num_rows(rank) for rank in range(4)] == [5, 5, 5, 5]


def test_one_rank_holds_everything() -> None:
    assert shard(STAGE_0, 1).of_rank(0) == ((slice(0, 2400), slice(0, 540)),)


@pytest.mark.parametrize(
    ("lengths", "held"),
    [
        (((9, 4), (9, 4)), ((0,), (1,))),  # guidance: one sequence each
        (((9, 4), (9, 4), (30, 8), (2, 2)), ((2,), (0, 1, 3))),
        (((9, 4),), ((0,), ())),
    ],
)
def test_whole_sequences_go_where_there_is_least(lengths: Lengths, held: tuple[tuple[int, ...], ...]) -> None:
    shards = share(lengths, 2)
    for rank, own in enumerate(held):
        parts = shards.of_rank(rank)
        assert tuple(index for index, part in enumerate(parts) if part[0].stop > part[0].start) == own
        assert shards.num_rows(rank) == sum(sum(lengths[index]) for index in own)
