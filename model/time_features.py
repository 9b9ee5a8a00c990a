"""Timestamps as a ranking model reads them: distance buckets, and hour and weekday on a circle. Level 1.

Both come from formulas that the original evaluates in float32. Here integer comparisons and table lookups decide, so
that every device gives the same answers, whatever its square root.
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
# Buckets on either side of the device's own that are looked at. One is enough for tables of 2048 rows. Up to three,
# TensorRT-RTX 1.6.1 writes out the sum of the 2 * _REACH comparisons and computes it in the kernel that adds the rows,
# again for every column.
_REACH = 4


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


def distance_buckets(seconds: Tensor, thresholds: Tensor, function: TimeBucketFn) -> Tensor:
    """Bucket of each distance: [L] int64 seconds -> [L] int64 in 0..len(thresholds) - 1.

    The formula finds a bucket that may be off by some, as a device rounds it; integer comparisons with the thresholds
    around it count by how many. In one step, as each costs TensorRT-RTX a kernel: counting in integers alone takes
    L * 2048 numbers or several steps, and a binary search is a chain that TensorRT-RTX does not finish compiling.

    Exact wherever the device's value is at most `_REACH` from that of `_buckets_by_formula`. What is less than a minute
    counts as one, which moves a value by 1 at most. Else the two differ by what is rounded: of the distance, of the
    quotient and of the function, each by at most u float32 units in the last place, on either side. For values up to
    N, beyond which both are the last bucket, that is below 2 * 3u * N * 2**-23: 0.15 for N = 2048 and u = 100, and 3
    for the 2**20 rows that a table may have and u = 4. Logarithms are below 44.

    Args:
        seconds: distances below 2**62; negative ones count as 0.
        thresholds: from `distance_thresholds`.
        function: that of `thresholds`.
    """
    limits, width = torch.iinfo(torch.int64), 2 * _REACH
    # A negative distance has reached bucket 0 and what would be below it, and no distance has reached the padding.
    below, above = thresholds.new_full((_REACH,), limits.min), thresholds.new_full((_REACH,), limits.max)
    padded = torch.cat([below, thresholds[1:], above])
    nearby = _nearby_buckets(seconds, function).clamp(max=thresholds.shape[0] - 1)
    # Of bucket b, the thresholds of b - _REACH + 1 to b + _REACH.
    index = nearby[:, None] + torch.arange(width, device=seconds.device)
    window = padded.index_select(0, index.view(-1)).view(-1, width)
    return nearby - _REACH + (window <= seconds[:, None]).to(torch.int64).sum(dim=1)


def _nearby_buckets(seconds: Tensor, function: TimeBucketFn) -> Tensor:
    """[...] int64 seconds -> int64 buckets >= 0 by the formula, without a largest one, as the device rounds it.

    No constant here is beyond float16: TensorRT 8 rounds constants to half in a half-precision engine, also those of
    a float32 layer.
    """
    minutes = (seconds.to(torch.float32) / SECONDS_PER_MINUTE).clamp(min=1)
    value = minutes.sqrt() if function == "sqrt" else minutes.log()
    return value.to(torch.int64)


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
