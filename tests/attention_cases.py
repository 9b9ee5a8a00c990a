"""Builders of :class:`tests.oracle.AttentionCase`: O(1) random inputs for ragged shapes, masks and biases.

Values are drawn so that outputs are O(1): scores have mean and deviation near 1, v has mean 1 and the divisor is near
the sequence lengths.  ``attention_grid`` is the fixed grid that every implementation (interpreter, GPU, C++, ONNX,
eager) must pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from tests.oracle import Array, AttentionAttrs, AttentionCase

#: Around these block sizes the grid takes one less, equal and one more.
TILE = 16


def round_to_dtype(values: Array, dtype: str) -> Array:
    """Return float32 ``values`` rounded to nearest even in ``dtype`` ("float32", "float16", "bfloat16"), as float32."""
    single = values.astype(np.float32)
    if dtype == "float32":
        return single
    if dtype == "float16":
        return single.astype(np.float16).astype(np.float32)
    bits = single.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32)
    return rounded.view(np.float32)


def offsets_of(lengths: Sequence[int]) -> Array:
    """Return the [B + 1] int32 offsets of ``lengths``."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def geometric_thresholds(num_buckets: int, ratio: float, bits: int) -> Array:
    """Return ascending integer thresholds ceil(ratio^m), m = 1..num_buckets, saturated at the type's largest value."""
    largest = 2 ** (bits - 1) - 1
    exact = [
        min(int(np.ceil(ratio**m)), largest) if m * np.log2(ratio) < 62 else largest for m in range(1, num_buckets + 1)
    ]
    return np.array(exact, dtype=np.int64 if bits == 64 else np.int32)


def build_case(
    seq_lengths: Sequence[int],
    *,
    name: str = "case",
    dtype: str = "float32",
    num_heads: int = 2,
    dqk: int = 16,
    dv: int = 16,
    query_lengths: Sequence[int] | None = None,
    num_targets: Sequence[int] | None = None,
    target_group_size: int = 1,
    contextual_seq_len: int = 0,
    contextual_seq_lens: Sequence[int] | None = None,
    max_attn_len: int = 0,
    min_full_attn_seq_len: int = 0,
    per_sequence_scale: bool = False,
    pos_bias: str = "none",
    pos_table_len: int | None = None,
    time_bias: str = "none",
    timestamp_bits: int = 64,
    num_buckets: int = 24,
    bucket_ratio: float = 2.0,
    next_timestamp: bool = False,
    tail: int = 0,
    seed: int = 0,
) -> AttentionCase:
    """Draw one case.

    Args:
        seq_lengths: Lk_b of each sequence.
        query_lengths: Lq_b <= Lk_b; None means Lq_b = Lk_b.
        pos_bias: "none", "shared" (Hp = 1) or "per_head"; time_bias likewise.
        pos_table_len: N of the position table; None means the longest sequence.
        timestamp_bits: 64 or 32.
        next_timestamp: row_timestamps hold the next event's time (research), else the own one.
        tail: extra rows after the last sequence in q, k, v and the timestamps: NaN, Inf and extreme times.
        seed: of the generator.
    """
    rng = np.random.default_rng(seed)
    query_lengths = list(seq_lengths) if query_lengths is None else list(query_lengths)
    num_rows, num_cols = sum(query_lengths) + tail, sum(seq_lengths) + tail
    scale_base = float(max(1, *seq_lengths)) if len(seq_lengths) > 0 else 1.0
    alpha = 1.0 / np.sqrt(dqk)
    q = rng.standard_normal((num_rows, num_heads, dqk))
    k = rng.standard_normal((num_cols, num_heads, dqk)) + 1.0 / np.sqrt(dqk)
    v = rng.standard_normal((num_cols, num_heads, dv)) + 1.0
    if tail:
        q[num_rows - tail :] = np.nan
        k[num_cols - tail :] = np.inf
        v[num_cols - tail :] = np.nan
    table_len = pos_table_len or max(1, *seq_lengths, 1)
    heads = {"none": 0, "shared": 1, "per_head": num_heads}
    pos_table = rng.standard_normal((heads[pos_bias], 2 * table_len - 1)).astype(np.float32) * 0.5
    ts_table = rng.standard_normal((heads[time_bias], num_buckets + 1)).astype(np.float32) * 0.5

    row_times = col_times = thresholds = None
    if time_bias != "none":
        kind = np.int64 if timestamp_bits == 64 else np.int32
        rows, cols = [], []
        for length, queries in zip(seq_lengths, query_lengths, strict=True):
            # Sessions: mostly seconds between events, now and then days.
            gaps = np.where(
                rng.random(length + 1) < 0.15,
                rng.integers(3600, 3_000_000, length + 1),
                rng.integers(0, 90, length + 1),
            )
            times = np.cumsum(gaps) + (1_600_000_000 if timestamp_bits == 64 else 1_000_000_000)
            cols.append(times[:length])
            own = times[1:] if next_timestamp else times[:length]
            rows.append(own[length - queries :])
        extremes = np.resize(np.array([np.iinfo(kind).max, np.iinfo(kind).min]), tail)
        row_times = np.concatenate([*rows, extremes]).astype(kind)
        col_times = np.concatenate([*cols, extremes]).astype(kind)
        thresholds = geometric_thresholds(num_buckets, bucket_ratio, timestamp_bits)

    attrs = AttentionAttrs(
        alpha=float(np.float32(alpha)),
        scaling_seq_len=scale_base,
        target_group_size=target_group_size,
        contextual_seq_len=contextual_seq_len,
        max_attn_len=max_attn_len,
        min_full_attn_seq_len=min_full_attn_seq_len,
        pos_table_len=table_len,
    )
    return AttentionCase(
        name=name,
        dtype=dtype,
        q=round_to_dtype(q, dtype),
        k=round_to_dtype(k, dtype),
        v=round_to_dtype(v, dtype),
        q_offsets=offsets_of(query_lengths),
        k_offsets=offsets_of(seq_lengths),
        num_targets=None if num_targets is None else np.array(num_targets, dtype=np.int32),
        contextual_seq_lens=None if contextual_seq_lens is None else np.array(contextual_seq_lens, dtype=np.int32),
        scaling_seq_lens=np.maximum(np.array(seq_lengths, dtype=np.float32), 1.0) if per_sequence_scale else None,
        row_timestamps=row_times,
        col_timestamps=col_times,
        pos_table=pos_table if pos_bias != "none" else None,
        ts_table=ts_table if time_bias != "none" else None,
        ts_thresholds=thresholds,
        attrs=attrs,
    )


def with_cache(case: AttentionCase, cached_lengths: Sequence[int], tail: int = 0, name: str = "") -> AttentionCase:
    """Return ``case`` with the first keys of each sequence in a cache, and the same result.

    Args:
        case: without a cache, whose offsets are legal; rows of its keys behind the last sequence are dropped.
        cached_lengths: how many keys of each sequence are cached.
        tail: extra rows behind the last sequence in k, v, k_cached, v_cached and the columns' timestamps, which nobody
            may read: NaN, Inf and extreme times.
        name: of the new case; empty is the old one's with "-cached" behind it.
    """
    lengths = np.diff(case.k_offsets)
    assert case.cache_offsets is None
    assert all(0 <= cached <= length for cached, length in zip(cached_lengths, lengths, strict=True))
    is_cached = np.concatenate(
        [np.zeros(0, bool), *(np.arange(n) < c for n, c in zip(lengths, cached_lengths, strict=True))]
    )

    def part(rows: Array, kept: Array, garbage: float) -> Array:
        return np.concatenate([rows[: len(kept)][kept], np.full((tail, *rows.shape[1:]), garbage, rows.dtype)])

    times = case.col_timestamps
    if times is not None:
        extremes = np.resize(np.array([np.iinfo(times.dtype).max, np.iinfo(times.dtype).min]), 2 * tail)
        times = np.concatenate([times[: len(is_cached)], extremes.astype(times.dtype)])
    return dataclasses.replace(
        case,
        name=name or f"{case.name}-cached",
        k=part(case.k, ~is_cached, np.inf),
        v=part(case.v, ~is_cached, np.nan),
        k_cached=part(case.k, is_cached, np.nan),
        v_cached=part(case.v, is_cached, np.inf),
        k_offsets=offsets_of(list(lengths - np.array(cached_lengths, dtype=lengths.dtype))),
        cache_offsets=offsets_of(cached_lengths),
        col_timestamps=times,
    )


def among_others(case: AttentionCase, gaps: Sequence[int], name: str = "") -> AttentionCase:
    """Return ``case`` with rows of others between the cached rows of its sequences, and the same result.

    In front of every sequence comes one without queries and new keys that owns them: a cache that is given whole.

    Args:
        case: with a cache, without timestamps.
        gaps: rows in front of each sequence's, NaN or Inf, which nobody may read.
        name: of the new case; empty is the old one's with "-among-others" behind it.
    """
    assert case.k_cached is not None
    assert case.v_cached is not None
    assert case.cache_offsets is not None
    assert case.col_timestamps is None
    lengths = np.diff(case.cache_offsets)

    def spread(rows: Array, garbage: float) -> Array:
        parts = []
        for start, length, gap in zip(case.cache_offsets, lengths, gaps, strict=False):
            parts += [np.full((gap, *rows.shape[1:]), garbage, rows.dtype), rows[start : start + length]]
        return np.concatenate([*parts, rows[case.cache_offsets[-1] :]])

    def doubled(values: Array | None, first: int | None = None) -> Array | None:
        if values is None:
            return None
        fillers = values if first is None else np.full_like(values, first)
        return np.column_stack([fillers, values]).ravel()

    def without_rows(offsets: Array) -> Array:
        return offsets_of(list(np.column_stack([np.zeros_like(lengths), np.diff(offsets)]).ravel()))

    return dataclasses.replace(
        case,
        name=name or f"{case.name}-among-others",
        k_cached=spread(case.k_cached, np.nan),
        v_cached=spread(case.v_cached, np.inf),
        q_offsets=without_rows(case.q_offsets),
        k_offsets=without_rows(case.k_offsets),
        cache_offsets=offsets_of(list(np.column_stack([gaps, lengths]).ravel())),
        num_targets=doubled(case.num_targets, 0),
        contextual_seq_lens=doubled(case.contextual_seq_lens),
        scaling_seq_lens=doubled(case.scaling_seq_lens),
    )


def split_requests(case: AttentionCase, order: Sequence[int]) -> AttentionCase:
    """Return ``case`` with its sequences in the given order (a permutation of range(B)); tail rows are dropped."""

    def gather(values: Array | None, offsets: Array) -> Array | None:
        if values is None:
            return None
        rows: Array = np.concatenate([values[:0], *(values[offsets[b] : offsets[b + 1]] for b in order)])
        return rows

    def pick(values: Array | None) -> Array | None:
        return None if values is None else values[list(order)]

    q, k, v = gather(case.q, case.q_offsets), gather(case.k, case.k_offsets), gather(case.v, case.k_offsets)
    assert q is not None
    assert k is not None
    assert v is not None
    return dataclasses.replace(
        case,
        q=q,
        k=k,
        v=v,
        q_offsets=offsets_of([int(np.diff(case.q_offsets)[b]) for b in order]),
        k_offsets=offsets_of([int(np.diff(case.k_offsets)[b]) for b in order]),
        num_targets=pick(case.num_targets),
        contextual_seq_lens=pick(case.contextual_seq_lens),
        scaling_seq_lens=pick(case.scaling_seq_lens),
        row_timestamps=gather(case.row_timestamps, case.q_offsets),
        col_timestamps=gather(case.col_timestamps, case.k_offsets),
    )


def mask_cases() -> Iterator[AttentionCase]:
    """Every kind of mask on lengths 0, 1, tile - 1, tile, tile + 1, primes and one long among short."""
    lengths = [0, 1, TILE - 1, TILE, TILE + 1, 37, 0, 53]
    targets = [0, 1, 3, TILE, TILE - 1, 20, 0, 7]
    for index, (name, options) in enumerate(
        {
            "causal": {},
            "targets": {"num_targets": targets},
            "target-groups": {"num_targets": targets, "target_group_size": 3},
            "group-over-tile": {"num_targets": [0, 1, 15, 16, 17, 36, 0, 40], "target_group_size": 19},
            "context": {"contextual_seq_len": 5},
            "context-per-sequence": {"contextual_seq_lens": [0, 1, 2, 20, 17, 3, 0, 1]},
            "context-over-tile-and-targets": {"contextual_seq_len": 18, "num_targets": targets},
            "window": {"max_attn_len": 7},
            "window-over-tile": {"max_attn_len": 21},
            "window-full-tail": {"max_attn_len": 4, "min_full_attn_seq_len": 6},
            "window-targets": {"max_attn_len": 9, "num_targets": targets, "target_group_size": 2},
            "window-context-targets-tail": {
                "max_attn_len": 6,
                "min_full_attn_seq_len": 5,
                "contextual_seq_len": 4,
                "num_targets": targets,
            },
        }.items()
    ):
        yield build_case(lengths, name=name, num_heads=1, seed=100 + index, **options)  # type: ignore[arg-type]
    yield build_case([2, 1, 97, 3], name="one-long", num_heads=1, seed=120, num_targets=[1, 1, 11, 0])


def bias_cases() -> Iterator[AttentionCase]:
    """Every kind of bias, with and without targets, both timestamp widths."""
    lengths, targets = [0, 1, 17, 37, 16], [0, 0, 4, 9, 16]
    yield build_case(lengths, name="position", pos_bias="shared", seed=200)
    yield build_case(lengths, name="position-per-head-targets", pos_bias="per_head", num_targets=targets, seed=201)
    yield build_case(lengths, name="position-short-table", pos_bias="shared", pos_table_len=9, seed=202)
    yield build_case(
        lengths, name="time-own-per-head", time_bias="per_head", num_buckets=16, bucket_ratio=2.0, seed=203
    )
    yield build_case(lengths, name="time-int32", time_bias="shared", timestamp_bits=32, seed=204)
    yield build_case(
        lengths,
        name="research",
        pos_bias="shared",
        time_bias="shared",
        num_buckets=128,
        bucket_ratio=float(np.exp(0.301)),
        next_timestamp=True,
        seed=205,
    )
    yield build_case(
        lengths,
        name="both-per-head-targets-window",
        pos_bias="per_head",
        time_bias="per_head",
        num_targets=targets,
        max_attn_len=11,
        num_buckets=200,
        bucket_ratio=1.1,
        seed=206,
    )
    extreme = build_case([6, 4], name="time-extremes", time_bias="shared", num_buckets=62, seed=207)
    times = np.array([-(2**63), 2**63 - 1, 0, -1, 2**62, 2**31, 1, 2**31 + 1, 2**53, 2**53 + 1], dtype=np.int64)
    yield dataclasses.replace(extreme, row_timestamps=times, col_timestamps=times[::-1].copy())
    same = build_case([33], name="time-equal", time_bias="shared", seed=208)
    assert same.row_timestamps is not None
    constant = np.full_like(same.row_timestamps, 1_700_000_000)
    yield dataclasses.replace(same, row_timestamps=constant, col_timestamps=constant)


def shape_cases() -> Iterator[AttentionCase]:
    """Head dims 16..256 with 25 and 50, Dqk != Dv, one head, delta queries, per-sequence divisors, garbage tails."""
    for index, (dqk, dv) in enumerate(
        [(25, 25), (50, 50), (32, 32), (64, 64), (16, 40), (96, 33), (128, 128), (1, 1), (256, 256)]
    ):
        yield build_case([17, 5, 20], name=f"dims-{dqk}x{dv}", dqk=dqk, dv=dv, num_targets=[2, 5, 0], seed=300 + index)
    yield build_case([9, 33], name="one-head", num_heads=1, seed=320)
    keys, queries = [40, 7, 16, 0, 33], [3, 7, 0, 0, 17]
    yield build_case(keys, name="delta", query_lengths=queries, seed=321)
    yield build_case(
        keys,
        name="delta-all",
        query_lengths=queries,
        num_targets=[2, 3, 1, 0, 17],
        contextual_seq_len=3,
        max_attn_len=8,
        pos_bias="shared",
        time_bias="shared",
        per_sequence_scale=True,
        seed=322,
    )
    yield build_case([18, 0, 5], name="garbage-tail", tail=21, time_bias="shared", pos_bias="shared", seed=323)


def hostile_cases() -> Iterator[AttentionCase]:
    """Device data that no host would send: outputs are defined and no access is out of bounds."""
    good = build_case([7, 18, 5], name="good", num_targets=[1, 2, 3], seed=400)
    for name, offsets in {
        "descending": [0, 25, 7, 30],
        "negative": [0, -7, 25, 30],
        "beyond": [0, 7, 25, 31],
        "not-from-zero": [1, 7, 25, 30],
        "huge": [0, 2**31 - 1, 2**31 - 1, 2**31 - 1],
    }.items():
        bad = np.array(offsets, dtype=np.int32)
        yield dataclasses.replace(good, name=f"q-offsets-{name}", q_offsets=bad)
        yield dataclasses.replace(good, name=f"k-offsets-{name}", k_offsets=bad)
    yield dataclasses.replace(good, name="targets-hostile", num_targets=np.array([99, -5, 2**31 - 1], dtype=np.int32))
    yield dataclasses.replace(
        good, name="context-hostile", contextual_seq_lens=np.array([-(2**31), 99, 2**31 - 1], dtype=np.int32)
    )
    yield dataclasses.replace(good, name="more-queries-than-keys", k_offsets=offsets_of([2, 18, 0]), num_targets=None)
    yield dataclasses.replace(
        good,
        name="more-queries-than-keys-context",
        k_offsets=offsets_of([2, 18, 0]),
        contextual_seq_lens=np.array([1, 0, 3], dtype=np.int32),
    )
    yield build_case([], name="no-sequences", tail=19)
    yield build_case([], name="no-rows")
    yield build_case([0, 0, 0], name="all-empty")
    yield build_case([0, 0], name="all-empty-with-tail", tail=5, num_targets=[1, 1])


def cached_cases() -> Iterator[AttentionCase]:
    """Keys in two segments: one user and many, empty caches, no new rows, a boundary on, before and behind a tile's."""
    lengths = [40, 7, TILE + 1, 0, 2 * TILE + 1, 53, 1]
    caches = [37, 0, TILE, 0, TILE + 1, 53, 1]
    delta = [3, 7, 1, 0, TILE, 0, 0]
    targets = [2, 3, 1, 0, TILE, 0, 0]
    everything = {
        "contextual_seq_len": 3,
        "max_attn_len": 8,
        "pos_bias": "shared",
        "time_bias": "per_head",
        "per_sequence_scale": True,
    }
    one = build_case([3 * TILE + 1], query_lengths=[TILE], num_targets=[TILE], num_heads=1, seed=500)
    yield with_cache(one, [2 * TILE + 1], name="cached-one-user")
    yield among_others(with_cache(one, [2 * TILE + 1]), [3 * TILE + 5], name="cached-one-user-among-others")
    many = build_case(lengths, query_lengths=delta, num_targets=delta, seed=501)
    yield with_cache(many, caches, tail=TILE + 2, name="cached-score")
    gaps = [0, 1, 4 * TILE, 0, TILE - 1, 2, 300]
    yield among_others(with_cache(many, caches, tail=TILE + 2), gaps, name="cached-score-among-others")
    yield with_cache(build_case(lengths, query_lengths=delta, seed=502), caches, name="cached-append")
    research = build_case(
        lengths, query_lengths=delta, pos_bias="shared", time_bias="shared", next_timestamp=True, seed=503
    )
    yield with_cache(research, caches, tail=5, name="cached-append-biased")
    masked = build_case(lengths, query_lengths=delta, num_targets=targets, seed=504, **everything)  # type: ignore[arg-type]
    yield with_cache(masked, caches, name="cached-all")
    whole = build_case(lengths, num_targets=targets, target_group_size=3, seed=505)
    yield with_cache(whole, caches, name="cached-queries-of-cached-rows")
    yield with_cache(
        build_case([2 * TILE + 1, 5], seed=506, timestamp_bits=32, time_bias="shared"), [0, 0], name="cached-nothing"
    )
    yield with_cache(build_case([TILE + 1, 9], query_lengths=[5, 9], seed=507), [TILE + 1, 9], name="cached-all-keys")
    yield with_cache(build_case([0, 0], tail=3, seed=508), [0, 0], name="cached-no-keys")


def hostile_cache_cases() -> Iterator[AttentionCase]:
    """Bounds of a cache that no host would send: the output is zero and no access is out of bounds."""
    good = with_cache(build_case([17, 18, 5], query_lengths=[7, 2, 5], seed=520), [10, 16, 0], name="cache-good")
    for name, offsets in {
        "descending": [0, 20, 10, 26],
        "negative": [0, -7, 10, 26],
        "beyond": [0, 10, 26, 27],
        "not-from-zero": [1, 10, 26, 26],
        "huge": [0, 2**31 - 1, 2**31 - 1, 2**31 - 1],
    }.items():
        yield dataclasses.replace(good, name=f"cache-offsets-{name}", cache_offsets=np.array(offsets, dtype=np.int32))
    yield dataclasses.replace(good, name="cache-k-offsets-beyond", k_offsets=np.array([0, 7, 9, 15], dtype=np.int32))


def attention_grid() -> list[AttentionCase]:
    """Return the whole fixed grid in float32; ``with_dtype`` gives the same in another dtype."""
    return [
        *mask_cases(),
        *bias_cases(),
        *shape_cases(),
        *hostile_cases(),
        *cached_cases(),
        *hostile_cache_cases(),
    ]


def with_dtype(case: AttentionCase, dtype: str) -> AttentionCase:
    """Return ``case`` with queries, keys and values rounded to ``dtype``."""
    return dataclasses.replace(
        case,
        dtype=dtype,
        q=round_to_dtype(case.q, dtype),
        k=round_to_dtype(case.k, dtype),
        v=round_to_dtype(case.v, dtype),
        k_cached=None if case.k_cached is None else round_to_dtype(case.k_cached, dtype),
        v_cached=None if case.v_cached is None else round_to_dtype(case.v_cached, dtype),
    )
