"""Makes the videos of a case on the ranks that torchrun has started. Arguments: checkpoint, case, file for videos."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from helios_serve.config import ModelConfig
from helios_serve.model_executor.model import open_checkpoint
from helios_serve.model_executor.spread import join_mesh
from helios_serve.parallel.collectives import connect_torchrun
from tests.parallel.test_sharded_videos import CASES, make_videos


def main() -> None:
    checkpoint, case, file = sys.argv[1:]
    torch.set_num_threads(1)
    ranks = connect_torchrun()
    opened = open_checkpoint(ModelConfig(model=checkpoint))
    made = make_videos(Path(checkpoint), CASES[case], join_mesh(ranks, opened.config, opened.device))
    if ranks.rank == 0:
        torch.save({"made": made, "ranks": ranks.size, "ranks_per_node": ranks.ranks_per_node}, file)
    ranks.close()


if __name__ == "__main__":
    main()
