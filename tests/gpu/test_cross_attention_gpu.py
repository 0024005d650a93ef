"""Cross-attention on the GPU that is there: every candidate and dtype, captured graphs, and nothing that waits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from helios_serve.kernels import cross_attention, reference_cross
from helios_serve.kernels.cases_cross import CASES, LAYER
from helios_serve.kernels.cross_attention import CONFIGS, Config, PackedText, cross_attend, places_of
from helios_serve.kernels.op_case import MARGIN, Shape
from helios_serve.model_executor.history import History
from helios_serve.model_executor.model_config import TransformerConfig
from helios_serve.model_executor.packing import TokenSequence, pack, unpack
from helios_serve.model_executor.transformer import HeliosTransformer, Shortcuts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing to run kernels on"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: kernels do not compile"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]
(CASE,) = CASES
DEVICE = torch.device("cuda", 0)
LIMITS = {torch.float64: 1e-13, torch.float32: 3e-6, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
"""Of the largest value. Shares are rounded to the inputs' dtype before they meet the values."""
RATIO = 1.5
"""How much farther from the exact result than plain products in bfloat16, by root mean square."""


@pytest.fixture(autouse=True)
def _free_memory() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


def _arguments(shape: Shape, dtype: torch.dtype) -> list[Any]:
    torch.manual_seed(sum(shape))
    with DEVICE:
        return CASE.inputs(shape, dtype)


def _exact(arguments: list[Any]) -> Tensor:
    q, keys, values, *others = arguments
    return reference_cross.cross_attend(
        q.double(), [key.double() for key in keys], [value.double() for value in values], *others
    )


def _plain(arguments: list[Any]) -> Tensor:
    """By products in the dtype of the inputs, shares rounded to it."""
    q, keys, values, layer, cu_q, repeats, scale, _ = arguments
    outs = []
    for start, stop, key, value, repeat in zip(cu_q, cu_q[1:], keys, values, repeats, strict=False):
        logits = (q[start:stop].transpose(0, 1) @ key[layer].permute(1, 2, 0)).float() * scale
        logits[..., -1] += torch.tensor(float(repeat)).log()
        outs.append((logits.softmax(-1).to(q.dtype) @ value[layer].transpose(0, 1)).transpose(0, 1))
    return torch.cat(outs)


def _assert_close(actual: Tensor, exact: Tensor, limit: float) -> None:
    assert actual.shape == exact.shape
    assert (actual.double() - exact).abs().max() <= limit * exact.abs().max()


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("shape", [*CASE.odd, *CASE.served], ids=str)
@torch.inference_mode()
def test_operator_equals_its_definition(shape: Shape, dtype: torch.dtype) -> None:
    arguments = _arguments(shape, dtype)
    exact = _exact(arguments)
    _assert_close(CASE.operator(*arguments), exact, LIMITS[dtype])
    _assert_close(CASE.operator(*arguments[:-1], None), exact, LIMITS[dtype])


@pytest.mark.parametrize("shape", CASE.served, ids=str)
@torch.inference_mode()
def test_it_is_as_near_as_plain_products(shape: Shape) -> None:
    arguments = _arguments(shape, torch.bfloat16)
    exact = _exact(arguments)
    ours, theirs = ((one.double() - exact).norm() for one in (CASE.operator(*arguments), _plain(arguments)))
    assert ours <= RATIO * theirs


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@torch.inference_mode()
def test_every_candidate_is_right_and_the_same_each_time(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_attention, "config_for", lambda _: config)
    for shape in (
        *CASE.odd,
        CASE.served[-1],
        (2, 40, 128, 2160, 512, 1),
        (2, 2, 64, 541, 1, 67, 130, 226, 1, 40, 1, 9),
    ):
        arguments = _arguments(shape, torch.bfloat16)
        first = CASE.operator(*arguments)
        _assert_close(first, _exact(arguments), LIMITS[torch.bfloat16])
        assert all(torch.equal(CASE.operator(*arguments), first) for _ in range(3))


@torch.inference_mode()
def test_nothing_is_written_around_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = _arguments((2, 5, 128, 67, 3, 129, 37, 2, 7), torch.bfloat16)
    q = arguments[0]
    memory = torch.full((q.numel() + 2 * MARGIN,), 77.0, dtype=q.dtype, device=DEVICE)
    monkeypatch.setattr(torch, "empty_like", lambda x: memory[MARGIN:-MARGIN].view(x.shape))
    out = cross_attention.launch_cross_attend(*arguments)
    monkeypatch.undo()
    assert out.data_ptr() == memory[MARGIN:].data_ptr()
    _assert_close(out, _exact(arguments), LIMITS[torch.bfloat16])
    assert (memory[:MARGIN] == 77).all()
    assert (memory[-MARGIN:] == 77).all()


def _texts(lengths: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(3, length, 40, 128, device=DEVICE).bfloat16() for length in lengths]


@torch.inference_mode()
def test_a_captured_graph_follows_its_table_to_other_prompts() -> None:
    cu_q, scale = (0, 540, 2700), 128**-0.5
    q = torch.randn(cu_q[-1], 40, 128, device=DEVICE).bfloat16()
    prompts = [((121, 512), (392, 1)), ((7, 38), (506, 475)), ((300, 2), (213, 511))]
    packs = []
    for lengths, repeats in prompts:
        keys, values = _texts(lengths), _texts(lengths)
        places = places_of(keys, values, cu_q, repeats).to(DEVICE)
        packs.append(
            PackedText(keys=tuple(keys), values=tuple(values), repeats=repeats, cu_q=cu_q, scale=scale, places=places)
        )
    eager = [cross_attend(q, text, LAYER) for text in packs]
    (first, *_), table = packs, packs[0].places.clone()
    static = PackedText(
        keys=first.keys, values=first.values, repeats=first.repeats, cu_q=cu_q, scale=scale, places=table
    )
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cross_attend(q, static, LAYER)
    for text, expected in [*zip(packs, eager, strict=True)][::-1]:
        table.copy_(text.places)
        graph.replay()
        assert torch.equal(out, expected)
    assert not torch.equal(eager[0], eager[1])


def _transformer(*, collapses: bool) -> HeliosTransformer:
    config = TransformerConfig(num_layers=2, num_attention_heads=4, ffn_dim=256, text_dim=64)
    with DEVICE:
        made = HeliosTransformer(config, Shortcuts(collapses_pad_tokens=collapses))
    torch.manual_seed(0)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, device=DEVICE) * (0.5 if parameter.ndim < 2 else 0.1)
    return made.requires_grad_(False).eval()


def _sequences(transformer: HeliosTransformer) -> list[TokenSequence]:
    torch.manual_seed(1)
    sequences = []
    for num_real, size in ((120, (8, 12)), (512, (4, 6)), (1, (16, 8))):
        embeds = torch.zeros(512, 64, device=DEVICE)
        embeds[:num_real] = torch.randn(num_real, 64, device=DEVICE)
        history = History(frames=torch.randn(16, 19, *size, device=DEVICE), first=None)
        sequences.append(
            TokenSequence(
                history=transformer.embed_history(history),
                x=torch.randn(16, 9, *size, device=DEVICE),
                rotary=transformer.current_rotary((9, size[0] // 2, size[1] // 2)),
                timestep=500.0,
                text=transformer.project_text(embeds),
            )
        )
    return sequences


def _flows(transformer: HeliosTransformer, sequences: list[TokenSequence]) -> list[Tensor]:
    batch, text = pack(sequences, transformer.patch)
    return unpack(transformer(batch, text), batch, transformer.patch)


@torch.inference_mode()
def test_collapsed_pads_make_the_same_flow() -> None:
    whole, collapsed = _transformer(collapses=False), _transformer(collapses=True)
    expected, sequences = _flows(whole, _sequences(whole)), _sequences(collapsed)
    assert [sequence.text.num_tokens for sequence in sequences] == [121, 512, 2]
    for flow, right in zip(_flows(collapsed, sequences), expected, strict=True):
        assert (flow - right).norm() <= 1e-4 * right.norm()


@torch.inference_mode()
def test_packing_and_a_forward_wait_for_nothing() -> None:
    transformer = _transformer(collapses=True)
    sequences = _sequences(transformer)
    expected = _flows(transformer, sequences)  # what is made once: layouts, compiled kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        flows = _flows(transformer, sequences)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(flow, right) for flow, right in zip(flows, expected, strict=True))
