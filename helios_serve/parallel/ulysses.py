"""Tokens against heads: for attention each rank gives up its share of the tokens for all tokens of its share of the
heads, and back.

Knows shards and tensors; knows nothing of attention. RMSNorm over all heads and the rotation come before, on token
shards, so that nothing has to be summed over ranks. DeepSpeed-Ulysses (arXiv 2309.14509), with q, k and v in one
exchange.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from helios_serve.parallel.collectives import Axis
from helios_serve.parallel.shards import Shards, upload


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """Where the rows of one pack stand in the blocks that travel; depends on lengths alone.

    query_rows, key_rows: rows of a block, one tensor's. incoming: [Nq + 2 Nk] int64, where to find q, k and v in what
    the ranks sent. outgoing: [Nq] int64, where each row of the result stands in what is sent back.
    """

    query_rows: int
    key_rows: int
    incoming: Tensor
    outgoing: Tensor


@lru_cache(maxsize=256)
def exchange_of(queries: Shards, keys: Shards, first: int, stop: int, device: torch.device) -> Exchange:
    """The exchange between ranks first:stop of those over which tokens are sharded."""
    query_rows, key_rows = queries.max_rows, keys.max_rows
    stride = query_rows + 2 * key_rows
    of_queries, of_keys = queries.places(first, stop, stride), keys.places(first, stop, stride)
    incoming = torch.cat((of_queries, of_keys + query_rows, of_keys + query_rows + key_rows))
    return Exchange(
        query_rows=query_rows,
        key_rows=key_rows,
        incoming=upload(incoming, device),
        outgoing=upload(queries.places(first, stop, query_rows), device),
    )


def tokens_to_heads(q: Tensor, k: Tensor, v: Tensor, exchange: Exchange, axis: Axis) -> tuple[Tensor, Tensor, Tensor]:
    """q (Nq/p, H, Dh), k and v (Nk/p, H, Dh) on each rank -> q (Nq, H/p, Dh), k and v (Nk, H/p, Dh), request-major."""
    num_heads, head_dim = q.shape[1:]
    own_heads = num_heads // axis.size
    rows = exchange.query_rows + 2 * exchange.key_rows
    sent = torch.empty((axis.size, rows, own_heads, head_dim), dtype=q.dtype, device=q.device)
    starts = (0, exchange.query_rows, exchange.query_rows + exchange.key_rows)
    for x, start in zip((q, k, v), starts, strict=True):
        sent[:, start : start + len(x)] = x.unflatten(1, (axis.size, own_heads)).transpose(0, 1)
    received = axis.all_to_all(sent).flatten(0, 1).index_select(0, exchange.incoming)
    num_queries = len(exchange.outgoing)
    num_keys = (len(received) - num_queries) // 2
    q, k, v = received.split((num_queries, num_keys, num_keys))
    return q, k, v


def heads_to_tokens(out: Tensor, num_rows: int, exchange: Exchange, axis: Axis) -> Tensor:
    """(Nq, H/p, Dh), request-major, on each rank -> its `num_rows` of the Nq with all heads, (Nq/p, H, Dh)."""
    sent = torch.empty((axis.size * exchange.query_rows, *out.shape[1:]), dtype=out.dtype, device=out.device)
    sent.index_copy_(0, exchange.outgoing, out)
    received = axis.all_to_all(sent.unflatten(0, (axis.size, exchange.query_rows)))
    return received[:, :num_rows].transpose(0, 1).flatten(1, 2)
