"""hstu::HstuNorm in float64, the cases that its implementations are held to, and the error that they may have."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from hstu_compile.plugins.kernels.norm_variants import NormVariant, norm_variant
from hstu_compile.plugins.kernels.variants import DTYPE_CODES
from tests import tolerances
from tests.attention_cases import round_to_dtype
from tests.oracle import Array


@dataclasses.dataclass(frozen=True)
class NormCase:
    """One call: arrays as float32 that are exact in their types, and the contract's attributes.

    Attributes:
        name: unique with the types.
        x: [R, D].
        scale: [D].
        shift: [D] or None.
        bias: [D] or None.
        gate: [R, D], with activation 1.
    """

    name: str
    input_type: str
    output_type: str
    x: Array
    scale: Array
    shift: Array | None = None
    bias: Array | None = None
    gate: Array | None = None
    epsilon: float = 1e-5
    num_groups: int = 1
    activation: int = 0
    gate_silu: int = 0
    concat: int = 0

    def attributes(self) -> dict[str, float | int]:
        """Attributes of the node in the contract's order."""
        return {
            "epsilon": self.epsilon,
            "num_groups": self.num_groups,
            "activation": self.activation,
            "gate_silu": self.gate_silu,
            "concat": self.concat,
            "input_type": DTYPE_CODES[self.input_type],
            "output_type": DTYPE_CODES[self.output_type],
            "has_shift": int(self.shift is not None),
            "has_bias": int(self.bias is not None),
        }

    def inputs(self) -> dict[str, tuple[str, Array]]:
        """Type and values of each present input, in the contract's order."""
        given = {
            "x": (self.input_type, self.x),
            "shift": ("float32", self.shift),
            "scale": ("float32", self.scale),
            "bias": ("float32", self.bias),
            "gate": (self.input_type, self.gate),
        }
        return {name: (kind, values) for name, (kind, values) in given.items() if values is not None}

    @property
    def variant(self) -> NormVariant:
        """The kernel that runs it."""
        return norm_variant(
            self.input_type,
            self.output_type,
            self.x.shape[1],
            num_groups=self.num_groups,
            activation=self.activation,
            gate_silu=self.gate_silu == 1,
            concat=self.concat,
        )

    @property
    def rounding_type(self) -> str:
        """The type whose rounding decides the error: out's, or that of a gate that is stored before it is used."""
        kinds = [self.output_type, *([self.input_type] if self.gate_silu else [])]
        return max(kinds, key=tolerances.UNIT_ROUNDOFF.__getitem__)


@dataclasses.dataclass(frozen=True)
class NormResult:
    """The oracle's answer: out, and the divisor by which an element's error is measured, both like out."""

    out: Array
    divisor: Array


def _sigmoid(x: Array) -> Array:
    with np.errstate(over="ignore"):
        return 1.0 / (1.0 + np.exp(-x))


def norm_oracle(case: NormCase) -> NormResult:
    """The contract's formula in float64, one group after the other.

    The divisor is |out| plus what float32 arithmetic before the last rounding may add, in units of that rounding: an
    error of v of |v| + mean |v| times the rate at which the norm amplifies it, and those of products and sigmoids.
    """
    rows, width = case.x.shape
    v = case.x.astype(np.float64) + (0.0 if case.shift is None else case.shift.astype(np.float64))
    normed, spread = np.empty_like(v), np.empty_like(v)
    segment = width // case.num_groups
    for first in range(0, width, segment):
        part = v[:, first : first + segment]
        mean = part.mean(axis=1, keepdims=True) if segment else part
        rate = 1.0 / np.sqrt(((part - mean) ** 2).mean(axis=1, keepdims=True) + case.epsilon)
        unit = (part - mean) * rate
        size = np.abs(part) + np.abs(part).mean(axis=1, keepdims=True)
        factor, offset = case.scale[first : first + segment], 0.0
        if case.bias is not None:
            offset = case.bias[first : first + segment].astype(np.float64)
        normed[:, first : first + segment] = unit * factor + offset
        amplified = np.abs(factor) * rate * size * (1.0 + np.abs(unit))
        spread[:, first : first + segment] = amplified + np.abs(unit * factor) + np.abs(offset)
    if case.activation == 0:
        out, slack = normed, spread
    elif case.activation == 2:
        gate = _sigmoid(normed)
        out = v * gate
        slack = np.abs(v) * gate * ((1.0 - gate) * spread + 1.0 + np.abs(normed))
    else:
        assert case.gate is not None
        raw = case.gate.astype(np.float64)
        gate = raw * _sigmoid(raw) if case.gate_silu else raw
        own = np.abs(gate) * (1.0 + np.abs(raw)) if case.gate_silu else np.abs(gate)
        out, slack = gate * normed, np.abs(gate) * spread + own * np.abs(normed)
        if case.concat:
            middle, of_middle = (v, np.abs(v)) if case.concat == 1 else (normed, spread)
            out = np.concatenate([gate, middle, out], axis=1)
            slack = np.concatenate([own, of_middle, slack], axis=1)
    assert out.shape == (rows, width * (3 if case.concat else 1))
    return NormResult(out, np.abs(out) + tolerances.SCORE_WEIGHT[case.rounding_type] * slack)


def norm_bounds(case: NormCase, result: NormResult) -> tuple[float, float, float]:
    """What an implementation may differ by: per element over the divisor, over the rms of out, and absolutely.

    The second follows from the first: gated outputs have few large elements, so no multiple of the rms fits all data.
    """
    bound = tolerances.COMPONENTWISE[case.rounding_type]
    rms = float(np.sqrt(np.mean(result.out**2))) if result.out.size else 0.0
    largest = float(result.divisor.max(initial=0.0))
    steps = [tolerances.SUBNORMAL_STEP[kind] for kind in (case.output_type, case.rounding_type)]
    return bound, bound * largest / rms if rms else bound, max(tolerances.FLOAT32_UNDERFLOW, *steps)


def norm_error(actual: Array, case: NormCase, result: NormResult) -> float:
    """Largest error of an element over its divisor; infinite where one is not finite, or not 0 where it must be."""
    if actual.shape != result.out.shape:
        raise ValueError(f"the norm's output has shape {actual.shape}, the oracle's {result.out.shape}")
    given = actual.astype(np.float64)
    step = norm_bounds(case, result)[2]
    with np.errstate(invalid="ignore"):
        beyond = np.maximum(np.abs(given - result.out) - step, 0.0)
    exact = np.where(given == 0, 0.0, np.inf)
    ratio = np.where(result.divisor > 0, beyond / np.where(result.divisor > 0, result.divisor, 1.0), exact)
    return float(np.where(np.isfinite(given), ratio, np.inf).max(initial=0.0))


def check_norm(actual: Array, case: NormCase, result: NormResult | None = None) -> None:
    """Fail unless an output is within the bounds of its type."""
    result = result or norm_oracle(case)
    error, bound = norm_error(actual, case, result), norm_bounds(case, result)[0]
    assert error <= bound, f"{case.name}: error {error:.3g}, allowed {bound:.3g}"


def build_norm_case(
    name: str,
    rows: int,
    width: int,
    types: tuple[str, str] = ("float16", "float16"),
    *,
    mean: float = 0.0,
    parameters: str = "bias",
    seed: int = 0,
    **attributes: Any,
) -> NormCase:
    """Normal data of size 1 around `mean`; `parameters` names which of shift and bias there are."""
    rng = np.random.default_rng([seed, rows, width])

    def row() -> Array:
        return rng.normal(0.0, 1.0, width).astype(np.float32)

    return NormCase(
        name,
        *types,
        x=round_to_dtype(rng.normal(mean, 1.0, (rows, width)), types[0]),
        scale=(1.0 + 0.3 * row()).astype(np.float32),
        shift=row() if "shift" in parameters else None,
        bias=row() if "bias" in parameters else None,
        gate=round_to_dtype(rng.normal(0.0, 2.0, (rows, width)), types[0])
        if attributes.get("activation") == 1
        else None,
        **attributes,
    )


#: What the graphs of this project hold, by name: attributes and parameters.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-bias": {"parameters": ""},
    "shift": {"parameters": "shift bias"},
    "swish": {"parameters": "shift bias", "activation": 2},
    "gate": {"activation": 1},
    "silu-gate": {"activation": 1, "gate_silu": 1},
    "concat-rows": {"activation": 1, "gate_silu": 1, "concat": 1},
    "concat-normed": {"activation": 1, "concat": 2},
}
WIDTHS = (1, 15, 16, 17, 50, 64, 130, 512, 516)


def kind_cases(types: tuple[str, str]) -> Iterator[NormCase]:
    """Every kind at one small width, with and without groups."""
    for number, (kind, attributes) in enumerate(KINDS.items()):
        yield build_norm_case(f"norm-{kind}", 5, 48, types, seed=number, **attributes)
        yield build_norm_case(f"norm-{kind}-groups", 5, 48, types, seed=number, num_groups=3, **attributes)


def width_cases(types: tuple[str, str]) -> Iterator[NormCase]:
    """Widths around blocks and vectors, and numbers of rows that end inside a program."""
    for number, width in enumerate(WIDTHS):
        yield build_norm_case(f"norm-width-{width}", 1 + 2 * number, width, types, seed=number)
    yield build_norm_case("norm-many-groups", 3, 96, types, num_groups=32)
    yield build_norm_case("norm-groups-of-17", 7, 68, types, num_groups=4, **KINDS["concat-rows"])
    yield build_norm_case("norm-no-rows", 0, 32, types, **KINDS["concat-rows"])


def hostile_norm_cases(types: tuple[str, str]) -> Iterator[NormCase]:
    """Data on which E[x^2] - E[x]^2 has no digit left, rows without variance, sigmoids far from zero."""
    yield build_norm_case("norm-far-mean", 4, 64, types, mean=60.0)
    constant = build_norm_case("norm-constant-rows", 4, 64, types, mean=3.0)
    rows = np.repeat(constant.x[:, :1], constant.x.shape[1], axis=1)
    yield dataclasses.replace(constant, x=rows)
    yield dataclasses.replace(constant, name="norm-zero-rows", x=np.zeros_like(rows))
    steep = build_norm_case("norm-steep", 4, 64, types, **KINDS["swish"])
    yield dataclasses.replace(steep, scale=40.0 * steep.scale)


def large_norm_cases(types: tuple[str, str]) -> Iterator[NormCase]:
    """Real widths with more programs than a GPU has multiprocessors, layers of several programs, and the widest row."""
    yield build_norm_case("large-norm-512", 301, 512, types, **KINDS["plain"])
    yield build_norm_case("large-norm-swish", 301, 256, types, **KINDS["swish"])
    yield build_norm_case("large-norm-layer", 101, 512, types, **KINDS["concat-rows"])
    yield build_norm_case("large-norm-groups", 101, 512, types, num_groups=4, **KINDS["concat-rows"])
    for width in (1000, 2048, 3000, 8192):
        yield build_norm_case(f"large-norm-width-{width}", 3, width, types, **KINDS["plain"])


def all_norm_cases() -> list[NormCase]:
    """Return the whole grid in half precision, and its corners in every other pair of types."""
    half = ("float16", "float16")
    cases = [*kind_cases(half), *width_cases(half), *hostile_norm_cases(half), *large_norm_cases(half)]
    for types in (("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float32"), ("float32", "float16")):
        cases += [*kind_cases(types), *hostile_norm_cases(types)]
    return [*cases, *large_norm_cases(("float32", "float32"))]
