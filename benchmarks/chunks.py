"""Chunks from end to end: the real runner, the decode, and the way of the bytes into the host's memory.

Knows streams of chunks and wall clocks. A chunk is timed from its start to its last byte in pinned memory; it is read
while the device works on the next one, as a server does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import random_model
from benchmarks.device_trace import trace, waits_by_place
from benchmarks.plan import Bench, Measurement, Section, single
from benchmarks.timing import Samples
from helios_serve.kernels import rgb_to_yuv420
from helios_serve.model_executor.batch import ChunkInput, ChunkOutput, SamplingRules
from helios_serve.model_executor.conditioning import fresh_generator_state
from helios_serve.model_executor.history import empty_history
from helios_serve.model_executor.model_config import SchedulerConfig
from helios_serve.model_executor.prompt_schedule import PromptEmbedding
from helios_serve.model_executor.runner import Runner
from helios_serve.model_executor.vae import WanVAE
from helios_serve.types import FRAMES_PER_CHUNK, SamplingParams
from helios_serve.workers.copy_out import CopyRing, HostCopy, lane_of

RULES = SamplingRules(
    scheduler=SchedulerConfig(solver="dmd", use_dynamic_shifting=True, time_shift_type="linear"), guidance="cfg"
)
"""Of Helios-Distilled."""

_MANY_FRAMES = FRAMES_PER_CHUNK * 1000
_NUM_FIRST_CHUNKS = 3
_MIN_CHUNKS = 4
_FP8_CHUNKS = 8
_FPS_111: dict[str, Any] = {"gate": 27.0, "goal": 30.0, "limit": 41.1}
_FPS_222: dict[str, Any] = {"gate": 15.0, "goal": 16.5, "limit": 21.7}
_FPS_FP8: dict[str, Any] = {"gate": 33.0, "goal": 39.0, "limit": 55.0}
_FIRST_CHUNK_MS: dict[str, Any] = {"gate": 2400.0, "goal": 2000.0, "limit": 1520.0}


class Stream:
    """One video in the making: its history grows with the chunks that it is given back."""

    def __init__(self, bench: Bench, name: str, steps: tuple[int, ...], *, is_amplified: bool = False) -> None:
        sizes, device = bench.sizes, bench.device
        seed = sum(name.encode())
        generator = torch.Generator(device).manual_seed(seed)
        self._name = name
        self._params = SamplingParams(
            width=sizes.width,
            height=sizes.height,
            num_frames=_MANY_FRAMES,
            fps=24,
            seed=seed,
            steps=steps,
            guidance_scale=1.0,
            amplify_first_chunk=is_amplified,
        )
        self._prompt = PromptEmbedding(key=name, embeds=random_model.random_prompt(sizes, generator).cpu())
        self._history = empty_history(sizes.transformer.in_channels, sizes.height // 8, sizes.width // 8, device)
        self._generator_state = fresh_generator_state(seed)
        self._chunk = 0

    def next(self) -> ChunkInput:
        return ChunkInput(
            task_id=f"{self._name}/{self._chunk}",
            request_id=self._name,
            chunk=self._chunk,
            params=self._params,
            prompt=self._prompt,
            negative=None,
            history=self._history,
            generator_state=self._generator_state,
        )

    def take(self, output: ChunkOutput) -> None:
        pinned = output.latents if self._chunk == 0 else None
        self._history = self._history.followed_by([output.latents], pinned)
        self._generator_state = output.generator_state
        self._chunk += 1


class Screen:
    """Decodes latents and brings the pictures to the host."""

    def __init__(self, vae: WanVAE, device: torch.device) -> None:
        self._vae = vae
        self._ring = CopyRing(lane_of(device))

    @torch.inference_mode()
    def show(self, latents: Tensor) -> HostCopy:
        """Latents [C, 9, h, w] -> YUV pictures [33, H * 3/2, W] uint8 on their way."""
        pixels = self._vae.decode(self._vae.denormalize(latents[None]))
        return self._ring.start(rgb_to_yuv420(pixels[0].transpose(0, 1)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """Rounds of one chunk per stream: when each began, and when the last byte of it was there (seconds)."""

    started_s: tuple[float, ...]
    ended_s: tuple[float, ...]
    num_streams: int

    def without(self, warm_ups: int) -> Played:
        started_s, ended_s = self.started_s[warm_ups:], self.ended_s[warm_ups:]
        return Played(started_s=started_s, ended_s=ended_s, num_streams=self.num_streams)

    @property
    def latencies_ms(self) -> Samples:
        pairs = zip(self.started_s, self.ended_s, strict=True)
        return Samples(values=tuple((end - start) * 1e3 for start, end in pairs))

    @property
    def fps(self) -> float:
        """Frames of all streams over the time of all rounds."""
        elapsed_s = self.ended_s[-1] - self.started_s[0]
        return FRAMES_PER_CHUNK * self.num_streams * len(self.started_s) / elapsed_s


class Player:
    """Plays rounds: one chunk of each stream, packed from step to step."""

    def __init__(self, bench: Bench) -> None:
        self._runner = Runner(random_model.transformer_of(bench), RULES)
        self._screen = Screen(random_model.vae_of(bench, random_model.FAST_VAE), bench.device)

    def play(self, streams: Sequence[Stream], num_rounds: int, deadline_s: float) -> Played:
        """As many rounds as fit before `deadline_s` of `time.perf_counter`."""
        started_s: list[float] = []
        ended_s: list[float] = []
        copies: list[HostCopy] = []
        longest_s = 0.0
        while len(started_s) < num_rounds and (not started_s or time.perf_counter() + longest_s < deadline_s):
            started_s.append(time.perf_counter())
            copies = self._round(streams, copies, ended_s)
            longest_s = max(longest_s, time.perf_counter() - started_s[-1])
        _read(copies, ended_s)
        return Played(started_s=tuple(started_s), ended_s=tuple(ended_s), num_streams=len(streams))

    def _round(self, streams: Sequence[Stream], before: list[HostCopy], ended_s: list[float]) -> list[HostCopy]:
        inputs = {stream.next().task_id: stream for stream in streams}
        for stream in inputs.values():
            self._runner.join(stream.next())
        finished = self._step()
        _read(before, ended_s)
        while not finished:
            finished = self._step()
        for output in finished:
            inputs[output.task_id].take(output)
        return [self._screen.show(output.latents) for output in finished]

    def _step(self) -> tuple[ChunkOutput, ...]:
        result = self._runner.step()
        for _, error in result.failed:
            raise error
        return result.finished


def measure_fps(
    bench: Bench, name: str, steps: tuple[int, ...], count: int, targets: dict[str, Any], num_streams: int = 1
) -> list[Measurement]:
    """`count` rounds in steady state, or fewer if time is short; then one traced and one watched for waits."""
    player = Player(bench)
    streams = [Stream(bench, f"{name}/{number}", steps) for number in range(num_streams)]
    warm_ups = bench.sizes.warm_up_chunks
    stop_s = time.perf_counter() + max(1.0, bench.remaining_s - 5)
    warm = player.play(streams, warm_ups, stop_s)
    played = player.play(streams, count, stop_s)
    fps = Samples(values=(played.fps,))
    latencies = played.latencies_ms
    details = {
        "chunks": latencies.count * num_streams,
        "streams": num_streams,
        "steps": list(steps),
        "warm_up_ms": list(warm.latencies_ms.values),
    }
    measurements = [
        Measurement(name=f"chunk/fps/{name}", unit="fps", samples=fps, is_better_high=True, details=details, **targets),
        Measurement(name=f"chunk/ms/{name}", unit="ms", samples=latencies),
    ]
    bench.cache[f"fps/{name}"] = played.fps
    if num_streams > 1:
        measurements += _gain(bench, name, steps, played.fps)
    else:
        one_round = partial(player.play, streams, 1, float("inf"))
        idle, waits = f"chunk/idle_share/{name}", f"chunk/device_waits/{name}"
        measurements += bench.attempt(idle, partial(_idle_share, bench, idle, one_round, 33e3 / played.fps))
        measurements += bench.attempt(waits, partial(_device_waits, bench, waits, one_round))
    return measurements


def _gain(bench: Bench, name: str, steps: tuple[int, ...], fps: float) -> list[Measurement]:
    """Over one stream alone, if that was measured."""
    alone = bench.cache.get("fps/" + "-".join(map(str, steps)))
    if alone is None:
        return []
    return [single(f"chunk/gain/{name}", "x", fps / alone, gate=1.0, goal=1.03, is_better_high=True)]


def _idle_share(bench: Bench, name: str, one_round: Callable[[], object], chunk_ms: float) -> Measurement:
    """Of a chunk's time, as it was without the profiler, the share in which no kernel runs."""
    seen = trace(bench.device, one_round)
    idle = 1 - seen.busy_ms / chunk_ms if seen.kernels else 0.0
    details = {
        "busy_ms": seen.busy_ms,
        "traced_span_ms": seen.span_ms,
        "chunk_ms": chunk_ms,
        "ms_by_kind": seen.ms_by_kind(),
        "launches": len(seen.kernels),
        "longest": seen.longest(),
    }
    return single(name, "share", idle, gate=0.03, goal=0.01, limit=0.0, details=details)


def _device_waits(bench: Bench, name: str, one_round: Callable[[], object]) -> Measurement:
    places = waits_by_place(bench.device, one_round)
    return single(name, "waits", sum(places.values()), gate=1.0, goal=0.0, limit=0.0, details={"places": places})


def measure_111(bench: Bench) -> list[Measurement]:
    return measure_fps(bench, "1-1-1", (1, 1, 1), bench.sizes.chunks_111, _FPS_111)


def measure_222(bench: Bench) -> list[Measurement]:
    return measure_fps(bench, "2-2-2", (2, 2, 2), bench.sizes.chunks_222, _FPS_222)


def measure_fp8(bench: Bench) -> list[Measurement]:
    """With a transformer that is quantised at the moment."""
    count = min(_FP8_CHUNKS, bench.sizes.chunks_111)
    return measure_fps(bench, "1-1-1/fp8", (1, 1, 1), count, _FPS_FP8)


def measure_first_chunk(bench: Bench) -> list[Measurement]:
    """Request to 33 frames with an unseen prompt's embeddings, twice the steps; the text encoder is not in it."""
    player = Player(bench)
    values: list[float] = []
    for number in range(1 + (_NUM_FIRST_CHUNKS if bench.sizes.is_full else 1)):
        stream = Stream(bench, f"first/{number}", (1, 1, 1), is_amplified=True)
        bench.clock.synchronize()
        values += player.play([stream], 1, float("inf")).latencies_ms.values
    samples = Samples(values=tuple(values[1:]))
    return [Measurement(name="chunk/first_ms/1-1-1", unit="ms", samples=samples, **_FIRST_CHUNK_MS)]


def measure_streams(bench: Bench) -> list[Measurement]:
    """Four streams in step, packed; the speed of one alone is measured beside."""
    rounds = _MIN_CHUNKS if bench.sizes.is_full else 1
    return measure_fps(bench, "1-1-1/x4", (1, 1, 1), rounds, {}, num_streams=4)


def _read(copies: Sequence[HostCopy], ended_s: list[float]) -> None:
    """Waits for a round's bytes."""
    for copy in copies:
        with copy as (pictures,):
            assert pictures.dtype == torch.uint8
    if copies:
        ended_s.append(time.perf_counter())


SECTIONS = (
    Section(name="chunks_111", value_rank=10, expected_s=30, run=measure_111),
    Section(name="first_chunk", value_rank=12, expected_s=10, run=measure_first_chunk),
    Section(name="chunks_222", value_rank=17, expected_s=50, run=measure_222),
    Section(name="streams", value_rank=47, expected_s=28, run=measure_streams),
)
