from __future__ import annotations

import datetime
import decimal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hstu_compile.model import time_features
from hstu_compile.model.time_features import (
    circle_table,
    circle_units,
    distance_buckets,
    distance_thresholds,
)

FUNCTIONS = ("sqrt", "log")
SIZES = (1, 5, 63, 511, 2048)
UNREACHED = 1 << 62


def original_buckets(seconds: torch.Tensor, largest: int, function: str) -> torch.Tensor:
    """The original's arithmetic: an integer difference, then float32 to the end, rounded correctly.

    NumPy's square root is the processor's, which IEEE 754 lets round in one way only; its float32 logarithm is not.
    """
    minutes = np.maximum(seconds.numpy().astype(np.float32), np.float32(1e-6)) / np.float32(60)
    value = np.log(minutes.astype(np.float64)).astype(np.float32) if function == "log" else np.sqrt(minutes)
    assert (minutes.dtype, value.dtype) == (np.float32, np.float32)
    return torch.from_numpy(np.maximum(value, np.float32(0)).astype(np.int64).clip(0, largest))


def around(values: np.ndarray[Any, Any], width: int = 3) -> torch.Tensor:
    """Every value and its neighbours."""
    steps = np.arange(-width, width + 1)
    return torch.from_numpy((values.astype(np.int64)[:, None] + steps).ravel())


def boundaries(largest: int, function: str) -> torch.Tensor:
    """Distances about every change of bucket in exact arithmetic."""
    numbers = np.arange(largest + 1)
    if function == "sqrt":
        return around(60 * numbers**2)
    return around(np.floor(60 * np.exp(numbers[numbers <= 38].astype(np.float64))))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("largest", SIZES)
def test_buckets_are_those_of_the_float32_formula(largest: int, function: Any) -> None:
    thresholds = distance_thresholds(largest, function)
    rng = np.random.default_rng(largest)
    seconds = torch.cat(
        [
            torch.arange(-100, 50_000),
            boundaries(largest, function),
            around(thresholds[thresholds < UNREACHED].numpy()),
            # Where float32 has no longer every integer: ulp 2, 128 (a timestamp of today), 2**30.
            around(2 ** np.arange(20, 61)),
            torch.tensor([UNREACHED - 1, -UNREACHED, torch.iinfo(torch.int64).min]),
            torch.from_numpy(np.floor(np.exp2(rng.uniform(0, 61.9, 50_000))).astype(np.int64)),
        ]
    )
    expected = original_buckets(seconds, largest, function)
    assert torch.equal(distance_buckets(seconds, thresholds, function), expected)
    assert int(expected.max()) == min(largest, 38 if function == "log" else largest)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_buckets_of_an_hour_a_day_a_month_and_a_year(function: Any) -> None:
    hour, day = 3600, 86400
    seconds = torch.tensor([-5, 0, 59, 60, hour, day, 30 * day, 365 * day])
    expected = {"sqrt": [0, 0, 0, 1, 7, 37, 207, 724], "log": [0, 0, 0, 0, 4, 7, 10, 13]}[function]
    assert distance_buckets(seconds, distance_thresholds(2048, function), function).tolist() == expected


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("largest", SIZES)
def test_threshold_is_the_smallest_distance_of_its_bucket(largest: int, function: Any) -> None:
    thresholds = distance_thresholds(largest, function)
    assert (thresholds.dtype, thresholds.shape, int(thresholds[0])) == (torch.int64, (largest + 1,), 0)
    reached = thresholds < UNREACHED
    assert int(reached.sum()) == (min(largest, 38) if function == "log" else largest) + 1
    assert (thresholds[~reached] == UNREACHED).all()
    numbers = torch.arange(largest + 1)[reached]
    assert torch.equal(original_buckets(thresholds[reached], largest, function), numbers)
    assert torch.equal(original_buckets(thresholds[reached][1:] - 1, largest, function), numbers[1:] - 1)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_cpu_with_inexact_float32_functions_builds_the_same_boundaries(function: Any) -> None:
    """Against fifty decimal digits: torch's float32 functions move boundaries on an AMD CPU without AVX-512."""
    thresholds = distance_thresholds(2048, function).tolist()
    with decimal.localcontext(decimal.Context(prec=50)):
        for bucket, threshold in enumerate(thresholds):
            if bucket == 0 or threshold == UNREACHED:
                continue
            # What is at least halfway between the bucket and the float32 before it is rounded to the bucket.
            halfway = (bucket + float(np.nextafter(np.float32(bucket), np.float32(0)))) / 2
            minutes = np.array([threshold - 1, threshold]).astype(np.float32) / np.float32(60)
            exact = [decimal.Decimal(float(each)) for each in minutes]
            exact = [each.sqrt() if function == "sqrt" else each.ln() for each in exact]
            assert exact[0] < halfway <= exact[1], bucket


def test_float32_boundaries_are_not_those_of_exact_arithmetic() -> None:
    """The reason for a search: the square of a bucket is not always where float32 begins it."""
    thresholds = distance_thresholds(2048, "sqrt").tolist()
    moved = [bucket for bucket in range(2049) if thresholds[bucket] != 60 * bucket**2]
    # Up to 2**24 seconds, bucket 528, float32 has every integer, and only the root is rounded; behind 2**27 seconds,
    # bucket 1495, it has every sixteenth.
    assert 500 < min(moved) < 528
    assert all(abs(thresholds[bucket] - 60 * bucket**2) <= 16 for bucket in moved)


def slipped(by: int, largest: int, function: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Buckets found and expected, on a device that is wrong by so many buckets everywhere."""
    seconds = torch.cat([torch.arange(-5, 5000), boundaries(largest, function), torch.tensor([UNREACHED - 1])])
    right: Callable[[torch.Tensor, Any], torch.Tensor] = time_features._buckets_by_formula
    monkeypatch.setattr(
        time_features, "_nearby_buckets", lambda each, name: (right(each.clamp(min=0), name) + by).clamp(min=0)
    )
    found = distance_buckets(seconds, distance_thresholds(largest, function), function)
    return found, original_buckets(seconds, largest, function)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("largest", SIZES)
@pytest.mark.parametrize("by", [-4, -1, 1, 4])
def test_a_device_that_is_four_buckets_off_is_mended(
    function: Any, largest: int, by: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands for a device whose sqrt or log rounds differently."""
    found, expected = slipped(by, largest, function, monkeypatch)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("by", [-5, 5])
def test_a_device_that_is_five_buckets_off_is_not_mended(by: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found, expected = slipped(by, 511, "sqrt", monkeypatch)
    assert not torch.equal(found, expected)


def by_a_device(seconds: torch.Tensor, function: str, units: int) -> NDArray[Any]:
    """[L] int64: buckets where each of conversion, quotient and function is off by so many units, all to one side."""

    def off(values: NDArray[Any]) -> NDArray[Any]:
        rounded = values.astype(np.float32)
        return (rounded.astype(np.float64) + units * np.spacing(rounded)).astype(np.float32)

    minutes = np.maximum(off(off(seconds.numpy()).astype(np.float64) / 60), np.float32(1)).astype(np.float64)
    return np.maximum(off(np.log(minutes) if function == "log" else np.sqrt(minutes)), 0).astype(np.int64)


@pytest.mark.parametrize(
    ("function", "largest", "units", "off"),
    [
        # After e minutes the next second is more than a hundred units away.
        ("sqrt", 1, 100, 1),
        ("log", 1, 100, 0),
        ("sqrt", 5, 100, 1),
        ("log", 5, 100, 1),
        ("sqrt", 511, 100, 1),
        ("sqrt", 2048, 100, 1),
        ("log", 2048, 100, 1),
        ("sqrt", 1 << 20, 4, 1),
        ("log", 1 << 20, 4, 1),
    ],
)
def test_a_device_is_one_bucket_off_at_most(function: str, largest: int, units: int, off: int) -> None:
    """What a device rounds differently; nothing here descends, so that errors all to one side are the largest."""
    numbers = np.unique(np.concatenate([np.arange(min(largest, 5000)), np.arange(max(0, largest - 5000), largest + 1)]))
    if function == "sqrt":
        changes = 60 * numbers**2
    else:
        changes = np.floor(60 * np.exp(numbers[numbers <= 38].astype(np.float64)))
    seconds = torch.cat([torch.arange(4000), around(changes), around(2 ** np.arange(20, 62))]).clamp(min=0)
    expected = original_buckets(seconds, largest, function).numpy()
    errors = [by_a_device(seconds, function, each).clip(0, largest) - expected for each in (-units, units)]
    assert np.abs(errors).max() == off


# --- Hour and weekday -------------------------------------------------------------------------------------------------


def original_units(timestamps: torch.Tensor) -> list[torch.Tensor]:
    """The original's arithmetic, in float32 from the timestamp on."""
    units = []
    for period, count in ((3600.0, 24.0), (86400.0, 7.0)):
        since_epoch = torch.div(timestamps.float(), period, rounding_mode="floor")
        units.append(torch.remainder(since_epoch, count).to(torch.int64))
    return units


def timestamps_at_boundaries() -> torch.Tensor:
    """Around full hours and midnights of several decades, within and beyond what float32 rounds away."""
    hours = np.arange(0, 2_000_000_000 // 3600, 997) * 3600
    days = np.arange(0, 2_000_000_000 // 86400, 13) * 86400
    edges = np.concatenate([hours, days, 2 ** np.arange(20, 36)])
    steps = np.array([-129, -128, -127, -65, -64, -63, -33, -32, -31, -1, 0, 1, 31, 32, 33, 63, 64, 65, 127, 128, 129])
    return torch.from_numpy((edges[:, None] + steps).ravel())


def test_float32_units_are_those_of_the_original_arithmetic() -> None:
    rng = np.random.default_rng(0)
    timestamps = torch.cat(
        [timestamps_at_boundaries(), torch.from_numpy(rng.integers(-(10**9), 4 * 10**9, 200_000)), torch.arange(90_000)]
    )
    for ours, theirs in zip(circle_units(timestamps, "float32"), original_units(timestamps), strict=True):
        assert torch.equal(ours, theirs)


def test_float32_moves_an_hour_back_and_another_one_ahead() -> None:
    """A float32 of this size is a multiple of 128: one hour begins 16 s above the nearest, the other 48 s below."""
    timestamps = torch.tensor([1_400_000_400, 1_400_014_800 - 1])
    assert circle_units(timestamps, "exact")[0].tolist() == [17, 20]
    assert circle_units(timestamps, "float32")[0].tolist() == [16, 21]


@settings(max_examples=200, deadline=None)
@given(timestamp=st.integers(-(2**35), 2**35))
def test_exact_units_are_those_of_the_calendar(timestamp: int) -> None:
    moment = datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=timestamp)
    hour, weekday = (int(unit) for unit in circle_units(torch.tensor([timestamp]), "exact"))
    assert hour == moment.hour
    # Counted from the first of January 1970, a Thursday.
    assert weekday == (moment.weekday() - 3) % 7


@pytest.mark.parametrize("units", [24, 7])
def test_circle_is_turned_with_3_14(units: int) -> None:
    table = circle_table(units)
    assert (table.dtype, table.shape) == (torch.float32, (units, 2))
    angle = np.arange(units, dtype=np.float64) / units * 2 * 3.14
    expected = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    np.testing.assert_allclose(table.numpy(), expected, rtol=0, atol=2.0**-21)
    # With pi the last unit would be as far from the first as the second is.
    assert abs(float(table[-1, 0] - table[1, 0])) > 5e-4


def test_circle_has_the_original_float32_values_to_the_bit() -> None:
    for units in (24, 7):
        turned = torch.remainder(torch.arange(units).float(), float(units)) / torch.tensor(float(units)) * 2 * 3.14
        points = torch.view_as_real(torch.polar(torch.ones_like(turned), turned))
        assert torch.equal(circle_table(units), points)
