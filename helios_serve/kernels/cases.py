"""All operators that have a kernel of their own, as one list."""

from helios_serve.kernels import cases_transformer
from helios_serve.kernels.op_case import OpCase

CASES: tuple[OpCase, ...] = cases_transformer.CASES
