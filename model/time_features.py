"""Timestamps as a ranking model reads them: distance buckets, and hour and weekday on a circle. Level 1.

Both come from formulas that the original evaluates in float32. Here they are integer comparisons and table lookups
that give the same answers on every device, whatever its square root and its float types.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hstu_compile.model.ranking_config import TimeBucketFn, TimeFeaturePrecision

SECONDS_PER_MINUTE = 60.0
# The original's constants: seconds per unit, units per turn, and this value for pi.
PERIODS = ((3600, 24), (86400, 7))
_PI = 3.14
_SEARCH_STEPS = 3


def _buckets_by_formula(seconds: Tensor, function: TimeBucketFn) -> Tensor:
    """[...] int64 >= 0 seconds -> int64 buckets, in float32 as training computed them, each step rounded correctly.

    Through float64, because torch's float32 functions are off by a unit on some CPUs. A second rounding changes no
    square root (an error of a float64 unit included), and of logarithms none that decides a bucket.
    """
    minutes = (seconds.to(torch.float32).clamp(min=1e-6) / SECONDS_PER_MINUTE).to(torch.float64)
    value = minutes.sqrt() if function == "sqrt" else minutes.log()
    return value.to(torch.float32).clamp(min=0).to(torch.int64)


@functools.lru_cache(maxsize=16)
def distance_thresholds(largest_bucket: int, function: TimeBucketFn) -> Tensor:
    """Smallest distance in seconds of each bucket 0..largest_bucket.

    Found once by bisection over the float32 formula on a CPU: it never descends, so a bucket is a range of integers.

    Returns:
        [largest_bucket + 1] int64, ascending; the first is 0. Buckets that no 62-bit distance reaches are 2**62.
    """
    target = torch.arange(largest_bucket + 1, device="cpu")
    low, high = torch.full_like(target, -1), torch.full_like(target, 1 << 62)
    for _ in range(64):
        middle = low + (high - low) // 2
        reached = _buckets_by_formula(middle.clamp(min=0), function) >= target
        reached &= middle >= 0
        high, low = torch.where(reached, middle, high), torch.where(reached, low, middle)
    return high


def distance_buckets(seconds: Tensor, thresholds: Tensor) -> Tensor:
    """Bucket of each distance: [L] int64 seconds -> [L] int64 in 0..len(thresholds) - 1.

    Counts thresholds, in integers: no runtime can round them, nor hold them in a half type (TensorRT 8 clips a float32
    without an upper bound at 65504 in a half-precision engine: eighteen hours). In three steps of about the cube root
    each: counting all of them takes L * 2048 numbers, and a binary search is a chain of dependent selections that
    TensorRT-RTX does not finish compiling. It computes a step's distance again for every number it is compared with,
    index arithmetic in front of it included, so that fewer numbers are less of that as well.

    Args:
        seconds: distances; negative ones count as 0.
        thresholds: from `distance_thresholds`.
    """
    count, width = thresholds.shape[0], 1
    while width**_SEARCH_STEPS < count:
        width += 1
    largest = torch.iinfo(torch.int64).max
    padding = torch.full((width**_SEARCH_STEPS - count,), largest, device=thresholds.device)
    padded = torch.cat([thresholds, padding])
    distance = torch.where(seconds < 0, 0, seconds)[:, None]
    # Of each step the thresholds that begin a range; all ranges that one before is divided into are a row.
    starts = [padded[:: width**step].view(-1, width) for step in reversed(range(_SEARCH_STEPS))]
    found = (starts[0] <= distance).to(torch.int64).sum(dim=1) - 1
    for rows in starts[1:]:
        found = found * width + (rows.index_select(0, found) <= distance).to(torch.int64).sum(dim=1) - 1
    return found


def circle_table(units: int) -> Tensor:
    """[units, 2] float32: cosine and sine of each unit's angle."""
    angle = torch.arange(units, dtype=torch.float32, device="cpu") / units * 2 * _PI
    return torch.polar(torch.ones_like(angle), angle).view(-1).view(torch.float32).view(-1, 2)


def circle_units(timestamps: Tensor, precision: TimeFeaturePrecision) -> list[Tensor]:
    """Hour of day and day of week (0 is a Thursday): one [T] int64 each.

    Args:
        timestamps: [T] int64 seconds.
        precision: "float32" takes the float32 nearest to each timestamp first: up to 64 s off today, so that near a
            boundary the hour is that of training.
    """
    seconds = timestamps
    if precision == "float32":
        seconds = timestamps.to(torch.float32).to(torch.int64)
    units = []
    for period, count in PERIODS:
        # The remainder first: exporters divide integers in float32, which is exact here and not at an epoch.
        within = seconds % (period * count)
        units.append(torch.div(within, period, rounding_mode="floor"))
    return units
