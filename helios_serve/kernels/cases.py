"""All operators that have a kernel of their own, as one list; those of attention have lists beside it."""

from helios_serve.kernels import cases_transformer, cases_vae
from helios_serve.kernels.op_case import OpCase

CASES: tuple[OpCase, ...] = (*cases_transformer.CASES, *cases_vae.CASES)
