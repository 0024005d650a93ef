"""Compiles every Triton kernel ahead of time and reads from the code what it takes: no GPU is needed.

    python -m helios_serve.kernels.aot [--json FILE]

Knows the kernels' specialisations at the 14B model's shapes and NVIDIA's object format; measures no time.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from helios_serve.kernels import adaln_norm, cross_attention, vae_epilogue, vae_norm_silu, yuv
from helios_serve.kernels.attention.quantize_heads import specialisations as head_quantising_specialisations
from helios_serve.kernels.attention.triton_attention import specialisations as attending_specialisations
from helios_serve.kernels.launch import RowPlan, Specialisation, read_tuned, row_key
from helios_serve.kernels.merge_attention import specialisations as merging_specialisations
from helios_serve.kernels.qk_norm_rope import specialisations as qk_specialisations
from helios_serve.kernels.quantize_rows import specialisations as quantising_specialisations

CAPABILITIES = (80, 90, 100)
WIDTH, FFN_WIDTH, HEAD_DIM = 5120, 13824, 128
VAE_WIDTHS = (96, 192, 384)
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")
_WIDE_LOAD = re.compile(r"\bld\.global[\w.:]*\.v(?:4\.\w32|8\.\w32|2\.\w64)\b")
_MATRIX = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What one kernel takes on one generation of devices.

    registers: of a thread. stack_bytes: spilled, of a thread. shared_bytes: of a program. wide_loads, matrix_products:
    instructions in PTX, of 16 bytes or more and of the matrix units; `ptxas` splits none.
    """

    kernel: str
    capability: int
    num_warps: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    wide_loads: int
    matrix_products: int


def all_specialisations() -> list[Specialisation]:
    """As launched where nothing was tuned, then as tuned."""
    plain = (
        *adaln_norm.specialisations(WIDTH),
        *qk_specialisations(WIDTH, HEAD_DIM),
        *quantising_specialisations(WIDTH, FFN_WIDTH),
        *head_quantising_specialisations(WIDTH // HEAD_DIM, HEAD_DIM),
        *vae_norm_silu.specialisations(VAE_WIDTHS),
        *vae_epilogue.specialisations(VAE_WIDTHS),
        *yuv.specialisations(),
    )
    of_attention = (
        *attending_specialisations(HEAD_DIM),
        *merging_specialisations(HEAD_DIM),
        *cross_attention.specialisations(WIDTH // HEAD_DIM, HEAD_DIM),
    )
    return [*plain, *(tuned for one in plain for tuned in _tuned(one)), *of_attention]


def _tuned(one: Specialisation) -> list[Specialisation]:
    """With each plan of a row that was measured to be better than the default."""
    if "D" not in one.constants:
        return []
    key = row_key(one.kernel, one.constants["D"])
    found = {RowPlan(**tables["rows"][key]) for tables in read_tuned().values() if key in tables.get("rows", {})}
    default = RowPlan(block=one.constants["BLOCK"], num_warps=one.num_warps)
    return [
        replace(
            one,
            name=f"{one.name}_{plan.block}x{plan.num_warps}w",
            constants={**one.constants, "BLOCK": plan.block},
            num_warps=plan.num_warps,
        )
        for plan in sorted(found - {default}, key=lambda plan: (plan.block, plan.num_warps))
    ]


def compile_one(one: Specialisation, capability: int) -> Usage:
    """Compiles for sm_`capability` and looks at what came of it."""
    names = one.kernel.arg_names
    assert {*names} == {*one.types, *one.constants}, (one.name, {*names} ^ {*one.types, *one.constants})
    types = {name: one.types.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in one.constants.items()}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in one.types}
    compiled = triton.compile(
        ASTSource(one.kernel, types, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": one.num_warps, "num_stages": one.num_stages, "enable_fp_fusion": one.is_contracted},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        told = subprocess.run([_CUOBJDUMP, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    usage, code = _USAGE.search(told), compiled.asm["ptx"]
    assert usage is not None
    return Usage(
        kernel=one.name,
        capability=capability,
        num_warps=one.num_warps,
        registers=int(usage[1]),
        stack_bytes=int(usage[2]),
        shared_bytes=compiled.metadata.shared,
        wide_loads=len(_WIDE_LOAD.findall(code)),
        matrix_products=len(_MATRIX.findall(code)),
    )


def main(arguments: Sequence[str]) -> None:
    usages = [
        compile_one(one, capability)
        for one in all_specialisations()
        for capability in CAPABILITIES
        if one.min_capability <= capability <= one.max_capability
    ]
    text = json.dumps({"triton": triton.__version__, "kernels": [asdict(usage) for usage in usages]}, indent=1)
    if arguments[:1] == ["--json"]:
        Path(arguments[1]).write_text(text + "\n", encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
