"""diffusers beside us, in the same run: same weights in the same memory, same prompt, seed and size.

Knows how its models and its pipeline are called and timed; numbers carry its version and how it ran.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks import diffusers_models, random_model
from benchmarks.device_trace import trace
from benchmarks.plan import Bench, Measurement, Section, single
from benchmarks.timing import Samples
from helios_serve.model_executor.packing import TokenSequence, pack, unpack
from helios_serve.model_executor.vae import PARITY
from helios_serve.types import FRAMES_PER_CHUNK, HISTORY_FRAMES, LATENT_FRAMES_PER_CHUNK

_MAX_DISAGREEMENT = 0.08
"""Relative distance of two bf16 forwards of one function; a wrong weight or position gives 1."""
_NUM_WARM_UPS = 1
_RATIO: dict[str, Any] = {"gate": 1.3, "goal": 1.5}
"""Our frames per second over those of compiled diffusers."""


def measure_eager(bench: Bench) -> list[Measurement]:
    """As its documentation runs it, with cuDNN attention: bf16 transformer, fp32 VAE, then bf16 VAE."""
    theirs = _theirs(bench)
    measurements = _measure_forwards(bench, theirs, "eager", {})
    measurements += _measure_chunks(bench, theirs, "eager", "fp32", {}, 10)
    return measurements + _measure_chunks(bench, theirs, "eager", "bf16", {}, 6)


def measure_compiled(bench: Bench) -> list[Measurement]:
    """The same with its blocks compiled one by one, mode default; compile time is told, not counted."""
    theirs = _theirs(bench)
    blocks = theirs.blocks
    start = time.perf_counter()
    theirs.compile_repeated_blocks(backend="inductor" if bench.device.type == "cuda" else "eager", dynamic=False)
    try:
        for stage in range(3):
            _forward(theirs, _inputs(bench, stage))()
        bench.clock.synchronize()
        details = {"compile_s": time.perf_counter() - start}
        measurements = _measure_forwards(bench, theirs, "compiled", details)
        for precision in ("bf16", "fp32"):
            measurements += _measure_chunks(bench, theirs, "compiled", precision, details, bench.sizes.rival_chunks)
    finally:
        for block in blocks:
            block._compiled_call_impl = None  # what nn.Module.compile sets
    return measurements


def measure_vae(bench: Bench) -> list[Measurement]:
    """Its decode alone: fp32, then bf16."""
    measurements = []
    latents = _latents(bench)
    for precision in ("fp32", "bf16"):
        vae = diffusers_models.vae_of(bench, precision)
        own = [one.to(vae.dtype) for one in latents]
        run = torch.inference_mode()(lambda number, vae=vae, own=own: vae.decode(own[number % len(own)])[0])
        repetitions = 3 if bench.sizes.is_full else 1
        samples = bench.clock.measure(run, repetitions=repetitions)
        details = _flags({"vae": precision})
        name = f"rival/vae_decode_ms/{precision}"
        measurements.append(Measurement(name=name, unit="ms", samples=samples, details=details))
    return measurements


SECTIONS = (
    Section(name="rival_eager", value_rank=25, expected_s=60, run=measure_eager),
    Section(name="rival_compiled", value_rank=15, expected_s=80, run=measure_compiled),
    Section(name="rival_vae", value_rank=26, expected_s=12, run=measure_vae),
)


@dataclass(slots=True)
class _Phases:
    """Marks that hooks leave while a pipeline runs: pairs of device times around forwards and decodes."""

    device: torch.device
    forwards: list[tuple[Any, Any]] = field(default_factory=list)
    decodes: list[tuple[Any, Any]] = field(default_factory=list)
    ended_s: list[float] = field(default_factory=list)

    def mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, pairs: list[tuple[Any, Any]]) -> list[float]:
        if self.device.type != "cuda":
            return [(end - start) * 1e3 for start, end in pairs]
        return [start.elapsed_time(end) for start, end in pairs]

    def mark_chunk(self) -> None:
        """Waits for the device, as its decode's caller would to show the frames."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.ended_s.append(time.perf_counter())


def _measure_forwards(bench: Bench, theirs: nn.Module, label: str, details: dict[str, Any]) -> list[Measurement]:
    disagreement = _disagreement(bench, theirs)
    if not disagreement <= _MAX_DISAGREEMENT:
        raise ArithmeticError(f"diffusers ({label}) and ours differ by {disagreement:.3g} of a forward's length")
    measurements = []
    for stage in range(3):
        inputs = _inputs(bench, stage)
        run = _forward(theirs, inputs)
        samples = bench.clock.measure(partial(_call, run), repetitions=3 if bench.sizes.is_full else 1)
        seen = trace(bench.device, run)
        more = {"disagreement": disagreement, "launches": len(seen.kernels), "ms_by_kind": seen.ms_by_kind()}
        name = f"rival/forward_ms/{label}/stage{stage}"
        measurements.append(Measurement(name=name, unit="ms", samples=samples, details=_flags({**details, **more})))
    return measurements


def _measure_chunks(
    bench: Bench, theirs: nn.Module, label: str, precision: str, details: dict[str, Any], most: int
) -> list[Measurement]:
    """Its own pipeline, all chunks of a video in one call; as many as time allows."""
    pipeline = diffusers_models.pipeline_of(theirs, diffusers_models.vae_of(bench, precision))
    first = _play(bench, pipeline, 1)
    expected_s = max(1e-3, first["elapsed_s"])
    count = min(most, bench.sizes.rival_chunks, max(2, int((bench.remaining_s - 8) / 2.5 / expected_s)))
    played = _play(bench, pipeline, _NUM_WARM_UPS + count)
    more = {"vae": precision, "chunks": count, **{key: value for key, value in played.items() if key != "samples"}}
    name = f"{label}/vae_{precision}"
    measurements = [
        single(f"rival/fps/{name}", "fps", played["fps"], is_better_high=True, details=_flags({**details, **more})),
        Measurement(name=f"rival/chunk_ms/{name}", unit="ms", samples=played["samples"]),
    ]
    ours = bench.cache.get("fps/1-1-1")
    if ours is not None:
        ratio, targets = ours / played["fps"], _RATIO if label == "compiled" else {}
        measurements.append(single(f"rival/ratio/{name}", "x", ratio, is_better_high=True, **targets))
    return measurements


def _play(bench: Bench, pipeline: Any, num_chunks: int) -> dict[str, Any]:
    """Frames per second behind the first chunk, milliseconds of its phases per chunk, and what the output takes."""
    phases = _Phases(bench.device)
    generator = torch.Generator().manual_seed(0)
    prompt = random_model.random_prompt(bench.sizes, torch.Generator(bench.device).manual_seed(5))[None]
    start_s = time.perf_counter()
    with _watched(pipeline, phases), diffusers_models.portable_cholesky():
        pipeline(
            prompt_embeds=prompt,
            height=bench.sizes.height,
            width=bench.sizes.width,
            num_frames=FRAMES_PER_CHUNK * num_chunks,
            guidance_scale=1.0,
            generator=generator,
            pyramid_num_inference_steps_list=[1, 1, 1],
            output_type="np",
        )
    end_s = time.perf_counter()
    steady = [(after - before) * 1e3 for before, after in pairwise(phases.ended_s)]
    if not steady:
        steady = [(phases.ended_s[0] - start_s) * 1e3]
    output_ms = (end_s - phases.ended_s[-1]) * 1e3 / num_chunks
    mean_ms = sum(steady) / len(steady)
    return {
        "samples": Samples(values=tuple(steady)),
        "elapsed_s": end_s - start_s,
        "fps": FRAMES_PER_CHUNK * 1e3 / (mean_ms + output_ms),
        "fps_on_the_device": FRAMES_PER_CHUNK * 1e3 / mean_ms,
        "forward_ms_per_chunk": sum(phases.ms(phases.forwards)) / num_chunks,
        "decode_ms_per_chunk": sum(phases.ms(phases.decodes)) / num_chunks,
        "output_ms_per_chunk": output_ms,
    }


@contextmanager
def _watched(pipeline: Any, phases: _Phases) -> Iterator[None]:
    starts: list[Any] = []

    def begin(*_: object) -> None:
        starts.append(phases.mark())

    def end(*_: object) -> None:
        phases.forwards.append((starts.pop(), phases.mark()))

    before = pipeline.transformer.register_forward_pre_hook(begin)
    after = pipeline.transformer.register_forward_hook(end)
    decode = pipeline.vae.decode

    def watched_decode(*arguments: Any, **options: Any) -> Any:
        start = phases.mark()
        result = decode(*arguments, **options)
        phases.decodes.append((start, phases.mark()))
        phases.mark_chunk()
        return result

    try:
        with mock.patch.object(pipeline.vae, "decode", watched_decode):
            yield
    finally:
        before.remove()
        after.remove()


def _theirs(bench: Bench) -> Any:
    """Its transformer over our weights; made once."""
    return bench.once(
        "rival_transformer", lambda: diffusers_models.shared_transformer(random_model.transformer_of(bench))
    )


def _inputs(bench: Bench, stage: int) -> dict[str, Any]:
    """A forward's arguments in its form; random values of `_our_flow`."""
    device, dtype = bench.device, bench.sizes.dtype
    generator = torch.Generator(device).manual_seed(11)
    x = random_model.random_latents(bench.sizes, stage, generator)
    long, mid, short = random_model.random_history(bench.sizes, generator).windows()
    prompt = random_model.random_prompt(bench.sizes, generator)
    frames = torch.arange(1 + sum(HISTORY_FRAMES) + LATENT_FRAMES_PER_CHUNK)
    first, far, near, last, current = frames.split([1, *HISTORY_FRAMES, LATENT_FRAMES_PER_CHUNK])
    return {
        "hidden_states": x[None].to(dtype),
        "timestep": torch.tensor([700], device=device),
        "encoder_hidden_states": prompt[None].to(dtype),
        "indices_hidden_states": current[None],
        "indices_latents_history_short": torch.cat((first, last))[None],
        "indices_latents_history_mid": near[None],
        "indices_latents_history_long": far[None],
        "latents_history_short": short[None].to(dtype),
        "latents_history_mid": mid[None].to(dtype),
        "latents_history_long": long[None].to(dtype),
        "return_dict": False,
    }


def _forward(theirs: nn.Module, inputs: dict[str, Any]) -> Callable[[], Tensor]:
    @torch.no_grad()
    def run() -> Tensor:
        flow: Tensor = theirs(**inputs)[0]
        return flow

    return run


def _call(run: Callable[[], object], _: int) -> object:
    return run()


@torch.inference_mode()
def _our_flow(bench: Bench, stage: int) -> Tensor:
    """Ours for the same arguments: [C, 9, h, w]."""
    ours = random_model.transformer_of(bench)
    generator = torch.Generator(bench.device).manual_seed(11)
    x = random_model.random_latents(bench.sizes, stage, generator).to(ours.dtype)
    history = ours.embed_history(random_model.random_history(bench.sizes, generator))
    text = ours.project_text(random_model.random_prompt(bench.sizes, generator).to(ours.dtype))
    grid = (x.shape[1] // ours.patch[0], x.shape[2] // ours.patch[1], x.shape[3] // ours.patch[2])
    rotary = ours.current_rotary(grid)
    sequence = TokenSequence(history=history, x=x, rotary=rotary, timestep=700.0, text=text)
    batch, packed_text = pack([sequence], ours.patch)
    return unpack(ours(batch, packed_text), batch, ours.patch)[0]


def _disagreement(bench: Bench, theirs: nn.Module) -> float:
    flow = _forward(theirs, _inputs(bench, 0))()[0].float()
    return float((flow - _our_flow(bench, 0).float()).norm() / flow.norm())


def _latents(bench: Bench) -> list[Tensor]:
    vae = random_model.vae_of(bench, PARITY)
    generator = torch.Generator(bench.device).manual_seed(6)
    drawn = (random_model.random_latents(bench.sizes, 2, generator) for _ in range(2))
    return [vae.denormalize(latents[None]) for latents in drawn]


def _flags(details: dict[str, Any]) -> dict[str, Any]:
    attention = diffusers_models.CUDNN if torch.cuda.is_available() else "native"
    return {"diffusers": diffusers_models.package().__version__, "attention": attention, **details}
