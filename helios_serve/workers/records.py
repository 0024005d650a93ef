"""Tensors as bytes that outlive this process: the latents of a chunk, and the history that a request begins from.

In the format of safetensors, in float32. Knows tensors; knows nothing of where the bytes are kept.
"""

from __future__ import annotations

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from helios_serve.model_executor.conditioning import Conditioning
from helios_serve.model_executor.history import History


def record_of(value: object) -> bytes:
    """The record of latents [C, 9, h, w], or of the history that a conditioning begins from."""
    if isinstance(value, Conditioning):
        parts = {"frames": value.history.frames}
        if value.history.first is not None:
            parts["first"] = value.history.first
    else:
        assert isinstance(value, Tensor)
        parts = {"latents": value}
    return save({name: part.detach().float().cpu().contiguous() for name, part in parts.items()})


def latents_of(record: bytes) -> Tensor:
    """Latents [C, 9, h, w] float32 on the CPU.

    Raises: ValueError when the record holds none.
    """
    return _parts(record, "latents")["latents"]


def history_of(record: bytes, device: torch.device) -> History:
    """The starting history, as it was recorded.

    Raises: ValueError when the record holds none.
    """
    parts = _parts(record, "frames")
    first = parts.get("first")
    return History(frames=parts["frames"].to(device), first=None if first is None else first.to(device))


def _parts(record: bytes, needed: str) -> dict[str, Tensor]:
    try:
        parts = load(record)
    except SafetensorError as error:
        raise ValueError(f"not a record: {error}") from error
    if needed not in parts:
        raise ValueError(f"a record of {', '.join(sorted(parts))}, not of {needed}")
    return parts
