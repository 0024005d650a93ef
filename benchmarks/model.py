"""The model by its parts: forwards of each stage, packs of several, FP8, decode and encode, and peaks of memory.

Knows the transformer and the VAE; chunks from end to end are in `chunks`, rivals in `rivals`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import chunks, random_model, text
from benchmarks.device_trace import DeviceTrace, trace
from benchmarks.plan import Bench, Measurement, Section, UnavailableError, single
from benchmarks.timing import Samples
from helios_serve.model_executor.conditioning import ENCODE_SLAB_FRAMES
from helios_serve.model_executor.history import HistoryTokens
from helios_serve.model_executor.layers import Block
from helios_serve.model_executor.packing import PackedBatch, PackedText, TextKV, TokenSequence, pack
from helios_serve.model_executor.quantize import NUM_EDGE_BLOCKS
from helios_serve.model_executor.transformer import HeliosTransformer
from helios_serve.model_executor.vae import PARITY, VaeOptions, WanVAE

STAGES = (0, 1, 2)
_FORWARD_MS: tuple[dict[str, Any], ...] = (
    {"gate": 125.0, "goal": 115.0, "limit": 86.1},
    {"gate": 215.0, "goal": 200.0, "limit": 151.4},
    {"gate": 640.0, "goal": 590.0, "limit": 478.6},
)
_NUM_INPUTS = 3  # sets that are used in turn; one forward alone moves far more than the caches hold
_PACKS = ((0, 2), (0, 4), (0, 8), (1, 2), (1, 4), (2, 2))
_FAST_DECODE: dict[str, Any] = {"gate": 250.0, "goal": 175.0, "limit": 105.0}
_PARITY_DECODE: dict[str, Any] = {"gate": 500.0, "goal": 400.0}
_ENCODE: dict[int, dict[str, Any]] = {
    33: {"gate": 150.0, "goal": 110.0, "limit": 52.0},
    1: {"gate": 8.0, "goal": 5.0, "limit": 2.1},
}
Inputs = tuple[PackedBatch, PackedText]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What the sequences of a benchmark see: one history and one prompt, made once."""

    history: HistoryTokens
    text: TextKV

    @classmethod
    @torch.inference_mode()
    def of(cls, bench: Bench) -> Scene:
        transformer = random_model.transformer_of(bench)
        generator = torch.Generator(bench.device).manual_seed(5)
        history = transformer.embed_history(random_model.random_history(bench.sizes, generator))
        text = transformer.project_text(random_model.random_prompt(bench.sizes, generator))
        return cls(history=history, text=text)


def measure_forwards(bench: Bench) -> list[Measurement]:
    """Each stage twice, as the spread between the two says what is noise; then where the time goes."""
    measurements = []
    for stage in STAGES:
        inputs = [packed_inputs(bench, (stage,), number) for number in range(_NUM_INPUTS)]
        count = max(2, bench.sizes.repetitions // (2 if stage < 2 else 4))
        first, second = (_time_forward(bench, inputs, count) for _ in range(2))
        spread = abs(first.median / second.median - 1)
        details = {"first_ms": first.median, "second_ms": second.median, "spread": spread}
        samples = Samples(values=(*first.values, *second.values))
        name = f"dit/forward_ms/stage{stage}"
        measurements.append(Measurement(name=name, unit="ms", samples=samples, details=details, **_FORWARD_MS[stage]))
    return measurements


def measure_forward_parts(bench: Bench) -> list[Measurement]:
    """Kernel time of one forward by class, launches without what is cleared before products, and the share of the time
    in which no kernel runs."""
    measurements = []
    for stage in STAGES:
        inputs = packed_inputs(bench, (stage,), 0)
        run = partial(forward_of(bench, [inputs]), 0)
        run()
        seen = trace(bench.device, run)
        details = {
            "ms_by_kind": seen.ms_by_kind(),
            "launches_by_kind": seen.launches_by_kind(),
            "span_ms": seen.span_ms,
            "over_matrix_kernels": _over_matrix_kernels(seen),
            "longest": seen.longest(),
        }
        name = f"dit/forward_kernel_ms/stage{stage}"
        measurements.append(single(name, "ms", seen.busy_ms, details=details))
        num_memsets = sum(kernel.is_memset for kernel in seen.kernels)
        num_launches, cleared = len(seen.kernels) - num_memsets, {"memsets": num_memsets}
        name = f"dit/forward_launches/stage{stage}"
        measurements.append(single(name, "launches", num_launches, limit=600.0, details=cleared))
    return measurements


def measure_packs(bench: Bench) -> list[Measurement]:
    """Sequences per second of a pack over those of one alone, both timed here."""
    measurements: list[Measurement] = []
    alone: dict[int, float] = {}
    for stage, size in _PACKS:
        if measurements and bench.remaining_s < (8 if bench.sizes.is_full else 0):
            break
        if stage not in alone:
            alone[stage] = _time_forward(bench, [packed_inputs(bench, (stage,), 0)], few(bench)).median
        inputs = [packed_inputs(bench, (stage,) * size, 0)]
        samples = _time_forward(bench, inputs, few(bench))
        details = {"speed_up": alone[stage] * size / samples.median, "alone_ms": alone[stage]}
        name = f"dit/pack_ms/stage{stage}/x{size}"
        measurements.append(Measurement(name=name, unit="ms", samples=samples, details=details))
    return measurements


def measure_fp8(bench: Bench) -> list[Measurement]:
    """Forwards with quantised blocks, then chunks; both against bf16 in the same run."""
    transformer = random_model.transformer_of(bench)
    require_fp8(bench)
    measurements = []
    inputs = {stage: [packed_inputs(bench, (stage,), number) for number in range(_NUM_INPUTS)] for stage in STAGES}
    plain = {stage: _time_forward(bench, inputs[stage], few(bench)).median for stage in STAGES}
    with torch.inference_mode():
        wanted = transformer(*inputs[0][0])
    with quantised(transformer, NUM_EDGE_BLOCKS if bench.sizes.is_full else 1):
        with torch.inference_mode():
            error = float((transformer(*inputs[0][0]) - wanted).float().norm() / wanted.float().norm())
        total = 0.0
        for stage in STAGES:
            samples = _time_forward(bench, inputs[stage], few(bench))
            total += samples.median
            details = {"bf16_ms": plain[stage], "speed_up": plain[stage] / samples.median, "relative_error": error}
            name = f"dit/forward_fp8_ms/stage{stage}"
            measurements.append(Measurement(name=name, unit="ms", samples=samples, details=details))
        speed_up = sum(plain.values()) / total
        name = "dit/fp8_speed_up/1-1-1"
        targets: dict[str, Any] = {"gate": 1.2, "goal": 1.35, "limit": 1.40, "is_better_high": True}
        measurements.append(single(name, "x", speed_up, **targets))
        measurements += chunks.measure_fp8(bench)
    return measurements


def measure_decode(bench: Bench) -> list[Measurement]:
    """Latents of a chunk to pixels on the device, in both precisions, and where the time of the fast one goes."""
    measurements = []
    variants: tuple[tuple[str, VaeOptions, dict[str, Any]], ...] = (
        ("bf16", random_model.FAST_VAE, _FAST_DECODE),
        ("fp32", random_model.EXACT_VAE, _PARITY_DECODE),
    )
    for label, options, targets in variants:
        vae = random_model.vae_of(bench, options)
        latents = _latents(bench, vae)
        run = _no_grad(lambda number, vae=vae, latents=latents: vae.decode(latents[number % len(latents)]))
        samples = bench.clock.measure(run, repetitions=few(bench))
        name = f"vae/decode_ms/{label}"
        measurements.append(Measurement(name=name, unit="ms", samples=samples, details=_psnr(bench, label), **targets))
        if label == "bf16":
            measurements += bench.attempt("vae/decode_kernel_ms/bf16", partial(_decode_parts, bench, run))
    return measurements


def measure_encode(bench: Bench) -> list[Measurement]:
    """Pixels to the posterior's parameters, in float32."""
    vae = random_model.vae_of(bench, random_model.FAST_VAE)
    generator = torch.Generator(bench.device).manual_seed(7)
    measurements = []
    for num_frames, targets in _ENCODE.items():
        shape = (1, 3, num_frames, bench.sizes.height, bench.sizes.width)
        pixels = [torch.rand(shape, generator=generator, device=bench.device) * 2 - 1 for _ in range(_NUM_INPUTS)]
        run = _no_grad(lambda number, pixels=pixels: vae.encode(pixels[number % len(pixels)], ENCODE_SLAB_FRAMES))
        samples = bench.clock.measure(run, repetitions=few(bench))
        name = f"vae/encode_ms/{num_frames}_frames"
        details = _encode_errors(bench, pixels[0]) if num_frames == 1 else {}
        measurements.append(Measurement(name=name, unit="ms", samples=samples, details=details, **targets))
    return measurements


def _encode_errors(bench: Bench, pixels: Tensor) -> dict[str, float]:
    """Relative distances of the mean from that without TF32, of the encoder that is timed and of the reference's."""
    fast, plain = (random_model.vae_of(bench, options) for options in (random_model.FAST_VAE, PARITY))
    with torch.inference_mode():
        means = [vae.encode(pixels)[0] for vae in (fast, plain)]
        torch.backends.cudnn.allow_tf32 = False
        try:
            exact = plain.encode(pixels)[0]
        finally:
            torch.backends.cudnn.allow_tf32 = True
        errors = [float((mean - exact).norm() / exact.norm()) for mean in means]
    return {"error": errors[0], "reference_error": errors[1]}


def measure_memory(bench: Bench) -> list[Measurement]:
    """Peaks above what is allocated anyway, and the weights, in gigabytes of 10^9 bytes."""
    transformer = random_model.transformer_of(bench)
    weights = sum(parameter.nbytes for parameter in transformer.parameters()) * 1e-9
    measurements = [single("memory/dit_weights_gb", "GB", weights)]
    fast, exact = (random_model.vae_of(bench, options) for options in (random_model.FAST_VAE, random_model.EXACT_VAE))
    runs: list[tuple[str, Callable[[int], object]]] = [
        (f"forward_stage{stage}_x{size}", forward_of(bench, [packed_inputs(bench, (stage,) * size, 0)]))
        for stage, size in ((0, 1), (1, 1), (2, 1), (2, 2))
    ]
    runs.append(("decode_bf16", _no_grad(lambda _: fast.decode(_latents(bench, fast)[0]))))
    runs.append(("decode_fp32", _no_grad(lambda _: exact.decode(_latents(bench, exact)[0]))))
    for label, run in runs:
        name = f"memory/{label}_gb"
        measurements += bench.attempt(name, partial(_peak, bench, name, run))
    return measurements


@contextmanager
def quantised(transformer: HeliosTransformer, num_edge_blocks: int) -> Iterator[None]:
    """The transformer in FP8 for a while; the weights it had are kept."""
    config, kept = transformer.config, []
    for block in transformer.blocks:
        for name in Block.FP8_LINEARS:
            owner, _, own_name = name.rpartition(".")
            kept.append((block.get_submodule(owner), own_name, block.get_submodule(name)))
    with torch.inference_mode(False), torch.no_grad():
        transformer.quantize(num_edge_blocks)
    try:
        yield
    finally:
        transformer.config = config
        for parent, own_name, linear in kept:
            parent.register_module(own_name, linear)


def require_fp8(bench: Bench) -> None:
    """Raises: UnavailableError where there is no product of e4m3 matrices."""
    config = bench.sizes.transformer
    if config.dim % 16 or config.ffn_dim % 16:
        raise UnavailableError(f"FP8: widths {config.dim} and {config.ffn_dim} must be multiples of 16")
    if bench.device.type == "cuda" and torch.cuda.get_device_capability(bench.device) < (8, 9):
        raise UnavailableError("FP8: a device of compute capability 8.9 or above")


def few(bench: Bench) -> int:
    return max(2, bench.sizes.repetitions // 4)


def packed_inputs(bench: Bench, stages: Sequence[int], number: int) -> Inputs:
    """A pack of sequences with noise of their own, over one history and one prompt."""
    scene: Scene = bench.once("scene", lambda: Scene.of(bench))
    transformer = random_model.transformer_of(bench)
    patch = transformer.patch
    generator = torch.Generator(bench.device).manual_seed(100 * number + sum(stages))
    sequences = []
    with torch.inference_mode():
        for stage in stages:
            x = random_model.random_latents(bench.sizes, stage, generator).to(transformer.dtype)
            grid = (x.shape[1] // patch[0], x.shape[2] // patch[1], x.shape[3] // patch[2])
            rotary = transformer.current_rotary(grid)
            sequences.append(TokenSequence(history=scene.history, x=x, rotary=rotary, timestep=700.0, text=scene.text))
        return pack(sequences, patch)


def forward_of(bench: Bench, inputs: Sequence[Inputs]) -> Callable[[int], object]:
    transformer = random_model.transformer_of(bench)
    return _no_grad(lambda number: transformer(*inputs[number % len(inputs)]))


def _time_forward(bench: Bench, inputs: Sequence[Inputs], repetitions: int) -> Samples:
    return bench.clock.measure(forward_of(bench, inputs), repetitions=repetitions)


def _no_grad(run: Callable[..., object]) -> Callable[[int], object]:
    return torch.inference_mode()(run)


def _latents(bench: Bench, vae: WanVAE) -> list[Tensor]:
    """[1, Z, 9, h, w] as they come from the transformer."""
    generator = torch.Generator(bench.device).manual_seed(6)
    drawn = (random_model.random_latents(bench.sizes, 2, generator) for _ in range(_NUM_INPUTS))
    return [vae.denormalize(latents[None]) for latents in drawn]


def _over_matrix_kernels(seen: DeviceTrace) -> float | None:
    """A forward's time over that of its matrix products and attention."""
    by_kind = seen.ms_by_kind()
    matrix_ms = by_kind.get("gemm", 0.0) + by_kind.get("attention", 0.0)
    return seen.span_ms / matrix_ms if matrix_ms else None


def _psnr(bench: Bench, label: str) -> dict[str, Any]:
    """Of the worst frame against the float32 decode, as the gate found it."""
    is_known = label == "bf16" and "decode_psnr_db" in bench.cache
    return {"psnr_db": bench.cache["decode_psnr_db"]} if is_known else {}


def _decode_parts(bench: Bench, run: Callable[[int], object]) -> Measurement:
    seen = trace(bench.device, partial(run, 0))
    details = {"ms_by_kind": seen.ms_by_kind(), "launches": len(seen.kernels), "longest": seen.longest()}
    return single("vae/decode_kernel_ms/bf16", "ms", seen.busy_ms, details=details)


def _peak(bench: Bench, name: str, run: Callable[[int], object]) -> Measurement:
    return single(name, "GB", _peak_bytes(bench.device, run) * 1e-9)


def _peak_bytes(device: torch.device, run: Callable[[int], object]) -> int:
    if device.type != "cuda":
        run(0)
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


SECTIONS = (
    Section(name="decode", value_rank=11, expected_s=10, run=measure_decode),
    Section(name="forwards", value_rank=13, expected_s=20, run=measure_forwards),
    Section(name="forward_parts", value_rank=24, expected_s=6, run=measure_forward_parts),
    *chunks.SECTIONS,
    *text.SECTIONS,
    Section(name="encode", value_rank=21, expected_s=5, run=measure_encode),
    Section(name="memory", value_rank=22, expected_s=6, run=measure_memory),
    Section(name="fp8", value_rank=16, expected_s=25, run=measure_fp8),
    Section(name="packs", value_rank=46, expected_s=40, run=measure_packs),
)
