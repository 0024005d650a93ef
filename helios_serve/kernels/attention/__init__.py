"""Attention over packed segments behind one signature, whatever library computes it."""

from helios_serve.kernels.attention.backends import (
    BACKENDS,
    NAMES,
    AttentionBackendError,
    backend_for,
    check_backend,
    obstacles,
)
from helios_serve.kernels.attention.operator import attend
from helios_serve.kernels.attention.segments import AUTO, Segments, attention_scale

__all__ = [
    "AUTO",
    "BACKENDS",
    "NAMES",
    "AttentionBackendError",
    "Segments",
    "attend",
    "attention_scale",
    "backend_for",
    "check_backend",
    "obstacles",
]
