"""Runs the offline benchmark's engine on the ranks that torchrun has started, and keeps what it decoded. Arguments:
checkpoint, file for what rank 0 kept."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from helios_serve.bench.rank_engine import RankEngine
from helios_serve.bench.rank_work import Workload
from helios_serve.config import ModelConfig
from helios_serve.model_executor.vae import WanVAE
from helios_serve.parallel.vae_shards import WHOLE, WidthShard
from helios_serve.workers.vae import VaeWorker

WORKLOAD = Workload(num_chunks=2, size="64x64", steps=(1, 1, 1))


def main() -> None:
    checkpoint, file = sys.argv[1:]
    torch.set_num_threads(1)
    kept: list[tuple[Tensor, Tensor]] = []
    own_columns: list[int] = []
    whole, part = VaeWorker.decode, WanVAE.decode

    def keeping(worker: VaeWorker, latents: Tensor) -> Tensor:
        pixels = whole(worker, latents)
        kept.append((latents, pixels))
        return pixels

    def counting(vae: WanVAE, latents: Tensor, slab_frames: int | None = None, columns: WidthShard = WHOLE) -> Tensor:
        pixels = part(vae, latents, slab_frames, columns)
        own_columns.append(pixels.shape[-1])
        return pixels

    VaeWorker.decode, WanVAE.decode = keeping, counting  # type: ignore[method-assign]
    engine = RankEngine(ModelConfig(model=checkpoint))
    times = engine.run(engine.requests(WORKLOAD))
    if engine.is_first:
        torch.save({"kept": kept, "own_columns": own_columns, "mux_s": [one.mux_s for one in times.chunks]}, file)
    engine.close()


if __name__ == "__main__":
    main()
