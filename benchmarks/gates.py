"""What must hold before a number is printed: kernels, blocks, a forward and a decode against higher precision.

Knows what is compared with what, and how far apart they may be; measures no time. Where a rounding may differ, the
yardstick is the same computation by PyTorch's plain operators in the same precision: ours may be farther from the exact
result by a tenth at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import random_model, yardsticks
from benchmarks.plan import Bench, Check, Gate
from helios_serve import kernels
from helios_serve.kernels import cases, cases_attention, cases_cross, reference
from helios_serve.kernels.attention import AUTO, BACKENDS, FP8_BACKENDS, AttentionBackendError, backend_for
from helios_serve.kernels.fp8 import FP8
from helios_serve.model_executor.packing import TokenSequence, pack
from helios_serve.model_executor.transformer import HeliosTransformer, Shortcuts
from helios_serve.model_executor.vae import PARITY

_MARGIN = 1.1
_SLACK = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-4}
"""Relative errors that are allowed whatever the yardstick has, for sums that happen to be exact there."""
_SCALE_SLACK = 2.0**-8  # a scale follows the largest value of a row, which may round the other way
_ATTENTION_SLACK = {torch.float32: 1e-5, torch.bfloat16: 1e-3}  # weights are rounded before the second product
_LOOSER = {"cross_attend": _ATTENTION_SLACK, "linear_gelu": {torch.float32: 1e-3, torch.bfloat16: 1e-3}}
"""GELU is a library's epilogue, whose tanh is approximate."""
_LSE_BOUND = 1e-3
_FP8_BOUND, _FP8_LSE_BOUND = 0.1, 0.2
"""Of attention in e4m3, of which a number is off by up to a sixteenth."""
_UNCHECKED = ("flashinfer",)  # it is compiled at its first use, for minutes; nothing takes it unless it is named
_ATTENTION_LENGTHS = (((1,), (1,)), ((67,), (541,)), ((541, 67, 1, 130), (541, 67, 1, 512)))


def check_kernels(bench: Bench) -> list[Check]:
    """Every operator that the device runs, at one odd shape and at the smallest served one."""
    device = bench.device
    checks = []
    for case in (*cases.CASES, *cases_cross.CASES, cases_attention.MERGE):
        shapes = (case.odd[1], min(case.served, key=math.prod)) if bench.sizes.is_full else (case.odd[1],)
        checks += [_kernel(case, shape, torch.bfloat16, device) for shape in shapes]
        checks.append(_kernel(case, case.odd[1], torch.float32, device))
    return checks


def check_attention(bench: Bench) -> list[Check]:
    """Every backend that is here, on odd lengths and packs, against float64; the yardstick is PyTorch's own choice."""
    num_heads, head_dim = (8, 128) if bench.sizes.is_full else (2, 16)
    lengths = [*_ATTENTION_LENGTHS, ((2940,), (2940,))] if bench.sizes.is_full else [*_ATTENTION_LENGTHS]
    return [
        check
        for queries, keys in lengths
        for check in _attention(_Heads.drawn(bench.device, queries, keys, (num_heads, head_dim)))
    ]


def check_blocks(bench: Bench) -> list[Check]:
    """Two blocks at full width: one that passes the history on, one that does not."""
    config = random_model.with_layers(bench.sizes.transformer, 2)
    narrow = random_model.random_transformer(config, torch.bfloat16, bench.device, seed=1)
    return _forward_checks(bench, narrow, "blocks")


def check_forward(bench: Bench) -> list[Check]:
    """A forward of the first stage by the whole model; the exact one has one block in float32 at a time."""
    return _forward_checks(bench, random_model.transformer_of(bench), "forward/stage0")


def check_decode(bench: Bench) -> list[Check]:
    """The fast decode against float32 frame by frame, and its bytes against the definition."""
    fast, exact = (random_model.vae_of(bench, options) for options in (random_model.FAST_VAE, PARITY))
    generator = torch.Generator(bench.device).manual_seed(3)
    latents = exact.denormalize(random_model.random_latents(bench.sizes, 2, generator)[None])
    with torch.inference_mode(), yardsticks.full_float32():
        wanted = exact.decode(latents, slab_frames=1)
        ours, again = fast.decode(latents), fast.decode(latents)
        plain = yardsticks.in_bfloat16(exact).decode(latents.bfloat16())
    bench.cache["decode_psnr_db"] = -20 * math.log10(max(yardsticks.distances_by_frame(ours, wanted)) / 2)
    return [
        Check(
            name="decode/bf16",
            error=yardsticks.distance(ours, wanted),
            bound=_MARGIN * yardsticks.distance(plain, wanted),
        ),
        Check(name="decode/spread", error=yardsticks.flatness(ours), bound=0.0),
        Check(name="decode/repeated", error=yardsticks.num_unequal(ours, again), bound=0.0),
        *_byte_checks(ours),
    ]


def _kernel(case: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Check:
    """Its worst result: bytes and e4m3 in units, what claims the same bits in unequal values, others by distance."""

    def outcome(run: Callable[..., Any], convert: Callable[[Any], Any]) -> list[Tensor]:
        torch.manual_seed(sum(shape))
        with device, torch.inference_mode():
            arguments = [convert(argument) for argument in case.inputs(shape, dtype)]
            returned = run(*arguments)
        results = () if returned is None else returned if isinstance(returned, tuple) else (returned,)
        written = (case.written,) if isinstance(case.written, int) else case.written or ()
        return [*results, *(arguments[index] for index in written)]

    ours, plain = outcome(case.operator, _same), outcome(case.reference, _same)
    slacks = _LOOSER.get(case.name, _SLACK)
    has_bytes = any(result.dtype in (FP8, torch.uint8) for result in plain)
    exact = plain if has_bytes else outcome(case.reference, _in_float64)
    worst = Check(name="", error=-1.0, bound=1.0)
    for result, yardstick, wanted in zip(ours, plain, exact, strict=True):
        if result.dtype in (FP8, torch.uint8):
            error, bound = yardsticks.units_apart(result, yardstick), 0.0 if case.name == "to_uint8" else 1.0
        elif case.is_exact and not has_bytes:
            error, bound = yardsticks.num_unequal(result, yardstick), 0.0
        else:
            error = yardsticks.distance(result, wanted)
            slack = _SCALE_SLACK if has_bytes and dtype == torch.bfloat16 else slacks[result.dtype]
            bound = _MARGIN * yardsticks.distance(yardstick, wanted) + slack
        if not error <= bound or error - bound > worst.error - worst.bound:
            worst = Check(name="", error=error, bound=bound)
        if not worst.is_green:
            break
    label = f"kernel/{case.name}/{str(dtype).removeprefix('torch.')}/{'x'.join(map(str, shape))}"
    return Check(name=label, error=worst.error, bound=worst.bound)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Heads:
    """q [Nq, H, Dh], k and v [Nk, H, Dh] in bfloat16, and where their segments are."""

    q: Tensor
    k: Tensor
    v: Tensor
    segments: kernels.Segments

    @classmethod
    def drawn(cls, device: torch.device, queries: Sequence[int], keys: Sequence[int], shape: tuple[int, int]) -> _Heads:
        generator = torch.Generator(device).manual_seed(sum(queries))
        q, k, v = (
            torch.randn(sum(lengths), *shape, generator=generator, device=device).bfloat16()
            for lengths in (queries, keys, keys)
        )
        cu_q, cu_k = ((0, *accumulate(lengths)) for lengths in (queries, keys))
        return cls(q=q, k=k, v=v, segments=kernels.Segments(cu_q=cu_q, cu_k=cu_k, scale=shape[1] ** -0.5))


@torch.inference_mode()
def _attention(heads: _Heads) -> list[Check]:
    q, k, v, segments = heads.q, heads.k, heads.v, heads.segments
    wanted, wanted_lse = yardsticks.attend_plainly(q.double(), k.double(), v.double(), segments)
    assert wanted_lse is not None
    bound = (
        _MARGIN * yardsticks.distance(yardsticks.attend_plainly(q, k, v, segments)[0], wanted)
        + _ATTENTION_SLACK[q.dtype]
    )
    checks = []
    for name in (AUTO, *BACKENDS, *FP8_BACKENDS):
        named = replace(segments, backend=name)
        if name in _UNCHECKED or not _is_here(q, named):
            continue
        is_fp8 = name in FP8_BACKENDS
        out, lse = kernels.attend(q, k, v, named)
        label = f"attention/{name}/{'+'.join(map(str, segments.cu_q[1:]))}x{'+'.join(map(str, segments.cu_k[1:]))}"
        worst_lse = float((lse.double() - wanted_lse).abs().max())
        own_bound, lse_bound = (_FP8_BOUND, _FP8_LSE_BOUND) if is_fp8 else (bound, _LSE_BOUND)
        checks.append(Check(name=label, error=yardsticks.distance(out, wanted), bound=own_bound))
        checks.append(Check(name=f"{label}/lse", error=worst_lse, bound=lse_bound))
    return checks


def _is_here(q: Tensor, segments: kernels.Segments) -> bool:
    try:
        backend_for(q, segments)
    except AttentionBackendError:
        return False
    return True


def _forward_checks(bench: Bench, narrow: HeliosTransformer, label: str) -> list[Check]:
    flow, again = (_flow(bench, narrow) for _ in range(2))
    with yardsticks.plain_operators(), yardsticks.full_float32():
        with mock.patch.object(narrow, "shortcuts", Shortcuts()):
            plain = _flow(bench, narrow)
        exact = _flow(bench, yardsticks.Wide(narrow))
    error, yardstick = yardsticks.distance(flow, exact), yardsticks.distance(plain, exact)
    return [
        Check(name=label, error=error, bound=_MARGIN * yardstick + _SLACK[narrow.dtype]),
        Check(name=f"{label}/spread", error=yardsticks.flatness(flow), bound=0.0),
        Check(name=f"{label}/repeated", error=yardsticks.num_unequal(flow, again), bound=0.0),
    ]


@torch.inference_mode()
def _flow(bench: Bench, transformer: HeliosTransformer) -> Tensor:
    """Of one sequence at the first stage, history and prompt included; the inputs are always the same."""
    generator = torch.Generator(bench.device).manual_seed(2)
    x = random_model.random_latents(bench.sizes, 0, generator).bfloat16()
    history = random_model.random_history(bench.sizes, generator)
    prompt = random_model.random_prompt(bench.sizes, generator)
    prompt[len(prompt) // 4 :] = 0  # padding, which ours collapses and the exact one does not
    patch = transformer.patch
    sequence = TokenSequence(
        history=transformer.embed_history(history),
        x=x.to(transformer.dtype),
        rotary=transformer.current_rotary((x.shape[1] // patch[0], x.shape[2] // patch[1], x.shape[3] // patch[2])),
        timestep=700.0,
        text=transformer.project_text(prompt.bfloat16()),
    )
    flow: Tensor = transformer(*pack([sequence], patch))
    return flow


def _byte_checks(pixels: Tensor) -> list[Check]:
    """Of decoded pixels [1, 3, F, H, W], against the definitions on the host."""
    frames = pixels[0, :, :5].transpose(0, 1)
    host = frames.cpu()
    return [
        Check(
            name="pixels/to_uint8",
            error=yardsticks.units_apart(kernels.to_uint8(frames).cpu(), reference.to_uint8(host)),
            bound=0.0,
        ),
        Check(
            name="pixels/rgb_to_yuv420",
            error=yardsticks.units_apart(kernels.rgb_to_yuv420(frames).cpu(), reference.rgb_to_yuv420(host)),
            bound=1.0,
        ),
    ]


def _same(argument: Any) -> Any:
    return argument


def _in_float64(argument: Any) -> Any:
    if isinstance(argument, list):
        return [_in_float64(one) for one in argument]
    is_wide = isinstance(argument, Tensor) and argument.is_floating_point()
    return argument.double() if is_wide else argument


GATES = (
    Gate(name="kernels", expected_s=30, run=check_kernels),
    Gate(name="attention", expected_s=3, run=check_attention),
    Gate(name="blocks", expected_s=4, run=check_blocks),
    Gate(name="forward", expected_s=12, run=check_forward),
    Gate(name="decode", expected_s=12, run=check_decode),
)
