"""Which backends of attention there are, what each can do, and which one is taken.

Knows devices' compute capabilities, dtypes and shapes; knows nothing of how a backend is called. What is named is what
runs, or an error that says what is missing; only where nothing is named the order of preference decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from helios_serve.errors import HeliosError
from helios_serve.kernels.attention import fp8_attention, library_attention, torch_attention, triton_attention
from helios_serve.kernels.attention.segments import AUTO, Segments
from helios_serve.kernels.launch import HAS_TRITON, tuned

_HALF = (torch.bfloat16, torch.float16)
_NO_BIAS = "takes no bias of keys"


class AttentionBackendError(HeliosError):
    """The backend of attention that was named does not exist here, or cannot compute what was asked for."""

    status, grpc_status, code, retryable = 400, "INVALID_ARGUMENT", "invalid_value", False


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What a choice depends on. capability: of a CUDA device, times 10; 0 elsewhere."""

    device: torch.device
    capability: int
    dtype: torch.dtype
    head_dim: int
    cu_q: tuple[int, ...]
    cu_k: tuple[int, ...]
    has_bias: bool

    @property
    def is_packed(self) -> bool:
        return len(self.cu_q) > 2

    @property
    def min_k(self) -> int:
        return min(stop - start for start, stop in pairwise(self.cu_k))


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """attend: [Nq, H, Dh] and twice [Nk, H, Dh], which end with the last segment -> out [Nq, H, Dh], lse [H, Nq].
    obstacle: why it cannot solve a problem here; None if it can. is_recordable: whether a CUDA graph may hold it; not
    if it prepares a shape in memory that it gives up when it pleases."""

    attend: Callable[[Tensor, Tensor, Tensor, Segments], tuple[Tensor, Tensor]]
    obstacle: Callable[[Problem], str | None]
    is_recordable: bool = True


def _first(*obstacles: str | bool | None) -> str | None:
    return next((obstacle for obstacle in obstacles if isinstance(obstacle, str)), None)


def _needs(problem: Problem, capability: int, dtypes: tuple[torch.dtype, ...], max_head_dim: int) -> str | None:
    """What every CUDA backend asks for: a head size that is a multiple of 8 among others."""
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return _first(
        problem.device.type != "cuda" and "needs a CUDA device",
        problem.capability < capability
        and f"needs compute capability {capability / 10}, not {problem.capability / 10}",
        problem.dtype not in dtypes and f"takes {names}, not {problem.dtype}",
        (problem.head_dim > max_head_dim or problem.head_dim % 8 > 0)
        and f"takes heads of a multiple of 8 up to {max_head_dim}, not {problem.head_dim}",
    )


def _fa3_fp8_obstacle(problem: Problem) -> str | None:
    return _first(
        _fa3_obstacle(problem),
        problem.head_dim % 16 > 0 and f"takes heads of a multiple of 16, not {problem.head_dim}",
    )


def _math_fp8_obstacle(problem: Problem) -> str | None:
    return _first(
        _cpu_obstacle(problem),
        problem.has_bias and _NO_BIAS,
        problem.min_k == 0 and "takes no segment without keys",
    )


def _fa3_obstacle(problem: Problem) -> str | None:
    return _first(
        _needs(problem, 90, (torch.bfloat16,), 256),
        problem.capability >= 100 and "has kernels for sm_90 only",
        problem.has_bias and _NO_BIAS,
        problem.min_k == 0 and "takes no segment without keys",
        library_attention.why_not_importable(library_attention.FA3_MODULE),
    )


def _cudnn_obstacle(problem: Problem) -> str | None:
    return _first(
        _needs(problem, 80, _HALF, 128 if problem.capability < 90 else 256),
        problem.has_bias and _NO_BIAS,
        problem.min_k < 2 and "takes no segment of fewer than two keys",
    )


def _flash_obstacle(problem: Problem) -> str | None:
    return _first(
        _needs(problem, 80, _HALF, 256),
        problem.has_bias and _NO_BIAS,
        problem.min_k == 0 and "takes no segment without keys",
    )


def _efficient_obstacle(problem: Problem) -> str | None:
    return _first(
        _needs(problem, 50, (*_HALF, torch.float32), 1 << 16),
        problem.min_k == 0 and "takes no segment without keys",
    )


def _triton_obstacle(problem: Problem) -> str | None:
    return _first(
        not HAS_TRITON and "needs the package triton",
        problem.device.type != "cuda" and "needs a CUDA device",
        problem.capability < 80 and f"needs compute capability 8.0, not {problem.capability / 10}",
        problem.dtype not in (*_HALF, torch.float32) and f"takes no {problem.dtype}",
        problem.head_dim > triton_attention.MAX_HEAD_DIM
        and f"takes heads of up to {triton_attention.MAX_HEAD_DIM}, not {problem.head_dim}",
    )


def _flashinfer_obstacle(problem: Problem) -> str | None:
    return _first(
        _needs(problem, 80, _HALF, 256),
        problem.head_dim not in (64, 128, 256) and f"takes heads of 64, 128 and 256, not {problem.head_dim}",
        problem.has_bias and _NO_BIAS,
        problem.min_k == 0 and "takes no segment without keys",
        library_attention.why_not_importable(library_attention.FLASHINFER_MODULE),
    )


def _xformers_obstacle(problem: Problem) -> str | None:
    return _first(
        _needs(problem, 80, _HALF, 256),
        problem.has_bias and _NO_BIAS,
        problem.min_k == 0 and "takes no segment without keys",
        library_attention.why_not_importable(library_attention.XFORMERS_MODULE),
    )


def _cpu_obstacle(problem: Problem) -> str | None:
    return _first(problem.device.type != "cpu" and "needs tensors in host memory")


BACKENDS: Mapping[str, Backend] = {
    "fa3": Backend(attend=library_attention.attend_fa3, obstacle=_fa3_obstacle),
    "cudnn": Backend(attend=torch_attention.attend_cudnn, obstacle=_cudnn_obstacle),
    "flash": Backend(attend=torch_attention.attend_flash, obstacle=_flash_obstacle),
    "efficient": Backend(attend=torch_attention.attend_efficient, obstacle=_efficient_obstacle),
    "triton": Backend(attend=triton_attention.attend_triton, obstacle=_triton_obstacle),
    "flashinfer": Backend(
        attend=library_attention.attend_flashinfer, obstacle=_flashinfer_obstacle, is_recordable=False
    ),
    "xformers": Backend(attend=library_attention.attend_xformers, obstacle=_xformers_obstacle, is_recordable=False),
    "cpu": Backend(attend=torch_attention.attend_cpu, obstacle=_cpu_obstacle),
    "math": Backend(attend=torch_attention.attend_math, obstacle=lambda _: None),
}
NAMES = (AUTO, *BACKENDS)
"""What may be named where nothing is to be approximated."""
FP8_BACKENDS: Mapping[str, Backend] = {
    "fa3_fp8": Backend(attend=fp8_attention.attend_fa3_fp8, obstacle=_fa3_fp8_obstacle),
    "math_fp8": Backend(attend=fp8_attention.attend_math_fp8, obstacle=_math_fp8_obstacle),
}
"""In e4m3; nothing chooses them. `math_fp8` is there to see on a CPU what FP8 does to a result."""
_LAST = ("triton", "efficient", "math")
PREFERENCE: Mapping[int, tuple[str, ...]] = {
    0: ("cpu", "math"),
    80: ("flash", "cudnn", *_LAST),
    90: ("fa3", "cudnn", "flash", *_LAST),
    100: ("cudnn", "flash", *_LAST),
}
"""By compute capability, from which on it holds. FlashInfer and xFormers run where they are named."""
WIDE_PREFERENCE = ("efficient", "triton", "math")
"""For float32 on CUDA devices."""


def backend_named(name: str) -> Backend:
    """A backend in any precision."""
    return FP8_BACKENDS[name] if name in FP8_BACKENDS else BACKENDS[name]


def fp8_backend(device: torch.device) -> str:
    """The name of the one for a device."""
    return "fa3_fp8" if device.type == "cuda" else "math_fp8"


def check_backend(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """For a start, so that no request finds out.

    Raises: AttentionBackendError, if there is no such backend, or it cannot do usual lengths of such heads.
    """
    bounds = (0, 64)
    segments = Segments(cu_q=bounds, cu_k=bounds, scale=1.0, backend=name)
    backend_for(torch.empty((64, 1, head_dim), dtype=dtype, device=device), segments)


def backend_for(q: Tensor, segments: Segments) -> str:
    """The name of the backend that `attend` runs for queries like `q` [Nq, H, Dh].

    Raises: AttentionBackendError, if `segments` names one that does not exist or cannot do it.
    """
    return choose(_problem(q, segments), segments.backend)


def obstacles(q: Tensor, segments: Segments) -> dict[str, str | None]:
    """For each backend why it cannot do what `backend_for` is asked for; None for those that can."""
    problem = _problem(q, segments)
    return {name: backend.obstacle(problem) for name, backend in BACKENDS.items()}


def _problem(q: Tensor, segments: Segments) -> Problem:
    return Problem(
        device=q.device,
        capability=_capability(q.device),
        dtype=q.dtype,
        head_dim=q.shape[2],
        cu_q=segments.cu_q,
        cu_k=segments.cu_k,
        has_bias=segments.key_bias is not None,
    )


@lru_cache(maxsize=1024)
def choose(problem: Problem, name: str) -> str:
    """`name` itself, or for `AUTO` the first that can do it: as measured on devices of that name (table `attention`,
    by `dense` or `packed`), then by `PREFERENCE`.

    Raises: AttentionBackendError.
    """
    if name not in NAMES and name not in FP8_BACKENDS:
        raise AttentionBackendError(f"attention {name!r}: must be one of {', '.join(NAMES)}", param="attention")
    if name != AUTO:
        obstacle = backend_named(name).obstacle(problem)
        if obstacle is not None:
            param = "attention_precision" if name in FP8_BACKENDS else "attention"
            raise AttentionBackendError(f"attention {name!r} {obstacle}", param=param)
        return name
    return next(name for name in (*_order(problem), "math") if not BACKENDS[name].obstacle(problem))


def _order(problem: Problem) -> tuple[str, ...]:
    if problem.capability > 0 and problem.dtype not in _HALF:
        return WIDE_PREFERENCE
    generation = max(known for known in PREFERENCE if known <= problem.capability)
    measured = tuned("attention", problem.device).get("packed" if problem.is_packed else "dense", ())
    return (*measured, *PREFERENCE[generation])


@lru_cache(maxsize=64)
def _capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
