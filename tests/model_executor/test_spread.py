"""How a checkpoint's forwards are shared, how the log explains it, and what ends a group. That forwards stay right:
tests/parallel."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from helios_serve.config import GivenDegrees, ModelConfig
from helios_serve.model_executor.model import open_checkpoint
from helios_serve.model_executor.model_config import CheckpointConfig
from helios_serve.model_executor.spread import breaks_group, degrees_for, explain_degrees, join_mesh
from helios_serve.parallel.collectives import Axis, GroupBrokenError, RankGroup
from helios_serve.parallel.links import NETWORK, Links, find_links, slowest_link
from helios_serve.parallel.mesh import SOLO, Degrees, Mesh
from helios_serve.types import Variant
from tests.conftest import MakeCheckpoint
from tests.parallel.fake_gpus import FakeGpus


def full_size(variant: Variant, make_checkpoint: MakeCheckpoint) -> CheckpointConfig:
    """The configuration of a tiny checkpoint with the heads of the published ones."""
    config = open_checkpoint(ModelConfig(model=str(make_checkpoint(variant)))).config
    transformer = replace(config.transformer, num_attention_heads=40, attention_head_dim=128, rope_dim=(44, 42, 42))
    return replace(config, transformer=transformer)


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("distilled", Degrees(ulysses=8)),
        ("mid", Degrees(cfg=2, ulysses=4)),
        ("base", Degrees(cfg=2, ulysses=4)),
    ],
)
def test_variants_that_guide_share_their_two_sequences_first(
    variant: Variant, expected: Degrees, make_checkpoint: MakeCheckpoint
) -> None:
    assert degrees_for(full_size(variant, make_checkpoint), 8) == expected


def test_heads_decide(make_checkpoint: MakeCheckpoint) -> None:
    with pytest.raises(ValueError, match=r"ulysses 3: do not fit 3 ranks and 40 heads; what fits: cfg 1 x ring 3"):
        degrees_for(full_size("distilled", make_checkpoint), 3, GivenDegrees(ulysses=3))


def test_only_the_ring_crosses_between_nodes(make_checkpoint: MakeCheckpoint) -> None:
    config = full_size("distilled", make_checkpoint)
    assert degrees_for(config, 16, ranks_per_node=8) == Degrees(ring=2, ulysses=8)
    assert degrees_for(config, 8, ranks_per_node=4) == Degrees(ring=2, ulysses=4)
    assert degrees_for(config, 8, ranks_per_node=8) == degrees_for(config, 8)


def test_want_of_memory_ends_a_group_of_several() -> None:
    group = Mesh(tokens=Axis(ranks=(0, 1)))
    with pytest.raises(GroupBrokenError, match="one of 2 ranks is out of memory: no room"), breaks_group(group):
        raise torch.OutOfMemoryError("no room")
    with pytest.raises(torch.OutOfMemoryError), breaks_group(SOLO):
        raise torch.OutOfMemoryError("no room")
    with pytest.raises(ValueError, match="the caller's"), breaks_group(group):
        raise ValueError("the caller's")


def test_one_rank_meets_nobody(make_checkpoint: MakeCheckpoint) -> None:
    assert join_mesh(RankGroup(), full_size("distilled", make_checkpoint), torch.device("cpu")) is SOLO


def test_the_log_has_one_line_with_the_alternatives(make_checkpoint: MakeCheckpoint) -> None:
    config = full_size("distilled", make_checkpoint)
    links = Links(inside=slowest_link(FakeGpus(count=8, nvlinks_each=18), 8), across=NETWORK)
    line = explain_degrees(degrees_for(config, 8, links=links), config, "bfloat16", links)
    assert line == (
        "ranks of a DiT group share forwards by cfg 1 x ring 1 x ulysses 8 (35.84 kB in 119 ns), not cfg 1 x ring 2 x "
        "ulysses 4 (51.2 kB in 171 ns) or cfg 1 x ring 4 x ulysses 2 (81.92 kB in 273 ns): 40 heads, without guidance, "
        "on one node, over NVLink, 18 of them (300 GB/s taken); what one layer sends for a token that a rank holds"
    )
    guided = full_size("mid", make_checkpoint)
    links = find_links("cpu", 2)
    line = explain_degrees(degrees_for(guided, 2, links=links), guided, "float32", links)
    assert "by cfg 2 x ring 1 x ulysses 1 (0 kB), not cfg 1 x ring 1 x ulysses 2 (40.96 kB)" in line
    assert "40 heads, with guidance, on one node, over gloo, link speed not known; what" in line
