"""One forward of the 14B model, counted without memory: operations, launches, bytes, and that nothing waits for the
device."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from helios_serve.model_executor.batch import ChunkInput, ChunkState, SamplingRules
from helios_serve.model_executor.checkpoint import read_config
from helios_serve.model_executor.history import HistoryTokens, empty_history
from helios_serve.model_executor.model_config import TransformerConfig
from helios_serve.model_executor.packing import PackedBatch, PackedText, TextKV, TokenSequence, pack, unpack
from helios_serve.model_executor.prompt_schedule import PromptEmbedding
from helios_serve.model_executor.transformer import HeliosTransformer, Shortcuts
from helios_serve.types import SamplingParams

CONFIG = TransformerConfig()
DIM, FFN, LAYERS = CONFIG.dim, CONFIG.ffn_dim, CONFIG.num_layers
NUM_HISTORY, NUM_TEXT = 2400, 512
NOISY = (540, 2160, 8640)
"""Current tokens of 9 latent frames at 640x384, by stage."""

MATRIX_OPERATORS = ("linear", "mm", "addmm", "_addmm_activation", "bmm", "attend", "cross_attend")
VIEWS = ("view", "flatten", "unflatten", "unbind", "select", "slice", "split", "chunk", "unsqueeze", "t")
ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


class Trace(TorchDispatchMode):
    """Counts what is launched and the bytes that all but matrix products read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().partition("::")[2].partition(".")[0]
        if name in VIEWS or name in ALLOCATIONS:
            return result
        self.launches[name] += 1
        if name not in MATRIX_OPERATORS:
            self.bytes[name] += _traffic(func, args, result)
        return result

    @property
    def num_launches(self) -> int:
        return sum(self.launches.values())


FUSED_PASSES: dict[str, tuple[str, float]] = {
    "layer_norm_modulate": ("x", 2),
    "rms_norm": ("x", 2),
    "norm_rope": ("x", 2),
    "qk_norm_rope_": ("qkv", 2 * 2 / 3),  # v stays as it is
    "gated_residual_norm": ("x", 4),
    "gated_residual_split_norm": ("x", 4),  # each row is written to one of the two results
    "residual_scatter_norm": ("y", 4),  # only the rows of y are touched
}
"""What a fused kernel reads and writes, in passes over one of its arguments. Tables are read from caches."""


def _traffic(func: Any, args: Any, result: Any) -> float:
    name = func.name().partition("::")[2].partition(".")[0]
    if name in FUSED_PASSES:
        argument, passes = FUSED_PASSES[name]
        names = [one.name for one in func._schema.arguments]
        return passes * args[names.index(argument)].nbytes
    tensors = [value for value in (*tree_leaves(args), *tree_leaves(result)) if isinstance(value, Tensor)]
    return sum(value.nbytes for value in tensors)


@pytest.fixture(scope="module")
def transformer() -> HeliosTransformer:
    with torch.device("meta"):
        made = HeliosTransformer(CONFIG, Shortcuts(last_block_skips_history=True)).to(torch.bfloat16)
    for name, parameter in made.named_parameters():
        if made.keeps_float32(name):
            parameter.data = parameter.data.float()
    return made.requires_grad_(False).eval()


def batch_of(stages: tuple[int, ...], device: str) -> tuple[PackedBatch, PackedText]:
    """Shapes of sequences at those stages; the values mean nothing."""
    sequences = []
    for stage in stages:
        height, width = 12 << stage, 20 << stage
        num_noisy, heads, head_dim = NOISY[stage], CONFIG.num_attention_heads, CONFIG.attention_head_dim
        text = torch.empty(LAYERS, NUM_TEXT, heads, head_dim, dtype=torch.bfloat16, device=device)
        sequences.append(
            TokenSequence(
                history=HistoryTokens(
                    tokens=torch.empty(NUM_HISTORY, DIM, dtype=torch.bfloat16, device=device),
                    rotary=torch.empty(NUM_HISTORY, 2, head_dim // 2, device=device),
                ),
                x=torch.empty(CONFIG.in_channels, 9, height, width, dtype=torch.bfloat16, device=device),
                rotary=torch.empty(num_noisy, 2, head_dim // 2, device=device),
                timestep=500.0,
                text=TextKV(keys=text, values=text),
            )
        )
    return pack(sequences, CONFIG.patch_size)


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
@torch.inference_mode()
def test_operations_are_those_of_the_model_and_no_more(transformer: HeliosTransformer, stage: int) -> None:
    batch, text = batch_of((stage,), "meta")
    with FlopCounterMode(display=False) as counter:
        transformer(batch, text)
    assert counter.get_total_flops() == lossless_flops(NOISY[stage])
    assert round(lossless_flops(8640) / 1e9) == 355_880


@pytest.mark.parametrize("stages", [(0,), (1,), (2,), (0, 2)])
@torch.inference_mode()
def test_launches_and_bytes(transformer: HeliosTransformer, stages: tuple[int, ...]) -> None:
    batch, text = batch_of(stages, "meta")
    with Trace() as trace:
        transformer(batch, text)
    gelu = trace.launches.pop("gelu")  # part of the product before it, on a GPU
    assert gelu == LAYERS
    assert trace.num_launches <= 600, trace.launches
    trace.bytes.pop("gelu")
    noisy = sum(NOISY[stage] for stage in stages)
    tokens = noisy + len(stages) * NUM_HISTORY
    budget = LAYERS * (24 * DIM * tokens + 12 * DIM * noisy)
    assert sum(trace.bytes.values()) <= 1.05 * budget, (sum(trace.bytes.values()) / budget, trace.bytes)


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
