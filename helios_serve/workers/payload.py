"""Tensors on their way between our own processes: their bytes beside a small pickle, so that an object store can share
them without copying. Only what our own workers packed is ever unpacked; nothing that a client sent is pickled here."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Payload = tuple[bytes, list[npt.NDArray[np.uint8]]]
"""A pickle, and the bytes of the tensors in it."""


def pack(value: object) -> Payload:
    """Any value made of dataclasses, tuples and tensors; those on a device come to the host."""
    buffers: list[npt.NDArray[np.uint8]] = []
    head = io.BytesIO()
    _Pickler(head, buffers).dump(value)
    return head.getvalue(), buffers


def unpack(payload: Payload, *, copy: bool = False) -> Any:
    """The packed value, its tensors on the CPU. Without `copy` they share the payload's memory, and are only read."""
    head, buffers = payload
    own = [buffer.copy() for buffer in buffers] if copy else buffers
    return _Unpickler(io.BytesIO(head), own).load()


def num_bytes(payload: Payload) -> int:
    head, buffers = payload
    return len(head) + sum(buffer.nbytes for buffer in buffers)


class _Pickler(pickle.Pickler):
    """Puts each tensor's bytes into `buffers` and its place there, dtype and shape into the pickle."""

    def __init__(self, file: io.BytesIO, buffers: list[npt.NDArray[np.uint8]]) -> None:
        super().__init__(file, protocol=5)
        self._buffers = buffers

    def persistent_id(self, obj: object) -> tuple[int, torch.dtype, tuple[int, ...]] | None:
        if not isinstance(obj, Tensor):
            return None
        flat = obj.detach().cpu().contiguous().reshape(-1)
        self._buffers.append(flat.view(torch.uint8).numpy())
        return len(self._buffers) - 1, flat.dtype, tuple(obj.shape)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, buffers: list[npt.NDArray[np.uint8]]) -> None:
        super().__init__(file)
        self._buffers = buffers

    def persistent_load(self, pid: tuple[int, torch.dtype, tuple[int, ...]]) -> Tensor:
        index, dtype, shape = pid
        if self._buffers[index].size == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.from_numpy(self._buffers[index]).view(dtype).reshape(shape)
