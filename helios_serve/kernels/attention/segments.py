"""Where packed sequences begin and end, and the copies of that which live on a device.

Knows host integers and how to upload them without waiting; knows no backend.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

AUTO = "auto"
"""Instead of a backend's name: the first one in the order of preference that can do it."""
NUM_SHAPES = 256
"""Packed shapes of which copies and plans are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """Where each packed sequence begins and ends, for queries and for keys.

    `cu_q` and `cu_k` are running sums that begin with 0: segment i attends from rows cu_q[i]:cu_q[i+1] to rows
    cu_k[i]:cu_k[i+1]. They are host integers, so that no backend waits for the device. Rows behind the last segment
    are not attended to, and what is returned for them means nothing. `key_bias` [Nk] float32 is added to the scaled
    logits. `backend` is a name out of `backends.NAMES`, or `AUTO`.
    """

    cu_q: tuple[int, ...]
    cu_k: tuple[int, ...]
    scale: float
    key_bias: Tensor | None = None
    backend: str = AUTO

    @property
    def max_q(self) -> int:
        return max(stop - start for start, stop in pairwise(self.cu_q))

    @property
    def max_k(self) -> int:
        return max(stop - start for start, stop in pairwise(self.cu_k))

    @property
    def is_dense(self) -> bool:
        """There is one segment: no bounds are needed."""
        return len(self.cu_q) == 2


def attention_scale(head_dim: int) -> float:
    """The usual 1 / sqrt(Dh)."""
    return 1.0 / math.sqrt(head_dim)


_USED: ContextVar[list[Tensor] | None] = ContextVar("used", default=None)


def on_device(values: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [len(values)] on the device, uploaded once for equal values and not waited for.

    Other streams may use it only after the one that was current at its first use.
    """
    uploaded = _uploaded(values, device)
    used = _USED.get()
    if used is not None:
        used.append(uploaded)
    return uploaded


@contextmanager
def used_bounds() -> Iterator[list[Tensor]]:
    """A list of what `on_device` gives in the block: a recorded graph reads it for as long as it lives, whether or not
    it is still kept here."""
    used: list[Tensor] = []
    token = _USED.set(used)
    try:
        yield used
    finally:
        _USED.reset(token)


@lru_cache(maxsize=4 * NUM_SHAPES)
def _uploaded(values: tuple[int, ...], device: torch.device) -> Tensor:
    host = torch.tensor(values, dtype=torch.int32)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
