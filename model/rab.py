"""Relative attention bias: position table and time buckets with exact integer boundaries. Level 1."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.lru_cache(maxsize=32)
def time_bucket_thresholds(num_buckets: int, divisor: float) -> Tensor:
    """Smallest |dt| in seconds of each bucket 1..num_buckets of trunc(ln(max(|dt|, 1)) / divisor).

    The original evaluates the logarithm in float32, whose rounding differs between devices near a boundary. Here the
    boundary is found once, by bisection over the float32 formula with a logarithm of float64 rounded to float32, the
    same on every CPU, and from then on a bucket is a comparison of integers: the same everywhere.
    Source: RelativeBucketedTimeAndPositionBasedBias of Meta's research HSTU.

    Args:
        num_buckets: last bucket index, >= 1.
        divisor: divisor of the natural logarithm, > 0.

    Returns:
        [num_buckets] int64, ascending. A bucket that no int64 reaches has threshold 2**63 - 1.
    """
    if num_buckets < 1 or not divisor > 0:
        raise ValueError(f"num_buckets {num_buckets} must be at least 1 and divisor {divisor} greater than 0")
    # On the CPU whatever the default device is: the result is cached.
    target = torch.arange(1, num_buckets + 1, device="cpu")
    low = torch.zeros_like(target)  # bucket(low) < target always holds: bucket(0) is 0
    high = torch.full_like(target, torch.iinfo(torch.int64).max)
    for _ in range(64):
        middle = low + (high - low) // 2
        gap = middle.clamp(min=1).to(torch.float32).to(torch.float64)
        bucket = (torch.log(gap).to(torch.float32) / divisor).to(torch.int64)
        reached = bucket >= target
        high = torch.where(reached, middle, high)
        low = torch.where(reached, low, middle)
    return high


def time_buckets(row_timestamps: Tensor, col_timestamps: Tensor, thresholds: Tensor) -> Tensor:
    """Bucket of every pair's time difference.

    Args:
        row_timestamps: [B, Nq] int64 seconds -- query side.
        col_timestamps: [B, Nk] int64 seconds -- key side.
        thresholds: [num_buckets] int64 -- from `time_bucket_thresholds`.

    Returns:
        [B, Nq, Nk] int64 in 0..num_buckets.
    """
    row, col = row_timestamps[:, :, None], col_timestamps[:, None, :]
    gap = torch.maximum(row, col) - torch.minimum(row, col)
    # A difference beyond the type wraps to a negative number; it is in the last bucket that the type can reach.
    gap = torch.where(gap < 0, torch.iinfo(gap.dtype).max, gap)
    return torch.bucketize(gap, thresholds, right=True)


def relative_attention_bias(
    query_pos: Tensor,
    key_pos: Tensor,
    history: Tensor,
    pos_table: Tensor | None,
    buckets: Tensor | None,
    ts_table: Tensor | None,
) -> Tensor | None:
    """Bias added to the scaled scores before SiLU; every candidate is biased as the next step after the history.

    Args:
        query_pos: [B, Nq, 1] int absolute rows.
        key_pos: [1, 1, Nk] int absolute rows.
        history: [B, 1, 1] int -- rows that are not candidates.
        pos_table: [Hp, 2N - 1] float or None; entry N - 1 is distance 0, negative distances (the past) lie before it.
        buckets: [B, Nq, Nk] int or None.
        ts_table: [Ht, num_buckets + 1] float or None.

    Returns:
        [B, 1 or H, Nq, Nk] float, or None without tables.
    """
    bias: Tensor | None = None
    if pos_table is not None:
        origin = (pos_table.shape[1] - 1) // 2
        index = origin + torch.minimum(key_pos, history) - torch.minimum(query_pos, history)
        bias = pos_table[:, index.clamp(0, pos_table.shape[1] - 1)].transpose(0, 1)
    if ts_table is not None:
        assert buckets is not None
        time_bias = ts_table[:, buckets].transpose(0, 1)
        bias = time_bias if bias is None else bias + time_bias
    return bias
