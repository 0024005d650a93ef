"""What a device did while something ran: its kernels by class, how long it was busy, and how often the host waited.

Knows PyTorch's profiler and the names that libraries give to their kernels; knows no model.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

_CLASSES = (
    ("copy", r"memcpy|memset"),
    ("attention", r"fmha|flash|attn|attend|attention|mha_|sdpa|softmax|flashinfer|prefill"),
    ("fused", r"layer_norm|_norm_|norm_rope|residual|quantize_rows|add_bias|place_with_bias|yuv|uint8|norm_rows"),
    ("conv", r"conv|fprop|implicit|winograd|wgrad|dgrad|nhwc|nchw|ndhwc|im2col|vol2col"),
    ("gemm", r"gemm|nvjet|cutlass|cublas|xmma|wgmma|splitk|scaled_mm|matmul|gemv"),
    ("elementwise", r"elementwise|vectorized|reduce|index|cat|fill|gather|scatter|upsample|triton_|at::native"),
)
"""The first pattern that is found in a kernel's lower-case name decides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One run of one kernel, in microseconds of the device's clock."""

    name: str
    start_us: float
    end_us: float

    @property
    def kind(self) -> str:
        name = self.name.lower()
        return next((kind for kind, pattern in _CLASSES if re.search(pattern, name)), "other")

    @property
    def is_memset(self) -> bool:
        """The device's own clearing, as matrix products of cuBLAS ask for before they count their tiles."""
        return self.name.startswith("Memset")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTrace:
    """The kernels of a run, in the order of their starts; none on devices that the profiler does not see."""

    kernels: tuple[Kernel, ...]

    @property
    def busy_ms(self) -> float:
        """Time with at least one kernel."""
        busy_us, until = 0.0, -float("inf")
        for kernel in self.kernels:
            busy_us += max(0.0, kernel.end_us - max(until, kernel.start_us))
            until = max(until, kernel.end_us)
        return busy_us * 1e-3

    @property
    def span_ms(self) -> float:
        """From the first start to the last end."""
        if not self.kernels:
            return 0.0
        return (max(kernel.end_us for kernel in self.kernels) - self.kernels[0].start_us) * 1e-3

    def ms_by_kind(self) -> dict[str, float]:
        """Sums of kernel times, the largest first."""
        total: Counter[str] = Counter()
        for kernel in self.kernels:
            total[kernel.kind] += (kernel.end_us - kernel.start_us) * 1e-3  # type: ignore[assignment]
        return {kind: round(ms, 4) for kind, ms in total.most_common()}

    def launches_by_kind(self) -> dict[str, int]:
        return dict(Counter(kernel.kind for kernel in self.kernels).most_common())

    def longest(self, count: int = 14) -> list[list[Any]]:
        """[name, class, milliseconds in all, runs] of the kernels that took most time."""
        total: Counter[str] = Counter()
        runs: Counter[str] = Counter()
        for kernel in self.kernels:
            total[kernel.name] += (kernel.end_us - kernel.start_us) * 1e-3  # type: ignore[assignment]
            runs[kernel.name] += 1
        kinds = {kernel.name: kernel.kind for kernel in self.kernels}
        return [[name[:100], kinds[name], round(ms, 3), runs[name]] for name, ms in total.most_common(count)]


def trace(device: torch.device, run: Callable[[], object]) -> DeviceTrace:
    """Runs it once under the profiler, which slows the host down but not the kernels."""
    if device.type != "cuda":
        run()
        return DeviceTrace(kernels=())
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    kernels = [
        Kernel(name=event.name, start_us=event.time_range.start, end_us=event.time_range.end)
        for event in profiler.events()
        if event.device_type.name == "CUDA" and not event.is_user_annotation
    ]
    return DeviceTrace(kernels=tuple(sorted(kernels, key=lambda kernel: kernel.start_us)))


def waits_by_place(device: torch.device, run: Callable[[], object]) -> dict[str, int]:
    """How often the host waited for the device in a run, by line of source, as far as PyTorch notices it; to wait for
    an event is not counted."""
    if device.type != "cuda":
        run()
        return {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = [
        f"{Path(one.filename).name}:{one.lineno}" for one in caught if "called a synchronizing" in str(one.message)
    ]
    return dict(Counter(places).most_common())
