"""What each rank of a group computes and sends in a whole forward of the 14B model, counted without memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.step_trace import CONFIG, NOISY, sequence_at
from helios_serve.model_executor.model_config import TransformerConfig
from helios_serve.model_executor.spread import predict
from helios_serve.model_executor.transformer import HeliosTransformer, Shortcuts
from helios_serve.parallel.mesh import SOLO, Degrees, Mesh
from tests.parallel.counted import counted_mesh, sent_by

PUBLISHED_MB = {
    (2, 2): (113.0, 113.0),
    (4, 2): (84.8, 169.6),
    (8, 0): (13.2, 52.8),
    (8, 1): (20.4, 81.7),
    (8, 2): (49.5, 197.8),
}
"""By ranks and stage: what a rank sends per layer by Ulysses, and in a ring."""


FEW_LAYERS = replace(CONFIG, num_layers=8)
"""Of one kind, so that their number matters little."""


def transformer_of(config: TransformerConfig) -> HeliosTransformer:
    with torch.device("meta"):
        made = HeliosTransformer(config, Shortcuts(last_block_skips_history=True)).to(torch.bfloat16)
    return made.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def transformer() -> HeliosTransformer:
    return transformer_of(CONFIG)


@pytest.fixture(scope="module")
def shallow() -> HeliosTransformer:
    return transformer_of(FEW_LAYERS)


@torch.inference_mode()
def flops_of(transformer: HeliosTransformer, stages: tuple[int, ...], mesh: Mesh) -> int:
    """Operations of this rank; it gives every flow."""
    sequences = [sequence_at(stage) for stage in stages]
    with FlopCounterMode(display=False) as counter:
        flows = predict(transformer, sequences, mesh)
    assert [flow.shape for flow in flows] == [sequence.x.shape for sequence in sequences]
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("degrees", "stages"),
    [
        *((Degrees(ulysses=size), (stage,)) for size in (2, 4, 8) for stage in (0, 1, 2)),
        *((Degrees(ring=size), (0,)) for size in (2, 4, 8)),
        (Degrees(ring=2, ulysses=4), (1,)),
        (Degrees(ulysses=8), (0, 2, 0, 1)),
        (Degrees(cfg=2), (2, 2)),
        (Degrees(cfg=2, ulysses=2), (1, 1)),
        (Degrees(cfg=2, ulysses=4), (0, 0)),
    ],
    ids=str,
)
def test_each_rank_has_its_part_of_the_work(
    shallow: HeliosTransformer, degrees: Degrees, stages: tuple[int, ...]
) -> None:
    fair = flops_of(shallow, stages, SOLO) / degrees.num_ranks
    for rank in (0, degrees.num_ranks - 1):
        own = flops_of(shallow, stages, counted_mesh(degrees, rank))
        assert own == pytest.approx(fair, rel=0.03)


@pytest.mark.parametrize(("size", "stage"), list(PUBLISHED_MB))
def test_a_forward_sends_what_is_published(transformer: HeliosTransformer, size: int, stage: int) -> None:
    """The last layer's queries, which are those of current tokens alone, and the flows are in it."""
    by_ulysses, by_ring = counted_mesh(Degrees(ulysses=size)), counted_mesh(Degrees(ring=size))
    for mesh, published in zip((by_ulysses, by_ring), PUBLISHED_MB[size, stage], strict=True):
        flops_of(transformer, (stage,), mesh)
        sent = sum(sum(sent_by(axis)) for axis in (mesh.ulysses, mesh.ring, mesh.tokens))
        assert sent / CONFIG.num_layers / 1e6 == pytest.approx(published, rel=0.02)


def test_halves_of_guidance_exchange_flows_alone(shallow: HeliosTransformer) -> None:
    mesh = counted_mesh(Degrees(cfg=2))
    flops_of(shallow, (2, 2), mesh)
    flow_bytes = NOISY[2] * CONFIG.out_channels * 4 * 2  # patches of 4, bfloat16
    assert sent_by(mesh.cfg) == [flow_bytes]
    assert sent_by(mesh.ulysses) + sent_by(mesh.ring) + sent_by(mesh.tokens) == []
