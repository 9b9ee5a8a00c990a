"""Retrieval models built with --incremental: bundles whose histories grow, and what they refuse."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from hstu_compile import RetrievalRequest, load_bundle, open_ranking_session, open_retrieval_session
from hstu_compile.compare import error_bound, row_error
from hstu_compile.errors import BundleError
from hstu_compile.model.config import RetrievalConfig
from hstu_compile.polygraphy_files import load_outputs
from tests.dlrm_reference import DlrmForm
from tests.e2e.conftest import Build, Built, hstu_compile, save_checkpoint, save_ranking_checkpoint
from tests.exported_models import small_config

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

MAX_APPEND = 4
OPTIONS = ("--incremental", f"max-append={MAX_APPEND}")
BUDGET = 1 << 22
#: One bundle serves every test that needs no other precision: three graphs are traced for each.
PLAIN = ("--fp32", "--top-k", 5)


def config_of() -> RetrievalConfig:
    """With time buckets that tell a minute from a year."""
    return small_config(attention={"num_time_buckets": 128})


def build(build_small: Build, *options: object) -> Built:
    built = build_small(*OPTIONS, *options, config=config_of())
    assert built.result.exit_code == 0, built.result.stderr
    return built


def manifest_of(built: Built) -> dict[str, Any]:
    return dict(json.loads((built.path / "manifest.json").read_text(encoding="utf-8")))


def history_of(seed: int, events: int, num_items: int = 40) -> dict[str, Any]:
    """Events from seconds to a year apart, and one time more."""
    rng = np.random.default_rng(seed)
    gaps = np.floor(10 ** rng.uniform(0, 7.5, events + 1)).astype(np.int64)
    return {"item_ids": rng.integers(1, num_items + 1, events), "timestamps": 1_400_000_000 + np.cumsum(gaps)}


def request_of(user: str, history: dict[str, Any], events: int) -> RetrievalRequest:
    """The first events, asked for at the time of the next one."""
    first = {name: array[:events] for name, array in history.items()}
    return RetrievalRequest(user, first, int(history["timestamps"][events]))


def feeds_of(requests: list[RetrievalRequest]) -> dict[str, Any]:
    """The same requests as one batch of whole histories."""
    lengths = [len(request.events["item_ids"]) for request in requests]
    return {
        **{name: np.concatenate([r.events[name] for r in requests]) for name in ("item_ids", "timestamps")},
        "seq_offsets": np.cumsum([0, *lengths]).astype(np.int32),
        "request_timestamps": np.array([request.request_timestamp for request in requests]),
    }


# test_build_quantized.py builds and verifies such a session in float16 in every run, with INT8 products; in bfloat16 a
# ranking model's cached keys and values are in tests/rewrite, with the attention that reads both.
@pytest.mark.parametrize(
    "precision", ["fp32", *(pytest.param(half, marks=pytest.mark.slow) for half in ("fp16", "bf16"))]
)
def test_growing_histories_answer_as_whole_ones(build_small: Build, precision: str) -> None:
    built = build(build_small, *(PLAIN if precision == "fp32" else (f"--{precision}",)))
    # ONNX Runtime has no bfloat16 on a CPU: what ran is a copy, which the line of the verification says.
    assert built.result.stderr.count("(bf16 widened to float32) PASS") == (4 if precision == "bf16" else 0)
    allowed = error_bound(manifest_of(built)["verification"]["session"]["eager_error"]["user_embeddings"], precision)
    histories = {f"user {seed}": history_of(seed, 20) for seed in range(5)}
    found = {"miss": 0, "appended": 0, "hit": 0}
    with (
        open_retrieval_session(built.path, kv_budget_bytes=BUDGET) as session,
        load_bundle(built.path) as bundle,
    ):
        for events in (0, 3, 7, 7, 8, 12, 16, 20):
            requests = [request_of(user, history, events) for user, history in histories.items()]
            whole = bundle.run(feeds_of(requests))["user_embeddings"].astype(np.float64)
            results = session.encode(requests)
            grown = np.stack([result.user_embedding for result in results])
            # Both lie within the bound of what is exact, perhaps on two sides of it.
            assert row_error(grown, whole).error <= 2 * allowed
            for result in results:
                found[result.cache] += 1
        stats = session.stats()
    assert found == {"miss": 5, "appended": 30, "hit": 5}
    assert (stats.encoded, stats.reused) == (5 * (0 + 3 + 5 + 1 + 2 + 5 + 5 + 5), 5 * (0 + 0 + 2 + 6 + 6 + 7 + 11 + 15))


def test_the_bundle_holds_three_graphs_and_what_they_were_compared_with(build_small: Build) -> None:
    built = build(build_small, *PLAIN)
    manifest = manifest_of(built)
    assert [graph["name"] for graph in manifest["graphs"]] == ["retrieval", "prefill", "append"]
    assert [graph["onnx"] for graph in manifest["graphs"]] == ["model.onnx", "prefill.onnx", "append.onnx"]
    names = {"model.onnx", "prefill.onnx", "append.onnx", "append_feeds.json", "prefill_reference_outputs.json"}
    assert names < set(manifest["files"])
    append = manifest["graphs"][2]
    assert [each["name"] for each in append["inputs"]][:7] == [
        *("item_ids", "timestamps", "seq_offsets", "request_timestamps"),
        *("cache_offsets", "cached_timestamps", "cached_item_ids"),
    ]
    outputs = ["user_embeddings", "top_items", "top_scores", "new_k_0", "new_v_0", "new_k_1", "new_v_1"]
    assert [each["name"] for each in append["outputs"]] == outputs
    spec = manifest["retrieval"]
    assert (spec["cache_rule"], spec["max_append"], spec["top_k"], spec["kv_dtype"]) == ("prefix", 4, 5, "float32")
    report = json.loads((built.path / "report.json").read_text(encoding="utf-8"))
    ran = {run["artifact"]: run["status"] for run in report["verification"]["runs"]}
    assert ran == {
        "model.onnx": "PASS",
        "prefill.onnx": "PASS",
        "append.onnx": "PASS",
        "session of model.onnx, prefill.onnx, append.onnx": "PASS",
    }
    assert "append.onnx" in (built.path / "report.html").read_text(encoding="utf-8")


def test_append_was_compared_with_what_one_forward_answers(build_small: Build) -> None:
    """The float64 answers that the graphs are held to are the same: the cut histories are those of the whole batch."""
    built = build(build_small, *PLAIN)
    whole = load_outputs(built.path / "reference_outputs.json")
    parts = load_outputs(built.path / "append_reference_outputs.json")
    errors = [
        row_error(other["user_embeddings"], one["user_embeddings"]).error
        for one, other in zip(whole, parts, strict=True)
    ]
    # Not the same numbers: append reads keys and values that were rounded to float32.
    assert 0 < max(errors) <= error_bound(0.0, "fp32")


def test_the_commands_work_on_such_a_bundle(build_small: Build, tmp_path: Any) -> None:
    built = build(build_small, *PLAIN)
    verified = hstu_compile("verify", built.path)
    assert verified.exit_code == 0, verified.stderr
    assert "append.onnx on onnxruntime" in verified.stdout
    assert "session of model.onnx, prefill.onnx, append.onnx on onnxruntime" in verified.stdout
    assert verified.stdout.count("polygraphy run") == 3
    facts = json.loads(hstu_compile("inspect", built.path, "--json").stdout)
    assert facts["retrieval"]["max_append"] == MAX_APPEND
    assert "append" in hstu_compile("inspect", built.path).stdout
    np.savez(tmp_path / "in.npz", **feeds_of([request_of("ann", history_of(1, 9), 9)]))
    ran = hstu_compile("run", built.path, "--inputs", tmp_path / "in.npz", "--outputs", tmp_path / "out.npz")
    assert ran.exit_code == 0, ran.stderr
    with np.load(tmp_path / "out.npz") as outputs:
        assert {name: outputs[name].shape for name in outputs} == {
            "user_embeddings": (1, 32),
            "top_items": (1, 5),
            "top_scores": (1, 5),
        }


def test_the_listed_items_are_those_of_one_forward(build_small: Build) -> None:
    built, history = build(build_small, *PLAIN), history_of(3, 12)
    with (
        open_retrieval_session(built.path, kv_budget_bytes=BUDGET) as session,
        load_bundle(built.path) as bundle,
    ):
        for events in (9, 12):
            request = request_of("ann", history, events)
            (result,) = session.encode([request])
            whole = bundle.run(feeds_of([request]))
            np.testing.assert_array_equal(result.top_items, whole["top_items"][0])
        assert result.cache == "appended"


def test_a_plain_bundle_has_no_session(build_small: Build) -> None:
    plain = build_small("--no-verify", config=small_config(num_layers=1))
    assert manifest_of(plain)["retrieval"] is None
    with pytest.raises(BundleError, match="cannot encode histories in parts"):
        open_retrieval_session(plain.path, kv_budget_bytes=BUDGET)
    with pytest.raises(BundleError, match="holds no ranking model"):
        open_ranking_session(build(build_small, *PLAIN).path, kv_budget_bytes=BUDGET)


def test_a_dry_run_says_what_would_be_built(tmp_path: Any) -> None:
    checkpoint = save_checkpoint(tmp_path / "small.pt", config_of())
    said = hstu_compile("build", checkpoint, "--dry-run", *OPTIONS).stdout
    assert "graphs      retrieval, prefill, append" in said
    assert "up to 4 new events each" in said


@pytest.mark.parametrize(
    ("value", "code", "text"),
    [
        ("4", "HSTU-E901", "write --incremental max-append=16"),
        ("max-append=four", "HSTU-E901", "write --incremental max-append=16"),
        ("max-append=20", "HSTU-E901", "allowed: 1 to 19 events"),
        ("max-append=0", "HSTU-E901", "allowed: 1 or more"),
    ],
)
def test_a_number_that_cannot_be_used_is_refused(tmp_path: Any, value: str, code: str, text: str) -> None:
    checkpoint = save_checkpoint(tmp_path / "small.pt", config_of())
    result = hstu_compile("build", checkpoint, "--dry-run", "--incremental", value)
    assert result.exit_code == 2
    assert code in result.stderr
    assert text in result.stderr


def test_a_family_whose_rule_forbids_it_is_refused_by_name(tmp_path: Any) -> None:
    checkpoint, config = save_ranking_checkpoint(tmp_path, DlrmForm())
    result = hstu_compile("build", checkpoint, "--config", config, "-o", tmp_path / "b.hstu", *OPTIONS)
    assert result.exit_code == 2
    assert "error[HSTU-E904] usage: --incremental max-append=4 cannot be used with this dlrm_v3 model" in result.stderr
    assert "positions count back from the query" in result.stderr
    assert not (tmp_path / "b.hstu").exists()


# --- Meta's own checkpoint --------------------------------------------------------------------------------------------


def test_metas_model_answers_growing_histories_as_the_original_answers_whole_ones(
    build_fixture: Build, golden: dict[str, Any], golden_feeds: dict[str, Any]
) -> None:
    built = build_fixture("--backend", "onnx", "--incremental", "max-append=16")
    assert built.result.exit_code == 0, built.result.stderr
    bounds, asked = golden_feeds["seq_offsets"], golden_feeds["request_timestamps"]
    kept = {}
    with open_retrieval_session(built.path, kv_budget_bytes=1 << 26) as session:
        for removed in (16, 7, 1, 0, 0):
            requests = []
            for user in range(len(asked)):
                stop = max(bounds[user], bounds[user + 1] - removed)
                rows = slice(bounds[user], stop)
                # Beginnings are asked for long after they ended, when the next event has another time.
                at = int(asked[user]) + removed * 86400 * 365
                events = {name: golden_feeds[name][rows] for name in ("item_ids", "timestamps")}
                requests.append(RetrievalRequest(user, events, at))
            results = session.encode(requests)
            kept[removed] = {result.cache for result in results}
        stats = session.stats()
    assert kept == {16: {"miss"}, 7: {"appended"}, 1: {"appended"}, 0: {"hit"}}
    grown = np.stack([result.user_embedding for result in results])
    assert row_error(grown, golden["current"].astype(np.float64)).error <= error_bound(0.0, "fp32")
    # Ten new rows, seven, two, one, each at most: far fewer than five times every event.
    assert stats.encoded - int((np.diff(bounds) - 16).clip(0).sum()) == len(asked) * (10 + 7 + 2 + 1)
