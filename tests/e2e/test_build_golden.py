"""Meta's own checkpoint, built: layer by layer against what the original code computed, and on all 943 users."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx
import pytest

from hstu_compile import load_bundle
from hstu_compile.checkpoint import config_from_file, model_from_spec, spec_from_checkpoint
from hstu_compile.compare import row_error
from hstu_compile.metrics import RankMetrics, rank_metrics, target_ranks
from hstu_compile.model import RetrievalModel
from tests.e2e.conftest import FIXTURE, Build
from tests.rewrite.attention_graphs import run_onnx

import prepare_data

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

RELATIVE = 1e-5


@pytest.fixture(scope="module")
def spec(golden: dict[str, Any]) -> Any:
    return spec_from_checkpoint(FIXTURE / "ckpt.pt", config_from_file(FIXTURE / "config.json"))


@pytest.fixture(scope="module")
def eager(spec: Any) -> RetrievalModel:
    return model_from_spec(spec)


@pytest.fixture(scope="module")
def histories() -> prepare_data.Histories:
    try:
        return prepare_data.load_histories(prepare_data.fetch())
    except prepare_data.DataError as error:
        pytest.skip(f"MovieLens-100K: {error}")


#: Of one build; the lists of best items change nothing in front of them.
WHOLE_CATALOGUE = ("--fp32", "--top-k", 1682, "--backend", "onnx")


def last_rows(feeds: dict[str, Any]) -> Any:
    """Index of the last row of each sequence: all that a built graph computes of its last layer."""
    return feeds["seq_offsets"][1:] - 1


def check_relative(actual: Any, expected: Any) -> None:
    """Within 1e-5 of the largest value of each row; a row that must be zero must be zero."""
    assert actual.shape == expected.shape
    assert row_error(actual, expected.astype(np.float64)).error <= RELATIVE
    scale = np.abs(expected).max(axis=1)
    assert (np.abs(actual - expected).max(axis=1) <= RELATIVE * scale).all()


def test_every_layer_and_the_user_embeddings_equal_the_originals(
    build_fixture: Build, golden: dict[str, Any], golden_feeds: dict[str, Any]
) -> None:
    built = build_fixture(*WHOLE_CATALOGUE)
    assert built.result.exit_code == 0, built.result.stderr
    taps = ["layer_0", "layer_1", "layer_2"]
    outputs = run_onnx(onnx.load(built.path / "model.onnx"), golden_feeds, taps)
    for tap in taps[:-1]:
        check_relative(outputs[tap], golden[tap])
    check_relative(outputs["layer_2"], golden["layer_2"][last_rows(golden_feeds)])
    check_relative(outputs["user_embeddings"], golden["current"])


def test_scores_from_the_user_embeddings_equal_the_originals(
    build_fixture: Build, golden: dict[str, Any], golden_feeds: dict[str, Any], eager: RetrievalModel
) -> None:
    with load_bundle(build_fixture(*WHOLE_CATALOGUE).path) as bundle:
        users = bundle.run(golden_feeds)["user_embeddings"]
    check_relative(users @ eager.item_vectors().numpy().T, golden["scores"])


def test_top_scores_of_the_whole_catalogue_equal_the_originals(
    build_fixture: Build, golden: dict[str, Any], golden_feeds: dict[str, Any]
) -> None:
    built = build_fixture(*WHOLE_CATALOGUE)
    assert built.result.exit_code == 0, built.result.stderr
    with load_bundle(built.path) as bundle:
        outputs = bundle.run(golden_feeds)
    owner = np.repeat(np.arange(16), np.diff(golden_feeds["seq_offsets"]))
    for user in range(16):
        history = np.unique(golden_feeds["item_ids"][owner == user])
        listed = outputs["top_items"][user]
        unseen = np.setdiff1d(np.arange(1, 1683), history)
        np.testing.assert_array_equal(np.sort(listed[listed > 0]), unseen)
        assert (listed[: len(unseen)] > 0).all()
        expected = golden["scores"][user][listed[: len(unseen)] - 1]
        check_relative(outputs["top_scores"][user, None, : len(unseen)], expected[None])


def test_the_float16_artifact_errs_at_most_twice_as_much_as_eager_float16(
    build_fixture: Build, golden: dict[str, Any], golden_feeds: dict[str, Any], spec: Any
) -> None:
    import torch

    built = build_fixture("--fp16")
    assert built.result.exit_code == 0, built.result.stderr
    half = model_from_spec(spec, torch.float16)
    tensors = {name: torch.from_numpy(array) for name, array in golden_feeds.items()}
    with torch.inference_mode():
        activations = half.layer_activations(**tensors)
        plain = {f"layer_{i}": activation.float().numpy() for i, activation in enumerate(activations)}
        plain["layer_2"] = plain["layer_2"][last_rows(golden_feeds)]
        plain["user_embeddings"] = half.user_embeddings(activations[-1], tensors["seq_offsets"]).numpy()
    outputs = run_onnx(onnx.load(built.path / "model.onnx"), golden_feeds, list(plain))
    expected = {**{f"layer_{i}": golden[f"layer_{i}"] for i in range(2)}, "user_embeddings": golden["current"]}
    expected["layer_2"] = golden["layer_2"][last_rows(golden_feeds)]
    for name, value in expected.items():
        own = row_error(plain[name], value.astype(np.float64)).error
        assert 1e-5 < own < 0.05
        assert row_error(outputs[name], value.astype(np.float64)).error <= 2 * own, name


def metrics_of(built_path: Any, histories: prepare_data.Histories, items: Any) -> RankMetrics:
    ranks = []
    with load_bundle(built_path) as bundle:
        for feeds, target_ids in prepare_data.evaluation_feeds(histories):
            scores = bundle.run(feeds)["user_embeddings"] @ items.T
            ranks.append(target_ranks(scores, target_ids, feeds["item_ids"], feeds["seq_offsets"]))
    return rank_metrics(ranks)


# Half a minute, and the golden test above holds the same artifact to 1e-5 on 16 of the users.
@pytest.mark.slow
def test_the_float32_artifact_gives_the_published_metrics_on_all_users(
    build_fixture: Build, histories: prepare_data.Histories, eager: RetrievalModel
) -> None:
    published = json.loads((FIXTURE / "config.json").read_text())["metrics_eager_fp32"]
    metrics = metrics_of(build_fixture("--fp32").path, histories, eager.item_vectors().numpy())
    assert metrics.num_requests == 943
    named = {"HR10": metrics.hr10, "NDCG10": metrics.ndcg10, "HR50": metrics.hr50, "MRR": metrics.mrr}
    assert {name: round(value, 4) for name, value in named.items()} == {
        name: round(value, 4) for name, value in published.items()
    }


# That float16 errs no more than the eager model is above, and the metrics of the eager model are in test_demo.py.
@pytest.mark.slow
def test_the_float16_artifact_keeps_the_published_metrics_on_all_users(
    build_fixture: Build, histories: prepare_data.Histories, eager: RetrievalModel
) -> None:
    published = json.loads((FIXTURE / "config.json").read_text())["metrics_eager_fp32"]
    metrics = metrics_of(build_fixture("--fp16").path, histories, eager.item_vectors().numpy())
    assert metrics.num_requests == 943
    assert abs(metrics.hr10 - published["HR10"]) <= 0.002
    assert abs(metrics.ndcg10 - published["NDCG10"]) <= 0.002
