"""Quality of models on labelled requests: against the metrics by hand, and what counts as a change."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hstu_compile.labelled_requests import labelled_requests
from hstu_compile.metrics import area_under_curve, normalised_entropy, rank_metrics, target_ranks
from hstu_compile.quality import Answers, Quality, answers_of, changes, quality_of, score_difference, worst_change
from tests.dlrm_reference import DlrmForm
from tests.exported_models import ranking_model, small_config, small_model
from tests.labelled_cases import ranking_arrays, retrieval_arrays

LENGTHS = [3, 0, 20, 1, 7, 20, 12, 5]
CANDIDATES = [2, 5, 0, 1, 8, 3, 1, 1]
TASKS = (("like", "BINARY_CLASSIFICATION"), ("share", "BINARY_CLASSIFICATION"), ("seconds", "REGRESSION"))


@pytest.fixture
def retrieval(tmp_path):
    model = small_model(small_config())
    arrays = retrieval_arrays(model.config, LENGTHS)
    np.savez(tmp_path / "r.npz", **arrays)
    return model, labelled_requests(tmp_path / "r.npz", model.config), arrays


@pytest.fixture
def ranking(tmp_path):
    model = ranking_model(DlrmForm(tasks=TASKS, scaling_seq_len=50.0))
    arrays = ranking_arrays(model.config, LENGTHS, CANDIDATES)
    np.savez(tmp_path / "r.npz", **arrays)
    return model, labelled_requests(tmp_path / "r.npz", model.config), arrays


def test_retrieval_quality_is_that_of_the_ranks(retrieval):
    model, requests, arrays = retrieval
    targets = arrays.pop("target_ids")
    feeds = {name: torch.from_numpy(array) for name, array in arrays.items()}
    scores = model(**feeds).numpy() @ model.item_vectors().numpy().T
    ranks = target_ranks(scores, targets, arrays["item_ids"], arrays["seq_offsets"])
    expected = rank_metrics([ranks])
    found = quality_of(model, answers_of(model, requests), requests)
    assert found.ranks.tolist() == ranks[np.argsort(LENGTHS, kind="stable")].tolist()
    assert found.values == pytest.approx(
        {"HR@10": expected.hr10, "NDCG@10": expected.ndcg10, "HR@50": expected.hr50, "MRR": expected.mrr}, rel=1e-14
    )


def test_ranking_quality_is_of_each_binary_task(ranking):
    model, requests, arrays = ranking
    labels = arrays.pop("labels").astype(bool)
    logits = model.packed({name: torch.from_numpy(array) for name, array in arrays.items()}).logits.numpy()
    found = quality_of(model, answers_of(model, requests), requests)
    assert found.ranks is None
    assert found.values == pytest.approx(
        {
            "AUC like": area_under_curve(logits[:, 0], labels[:, 0]),
            "NE like": normalised_entropy(logits[:, 0], labels[:, 0]),
            "AUC share": area_under_curve(logits[:, 1], labels[:, 1]),
            "NE share": normalised_entropy(logits[:, 1], labels[:, 1]),
        },
        rel=1e-6,  # the batch is put together in another order
    )


def test_another_form_is_judged_by_its_own_answers(retrieval):
    model, requests, _ = retrieval
    zeros = answers_of(model, requests, lambda feeds: np.zeros((len(feeds["seq_offsets"]) - 1, 32), np.float32))
    found = quality_of(model, zeros, requests)
    assert found.values["HR@10"] == 0.0
    exact = answers_of(model, requests)
    assert score_difference(exact, zeros) == 1.0
    assert score_difference(exact, exact) == 0.0


def test_nan_is_never_within_a_budget(ranking, retrieval):
    for model, requests, _ in (ranking, retrieval):
        exact = answers_of(model, requests)
        broken = Answers(tuple(np.full_like(output, np.nan) for output in exact.outputs), exact.item_vectors)
        assert score_difference(exact, broken) == math.inf
        reference, measured = (quality_of(model, each, requests) for each in (exact, broken))
        assert worst_change(reference, measured) > 0.1


def test_a_half_model_is_asked_in_its_own_type(retrieval):
    model, requests, _ = retrieval
    half = small_model(small_config(), "fp16")
    difference = score_difference(answers_of(model, requests), answers_of(half, requests))
    assert 1e-5 < difference < 1e-2


def test_score_difference_is_relative_to_all_scores(ranking):
    model, requests, _ = ranking
    exact = answers_of(model, requests)
    louder = Answers(tuple(1.01 * output for output in exact.outputs))
    assert score_difference(exact, louder) == pytest.approx(0.01, rel=1e-4)


def test_changes_are_absolute_for_ranks_and_relative_for_auc_and_ne():
    before = Quality({"HR@10": 0.5, "NDCG@10": 0.25, "HR@50": 0.5, "MRR": 0.2})
    after = Quality({"HR@10": 0.502, "NDCG@10": 0.246, "HR@50": 0.1, "MRR": 0.9})
    assert changes(before, after) == pytest.approx({"HR@10": 0.002, "NDCG@10": -0.004, "HR@50": -0.4, "MRR": 0.7})
    assert worst_change(before, after) == pytest.approx(0.004)
    before, after = Quality({"AUC t": 0.8, "NE t": 0.5}), Quality({"AUC t": 0.8004, "NE t": 0.501})
    assert changes(before, after) == pytest.approx({"AUC t": 0.0005, "NE t": 0.002})
    assert worst_change(before, after) == pytest.approx(0.002)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_metric_that_is_no_number_is_infinitely_worse(value):
    assert worst_change(Quality({"AUC t": 0.8, "NE t": 0.5}), Quality({"AUC t": 0.8, "NE t": value})) == math.inf


def test_a_change_to_the_better_counts():
    names = ("HR@10", "NDCG@10", "HR@50", "MRR")
    before, after = (Quality(dict.fromkeys(names, value)) for value in (0.5, 0.7))
    assert worst_change(before, after) == pytest.approx(0.2)
