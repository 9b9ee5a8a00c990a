"""Float64 oracle of ``hstu::HstuAttention``, written from the contract and sharing no code with the product.

Two independent readings of HstuAttention_PluginConfig.yaml: ``attention_ref64`` (dense per sequence, explicit [Lq_b,
Lk_b] mask) and ``attention_loops64`` (three Python loops, exact integers; for tiny sizes).  ``attention_low_precision``
is what plain low-precision PyTorch makes of the same case; ``attention_error`` and ``check_attention`` compare without
an absolute tolerance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests import tolerances

Array = NDArray[Any]

#: Inputs of the operator's element type.
ELEMENT_INPUTS = ("q", "k", "v", "k_cached", "v_cached")


@dataclass(frozen=True)
class AttentionAttrs:
    """Attributes of one HstuAttention node that change its result (names and meaning as in the contract).

    ``silu`` changes what a kernel may be off by; the oracle is exact.
    """

    alpha: float = 1.0
    scaling_seq_len: float = 1.0
    target_group_size: int = 1
    contextual_seq_len: int = 0
    max_attn_len: int = 0
    min_full_attn_seq_len: int = 0
    silu: str = "fast"
    pos_table_len: int = 1


@dataclass(frozen=True)
class AttentionCase:
    """One call of the operator: every input as NumPy, ready for any implementation.

    Attributes:
        name: shown in test ids.
        dtype: "float32", "float16" or "bfloat16": the type of q, k, v and out.
        q: [Lq, H, Dqk] float32 whose values are exact in ``dtype``; k [Lk, H, Dqk] and v [Lk, H, Dv] likewise.
        q_offsets: [B + 1] int32; k_offsets the same.  They may be invalid on purpose.
        num_targets: [B] int32 or None; contextual_seq_lens [B] int32 or None; scaling_seq_lens [B] float32 or None.
        row_timestamps: [Lq] int64 or int32, seconds, or None; col_timestamps [Lk].
        pos_table: [Hp, 2 * pos_table_len - 1] float32 or None.
        ts_table: [Ht, num_buckets + 1] float32 or None; ts_thresholds [num_buckets] of the timestamps' type.
        k_cached: [Lc, H, Dqk] like k, or None: keys in front of k's; v_cached [Lc, H, Dv] and cache_offsets [B + 1]
            int32 with it.  col_timestamps are then [Lc + Lk], of the joined keys.
        attrs: the node's attributes.
    """

    name: str
    dtype: str
    q: Array
    k: Array
    v: Array
    q_offsets: Array
    k_offsets: Array
    num_targets: Array | None = None
    contextual_seq_lens: Array | None = None
    scaling_seq_lens: Array | None = None
    row_timestamps: Array | None = None
    col_timestamps: Array | None = None
    pos_table: Array | None = None
    ts_table: Array | None = None
    ts_thresholds: Array | None = None
    k_cached: Array | None = None
    v_cached: Array | None = None
    cache_offsets: Array | None = None
    attrs: AttentionAttrs = field(default_factory=AttentionAttrs)

    def optional_inputs(self) -> dict[str, Array | None]:
        """Return the optional inputs by their contract names, None where absent."""
        names = (
            "num_targets",
            "contextual_seq_lens",
            "scaling_seq_lens",
            "row_timestamps",
            "col_timestamps",
            "pos_table",
            "ts_table",
            "ts_thresholds",
            "k_cached",
            "v_cached",
            "cache_offsets",
        )
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class OracleResult:
    """What the contract says, in float64.

    Attributes:
        out: [Lq, H, Dv] the output.
        scale: [Lq, H, Dv] |A| @ |V|, the size of what was summed for each element.
        score_scale: [Lq, H, Dv] (|SiLU'(S)| * (|alpha| |q| @ |k| + |bias|)) @ |V|: how a relative rounding of the
            score's terms reaches the element.  It matters where a score is a small difference of large terms.
        sequence: [Lq] the sequence of each row, -1 outside all sequences.
    """

    out: Array
    scale: Array
    score_scale: Array
    sequence: Array


@dataclass(frozen=True)
class ErrorReport:
    """Scale-free error of an output.

    Attributes:
        componentwise: max |diff| / (scale + w * score_scale), w from ``tolerances.SCORE_WEIGHT``; inf when an element
            that must be exactly 0 is not, or when any element is not finite.
        rms: max |diff| / rms(ref) over the elements that are not exactly 0 by contract; inf as above.
        where: sequence, row in the sequence, head, column, actual and expected value of the worst element.
        rows: up to eight worst rows, as ``sequence/row/head: error``.
    """

    componentwise: float
    rms: float
    where: str
    rows: tuple[str, ...]


@dataclass(frozen=True)
class ErrorBound:
    """Largest accepted ``componentwise`` and ``rms`` of an :class:`ErrorReport`."""

    componentwise: float
    rms: float


def _are_offsets_valid(offsets: Array, length: int) -> bool:
    steps = offsets.astype(np.int64)
    return bool(steps[0] == 0 and np.all(np.diff(steps) >= 0) and steps[-1] <= length)


def _are_key_offsets_valid(k_offsets: Array, k: Array, cache_offsets: Array | None, k_cached: Array | None) -> bool:
    if not _are_offsets_valid(k_offsets, len(k)):
        return False
    return cache_offsets is None or k_cached is None or _are_offsets_valid(cache_offsets, len(k_cached))


def _keys_of(b: int, rows: Array, offsets: Array, cached: Array | None, cache_offsets: Array | None) -> Array:
    """Return the keys or values of sequence ``b``: its cached rows, then its own."""
    own = rows[int(offsets[b]) : int(offsets[b + 1])]
    if cached is None or cache_offsets is None:
        return own
    return np.concatenate([cached[int(cache_offsets[b]) : int(cache_offsets[b + 1])], own])


def _first_key(b: int, k_offsets: Array, cache_offsets: Array | None) -> int:
    """Return where the joined keys of sequence ``b`` begin among those of all sequences."""
    return int(k_offsets[b]) + (0 if cache_offsets is None else int(cache_offsets[b]))


def _valid_attn_mask(num_queries: int, num_keys: int, targets: int, context: int, attrs: AttentionAttrs) -> Array:
    """Return the [num_queries, num_keys] mask of one sequence; True where the query may attend to the key."""
    history = num_keys - targets
    i = (num_keys - num_queries + np.arange(num_queries, dtype=np.int64))[:, None]
    j = np.arange(num_keys, dtype=np.int64)[None, :]
    group = attrs.target_group_size
    causal = (j <= i) & (j < history)
    same_group = (i >= history) & (j >= history) & (j <= i) & ((i - history) // group == (j - history) // group)
    prefix = (j < history) | (j == i)
    mask = np.where(i < context, prefix, causal | same_group)
    if attrs.max_attn_len > 0:
        offset = max(context - 1, 0)
        p_row = np.where(i < context, 0, np.minimum(i, history) - offset)
        p_col = np.where(j < context, 0, np.minimum(j, history) - offset)
        near = p_row - p_col <= attrs.max_attn_len
        if attrs.min_full_attn_seq_len > 0:
            near = near | (p_row >= history - offset - attrs.min_full_attn_seq_len)
        mask = mask & (near | (i < context))
    return mask & (i >= 0)


def _buckets(row_times: Array, col_times: Array, thresholds: Array) -> Array:
    """Return the [num_queries, num_keys] time buckets; |dt| in uint64, exact for any pair of int64."""
    row = row_times.astype(np.int64)[:, None]
    col = col_times.astype(np.int64)[None, :]
    high = np.maximum(row, col).astype(np.uint64)
    low = np.minimum(row, col).astype(np.uint64)
    return np.searchsorted(thresholds.astype(np.uint64), high - low, side="right")


def attention_ref64(
    q: Array,
    k: Array,
    v: Array,
    q_offsets: Array,
    k_offsets: Array,
    *,
    num_targets: Array | None = None,
    contextual_seq_lens: Array | None = None,
    scaling_seq_lens: Array | None = None,
    row_timestamps: Array | None = None,
    col_timestamps: Array | None = None,
    pos_table: Array | None = None,
    ts_table: Array | None = None,
    ts_thresholds: Array | None = None,
    k_cached: Array | None = None,
    v_cached: Array | None = None,
    cache_offsets: Array | None = None,
    attrs: AttentionAttrs,
) -> OracleResult:
    """Return the contract's output in float64, one dense masked product per sequence and head.

    Args:
        q: [Lq, H, Dqk]; k [Lk, H, Dqk]; v [Lk, H, Dv]; any float dtype.
        q_offsets: [B + 1] int32; k_offsets likewise.  Invalid offsets give an all-zero output.
        num_targets: [B] int32, clamped to [0, Lk_b]; the other inputs as in :class:`AttentionCase`.
        attrs: the node's attributes.

    Notes:
        Defined beyond the contract's formula, because device data may be hostile: num_targets and contextual lengths
        are clamped to [0, Lk_b], positions to the ends of pos_table, and a query row before the first key (Lq_b > Lk_b)
        attends to nothing. Values the mask hides do not reach the result, whatever they are.
    """
    shape = (q.shape[0], q.shape[1], v.shape[2])
    out, scale, score_scale = (np.zeros(shape) for _ in range(3))
    sequence = np.full(shape[0], -1)
    if not (_are_offsets_valid(q_offsets, len(q)) and _are_key_offsets_valid(k_offsets, k, cache_offsets, k_cached)):
        return OracleResult(out, scale, score_scale, sequence)
    for b in range(len(q_offsets) - 1):
        rows = slice(int(q_offsets[b]), int(q_offsets[b + 1]))
        if rows.start == rows.stop:
            continue
        keys = _keys_of(b, k, k_offsets, k_cached, cache_offsets)
        values = _keys_of(b, v, k_offsets, v_cached, cache_offsets)
        sequence[rows] = b
        num_queries, num_keys = rows.stop - rows.start, len(keys)
        first = _first_key(b, k_offsets, cache_offsets)
        cols = slice(first, first + num_keys)
        targets = 0 if num_targets is None else int(np.clip(num_targets[b], 0, num_keys))
        context = attrs.contextual_seq_len if contextual_seq_lens is None else max(int(contextual_seq_lens[b]), 0)
        divisor = attrs.scaling_seq_len if scaling_seq_lens is None else float(scaling_seq_lens[b])
        mask = _valid_attn_mask(num_queries, num_keys, targets, context, attrs)
        history = num_keys - targets
        i = np.minimum(num_keys - num_queries + np.arange(num_queries), history)[:, None]
        j = np.minimum(np.arange(num_keys), history)[None, :]
        for head in range(shape[1]):
            q_h, k_h = q[rows, head].astype(np.float64), keys[:, head].astype(np.float64)
            v_h = values[:, head].astype(np.float64)
            bias = np.zeros(mask.shape)
            if pos_table is not None:
                table = pos_table[head if len(pos_table) > 1 else 0].astype(np.float64)
                bias += table[np.clip(attrs.pos_table_len - 1 + j - i, 0, len(table) - 1)]
            if ts_table is not None:
                assert row_timestamps is not None
                assert col_timestamps is not None
                assert ts_thresholds is not None
                table = ts_table[head if len(ts_table) > 1 else 0].astype(np.float64)
                bias += table[_buckets(row_timestamps[rows], col_timestamps[cols], ts_thresholds)]
            score = np.where(mask, attrs.alpha * (q_h @ k_h.T) + bias, 0.0)
            sigmoid = 1.0 / (1.0 + np.exp(-score))
            weight = np.where(mask, score * sigmoid, 0.0) / divisor
            slope = np.abs(sigmoid * (1.0 + score * (1.0 - sigmoid)))
            terms = abs(attrs.alpha) * (np.abs(q_h) @ np.abs(k_h).T) + np.abs(bias)
            out[rows, head] = _masked_product(weight, mask, v_h)
            scale[rows, head] = _masked_product(np.abs(weight), mask, np.abs(v_h))
            score_scale[rows, head] = _masked_product(
                np.where(mask, slope * terms, 0.0) / abs(divisor), mask, np.abs(v_h)
            )
    return OracleResult(out, scale, score_scale, sequence)


def _masked_product(weight: Array, mask: Array, v_h: Array) -> Array:
    """Return weight @ v_h without the products the mask hides, so that a hidden NaN or Inf stays hidden."""
    if np.isfinite(v_h).all():
        return weight @ v_h
    return np.stack([weight[r, mask[r]] @ v_h[mask[r]] for r in range(len(weight))])


def oracle_of(case: AttentionCase) -> OracleResult:
    """Return ``attention_ref64`` of a case."""
    with np.errstate(invalid="ignore", over="ignore"):
        return attention_ref64(
            case.q, case.k, case.v, case.q_offsets, case.k_offsets, attrs=case.attrs, **case.optional_inputs()
        )


def attention_loops64(case: AttentionCase) -> Array:
    """Return the output of ``case`` [Lq, H, Dv] by three loops: the contract's text, line by line."""
    attrs = case.attrs
    out = np.zeros((len(case.q), case.q.shape[1], case.v.shape[2]))
    key_offsets = (case.k_offsets, case.k, case.cache_offsets, case.k_cached)
    if not (_are_offsets_valid(case.q_offsets, len(case.q)) and _are_key_offsets_valid(*key_offsets)):
        return out
    for b in range(len(case.q_offsets) - 1):
        q0, q1 = int(case.q_offsets[b]), int(case.q_offsets[b + 1])
        k0, k1 = int(case.k_offsets[b]), int(case.k_offsets[b + 1])
        c0, c1 = (0, 0) if case.cache_offsets is None else map(int, case.cache_offsets[b : b + 2])
        length = c1 - c0 + k1 - k0
        targets = min(max(int(case.num_targets[b]), 0), length) if case.num_targets is not None else 0
        h = length - targets
        c = int(case.contextual_seq_lens[b]) if case.contextual_seq_lens is not None else attrs.contextual_seq_len
        c = max(c, 0)
        divisor = float(case.scaling_seq_lens[b]) if case.scaling_seq_lens is not None else attrs.scaling_seq_len
        p_top = h - max(c - 1, 0)

        def position(index: int, c: int = c, h: int = h) -> int:
            return 0 if index < c else min(index, h) - max(c - 1, 0)

        for r in range(q1 - q0):
            i = length - (q1 - q0) + r
            for j in range(length):
                if i < 0:
                    continue
                if i < c:
                    allowed = j < h or j == i
                else:
                    allowed = j <= i and j < h
                    if i >= h and h <= j <= i:
                        allowed = (i - h) // attrs.target_group_size == (j - h) // attrs.target_group_size
                    if attrs.max_attn_len > 0 and position(i) - position(j) > attrs.max_attn_len:
                        exempt = attrs.min_full_attn_seq_len > 0 and position(i) >= p_top - attrs.min_full_attn_seq_len
                        allowed = allowed and exempt
                if not allowed:
                    continue
                if j < c1 - c0:
                    assert case.k_cached is not None
                    assert case.v_cached is not None
                    key, value = case.k_cached[c0 + j], case.v_cached[c0 + j]
                else:
                    key, value = case.k[k0 + j - (c1 - c0)], case.v[k0 + j - (c1 - c0)]
                for head in range(out.shape[1]):
                    score = attrs.alpha * math.fsum(
                        float(a) * float(b_) for a, b_ in zip(case.q[q0 + r, head], key[head], strict=True)
                    )
                    if case.pos_table is not None:
                        at = attrs.pos_table_len - 1 + min(j, h) - min(i, h)
                        row = case.pos_table[head % len(case.pos_table)]
                        score += float(row[min(max(at, 0), len(row) - 1)])
                    if case.ts_table is not None:
                        assert case.row_timestamps is not None
                        assert case.col_timestamps is not None
                        assert case.ts_thresholds is not None
                        distance = abs(int(case.row_timestamps[q0 + r]) - int(case.col_timestamps[c0 + k0 + j]))
                        bucket = sum(int(t) <= distance for t in case.ts_thresholds)
                        score += float(case.ts_table[head % len(case.ts_table)][bucket])
                    weight = score / (1.0 + math.exp(-score)) / divisor
                    out[q0 + r, head] += weight * value[head].astype(np.float64)
    return out


def attention_low_precision(case: AttentionCase) -> Array:
    """Return what plain PyTorch on CPU computes for ``case`` in its dtype.

    Products, SiLU and sums are each rounded to that dtype.  The bias is added in ``dtype`` too.  Its error is the
    yardstick of house rule 3.7 (a kernel may have at most twice
    that).
    """
    import torch

    dtype = getattr(torch, case.dtype)
    out = np.zeros((len(case.q), case.q.shape[1], case.v.shape[2]), dtype=np.float32)
    reference = oracle_of(case)
    for b in range(len(case.q_offsets) - 1):
        if not np.any(reference.sequence == b):
            continue
        rows = slice(int(case.q_offsets[b]), int(case.q_offsets[b + 1]))
        keys = _keys_of(b, case.k, case.k_offsets, case.k_cached, case.cache_offsets)
        values = _keys_of(b, case.v, case.k_offsets, case.v_cached, case.cache_offsets)
        num_queries, num_keys = rows.stop - rows.start, len(keys)
        first = _first_key(b, case.k_offsets, case.cache_offsets)
        cols = slice(first, first + num_keys)
        targets = 0 if case.num_targets is None else int(np.clip(case.num_targets[b], 0, num_keys))
        lens = case.contextual_seq_lens
        context = case.attrs.contextual_seq_len if lens is None else max(int(lens[b]), 0)
        divisor = case.attrs.scaling_seq_len if case.scaling_seq_lens is None else float(case.scaling_seq_lens[b])
        mask = torch.from_numpy(_valid_attn_mask(num_queries, num_keys, targets, context, case.attrs))
        history = num_keys - targets
        i = np.minimum(num_keys - num_queries + np.arange(num_queries), history)[:, None]
        j = np.minimum(np.arange(num_keys), history)[None, :]
        for head in range(case.q.shape[1]):
            q_h = torch.from_numpy(case.q[rows, head]).to(dtype)
            k_h = torch.from_numpy(keys[:, head]).to(dtype)
            v_h = torch.from_numpy(values[:, head]).to(dtype)
            score = (q_h @ k_h.T) * case.attrs.alpha
            if case.pos_table is not None:
                table = case.pos_table[head % len(case.pos_table)]
                at = np.clip(case.attrs.pos_table_len - 1 + j - i, 0, len(table) - 1)
                score = score + torch.from_numpy(table[at]).to(dtype)
            if case.ts_table is not None:
                assert case.row_timestamps is not None
                assert case.col_timestamps is not None
                assert case.ts_thresholds is not None
                at = _buckets(case.row_timestamps[rows], case.col_timestamps[cols], case.ts_thresholds)
                score = score + torch.from_numpy(case.ts_table[head % len(case.ts_table)][at]).to(dtype)
            weight = torch.where(mask, torch.nn.functional.silu(score) / divisor, torch.zeros((), dtype=dtype))
            out[rows, head] = (weight @ v_h).float().numpy()
    return out


def attention_error(actual: Array, result: OracleResult, dtype: str) -> ErrorReport:
    """Measure ``actual`` [Lq, H, Dv] against the oracle without an absolute tolerance; see :class:`ErrorReport`."""
    if actual.shape != result.out.shape:
        raise ValueError(f"attention output has shape {actual.shape}, the oracle {result.out.shape}")
    if actual.size == 0:
        return ErrorReport(0.0, 0.0, "no elements", ())
    given = actual.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        diff = np.abs(given - result.out)
        divisor = result.scale + tolerances.SCORE_WEIGHT[dtype] * result.score_scale
        beyond = np.maximum(diff - tolerances.SUBNORMAL_STEP[dtype], 0.0)
        ratio = np.where(divisor > 0, beyond / np.where(divisor > 0, divisor, 1.0), np.where(given == 0, 0.0, np.inf))
        ratio = np.where(np.isfinite(given), ratio, np.inf)
    summed = result.out[result.scale > 0]
    rms_ref = float(np.sqrt(np.mean(summed**2))) if summed.size else 0.0
    worst_rms = float("inf") if not np.isfinite(ratio).all() else 0.0 if rms_ref == 0 else float(diff.max()) / rms_ref

    def label(row: int, head: int) -> str:
        b = int(result.sequence[row])
        first = int(np.argmax(result.sequence == b))
        return (
            f"sequence {b} row {row - first} head {head} (token {row})"
            if b >= 0
            else f"token {row} head {head} (no sequence)"
        )

    row, head, col = (int(x) for x in np.unravel_index(int(np.argmax(ratio)), ratio.shape))
    where = (
        f"{label(row, head)} column {col}: got {given[row, head, col]:.9g}, expected {result.out[row, head, col]:.9g}"
    )
    per_row = ratio.max(axis=2)
    order = np.argsort(-per_row, axis=None, kind="stable")[:8]
    rows = tuple(
        f"{label(int(r), int(h))}: {per_row[r, h]:.3g}"
        for r, h in zip(*np.unravel_index(order, per_row.shape), strict=True)
    )
    return ErrorReport(float(ratio.max()), worst_rms, where, rows)


def error_bound(dtype: str, low_precision: ErrorReport | None = None) -> ErrorBound:
    """Return what an implementation in ``dtype`` may differ from the oracle.

    Without ``low_precision`` this is the dtype's fixed bound (a kernel with float32 sums).  With it, house rule 3.7:
    twice the error of plain low-precision PyTorch, but never below the fixed bound, which is a few units of rounding.
    """
    fixed = ErrorBound(tolerances.COMPONENTWISE[dtype], tolerances.RMS[dtype])
    if low_precision is None:
        return fixed
    factor = tolerances.LOW_PRECISION_FACTOR
    componentwise = min(
        max(factor * low_precision.componentwise, fixed.componentwise), tolerances.LARGEST_COMPONENTWISE
    )
    return ErrorBound(componentwise, min(max(factor * low_precision.rms, fixed.rms), tolerances.LARGEST_RMS))


def check_attention(actual: Array, result: OracleResult, dtype: str, bound: ErrorBound | None = None) -> ErrorReport:
    """Assert that ``actual`` agrees with the oracle; return the measured error.

    Raises:
        AssertionError: names the worst sequence, row and head, both values, both errors and bounds.
    """
    bound = bound or error_bound(dtype)
    report = attention_error(actual, result, dtype)
    if not (report.componentwise <= bound.componentwise and report.rms <= bound.rms):
        raise AssertionError(
            f"attention ({dtype}) differs from the float64 oracle: componentwise {report.componentwise:.3g} "
            f"(bound {bound.componentwise:.3g}), rms {report.rms:.3g} (bound {bound.rms:.3g}); "
            f"worst at {report.where}; worst rows:\n  " + "\n  ".join(report.rows)
        )
    return report
