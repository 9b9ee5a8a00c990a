"""Attention as a kernel with e4m3 operands would compute it, simulated on a CPU: its roundings and its scales.

A form says in which type each operand of both products is: q and k of the scores, the weights p = SiLU(s) and v of the
sums. The rest is as in the kernel: float32 scores and sums, the divisor at the end, the output in half precision. What
is not simulated is the error of the GPU's tanh, which silu.cuh bounds by less than float16's rounding.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

Number = Literal["float16", "bfloat16", "e4m3"]
#: How the scale of an e4m3 tensor is found: from its largest magnitude, by the least squared error, or not at all.
Rule = Literal["amax", "searched", "one"]

LARGEST_E4M3 = 448.0
#: Factors of the scale that maps the largest magnitude to 448: below one, the largest values are clipped.
_SEARCHED = tuple(2.0 ** (step / 4) for step in range(-16, 5))
_HALF_TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
#: Keys of one e4m3 product instruction: its sums are added to the accumulator at once.
_KEYS_OF_A_PRODUCT = 32


@dataclasses.dataclass(frozen=True)
class Form:
    """One way to compute attention.

    Attributes:
        name: in the CSV.
        q: type of the queries; k, p and v likewise of keys, weights and values.
        out: type of the output.
        rule: of the scales of q, k and v.
        weight_rule: of the scale of p.
        sum_bits: bits behind the leading one with which a product instruction adds; None adds exactly.
    """

    name: str
    q: Number
    k: Number
    p: Number
    v: Number
    out: Literal["float16", "bfloat16"] = "float16"
    rule: Rule = "searched"
    weight_rule: Rule = "searched"
    sum_bits: int | None = None


FORMS = (
    Form("float16", "float16", "float16", "float16", "float16"),
    Form("bfloat16", "bfloat16", "bfloat16", "bfloat16", "bfloat16", out="bfloat16"),
    Form("q k e4m3", "e4m3", "e4m3", "float16", "float16"),
    Form("k v e4m3", "float16", "e4m3", "float16", "e4m3"),
    Form("all e4m3, amax", "e4m3", "e4m3", "e4m3", "e4m3", rule="amax", weight_rule="amax"),
    Form("all e4m3", "e4m3", "e4m3", "e4m3", "e4m3"),
    Form("all e4m3, weights as they are", "e4m3", "e4m3", "e4m3", "e4m3", weight_rule="one"),
    # Hopper's e4m3 products are reported to keep about 14 bits of a sum (DeepSeek-V3, arXiv 2412.19437, section 3.3.2).
    Form("all e4m3, sums of 14 bits", "e4m3", "e4m3", "e4m3", "e4m3", sum_bits=13),
)


def to_e4m3(x: Tensor, scale: float) -> Tensor:
    """The nearest numbers of the grid, ties to even, saturated; in x's type."""
    # Clamped: torch turns what is too large into NaN.
    steps = (x.float() / scale).clamp(-LARGEST_E4M3, LARGEST_E4M3)
    return steps.to(torch.float8_e4m3fn).to(x.dtype) * scale


def rounded(x: Tensor, number: Number, scale: float) -> Tensor:
    """Round x to a type, and give it back in its own; half types need no scale."""
    return to_e4m3(x, scale) if number == "e4m3" else x.to(_HALF_TYPES[number]).to(x.dtype)


def scale_of(x: Tensor, rule: Rule, amax: float | None = None) -> float:
    """The scale of a tensor.

    Args:
        x: values that the search takes.
        rule: how.
        amax: largest magnitude; None is that of x.
    """
    largest = float(x.abs().max()) if amax is None else amax
    if rule == "one" or largest == 0.0:
        return 1.0
    whole = largest / LARGEST_E4M3
    if rule == "amax":
        return whole
    return min(
        (whole * factor for factor in _SEARCHED), key=lambda scale: float((to_e4m3(x, scale) - x).square().sum())
    )


def product(a: Tensor, b: Tensor, sum_bits: int | None) -> Tensor:
    """Multiply a [M, K] and b [K, N]; with `sum_bits` as an instruction of 32 columns adds.

    Such an instruction brings the accumulator and its products to the largest exponent among them, cuts what is below
    that many bits behind the leading one, and adds.
    """
    if sum_bits is None:
        return a @ b
    total = a.new_zeros((a.shape[0], b.shape[1]))
    for first in range(0, a.shape[1], _KEYS_OF_A_PRODUCT):
        part = slice(first, first + _KEYS_OF_A_PRODUCT)
        terms = torch.cat([total[None], a[:, part].T[:, :, None] * b[part, None, :]])
        exponent = torch.frexp(terms.abs().amax(dim=0)).exponent - 1
        unit = torch.ldexp(torch.ones_like(total), exponent - sum_bits)
        total = (terms / unit).trunc().sum(dim=0) * unit
    return total


def attention(q: Tensor, k: Tensor, v: Tensor, form: Form, alpha: float, positions: Tensor) -> Tensor:
    """One head's attention of some queries in a form, with scales from the tensors themselves.

    Args:
        q: [R, D] float64.
        k: [N, D]; v likewise.
        form: how.
        alpha: multiplier of the scores; the divisor is N.
        positions: [R] int64 -- a query sees the keys up to its own.

    Returns:
        [R, D] float64.
    """
    operands = [rounded(x, number, scale_of(x, form.rule)) for x, number in ((q, form.q), (k, form.k), (v, form.v))]
    scores = product(operands[0], operands[1].T, form.sum_bits) * alpha
    is_seen = torch.arange(len(k))[None, :] <= positions[:, None]
    weights = torch.where(is_seen, torch.nn.functional.silu(scores), 0.0)
    weights = rounded(weights, form.p, scale_of(weights, form.weight_rule))
    sums = product(weights, operands[2], form.sum_bits) / len(k)
    return sums.to(_HALF_TYPES[form.out]).double()


def exact_attention(q: Tensor, k: Tensor, v: Tensor, alpha: float, positions: Tensor) -> Tensor:
    """`attention` in float64, without a rounding."""
    is_seen = torch.arange(len(k))[None, :] <= positions[:, None]
    return torch.where(is_seen, torch.nn.functional.silu(q @ k.T * alpha), 0.0) @ v / len(k)
