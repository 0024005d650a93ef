"""Compiles every Triton kernel ahead of time and reads from the machine code what it takes: no GPU is needed.

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
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from helios_serve.kernels import adaln_norm
from helios_serve.kernels.launch import Specialisation
from helios_serve.kernels.qk_norm_rope import specialisations as qk_specialisations

CAPABILITIES = (80, 90, 100)
WIDTH, HEAD_DIM = 5120, 128
_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")
_WIDE_LOAD = re.compile(r"\bLDG\.E\.(?:\w+\.)*128")
_MATRIX = re.compile(r"\b(?:HMMA|HGMMA|UTC\w*MMA|QGMMA)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What one kernel takes on one generation of devices.

    registers: of a thread. stack_bytes: spilled, of a thread. shared_bytes: of a program. wide_loads, matrix_products:
    instructions in the code.
    """

    kernel: str
    capability: int
    num_warps: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    wide_loads: int
    matrix_products: int


def all_specialisations() -> tuple[Specialisation, ...]:
    return (*adaln_norm.specialisations(WIDTH), *qk_specialisations(WIDTH, HEAD_DIM))


def compile_one(one: Specialisation, capability: int) -> Usage:
    """Compiles for sm_`capability` and takes the machine code apart."""
    names = one.kernel.arg_names
    assert {*names} == {*one.types, *one.constants}, (one.name, {*names} ^ {*one.types, *one.constants})
    types = {name: one.types.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in one.constants.items()}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in one.types}
    compiled = triton.compile(
        ASTSource(one.kernel, types, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": one.num_warps, "enable_fp_fusion": one.is_contracted},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _USAGE.search(_output("cuobjdump", "-res-usage", file.name))
        code = _output("nvdisasm", "-c", file.name)
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


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([_BIN / tool, *arguments], check=True, capture_output=True, text=True).stdout


def main(arguments: Sequence[str]) -> None:
    usages = [compile_one(one, capability) for one in all_specialisations() for capability in CAPABILITIES]
    text = json.dumps({"triton": triton.__version__, "kernels": [asdict(usage) for usage in usages]}, indent=1)
    if arguments[:1] == ["--json"]:
        Path(arguments[1]).write_text(text + "\n", encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
