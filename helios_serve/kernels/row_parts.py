"""A row in registers: how kernels that own one row per program load, norm and store it.

A row is a tuple of parts, each a power of two long, so that a row of 5 * 1024 values takes no more threads and
registers than that. Knows rows and e4m3's scale per row; knows no operator. e4m3 needs compute capability 8.9.
"""

from __future__ import annotations

from helios_serve.kernels.launch import jit, tl


@jit
def load_row(row_ptr, D: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """[D], read once, so that it leaves the first-level cache to the tables; zeros behind its end."""
    parts = ()
    for start in tl.static_range(0, D, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        part = tl.load(row_ptr + columns, mask=columns < D, other=0.0, eviction_policy="evict_first")
        parts += (part.to(WIDE),)
    return parts


@jit
def load_part(table_ptr, start: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Values [start, start + BLOCK) of a row [D] that many programs read."""
    columns = start + tl.arange(0, BLOCK)
    return tl.load(table_ptr + columns, mask=columns < D, other=0.0, eviction_policy="evict_last").to(WIDE)


@jit
def normed_row(parts, D: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr):
    """(x - mean) / sqrt(variance + eps)."""
    sums = parts[0]
    for start in tl.static_range(BLOCK, D, BLOCK):
        sums += parts[start // BLOCK]
    mean = tl.sum(sums, 0) / D
    centred = ()
    squares = tl.full((BLOCK,), 0.0, sums.dtype)
    for start in tl.static_range(0, D, BLOCK):
        part = parts[start // BLOCK] - mean
        if start + BLOCK > D:
            part = tl.where(start + tl.arange(0, BLOCK) < D, part, 0.0)
        squares = tl.fma(part, part, squares)
        centred += (part,)
    factor = 1.0 / tl.sqrt(tl.sum(squares, 0) / D + EPS)
    normed = ()
    for start in tl.static_range(0, D, BLOCK):
        normed += (centred[start // BLOCK] * factor,)
    return normed


@jit
def scaled_row(
    parts,
    scale_ptr,
    shift_ptr,
    IS_MODULATED: tl.constexpr,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Times `scale`, or `1 + scale` of a modulation, plus `shift`."""
    scaled = ()
    for start in tl.static_range(0, D, BLOCK):
        scale = load_part(scale_ptr, start, D, WIDE, BLOCK)
        if IS_MODULATED:
            scale = 1.0 + scale
        scaled += (tl.fma(parts[start // BLOCK], scale, load_part(shift_ptr, start, D, WIDE, BLOCK)),)
    return scaled


@jit
def store_row(parts, out_ptr, D: tl.constexpr, BLOCK: tl.constexpr):
    """[D] in the dtype of `out_ptr`."""
    for start in tl.static_range(0, D, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        tl.store(out_ptr + columns, parts[start // BLOCK].to(out_ptr.dtype.element_ty), mask=columns < D)


@jit
def store_quantized_row(parts, out_ptr, scale_ptr, D: tl.constexpr, BLOCK: tl.constexpr):
    """[D], rounded to e4m3, and its scale: the largest entry becomes 448. No quotient is larger: none is clamped."""
    largest = tl.full((BLOCK,), 0.0, tl.float32)
    for start in tl.static_range(0, D, BLOCK):
        largest = tl.maximum(largest, tl.abs(parts[start // BLOCK].to(tl.float32)))
    scale = tl.max(largest, 0) * (1.0 / 448.0)
    scale = tl.where(scale == 0.0, 1.0, scale)
    tl.store(scale_ptr, scale)
    inverse = tl.div_rn(1.0, tl.maximum(scale, 2.0**-126))
    for start in tl.static_range(0, D, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        quotient = divided(parts[start // BLOCK].to(tl.float32), scale, inverse)
        tl.store(out_ptr + columns, quotient.to(tl.float8e4nv), mask=columns < D)


@jit
def divided(x, divisor, inverse):
    """`x / divisor`, rounded once, by products alone (Markstein 1990); inverse: 1 / divisor, rounded.

    The remainder is negated so that -0 stays -0; a device negates x and the inverse for nothing.
    """
    quotient = x * inverse
    return tl.fma(tl.fma(quotient, divisor, x * -1.0), inverse * -1.0, quotient)
