"""Any lengths over any mesh, with NaN in every row that means nothing: attention is what it is on one rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helios_serve import kernels
from helios_serve.kernels import Segments
from helios_serve.parallel.collectives import Transfer
from helios_serve.parallel.context_parallel import attend_sharded, spread_segments
from helios_serve.parallel.mesh import Degrees, Mesh
from helios_serve.parallel.shards import Lengths, gather, shard, take
from tests.parallel.threads import ThreadAxis, run_threads

HEADS, HEAD_DIM = 6, 4
SCALE = kernels.attention_scale(HEAD_DIM)
EXACT = 1e-13

LENGTHS = st.lists(st.tuples(st.integers(0, 15), st.integers(1, 15)), min_size=1, max_size=4).map(tuple)


@pytest.fixture(scope="module", autouse=True)
def poison() -> Iterator[None]:
    """Memory that nobody has written to is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(lengths: Lengths) -> list[list[Tensor]]:
    """q, k and v of each component of each sequence."""
    generator = torch.Generator().manual_seed(1)
    return [
        [torch.randn(length, 3, HEADS, HEAD_DIM, generator=generator, dtype=torch.float64) for length in components]
        for components in lengths
    ]


def alone(lengths: Lengths) -> Tensor:
    cu = shard(lengths, 1).cu_rows(0, 1)
    q, k, v = torch.cat([rows for components in draw(lengths) for rows in components]).unbind(1)
    return kernels.attend(q, k, v, Segments(cu_q=cu, cu_k=cu, scale=SCALE))[0]


def on_ranks(lengths: Lengths, degrees: Degrees, num_head_groups: int) -> Tensor:
    """The result of all ranks together, which is the same on each."""

    def attend(mesh: Mesh) -> Tensor:
        mesh, size = replace(mesh, num_head_groups=num_head_groups), mesh.tokens.size
        shards = shard(lengths, size)
        q, k, v = take(draw(lengths), shards, mesh.tokens.rank).unbind(1)
        cu = shards.cu_rows(0, size)
        segments = Segments(cu_q=cu, cu_k=cu, scale=SCALE)
        out = attend_sharded(q, k, v, spread_segments(segments, shards, shards, mesh, q.device))
        return gather(out, shards, mesh.tokens)

    first, *others = run_threads(degrees, attend)
    assert all(torch.equal(first, other) for other in others)
    return first


@settings(deadline=None, max_examples=40)
@given(lengths=LENGTHS, ring=st.integers(1, 3), ulysses=st.sampled_from([1, 2, 3]), num_head_groups=st.integers(1, 3))
def test_no_layout_lets_a_pad_in(lengths: Lengths, ring: int, ulysses: int, num_head_groups: int) -> None:
    right = alone(lengths)
    got = on_ranks(lengths, Degrees(ring=ring, ulysses=ulysses), num_head_groups)
    assert not got.isnan().any()
    assert ((got - right).abs().max() / right.abs().max()).item() <= EXACT


@pytest.mark.parametrize("degrees", [Degrees(ulysses=2), Degrees(ring=2), Degrees(ring=2, ulysses=2)], ids=str)
def test_pads_that_travel_are_poisoned(degrees: Degrees, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or nothing above could fail."""
    is_poisoned: list[bool] = []

    def note(method: str) -> None:
        original = getattr(ThreadAxis, method)

        def noted(axis: ThreadAxis, sent: Tensor, received: Tensor) -> Transfer:
            is_poisoned.append(bool(sent.isnan().any()))
            transfer: Transfer = original(axis, sent, received)
            return transfer

        monkeypatch.setattr(ThreadAxis, method, noted)

    note("begin_all_to_all")
    note("rotate")
    assert not on_ranks(((5, 2),), degrees, 1).isnan().any()
    assert any(is_poisoned)
