"""One forward over the ranks of a mesh: which sequences and tokens are this rank's, and every flow on every rank.

Knows sequences and meshes; knows nothing of chunks, schedules or guidance. Every rank has all that is denoised, so that
samplers draw and advance alike everywhere, and nothing but flows has to be told.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from helios_serve.config import FREE_DEGREES, DType, GivenDegrees
from helios_serve.model_executor.cuda_graph import ForwardGraphs
from helios_serve.model_executor.model_config import CheckpointConfig
from helios_serve.model_executor.packing import PackedBatch, PackedText, TokenSequence, grids_of, pack, split_flows
from helios_serve.model_executor.transformer import HeliosTransformer
from helios_serve.parallel.collectives import GroupBrokenError, RankGroup, backend_of
from helios_serve.parallel.links import ASSUMED_LINKS, Links, find_links
from helios_serve.parallel.mesh import (
    Degrees,
    Mesh,
    build_mesh,
    choose_degrees,
    possible_degrees,
    seconds_per_row_byte,
)
from helios_serve.parallel.peer_memory import with_peer_memory
from helios_serve.parallel.shards import gather, share

logger = logging.getLogger(__name__)

Forward = Callable[[PackedBatch, PackedText], Tensor]
"""Output rows [M, patch * C] of a packed batch."""


def join_mesh(
    ranks: RankGroup, config: CheckpointConfig, device: torch.device, given: GivenDegrees = FREE_DEGREES
) -> Mesh:
    """The mesh over which a group shares the forwards of a checkpoint; all of its ranks call this at the same time.

    Raises: ValueError when what is given does not fit, with what does; RuntimeError when a rank cannot be reached.
    """
    per_node = ranks.size if ranks.ranks_per_node is None else ranks.ranks_per_node
    links = ranks.broadcast(find_links(device.type, per_node) if ranks.rank == 0 else ASSUMED_LINKS)
    degrees = degrees_for(config, ranks.size, given, per_node, links)
    if ranks.rank == 0 and ranks.size > 1:
        between = "" if ranks.size <= per_node else f"; between nodes {links.across}"
        logger.info("%d ranks share forwards by %s, over %s%s", ranks.size, degrees, links.inside, between)
    mesh = build_mesh(ranks, degrees, backend_of(device), given.head_groups)
    mesh.meet(device)
    if given.symmetric_memory:
        mesh = replace(mesh, ulysses=with_peer_memory(mesh.ulysses, device))
    return mesh


def degrees_for(
    config: CheckpointConfig,
    num_ranks: int,
    given: GivenDegrees = FREE_DEGREES,
    ranks_per_node: int | None = None,
    links: Links = ASSUMED_LINKS,
) -> Degrees:
    """How ranks share the forwards of a checkpoint; `ranks_per_node` is None if all are on one.

    Raises: ValueError when what is given does not fit, with what does.
    """
    num_heads = config.transformer.num_attention_heads
    per_node = num_ranks if ranks_per_node is None else ranks_per_node
    return choose_degrees(num_ranks, num_heads, per_node, is_guided=_is_guided(config), given=given, links=links)


def explain_degrees(degrees: Degrees, config: CheckpointConfig, dtype: DType, links: Links = ASSUMED_LINKS) -> str:
    """What was chosen or given for ranks of one node, beside the other ways to share a forward that send the least, and
    which speed of the links that counts on; in one line."""
    num_heads = config.transformer.num_attention_heads
    row_bytes = config.transformer.dim * {"float32": 4, "bfloat16": 2}[dtype]
    is_guided = _is_guided(config)
    others = [
        each
        for each in possible_degrees(degrees.num_ranks, num_heads)
        if each != degrees and (is_guided or each.cfg == 1)
    ]
    shown = [degrees, *sorted(others, key=lambda each: each.rows_sent)[:2]]
    is_timed = links.inside.gb_per_s is not None

    def cost(each: Degrees) -> str:
        sent = f"{each.rows_sent * row_bytes / 1e3:.4g} kB"
        nanoseconds = 1e9 * row_bytes * seconds_per_row_byte(each, each.num_ranks, links)
        return f"{each} ({sent} in {nanoseconds:.0f} ns)" if is_timed else f"{each} ({sent})"

    chosen, *rest = map(cost, shown)
    return (
        f"ranks of a DiT group share forwards by {chosen}, not {' or '.join(rest) or 'otherwise'}: {num_heads} heads, "
        f"{'with' if is_guided else 'without'} guidance, on one node, over {links.inside}; what one layer sends for a "
        "token that a rank holds"
    )


def _is_guided(config: CheckpointConfig) -> bool:
    """Whether most requests have two sequences."""
    return config.variant != "distilled"


@contextmanager
def breaks_group(mesh: Mesh) -> Iterator[None]:
    """Makes want of memory, which one of several ranks may meet alone, the end of them all: they would wait for it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        if mesh.num_ranks == 1:
            raise
        raise GroupBrokenError(f"one of {mesh.num_ranks} ranks is out of memory: {error}") from error


def predict(
    transformer: HeliosTransformer,
    sequences: Sequence[TokenSequence],
    mesh: Mesh,
    graphs: ForwardGraphs | None = None,
) -> list[Tensor]:
    """The flow of each sequence, [C, T, h, w], in one forward.

    Args:
        sequences: the same on all ranks; of one device and dtype.
        graphs: of this transformer, by which it is to run; packs of equal sequences share one, whatever their order.

    Raises: GroupBrokenError for whatever goes wrong on one of several ranks: the others wait for it in an exchange.
    """
    if not sequences:
        return []
    try:
        if graphs is None:
            return _predict_together(transformer, sequences, mesh, transformer)
        order = sorted(range(len(sequences)), key=lambda index: _kind(sequences[index]))
        flows = _predict_together(transformer, [sequences[index] for index in order], mesh, graphs)
        return [flow for _, flow in sorted(zip(order, flows, strict=True), key=lambda pair: pair[0])]
    except Exception as error:
        if mesh.num_ranks == 1:
            raise
        raise GroupBrokenError(f"a forward over {mesh.num_ranks} ranks was not finished: {error}") from error


def _kind(sequence: TokenSequence) -> tuple[int, int, bool, bool]:
    """By which sequences of a pack are sorted."""
    has_kept, has_cache = sequence.history_kv is not None, sequence.step_cache is not None
    return (sequence.num_history, len(sequence.rotary), has_kept, has_cache)


def _predict_together(
    transformer: HeliosTransformer, sequences: Sequence[TokenSequence], mesh: Mesh, forward: Forward
) -> list[Tensor]:
    shares = share(tuple((len(s.history.tokens), len(s.rotary)) for s in sequences), mesh.cfg.size).only(1)
    is_own = [part.stop > part.start for (part,) in shares.of_rank(mesh.cfg.rank)]
    rows = _predict_own(transformer, [s for s, own in zip(sequences, is_own, strict=True) if own], mesh, forward)
    return split_flows(gather(rows, shares, mesh.cfg), grids_of(sequences, transformer.patch), transformer.patch)


def _predict_own(
    transformer: HeliosTransformer, sequences: Sequence[TokenSequence], mesh: Mesh, forward: Forward
) -> Tensor:
    """Output rows [M, patch * C] of the sequences that this half of the group has."""
    if not sequences:
        width = math.prod(transformer.patch) * transformer.config.out_channels
        return torch.empty((0, width), dtype=transformer.dtype, device=transformer.device)
    batch, text = pack(sequences, transformer.patch, mesh)
    return gather(forward(batch, text), batch.shards.only(1), mesh.tokens)
