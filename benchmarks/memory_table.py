"""Device memory by mode, counted from the real modules without any memory, and the table of it in docs/performance.md.

    python -m benchmarks.memory_table docs/performance.md

Knows sizes of tensors and how long they live; measures nothing. What is counted are the bytes of tensors: libraries add
workspaces of their own, the allocator its blocks that are not full, CUDA its context. GB are 10^9 bytes.
"""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import UMT5Config, UMT5EncoderModel

from benchmarks.random_model import empty_transformer
from helios_serve.model_executor.history import HistoryTokens, empty_history
from helios_serve.model_executor.model_config import TransformerConfig
from helios_serve.model_executor.offload import offload_sequence
from helios_serve.model_executor.packing import TextKV, TokenSequence, pack
from helios_serve.model_executor.transformer import HeliosTransformer, Shortcuts
from helios_serve.model_executor.vae import VaeConfig, VaeOptions, WanVAE
from helios_serve.types import LATENT_FRAMES_PER_CHUNK, MAX_TEXT_TOKENS

META = torch.device("meta")
CONFIG = TransformerConfig()
UMT5_XXL = UMT5Config(
    d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, vocab_size=256384, feed_forward_proj="gated-gelu"
)
LATENT_HEIGHT, LATENT_WIDTH = 48, 80  # of 640x384
PROMPT_KEYS = (512, 227, 121)
"""Keys that a prompt of 511 tokens or more, of 226 and of 120 leaves when its padding is one key."""
FAST_VAE = VaeOptions.on(torch.device("cuda"))
WHOLE, SLABS, SMALL = "bf16, whole", "bf16, slabs of 4", "bf16, slabs of 1, no windows"
DECODES = {
    WHOLE: FAST_VAE,
    SLABS: replace(FAST_VAE, slab_frames=4),
    "bf16, slabs of 1": replace(FAST_VAE, slab_frames=1),
    SMALL: replace(FAST_VAE, slab_frames=1, windowed_channels=(), windowed_encoder_channels=()),
    "fp32, whole": VaeOptions.on(torch.device("cuda"), "fp32"),
    "fp32, slabs of 1": replace(VaeOptions.on(torch.device("cuda"), "fp32"), slab_frames=1),
}
"""Slabs in latent frames, behind the first, which goes alone."""
PACKS = ((0,), (1,), (2,), (2,) * 2, (2,) * 4, (2,) * 8)
RESULTS = Path(__file__).parent / "results"
DEVICE_BYTES = 80 * 10**9
OTHER_BYTES = 3 * 10**9
"""CUDA's context, libraries' workspaces, what the allocator cannot use: a guess."""

_CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.conv2d.default)
_BEGIN, _END = "<!-- memory table: begin -->", "<!-- memory table: end -->"


class PeakBytes(TorchDispatchMode):
    """Bytes of the storages that were made inside and live: now, and at most.

    A GPU applies GELU in the product before it, so here it takes no memory of its own; and its convolutions keep
    channels last, which those without memory forget.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes: int = 0
        self.peak_bytes: int = 0
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.gelu.default:
            return args[0]
        given = {id(value.untyped_storage()) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        result = func(*args, **(kwargs or {}))
        if func in _CONVOLUTIONS and result.dim() == 4:
            result = result.contiguous(memory_format=torch.channels_last)
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.is_meta and id(value.untyped_storage()) not in given:
                self._add(value.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = id(storage), storage.nbytes()
        if key in self._seen and self._seen[key]() is storage:
            return

        def drop(_: object) -> None:
            self.live_bytes -= num_bytes
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, drop)
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)


@torch.inference_mode()
def peak_bytes(run: Callable[[], object]) -> int:
    """The most that `run` needs beside what was there before."""
    seen = PeakBytes()
    with seen:
        run()
    return seen.peak_bytes


def parameter_bytes(module: nn.Module) -> int:
    """Of parameters and buffers; a tensor that several share counts once."""
    tensors = (*module.parameters(), *module.buffers())
    return sum(tensor.nbytes for tensor in {id(each): each for each in tensors}.values())


@cache
def transformer(*, is_fp8: bool) -> HeliosTransformer:
    """As a GPU runs it."""
    made = empty_transformer(CONFIG, torch.bfloat16, Shortcuts(last_block_skips_history=True))
    made.requires_grad_(False).eval()
    if is_fp8:
        made.quantize()
    return made


@cache
def vae(label: str) -> WanVAE:
    with META:
        made = WanVAE(VaeConfig(), DECODES[label]).requires_grad_(False)
        made.prepare()
    return made


def text_encoder() -> nn.Module:
    with META:
        made: nn.Module = UMT5EncoderModel(UMT5_XXL)
    return made.to(torch.bfloat16).requires_grad_(False).eval()


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Bytes on the device that stay there: all of a module, and what is left of it when its layers are offloaded."""

    whole: int
    offloaded: int


@cache
def transformer_weights(*, is_fp8: bool) -> Weights:
    whole = parameter_bytes(transformer(is_fp8=is_fp8))
    blocks = [*transformer(is_fp8=is_fp8).blocks]
    return Weights(whole=whole, offloaded=_offloaded(whole, blocks))


@cache
def text_encoder_weights() -> Weights:
    """Offloaded, its embedding of tokens is in host memory for good."""
    model = text_encoder()
    whole, layers = parameter_bytes(model), model.get_submodule("encoder.block")
    return Weights(
        whole=whole, offloaded=_offloaded(whole, [*layers.children()]) - model.get_parameter("shared.weight").nbytes
    )


def _offloaded(whole: int, layers: list[nn.Module]) -> int:
    of_layers = sum(parameter_bytes(layer) for layer in layers)
    with META:
        buffers = offload_sequence(layers, META).device_bytes
    return whole - of_layers + buffers


@cache
def forward_bytes(stages: tuple[int, ...], *, is_fp8: bool = False) -> int:
    """Activations of a forward of sequences at those stages, beside weights, text and history."""
    batch, text = pack([_sequence(stage) for stage in stages], CONFIG.patch_size)
    return peak_bytes(lambda: transformer(is_fp8=is_fp8)(batch, text))


def _sequence(stage: int) -> TokenSequence:
    height, width = LATENT_HEIGHT >> (2 - stage), LATENT_WIDTH >> (2 - stage)
    shape = (CONFIG.in_channels, LATENT_FRAMES_PER_CHUNK, height, width)
    return TokenSequence(
        history=history_tokens(),
        x=torch.empty(shape, dtype=torch.bfloat16, device=META),
        rotary=torch.empty(LATENT_FRAMES_PER_CHUNK * height * width // 4, 2, CONFIG.attention_head_dim // 2).to(META),
        timestep=500.0,
        text=text_kv(MAX_TEXT_TOKENS),
    )


@cache
def history_tokens() -> HistoryTokens:
    with torch.inference_mode():
        history = empty_history(CONFIG.in_channels, LATENT_HEIGHT, LATENT_WIDTH, META)
        return transformer(is_fp8=False).embed_history(history)


@cache
def text_kv(num_keys: int) -> TextKV:
    with torch.inference_mode():
        return transformer(is_fp8=False).project_text(torch.empty(num_keys, CONFIG.text_dim, device=META))


def history_kv_bytes() -> int:
    """Keys and values of the history in all layers, which `history_reuse` keeps for each sequence."""
    return 2 * CONFIG.num_layers * history_tokens().tokens.nbytes


@cache
def stream_bytes() -> int:
    """What a stream between two steps has on the device beside its text: history tokens and their rotation, rotation of
    the current tokens of three stages, latents and the start of the stage, in float32."""
    latents = 4 * CONFIG.in_channels * LATENT_FRAMES_PER_CHUNK * LATENT_HEIGHT * LATENT_WIDTH
    rotary = sum(_sequence(stage).rotary.nbytes for stage in range(3))
    return history_tokens().tokens.nbytes + history_tokens().rotary.nbytes + rotary + 2 * latents


@cache
def decode_bytes(label: str) -> int:
    """Workspace of the decode of a chunk, its pixels included."""
    latents = torch.empty(1, 16, LATENT_FRAMES_PER_CHUNK, LATENT_HEIGHT, LATENT_WIDTH, device=META)
    return peak_bytes(lambda: vae(label).decode(latents))


@cache
def encode_bytes(label: str, num_frames: int) -> int:
    """Workspace of the encoding of a clip in float32, which takes the slabs of the decode here."""
    frames = torch.empty(1, 3, num_frames, 8 * LATENT_HEIGHT, 8 * LATENT_WIDTH, device=META)
    return peak_bytes(lambda: vae(label).encode(frames, DECODES[label].slab_frames))


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """A server with all roles in one process, or without the text encoder. label: of `DECODES`."""

    name: str
    is_fp8: bool = False
    text_encoder: Literal["here", "offloaded", "elsewhere"] = "here"
    is_transformer_offloaded: bool = False
    decode: str = WHOLE
    pack: int = 4

    @property
    def weight_bytes(self) -> int:
        transformer, text = transformer_weights(is_fp8=self.is_fp8), text_encoder_weights()
        of_text = {"here": text.whole, "offloaded": text.offloaded, "elsewhere": 0}[self.text_encoder]
        of_transformer = transformer.offloaded if self.is_transformer_offloaded else transformer.whole
        return of_transformer + of_text + parameter_bytes(vae(self.decode))

    @property
    def workspace_bytes(self) -> int:
        """Of a pack at the finest stage and of a decode beside it."""
        return forward_bytes((2,) * self.pack) + decode_bytes(self.decode)

    def num_streams(self, num_keys: int) -> int:
        """Paused streams with a prompt of their own each that fit beside it on `DEVICE_BYTES`."""
        free = DEVICE_BYTES - self.weight_bytes - self.workspace_bytes - OTHER_BYTES
        return max(0, free // (text_kv(num_keys).num_bytes + stream_bytes()))


MODES = (
    Mode(name="bf16"),
    Mode(name="bf16, VAE in slabs of 4", decode=SLABS),
    Mode(name="bf16, `offload: text_encoder`", text_encoder="offloaded"),
    Mode(name="bf16, text encoder on another device", text_encoder="elsewhere"),
    Mode(name="FP8", is_fp8=True),
    Mode(name="FP8, text encoder on another device", is_fp8=True, text_encoder="elsewhere"),
    Mode(name="bf16, `offload: all`", text_encoder="offloaded", is_transformer_offloaded=True, pack=1),
    Mode(
        name="bf16, `offload: all`, VAE in slabs of 1 without windows",
        text_encoder="offloaded",
        is_transformer_offloaded=True,
        decode=SMALL,
        pack=1,
    ),
)


def render() -> str:
    """The tables of docs/performance.md, between its marks."""
    text = text_encoder_weights()
    weights = [
        ("transformer, bf16", _gb(transformer_weights(is_fp8=False).whole), _gb(_offloaded_of(is_fp8=False))),
        ("transformer, FP8", _gb(transformer_weights(is_fp8=True).whole), _gb(_offloaded_of(is_fp8=True))),
        ("text encoder, bf16", _gb(text.whole), _gb(text.offloaded)),
        ("VAE, decoder bf16", _gb(parameter_bytes(vae(WHOLE))), ""),
        ("VAE, decoder fp32", _gb(parameter_bytes(vae("fp32, whole"))), ""),
    ]
    measured = measured_gb()
    spaces = [
        (
            f"forward, stage {pack[0]}, {len(pack)} in a pack",
            _gb(forward_bytes(pack)),
            measured.get(_forward_name(pack), ""),
        )
        for pack in PACKS
    ]
    names = {WHOLE: "memory/decode_bf16_gb", "fp32, whole": "memory/decode_fp32_gb"}
    spaces += [
        (f"decode, {label}", _gb(decode_bytes(label)), measured.get(names.get(label, ""), "")) for label in DECODES
    ]
    spaces += [
        (f"encode {frames} frame(s), fp32, {label.partition(', ')[2]}", _gb(encode_bytes(label, frames)), "")
        for frames, label in ((33, WHOLE), (33, SMALL), (1, WHOLE))
    ]
    streams = [(f"text keys and values, {keys} keys", _gb(text_kv(keys).num_bytes)) for keys in PROMPT_KEYS]
    streams += [("the rest of a stream", _gb(stream_bytes()))]
    streams += [("`history_reuse`, while a chunk runs, for each of its sequences", _gb(history_kv_bytes()))]
    modes = [_row(mode) for mode in MODES]
    fits = tuple(f"streams, {keys} keys" for keys in PROMPT_KEYS)
    parts = (
        _table(("weights, GB", "on the device", "offloaded"), weights),
        _table(("workspace, GB", "counted", "measured"), spaces),
        _table(("for each stream, GB", "counted"), streams),
        _table(("mode", "weights, GB", "workspace, GB", "together, GB", *fits), modes),
    )
    return "\n\n".join((_BEGIN, *parts, _END))


def measured_gb() -> dict[str, str]:
    """Peaks by name out of the newest result of a GPU that has any."""
    for path in sorted(RESULTS.glob("*_nvidia-*.json"), reverse=True):
        sections = json.loads(path.read_text())["sections"]
        peaks = [each for section in sections if section["name"] == "memory" for each in section["measurements"]]
        if peaks:
            return {peak["name"]: f"{peak['median']:.2f}" for peak in peaks}
    return {}


def _row(mode: Mode) -> tuple[str, ...]:
    weights, workspace = mode.weight_bytes, mode.workspace_bytes
    sizes = (_gb(each) for each in (weights, workspace, weights + workspace))
    return (mode.name, *sizes, *(str(mode.num_streams(keys)) for keys in PROMPT_KEYS))


def _forward_name(pack: tuple[int, ...]) -> str:
    return f"memory/forward_stage{pack[0]}_x{len(pack)}_gb"


def _offloaded_of(*, is_fp8: bool) -> int:
    return transformer_weights(is_fp8=is_fp8).offloaded


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f}" if num_bytes >= 1e8 else f"{num_bytes / 1e9:.3f}"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    rule = ("---", *("---:" for _ in head[1:]))
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def write(page: Path) -> None:
    """Puts the tables between the marks of a page."""
    text = page.read_text()
    begin, end = text.index(_BEGIN), text.index(_END) + len(_END)
    page.write_text(text[:begin] + render() + text[end:])


if __name__ == "__main__":
    write(Path(sys.argv[1]))
