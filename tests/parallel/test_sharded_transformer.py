"""The whole transformer, 40 heads and two layers of it, on real processes against one process."""

from __future__ import annotations

import itertools
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helios_serve.model_executor.history import HistoryTokens
from helios_serve.model_executor.model_config import TransformerConfig
from helios_serve.model_executor.packing import TokenSequence, pack, unpack
from helios_serve.model_executor.spread import predict
from helios_serve.model_executor.transformer import HeliosTransformer, Shortcuts
from helios_serve.parallel.collectives import GroupBrokenError, RankGroup
from helios_serve.parallel.mesh import SOLO, Degrees, build_mesh
from tests.parallel.ranks import run_ranks

CONFIG = TransformerConfig(
    num_attention_heads=40,
    attention_head_dim=6,
    rope_dim=(2, 2, 2),
    in_channels=4,
    out_channels=4,
    text_dim=8,
    freq_dim=8,
    ffn_dim=48,
    num_layers=2,
    is_amplify_history=True,
)
LIMITS = {torch.float64: 1e-13, torch.float32: 1e-5}
"""Largest difference, relative to the largest value."""
DEGREES = {
    2: (Degrees(ulysses=2), Degrees(ring=2), Degrees(cfg=2)),
    4: (Degrees(ulysses=4), Degrees(ring=4), Degrees(ring=2, ulysses=2), Degrees(cfg=2, ulysses=2)),
    6: (Degrees(ring=3, ulysses=2),),  # which does not divide the heads
    8: (Degrees(ulysses=8), Degrees(ring=2, ulysses=4), Degrees(cfg=2, ring=2, ulysses=2)),
}
SHORTCUTS = (Shortcuts(), Shortcuts(last_block_skips_history=True))
PACKS = (
    ((48, 2, 8, 16),),  # history tokens, then T, h, w of the latents
    ((37, 3, 6, 10),),  # needs pads
    ((21, 3, 4, 6), (21, 3, 4, 6), (40, 3, 8, 12)),  # guidance, and a later stage
    ((6, 1, 2, 4), (40, 3, 4, 6)),  # too short to be on every rank
)


def make_transformer(shortcuts: Shortcuts, dtype: torch.dtype = torch.float64) -> HeliosTransformer:
    generator = torch.Generator().manual_seed(1)
    transformer = HeliosTransformer(CONFIG, shortcuts).double().requires_grad_(False).eval()
    for name, parameter in transformer.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2
        if "norm" in name and name.endswith("weight"):
            parameter.data += 1
    return transformer.to(dtype)


def make_sequences(transformer: HeliosTransformer, sizes: tuple[tuple[int, int, int, int], ...]) -> list[TokenSequence]:
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(transformer.dtype)

    text = transformer.project_text(draw(7, CONFIG.text_dim))
    sequences = []
    for index, (num_history, frames, height, width) in enumerate(sizes):
        history = HistoryTokens(
            tokens=draw(num_history, CONFIG.dim), rotary=draw(num_history, 2, CONFIG.attention_head_dim // 2).float()
        )
        sequences.append(
            TokenSequence(
                history=history,
                x=draw(CONFIG.in_channels, frames, height, width),
                rotary=transformer.current_rotary((frames, height // 2, width // 2)),
                timestep=900.0 - 250.0 * index,
                text=text,
            )
        )
    return sequences


def _forward_each(ranks: RankGroup, end: Connection) -> None:
    torch.use_deterministic_algorithms(True)  # what is not written is NaN: pads, too
    for degrees, shortcuts, dtype in itertools.product(DEGREES[ranks.size], SHORTCUTS, LIMITS):
        transformer, mesh = make_transformer(shortcuts, dtype), build_mesh(ranks, degrees)
        for sizes in PACKS:
            end.send([flow.numpy() for flow in predict(transformer, make_sequences(transformer, sizes), mesh)])


def predict_alone(shortcuts: Shortcuts, dtype: torch.dtype) -> list[list[Tensor]]:
    transformer = make_transformer(shortcuts, dtype)
    return [predict(transformer, make_sequences(transformer, sizes), SOLO) for sizes in PACKS]


@pytest.mark.parametrize("size", list(DEGREES))
def test_the_flow_is_that_of_one_process(size: int, tmp_path: Path) -> None:
    combinations = itertools.product(SHORTCUTS, LIMITS)
    expected = [flows for combination in combinations for flows in predict_alone(*combination)] * len(DEGREES[size])
    for answer in run_ranks(size, tmp_path, _forward_each):
        for got, right in zip(answer, expected, strict=True):
            assert isinstance(got, list)
            for flow, alone in zip(got, right, strict=True):
                difference = (torch.from_numpy(flow) - alone).abs().max() / alone.abs().max()
                assert difference.item() <= LIMITS[alone.dtype]


def test_one_rank_packs_as_before() -> None:
    transformer = make_transformer(Shortcuts())
    sequences = make_sequences(transformer, PACKS[2])
    batch, text = pack(sequences, CONFIG.patch_size)
    flows = unpack(transformer(batch, text), batch, CONFIG.patch_size)
    for flow, again in zip(flows, predict(transformer, sequences, SOLO), strict=True):
        assert torch.equal(flow, again)


def _rank_1_leaves(ranks: RankGroup, end: Connection) -> None:
    transformer, mesh = make_transformer(Shortcuts()), build_mesh(ranks, Degrees(ulysses=2))
    sequences = make_sequences(transformer, PACKS[0])
    predict(transformer, sequences, mesh)
    if ranks.rank == 1:
        return
    try:
        predict(transformer, sequences, mesh)
    except GroupBrokenError as error:
        end.send(str(error))


def test_a_rank_that_leaves_breaks_the_group(tmp_path: Path) -> None:
    (told,), nothing = run_ranks(2, tmp_path, _rank_1_leaves, timeout_s=10.0)
    assert nothing == []
    assert str(told).startswith("a forward over 2 ranks was not finished: ")
