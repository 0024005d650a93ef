"""The nouns of the benchmark: sections, gates, what they measure and what they are given.

Knows no kernel and no model, and measures nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.environment import Sampler
from benchmarks.timing import Clock, Samples, is_lost
from helios_serve.model_executor.model_config import TransformerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The workload. `transformer` is the 14B model or a tiny one; pictures are `height` x `width` pixels.

    `chunks_111`, `chunks_222`: measured chunks in steady state; `repetitions`: readings of a short measurement.
    """

    is_full: bool
    transformer: TransformerConfig
    dtype: torch.dtype
    height: int
    width: int
    repetitions: int
    warm_up_chunks: int
    chunks_111: int
    chunks_222: int
    rival_chunks: int


FULL = Sizes(
    is_full=True,
    transformer=TransformerConfig(),
    dtype=torch.bfloat16,
    height=384,
    width=640,
    repetitions=20,
    warm_up_chunks=2,
    chunks_111=20,
    chunks_222=20,
    rival_chunks=10,
)
TINY = Sizes(
    is_full=False,
    transformer=TransformerConfig(
        num_attention_heads=2,
        attention_head_dim=16,
        rope_dim=(8, 4, 4),
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=3,
    ),
    dtype=torch.float32,
    height=64,
    width=64,
    repetitions=2,
    warm_up_chunks=1,
    chunks_111=1,
    chunks_222=1,
    rival_chunks=1,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One number. `name` says what and at which size, as in "dit/forward_ms/stage0"; samples are in `unit`.

    gate, goal, limit: of PERFORMANCE.md, in the same unit; None where it names none. details: whatever explains the
    number and fits into JSON, such as the backend that ran or shares of the time.
    """

    name: str
    unit: str
    samples: Samples
    gate: float | None = None
    goal: float | None = None
    limit: float | None = None
    is_better_high: bool = False
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """The median."""
        return self.samples.median


def single(name: str, unit: str, value: float, **targets: Any) -> Measurement:
    """A quantity that is read once, such as a peak of memory; `targets` are the other fields of `Measurement`."""
    return Measurement(name=name, unit=unit, samples=Samples(values=(float(value),)), **targets)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One comparison of a gate: `error` must be a number and at most `bound`."""

    name: str
    error: float
    bound: float

    @property
    def is_green(self) -> bool:
        return self.error <= self.bound


@dataclass(slots=True, kw_only=True)
class Bench:
    """What a section is given.

    cache: shared by all sections, for what is built once, such as the model; deadline: of `time.monotonic`, for the
    section that runs; sampler: clocks and power, for windows of time;
    notes: of the section that runs, for its report, such as why a part of it was left out.
    """

    device: torch.device
    clock: Clock
    sizes: Sizes
    deadline: float
    cache: dict[str, Any] = field(default_factory=dict)
    sampler: Sampler = field(default_factory=Sampler)
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def remaining_s(self) -> float:
        return self.deadline - time.monotonic()

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """What `make` built the first time; stays until `cache.pop(key)`."""
        if key not in self.cache:
            self.cache[key] = make()
        return self.cache[key]

    def attempt(self, name: str, measure: Callable[[], Measurement]) -> list[Measurement]:
        """What `measure` makes; nothing and a note if it fails or the section's time is over.

        Raises: what `measure` raised, if the device cannot be used any more.
        """
        if self.remaining_s <= 0:
            self.notes[name] = "no time was left"
            return []
        try:
            return [measure()]
        except Exception as error:
            if is_lost(self.device):
                raise
            self.notes[name] = f"{type(error).__name__}: {error}"[:300]
            return []


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """A part of the correctness gate, `GATES` of a module. An exception is as red as a check that fails."""

    name: str
    expected_s: float
    run: Callable[[Bench], list[Check]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the measurements, `SECTIONS` of a module.

    value_rank: lower ones run first: from 10 what bounds the device, from 20 the model, from 30 its rivals, from 40
    details. One that does not fit into what is left of the budget is cut, and the report says so. expected_s: on the
    full size. A section raises `UnavailableError` for a missing package.
    """

    name: str
    value_rank: int
    expected_s: float
    run: Callable[[Bench], list[Measurement]]


class UnavailableError(Exception):
    """Something optional that is not on this machine; the message names it."""
