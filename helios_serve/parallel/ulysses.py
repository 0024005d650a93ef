"""Tokens against heads: for attention each rank gives up its share of the tokens for all tokens of its share of the
heads, and back.

Knows shards and tensors; knows nothing of attention. RMSNorm over all heads and the rotation come before, on token
shards, so that nothing has to be summed over ranks. DeepSpeed-Ulysses (arXiv 2309.14509), with q, k and v in one
exchange, of all heads or of some, so that others may be attended to meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from helios_serve.parallel.collectives import Axis, Transfer
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ToHeads:
    """q, k and v of some heads on their way from token shards to all tokens. `sent` is kept until they are there."""

    sent: Tensor
    received: Tensor
    transfer: Transfer
    exchange: Exchange

    def wait(self) -> tuple[Tensor, Tensor, Tensor]:
        """q (Nq, h, Dh), k and v (Nk, h, Dh), request-major."""
        self.transfer.wait()
        rows = self.received.flatten(0, 1).index_select(0, self.exchange.incoming)
        num_queries = len(self.exchange.outgoing)
        num_keys = (len(rows) - num_queries) // 2
        q, k, v = rows.split((num_queries, num_keys, num_keys))
        return q, k, v


@dataclass(frozen=True, slots=True, kw_only=True)
class ToTokens:
    """The result of some heads on its way back to token shards. `sent` is kept until it is there."""

    sent: Tensor
    received: Tensor
    transfer: Transfer

    def wait_into(self, out: Tensor) -> None:
        """Writes this rank's rows of the result: out (Nq/p, p, h, Dh)."""
        self.transfer.wait()
        out.copy_(self.received[:, : len(out)].transpose(0, 1))


def tokens_to_heads(
    q: Tensor, k: Tensor, v: Tensor, exchange: Exchange, axis: Axis, heads: slice = slice(None)
) -> ToHeads:
    """Begins q (Nq/p, H, Dh), k and v (Nk/p, H, Dh) on each rank -> q (Nq, h, Dh), k and v (Nk, h, Dh).

    Args:
        heads: those of the H/p of each rank that travel now, h of them.
    """
    starts = (0, exchange.query_rows, exchange.query_rows + exchange.key_rows)
    parts = [x.unflatten(1, (axis.size, -1))[:, :, heads].transpose(0, 1) for x in (q, k, v)]  # (p, N/p, h, Dh)
    rows = exchange.query_rows + 2 * exchange.key_rows
    sent = torch.empty((axis.size, rows, *parts[0].shape[2:]), dtype=q.dtype, device=q.device)
    for part, start in zip(parts, starts, strict=True):
        sent[:, start : start + part.shape[1]] = part
    received = torch.empty_like(sent)
    return ToHeads(sent=sent, received=received, transfer=axis.begin_all_to_all(sent, received), exchange=exchange)


def heads_to_tokens(out: Tensor, exchange: Exchange, axis: Axis) -> ToTokens:
    """Begins (Nq, h, Dh), request-major, on each rank -> its rows of the Nq with h heads of each rank."""
    rows = torch.empty((axis.size * exchange.query_rows, *out.shape[1:]), dtype=out.dtype, device=out.device)
    rows.index_copy_(0, exchange.outgoing, out)
    sent = rows.unflatten(0, (axis.size, exchange.query_rows))
    received = torch.empty_like(sent)
    return ToTokens(sent=sent, received=received, transfer=axis.begin_all_to_all(sent, received))
