"""Histograms of magnitudes: exact counts, and merging in any order is counting all at once."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from hstu_compile.calibration.histogram import NUM_BINS, Histogram

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
VALUES = arrays(np.float32, st.integers(0, 50), elements=FINITE)


def brute_force(values: NDArray[np.float32]) -> tuple[dict[int, int], int]:
    """Bins and zeros by exact integer arithmetic on fractions, value by value."""
    magnitudes = [abs(float(value)) for value in values.ravel()]
    largest = max(magnitudes, default=0.0)
    exponent = -110
    while 2.0**exponent <= largest:
        exponent += 1
    counts: dict[int, int] = {}
    for magnitude in magnitudes:
        if magnitude:
            numerator, denominator = magnitude.as_integer_ratio()
            scale = NUM_BINS * 2 ** max(-exponent, 0)
            index = numerator * scale // (denominator * 2 ** max(exponent, 0))
            counts[index] = counts.get(index, 0) + 1
    return counts, magnitudes.count(0.0)


@given(VALUES)
def test_counts_are_those_of_exact_arithmetic(values: NDArray[np.float32]) -> None:
    histogram = Histogram.of(values)
    counts, zeros = brute_force(values)
    assert {int(index): int(histogram.counts[index]) for index in np.flatnonzero(histogram.counts)} == counts
    assert (histogram.zeros, histogram.total) == (zeros, values.size)


@given(VALUES, VALUES, VALUES)
def test_merging_is_counting_all_at_once_in_any_order(
    a: NDArray[np.float32], b: NDArray[np.float32], c: NDArray[np.float32]
) -> None:
    whole = Histogram.of(np.concatenate([a, b, c]))
    x, y, z = Histogram.of(a), Histogram.of(b), Histogram.of(c)
    assert x.merged(y).merged(z) == x.merged(y.merged(z)) == z.merged(x).merged(y) == whole
    assert hash(x.merged(y).merged(z)) == hash(whole)
    assert x.merged(Histogram.empty()) == x == Histogram.empty().merged(x)


@given(VALUES)
def test_json_form_reads_back(values: NDArray[np.float32]) -> None:
    histogram = Histogram.of(values)
    assert Histogram.from_dict(json.loads(json.dumps(histogram.to_dict()))) == histogram


def test_the_range_ends_above_the_largest_value() -> None:
    for largest, upper in (
        (1.0, 2.0),
        (np.nextafter(np.float32(1), np.float32(0)), 1.0),
        (3.0, 4.0),
        (65504.0, 65536.0),
    ):
        histogram = Histogram.of(np.array([largest, -0.25], np.float32))
        assert histogram.upper == upper
        assert np.flatnonzero(histogram.counts)[-1] >= NUM_BINS // 2


def test_different_histograms_differ() -> None:
    one = Histogram.of(np.array([1.0], np.float32))
    for other in ([1.5], [1.0, 0.0], [1.0, 1.0], [0.5], []):
        assert one != Histogram.of(np.array(other, np.float32))
    assert one != "a histogram"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="NaN or an infinity"):
        Histogram.of(np.array([1.0, bad, 2.0], np.float32))


def test_counts_cannot_be_changed() -> None:
    histogram = Histogram.of(np.ones(3, np.float32))
    with pytest.raises(ValueError, match="read-only"):
        histogram.counts[0] = 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"exponent": 1, "zeros": 0}, "found exponent, zeros"),
        ({"exponent": 1, "zeros": 0, "counts": [], "bins": 4}, "bins"),
        ({"exponent": 1, "zeros": 0, "counts": 7}, "at most 2048 counts"),
        ({"exponent": 1, "zeros": 0, "counts": [1] * 2049}, "at most 2048 counts"),
        ({"exponent": 1, "zeros": 0, "counts": [1, 1.5]}, "found 1.5"),
        ({"exponent": 1, "zeros": 0, "counts": [1, True]}, "found True"),
        ({"exponent": 1, "zeros": 0, "counts": [1 << 70]}, "whole numbers"),
        ({"exponent": 1, "zeros": 0, "counts": [3, -1]}, "none below 0"),
        ({"exponent": 1, "zeros": -1, "counts": []}, "none below 0"),
        ({"exponent": 200, "zeros": 0, "counts": []}, "2 \\*\\* 200"),
    ],
)
def test_what_is_no_histogram_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Histogram.from_dict(values)
