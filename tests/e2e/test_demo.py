"""The demo of samples/01_movielens_demo: parts on synthetic data, evaluation of Meta's checkpoint, the whole (slow)."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from hstu_compile.checkpoint import config_from_file, model_from_spec, spec_from_checkpoint

import demo
import prepare_data
import train

REPOSITORY = Path(__file__).resolve().parents[2]
FIXTURE = REPOSITORY.parent / "shared" / "fixtures" / "meta_research_ml100k"

pytestmark = pytest.mark.e2e

requires_fixture = pytest.mark.skipif(not FIXTURE.is_dir(), reason="shared/fixtures/meta_research_ml100k is absent")


def synthetic_histories(num_users: int = 40, cycle: int = 30, seed: int = 0) -> prepare_data.Histories:
    """Users who walk through the same `cycle` items in the same order, each from another start: fully predictable."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(8, 25, num_users)
    items = [1 + (generator.integers(cycle) + np.arange(length)) % cycle for length in lengths]
    times = [880_000_000 + np.cumsum(generator.integers(30, 90, length)) for length in lengths]
    return prepare_data.Histories(
        seq_offsets=np.concatenate([[0], np.cumsum(lengths)]),
        item_ids=np.concatenate(items).astype(np.int32),
        timestamps=np.concatenate(times),
        ratings=generator.integers(1, 6, int(lengths.sum())).astype(np.int32),
    )


@pytest.fixture(scope="module")
def movielens() -> prepare_data.Histories:
    try:
        return prepare_data.load_histories(prepare_data.fetch())
    except prepare_data.DataError as error:
        pytest.skip(f"MovieLens-100K: {error}")


class TestEvaluationFeeds:
    def test_splits_each_user_into_history_request_and_target(self):
        histories = prepare_data.Histories(
            seq_offsets=np.array([0, 4, 5, 7]),
            item_ids=np.array([11, 12, 13, 14, 21, 31, 32], dtype=np.int32),
            timestamps=np.array([1, 2, 3, 4, 5, 6, 7]),
            ratings=np.array([1, 2, 3, 4, 5, 1, 2], dtype=np.int32),
        )
        first, second = prepare_data.evaluation_feeds(histories, batch_size=2, max_events=2, with_ratings=True)
        assert first.feeds["item_ids"].tolist() == [12, 13]
        assert first.feeds["timestamps"].tolist() == [2, 3]
        assert first.feeds["ratings"].tolist() == [2, 3]
        assert first.feeds["seq_offsets"].tolist() == [0, 2, 2]
        assert first.feeds["request_timestamps"].tolist() == [4, 5]
        assert first.target_ids.tolist() == [14, 21]
        assert second.feeds["item_ids"].tolist() == [31]
        assert second.target_ids.tolist() == [32]

    def test_types_are_the_graph_inputs(self):
        (batch,) = prepare_data.evaluation_feeds(synthetic_histories())
        assert {name: array.dtype.name for name, array in batch.feeds.items()} == {
            "item_ids": "int32",
            "timestamps": "int64",
            "seq_offsets": "int32",
            "request_timestamps": "int64",
        }


class TestFetch:
    def test_offline_says_what_to_copy_where_and_leaves_nothing(self, tmp_path, monkeypatch):
        for name, value in {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(prepare_data.DataError, match=r"(?s)recbole==1\.2\.1.*copy ml-100k\.inter") as caught:
            prepare_data.fetch(tmp_path / "data")
        assert str(tmp_path / "data" / "ml-100k.inter") in str(caught.value)
        assert list((tmp_path / "data").iterdir()) == []

    def test_a_wheel_with_other_data_is_refused(self, tmp_path, monkeypatch):
        def download(command, **_):
            with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "recbole.whl", "w") as wheel:
                wheel.writestr(prepare_data.WHEEL_MEMBER, "something else")
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(prepare_data.subprocess, "run", download)
        with pytest.raises(prepare_data.DataError, match="has sha256"):
            prepare_data.fetch(tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_another_header_is_refused(self, tmp_path):
        path = tmp_path / "x.inter"
        path.write_text("user,item\n1,2\n")
        with pytest.raises(prepare_data.DataError, match="starts with 'user,item'"):
            prepare_data.load_histories(path)

    def test_events_of_one_second_are_ordered_by_item(self, tmp_path):
        path = tmp_path / "x.inter"
        path.write_text(prepare_data.DATA_HEADER + "\n2\t9\t1\t5\n1\t8\t3\t20\n1\t7\t2\t20\n1\t9\t4\t10\n")
        histories = prepare_data.load_histories(path)
        assert histories.seq_offsets.tolist() == [0, 3, 4]
        assert histories.item_ids.tolist() == [9, 7, 8, 9]
        assert histories.ratings.tolist() == [4, 2, 3, 1]


@pytest.mark.parametrize(("hour_encoding", "positions"), [("none", True), ("additive", False)])
def test_trains_saves_and_recommends(tmp_path, hour_encoding, positions):
    histories = synthetic_histories()
    config = train.research_config(hour_encoding=hour_encoding, positions=positions)
    recipe = train.Recipe(epochs=15, batch_size=10, dropout=0.0)
    model, loss = train.train(config, histories, recipe, show_progress=False)
    assert loss < 2.0
    train.save_checkpoint(model, tmp_path / "checkpoint.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]

    spec = spec_from_checkpoint(tmp_path / "checkpoint.pt")
    assert spec.dialect == "native"
    assert spec.config == config
    restored = model_from_spec(spec)
    trained = demo.evaluate(demo.eager_encoder(model), model.item_vectors().detach().numpy(), histories)
    evaluations = {
        "eager fp32": demo.evaluate(demo.eager_encoder(restored), restored.item_vectors().numpy(), histories)
    }
    assert evaluations["eager fp32"].metrics == trained.metrics
    assert np.array_equal(evaluations["eager fp32"].top_items, trained.top_items)
    assert trained.metrics.hr10 > 0.9

    half = model_from_spec(spec, torch.float16)
    evaluations["eager fp16"] = demo.evaluate(demo.eager_encoder(half), half.item_vectors().numpy(), histories)
    evaluations["zeros"] = demo.evaluate(
        lambda feeds: np.zeros((feeds["request_timestamps"].shape[0], train.EMBEDDING_DIM), np.float32),
        restored.item_vectors().numpy(),
        histories,
    )
    assert abs(evaluations["eager fp16"].metrics.hr10 - trained.metrics.hr10) <= 1 / histories.num_users
    assert evaluations["zeros"].metrics.hr50 == 0.0

    rows = demo.table(evaluations).splitlines()
    assert rows[0].split() == ["HR@10", "NDCG@10", "HR@50", "MRR", "same", "top", "10"]
    assert rows[1].split()[2:] == [
        *(f"{getattr(trained.metrics, name):.4f}" for name in ("hr10", "ndcg10", "hr50", "mrr")),
        "100.00%",
    ]
    assert float(rows[3].split()[-1].rstrip("%")) < 50


def test_the_seed_decides_the_weights():
    histories = synthetic_histories(num_users=12)

    def weights(seed: int) -> torch.Tensor:
        recipe = train.Recipe(epochs=2, batch_size=4, seed=seed)
        return train.train(train.research_config(), histories, recipe, show_progress=False)[0].item_embedding.weight

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_training_never_sees_the_evaluation_targets(monkeypatch):
    histories = synthetic_histories()
    marker = prepare_data.NUM_ITEMS
    items = histories.item_ids.copy()
    items[histories.seq_offsets[1:] - 1] = marker
    marked = dataclasses.replace(histories, item_ids=items)
    for max_events in (5, prepare_data.MAX_HISTORY):
        monkeypatch.setattr(prepare_data, "MAX_HISTORY", max_events)
        for batch in train.training_batches(marked, 8, np.random.default_rng(0)):
            assert batch.item_ids.shape == batch.next_ids.shape == batch.timestamps.shape
            assert not (batch.item_ids == marker).any()
            assert not (batch.next_ids == marker).any()
            assert np.diff(batch.seq_offsets).max() <= max_events
            last = batch.seq_offsets[1:].long() - 1
            assert (batch.request_timestamps > batch.timestamps[last]).all()


def test_an_interrupted_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"old")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.save_checkpoint(train.RetrievalModel(train.research_config()), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@requires_fixture
def test_the_event_order_is_that_of_metas_preprocessing(movielens):
    golden = np.load(FIXTURE / "golden.npz")
    requests = {}
    for feeds, target_ids in prepare_data.evaluation_feeds(movielens, with_ratings=True):
        for row, (start, end) in enumerate(zip(feeds["seq_offsets"][:-1], feeds["seq_offsets"][1:], strict=True)):
            key = (tuple(feeds["item_ids"][start:end].tolist()), int(target_ids[row]))
            requests[key] = (
                [*feeds["timestamps"][start:end].tolist(), int(feeds["request_timestamps"][row])],
                feeds["ratings"][start:end].tolist(),
            )
    assert golden["past_lengths"].shape == (16,)
    for row, length in enumerate(golden["past_lengths"].tolist()):
        key = (tuple(golden["past_ids"][row, :length].tolist()), int(golden["target_ids"][row]))
        assert key in requests, f"golden request {row} is not among ours"
        assert requests[key][0] == golden["timestamps"][row, : length + 1].tolist()
        assert requests[key][1] == golden["ratings"][row, :length].tolist()


@requires_fixture
def test_metas_checkpoint_reaches_its_published_metrics(movielens):
    user_config = config_from_file(FIXTURE / "config.json")
    model = model_from_spec(spec_from_checkpoint(FIXTURE / "ckpt.pt", user_config))
    metrics = demo.evaluate(demo.eager_encoder(model), model.item_vectors().numpy(), movielens).metrics
    published = json.loads((FIXTURE / "config.json").read_text())["metrics_eager_fp32"]
    assert metrics.num_requests == 943
    assert {
        "HR10": round(metrics.hr10, 4),
        "NDCG10": round(metrics.ndcg10, 4),
        "HR50": round(metrics.hr50, 4),
        "MRR": round(metrics.mrr, 4),
    } == {name: round(value, 4) for name, value in published.items()}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_demo(tmp_path, movielens):
    program = REPOSITORY / "samples" / "01_movielens_demo" / "demo.py"
    result = subprocess.run(
        [sys.executable, str(program), "-o", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    rows = {
        name: [float(cell) for cell in cells.split()]
        for name, cells in re.findall(r"^(\S.*?) {2,}((?:\d\.\d{4} +){4})", result.stdout, re.MULTILINE)
    }
    assert list(rows) == ["eager fp32", "eager fp16", "built artifact (fp16)"]
    assert rows["eager fp32"][0] >= 0.19
    for name in ("eager fp16", "built artifact (fp16)"):
        assert rows[name][:2] == pytest.approx(rows["eager fp32"][:2], abs=0.002)
    assert (tmp_path / "bundle" / "report.html").is_file()
