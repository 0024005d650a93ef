"""How the operators of this package come to be: each is one name in PyTorch's dispatcher, with its plain reference
behind it on every device and a Triton kernel in front of it on CUDA devices.

Knows the dispatcher, whether Triton is there and what was tuned for a device; knows no operator. A trace sees one
operator per fused kernel.
"""

from __future__ import annotations

import importlib.util
import inspect
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
"""What was measured: for each name of a device its tables, such as `rows` by kernel and width. What it lacks is chosen
by a plain function of the shape."""
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
    _check_defaults(schema, kernel)
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, shapes, "Meta")
    if HAS_TRITON:
        _LIBRARY.impl(name, kernel, "CUDA")
    overload: Callable[..., Any] = getattr(torch.ops.helios, name).default
    return overload


def _check_defaults(schema: str, kernel: Callable[..., Any]) -> None:
    """The dispatcher leaves out arguments that have their default values."""
    parameters = inspect.signature(kernel).parameters.values()
    arguments = torch._C.parse_schema(f"helios::{schema}").arguments
    for argument, parameter in zip(arguments, parameters, strict=False):
        is_left_out = argument.has_default_value() and parameter.default is inspect.Parameter.empty
        assert not is_left_out, f"{schema}: {parameter.name} of {kernel.__name__} needs a default"


@dataclass(frozen=True, slots=True, kw_only=True)
class Specialisation:
    """A kernel as a server would launch it, to be compiled ahead of time.

    name: unique among all. types: Triton's type of each argument that varies, such as "*bf16", "*fp32" or "i32"; all
    are taken as divisible by 16. constants: the other arguments. num_stages: blocks in flight in a loop.
    min_capability, max_capability: of the devices that it is launched on, times 10.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int = 3
    is_contracted: bool = True
    min_capability: int = 80
    max_capability: int = 100


def accumulator(x: Tensor) -> Any:
    """Triton's type for sums over `x`."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def block_of(width: int) -> int:
    """The power of two that covers a row."""
    return 1 << (width - 1).bit_length()


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPlan:
    """How one program covers a row: in parts of `block` values, a power of two, with so many warps."""

    block: int
    num_warps: int


def default_plan(width: int) -> RowPlan:
    """Parts so short that less than an eighth of the threads idle; 8 values for a thread, 16 bytes of bfloat16."""
    block = max(16, block_of(width) // 8)
    return RowPlan(block=block, num_warps=min(16, max(1, block // 256)))


def candidate_plans(width: int) -> tuple[RowPlan, ...]:
    """What is worth measuring: parts of half, the same and twice the default length. A thread has 4 to 16 values of a
    part, 8 to 32 bytes of bfloat16, and at most 112 of a row, as many as fit into registers."""
    part = default_plan(width).block
    plans = (RowPlan(block=block, num_warps=warps) for block in (part, part // 2, 2 * part) for warps in (4, 8, 2, 16))
    return tuple(
        plan for plan in plans if 128 <= plan.block // plan.num_warps <= 512 and width <= 112 * 32 * plan.num_warps
    )


def row_plan(kernel: Any, width: int, device: torch.device) -> RowPlan:
    """As measured on devices of that name, else the default."""
    found = tuned("rows", device).get(row_key(kernel, width))
    return default_plan(width) if found is None else RowPlan(**found)


def row_key(kernel: Any, width: int) -> str:
    """In the table `rows`."""
    return f"{kernel.__name__.strip('_')}/{width}"


@cache
def tuned(table: str, device: torch.device) -> dict[str, Any]:
    """What was measured on devices of that name, empty if nothing was; the dictionary itself, in which a tuner tries
    its candidates."""
    if device.type != "cuda":
        return {}
    found: dict[str, Any] = read_tuned().setdefault(torch.cuda.get_device_name(device), {}).setdefault(table, {})
    return found


@cache
def read_tuned() -> dict[str, dict[str, Any]]:
    """All that ships in `TUNED`."""
    tables: dict[str, dict[str, Any]] = json.loads(TUNED.read_text(encoding="utf-8"))
    return tables
