"""Odd requests through `hstu-compile run`, against the eager model in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hstu_compile.calibration.batches import retrieval_batch
from hstu_compile.checkpoint import model_from_spec, spec_from_checkpoint
from hstu_compile.compare import EAGER_FLOOR, row_error
from hstu_compile.model.config import RetrievalConfig
from tests.e2e.conftest import Build, hstu_compile
from tests.exported_models import small_config

pytestmark = pytest.mark.e2e

SHAPES = {
    "one event": [1],
    "one empty sequence": [0],
    "an empty sequence among others": [3, 0, 7],
    "empty at both ends": [0, 5, 0],
    "exactly the longest": [20],
    "longest among short": [1, 20, 2],
    "as many sequences as fit": [1 + i % 20 for i in range(64)],
}

CONFIGS = {
    "two heads of 25": None,
    "one wide head, hour encoding": small_config(
        num_layers=1, attention={"num_heads": 1, "attention_dim": 50, "linear_dim": 17}, hour_encoding="additive"
    ),
    "hour encoding alone": small_config(num_layers=1, hour_encoding="additive", num_positions=0),
    "rated": small_config(num_layers=1, preprocessor="rated", item_embedding_dim=24, num_ratings=5),
}


def run_bundle(bundle: Path, arrays: dict[str, Any], folder: Path) -> dict[str, Any]:
    np.savez(folder / "in.npz", **arrays)
    result = hstu_compile("run", bundle, "--inputs", folder / "in.npz", "--outputs", folder / "out.npz")
    assert result.exit_code == 0, result.stderr
    with np.load(folder / "out.npz") as archive:
        return {name: archive[name] for name in archive.files}


def eager_users(checkpoint: Path, arrays: dict[str, Any], dtype: torch.dtype) -> Any:
    model = model_from_spec(spec_from_checkpoint(checkpoint), dtype)
    with torch.inference_mode():
        return model(**{name: torch.from_numpy(array) for name, array in arrays.items()}).numpy()


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def check_run(
    build_small: Build, config: RetrievalConfig | None, precision: str, lengths: list[int], folder: Path
) -> None:
    built = build_small(f"--{precision}", "--top-k", 10, config=config)
    assert built.result.exit_code == 0, built.result.stderr
    arrays = retrieval_batch("odd", config or small_config(), lengths, seed=21).arrays
    outputs = run_bundle(built.path, arrays, folder)
    checkpoint = built.path.with_name("small.pt")
    exact = eager_users(checkpoint, arrays, torch.float64)
    own = row_error(eager_users(checkpoint, arrays, DTYPES[precision]), exact).error
    actual = outputs["user_embeddings"]
    assert actual.dtype == np.float32
    assert row_error(actual, exact).error <= 2 * max(own, EAGER_FLOOR[precision])
    assert (actual[np.array(lengths) == 0] == 0).all()
    assert (np.linalg.norm(actual[np.array(lengths) > 0], axis=1) > 0.9).all()


# Each precision with every shape, and each model with one precision: a build of each is most of what the tests cost.
@pytest.mark.parametrize(
    ("name", "precision"),
    [("two heads of 25", "fp32"), ("one wide head, hour encoding", "fp16"), ("two heads of 25", "bf16")],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_odd_shapes(build_small: Build, tmp_path: Path, shape: str, name: str, precision: str) -> None:
    check_run(build_small, CONFIGS[name], precision, SHAPES[shape], tmp_path)


# The graph with an hour encoding alone is compared with its model in tests/unit/test_export.py.
@pytest.mark.parametrize("name", [pytest.param("hour encoding alone", marks=pytest.mark.slow), "rated"])
def test_every_kind_of_input_feature(build_small: Build, tmp_path: Path, name: str) -> None:
    check_run(build_small, CONFIGS[name], "fp16", SHAPES["longest among short"], tmp_path)


def test_the_batch_that_an_event_arrives_in_does_not_change_its_answer(build_small: Build, tmp_path: Path) -> None:
    built = build_small("--fp32", "--top-k", 10)
    arrays = retrieval_batch("three", small_config(), [6, 20, 3], seed=22).arrays
    together = run_bundle(built.path, arrays, tmp_path)["user_embeddings"]
    offsets = arrays["seq_offsets"]
    for b in range(3):
        rows = slice(offsets[b], offsets[b + 1])
        alone = {
            "item_ids": arrays["item_ids"][rows],
            "timestamps": arrays["timestamps"][rows],
            "seq_offsets": np.array([0, offsets[b + 1] - offsets[b]], np.int32),
            "request_timestamps": arrays["request_timestamps"][b : b + 1],
        }
        users = run_bundle(built.path, alone, tmp_path)["user_embeddings"]
        assert row_error(users, together[b : b + 1].astype(np.float64)).error <= 1e-6


@pytest.mark.parametrize(
    ("lengths", "problem"), [([21], "21 events; at most 20"), ([1] * 65, "65 sequences; at most 64")]
)
def test_a_request_beyond_the_profile_is_refused(
    build_small: Build, tmp_path: Path, lengths: list[int], problem: str
) -> None:
    built = build_small("--fp32", "--top-k", 10)
    np.savez(tmp_path / "in.npz", **retrieval_batch("long", small_config(), lengths, seed=1).arrays)
    result = hstu_compile("run", built.path, "--inputs", tmp_path / "in.npz", "--outputs", tmp_path / "out.npz")
    assert result.exit_code == 7
    assert problem in result.stderr
    assert not (tmp_path / "out.npz").exists()


def test_an_unpruned_build_gives_the_same_answers(build_small: Build, tmp_path: Path) -> None:
    arrays = retrieval_batch("odd", small_config(), [3, 0, 7, 20], seed=5).arrays
    answers = []
    for options in ((), ("--no-prune",)):
        built = build_small("--fp32", "--top-k", 10, *options)
        assert built.result.exit_code == 0, built.result.stderr
        report = json.loads((built.path / "report.json").read_text())
        names = [record["name"] for record in report["graphs"][0]["passes"]]
        assert ("prune_last_layer" in names) is (not options)
        (tmp_path / str(len(options))).mkdir()
        answers.append(run_bundle(built.path, arrays, tmp_path / str(len(options)))["user_embeddings"])
    assert row_error(answers[0], answers[1].astype(np.float64)).error <= 1e-5
    assert not answers[0][1].any()
