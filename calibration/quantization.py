"""From statistics and weights to scales: which products of a model are quantised, and how. Level 2; no torch.

Products of the layers, of the preprocessors and of the item tower are quantised. Heads, the small products that join
times and contextual features, norms and attention stay in float16.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from hstu_compile.calibration.observers import Observer, Quantization
from hstu_compile.calibration.site_statistics import SiteStatistics
from hstu_compile.calibration.table import CalibrationTable
from hstu_compile.errors import UsageError
from hstu_compile.quantized import (
    LARGEST_HALF,
    ProductWeight,
    QuantizationPlan,
    SiteScales,
    quantized_weight,
    usable_scales,
)

__all__ = ["QuantizationPlan", "SiteScales", "plan_quantization"]

#: First part of a site's name: why such products stay in float16.
_NEVER = {
    "head": "the prediction head stays in float16: its outputs are the answer",
    "time_combiner": "the product that joins times stays in float16: a few columns of the last rows alone",
    "contextual": "products of contextual features stay in float16: one row per user",
}
ON_REQUEST = "--keep-fp16"
_NO_ROWS = "calibration saw none of its activations"
_TOO_LARGE = "its sums can reach {:,.0f}, and float16 ends at {:,.0f}"
_NO_SCALE = "no float16 scale covers its activations up to {:.3g} and its weights up to {:.3g}"
_ALL_ZERO = "its activations were all zero in calibration, so nothing says how large they get"

# Powers of two that an activation's columns are divided by lie within 2**-8 and 2**8: with more, columns that were
# small in calibration could overflow float16 on other requests.
_LARGEST_SHIFT = 8


def plan_quantization(
    table: CalibrationTable,
    weights: Mapping[str, ProductWeight],
    kind: Quantization,
    observer: Observer | None = None,
    keep: Sequence[str] = (),
    smooth_alpha: float | None = None,
) -> QuantizationPlan:
    """Scales of every product that is quantised, and a reason for each that is not.

    A product is quantised only if no activation, not even one that saturates in every column with the signs of the
    weight, can bring a sum beyond float16: a graph holds the sums in float16, twice (`rewrite.quantize_products`).

    Args:
        table: of the same model, see `CalibrationTable.require`.
        weights: of every product, in the order of the model.
        kind: int8 or fp8.
        observer: rule for the bounds of activations; None is the table's. Weights are bounded by their largest value.
        keep: sites to leave in float16.
        smooth_alpha: share of the activations' range that moves into the weights, 0 to 1; None moves nothing. A bound
            is then the largest value of the smoothed columns: the table knows no more of them.

    Raises:
        UsageError: HSTU-E905, if `keep` names no product; HSTU-E901, if smoothing meets a rule other than amax.
    """
    _check_names(keep, list(weights))
    if smooth_alpha is not None and not 0 <= smooth_alpha <= 1:
        raise UsageError(
            "HSTU-E901",
            f"--smooth-quant {smooth_alpha:g} cannot be used",
            "allowed: 0 to 1",
            "pass 0.5, or leave it out",
        )
    if smooth_alpha is not None and observer not in (None, "amax"):
        raise UsageError(
            "HSTU-E901",
            f"--smooth-quant and --observer {observer} exclude each other",
            "of columns that are smoothed the table knows the largest values, and no histogram",
            "leave one of them out",
        )
    sites: dict[str, SiteScales] = {}
    kept: dict[str, str] = {}
    for name, weight in weights.items():
        statistics = table.sites[name]
        reason = _reason_to_keep(name, statistics, keep)
        if reason is not None:
            kept[name] = reason
            continue
        bound, smoothing = table.bound(name, observer, kind), None
        if smooth_alpha is not None:
            smoothing = smoothing_factors(np.array(statistics.channel_amax), weight.matrix, smooth_alpha)
            bound = float((np.array(statistics.channel_amax) / smoothing).max())
        try:
            with np.errstate(over="ignore"):  # weights beyond float16: the model that is cast to it says which
                quantized = quantized_weight(weight.matrix, kind, smoothing)
            input_scale = float(usable_scales(np.array(bound), kind))
        except ValueError:
            kept[name] = _NO_SCALE.format(bound, np.abs(weight.matrix).max())
            continue
        largest = quantized.largest_sum(input_scale)
        if largest > LARGEST_HALF:
            kept[name] = _TOO_LARGE.format(largest, LARGEST_HALF)
            continue
        sites[name] = SiteScales(weight.name, input_scale, quantized.scales, smoothing)
    return QuantizationPlan(kind, sites, kept)


def smoothing_factors(
    channel_amax: NDArray[np.float64], matrix: NDArray[np.float32], alpha: float
) -> NDArray[np.float32]:
    """Powers of two nearest to amax(activation column) ** alpha / amax(weight row) ** (1 - alpha).

    Dividing the activations by them and multiplying the weights with them changes no number of a product, and being
    powers of two they add no rounding of their own.

    Args:
        channel_amax: [inputs] largest magnitude of each column of the activations.
        matrix: [inputs, outputs].
        alpha: 0 to 1.

    Returns:
        [inputs]; 1 where a column or a row is zero.

    Source: Xiao et al., SmoothQuant, ICML 2023, equation 4; the rounding to powers of two is ours.
    """
    rows = np.abs(matrix).max(axis=1).astype(np.float64)
    usable = (channel_amax > 0) & (rows > 0)
    exponent = alpha * np.log2(np.where(usable, channel_amax, 1)) - (1 - alpha) * np.log2(np.where(usable, rows, 1))
    factors: NDArray[np.float32] = np.exp2(np.rint(exponent).clip(-_LARGEST_SHIFT, _LARGEST_SHIFT)).astype(np.float32)
    return factors


def _reason_to_keep(name: str, statistics: SiteStatistics, keep: Sequence[str]) -> str | None:
    family = name.split(".", maxsplit=1)[0]
    if family in _NEVER:
        return _NEVER[family]
    if name in keep:
        return ON_REQUEST
    if not statistics.rows:
        return _NO_ROWS
    return _ALL_ZERO if not statistics.amax else None


def _check_names(keep: Sequence[str], sites: Sequence[str]) -> None:
    unknown = [name for name in keep if name not in sites]
    if not unknown:
        return
    nearest = {name: difflib.get_close_matches(name, sites, n=3, cutoff=0.4) for name in unknown}
    hints = [f"{name} (nearest: {', '.join(close) or 'none'})" for name, close in nearest.items()]
    raise UsageError(
        "HSTU-E905",
        f"--keep-fp16 names {len(unknown)} products that the model does not have",
        f"{'; '.join(hints)}; its products are {', '.join(sites)}",
        "pass names as --dry-run lists them",
        {"unknown": unknown, "nearest": nearest, "sites": list(sites)},
    )
