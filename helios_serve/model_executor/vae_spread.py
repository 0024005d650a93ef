"""The VAE over the ranks of an axis: every rank computes its columns of a clip, and has the whole result.

Knows clips and axes; knows nothing of requests or tasks. All ranks of an axis call with the same tensors, in the same
order: what they exchange has no name. Fewer latent columns than ranks are not shared; then each computes them all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from helios_serve.model_executor.memory import retry_out_of_memory
from helios_serve.model_executor.vae import WanVAE
from helios_serve.parallel.collectives import Axis, GroupBrokenError, RankGroup, backend_of, make_axis
from helios_serve.parallel.vae_shards import WHOLE, WidthShard, shard_width

T = TypeVar("T")


def join_columns(ranks: RankGroup, device: torch.device) -> Axis:
    """The axis over which a whole group shares columns; all of its ranks call this at the same time.

    Raises: RuntimeError when a rank cannot be reached.
    """
    axis = make_axis([range(ranks.size)], ranks.rank, backend_of(device), ranks.timeout_s)
    axis.meet(device)
    return axis


def decode_whole(vae: WanVAE, latents: Tensor, axis: Axis) -> Tensor:
    """`WanVAE.decode` of denormalised latents [B, Z, T, H, W], shared out: [B, 3, 1 + 4(T - 1), 8H, 8W]."""
    columns = _columns(latents.shape[-1], axis)
    return columns.gather(vae.decode(latents, columns=columns), vae.config.scale_factor_spatial)


def encode_whole(vae: WanVAE, frames: Tensor, slab_frames: int | None, axis: Axis) -> tuple[Tensor, Tensor]:
    """`WanVAE.encode` of frames [B, 3, 1 + 4k, H, W], shared out: mean and logvar, each [B, Z, 1 + k, H/8, W/8]."""
    columns = _columns(frames.shape[-1] // vae.config.scale_factor_spatial, axis)
    mean, logvar = (columns.gather(part) for part in vae.encode(frames, slab_frames, columns))
    return mean, logvar


def with_retry(work: Callable[[], T], axis: Axis) -> T:
    """The result of `work`, tried again when memory ran out; but not on one of several ranks, which would begin again
    while the others wait for it.

    Raises: GroupBrokenError for whatever goes wrong on one of several ranks.
    """
    if axis.size == 1:
        return retry_out_of_memory(work)
    try:
        return work()
    except Exception as error:
        raise GroupBrokenError(f"work shared by {axis.size} ranks was not finished: {error}") from error


def _columns(num_columns: int, axis: Axis) -> WidthShard:
    return shard_width(num_columns, axis) if num_columns >= axis.size else WHOLE
