"""hstu_compile.metrics against brute force, hand-made cases, and inputs that must be refused."""

from __future__ import annotations

import dataclasses
import decimal
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hstu_compile.metrics import (
    NOT_RANKED,
    RankMetrics,
    area_under_curve,
    kendall_tau,
    normalised_entropy,
    rank_metrics,
    target_ranks,
    top_item_ranks,
    top_k_overlap,
)


def ranks_of(scores, target_ids, histories):
    """target_ranks with histories as lists."""
    items = np.array([item for history in histories for item in history], dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum([len(history) for history in histories])]).astype(np.int32)
    return target_ranks(np.array(scores, dtype=np.float32), np.array(target_ids), items, offsets).tolist()


class TestTargetRanks:
    def test_counts_the_better_unseen_items(self):
        scores = [[0.5, 0.9, 0.1, 0.7], [0.5, 0.9, 0.1, 0.7]]
        assert ranks_of(scores, [1, 3], [[], []]) == [3, 4]

    def test_seen_items_do_not_count_in_their_own_request_only(self):
        scores = [[0.5, 0.9, 0.1, 0.7], [0.5, 0.9, 0.1, 0.7]]
        assert ranks_of(scores, [1, 1], [[2, 4], [4]]) == [1, 2]

    def test_an_item_seen_twice_is_left_out_once(self):
        assert ranks_of([[0.5, 0.9, 0.1, 0.7]], [3], [[2, 2, 2]]) == [3]

    def test_padding_in_the_history_leaves_nothing_out(self):
        assert ranks_of([[0.9, 0.5]], [2], [[0, 0]]) == [2]

    def test_a_target_in_its_own_history_stays_a_candidate(self):
        assert ranks_of([[0.9, 0.5, 0.7]], [2], [[2]]) == [3]

    def test_ties_count_against_the_target(self):
        assert ranks_of([[0.5, 0.5, 0.5, 0.1]], [2], [[]]) == [3]

    @pytest.mark.parametrize("value", [0.0, math.nan, math.inf, -math.inf])
    def test_a_constant_scoring_ranks_the_target_last(self, value):
        assert ranks_of([[value] * 5], [1], [[2]]) == [4]

    def test_a_nan_score_ranks_before_the_target(self):
        assert ranks_of([[math.nan, 0.5, 0.1]], [2], [[]]) == [2]

    def test_no_requests(self):
        assert target_ranks(np.zeros((0, 3)), np.zeros(0, int), np.zeros(0, int), np.zeros(1, int)).shape == (0,)

    @given(seed=st.integers(0, 2**32 - 1))
    def test_equals_sorting(self, seed):
        generator = np.random.default_rng(seed)
        batch, items = int(generator.integers(1, 5)), int(generator.integers(2, 30))
        scores = generator.permutation(batch * items).reshape(batch, items)
        targets = generator.integers(1, items + 1, batch)
        histories = [
            [item for item in generator.integers(1, items + 1, 6).tolist() if item != target] for target in targets
        ]
        expected = []
        for row, target in enumerate(targets.tolist()):
            order = [item for item in np.argsort(-scores[row]) + 1 if item not in histories[row]]
            expected.append(order.index(target) + 1)
        assert ranks_of(scores, targets, histories) == expected

    @pytest.mark.parametrize(
        ("targets", "items", "offsets", "message"),
        [
            ([1], [1], [0, 1, 1], r"target_ids have shape \[1\]"),
            ([1, 2], [1], [0, 1], r"seq_offsets \[2\]"),
            ([1, 2], [1], [1, 1, 1], "seq_offsets run from 1 to 1; expected 0 to 1"),
            ([1, 2], [1], [0, 0, 0], "seq_offsets run from 0 to 0; expected 0 to 1"),
            ([1, 2], [1], [0, 2, 1], "ascending"),
            ([0, 2], [1], [0, 1, 1], r"target_ids are 0\.\.2; allowed: 1\.\.3"),
            ([1, 4], [1], [0, 1, 1], r"target_ids are 1\.\.4; allowed: 1\.\.3"),
            ([1, 2], [-1], [0, 1, 1], r"item_ids are -1\.\.-1; allowed: 0\.\.3"),
            ([1, 2], [4], [0, 1, 1], r"item_ids are 4\.\.4; allowed: 0\.\.3"),
        ],
    )
    def test_refuses_what_does_not_fit(self, targets, items, offsets, message):
        with pytest.raises(ValueError, match=message):
            target_ranks(np.zeros((2, 3)), np.array(targets), np.array(items), np.array(offsets))


class TestTopItemRanks:
    def test_position_or_not_ranked(self):
        top = np.array([[4, 2, 9], [4, 2, 9], [4, 2, 0]])
        assert top_item_ranks(top, np.array([9, 7, 4])).tolist() == [3, NOT_RANKED, 1]

    def test_agrees_with_the_ranks_by_score(self):
        scores = np.random.default_rng(0).normal(size=(6, 40))
        targets = np.arange(1, 7)
        top = np.argsort(-scores, axis=1)[:, :10] + 1
        full = target_ranks(scores, targets, np.zeros(0, int), np.zeros(7, int))
        assert top_item_ranks(top, targets).tolist() == [rank if rank <= 10 else NOT_RANKED for rank in full]
        assert (full <= 10).any()
        assert (full > 10).any()

    def test_refuses_another_number_of_requests(self):
        with pytest.raises(ValueError, match="top_items are for 2 requests"):
            top_item_ranks(np.ones((2, 3), int), np.array([1]))


class TestRankMetrics:
    def test_by_hand(self):
        metrics = rank_metrics([np.array([1, 10, 11, 50, 51])])
        assert metrics.hr10 == pytest.approx(2 / 5)
        assert metrics.hr50 == pytest.approx(4 / 5)
        assert metrics.ndcg10 == pytest.approx((1 + 1 / math.log2(11)) / 5)
        assert metrics.mrr == pytest.approx((1 + 1 / 10 + 1 / 11 + 1 / 50 + 1 / 51) / 5)
        assert metrics.num_requests == 5

    def test_below_the_list_adds_nothing_but_counts(self):
        assert rank_metrics([np.array([1, NOT_RANKED])]) == RankMetrics(0.5, 0.5, 0.5, 0.5, 2)

    def test_batches_are_weighted_by_their_size(self):
        ranks = np.arange(1, 101)
        split, whole = rank_metrics([ranks[:3], ranks[3:3], ranks[3:]]), rank_metrics([ranks])
        assert dataclasses.asdict(split) == pytest.approx(dataclasses.asdict(whole))

    def test_streams(self):
        assert rank_metrics(np.array([rank]) for rank in (1, 20)).hr10 == 0.5

    @pytest.mark.parametrize("batches", [[], [np.zeros(0, int)]])
    def test_refuses_nothing(self, batches):
        with pytest.raises(ValueError, match="no ranks"):
            rank_metrics(batches)

    def test_refuses_negative_ranks(self):
        with pytest.raises(ValueError, match="the smallest is -3"):
            rank_metrics([np.array([2, -3])])


class TestTopKOverlap:
    def test_order_within_the_list_does_not_count(self):
        assert top_k_overlap(np.array([[1, 2, 3]]), np.array([[3, 1, 2]]), 3) == 1.0

    def test_mean_over_requests(self):
        first, second = np.array([[1, 2], [3, 4]]), np.array([[1, 9], [8, 9]])
        assert top_k_overlap(first, second, 2) == 0.25

    def test_only_the_first_k(self):
        first, second = np.array([[1, 2, 3]]), np.array([[1, 3, 2]])
        assert top_k_overlap(first, second, 2) == 0.5
        assert top_k_overlap(first, second, 1) == 1.0

    def test_empty_slots_match_nothing(self):
        assert top_k_overlap(np.array([[1, 0, 0]]), np.array([[2, 0, 0]]), 3) == 0.0
        assert top_k_overlap(np.array([[1, 0, 0]]), np.array([[1, 2, 0]]), 3) == 0.5
        assert top_k_overlap(np.array([[0, 0]]), np.array([[0, 0]]), 2) == 1.0

    @pytest.mark.parametrize(
        ("first", "second", "k", "message"),
        [
            (np.ones((1, 2), int), np.ones((2, 2), int), 1, "cannot compare"),
            (np.ones((1, 2), int), np.ones((1, 3), int), 3, "cannot compare the first 3"),
            (np.ones((1, 2), int), np.ones((1, 2), int), 0, "cannot compare the first 0"),
            (np.ones((0, 2), int), np.ones((0, 2), int), 1, "no requests"),
            (np.ones((1, 2), int), np.array([[1, 2]]), 2, "request 0 names an item twice"),
        ],
    )
    def test_refuses(self, first, second, k, message):
        with pytest.raises(ValueError, match=message):
            top_k_overlap(first, second, k)


def tau_by_pairs(first, second):
    """Tau-b by its definition, over all pairs."""
    difference = first_open = second_open = 0
    for i, j in itertools.combinations(range(len(first)), 2):
        left, right = np.sign(first[i] - first[j]), np.sign(second[i] - second[j])
        difference += left * right
        first_open += left != 0
        second_open += right != 0
    return difference / math.sqrt(first_open * second_open)


class TestKendallTau:
    def test_extremes(self):
        scores = np.array([3.0, 1.0, 2.0, 5.0])
        assert kendall_tau(scores, 2 * scores + 1) == 1.0
        assert kendall_tau(scores, -scores) == -1.0

    def test_one_swapped_neighbour(self):
        assert kendall_tau(np.arange(5.0), np.array([0.0, 2.0, 1.0, 3.0, 4.0])) == pytest.approx(1 - 2 / 10)

    @given(st.integers(2, 40), st.integers(1, 8), st.integers(0, 2**32 - 1))
    def test_equals_the_definition_with_ties(self, length, levels, seed):
        generator = np.random.default_rng(seed)
        first, second = generator.integers(0, levels + 1, (2, length)).astype(float)
        first[:2], second[:2] = (0, 1), (1, 0)
        assert kendall_tau(first, second) == pytest.approx(tau_by_pairs(first, second), abs=1e-12)

    def test_a_catalogue_is_quick_enough_to_verify_with(self):
        scores = np.random.default_rng(0).normal(size=200_000)
        noisy = scores.astype(np.float16).astype(float)
        assert 0.99 < kendall_tau(scores, noisy) < 1.0

    @pytest.mark.parametrize(
        ("first", "second", "message"),
        [
            ([1.0, 2.0], [1.0, 2.0, 3.0], "one length"),
            ([1.0], [1.0], "length >= 2"),
            ([1.0, math.nan], [1.0, 2.0], "NaN"),
            ([1.0, 2.0], [math.nan, 2.0], "NaN"),
            ([1.0, 1.0], [1.0, 2.0], "constant"),
            ([1.0, 2.0], [0.0, 0.0], "constant"),
        ],
    )
    def test_refuses(self, first, second, message):
        with pytest.raises(ValueError, match=message):
            kendall_tau(np.array(first), np.array(second))


def pairs_in_order(scores, labels):
    """AUC by its definition, over all pairs, as a fraction of whole numbers."""
    positives = [score for score, label in zip(scores, labels, strict=True) if label]
    negatives = [score for score, label in zip(scores, labels, strict=True) if not label]
    pairs = list(itertools.product(positives, negatives))
    return Fraction(sum(2 * (p > n) + (p == n) for p, n in pairs), 2 * len(pairs))


def labelled(seed, levels):
    """Scores of which many are equal, and labels of both kinds."""
    generator = np.random.default_rng(seed)
    count = int(generator.integers(2, 40))
    labels = generator.integers(0, 2, count).astype(bool)
    labels[:2] = True, False
    return generator.integers(-levels, levels + 1, count).astype(np.float32) / 4, labels


class TestAreaUnderCurve:
    @given(seed=st.integers(0, 2**32 - 1), levels=st.integers(0, 30))
    def test_equals_counting_all_pairs(self, seed, levels):
        scores, labels = labelled(seed, levels)
        assert area_under_curve(scores, labels) == float(pairs_in_order(scores.tolist(), labels.tolist()))

    @pytest.mark.parametrize("value", [0.0, -3.5, math.inf, -math.inf])
    def test_a_constant_score_is_a_guess(self, value):
        assert area_under_curve(np.full(5, value), np.array([True, False, False, True, False])) == 0.5

    def test_right_and_wrong_order(self):
        labels = np.array([False, True, True])
        assert area_under_curve(np.array([0.1, 0.2, math.inf]), labels) == 1.0
        assert area_under_curve(-np.array([0.1, 0.2, math.inf]), labels) == 0.0

    @given(seed=st.integers(0, 2**32 - 1))
    def test_other_labels_and_the_same_order_of_other_scores(self, seed):
        scores, labels = labelled(seed, 9)
        found = area_under_curve(scores, labels)
        assert area_under_curve(scores, ~labels) == pytest.approx(1 - found, abs=1e-15)
        assert area_under_curve(np.exp(scores.astype(np.float64)), labels) == found

    def test_many_pairs_do_not_overflow(self):
        count = 200_000
        labels = np.arange(count) % 2 == 1
        assert area_under_curve(np.zeros(count), labels) == 0.5
        assert area_under_curve(labels.astype(np.float32), labels) == 1.0


class TestNormalisedEntropy:
    @given(seed=st.integers(0, 2**32 - 1))
    def test_equals_the_definition_in_decimal(self, seed):
        logits, labels = labelled(seed, 60)
        with decimal.localcontext() as context:
            context.prec = 60
            one, share = decimal.Decimal(1), decimal.Decimal(int(labels.sum())) / labels.shape[0]
            loss = decimal.Decimal(0)
            for logit, label in zip(logits.tolist(), labels.tolist(), strict=True):
                probability = one / (one + (-decimal.Decimal(logit)).exp())
                loss -= (probability if label else one - probability).ln()
            base = -(share * share.ln() + (one - share) * (one - share).ln())
            expected = float(loss / labels.shape[0] / base)
        assert normalised_entropy(logits, labels) == pytest.approx(expected, rel=1e-13)

    def test_predicting_the_share_is_one(self):
        labels = np.array([True, False, False, False])
        assert normalised_entropy(np.full(4, -math.log(3)), labels) == pytest.approx(1.0, abs=1e-15)

    def test_a_sure_and_right_model_is_zero_and_a_sure_and_wrong_one_is_finite(self):
        labels = np.array([True, False])
        assert normalised_entropy(np.array([90.0, -90.0], np.float32), labels) < 1e-38
        assert normalised_entropy(np.array([-90.0, 90.0], np.float32), labels) == pytest.approx(90 / math.log(2))

    def test_an_infinite_logit_on_the_wrong_side_is_an_infinite_loss(self):
        assert normalised_entropy(np.array([math.inf, 0.0]), np.array([False, True])) == math.inf


@pytest.mark.parametrize("metric", [area_under_curve, normalised_entropy])
@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([0.5, math.nan], [True, False], "NaN"),
        ([0.5, 0.1], [True, True], "2 of 2 labels are positive"),
        ([0.5, 0.1], [False, False], "0 of 2 labels are positive"),
        ([], [], "0 of 0 labels"),
        ([0.5, 0.1], [True], r"\[2\] and \[1\]"),
        ([[0.5], [0.1]], [[True], [False]], r"\[2, 1\]"),
    ],
)
def test_what_has_no_auc_and_no_entropy_is_refused(metric, scores, labels, message):
    with pytest.raises(ValueError, match=message):
        metric(np.array(scores, np.float32), np.array(labels, np.bool_))


@pytest.mark.parametrize("metric", [area_under_curve, normalised_entropy])
def test_labels_are_not_probabilities(metric):
    with pytest.raises(ValueError, match=r"second bool; got .* float32"):
        metric(np.array([0.5, 0.1]), np.array([1.0, 0.0], np.float32))
