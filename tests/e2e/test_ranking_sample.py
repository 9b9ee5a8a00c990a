"""The ranking sample, samples/02_ranking: parts on synthetic data, a short build and service, the whole (slow)."""

from __future__ import annotations

import dataclasses
import functools
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hstu_compile import open_ranking_session
from hstu_compile.checkpoint import model_from_spec, spec_from_checkpoint
from hstu_compile.model.ranking import RankingModel
from hstu_compile.runtime.ranking import RankingSession
from tests.e2e.conftest import Built, BuiltOnce, hstu_compile

import prepare_data
import ranking_data
import ranking_demo
import train
import train_ranker

REPOSITORY = Path(__file__).resolve().parents[2]
NUM_LIKED_ITEMS = 15

pytestmark = pytest.mark.e2e


def synthetic_histories(num_users: int = 24, num_items: int = 30, seed: int = 0) -> prepare_data.Histories:
    """Users who like the first NUM_LIKED_ITEMS films and dislike the others, whoever they are, in 5 ratings of 6."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(20, 29, num_users)
    items = np.concatenate([generator.permutation(num_items)[:length] for length in lengths]) + 1
    times = [880_000_000 + np.cumsum(generator.integers(30, 90_000, length)) for length in lengths]
    is_liked = (items <= NUM_LIKED_ITEMS) ^ (generator.random(items.shape) < 1 / 6)
    return prepare_data.Histories(
        seq_offsets=np.concatenate([[0], np.cumsum(lengths)]),
        item_ids=items.astype(np.int32),
        timestamps=np.concatenate(times),
        ratings=np.where(is_liked, 5, 2).astype(np.int32),
    )


def small_recipe(**changes: float) -> train_ranker.Recipe:
    return dataclasses.replace(train_ranker.Recipe(epochs=8, batch_size=8, learning_rate=4e-3), **changes)


class TestRequests:
    HISTORIES = prepare_data.Histories(
        seq_offsets=np.array([0, 2, 7]),
        item_ids=np.array([1, 2, 11, 12, 13, 14, 15], np.int32),
        timestamps=np.array([1, 2, 10, 20, 30, 40, 50]),
        ratings=np.array([1, 2, 1, 2, 3, 4, 5], np.int32),
    )

    def test_history_lies_before_the_first_candidate_and_has_action_bits(self):
        request = ranking_data.request_at(self.HISTORIES, user=1, first=5, last=7)
        assert {name: (array.dtype.name, array.tolist()) for name, array in request.history.items()} == {
            "movie_id": ("int32", [11, 12, 13]),
            "action_timestamp": ("int64", [10, 20, 30]),
            "item_weights": ("int32", [1, 2, 4]),
        }
        assert {name: (array.dtype.name, array.tolist()) for name, array in request.candidates.items()} == {
            "item_movie_id": ("int32", [14, 15]),
            "item_query_time": ("int64", [40, 40]),
        }
        assert request.context["user_id"].tolist() == [1]
        assert request.liked.tolist() == [True, True]

    def test_a_long_history_keeps_its_newest_events(self, monkeypatch):
        monkeypatch.setattr(ranking_data, "MAX_HISTORY", 2)
        assert ranking_data.request_at(self.HISTORIES, 1, 5, 6).history["movie_id"].tolist() == [12, 13]

    def test_pages_hold_unseen_films_and_follow_one_another(self):
        first, second = (ranking_data.page_request(self.HISTORIES, 1, number, 8, delay=7) for number in (0, 1))
        assert first.candidates["item_movie_id"].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
        assert second.candidates["item_movie_id"].tolist() == [9, 10, 16, 17, 18, 19, 20, 21]
        assert set(second.candidates["item_query_time"].tolist()) == {57}
        assert first.history["movie_id"].tolist() == [11, 12, 13, 14, 15]

    def test_training_never_sees_the_held_out_ratings(self):
        histories = synthetic_histories()
        marker = prepare_data.NUM_ITEMS
        items = histories.item_ids.copy()
        for end in histories.seq_offsets[1:]:
            items[end - ranking_data.NUM_HELD_OUT : end] = marker
        marked = dataclasses.replace(histories, item_ids=items)
        seen = [*ranking_data.training_requests(marked, np.random.default_rng(0))]
        assert len(seen) == histories.num_users
        for request in seen:
            assert not (request.history["movie_id"] == marker).any()
            assert not (request.candidates["item_movie_id"] == marker).any()
            assert 1 <= len(request.liked) <= ranking_data.MAX_TRAINING_CANDIDATES
            assert (request.history["action_timestamp"] <= request.candidates["item_query_time"][0]).all()
        for request in ranking_data.held_out_requests(marked):
            assert (request.candidates["item_movie_id"] == marker).all()
            assert not (request.history["movie_id"] == marker).any()

    def test_a_batch_holds_every_request_once(self):
        requests = ranking_data.held_out_requests(synthetic_histories())[:3]
        feeds = ranking_data.packed_feeds(requests)
        assert feeds["candidate_offsets"].tolist() == [0, 10, 20, 30]
        assert np.diff(feeds["seq_offsets"]).tolist() == [len(each.history["movie_id"]) for each in requests]
        start, stop = feeds["seq_offsets"][1:3]
        assert np.array_equal(feeds["item_weights"][start:stop], requests[1].history["item_weights"])
        assert feeds["user_id"].tolist() == [0, 1, 2]


class TestQuality:
    LIKED = np.array([True, False, True, False])

    @pytest.mark.parametrize(
        ("preds", "auc"),
        [
            ([0.9, 0.1, 0.8, 0.2], 1.0),
            ([0.1, 0.9, 0.2, 0.8], 0.0),
            ([0.5, 0.5, 0.5, 0.5], 0.5),
            ([0.9, 0.8, 0.7, 0.1], 0.75),
            ([0.9, 0.7, 0.7, 0.1], 0.875),
        ],
    )
    def test_auc_is_the_share_of_pairs_in_the_right_order(self, preds, auc):
        assert ranking_demo.quality(np.array(preds, np.float32), self.LIKED).auc == auc

    def test_predicting_the_share_of_likes_has_entropy_one(self):
        preds = np.full(5, 0.4)
        assert ranking_demo.quality(preds, np.array([1, 1, 0, 0, 0], bool)).ne == pytest.approx(1.0, rel=1e-12)
        better = ranking_demo.quality(np.array([0.8, 0.8, 0.1, 0.1, 0.1]), np.array([1, 1, 0, 0, 0], bool))
        expected = -(2 * np.log(0.8) + 3 * np.log(0.9)) / -(2 * np.log(0.4) + 3 * np.log(0.6))
        assert better.ne == pytest.approx(expected, rel=1e-12)

    def test_outcomes_of_one_kind_are_refused(self):
        with pytest.raises(ValueError, match=r"share of likes is 1\.0"):
            ranking_demo.quality(np.array([0.5, 0.6]), np.array([True, True]))


@functools.cache
def trained_ranker() -> tuple[RankingModel, prepare_data.Histories]:
    """The same numbers in every process: the recipe has its seed."""
    histories = synthetic_histories()
    model, loss = train_ranker.train(train_ranker.ranker_config(), histories, small_recipe(), show_progress=False)
    assert loss < 0.65
    return model, histories


def built_ranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the trained ranker, its checkpoint beside it; tests/triton/test_sample.py serves it as well."""

    def make(folder: Path) -> Built:
        checkpoint = folder / train_ranker.CHECKPOINT_NAME
        train.save_checkpoint(trained_ranker()[0], checkpoint)
        options = ("--m-falcon", f"micro-batch={ranking_demo.MICRO_BATCH}", "--backend", "onnx", "--max-batch", 8)
        return Built(folder / "bundle", hstu_compile("build", checkpoint, "-o", folder / "bundle", *options))

    built = BuiltOnce("ranker", tmp_path_factory).get((), make)
    assert built.result.exit_code == 0, built.result.stderr
    return built.path


@pytest.fixture(scope="module")
def trained() -> tuple[RankingModel, prepare_data.Histories]:
    return trained_ranker()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built_ranker(tmp_path_factory)


@pytest.fixture(scope="module")
def checkpoint(bundle: Path) -> Path:
    return bundle.with_name(train_ranker.CHECKPOINT_NAME)


def test_the_ranker_learns_what_is_liked(trained: tuple[RankingModel, prepare_data.Histories]):
    model, histories = trained
    requests = ranking_data.held_out_requests(histories)
    preds = ranking_demo.evaluate(ranking_demo.eager_scorer(model), requests)
    found = ranking_demo.quality(preds, np.concatenate([request.liked for request in requests]))
    assert found.auc > 0.75
    assert found.ne < 0.85


def test_the_seed_decides_the_weights():
    histories = synthetic_histories(num_users=8)

    def weights(seed: int) -> torch.Tensor:
        recipe = small_recipe(epochs=1, seed=seed)
        model, _ = train_ranker.train(train_ranker.ranker_config(), histories, recipe, show_progress=False)
        return model.position_embedding

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_the_checkpoint_is_the_trained_model(trained: tuple[RankingModel, prepare_data.Histories], checkpoint: Path):
    model, histories = trained
    spec = spec_from_checkpoint(checkpoint)
    assert spec.dialect == "native"
    assert spec.config == train_ranker.ranker_config()
    restored = model_from_spec(spec)
    assert isinstance(restored, RankingModel)
    requests = ranking_data.held_out_requests(histories)
    scores = [ranking_demo.eager_scorer(each)(requests) for each in (model, restored)]
    assert np.array_equal(*scores)


def test_pages_are_a_miss_a_hit_and_stale(
    trained: tuple[RankingModel, prepare_data.Histories], bundle: Path, monkeypatch: pytest.MonkeyPatch
):
    model, histories = trained
    eager = ranking_demo.eager_scorer(model)
    with open_ranking_session(bundle, kv_budget_bytes=ranking_demo.KV_BUDGET_BYTES) as session:
        visits = ranking_demo.visit_pages(session, eager, histories)
        stats = session.stats()
        assert ranking_demo.KV_BUDGET_BYTES // session.entry_bytes(ranking_data.MAX_HISTORY) == 31
    assert [visit.cache for visit in visits] == ["miss", "hit", "stale"]
    assert all(visit.milliseconds > 0 for visit in visits)
    assert max(visit.difference for visit in visits) < 1e-5
    # One pass each for the user who is served first.
    assert (stats.prefill_passes, stats.score_passes, stats.packed_passes) == (3, 4, 0)
    rows = [line.split() for line in ranking_demo.visits_table(visits).splitlines()]
    assert [row[-6] for row in rows[1:]] == ["miss", "hit", "stale"]

    # The comparison is with the eager model: with another one it must show.
    with open_ranking_session(bundle, kv_budget_bytes=ranking_demo.KV_BUDGET_BYTES) as session:
        monkeypatch.setattr(RankingSession, "score", _with_swapped_candidates(RankingSession.score))
        swapped = ranking_demo.visit_pages(session, eager, histories)
    assert min(visit.difference for visit in swapped) > 1e-3


def _with_swapped_candidates(score):
    def swapped(session, requests, **options):
        results = score(session, requests, **options)
        return [dataclasses.replace(result, preds=result.preds[::-1]) for result in results]

    return swapped


def test_serving_prints_equal_quality_of_every_form(
    trained: tuple[RankingModel, prepare_data.Histories],
    checkpoint: Path,
    bundle: Path,
    capsys: pytest.CaptureFixture[str],
):
    _, histories = trained
    ranking_demo.serve(checkpoint, bundle, histories)
    rows = quality_rows(capsys.readouterr().out)
    assert list(rows) == ["eager packed", "built packed", "built prefill, score"]
    assert len({tuple(row[:2]) for row in rows.values()}) == 1
    assert rows["eager packed"][2] == 0
    assert 0 < max(row[2] for row in rows.values()) < 1e-5


def quality_rows(output: str) -> dict[str, list[float]]:
    """AUC, NE and largest difference by name."""
    found = re.findall(r"^(\S.*?) {2,}(\d\.\d{4}) +(\d\.\d{4}) +(\d\.\de[+-]\d+)$", output, re.MULTILINE)
    return {name: [float(cell) for cell in cells] for name, *cells in found}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_sample(tmp_path: Path):
    try:
        prepare_data.fetch()
    except prepare_data.DataError as error:
        pytest.skip(f"MovieLens-100K: {error}")
    program = REPOSITORY / "samples" / "02_ranking" / "ranking_demo.py"
    result = subprocess.run(
        [sys.executable, str(program), "-o", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    rows = quality_rows(result.stdout)
    assert list(rows) == ["eager packed", "built packed", "built prefill, score"]
    assert rows["eager packed"][0] >= 0.72
    assert rows["eager packed"][1] <= 0.90
    for name in ("built packed", "built prefill, score"):
        assert rows[name][:2] == rows["eager packed"][:2]
    assert re.findall(r" (miss|hit|stale) ", result.stdout) == ["miss", "hit", "stale"]
    assert (tmp_path / "bundle" / "report.html").is_file()
