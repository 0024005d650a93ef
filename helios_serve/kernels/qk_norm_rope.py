"""RMSNorm over all heads, rotation of neighbouring channel pairs and the amplified history's key scale, in place on the
output of the fused projection; and the same norm without rotation.

One program per token and tensor: q and k rows are read once and written once, v is not touched. The norm is rounded to
the tensor's dtype before the rotation, as in the reference, and the rotation multiplies and adds apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from helios_serve.kernels import reference
from helios_serve.kernels.launch import Specialisation, accumulator, default_plan, jit, operator, row_plan, tl
from helios_serve.kernels.row_parts import load_part, load_row

_EXACT = {"enable_fp_fusion": False}


@jit
def _norm_rope_kernel(
    x_ptr,
    q_weight_ptr,
    k_weight_ptr,
    rotary_ptr,
    scale_ptr,
    row_ptr,
    out_ptr,
    token_stride,
    tensor_stride,
    out_token_stride,
    scale_stride,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    EPS: tl.constexpr,
    IS_ROTATED: tl.constexpr,
    KEYS: tl.constexpr,
    IS_SCALED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """KEYS: which tensor of the two is the keys, the only one that the history scale changes."""
    token = tl.program_id(0).to(tl.int64)
    tensor = tl.program_id(1)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    weight_ptr = q_weight_ptr if tensor == 0 else k_weight_ptr
    parts = load_row(x_ptr + token * token_stride + tensor * tensor_stride, D, WIDE, BLOCK)
    squares = parts[0] * parts[0]
    for start in tl.static_range(BLOCK, D, BLOCK):
        squares += parts[start // BLOCK] * parts[start // BLOCK]
    factor = 1.0 / tl.sqrt(tl.sum(squares, 0) / D + EPS)
    out_ptr += token * out_token_stride + tensor * tensor_stride
    is_scaled = tensor == KEYS and tl.load(row_ptr + token) == 0 if IS_SCALED else False
    for start in tl.static_range(0, D, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        out = (parts[start // BLOCK] * factor * load_part(weight_ptr, start, D, WIDE, BLOCK)).to(dtype)
        if IS_ROTATED:
            pair = start // 2 + tl.arange(0, BLOCK // 2)
            angle_ptr = rotary_ptr + token * HEAD + pair % (HEAD // 2)
            cos = tl.load(angle_ptr, mask=pair < D // 2, other=0.0).to(WIDE)
            sin = tl.load(angle_ptr + HEAD // 2, mask=pair < D // 2, other=0.0).to(WIDE)
            even, odd = tl.split(tl.reshape(out.to(WIDE), (BLOCK // 2, 2)))
            turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
            out = tl.reshape(turned, (BLOCK,)).to(dtype)
        if IS_SCALED and is_scaled:
            scale = tl.load(scale_ptr + columns // HEAD * scale_stride, mask=columns < D, other=0.0).to(WIDE)
            out = (out.to(WIDE) * scale).to(dtype)
        tl.store(out_ptr + columns, out, mask=columns < D)


def launch_qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rotary: Tensor,
    eps: float,
    history_scale: Tensor | None,
    row: Tensor | None,
) -> None:
    """`reference.qk_norm_rope` by Triton, into `qkv` itself."""
    num_tokens, _, num_heads, head_dim = qkv.shape
    _check(qkv, rotary, head_dim)
    width = num_heads * head_dim
    plan = row_plan(_norm_rope_kernel, width, qkv.device)
    _norm_rope_kernel[(num_tokens, 2)](
        qkv,
        q_weight,
        k_weight,
        rotary,
        history_scale,
        row,
        qkv,
        qkv.stride(0),
        qkv.stride(1),
        qkv.stride(0),
        _scale_stride(history_scale),
        D=width,
        HEAD=head_dim,
        EPS=eps,
        IS_ROTATED=True,
        KEYS=1,
        IS_SCALED=history_scale is not None,
        WIDE=accumulator(qkv),
        BLOCK=plan.block,
        num_warps=plan.num_warps,
        **_EXACT,
    )


def launch_norm_rope(
    x: Tensor,
    weight: Tensor,
    rotary: Tensor,
    eps: float,
    history_scale: Tensor | None = None,
    row: Tensor | None = None,
) -> Tensor:
    """`reference.norm_rope` by Triton; the heads of a token lie back to back, tokens may be apart."""
    num_tokens, num_heads, head_dim = x.shape
    _check(x, rotary, head_dim)
    out, width = torch.empty(x.shape, dtype=x.dtype, device=x.device), num_heads * head_dim
    plan = row_plan(_norm_rope_kernel, width, x.device)
    _norm_rope_kernel[(num_tokens, 1)](
        x,
        weight,
        weight,
        rotary,
        history_scale,
        row,
        out,
        x.stride(0),
        0,
        out.stride(0),
        _scale_stride(history_scale),
        D=width,
        HEAD=head_dim,
        EPS=eps,
        IS_ROTATED=True,
        KEYS=0,
        IS_SCALED=history_scale is not None,
        WIDE=accumulator(x),
        BLOCK=plan.block,
        num_warps=plan.num_warps,
        **_EXACT,
    )
    return out


def launch_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm` by Triton; rows may be apart."""
    num_tokens, width = x.shape
    assert x.stride(1) == 1
    out, plan = torch.empty(x.shape, dtype=x.dtype, device=x.device), row_plan(_norm_rope_kernel, width, x.device)
    _norm_rope_kernel[(num_tokens, 1)](
        x,
        weight,
        weight,
        None,
        None,
        None,
        out,
        x.stride(0),
        0,
        out.stride(0),
        0,
        D=width,
        HEAD=width,
        EPS=eps,
        IS_ROTATED=False,
        KEYS=0,
        IS_SCALED=False,
        WIDE=accumulator(x),
        BLOCK=plan.block,
        num_warps=plan.num_warps,
        **_EXACT,
    )
    return out


def _check(x: Tensor, rotary: Tensor, head_dim: int) -> None:
    assert x.stride(-1) == 1
    assert x.stride(-2) == head_dim
    assert rotary.is_contiguous()


def _scale_stride(history_scale: Tensor | None) -> int:
    """0 where one scale serves all heads."""
    return 0 if history_scale is None or len(history_scale) == 1 else 1


def reference_qk_norm_rope_(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rotary: Tensor,
    eps: float,
    history_scale: Tensor | None,
    row: Tensor | None,
) -> None:
    """`reference.qk_norm_rope` into `qkv` itself."""
    q, k, _ = reference.qk_norm_rope(qkv, q_weight, k_weight, rotary, eps, history_scale, row)
    qkv[:, 0], qkv[:, 1] = q, k


qk_norm_rope_ = operator(
    "qk_norm_rope_(Tensor(a!) qkv, Tensor q_weight, Tensor k_weight, Tensor rotary, float eps, "
    "Tensor? history_scale, Tensor? row) -> ()",
    reference=reference_qk_norm_rope_,
    kernel=launch_qk_norm_rope,
    shapes=lambda *_: None,
)


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rotary: Tensor,
    eps: float,
    history_scale: Tensor | None = None,
    row: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.qk_norm_rope`, but `qkv` [N, 3, H, Dh] is changed, and the results are views of it."""
    qk_norm_rope_(qkv, q_weight, k_weight, rotary, eps, history_scale, row)
    q, k, v = qkv.unbind(1)
    return q, k, v


norm_rope = operator(
    "norm_rope(Tensor x, Tensor weight, Tensor rotary, float eps, Tensor? history_scale=None, Tensor? row=None) "
    "-> Tensor",
    reference=reference.norm_rope,
    kernel=launch_norm_rope,
    shapes=lambda x, *_: torch.empty(x.shape, dtype=x.dtype, device=x.device),
)
rms_norm = operator(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    reference=reference.rms_norm,
    kernel=launch_rms_norm,
    shapes=lambda x, *_: torch.empty(x.shape, dtype=x.dtype, device=x.device),
)


def specialisations(width: int, head_dim: int) -> tuple[Specialisation, ...]:
    """What a transformer of that width launches in bfloat16."""
    plan = default_plan(width)
    always = {"D": width, "EPS": 1e-6, "WIDE": tl.float32, "BLOCK": plan.block}
    tensors = dict.fromkeys(("x_ptr", "q_weight_ptr", "k_weight_ptr", "out_ptr"), "*bf16")
    strides = dict.fromkeys(("token_stride", "tensor_stride", "out_token_stride"), "i32")
    plain = {"scale_ptr": None, "row_ptr": None, "scale_stride": 0, "IS_SCALED": False}
    rotated = {**tensors, **strides, "rotary_ptr": "*fp32"}
    scaled = {**rotated, "scale_ptr": "*fp32", "row_ptr": "*i32"}
    made = (
        ("qk_norm_rope", rotated, {**plain, "HEAD": head_dim, "IS_ROTATED": True, "KEYS": 1}),
        (
            "qk_norm_rope_scaled",
            scaled,
            {"HEAD": head_dim, "IS_ROTATED": True, "KEYS": 1, "IS_SCALED": True, "scale_stride": 1},
        ),
        (
            "rms_norm",
            {**tensors, **strides},
            {**plain, "HEAD": width, "IS_ROTATED": False, "KEYS": 0, "rotary_ptr": None},
        ),
    )
    return tuple(
        Specialisation(
            name=name,
            kernel=_norm_rope_kernel,
            types=types,
            constants={**always, **constants},
            num_warps=plan.num_warps,
            is_contracted=False,
        )
        for name, types, constants in made
    )
