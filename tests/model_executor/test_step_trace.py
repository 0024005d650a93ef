"""One forward of the 14B model, counted without memory: operations, launches, bytes, and that nothing waits for the
device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.step_trace import (
    CONFIG,
    IN_A_PRODUCT,
    NOISY,
    NUM_HISTORY,
    NUM_TEXT,
    count_flops,
    served_transformer,
    trace_forward,
)
from helios_serve.model_executor.batch import ChunkInput, ChunkState, SamplingRules
from helios_serve.model_executor.checkpoint import read_config
from helios_serve.model_executor.history import empty_history
from helios_serve.model_executor.packing import pack, unpack
from helios_serve.model_executor.prompt_schedule import PromptEmbedding
from helios_serve.model_executor.transformer import HeliosTransformer, Shortcuts
from helios_serve.types import SamplingParams

DIM, FFN, LAYERS = CONFIG.dim, CONFIG.ffn_dim, CONFIG.num_layers


def lossless_flops(num_noisy: int) -> int:
    """Operations of one forward whose text keys and values and history tokens are at hand, and whose last block
    computes only keys and values for the history."""
    tokens, patch_values = num_noisy + NUM_HISTORY, 64
    linears = (4 * DIM * DIM + 2 * DIM * FFN) * 2 * tokens  # q, k, v, out; feed-forward
    crossing = 2 * 2 * DIM * DIM * num_noisy + 4 * num_noisy * NUM_TEXT * DIM
    attention = 4 * tokens * tokens * DIM
    skipped = NUM_HISTORY * (2 * 2 * DIM * DIM + 4 * DIM * FFN + 4 * tokens * DIM)
    timesteps = 2 * 2 * (CONFIG.freq_dim * DIM + 7 * DIM * DIM)
    patches = 2 * 2 * num_noisy * patch_values * DIM
    return LAYERS * (linears + crossing + attention) - skipped + timesteps + patches


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_operations_are_those_of_the_model_and_no_more(stage: int) -> None:
    assert count_flops(served_transformer(), (stage,)) == lossless_flops(NOISY[stage])
    assert round(lossless_flops(8640) / 1e9) == 355_880


@pytest.mark.parametrize("stages", [(0,), (1,), (2,), (0, 2)])
def test_launches_and_bytes(stages: tuple[int, ...]) -> None:
    trace = trace_forward(served_transformer(), stages)
    assert trace.launches[IN_A_PRODUCT] == LAYERS
    assert trace.num_launches <= 600, trace.launches
    noisy = sum(NOISY[stage] for stage in stages)
    tokens = noisy + len(stages) * NUM_HISTORY
    budget = LAYERS * (24 * DIM * tokens + 12 * DIM * noisy)
    assert trace.num_bytes <= 1.05 * budget, (trace.num_bytes / budget, trace.bytes)


class NoWaiting(TorchDispatchMode):
    """Stands for a device whose values never come back: reading one, or copying one to the host, fails."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sources = [value for value in tree_leaves(args) if isinstance(value, Tensor)]
        targets = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        if any(value.is_meta for value in sources) and not all(value.is_meta for value in targets):
            raise AssertionError(f"{func} copies from the device to the host")
        return result


def test_a_wait_would_be_seen() -> None:
    on_device = torch.empty(3, device="meta")
    with NoWaiting():
        for wait in (
            lambda: on_device.sum().item(),
            lambda: bool(on_device.sum() > 0),
            lambda: on_device.nonzero(),
            lambda: on_device.to("cpu"),
            lambda: torch.empty(3).copy_(on_device),
        ):
            with pytest.raises((RuntimeError, NotImplementedError, AssertionError)):
                wait()


@pytest.mark.parametrize("variant", ["base", "mid", "distilled"])
@torch.inference_mode()
def test_no_step_of_a_chunk_waits_for_the_device(variant: str, request: pytest.FixtureRequest) -> None:
    config = read_config(request.getfixturevalue(f"tiny_{variant}"))
    with torch.device("meta"):
        transformer = HeliosTransformer(config.transformer, Shortcuts(last_block_skips_history=True))
    transformer = transformer.to(torch.bfloat16).requires_grad_(False)
    steps = (3,) * (1 if variant == "base" else 3)
    prompt = PromptEmbedding(key="p", embeds=torch.empty(20, config.transformer.text_dim, device="meta"))
    chunk = ChunkInput(
        task_id="t",
        request_id="r",
        chunk=0,
        params=SamplingParams(
            width=64, height=64, num_frames=33, fps=24, seed=1, steps=steps, guidance_scale=5.0, use_zero_init=True
        ),
        prompt=prompt,
        negative=prompt,
        history=empty_history(config.transformer.in_channels, 8, 8, torch.device("meta")),
        generator_state=torch.Generator().get_state().numpy().tobytes(),
    )
    rules = SamplingRules(scheduler=config.scheduler, guidance=config.guidance)
    with NoWaiting():
        text = transformer.project_text(prompt.embeds)
        state = ChunkState(chunk, rules, transformer, (text, text))
        num_steps = 0
        while not state.is_finished:
            flows: list[Tensor] = []
            if state.needs_forward:
                batch, texts = pack(state.sequences(), transformer.patch)
                flows = unpack(transformer(batch, texts), batch, transformer.patch)
            state.advance(flows)
            num_steps += 1
    assert num_steps == sum(chunk.params.steps_in(0))
    assert state.x.is_meta
