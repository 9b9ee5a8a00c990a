"""Where to clip a tensor of which a histogram is known: the rules that `--observer` names. Level 2; no torch.

A bound b means: values are divided by b / (largest level) and rounded to a level; what is above b becomes b. Each rule
trades the error of what is clipped against the coarser steps of a larger bound. All are pure functions of a histogram.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hstu_compile.calibration.histogram import NUM_BINS, Histogram

Quantization = Literal["int8", "fp8"]
Observer = Literal["amax", "percentile", "entropy", "mse"]

OBSERVERS: tuple[Observer, ...] = ("amax", "percentile", "entropy", "mse")
QUANTIZATIONS: tuple[Quantization, ...] = ("int8", "fp8")

#: Share of the values other than zero that `percentile` keeps, in percent.
PERCENTILE = 99.99
#: Bounds that `mse` compares: this many equal steps up to the largest value.
MSE_STEPS = 256
#: Fewest bins below a bound that `entropy` compares: one for each level of INT8.
_ENTROPY_FEWEST_BINS = 128


def levels(quantization: Quantization) -> NDArray[np.float64]:
    """Magnitudes that a quantised value can have, ascending from 0, in units of the scale.

    Of int8 0 to 127: -128, which only values beyond the bound become, is left out. Of fp8 those of e4m3fn, 0 to 448.
    """
    if quantization == "int8":
        return np.arange(128, dtype=np.float64)
    exponent, mantissa = np.divmod(np.arange(127), 8)
    normal = (8 + mantissa) * 2.0 ** (exponent - 10)
    subnormal = mantissa * 2.0**-9
    return np.where(exponent == 0, subnormal, normal)


def amax(histogram: Histogram, largest: float, quantization: Quantization = "int8") -> float:
    """The largest magnitude: nothing is clipped.

    Args:
        histogram: not read; every rule takes the same arguments.
        largest: the largest magnitude.
        quantization: not read.
    """
    return largest


def percentile(
    histogram: Histogram, largest: float, quantization: Quantization = "int8", *, percent: float = PERCENTILE
) -> float:
    """The smallest end of a bin that has at least `percent` of the values other than zero below it.

    Args:
        histogram: of the magnitudes.
        largest: the largest magnitude; the bound is no larger.
        quantization: not read: what is clipped depends on the values alone.
        percent: above 0, at most 100.
    """
    if not 0 < percent <= 100:
        raise ValueError(f"percent is {percent}; it must be above 0 and at most 100")
    below = np.cumsum(histogram.counts)
    if not below[-1]:
        return largest
    index = int(np.searchsorted(below, below[-1] * (percent / 100)))
    return min((index + 1) * histogram.width, largest)


def entropy(histogram: Histogram, largest: float, quantization: Quantization = "int8") -> float:
    """The end of a bin at which the quantised values' distribution diverges least from the clipped values' own.

    For the first i bins P is the histogram with all that is above counted in bin i - 1. Q has the counts of the i bins,
    those that round to one level shared out evenly among the bins of that level that are not empty. The bound is the
    end of the bin i that minimises KL(P || Q), the larger one of equals.

    Args:
        histogram: of the magnitudes; zeros do not count, as they are exact at any bound.
        largest: the largest magnitude; the bound is no larger.
        quantization: whose levels.
    """
    used = np.flatnonzero(histogram.counts)
    if not used.size:
        return largest
    last = int(used[-1]) + 1
    sizes = np.arange(min(_ENTROPY_FEWEST_BINS, last), last + 1)
    return min(int(sizes[_last_minimum(divergences(histogram, sizes, quantization))]) * histogram.width, largest)


def divergences(histogram: Histogram, sizes: NDArray[np.int64], quantization: Quantization) -> NDArray[np.float64]:
    """KL(P || Q) of `entropy` for bounds at the end of so many bins, in nats; infinite where P has what Q lacks.

    Args:
        histogram: of the magnitudes.
        sizes: [S] int64 -- 1..NUM_BINS.
        quantization: whose levels.

    Returns:
        [S] float64.
    """
    counts = histogram.counts.astype(np.float64)
    total = counts.sum()
    sums, filled, logs = (
        np.concatenate([[0.0], np.cumsum(each)])
        for each in (counts, counts > 0, counts * np.log(np.maximum(counts, 1)))
    )
    grid = levels(quantization)
    # A bin belongs to the level that its centre rounds to, halves upwards; starts[s, l - 1] is the first bin of level
    # l. Numerator and denominator are exact, so that a half is one.
    middles = (grid[1:] + grid[:-1]) * sizes[:, None]
    starts = np.ceil((middles - grid[-1]) / (2 * grid[-1])).astype(np.int64).clip(0, sizes[:, None])
    edges = np.concatenate([np.zeros((len(sizes), 1), np.int64), starts, sizes[:, None]], axis=1)
    group = np.diff(sums[edges], axis=1)
    share = group / np.maximum(np.diff(filled[edges], axis=1), 1)
    inside, in_last = sums[sizes], counts[sizes - 1]
    clipped = total - inside
    # sum P log P, of which the last bin has the clipped values too.
    outer = in_last + clipped
    own = logs[sizes] - in_last * np.log(np.maximum(in_last, 1)) + outer * np.log(np.maximum(outer, 1))
    own -= total * np.log(total)
    # sum P log Q: level by level, and the clipped values at the last bin's level.
    log_share = np.log(np.maximum(share, 1e-300))
    cross = np.where(group > 0, group * log_share, 0.0).sum(axis=1)
    level_of_last = (starts <= sizes[:, None] - 1).sum(axis=1)
    at_last = np.take_along_axis(log_share, level_of_last[:, None], axis=1)[:, 0]
    cross += np.where(clipped > 0, clipped * at_last, 0.0) - total * np.log(np.maximum(inside, 1))
    result: NDArray[np.float64] = np.where((clipped > 0) & (in_last == 0), np.inf, (own - cross) / total)
    return result


def mse(histogram: Histogram, largest: float, quantization: Quantization = "int8") -> float:
    """The multiple of a MSE_STEPS-th of the largest value with the least mean square error; the larger of equals.

    Args:
        histogram: of the magnitudes.
        largest: the largest magnitude; the bound is no larger.
        quantization: whose levels.
    """
    if not histogram.counts.any():
        return largest
    bounds = largest * np.arange(1, MSE_STEPS + 1) / MSE_STEPS
    return float(bounds[_last_minimum(square_errors(histogram, bounds, quantization))])


def square_errors(histogram: Histogram, bounds: NDArray[np.float64], quantization: Quantization) -> NDArray[np.float64]:
    """Mean square error of rounding to the levels of each bound, with the values of a bin taken as spread evenly.

    Args:
        histogram: of the magnitudes; its zeros, which have no error, are left out of the mean.
        bounds: [S] float64 -- above 0.
        quantization: whose levels.

    Returns:
        [S] float64.
    """
    counts = histogram.counts.astype(np.float64)
    grid = levels(quantization)
    edges = np.arange(NUM_BINS + 1) * histogram.width
    errors = np.empty(len(bounds))
    for index, bound in enumerate(bounds):
        scaled = grid * (bound / grid[-1])
        middles = (scaled[1:] + scaled[:-1]) / 2
        # The integral of the square error up to x is a cube in each interval that rounds to one level.
        before = np.concatenate([[0.0], np.cumsum(np.diff(scaled) ** 3 / 12)])
        level = np.searchsorted(middles, edges, side="right")
        integral = before[level] + (edges - scaled[level]) ** 3 / 3
        errors[index] = (counts * np.diff(integral)).sum()
    result: NDArray[np.float64] = errors / (histogram.width * counts.sum())
    return result


def _last_minimum(values: NDArray[np.float64]) -> int:
    """Index of the last of the smallest values."""
    return len(values) - 1 - int(np.argmin(values[::-1]))


_RULES: dict[Observer, Callable[[Histogram, float, Quantization], float]] = {
    "amax": amax,
    "percentile": percentile,
    "entropy": entropy,
    "mse": mse,
}


def clipping_bound(histogram: Histogram, largest: float, observer: Observer, quantization: Quantization) -> float:
    """What a rule says: above 0 and at most `largest`, or 0 where every value is zero.

    Raises:
        ValueError: if there is no such rule or quantisation.
    """
    if observer not in _RULES or quantization not in QUANTIZATIONS:
        raise ValueError(
            f"observer {observer!r} for {quantization!r}; there are {', '.join(OBSERVERS)} for "
            f"{', '.join(QUANTIZATIONS)}"
        )
    return _RULES[observer](histogram, largest, quantization)
