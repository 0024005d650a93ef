"""Attention spread over real processes against one process, in float64: every way to share, every mix of lengths, and
three wrong ways, which must be seen."""

from __future__ import annotations

import itertools
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helios_serve import kernels
from helios_serve.kernels import Segments
from helios_serve.parallel.collectives import RankGroup
from helios_serve.parallel.context_parallel import SpreadSegments, attend_sharded, spread_segments
from helios_serve.parallel.mesh import SOLO, Degrees, Mesh, build_mesh
from helios_serve.parallel.shards import Lengths, Shards, gather, shard, share, take
from helios_serve.parallel.ulysses import heads_to_tokens, tokens_to_heads
from tests.parallel.ranks import run_ranks

HEADS, HEAD_DIM = 40, 6
DIM = HEADS * HEAD_DIM
SCALE = kernels.attention_scale(HEAD_DIM)
CPU = torch.device("cpu")
EXACT = 1e-13
"""Largest difference, relative to the largest value."""

PACKS: tuple[Lengths, ...] = (
    ((64, 48),),
    ((50, 27),),  # needs pads at every degree
    ((31, 18), (40, 72), (31, 18), (7, 1)),  # a pack: guidance, another stage, a sequence shorter than the group
    ((3, 1),),  # most ranks hold nothing
)
DEGREES = {
    2: (Degrees(ulysses=2), Degrees(ring=2)),
    4: (Degrees(ulysses=4), Degrees(ring=4), Degrees(ring=2, ulysses=2)),
    8: (Degrees(ulysses=8), Degrees(ring=8), Degrees(ring=2, ulysses=4), Degrees(ring=4, ulysses=2)),
}
HEAD_GROUPS = (1, 3)
"""All heads of a rank at once, or in uneven parts."""


def rows_of(lengths: Lengths, *shape: int, seed: int = 0) -> list[list[Tensor]]:
    """Rows of each component of each sequence, the same on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(length, *shape, generator=generator, dtype=torch.float64) for length in components]
        for components in lengths
    ]


def qkv_of(lengths: Lengths) -> list[list[Tensor]]:
    return rows_of(lengths, 3, HEADS, HEAD_DIM)


def whole(rows: list[list[Tensor]]) -> Tensor:
    return torch.cat([part for components in rows for part in components])


def attend_alone(lengths: Lengths) -> Tensor:
    cu = shard(lengths, 1).cu_rows(0, 1)
    q, k, v = whole(qkv_of(lengths)).unbind(1)
    return kernels.attend(q, k, v, Segments(cu_q=cu, cu_k=cu, scale=SCALE))[0]


def spread(mesh: Mesh, queries: Shards, keys: Shards) -> SpreadSegments:
    last = queries.num_ranks
    whole_pack = Segments(cu_q=queries.cu_rows(0, last), cu_k=keys.cu_rows(0, last), scale=SCALE)
    return spread_segments(whole_pack, queries, keys, mesh, CPU)


def distance(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


def attend_on(mesh: Mesh, lengths: Lengths) -> Tensor:
    """The result of all ranks together."""
    shards = shard(lengths, mesh.tokens.size)
    q, k, v = take(qkv_of(lengths), shards, mesh.tokens.rank).unbind(1)
    out = attend_sharded(q, k, v, spread(mesh, shards, shards))
    assert out.shape == q.shape
    return gather(out, shards, mesh.tokens)


def attend_current_on(mesh: Mesh, lengths: Lengths) -> Tensor:
    """The same for the current tokens alone, which see all."""
    shards = shard(lengths, mesh.tokens.size)
    current = shards.only(1)
    rows = qkv_of(lengths)
    q = take([[components[1][:, 0]] for components in rows], current, mesh.tokens.rank)
    _, k, v = take(rows, shards, mesh.tokens.rank).unbind(1)
    out = attend_sharded(q, k, v, spread(mesh, current, shards))
    return gather(out, current, mesh.tokens)


def _each(ranks: RankGroup, end: Connection) -> None:
    torch.use_deterministic_algorithms(True)  # what is not written is NaN: pads, too
    for degrees, num_head_groups, lengths in itertools.product(DEGREES[ranks.size], HEAD_GROUPS, PACKS):
        mesh = build_mesh(ranks, degrees, num_head_groups=num_head_groups)
        end.send((degrees, lengths, attend_on(mesh, lengths).numpy(), attend_current_on(mesh, lengths).numpy()))


@pytest.mark.parametrize("size", [2, 4, 8])
def test_many_ranks_attend_as_one(size: int, tmp_path: Path) -> None:
    """All tokens among each other, and the current ones alone, which see everything."""
    for answer in run_ranks(size, tmp_path, _each):
        assert len(answer) == len(DEGREES[size]) * len(HEAD_GROUPS) * len(PACKS)
        for degrees, lengths, of_all, of_current in answer:
            right = attend_alone(lengths)
            is_current = whole([[torch.zeros(past), torch.ones(now)] for past, now in lengths]).bool()
            assert distance(torch.from_numpy(of_all), right) <= EXACT, degrees
            assert distance(torch.from_numpy(of_current), right[is_current]) <= EXACT, degrees


UNEVEN: Lengths = ((50, 27),)


def _with_pads(mesh: Mesh) -> Tensor:
    """Wrong: whatever travels is attended to. Pads are zeros here."""
    shards, size = shard(UNEVEN, mesh.tokens.size), mesh.tokens.size
    q, k, v = take(qkv_of(UNEVEN), shards, mesh.tokens.rank).unbind(1)
    pad = torch.zeros(shards.max_rows - len(q), HEADS, HEAD_DIM, dtype=q.dtype)
    padded = Shards((((tuple(shards.max_rows * rank for rank in range(size + 1))),),))
    segments = spread(mesh, padded, padded)
    out = attend_sharded(*(torch.cat((x, pad)) for x in (q, k, v)), segments)
    return gather(out[: len(q)].contiguous(), shards, mesh.tokens)


def _with_everyones_history(mesh: Mesh) -> Tensor:
    """Wrong: every rank brings the whole history, so that its keys count once per rank."""
    ((num_history, _),) = UNEVEN
    size, rank = mesh.tokens.size, mesh.tokens.rank
    shards = shard(UNEVEN, size)
    ((history, current),) = qkv_of(UNEVEN)
    own = current[shards.of_rank(rank)[0][1]]
    doubled = Shards(((tuple(num_history * index for index in range(size + 1)), shards.bounds[0][1]),))
    q, k, v = torch.cat((history, own)).unbind(1)
    out = attend_sharded(q, k, v, spread(mesh, doubled, doubled))
    return gather(out[num_history:].contiguous(), shards.only(1), mesh.tokens)


def _normed(x: Tensor) -> Tensor:
    return kernels.rms_norm(x.flatten(1), torch.ones(x[0].numel(), dtype=x.dtype), 1e-6).view_as(x)


def _norm_before(mesh: Mesh) -> Tensor:
    shards = shard(UNEVEN, mesh.tokens.size)
    q, k, v = take(qkv_of(UNEVEN), shards, mesh.tokens.rank).unbind(1)
    out = attend_sharded(_normed(q), _normed(k), v, spread(mesh, shards, shards))
    return gather(out, shards, mesh.tokens)


def _norm_after(mesh: Mesh) -> Tensor:
    """Wrong: normed over the heads that a rank has after the exchange."""
    shards = shard(UNEVEN, mesh.tokens.size)
    segments = spread(mesh, shards, shards)
    rows = take(qkv_of(UNEVEN), shards, mesh.tokens.rank)
    assert segments.exchange is not None
    q, k, v = tokens_to_heads(*rows.unbind(1), segments.exchange, mesh.ulysses).wait()
    wide, _ = kernels.attend(_normed(q), _normed(k), v, segments.blocks[0])
    out = rows.new_empty(len(rows), mesh.ulysses.size, HEADS // mesh.ulysses.size, HEAD_DIM)
    heads_to_tokens(wide, segments.exchange, mesh.ulysses).wait_into(out)
    return gather(out.flatten(1, 2), shards, mesh.tokens)


def _wrong_ways(ranks: RankGroup, end: Connection) -> None:
    mesh = build_mesh(ranks, Degrees(ulysses=2))
    for way in (_with_pads, _with_everyones_history, _norm_before, _norm_after):
        end.send(way(mesh).numpy())


def test_wrong_ways_are_seen(tmp_path: Path) -> None:
    answers, _ = run_ranks(2, tmp_path, _wrong_ways)
    with_pads, with_history, norm_before, norm_after = (torch.from_numpy(answer) for answer in answers)
    right = attend_alone(UNEVEN)
    cu = shard(UNEVEN, 1).cu_rows(0, 1)
    q, k, v = whole(qkv_of(UNEVEN)).unbind(1)
    normed, _ = kernels.attend(_normed(q), _normed(k), v, Segments(cu_q=cu, cu_k=cu, scale=SCALE))
    assert distance(norm_before, normed) <= EXACT
    assert distance(norm_after, normed) > 1e-5
    assert distance(with_pads, right) > 1e-3
    assert distance(with_history, right[UNEVEN[0][0] :]) > 1e-3


def _guided_pair(ranks: RankGroup, end: Connection) -> None:
    """Whole sequences to halves of the group, tokens to the ranks of a half."""
    mesh = build_mesh(ranks, Degrees(cfg=2, ulysses=2))
    lengths: Lengths = ((31, 18), (31, 18), (5, 2))
    halves = share(lengths, 2)
    rows, parts = qkv_of(lengths), halves.of_rank(mesh.cfg.rank)
    own = [
        [component[part] for component, part in zip(components, cut, strict=True)]
        for components, cut in zip(rows, parts, strict=True)
        if cut[0].stop > cut[0].start
    ]
    own_lengths = tuple(tuple(len(component) for component in components) for components in own)
    shards = shard(own_lengths, 2)
    q, k, v = take(own, shards, mesh.tokens.rank).unbind(1)
    out = attend_sharded(q, k, v, spread(mesh, shards, shards))
    end.send(gather(gather(out, shards, mesh.tokens), halves, mesh.cfg).numpy())


def test_guidance_shared_by_halves(tmp_path: Path) -> None:
    expected = attend_alone(((31, 18), (31, 18), (5, 2)))
    for (answer,) in run_ranks(4, tmp_path, _guided_pair):
        assert distance(torch.from_numpy(answer), expected) <= EXACT


def test_one_rank_calls_the_kernel_and_nothing_else() -> None:
    (lengths,) = (PACKS[2],)
    assert torch.equal(attend_on(SOLO, lengths), attend_alone(lengths))


def _draw(ranks: RankGroup, end: Connection) -> None:
    mesh = build_mesh(ranks, Degrees(ulysses=2))
    lengths: Lengths = ((27,),)
    shards = shard(lengths, 2)
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(27, 4, generator=generator)
    end.send(gather(take([[noise]], shards, mesh.tokens.rank), shards, mesh.tokens).numpy())
    end.send(torch.randn(1, generator=generator).item())
    generator.manual_seed(7)
    per_shard = torch.randn(shards.num_rows(mesh.tokens.rank), 4, generator=generator)
    end.send(gather(per_shard, shards, mesh.tokens).numpy())


def test_noise_is_drawn_whole_on_every_rank(tmp_path: Path) -> None:
    """So that neither the noise nor the generator afterwards depends on the degree."""
    generator = torch.Generator().manual_seed(7)
    noise, following = torch.randn(27, 4, generator=generator), torch.randn(1, generator=generator).item()
    for drawn, then, per_shard in run_ranks(2, tmp_path, _draw):
        assert torch.equal(torch.from_numpy(drawn), noise)
        assert then == following
        assert not torch.equal(torch.from_numpy(per_shard), noise)  # a draw per shard would be seen
