"""How the operators of this package come to be: each is one name in PyTorch's dispatcher, with its plain reference
behind it on every device and a Triton kernel in front of it on CUDA devices.

Knows the dispatcher, whether Triton is there and what was tuned for a device; knows no operator. A trace sees one
operator per fused kernel.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None
tl: Any = None
if HAS_TRITON:
    import triton
    import triton.language

    tl, jit = triton.language, triton.jit
else:

    def jit(kernel: Callable[..., None]) -> Any:
        """Leaves the kernel as it is: nothing launches it on a machine without Triton."""
        return kernel


TUNED = Path(__file__).with_name("tuned.json")
"""What was measured: for each name of a device its tables, such as `num_warps` by kernel and block. What it lacks is
chosen by a plain function of the shape."""
NUM_WARPS = (4, 8, 16)
"""Candidates for tuning kernels that hold a row in registers."""
_LIBRARY = torch.library.Library("helios", "DEF")


def operator(
    schema: str,
    *,
    reference: Callable[..., Any],
    kernel: Callable[..., Any],
    shapes: Callable[..., Any],
) -> Callable[..., Any]:
    """Registers an operator `helios::name`.

    Args:
        schema: name, arguments and results, as the dispatcher writes them; mutated tensors are marked.
        reference: computes it on any device.
        kernel: computes it with Triton on CUDA devices, where Triton is installed.
        shapes: makes empty results.

    Returns: what calls it.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, shapes, "Meta")
    if HAS_TRITON:
        _LIBRARY.impl(name, kernel, "CUDA")
    overload: Callable[..., Any] = getattr(torch.ops.helios, name).default
    return overload


@dataclass(frozen=True, slots=True, kw_only=True)
class Specialisation:
    """A kernel as a server would launch it, to be compiled ahead of time.

    name: unique among all. types: Triton's type of each argument that varies, such as "*bf16", "*fp32" or "i32"; all
    are taken as divisible by 16. constants: the other arguments. min_capability: of devices that can run it, times 10.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    is_contracted: bool = True
    min_capability: int = 80


def accumulator(x: Tensor) -> Any:
    """Triton's type for sums over `x`."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def block_of(width: int) -> int:
    """The power of two that covers a row."""
    return 1 << (width - 1).bit_length()


def warps_for(block: int) -> int:
    """So that a thread holds 32 values of a row, or fewer."""
    return min(16, max(1, block // 1024))


def num_warps(kernel: Any, block: int, device: torch.device) -> int:
    """As measured on devices of that name, else `warps_for`."""
    warps: int = tuned("num_warps", device).get(tuning_key(kernel, block), warps_for(block))
    return warps


def tuning_key(kernel: Any, block: int) -> str:
    """In the table `num_warps`."""
    return f"{kernel.__name__.strip('_')}/{block}"


@cache
def tuned(table: str, device: torch.device) -> Mapping[str, Any]:
    """What was measured on devices of that name; empty if nothing was."""
    if device.type != "cuda":
        return {}
    found: Mapping[str, Any] = read_tuned().get(torch.cuda.get_device_name(device), {}).get(table, {})
    return found


@cache
def read_tuned() -> Mapping[str, Mapping[str, Any]]:
    """All that ships in `TUNED`."""
    tables: dict[str, Mapping[str, Any]] = json.loads(TUNED.read_text(encoding="utf-8"))
    return tables
