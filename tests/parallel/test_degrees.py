"""Every degree that 40 heads allow, in one process: ranks are threads. On a GPU, if there is one, with its kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helios_serve import kernels
from helios_serve.kernels import Segments
from helios_serve.kernels.merge_attention import merge_attention
from helios_serve.parallel.context_parallel import attend_sharded, spread_segments
from helios_serve.parallel.mesh import Degrees, Mesh
from helios_serve.parallel.shards import Lengths, gather, shard, take
from tests.parallel.threads import run_threads

HEADS = 40
PACK: Lengths = ((61, 18), (240, 67), (61, 18))
DEGREES = (
    Degrees(ulysses=2),
    Degrees(ulysses=4),
    Degrees(ulysses=5),
    Degrees(ulysses=8),
    Degrees(ulysses=10),
    Degrees(ulysses=20),
    Degrees(ring=3),
    Degrees(ring=7),
    Degrees(ring=3, ulysses=2),
    Degrees(ring=2, ulysses=8),
)


def sharded(degrees: Degrees, qkv: list[list[Tensor]], scale: float) -> Tensor:
    """Attention over a pack by all ranks; each has the same result."""

    def attend(mesh: Mesh) -> Tensor:
        size = mesh.tokens.size
        shards = shard(PACK, size)
        q, k, v = take(qkv, shards, mesh.tokens.rank).unbind(1)
        cu = shards.cu_rows(0, size)
        segments = Segments(cu_q=cu, cu_k=cu, scale=scale)
        out = attend_sharded(q, k, v, spread_segments(segments, shards, shards, mesh, q.device))
        return gather(out, shards, mesh.tokens)

    results = run_threads(degrees, attend)
    assert len(results) == degrees.num_ranks
    assert all(torch.equal(result, results[0]) for result in results)
    return results[0]


def alone(qkv: list[list[Tensor]], scale: float) -> Tensor:
    q, k, v = torch.cat([rows for components in qkv for rows in components]).unbind(1)
    cu = shard(PACK, 1).cu_rows(0, 1)
    return kernels.attend(q, k, v, Segments(cu_q=cu, cu_k=cu, scale=scale))[0]


def draw(head_dim: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        [torch.randn(length, 3, HEADS, head_dim, generator=generator, dtype=torch.float64) for length in components]
        for components in PACK
    ]


@pytest.mark.parametrize("degrees", DEGREES, ids=lambda d: f"ring{d.ring}-ulysses{d.ulysses}")
def test_every_degree_is_exact(degrees: Degrees) -> None:
    degrees.check(degrees.num_ranks, HEADS)
    qkv, scale = draw(8), kernels.attention_scale(8)
    right = alone(qkv, scale)
    assert ((sharded(degrees, qkv, scale) - right).abs().max() / right.abs().max()).item() <= 1e-13


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("degrees", DEGREES, ids=lambda d: f"ring{d.ring}-ulysses{d.ulysses}")
def test_every_degree_on_a_gpu(degrees: Degrees) -> None:
    """bfloat16 at the model's head size is about as near to the truth as one rank is."""
    exact, scale = draw(128), kernels.attention_scale(128)
    qkv = [[rows.to("cuda", torch.bfloat16) for rows in components] for components in exact]
    truth = alone([[rows.double().cpu() for rows in components] for components in qkv], scale)

    def error(out: Tensor) -> float:
        return (out.double().cpu() - truth).norm().item()

    solo = alone(qkv, scale)
    lse = torch.zeros(HEADS, len(solo), device="cuda")
    merge_attention(solo, lse, solo, lse)  # compiled here, not by all threads at once
    assert error(sharded(degrees, qkv, scale)) <= 1.3 * error(solo)
