"""How far an artifact may be from the eager model, and how that distance is measured. Level 1, NumPy alone.

The measure is free of scale: the largest difference in a row over the root mean square of that row of the float64
reference. A row that the reference says is zero must be zero. An absolute tolerance would be vacuous for HSTU, whose
attention outputs shrink with 1/N, and one tolerance over all rows would hide a wrong row among many good ones.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# An artifact may be as wrong as two eager runs of the same precision: it rounds in the same places, in another order.
EAGER_FACTOR = 2.0

# Below this an eager error is luck, not precision (a batch of one event makes few roundings). For fp32 it makes the
# bound 1e-5; for the half types it is four units of roundoff (2**-11, 2**-8), since LN, projections, gate and residual
# each round once. Even the loosest bound, 3.2e-2 for bf16, rejects an output scaled by 0.9.
EAGER_FLOOR = {"fp32": 5e-6, "fp16": 4 * 2.0**-11, "bf16": 4 * 2.0**-8}

# Score of a top-k slot for which no unseen item is left (the model's own constant, without importing torch).
NO_ITEM_SCORE = float(np.finfo(np.float32).min)


@dataclasses.dataclass(frozen=True)
class RowError:
    """Error of a tensor and where it is largest."""

    error: float
    row: int
    max_abs: float


def row_errors(actual: Array, reference: Array) -> Array:
    """Row-scaled difference of each row: largest |actual - reference| over the row's root mean square.

    Args:
        actual: [R, ...] any float type.
        reference: [R, ...] float64, of the same shape.

    Returns:
        [R] float64; infinite where a value is not finite or a zero row is not zero.

    Raises:
        ValueError: if the shapes differ.
    """
    if actual.shape != reference.shape:
        raise ValueError(f"{list(actual.shape)} cannot be compared with {list(reference.shape)}")
    if reference.size == 0:
        return np.zeros(reference.shape[0])
    worst, scale = _row_differences(actual, reference)
    divisor = np.where((scale > 0) & np.isfinite(scale), scale, 1.0)
    scaled: Array = np.where(scale > 0, worst / divisor, np.where(worst > 0, math.inf, 0.0))
    scaled[~np.isfinite(scale)] = math.inf  # of a reference that is not finite
    return scaled


def _row_differences(actual: Array, reference: Array) -> tuple[Array, Array]:
    """Largest absolute difference and root mean square of each row."""
    rows = reference.reshape(reference.shape[0], -1).astype(np.float64)
    difference = np.abs(actual.reshape(rows.shape).astype(np.float64) - rows)
    worst = difference.max(axis=1)
    worst[~np.isfinite(worst)] = math.inf
    return worst, np.sqrt(np.mean(rows * rows, axis=1))


def row_error(actual: Array, reference: Array) -> RowError:
    """Largest row-scaled difference.

    Args:
        actual: [R, C] any float type.
        reference: [R, C] float64.

    Returns:
        The error; infinite when shapes differ, a value is not finite, or a zero row is not zero.
    """
    if actual.shape != reference.shape:
        return RowError(math.inf, 0, math.inf)
    if reference.size == 0:
        return RowError(0.0, 0, 0.0)
    errors = row_errors(actual, reference)
    row = int(np.argmax(errors))
    return RowError(float(errors[row]), row, float(_row_differences(actual, reference)[0].max()))


def whole_error(actual: Sequence[Array], reference: Sequence[Array]) -> float:
    """Root mean square of all differences over that of all reference values, over several batches together.

    Of a quantised artifact the largest difference of a row is that of a few values which were rounded to the other side
    of a step; this one is small and hardly varies, and a wrong factor of a few percent shows in it.

    Args:
        actual: any shapes, any float type.
        reference: float64, of the same shapes.

    Returns:
        Infinite where shapes differ, a value is not finite, or all of the reference is zero and something is not.
    """
    difference = scale = 0.0
    for one, other in zip(actual, reference, strict=True):
        if one.shape != other.shape or not np.isfinite(one).all() or not np.isfinite(other).all():
            return math.inf
        difference += float(((one.astype(np.float64) - other) ** 2).sum())
        scale += float((other * other).sum())
    if not scale:
        return math.inf if difference else 0.0
    return math.sqrt(difference / scale)


def error_bound(eager_error: float, precision: str) -> float:
    """Largest error allowed for an artifact whose eager model, in the same precision, errs by `eager_error`.

    Zero where that is not finite: an eager model that overflows says nothing about how far an artifact may be off.
    """
    if not math.isfinite(eager_error):
        return 0.0
    return EAGER_FACTOR * max(eager_error, EAGER_FLOOR[precision])


def bound_rule(precision: str, quantization: str | None = None) -> str:
    """The rule of `error_bound` in words, for reports."""
    rule = (
        f"per row: max |artifact - float64| / rms(float64 row) <= {EAGER_FACTOR:g} x the same error of the eager "
        f"{precision} model (the largest of several runs, at least {EAGER_FLOOR[precision]:.2g})"
    )
    if quantization is None:
        return rule
    return (
        f"{rule}; and over all rows of a tensor, rms(artifact - float64) / rms(float64) by the same rule; each of "
        f"them rounds to the {quantization} numbers of the plan, and counts at least a half (rows) or an eighth "
        "(tensors) of what that rounding changes"
    )


def top_items_problem(ids: Array, scores: Array, reference_scores: Array, seen: Array, tolerance: float) -> str | None:
    """Why a top-k list is not one that the reference scores allow, or None.

    Near ties may change places, so ids are not compared one by one: each listed item must have the score that the
    reference gives it, and no unlisted item may be better than the worst listed one, both up to `tolerance`.

    Args:
        ids: [B, K] int -- 1-based items, 0 for an empty slot.
        scores: [B, K] float, descending.
        reference_scores: [B, V] float64.
        seen: [B, V] bool -- items of the history, never to be listed.
        tolerance: absolute, in units of the scores.
    """
    if ids.shape != scores.shape or ids.shape[0] != reference_scores.shape[0]:
        return f"{list(ids.shape)} ids and {list(scores.shape)} scores for {reference_scores.shape[0]} sequences"
    for b in range(ids.shape[0]):
        if ids[b].min(initial=0) < 0 or ids[b].max(initial=0) > reference_scores.shape[1]:
            return f"sequence {b} lists an item outside 1..{reference_scores.shape[1]}"
        listed = ids[b][ids[b] > 0].astype(np.int64) - 1
        if len(set(listed.tolist())) != listed.size:
            return f"sequence {b} lists an item twice"
        if seen[b, listed].any():
            return f"sequence {b} lists an item of its own history"
        open_items = np.flatnonzero(~seen[b])
        if listed.size != min(ids.shape[1], open_items.size):
            return f"sequence {b} lists {listed.size} items of {open_items.size} open ones"
        if not (scores[b, listed.size :] == np.float32(NO_ITEM_SCORE)).all():
            return f"sequence {b} gives an empty slot a score"
        gap = np.abs(scores[b, : listed.size] - reference_scores[b, listed])
        if listed.size and not float(gap.max()) <= tolerance:
            return f"sequence {b}: score off by {gap.max():.3g}, allowed {tolerance:.3g}"
        if (np.diff(scores[b]) > 0).any():
            return f"sequence {b} is not in descending order"
        rest = np.setdiff1d(open_items, listed)
        if (
            rest.size
            and listed.size
            and reference_scores[b, rest].max() > reference_scores[b, listed].min() + 2 * tolerance
        ):
            return f"sequence {b} leaves out an item that is better than a listed one"
    return None
