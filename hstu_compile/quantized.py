"""Numbers of eight bits: the grids, the scales, and what is quantised in a build. Level 1; no torch.

The eager model's reference, the ONNX graph and the engines all take their numbers from here, so that they hold the same
integers. A scale is a number that float16 has: the graph stores scales in the type of its activations, and a scale that
was rounded there would be another one than the reference's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_compile.config import Quantization

Array = NDArray[Any]

#: Largest magnitude that a weight is quantised to, in units of its scale. Activations may also reach int8's -128, as
#: ONNX's QuantizeLinear and TensorRT have it.
LARGEST: dict[Quantization, float] = {"int8": 127.0, "fp8": 448.0}

#: The smallest number above zero that float16 has.
SMALLEST_SCALE = 2.0**-24

#: The largest number that float16 has, and the smallest with all of its bits.
LARGEST_HALF, SMALLEST_NORMAL_HALF = 65504.0, 2.0**-14

# Largest magnitude of an activation, in units of its scale.
_LARGEST_ACTIVATION: dict[Quantization, float] = {"int8": 128.0, "fp8": 448.0}

# e4m3fn: exponents of normal numbers start here, and a number has three bits behind the leading one.
_LOWEST_EXPONENT, _MANTISSA_BITS, _EXPONENT_BIAS = -6, 3, 7


def usable_scales(bounds: Array, kind: Quantization) -> NDArray[np.float32]:
    """The smallest float16 numbers with which no magnitude up to the bound is clipped.

    Args:
        bounds: any shape, >= 0; zero gives a scale of one, with which every zero stays zero.
        kind: the grid.

    Raises:
        ValueError: if a bound is not finite, negative, or needs a scale beyond float16.
    """
    wanted = np.asarray(bounds, np.float64) / LARGEST[kind]
    if not np.isfinite(wanted).all() or (wanted < 0).any() or (wanted > np.finfo(np.float16).max).any():
        raise ValueError(f"bounds from {np.min(bounds)} to {np.max(bounds)} have no float16 scale")
    nearest = wanted.astype(np.float16)
    above = np.nextafter(nearest, np.float16(np.inf))
    rounded = np.where(nearest.astype(np.float64) < wanted, above, nearest).astype(np.float32)
    return np.where(wanted == 0, np.float32(1), np.maximum(rounded, np.float32(SMALLEST_SCALE))).astype(np.float32)


def rounded_to_grid(steps: Array, kind: Quantization) -> NDArray[np.float64]:
    """Values in units of their scale to the nearest number of the grid, ties to even, saturated."""
    if kind == "int8":
        return np.rint(np.asarray(steps, np.float64)).clip(-128, 127)
    limited = np.asarray(steps, np.float64).clip(-LARGEST[kind], LARGEST[kind])
    _, exponent = np.frexp(limited)  # of a mantissa in [0.5, 1)
    spacing = np.ldexp(1.0, np.maximum(exponent - 1, _LOWEST_EXPONENT) - _MANTISSA_BITS)
    return np.asarray(np.rint(limited / spacing) * spacing)


def codes_of(levels: Array, kind: Quantization) -> Array:
    """Numbers of a grid as they are stored: int8, or the bits of e4m3fn in uint8."""
    if kind == "int8":
        return levels.astype(np.int8)
    magnitude = np.abs(levels)
    _, exponent = np.frexp(magnitude)
    exponent = np.maximum(exponent - 1, _LOWEST_EXPONENT)
    mantissa = np.ldexp(magnitude, _MANTISSA_BITS - exponent).astype(np.int64)  # with the leading bit of a normal one
    is_normal = mantissa >= 1 << _MANTISSA_BITS
    biased = np.where(is_normal, exponent + _EXPONENT_BIAS, 0)
    bits = (biased << _MANTISSA_BITS) | (mantissa & ((1 << _MANTISSA_BITS) - 1))
    signed: Array = (bits | np.where(np.signbit(levels), 0x80, 0)).astype(np.uint8)
    return signed


def levels_of(codes: Array, kind: Quantization) -> NDArray[np.float64]:
    """What stored codes mean, in units of their scale."""
    if kind == "int8":
        return codes.astype(np.float64)
    bits = codes.astype(np.int64)
    biased, mantissa = (bits >> _MANTISSA_BITS) & 0xF, bits & ((1 << _MANTISSA_BITS) - 1)
    leading = np.where(biased > 0, 1 << _MANTISSA_BITS, 0)
    exponent = np.maximum(biased - _EXPONENT_BIAS, _LOWEST_EXPONENT) - _MANTISSA_BITS
    values: NDArray[np.float64] = np.where(bits & 0x80, -1.0, 1.0) * np.ldexp(
        (leading + mantissa).astype(np.float64), exponent
    )
    return values


@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """A constant matrix on a grid.

    Attributes:
        kind: the grid.
        codes: [inputs, outputs] int8, or uint8 with the bits of e4m3fn.
        scales: [outputs] float32, each a number of float16.
    """

    kind: Quantization
    codes: Array = dataclasses.field(repr=False)
    scales: NDArray[np.float32] = dataclasses.field(repr=False)

    def values(self) -> NDArray[np.float64]:
        """[inputs, outputs] what the codes stand for."""
        return levels_of(self.codes, self.kind) * self.scales.astype(np.float64)

    def common_scale(self) -> float:
        """The scale that a graph gives the whole matrix, in front of the product.

        The largest power of two that is not above the largest scale of a column, columns of zeros aside; at most one,
        at least the smallest number that float16 has with all of its bits. With a power of two all that the graph holds
        is exact: `column_factors` are float16 numbers, and so is each level times this scale.
        """
        largest = float(self.scales.max(initial=0.0, where=self._is_used()))
        if not largest:
            return 1.0
        _, exponent = np.frexp(largest)
        return float(np.clip(np.ldexp(1.0, int(exponent) - 1), SMALLEST_NORMAL_HALF, 1.0))

    def column_factors(self) -> NDArray[np.float16]:
        """[outputs] what a graph multiplies the columns of the product with, so that each has its own scale.

        Exact: the quotient has the bits of the column's scale, and being divided by a power of two of at most one it is
        a multiple of 2**-24 like that scale. Columns of zeros, whose scale means nothing, have the factor one.
        """
        factors = np.where(self._is_used(), self.scales / self.common_scale(), 1)
        return np.asarray(factors, np.float16)

    def largest_sum(self, input_scale: float) -> float:
        """The largest magnitude that any activation can give the product, before or behind the factors of its columns.

        Args:
            input_scale: of the activation.
        """
        sums = np.abs(levels_of(self.codes, self.kind)).sum(axis=0)
        scales = np.maximum(self.scales.astype(np.float64), self.common_scale())
        reached = (sums * scales).max(initial=0.0)  # columns of zeros have no sum
        return float(reached * _LARGEST_ACTIVATION[self.kind] * input_scale)

    def _is_used(self) -> NDArray[np.bool_]:
        """[outputs] which columns have a level other than zero."""
        magnitude = self.codes.view(np.uint8) & (0xFF if self.kind == "int8" else 0x7F)  # e4m3 has a sign bit
        return np.asarray(magnitude.any(axis=0), np.bool_)


def quantized_weight(matrix: Array, kind: Quantization, smoothing: Array | None = None) -> QuantizedWeight:
    """A matrix on a grid, with a scale for each of its columns.

    It is rounded to float16 first, which is what a float16 graph holds, whatever the type of the matrix. Each column's
    numbers depend on that column and the smoothing alone: a part of the columns gets the same ones.

    Args:
        matrix: [inputs, outputs] any float type, finite in float16.
        kind: the grid.
        smoothing: [inputs] powers of two that its rows are multiplied with, or None.
    """
    rows = matrix.astype(np.float16).astype(np.float64)
    if smoothing is not None:
        rows = rows * smoothing.astype(np.float64)[:, None]
    scales = usable_scales(np.abs(rows).max(axis=0, initial=0.0), kind)
    levels = rounded_to_grid(rows / scales.astype(np.float64), kind)
    return QuantizedWeight(kind, codes_of(levels, kind), scales)


@dataclasses.dataclass(frozen=True)
class ProductWeight:
    """The constant matrix of a product.

    Attributes:
        name: of the parameter; the exported graph's constant ends with it.
        matrix: [inputs, outputs].
    """

    name: str
    matrix: Array = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class SiteScales:
    """How one product is quantised.

    Attributes:
        weight_name: of the parameter.
        input_scale: of the activation, one for the tensor; a number of float16 above zero.
        weight_scales: [outputs] float32.
        smoothing: [inputs] float32 powers of two, or None. The activation is divided by them and the rows of the weight
            are multiplied with them, both exactly.
    """

    weight_name: str
    input_scale: float
    weight_scales: NDArray[np.float32] = dataclasses.field(repr=False)
    smoothing: NDArray[np.float32] | None = dataclasses.field(default=None, repr=False)

    def weight(self, matrix: Array, kind: Quantization) -> QuantizedWeight:
        """The site's matrix, or some columns of it, on the grid."""
        return quantized_weight(matrix, kind, self.smoothing)

    def to_dict(self) -> dict[str, Any]:
        """JSON form: the scales, and of those that are many the range."""
        smoothing = self.smoothing
        return {
            "input_scale": self.input_scale,
            "weight_scales": [float(self.weight_scales.min()), float(self.weight_scales.max())],
            "smoothing": None if smoothing is None else [float(smoothing.min()), float(smoothing.max())],
        }


@dataclasses.dataclass(frozen=True)
class QuantizationPlan:
    """What of a model is quantised, and how.

    Attributes:
        kind: the grid.
        sites: scales of each quantised product, by the site's name.
        kept: why each other product stays in float16.
    """

    kind: Quantization
    sites: Mapping[str, SiteScales]
    kept: Mapping[str, str]

    def without(self, names: Iterable[str], reason: str) -> QuantizationPlan:
        """The same plan with these sites left in float16."""
        gone = set(names)
        sites = {name: scales for name, scales in self.sites.items() if name not in gone}
        return QuantizationPlan(self.kind, sites, {**self.kept, **dict.fromkeys(sorted(gone), reason)})

    def to_dict(self) -> dict[str, Any]:
        """JSON form for manifest, report and --dry-run."""
        return {
            "kind": self.kind,
            "sites": {name: scales.to_dict() for name, scales in self.sites.items()},
            "kept": dict(self.kept),
        }
