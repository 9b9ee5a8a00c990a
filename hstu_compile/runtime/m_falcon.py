"""M-FALCON's schedule: which candidates of which user go into which pass. Pure arithmetic. Level 3; no torch.

Candidates see their user's history and themselves, never one another, so any split gives the same scores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

# Rows at which a pass is long enough to hide what starting it costs. On an H100 (D 512, 5 layers of 4 heads of 128,
# fp16, TensorRT 8.5) a prefill pass takes 1.0 ms for 1024 rows, 2.3 ms for 4096 and 4.2 ms for 8192, a score pass of
# one candidate 1.3, 1.5 and 2.3 ms: eight users of 1024 rows take half the time together. Their keys and values are
# 84 MB.
ROWS_WORTH_A_PASS = 8192


@dataclasses.dataclass(frozen=True)
class PassLimits:
    """What one `score` pass may hold.

    Attributes:
        candidates: most candidates, of all sequences together: the micro-batch.
        sequences: most sequences.
        staged_rows: most cached rows of a pass with several sequences, whose rows are copied side by side.
    """

    candidates: int
    sequences: int
    staged_rows: int


@dataclasses.dataclass(frozen=True)
class Piece:
    """Candidates [start, stop) of one sequence."""

    sequence: int
    start: int
    stop: int

    @property
    def num_candidates(self) -> int:
        """Candidates in the piece."""
        return self.stop - self.start


def default_staged_rows(longest: int, sequences: int, affordable: int) -> int:
    """Rows that a pass of several sequences may have where nobody says: worth a pass, and never more than one can hold.

    Args:
        longest: rows of the longest sequence.
        sequences: most sequences of a pass.
        affordable: rows of the cache's budget; more are never in one pass, because all its sequences are in the cache.

    >>> [default_staged_rows(longest, 64, 10**6) for longest in (246, 10_000)]
    [8192, 10000]
    >>> default_staged_rows(246, 4, 10**6), default_staged_rows(246, 64, 400)
    (984, 400)
    """
    return min(max(longest, ROWS_WORTH_A_PASS), sequences * longest, affordable)


def micro_batches(num_candidates: Sequence[int], rows: Sequence[int], limits: PassLimits) -> list[list[Piece]]:
    """Passes that score every candidate once.

    Each sequence's full micro-batches come as passes of their own, because a pass of one sequence reads its cached rows
    where they lie. What is left of all sequences is packed in order, cut wherever a pass is full: ceil(sum of
    candidates / micro-batch) passes in all, unless `sequences` or `staged_rows` ends one early.

    Args:
        num_candidates: of each sequence; 0 is legal and appears in no pass.
        rows: cached rows of each sequence.
        limits: of a pass.

    >>> [[(p.sequence, p.start, p.stop) for p in each] for each in micro_batches([5, 1], [9, 9], PassLimits(4, 2, 18))]
    [[(0, 0, 4)], [(0, 4, 5), (1, 0, 1)]]
    """
    passes, rest = [], []
    for sequence, total in enumerate(num_candidates):
        whole = total - total % limits.candidates
        passes += [[Piece(sequence, start, start + limits.candidates)] for start in range(0, whole, limits.candidates)]
        if whole < total:
            rest.append(Piece(sequence, whole, total))
    current: list[Piece] = []
    room, staged = limits.candidates, 0
    for left in rest:
        start = left.start
        while start < left.stop:
            crowded = len(current) == limits.sequences or staged + rows[left.sequence] > limits.staged_rows
            if current and (not room or crowded):
                passes.append(current)
                current, room, staged = [], limits.candidates, 0
            stop = min(left.stop, start + room)
            current.append(Piece(left.sequence, start, stop))
            room, staged, start = room - (stop - start), staged + rows[left.sequence], stop
    return [*passes, current] if current else passes
