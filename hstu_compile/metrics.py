"""Ranking quality and rank agreement, in NumPy alone: scores or item lists in, a few numbers out. Level 2.

A rank is 1-based among the items that the user has not seen. Ties are counted against the target: an item that is not
strictly worse ranks before it. A constant, a saturated or a NaN score can then never look like a good recommendation,
which an averaged tie would allow. AUC counts a tie as half a pair, as it is defined: a constant score gets 1/2, that of
guessing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.integer[Any]]
FloatArray = NDArray[np.floating[Any]]

#: Rank of a target that is not in a list of top items: it lies somewhere below the list.
NOT_RANKED = 0

#: Item id of an empty slot: of padding in a history, and of a place in a top list for which no item was left.
NO_ITEM = 0


@dataclasses.dataclass(frozen=True)
class RankMetrics:
    """Means over requests.

    Attributes:
        hr10: share of requests whose target ranks in the first 10.
        ndcg10: mean of 1 / log2(rank + 1) where the rank is at most 10, else 0.
        hr50: share of requests whose target ranks in the first 50.
        mrr: mean of 1 / rank.
        num_requests: number of requests averaged over.
    """

    hr10: float
    ndcg10: float
    hr50: float
    mrr: float
    num_requests: int


def target_ranks(
    scores: FloatArray, target_ids: IntArray, item_ids: IntArray, seq_offsets: IntArray
) -> NDArray[np.int64]:
    """Rank of each request's target among all items outside its history.

    Args:
        scores: [B, V] float -- column v scores item v + 1.
        target_ids: [B] int -- 1..V. A target that is also in the history stays a candidate.
        item_ids: [L] int -- the histories to exclude, 0..V; 0 is padding and excludes nothing.
        seq_offsets: [B + 1] int -- sequence b is item_ids[seq_offsets[b]:seq_offsets[b + 1]].

    Returns:
        [B] int64, 1..V.

    Raises:
        ValueError: if the shapes contradict each other, or an id is outside its range.
    """
    num_requests, num_items = scores.shape
    if target_ids.shape != (num_requests,) or seq_offsets.shape != (num_requests + 1,):
        raise ValueError(
            f"scores are for {num_requests} requests, target_ids have shape {list(target_ids.shape)} "
            f"and seq_offsets {list(seq_offsets.shape)}; expected [{num_requests}] and [{num_requests + 1}]"
        )
    if seq_offsets[0] != 0 or seq_offsets[-1] != item_ids.shape[0] or bool((np.diff(seq_offsets) < 0).any()):
        raise ValueError(
            f"seq_offsets run from {seq_offsets[0]} to {seq_offsets[-1]}; expected 0 to {item_ids.shape[0]}, ascending"
        )
    _require_ids("target_ids", target_ids, 1, num_items)
    _require_ids("item_ids", item_ids, NO_ITEM, num_items)

    rows = np.arange(num_requests)
    is_seen = np.zeros((num_requests, num_items + 1), dtype=bool)
    is_seen[np.repeat(rows, np.diff(seq_offsets)), item_ids] = True
    is_candidate = ~is_seen[:, 1:]
    target_column = target_ids.astype(np.int64) - 1
    # The target itself is the 1 of a 1-based rank.
    is_candidate[rows, target_column] = False
    is_worse = scores < scores[rows, target_column][:, None]
    ranks: NDArray[np.int64] = 1 + (is_candidate & ~is_worse).sum(axis=1, dtype=np.int64)
    return ranks


def top_item_ranks(top_items: IntArray, target_ids: IntArray) -> NDArray[np.int64]:
    """Rank of each request's target in a list of best items.

    Args:
        top_items: [B, K] int -- item ids, best first, the seen ones already left out.
        target_ids: [B] int -- 1 or more.

    Returns:
        [B] int64, 1..K, or NOT_RANKED.
    """
    if target_ids.shape != top_items.shape[:1]:
        raise ValueError(f"top_items are for {top_items.shape[0]} requests, target_ids have {list(target_ids.shape)}")
    is_target = top_items == target_ids[:, None]
    return np.where(is_target.any(axis=1), is_target.argmax(axis=1) + 1, NOT_RANKED).astype(np.int64)


def rank_metrics(rank_batches: Iterable[IntArray]) -> RankMetrics:
    """Average over all requests of a stream of batches.

    Args:
        rank_batches: [B] int each, from `target_ranks`, or from `top_item_ranks` with at least 50 items. With the
            latter the mean reciprocal rank is truncated: a target below the list adds 0.

    Raises:
        ValueError: if there is no request, or a rank is negative.
    """
    hits10 = hits50 = num_requests = 0
    gain = reciprocal = 0.0
    for ranks in rank_batches:
        if bool((ranks < 0).any()):
            raise ValueError(f"ranks are 1-based; the smallest is {ranks.min()}")
        ranked = ranks[ranks != NOT_RANKED].astype(np.float64)
        first10 = ranked[ranked <= 10]
        hits10 += first10.shape[0]
        hits50 += int((ranked <= 50).sum())
        gain += float((1.0 / np.log2(first10 + 1.0)).sum())
        reciprocal += float((1.0 / ranked).sum())
        num_requests += ranks.shape[0]
    if not num_requests:
        raise ValueError("there are no ranks to average")
    return RankMetrics(
        hr10=hits10 / num_requests,
        ndcg10=gain / num_requests,
        hr50=hits50 / num_requests,
        mrr=reciprocal / num_requests,
        num_requests=num_requests,
    )


def top_k_overlap(first: IntArray, second: IntArray, k: int) -> float:
    """Share of the first k items that two rankings have in common, whatever their order; mean over requests.

    Args:
        first: [B, at least k] int -- item ids, best first; NO_ITEM marks an empty slot.
        second: the same for the other ranking.
        k: 1 or more.

    Returns:
        0..1. A request for which both lists are empty agrees (1).

    Raises:
        ValueError: if a list is shorter than k, there is no request, or a list names an item twice.
    """
    if first.ndim != 2 or first.shape[0] != second.shape[0] or not 1 <= k <= min(first.shape[1], second.shape[1]):
        raise ValueError(f"cannot compare the first {k} of lists {list(first.shape)} and {list(second.shape)}")
    if not first.shape[0]:
        raise ValueError("there are no requests to compare")
    shares = []
    for row, (left, right) in enumerate(zip(first[:, :k].tolist(), second[:, :k].tolist(), strict=True)):
        left_items, right_items = ([item for item in items if item != NO_ITEM] for items in (left, right))
        left_set, right_set = set(left_items), set(right_items)
        if len(left_set) != len(left_items) or len(right_set) != len(right_items):
            raise ValueError(f"a list of request {row} names an item twice")
        longest = max(len(left_set), len(right_set))
        shares.append(len(left_set & right_set) / longest if longest else 1.0)
    return math.fsum(shares) / len(shares)


def kendall_tau(first: FloatArray, second: FloatArray) -> float:
    """Kendall's tau-b of two scorings of the same items: 1 same order, -1 reversed. Exact, O(n log^2 n).

    tau_b = (concordant - discordant) / sqrt(pairs not tied in first * pairs not tied in second)

    Args:
        first: [n] float -- n >= 2.
        second: [n] float.

    Raises:
        ValueError: if the shapes differ, a score is NaN, or one scoring is constant: its order is undefined.
    """
    if first.ndim != 1 or first.shape != second.shape or first.shape[0] < 2:
        raise ValueError(f"expected two vectors of one length >= 2, got {list(first.shape)} and {list(second.shape)}")
    if bool(np.isnan(first).any()) or bool(np.isnan(second).any()):
        raise ValueError("a NaN score has no order")
    first_rank = np.unique(first, return_inverse=True)[1].reshape(-1).astype(np.int64)
    second_rank = np.unique(second, return_inverse=True)[1].reshape(-1).astype(np.int64)
    pairs: int = first.shape[0] * (first.shape[0] - 1) // 2
    first_ties = _num_tied_pairs(first_rank)
    second_ties = _num_tied_pairs(second_rank)
    if pairs in (first_ties, second_ties):
        raise ValueError("a constant scoring has no order")
    both_ties = _num_tied_pairs(first_rank * second_rank.shape[0] + second_rank)
    # Sorted by first, ties by second, the pairs in the wrong order of second are exactly the discordant ones.
    discordant = _num_inversions(second_rank[np.lexsort((second_rank, first_rank))])
    difference = pairs - first_ties - second_ties + both_ties - 2 * discordant
    return difference / math.sqrt((pairs - first_ties) * (pairs - second_ties))


def area_under_curve(scores: FloatArray, labels: NDArray[np.bool_]) -> float:
    """Probability that a positive scores above a negative, a tie counting half: exact over all pairs, O(n log n).

    auc = (pairs with positive > negative + pairs with positive == negative / 2) / pairs

    Args:
        scores: [n] float -- compared in their own type; any increasing function of them gives the same number.
        labels: [n] bool -- whether each is a positive.

    Raises:
        ValueError: if the shapes differ, a score is NaN, or all labels are the same: there is no pair.
    """
    positives = _num_positives(scores, labels)
    _, group = np.unique(scores, return_inverse=True)
    group = group.reshape(-1)
    size = int(group.max()) + 1
    positive, negative = (np.bincount(group[which], minlength=size).astype(np.int64) for which in (labels, ~labels))
    # Twice the number of pairs in the right order, in whole numbers: negatives below each positive, and its ties once.
    twice = int((positive * (2 * (np.cumsum(negative) - negative) + negative)).sum())
    pairs: int = positives * (labels.shape[0] - positives)
    return twice / (2 * pairs)


def normalised_entropy(logits: FloatArray, labels: NDArray[np.bool_]) -> float:
    """Log loss over that of always predicting the share of positives: 1 is no better than that, 0 is perfect.

    ne = mean_i(log(1 + exp(-s_i * z_i))) / -(p log p + (1 - p) log(1 - p)), s_i = 1 for a positive, else -1

    From logits and not from probabilities: a float32 probability of 1 has lost how sure the model was, and one wrong
    label there would make the loss infinite.

    Args:
        logits: [n] float -- log odds of a positive.
        labels: [n] bool -- whether each is a positive.

    Raises:
        ValueError: if the shapes differ, a logit is NaN, or all labels are the same: their entropy is zero.
    """
    share: float = _num_positives(logits, labels) / labels.shape[0]
    losses = np.logaddexp(0.0, np.where(labels, -1.0, 1.0) * logits.astype(np.float64))
    base = -(share * math.log(share) + (1 - share) * math.log1p(-share))
    log_loss: float = math.fsum(losses.tolist()) / labels.shape[0]
    return log_loss / base


def _num_positives(scores: FloatArray, labels: NDArray[np.bool_]) -> int:
    """Number of positives, after refusing what has no pairs of one of each."""
    if scores.ndim != 1 or scores.shape != labels.shape or labels.dtype != np.bool_:
        raise ValueError(
            f"expected two vectors of one length, the second bool; got {list(scores.shape)} and {list(labels.shape)} "
            f"{labels.dtype}"
        )
    if bool(np.isnan(scores).any()):
        raise ValueError("a NaN score has no order")
    positives = int(labels.sum())
    if positives in (0, labels.shape[0]):
        raise ValueError(f"{positives} of {labels.shape[0]} labels are positive; both kinds must occur")
    return positives


def _require_ids(name: str, ids: IntArray, lowest: int, highest: int) -> None:
    if ids.size and not lowest <= int(ids.min()) <= int(ids.max()) <= highest:
        raise ValueError(f"{name} are {ids.min()}..{ids.max()}; allowed: {lowest}..{highest}")


def _num_tied_pairs(ranks: NDArray[np.int64]) -> int:
    counts = np.unique(ranks, return_counts=True)[1].astype(np.int64)
    return int((counts * (counts - 1) // 2).sum())


def _num_inversions(ranks: NDArray[np.int64]) -> int:
    """Pairs i < j with ranks[i] > ranks[j].

    Two ranks first differ in one bit: among the elements that agree above that bit, in their original order, every 1
    before a 0 is an inversion. Each pair is counted at exactly one bit.
    """
    inversions = 0
    for bit in range(int(ranks.max()).bit_length()):
        prefix = ranks >> (bit + 1)
        order = np.argsort(prefix, kind="stable")
        is_one = (ranks[order] >> bit) & 1
        ones_before = np.cumsum(is_one) - is_one
        group_start = np.searchsorted(prefix[order], prefix[order], side="left")
        inversions += int(((ones_before - ones_before[group_start]) * (1 - is_one)).sum())
    return inversions
