"""Clipping rules against their definitions, computed the slow way."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from hstu_compile.calibration import observers
from hstu_compile.calibration.histogram import NUM_BINS, Histogram
from hstu_compile.calibration.observers import MSE_STEPS, OBSERVERS, QUANTIZATIONS, Quantization, clipping_bound

MODERATE = st.floats(-1e4, 1e4, width=32)
VALUES = arrays(np.float32, st.integers(1, 60), elements=MODERATE)


def heavy_tailed(seed: int, count: int = 20_000) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_t(3, count).astype(np.float32)


def largest_of(values: NDArray[np.float32]) -> float:
    return float(np.abs(values).max())


def rounded(values: NDArray[np.float64], bound: float, quantization: Quantization) -> NDArray[np.float64]:
    """Values to the nearest level and back, by the arithmetic of the types themselves."""
    if quantization == "int8":
        scale = bound / 127
        return np.clip(np.rint(values / scale), -127, 127) * scale
    scale = bound / 448
    clipped = np.clip(values / scale, -448, 448)
    return clipped.astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale


def test_levels_are_those_of_the_types() -> None:
    assert observers.levels("int8").tolist() == list(range(128))
    every = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    assert observers.levels("fp8").tolist() == every.tolist()


@given(VALUES, st.sampled_from(OBSERVERS), st.sampled_from(QUANTIZATIONS))
@settings(deadline=None)
def test_bounds_are_above_zero_and_at_most_the_largest_value(
    values: NDArray[np.float32], observer: observers.Observer, quantization: Quantization
) -> None:
    largest = largest_of(values)
    bound = clipping_bound(Histogram.of(values), largest, observer, quantization)
    assert bound == 0 if largest == 0 else 0 < bound <= largest


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_zeros_alone_give_zero_and_one_value_gives_itself(
    observer: observers.Observer, quantization: Quantization
) -> None:
    assert clipping_bound(Histogram.of(np.zeros(9, np.float32)), 0.0, observer, quantization) == 0
    assert clipping_bound(Histogram.empty(), 0.0, observer, quantization) == 0
    for value in (1.0, 0.7, 3e-20, 6e4):
        constant = np.full(100, value, np.float32)
        bound = clipping_bound(Histogram.of(constant), largest_of(constant), observer, quantization)
        assert bound == largest_of(constant)


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_bounds_scale_with_the_values_and_ignore_sign_order_and_zeros(
    observer: observers.Observer, quantization: Quantization
) -> None:
    values = heavy_tailed(1)
    bound = clipping_bound(Histogram.of(values), largest_of(values), observer, quantization)
    changed = -np.concatenate([np.zeros(5000, np.float32), values[::-1]]) * np.float32(8)
    assert clipping_bound(Histogram.of(changed), largest_of(changed), observer, quantization) == 8 * bound


@pytest.mark.parametrize("percent", [50.0, 90.0, 99.0, 99.99, 100.0])
def test_percentile_is_numpys_within_a_bin(percent: float) -> None:
    values = heavy_tailed(2)
    histogram = Histogram.of(values)
    bound = observers.percentile(histogram, largest_of(values), percent=percent)
    exact = np.quantile(np.abs(values), percent / 100, method="inverted_cdf")
    assert exact <= bound <= exact + histogram.width
    # At least so many are kept, and with a bin less they would not be.
    assert (np.abs(values) <= bound).mean() >= percent / 100
    assert (np.abs(values) < bound - histogram.width).mean() < percent / 100


@pytest.mark.parametrize("percent", [0.0, -1.0, 100.1, math.nan])
def test_percentile_takes_a_percentage(percent: float) -> None:
    with pytest.raises(ValueError, match="above 0 and at most 100"):
        observers.percentile(Histogram.of(np.ones(3, np.float32)), 1.0, percent=percent)


def divergence(counts: NDArray[np.int64], size: int, quantization: Quantization) -> float:
    """KL(P || Q) as it is defined, bin by bin."""
    total = counts.sum()
    p = counts[:size].astype(float)
    p[-1] += counts[size:].sum()
    grid = observers.levels(quantization)
    # The centre of a bin against each middle between two levels, both times 2 * size * grid[-1]: all exact.
    level = [int(((2 * index + 1) * grid[-1] >= (grid[1:] + grid[:-1]) * size).sum()) for index in range(size)]
    q = np.zeros(size)
    for each in set(level):
        members = [index for index in range(size) if level[index] == each and counts[index]]
        for index in members:
            q[index] = sum(counts[member] for member in members) / len(members)
    p, q = p / total, q / max(q.sum(), 1)
    if (q[p > 0] == 0).any():
        return math.inf
    return float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("make", [lambda: heavy_tailed(3, 3000), lambda: heavy_tailed(4, 40)], ids=["many", "few"])
def test_entropy_compares_the_divergences_of_its_definition(make: object, quantization: Quantization) -> None:
    values = make()  # type: ignore[operator]
    histogram = Histogram.of(values)
    sizes = np.array([1, 2, 63, 128, 129, 130, 200, 255, 256, 511, 777, 1024, 1500, 2047, 2048])
    expected = [divergence(histogram.counts, int(size), quantization) for size in sizes]
    found = observers.divergences(histogram, sizes, quantization)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    assert np.isfinite(expected).any()


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_entropy_takes_the_least_divergence(quantization: Quantization) -> None:
    values = heavy_tailed(5)
    histogram = Histogram.of(values)
    bound = observers.entropy(histogram, largest_of(values), quantization)
    last = int(np.flatnonzero(histogram.counts)[-1]) + 1
    chosen = min(math.ceil(bound / histogram.width), last)
    every = observers.divergences(histogram, np.arange(128, last + 1), quantization)
    assert observers.divergences(histogram, np.array([chosen]), quantization)[0] == every.min()
    assert every.max() > every.min()


def test_entropy_of_int8_clips_an_outlier_that_stretches_the_range() -> None:
    values = np.random.default_rng(6).standard_normal(100_000).astype(np.float32)
    values[0] = 60
    assert observers.entropy(Histogram.of(values), 60.0) < 10


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("fraction", [1.0, 0.6, 0.31, 0.05])
def test_square_error_is_that_of_the_rounded_values(quantization: Quantization, fraction: float) -> None:
    """Values spread evenly in each bin, as the rule assumes: then the integral is what rounding them really costs."""
    coarse = heavy_tailed(7, 4000)
    histogram = Histogram.of(coarse)
    per_bin = 400
    offsets = (np.arange(per_bin) + 0.5) / per_bin
    used = np.flatnonzero(histogram.counts)
    points = (used[:, None] + offsets) * histogram.width
    bound = largest_of(coarse) * fraction
    each = ((points - rounded(points, bound, quantization)) ** 2).mean(axis=1)
    weights = histogram.counts[used]
    expected = (each * weights).sum() / weights.sum()
    found = observers.square_errors(histogram, np.array([bound]), quantization)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-3)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("seed", [8, 9])
def test_mse_minimises_on_its_grid(quantization: Quantization, seed: int) -> None:
    """On the values themselves, not on their histogram, no step of the grid is noticeably better."""
    values = heavy_tailed(seed)
    largest = largest_of(values)
    bound = observers.mse(Histogram.of(values), largest, quantization)
    bounds = largest * np.arange(1, MSE_STEPS + 1) / MSE_STEPS
    assert bound in bounds
    exact = values.astype(np.float64)
    errors = [float(((exact - rounded(exact, each, quantization)) ** 2).mean()) for each in bounds]
    chosen = errors[int(np.flatnonzero(bounds == bound)[0])]
    assert chosen <= 1.02 * min(errors)
    # The grid has far worse steps, so the comparison means something.
    assert max(errors) > 10 * min(errors)


def test_mse_of_int8_clips_a_heavy_tail_and_keeps_an_even_spread() -> None:
    values = heavy_tailed(10, 100_000)
    assert observers.mse(Histogram.of(values), largest_of(values)) < 0.8 * largest_of(values)
    even = np.linspace(-1, 1, 100_001, dtype=np.float32)
    assert observers.mse(Histogram.of(even), 1.0) > 0.98


def test_unknown_rules_and_types_are_refused() -> None:
    histogram = Histogram.of(np.ones(3, np.float32))
    with pytest.raises(ValueError, match="observer 'median'"):
        clipping_bound(histogram, 1.0, "median", "int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="for 'int4'"):
        clipping_bound(histogram, 1.0, "mse", "int4")  # type: ignore[arg-type]


def test_a_histogram_has_the_resolution_that_int8_needs() -> None:
    histogram = Histogram.of(np.array([1.0], np.float32))
    assert 1.0 / 127 / histogram.width >= NUM_BINS / 2 / 128
