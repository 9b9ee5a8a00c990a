"""The micro-batch schedule: every candidate once, no pass over its limits, and no pass too many."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hstu_compile.runtime.m_falcon import PassLimits, Piece, micro_batches


def triples(passes: list[list[Piece]]) -> list[list[tuple[int, int, int]]]:
    return [[(piece.sequence, piece.start, piece.stop) for piece in pieces] for pieces in passes]


@given(
    sequences=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 30)), max_size=8),
    candidates=st.integers(1, 12),
    most_sequences=st.integers(1, 5),
    staged_rows=st.integers(0, 60),
)
def test_every_candidate_is_scored_once_within_the_limits(
    sequences: list[tuple[int, int]], candidates: int, most_sequences: int, staged_rows: int
) -> None:
    totals, rows = [m for m, _ in sequences], [r for _, r in sequences]
    passes = micro_batches(totals, rows, PassLimits(candidates, most_sequences, staged_rows))
    seen = sorted((p.sequence, i) for pieces in passes for p in pieces for i in range(p.start, p.stop))
    assert seen == [(sequence, i) for sequence, total in enumerate(totals) for i in range(total)]
    for pieces in passes:
        assert 1 <= sum(piece.num_candidates for piece in pieces) <= candidates
        assert all(piece.num_candidates > 0 for piece in pieces)
        assert len({piece.sequence for piece in pieces}) == len(pieces) <= most_sequences
        if len(pieces) > 1:
            assert sum(rows[piece.sequence] for piece in pieces) <= staged_rows
    # Of one sequence alone, each needs no more than ceil(m / b).
    for sequence, total in enumerate(totals):
        alone = [pieces for pieces in passes if [p.sequence for p in pieces] == [sequence]]
        assert len(alone) <= math.ceil(total / candidates)


@given(
    totals=st.lists(st.integers(0, 40), max_size=8),
    candidates=st.integers(1, 12),
)
def test_without_other_limits_there_are_as_few_passes_as_possible(totals: list[int], candidates: int) -> None:
    passes = micro_batches(totals, [1] * len(totals), PassLimits(candidates, 8, 100))
    assert len(passes) == math.ceil(sum(totals) / candidates)


@pytest.mark.parametrize(
    ("total", "expected"),
    [
        (0, []),
        (3, [[(0, 0, 3)]]),
        (4, [[(0, 0, 4)]]),
        (5, [[(0, 0, 4)], [(0, 4, 5)]]),
        (12, [[(0, 0, 4)], [(0, 4, 8)], [(0, 8, 12)]]),
    ],
)
def test_one_user_takes_ceil_m_by_b_passes_and_the_last_is_short(
    total: int, expected: list[list[tuple[int, int, int]]]
) -> None:
    assert triples(micro_batches([total], [9], PassLimits(4, 3, 0))) == expected


def test_full_micro_batches_stay_alone_and_the_rest_is_packed() -> None:
    passes = micro_batches([6, 9, 3], [5, 5, 5], PassLimits(4, 3, 15))
    assert triples(passes) == [
        [(0, 0, 4)],
        [(1, 0, 4)],
        [(1, 4, 8)],
        [(0, 4, 6), (1, 8, 9), (2, 0, 1)],
        [(2, 1, 3)],
    ]


@pytest.mark.parametrize(("sequences", "staged_rows"), [(2, 15), (3, 10)])
def test_a_pass_ends_where_the_next_user_does_not_fit(sequences: int, staged_rows: int) -> None:
    passes = micro_batches([1, 1, 1], [5, 5, 5], PassLimits(4, sequences, staged_rows))
    assert triples(passes) == [[(0, 0, 1), (1, 0, 1)], [(2, 0, 1)]]
