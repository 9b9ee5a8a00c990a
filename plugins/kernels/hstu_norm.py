"""Layer norm, group norm and what surrounds them in an HSTU model, in one pass over the rows: ``hstu::HstuNorm``.

For row r and column c, all in float32, the statistics over the P = D / G columns of c's group::

    v = x + shift;  n = (v - mean) / sqrt(mean((v - mean)^2) + epsilon) * scale + bias;  g = gate or SiLU(gate)
    y = n, g * n or v * sigmoid(n);  out = y, (g | v | y) or (g | n | y)

as in HstuNorm_PluginConfig.yaml.  Level: kernels, below everything; imports triton only.

Memory: x and gate [R, D], shift, scale and bias float32 [D], out [R, D] or [R, 3 D], contiguous but for the rows of x
and gate, which may be columns of wider tensors: x_stride and gate_stride elements from a row to the next, at least D.
A group of a row is P consecutive numbers, so the kernel sees R * G segments of P numbers.  Offsets are 64-bit: R * D
passes 2^31 at 4.2 M tokens of 512.

Grid: (ceil(R * G / SEGMENTS),).  One program holds SEGMENTS segments of at most BLOCK columns in registers: rows are
read once and written once, and no row meets another, so rows behind a batch's real ones cost time and change nothing.

Numerics: two passes over registers, mean first, then the mean of squared distances: never E[x^2] - E[x]^2, which loses
every digit where the mean is large.  Square root and the reciprocal are rounded correctly.  Each number is rounded to
the output's type once; a SiLU-gated gate is rounded to its own type first, which is where the model stores it.  A
sigmoid is 1 / (1 + exp2(..)): far below zero exp2 overflows to infinity and the quotient is 0.
"""

# Triton types kernel parameters at compile time and ships no type information.
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _times_sigmoid(value, of):
    """Return value * sigmoid(of)."""
    return value / (1.0 + tl.exp2(of * -_LOG2_E))


@triton.jit
def hstu_norm(
    x,
    shift,
    scale,
    bias,
    gate,
    out,
    epsilon,
    num_segments,
    P,
    G,
    x_stride,
    gate_stride,
    has_shift,
    has_bias,
    SEGMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE_SILU: tl.constexpr,
    CONCAT: tl.constexpr,
):
    """Norm SEGMENTS segments; ACTIVATION, GATE_SILU and CONCAT are the contract's attributes."""
    segment = tl.program_id(0) * SEGMENTS + tl.arange(0, SEGMENTS)
    column = tl.arange(0, BLOCK)
    is_column = (column < P)[None, :]  # [1, BLOCK]
    inside = (segment < num_segments)[:, None] & is_column  # [SEGMENTS, BLOCK]
    row = (segment // G).to(tl.int64)[:, None]
    # Column of the whole row, which the parameters are indexed by too.
    parameter = (segment % G)[:, None] * P + column[None, :]

    value = tl.load(x + row * x_stride + parameter, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(shift + parameter, mask=inside & (has_shift != 0), other=0.0)
    mean = tl.sum(value, axis=1) / P
    centred = tl.where(is_column, value - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / P
    rate = tl.div_rn(1.0, tl.sqrt_rn(variance + epsilon))
    normed = centred * rate[:, None] * tl.load(scale + parameter, mask=inside, other=0.0)
    normed += tl.load(bias + parameter, mask=inside & (has_bias != 0), other=0.0)

    if ACTIVATION == 1:
        factor = tl.load(gate + row * gate_stride + parameter, mask=inside, other=0.0).to(tl.float32)
        if GATE_SILU:
            factor = _times_sigmoid(factor, factor).to(gate.dtype.element_ty).to(tl.float32)
        result = factor * normed
    elif ACTIVATION == 2:
        result = _times_sigmoid(value, normed)
    else:
        result = normed

    element = out.dtype.element_ty
    if CONCAT == 0:
        tl.store(out + row * (P * G) + parameter, result.to(element), mask=inside)
    else:
        middle = value if CONCAT == 1 else normed
        # Three parts of D columns a row.
        D = P * G
        place = row * (3 * D) + parameter
        tl.store(out + place, factor.to(element), mask=inside)
        tl.store(out + place + D, middle.to(element), mask=inside)
        tl.store(out + place + 2 * D, result.to(element), mask=inside)
