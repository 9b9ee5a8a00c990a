"""Hypothesis strategies for ragged attention calls."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.attention_cases import TILE, build_case, with_cache
from tests.oracle import AttentionCase


@st.composite
def seq_lengths(draw: st.DrawFn, longest: int = 3 * TILE) -> list[int]:
    """Draw lengths: 0, 1, around a tile, primes, and now and then one long sequence among short ones."""
    edges = [n for n in (0, 1, TILE - 1, TILE, TILE + 1, 2, 5, 7, 11, 13, 19, 23, 31, 37, 41) if n <= longest]
    lengths = draw(st.lists(st.sampled_from(edges), min_size=0, max_size=5))
    has_long = draw(st.booleans())
    if lengths and has_long:
        lengths[draw(st.integers(0, len(lengths) - 1))] = longest
    return lengths


@st.composite
def attention_cases(draw: st.DrawFn, longest: int = 3 * TILE, *, dtype: str = "float32") -> AttentionCase:
    """Draw a call with any mask, any bias, delta queries, small head dims, and keys in one segment or two."""
    lengths = draw(seq_lengths(longest))
    is_delta = draw(st.booleans())
    queries = [draw(st.integers(0, n)) for n in lengths] if is_delta else None
    targets = [draw(st.integers(0, n)) for n in lengths] if draw(st.booleans()) else None
    contexts = [draw(st.integers(0, longest // 2)) for _ in lengths] if draw(st.booleans()) else None
    cached = [draw(st.integers(0, n)) for n in lengths] if draw(st.booleans()) else None
    case = build_case(
        lengths,
        dtype=dtype,
        num_heads=draw(st.integers(1, 2)),
        dqk=draw(st.sampled_from([1, 5, 16, 25])),
        dv=draw(st.sampled_from([1, 8, 16, 25])),
        query_lengths=queries,
        num_targets=targets,
        target_group_size=draw(st.sampled_from([1, 2, 3, TILE, TILE + 1])),
        contextual_seq_lens=contexts,
        contextual_seq_len=draw(st.sampled_from([0, 1, 3, TILE + 1])),
        max_attn_len=draw(st.sampled_from([0, 0, 1, 5, TILE, TILE + 4])),
        min_full_attn_seq_len=draw(st.sampled_from([0, 1, 6, TILE])),
        per_sequence_scale=draw(st.booleans()),
        pos_bias=draw(st.sampled_from(["none", "shared", "per_head"])),
        pos_table_len=draw(st.sampled_from([None, 1, 9])),
        time_bias=draw(st.sampled_from(["none", "shared", "per_head"])),
        timestamp_bits=draw(st.sampled_from([32, 64])),
        num_buckets=draw(st.sampled_from([1, 2, 24, 130])),
        bucket_ratio=draw(st.sampled_from([1.3, 2.0])),
        next_timestamp=draw(st.booleans()),
        tail=draw(st.sampled_from([0, 0, 3, TILE + 2])),
        seed=draw(st.integers(0, 2**16)),
    )
    return case if cached is None else with_cache(case, cached, tail=draw(st.sampled_from([0, 3, TILE + 2])))
