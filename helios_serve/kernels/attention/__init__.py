"""Attention over packed segments behind one signature, whatever library computes it."""

from helios_serve.kernels.attention.backends import (
    BACKENDS,
    FP8_BACKENDS,
    NAMES,
    AttentionBackendError,
    backend_for,
    backend_named,
    check_backend,
    fp8_backend,
    obstacles,
)
from helios_serve.kernels.attention.operator import attend
from helios_serve.kernels.attention.segments import AUTO, Segments, attention_scale, used_bounds

__all__ = [
    "AUTO",
    "BACKENDS",
    "FP8_BACKENDS",
    "NAMES",
    "AttentionBackendError",
    "Segments",
    "attend",
    "attention_scale",
    "backend_for",
    "backend_named",
    "check_backend",
    "fp8_backend",
    "obstacles",
    "used_bounds",
]
