"""Self-attention of a packed batch whose tokens are spread over the ranks of a mesh: Ulysses inside, ring outside.

Knows meshes, shards and segments; knows nothing of layers or networks. All else in the transformer is token-wise or,
like cross-attention, the same on every rank, so that this is the one place where ranks exchange anything in a forward.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from helios_serve.kernels import Segments
from helios_serve.parallel.mesh import Mesh
from helios_serve.parallel.ring import ring_attend
from helios_serve.parallel.shards import Shards
from helios_serve.parallel.ulysses import Exchange, exchange_of, heads_to_tokens, tokens_to_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class SpreadSegments:
    """The segments of a pack on a mesh, as one rank sees them.

    exchange: between the ranks of its Ulysses line; None if it stands there alone. blocks: for each rank of its ring,
    the queries that its own line holds against the keys that the other's holds.
    """

    mesh: Mesh
    exchange: Exchange | None
    blocks: tuple[Segments, ...]

    def by(self, backend: str) -> SpreadSegments:
        """The same, attended to by the backend of that name."""
        return replace(self, blocks=tuple(replace(block, backend=backend) for block in self.blocks))


def spread_segments(
    segments: Segments, queries: Shards, keys: Shards, mesh: Mesh, device: torch.device
) -> SpreadSegments:
    """What `attend_sharded` needs to know of a pack.

    Args:
        segments: of the whole pack, without a bias.
        queries, keys: over the ranks of `mesh.tokens`: all tokens', or the current ones' and all.
    """
    degree, ring = mesh.ulysses.size, mesh.ring
    assert queries.num_ranks == keys.num_ranks == degree * ring.size
    assert segments.key_bias is None
    own = ring.rank * degree
    cu_q = queries.cu_rows(own, own + degree)
    return SpreadSegments(
        mesh=mesh,
        exchange=None if degree == 1 else exchange_of(queries, keys, own, own + degree, device),
        blocks=tuple(
            replace(segments, cu_q=cu_q, cu_k=keys.cu_rows(first, first + degree))
            for first in range(0, degree * ring.size, degree)
        ),
    )


def attend_sharded(q: Tensor, k: Tensor, v: Tensor, segments: SpreadSegments) -> Tensor:
    """`kernels.attend` over all ranks: q (Nq/p, H, Dh), k and v (Nk/p, H, Dh) on each -> (Nq/p, H, Dh).

    q and k are normed and rotated. At size 1 it is the kernel and nothing else. In several groups of heads, one group
    travels while another is attended to.
    """
    mesh, exchange = segments.mesh, segments.exchange
    if exchange is None:
        return ring_attend(q, k, v, segments.blocks, mesh.ring)
    axis = mesh.ulysses
    groups = head_groups(q.shape[1] // axis.size, mesh.num_head_groups)
    coming = deque(tokens_to_heads(q, k, v, exchange, axis, heads) for heads in groups)
    going = []
    while coming:
        wide = coming.popleft().wait()
        going.append(heads_to_tokens(ring_attend(*wide, segments.blocks, mesh.ring), exchange, axis))
    out: Tensor = q.new_empty(q.shape).unflatten(1, (axis.size, -1))  # (Nq/p, p, H/p, Dh)
    for heads, part in zip(groups, going, strict=True):
        part.wait_into(out[:, :, heads])
    return out.flatten(1, 2)


def head_groups(num_heads: int, num_groups: int) -> list[slice]:
    """The heads of a rank in groups as even as can be, of one head at least."""
    count = min(num_groups, num_heads)
    bounds = [num_heads * index // count for index in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(bounds)]
