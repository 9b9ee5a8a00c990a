"""Ranking checkpoints, built: against what the original computed, and against the family written down once more."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from hstu_compile import pipeline, recheck, verify
from hstu_compile.calibration.ranking_batches import prefill_arrays, score_arrays
from hstu_compile.checkpoint import config_from_file, model_from_spec, spec_from_checkpoint
from hstu_compile.compare import EAGER_FLOOR, error_bound, row_error
from hstu_compile.errors import RequestError
from hstu_compile.model.ranking import RankingModel
from hstu_compile.model.ranking_config import RankingConfig
from hstu_compile.polygraphy_files import PolygraphyCheck, load_outputs, save_outputs
from hstu_compile.ranking_bundle import open_ranking_session
from hstu_compile.runtime import ranking
from hstu_compile.runtime.onnxruntime_session import OnnxRuntimeSession
from hstu_compile.runtime.ranking import RankingSession
from hstu_compile.runtime.ranking_request import RankingRequest, RankingResult
from hstu_compile.runtime.session import open_session
from hstu_compile.served import packed_graph
from hstu_compile.session_check import tensor_error
from tests.dlrm_reference import (
    ACTIONS,
    CANDIDATE,
    HISTORY,
    QUERY_TIME,
    TIME,
    DlrmForm,
    Request,
    dlrm_state_dict,
    draw_requests,
    packed_inputs,
    reference_answers,
    table_key,
)
from tests.e2e.conftest import RANKING_FIXTURE, Build, Built, hstu_compile, save_checkpoint, save_ranking_checkpoint
from tests.exported_models import small_config

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

RELATIVE = 1e-5
M_FALCON = ("--m-falcon", "micro-batch=16")
TAPS = ("candidates_user_embeddings", "candidates_item_embeddings")
INPUTS = [HISTORY, TIME, ACTIONS, "user_id", CANDIDATE, QUERY_TIME, "seq_offsets", "candidate_offsets"]
KV_BUDGET = 1 << 20
SESSION_OF_ONNX = "session of model.onnx, prefill.onnx, score.onnx"

# Every kind of feature at once, and a divisor that does not depend on the batch.
FORM = DlrmForm(
    contextual=(("user_id", 1, 20), ("genres", 3, 5)),
    additional=("movie_category",),
    item_only=("item_shop",),
    tasks=(("like", 0), ("minutes", 1)),
    group_norm=True,
    scaling_seq_len=57.0,
)
SMALL = ("--m-falcon", "micro-batch=5", "--max-batch", 8)
# As plain as the family gets: nothing is in front of a history.
BARE = DlrmForm(contextual=(), action_weights=(), num_layers=1, postprocessor="l2_norm", scaling_seq_len=57.0)
# All kinds of tables, which are outside the graphs, in passes of few candidates.
OUTSIDE = dataclasses.replace(FORM, action_weights=(), num_layers=1, postprocessor="l2_norm")
BOUNDED = ("--m-falcon", "micro-batch=3", "--max-candidates", 4, "--max-seq-len", 25, "--max-batch", 3)
# (events, candidates) below and above the least history of 20: nobody's history, no candidates, neither, only one.
SIZES = [(2, 20), (30, 3), (0, 4), (7, 0), (19, 1), (0, 0), (20, 7)]


def offsets(lengths: Any) -> Any:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def golden_feeds(golden: dict[str, Any], batch: str) -> dict[str, Any]:
    """Inputs of the packed graph for a golden batch: no label and no watch time is among them."""
    times = (TIME, QUERY_TIME)
    parts = {"uih": (HISTORY, TIME, ACTIONS, "user_id"), "cand": (CANDIDATE, QUERY_TIME)}
    feeds = {
        name: golden[f"{batch}.{part}.{name}"].astype(np.int64 if name in times else np.int32)
        for part, names in parts.items()
        for name in names
    }
    feeds["seq_offsets"] = offsets(golden[f"{batch}.uih_lengths"])
    feeds["candidate_offsets"] = offsets(golden[f"{batch}.num_candidates"])
    return feeds


def check_preds(actual: Any, expected: Any) -> None:
    """Every single prediction within 1e-5 of its own size."""
    assert actual.dtype == np.float32
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=RELATIVE, atol=0)


def run_onnx_file(path: Path, feeds: dict[str, Any], taps: Sequence[str] = ()) -> dict[str, Any]:
    with open_session("onnxruntime", onnx=path, taps=taps) as session:
        return session.run(feeds)


@pytest.fixture(scope="module")
def golden_config(ranking_golden: dict[str, Any]) -> RankingConfig:
    spec = spec_from_checkpoint(RANKING_FIXTURE / "ckpt.pt", config_from_file(RANKING_FIXTURE / "config.json"))
    assert isinstance(spec.config, RankingConfig)
    return spec.config


def built_golden(build: Build) -> Path:
    built = build("--fp32", *M_FALCON, "--backend", "onnx")
    assert built.result.exit_code == 0, built.result.stderr
    return built.path


# --- Meta's checkpoint ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", ["a", "b", "c"])
def test_predictions_and_embeddings_equal_the_originals(
    build_ranking_fixture: Build, ranking_golden: dict[str, Any], batch: str
) -> None:
    model = built_golden(build_ranking_fixture) / "model.onnx"
    outputs = run_onnx_file(model, golden_feeds(ranking_golden, batch), TAPS)
    check_preds(outputs["preds"], ranking_golden[f"{batch}.preds"].T)
    np.testing.assert_allclose(1 / (1 + np.exp(-outputs["logits"].astype(np.float64))), outputs["preds"], RELATIVE)
    for tap in TAPS:
        expected = ranking_golden[f"{batch}.{tap}"]
        assert row_error(outputs[tap], expected.astype(np.float64)).error <= RELATIVE, tap


@pytest.mark.parametrize("batch", ["a", "b", "c"])
def test_prefill_then_score_give_the_originals_predictions(
    build_ranking_fixture: Build, ranking_golden: dict[str, Any], golden_config: RankingConfig, batch: str
) -> None:
    bundle = built_golden(build_ranking_fixture)
    feeds = golden_feeds(ranking_golden, batch)
    cached = run_onnx_file(bundle / "prefill.onnx", prefill_arrays(golden_config, feeds))
    scored = score_arrays(golden_config, feeds, cached, 16)
    preds = run_onnx_file(bundle / "score.onnx", scored)["preds"]
    counts = np.diff(scored["candidate_offsets"])
    starts = feeds["candidate_offsets"][:-1]
    taken = np.concatenate([np.arange(start, start + count) for start, count in zip(starts, counts, strict=True)])
    assert 10 <= len(taken) <= 16
    check_preds(preds, ranking_golden[f"{batch}.preds"].T[taken])


def golden_requests(golden: dict[str, Any], batch: str) -> list[RankingRequest]:
    feeds = golden_feeds(golden, batch)
    events, candidates = feeds["seq_offsets"], feeds["candidate_offsets"]
    requests = []
    for user in range(len(events) - 1):
        history, asked = slice(*events[user : user + 2]), slice(*candidates[user : user + 2])
        requests.append(
            RankingRequest(
                user=int(feeds["user_id"][user]),
                history={name: feeds[name][history] for name in (HISTORY, TIME, ACTIONS)},
                candidates={name: feeds[name][asked] for name in (CANDIDATE, QUERY_TIME)},
                context={"user_id": feeds["user_id"][user : user + 1]},
            )
        )
    return requests


def test_the_session_scores_metas_users_as_the_packed_graph_does(
    build_ranking_fixture: Build, ranking_golden: dict[str, Any]
) -> None:
    bundle = built_golden(build_ranking_fixture)
    for batch in ("b", "c"):
        requests = golden_requests(ranking_golden, batch)
        with open_ranking_session(bundle, kv_budget_bytes=1 << 23) as session:
            first, again, packed = session.score(requests), session.score(requests), session.score_packed(requests)
        assert [each.cache for each in (*first, *again)] == ["miss"] * len(requests) + ["hit"] * len(requests)
        check_same_answers(first, packed)
        check_same_answers(again, packed)
    # The original divides by the longest history and the most candidates of a batch, a session by the request's own:
    # the user who has both in a batch gets the original's answer. In batch c everybody has 64 candidates.
    assert ranking_golden["c.num_candidates"].tolist() == [64, 64]
    longest = int(np.argmax(ranking_golden["c.uih_lengths"]))
    check_preds(first[longest].preds, ranking_golden["c.preds"].T[64 * longest : 64 * (longest + 1)])


# Every run holds float16 graphs of a ranking model to this bound in test_large_tables.py, and Meta's retrieval model to
# what the original computed in test_build_golden.py.
@pytest.mark.slow
@pytest.mark.parametrize("batch", ["a", "b"])
def test_the_float16_artifact_errs_at_most_twice_as_much_as_eager_float16(
    build_ranking_fixture: Build, ranking_golden: dict[str, Any], batch: str
) -> None:
    # The packed graph alone: one export. All graphs are built for engines in bfloat16, and with --fp8 of a small model.
    built = build_ranking_fixture("--fp16", "--backend", "onnx")
    assert built.result.exit_code == 0, built.result.stderr
    check_against_eager_half(built.path, ranking_golden, batch, torch.float16, 0.05)


def check_against_eager_half(
    bundle: Path, golden: dict[str, Any], batch: str, dtype: torch.dtype, largest: float
) -> None:
    """The original's answers are the truth; `largest` is what the eager model in `dtype` may err by them."""
    feeds = golden_feeds(golden, batch)
    spec = spec_from_checkpoint(RANKING_FIXTURE / "ckpt.pt", config_from_file(RANKING_FIXTURE / "config.json"))
    half = model_from_spec(spec, dtype)
    assert isinstance(half, RankingModel)
    plain = packed_graph(half).run(feeds)
    outputs = run_onnx_file(bundle / "model.onnx", feeds, TAPS)
    assert outputs["preds"].dtype == np.float32
    expected = {"preds": golden[f"{batch}.preds"].T, **{tap: golden[f"{batch}.{tap}"] for tap in TAPS}}
    for name, value in expected.items():
        own = tensor_error(name, plain[name], value.astype(np.float64)).error
        assert 1e-5 < own < largest, name
        assert tensor_error(name, outputs[name], value.astype(np.float64)).error <= 2 * own, name


# --- bfloat16 ---------------------------------------------------------------------------------------------------------
# Slow: every run has a session in bfloat16 in test_build_incremental.py, and engines of three graphs in
# test_build_quantized.py.


def build_bf16(build: Build) -> Built:
    """With engines, where they can be built."""
    backend = "onnx" if importlib.util.find_spec("tensorrt_rtx") is None else "tensorrt-rtx"
    built = build("--bf16", *M_FALCON, "--backend", backend)
    assert built.result.exit_code == 0, built.result.stderr
    return built


@pytest.mark.slow
def test_a_bfloat16_build_says_on_what_it_was_verified(build_ranking_fixture: Build) -> None:
    """ONNX Runtime has no bfloat16 on a CPU: what ran is a copy, which every place that names the runtime says."""
    built = build_bf16(build_ranking_fixture)
    bundle = built.path
    (line,) = [line for line in built.result.stderr.splitlines() if line.startswith("[6/7] verify")]
    assert line.count("(bf16 widened to float32) PASS") == 4
    report = json.loads((bundle / "report.json").read_text())
    runs = [run for run in report["verification"]["runs"] if run["artifact"].endswith(".onnx")]
    assert [run["artifact"] for run in runs] == ["model.onnx", "prefill.onnx", "score.onnx", SESSION_OF_ONNX]
    assert all(run["runtime"].endswith(" (bf16 widened to float32)") for run in runs)
    assert (bundle / "report.html").read_text().count("(bf16 widened to float32), ") >= 4
    # Bounds that a prediction of 0, or of 0.9 of the right one, would not keep; nor keys and values, of which some
    # row has a largest number of one and a half times its root mean square.
    rows = [row for run in runs for row in run["tensors"]]
    assert all(EAGER_FLOOR["bf16"] < row["bound"] < 0.15 for row in rows)
    assert all(row["bound"] < 0.1 for row in rows if row["tensor"] in ("preds", "logits"))
    assert report["precision"] == "bf16"
    for graph in report["graphs"]:
        # Norms are float32 whatever the precision.
        assert graph["precision_counts"]["MatMul bf16"] >= 5
        kinds = {each["name"]: each["dtype"] for each in (*graph["inputs"], *graph["outputs"])}
        assert {dtype for name, dtype in kinds.items() if name[:2] in ("k_", "v_")} <= {"bfloat16"}
    assert manifest_of(bundle)["ranking"]["kv_dtype"] == "bfloat16"
    again = hstu_compile("verify", bundle)
    assert again.exit_code == 0, again.stdout + again.stderr
    assert again.stdout.count("(bf16 widened to float32): PASS") == 4


@pytest.mark.slow
@pytest.mark.parametrize("batch", ["a", "b"])
def test_the_bfloat16_artifact_errs_at_most_twice_as_much_as_eager_bfloat16(
    build_ranking_fixture: Build, ranking_golden: dict[str, Any], batch: str
) -> None:
    check_against_eager_half(build_bf16(build_ranking_fixture).path, ranking_golden, batch, torch.bfloat16, 0.2)


@pytest.mark.slow
def test_a_bfloat16_session_keeps_half_the_bytes_and_scores_as_packed_does(
    build_ranking_fixture: Build, ranking_golden: dict[str, Any]
) -> None:
    requests = golden_requests(ranking_golden, "c")
    with open_ranking_session(built_golden(build_ranking_fixture), kv_budget_bytes=1 << 23) as wide:
        expected, wide_bytes = wide.score(requests), wide.entry_bytes(200)
    with open_ranking_session(build_bf16(build_ranking_fixture).path, kv_budget_bytes=1 << 23) as session:
        assert session.entry_bytes(200) == pytest.approx(wide_bytes / 2, rel=0.01)
        first, again, packed = session.score(requests), session.score(requests), session.score_packed(requests)
    assert {each.cache for each in again} == {"hit"}
    for one, other, alone, exact in zip(first, again, packed, expected, strict=True):
        np.testing.assert_array_equal(one.logits, other.logits)
        for answer in (one, alone):
            assert 1e-4 < tensor_error("logits", answer.logits, exact.logits.astype(np.float64)).error < 0.05


# --- Engines ----------------------------------------------------------------------------------------------------------


def built_engines(build: Build) -> Path:
    pytest.importorskip("tensorrt_rtx")
    return build_bf16(build).path


@pytest.mark.slow
def test_tensorrt_rtx_engines_of_all_three_graphs_are_built_without_a_gpu(build_ranking_fixture: Build) -> None:
    bundle = built_engines(build_ranking_fixture)
    manifest = manifest_of(bundle)
    assert manifest["backend"]["name"] == "tensorrt-rtx"
    names = {"packed": "model.engine", "prefill": "prefill.engine", "score": "score.engine"}
    assert {graph["name"]: graph["engine"] for graph in manifest["graphs"]} == names
    for graph in manifest["graphs"]:
        assert manifest["files"][graph["engine"]]["bytes"] > 100_000
        (profile,) = graph["profiles"]
        assert profile["name"] == graph["name"]
        assert list(profile["max"]) == [each["name"] for each in graph["inputs"]]
    (packed,), (_,), (score,) = (graph["profiles"] for graph in manifest["graphs"])
    assert packed["max"][CANDIDATE] == [64 * 64]
    assert score["max"][CANDIDATE] == [16]
    assert score["max"]["k_0"] == [64 * (245 + 1), 2, 32]
    rows = json.loads((bundle / "report.json").read_text())["verification"]["runs"]
    files = ("model", "prefill", "score")
    assert [row["artifact"] for row in rows] == [
        *(f"{name}.{kind}" for name in files for kind in ("onnx", "engine")),
        *(f"session of {', '.join(f'{name}.{kind}' for name in files)}" for kind in ("onnx", "engine")),
    ]
    assert all(row["reason"] for row in rows if row["status"] == "NOT RUN")


# --- What a bundle says of itself -------------------------------------------------------------------------------------


def manifest_of(bundle: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((bundle / "manifest.json").read_text())
    return content


def test_inspect_lists_the_inputs_and_outputs_of_the_packed_graph(build_ranking_fixture: Build) -> None:
    result = hstu_compile("inspect", built_golden(build_ranking_fixture), "--json")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    int64 = (TIME, QUERY_TIME)
    axes = {"seq_offsets": "B_plus_1", "candidate_offsets": "B_plus_1", "user_id": "B", CANDIDATE: "T", QUERY_TIME: "T"}
    assert facts["inputs"] == [
        {"name": name, "dtype": "int64" if name in int64 else "int32", "shape": [axes.get(name, "L")]}
        for name in INPUTS
    ]
    assert facts["outputs"] == [{"name": name, "dtype": "float32", "shape": ["T", 1]} for name in ("preds", "logits")]
    assert [graph["name"] for graph in facts["graphs"]] == ["packed", "prefill", "score"]
    assert facts["limits"] == {"max_batch": 64, "max_seq_len": 245, "max_candidates": 64, "micro_batch": 16}
    assert facts["ranking"]["tasks"] == ["like"]
    plain = hstu_compile("inspect", built_golden(build_ranking_fixture))
    assert plain.exit_code == 0
    assert "item_query_time" in plain.stdout


def test_no_label_of_a_candidate_is_an_input_of_any_graph(build_ranking_fixture: Build) -> None:
    bundle = built_golden(build_ranking_fixture)
    graphs = manifest_of(bundle)["graphs"]
    inputs = {each["name"] for graph in graphs for each in graph["inputs"]}
    labels = {"item_action_weights", "item_dummy_watchtime", "item_movie_rating", "movie_rating", "dummy_watch_time"}
    assert inputs == {
        *INPUTS,
        "request_timestamps",
        "num_candidates",
        "scaling_seq_lens",
        "cache_offsets",
        *(f"{part}_{layer}" for part in "kv" for layer in range(3)),
    }
    assert not labels & inputs
    for graph in graphs:
        assert [i.name for i in onnx.load(bundle / graph["onnx"]).graph.input] == [i["name"] for i in graph["inputs"]]


def test_a_label_in_a_request_is_refused(build_ranking_fixture: Build, ranking_golden: dict[str, Any]) -> None:
    bundle = built_golden(build_ranking_fixture)
    (request, *_) = golden_requests(ranking_golden, "c")
    label = ranking_golden["c.cand.item_action_weights"][: len(request.candidates[CANDIDATE])]
    labelled = dataclasses.replace(request, candidates={**request.candidates, "item_action_weights": label})
    with (
        open_ranking_session(bundle, kv_budget_bytes=1 << 23) as session,
        pytest.raises(RequestError, match="'item_action_weights' is not a feature of the model's candidates"),
    ):
        session.score([labelled])
    feeds = golden_feeds(ranking_golden, "c")
    with pytest.raises(RequestError, match="item_action_weights"):
        run_onnx_file(bundle / "model.onnx", {**feeds, "item_action_weights": label})


def test_the_report_counts_what_pruning_the_last_layer_left_out(build_ranking_fixture: Build) -> None:
    report = json.loads((built_golden(build_ranking_fixture) / "report.json").read_text())
    counted = {(graph["name"], each["name"]): each["counts"] for graph in report["graphs"] for each in graph["passes"]}
    assert {graph: counts for (graph, name), counts in counted.items() if name == "prune_last_layer"} == {
        "packed": {"attention": 1, "projections": 1}
    }
    # Behind the last layer's keys and values a history is read by nothing.
    assert {graph["name"]: graph["operators"]["HstuAttention"] for graph in report["graphs"]} == {
        "packed": 3,
        "prefill": 2,
        "score": 3,
    }


def test_the_report_of_a_ranking_bundle_shows_every_graph(build_ranking_fixture: Build) -> None:
    bundle = built_golden(build_ranking_fixture)
    report, files = json.loads((bundle / "report.json").read_text()), manifest_of(bundle)["files"]
    page = (bundle / "report.html").read_text()
    for graph in report["graphs"]:
        assert graph["bytes"] == files[graph["file"]]["bytes"] == (bundle / graph["file"]).stat().st_size
        assert f"<h3>{graph['name']}: <code>{graph['file']}</code></h3>" in page
        assert f"File of {graph['bytes']:,} bytes" in page
        assert f"Passes over {graph['name']} in order" in page
    assert [check["artifact"] for check in report["verification"]["polygraphy"]] == [
        graph["file"] for graph in report["graphs"]
    ]


# --- Small models of the family, against their reference --------------------------------------------------------------


def built_small(build: Build, form: DlrmForm, *options: object) -> Path:
    built = build(form, *options)
    assert built.result.exit_code == 0, built.result.stderr
    return built.path


def drawn(form: DlrmForm, sizes: Sequence[tuple[int, int]], seed: int = 0) -> list[Request]:
    """Requests that ask at or after the last event, as a session demands."""
    return [
        dataclasses.replace(each, query_times=np.maximum(each.query_times, each.times.max(initial=0)))
        for each in draw_requests(form, sizes, seed)
    ]


def feeds_of(form: DlrmForm, requests: Sequence[Request]) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in packed_inputs(form, requests).items()}


def check_against_reference(form: DlrmForm, bundle: Path, requests: list[Request]) -> dict[str, Any]:
    outputs = run_onnx_file(bundle / "model.onnx", feeds_of(form, requests), TAPS)
    expected = reference_answers(form, dlrm_state_dict(form), requests)
    for name, value in {"logits": expected.logits, "preds": expected.preds}.items():
        assert outputs[name].shape == value.shape
        assert tensor_error(name, outputs[name], value).error <= RELATIVE, name
    for name, value in zip(TAPS, (expected.users, expected.items), strict=True):
        assert row_error(outputs[name], value).error <= error_bound(2 * EAGER_FLOOR["fp32"], "fp32"), name
    return outputs


@pytest.mark.parametrize(
    "sizes",
    [
        SIZES,
        [(33, 9)],
        [(0, 3)],
        [(0, 3), (0, 2)],
        [(5, 0), (0, 0), (21, 0)],
        [(0, 0)],
        [(1, 1)] * 8,
        [(FORM.max_history_len, FORM.max_num_candidates_inference)],
    ],
    ids=[
        "odd sizes",
        "one user",
        "one user without history",
        "nobody has a history",
        "no candidates at all",
        "one user without anything",
        "as many users as fit",
        "the longest",
    ],
)
def test_odd_batches_equal_the_reference(build_ranking: Build, sizes: list[tuple[int, int]]) -> None:
    requests = drawn(FORM, sizes, seed=3)
    outputs = check_against_reference(FORM, built_small(build_ranking, FORM, *SMALL), requests)
    assert len(outputs["preds"]) == sum(candidates for _, candidates in sizes)


# Slow: a build of it passes in every run in test_build_quality.py, and the eager model equals the reference in
# tests/unit/test_model_ranking.py.
@pytest.mark.slow
@pytest.mark.parametrize("sizes", [SIZES, [(0, 3)], [(4, 0)], [(0, 0)]], ids=str)
def test_a_model_without_context_and_actions_equals_the_reference(
    build_ranking: Build, sizes: list[tuple[int, int]]
) -> None:
    bundle = built_small(build_ranking, BARE, "--max-batch", 8)
    assert [i["name"] for i in manifest_of(bundle)["inputs"]] == [
        name for name in INPUTS if name not in (ACTIONS, "user_id")
    ]
    check_against_reference(BARE, bundle, drawn(BARE, sizes, seed=4))


def test_seconds_beyond_2_to_31_are_not_cut_to_32_bits(build_ranking: Build) -> None:
    """ONNX Runtime 1.31 on a CPU takes Clip, Min and Max of int64 by their lower halves."""
    bundle = built_small(build_ranking, FORM, *SMALL)
    (request,) = drawn(FORM, [(30, 3)], seed=5)
    for shift in (2**31, 2**32, 2**33):
        # The first event stays where it was, the contextual tokens are at 0: distances of more than 2**31 as well.
        times = request.times + shift
        times[0] = 1
        late = dataclasses.replace(request, times=times, query_times=request.query_times + shift)
        check_against_reference(FORM, bundle, [late, request])


# --- The scheduler over the built graphs ------------------------------------------------------------------------------


def session_requests(form: DlrmForm, requests: Sequence[Request], *, external: bool = False) -> list[RankingRequest]:
    """Requests to a session, with ids or with the rows of the checkpoint's tables."""
    state = dlrm_state_dict(form)

    def given(table: str, ids: Any) -> Any:
        if not external:
            return ids
        rows = state[table_key(table)].numpy()[ids.clip(0)]
        return np.where(ids[:, None] >= 0, rows, np.float32(0))

    return [
        RankingRequest(
            user=number,
            history={
                **{name: given(name, each.history[name]) for name in form.history_ids},
                TIME: each.times,
                **({ACTIONS: each.actions} if form.action_weights else {}),
            },
            candidates={
                **{name: given(table_of(form, name), each.candidates[name]) for name in form.item_ids},
                QUERY_TIME: each.query_times,
            },
            context={name: given(name, each.context[name]) for name, _, _ in form.contextual},
        )
        for number, each in enumerate(requests)
    ]


def table_of(form: DlrmForm, name: str) -> str:
    """The table of a candidate's id: that of the history's id, or its own."""
    return name if name in form.item_only else name.removeprefix("item_")


def check_same_answers(actual: Sequence[RankingResult], expected: Sequence[RankingResult]) -> None:
    for one, other in zip(actual, expected, strict=True):
        for name in ("preds", "logits"):
            error = tensor_error(name, getattr(one, name), getattr(other, name).astype(np.float64)).error
            assert error <= RELATIVE, (name, error)


def check_answers(form: DlrmForm, requests: Sequence[Request], answers: Sequence[RankingResult]) -> None:
    expected = reference_answers(form, dlrm_state_dict(form), requests)
    for name in ("preds", "logits"):
        actual = np.concatenate([getattr(each, name) for each in answers])
        assert tensor_error(name, actual, getattr(expected, name)).error <= RELATIVE, name


def open_small(build: Build, *options: object) -> RankingSession:
    return open_ranking_session(built_small(build, FORM, *options), kv_budget_bytes=KV_BUDGET)


def test_prefill_and_score_equal_packed_and_the_reference(build_ranking: Build) -> None:
    requests = drawn(FORM, SIZES, seed=6)
    asked = session_requests(FORM, requests)
    with open_small(build_ranking, *SMALL) as session:
        first, again, packed = session.score(asked), session.score(asked), session.score_packed(asked)
        stats = session.stats()
    check_answers(FORM, requests, first)
    check_answers(FORM, requests, again)
    check_answers(FORM, requests, packed)
    busy = [bool(candidates) for _, candidates in SIZES]
    assert [each.cache == "miss" for each in first] == busy
    assert [each.cache == "hit" for each in again] == busy
    assert (stats.cache.hits, stats.cache.misses) == (sum(busy), sum(busy))
    total = sum(candidates for _, candidates in SIZES)
    assert stats.score_passes >= 2 * -(-total // 5)


def test_users_among_the_rows_of_a_whole_cache_score_as_alone_to_the_bit(
    build_ranking: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real graph, told that it takes the cache whole, as an engine with our kernels is by its profile."""
    asked = session_requests(FORM, drawn(FORM, SIZES, seed=6))
    with open_small(build_ranking, *SMALL) as session:
        expected = session.score(asked)
    profile = {"candidate_offsets": 2 * 8 + 1}
    monkeypatch.setattr(OnnxRuntimeSession, "most_rows", lambda _, name: profile.get(name, 10**6))
    with open_small(build_ranking, *SMALL) as session:
        assert session.stats().scores_in_place
        tensors = session._all_rows.tensors_of_all  # type: ignore[union-attr]
        for tensor in tensors.values():
            tensor.array[...] = np.nan  # type: ignore[attr-defined]
        # In front of the first user, more rows than a sequence with candidates may have.
        assert session._store.allocate(700) is not None
        for order in (slice(None), slice(None, None, -1), slice(3, 6)):
            for answer, wanted in zip(session.score(asked[order]), expected[order], strict=True):
                np.testing.assert_array_equal(answer.logits, wanted.logits)
                np.testing.assert_array_equal(answer.preds, wanted.preds)


def built_outside(build: Build) -> Path:
    """One bundle for both tests: an export of each graph is most of what they cost."""
    return built_small(build, OUTSIDE, *BOUNDED, "--embeddings", "external")


def test_external_tables_give_the_same_answers_as_tables_inside(build_ranking: Build) -> None:
    """The reference has its tables inside."""
    bundle = built_outside(build_ranking)
    shapes = {each["name"]: each["shape"] for each in manifest_of(bundle)["inputs"]}
    assert shapes["movie_id"] == ["L", OUTSIDE.table_dim]
    assert shapes["item_shop"] == ["T", OUTSIDE.table_dim]
    assert shapes["genres"] == ["B_times_3", OUTSIDE.table_dim]
    for name in ("model.onnx", "prefill.onnx", "score.onnx"):
        dims = [list(tensor.dims) for tensor in onnx.load(bundle / name).graph.initializer]
        assert [OUTSIDE.num_rows, OUTSIDE.table_dim] not in dims
    requests = drawn(OUTSIDE, [(2, 4), (25, 3), (0, 4), (7, 0), (19, 1), (0, 0), (20, 7)], seed=7)
    with open_ranking_session(bundle, kv_budget_bytes=KV_BUDGET) as session:
        asked = session_requests(OUTSIDE, requests, external=True)
        check_answers(OUTSIDE, requests, session.score_packed(asked))
        check_answers(OUTSIDE, requests, session.score(asked))


def test_max_candidates_bounds_a_pass_and_not_an_answer(build_ranking: Build) -> None:
    bundle = built_outside(build_ranking)
    assert manifest_of(bundle)["limits"] == {
        "max_batch": 3,
        "max_seq_len": 25,
        "max_candidates": 4,
        "micro_batch": 3,
    }
    # At least 20 events: below, candidates beyond the fourth would count towards the least history.
    requests = drawn(OUTSIDE, [(25, 19), (20, 4), (22, 5)], seed=8)
    with open_ranking_session(bundle, kv_budget_bytes=KV_BUDGET) as session:
        check_answers(OUTSIDE, requests, session.score_packed(session_requests(OUTSIDE, requests, external=True)))
        assert session.stats().packed_passes >= 3
        (too_long,) = session_requests(OUTSIDE, drawn(OUTSIDE, [(26, 1)]), external=True)
        with pytest.raises(RequestError, match="26 events; at most 25 fit"):
            session.score_packed([too_long])


# --- A bundle that was changed ----------------------------------------------------------------------------------------


def test_verify_repeats_the_check_of_every_graph(build_ranking: Build) -> None:
    bundle = built_small(build_ranking, FORM, *SMALL)
    result = hstu_compile("verify", bundle, "--json")
    assert result.exit_code == 0, result.stdout + result.stderr
    facts = json.loads(result.stdout)
    assert facts["status"] == "PASS"
    runs = facts["verification"]["runs"]
    assert [run["artifact"] for run in runs] == ["model.onnx", "prefill.onnx", "score.onnx", SESSION_OF_ONNX]
    assert {check["tensor"] for check in runs[-1]["tensors"]} == {"preds", "logits"}
    assert len(runs[-1]["tensors"]) == 2 * 3 * 4
    checked = {check["tensor"] for run in runs for check in run["tensors"]}
    assert checked == {"preds", "logits", "k_0", "v_0", "k_1", "v_1"}
    assert [command["exit_code"] for command in facts["polygraphy"]] == [0, 0, 0]


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """A bundle that a test may damage."""
    return lambda bundle: shutil.copytree(bundle, tmp_path / "copy.hstu")


def rehash(bundle: Path) -> None:
    """Let the manifest vouch for the files as they are now: only the verification can notice then."""
    manifest = manifest_of(bundle)
    for name, facts in manifest["files"].items():
        content = (bundle / name).read_bytes()
        facts.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def change_a_weight(path: Path) -> None:
    """Two columns of the first layer's projection change places."""
    model = onnx.load(path)
    swap_columns(model, FORM)
    onnx.save(model, path)


def swap_columns(model: onnx.ModelProto, form: DlrmForm) -> None:
    shape = [form.width, 2 * form.num_heads * (form.linear_dim + form.attention_dim)]
    weight = next(each for each in model.graph.initializer if list(each.dims) == shape)
    values = onnx.numpy_helper.to_array(weight).copy()
    values[:, [0, 1]] = values[:, [1, 0]]
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))


def change_an_output(path: Path) -> None:
    """0.9 of the right answer to the second request."""
    outputs = load_outputs(path)
    name = next(iter(outputs[1]))
    outputs[1] = {**outputs[1], name: (outputs[1][name] * 0.9).astype(outputs[1][name].dtype)}
    save_outputs(path, "altered", outputs)


def no_polygraphy(folder: Path, arguments: Sequence[str]) -> PolygraphyCheck:
    """Polygraphy finding nothing: our own comparison has to."""
    return PolygraphyCheck(tuple(arguments), 0, "")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.onnx", change_a_weight),
        ("prefill.onnx", change_a_weight),
        ("score.onnx", change_a_weight),
        ("reference_outputs.json", change_an_output),
        ("prefill_reference_outputs.json", change_an_output),
        ("score_reference_outputs.json", change_an_output),
    ],
)
def test_verify_notices_a_changed_file_of_any_graph(
    build_ranking: Build,
    copy_of: Callable[[Path], Path],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    change: Callable[[Path], None],
) -> None:
    bundle = copy_of(built_small(build_ranking, FORM, *SMALL))
    change(bundle / name)
    refused = hstu_compile("verify", bundle)
    assert refused.exit_code == 8
    assert f"{name} has another sha256" in refused.stderr
    rehash(bundle)
    monkeypatch.setattr(recheck, "run_polygraphy", no_polygraphy)
    result = hstu_compile("verify", bundle)
    assert result.exit_code == 6, result.stdout + result.stderr
    assert "FAIL" in result.stdout.splitlines()[-1]
    # As a session all graphs are run, so that it notices each of them; what a graph alone should give it does not read.
    session = next(line for line in result.stdout.splitlines() if line.startswith(SESSION_OF_ONNX))
    assert session.endswith("FAIL" if name.endswith(".onnx") else "PASS")


def test_verify_notices_a_changed_reference_of_the_session(
    build_ranking: Build, copy_of: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = copy_of(built_small(build_ranking, FORM, *SMALL))
    change_an_output(bundle / "session_reference_outputs.json")
    rehash(bundle)
    monkeypatch.setattr(recheck, "run_polygraphy", no_polygraphy)
    result = hstu_compile("verify", bundle)
    assert result.exit_code == 6, result.stdout + result.stderr
    lines = [line for line in result.stdout.splitlines() if " on onnxruntime " in line]
    assert [line.rsplit(" ", 1)[1] for line in lines] == ["PASS", "PASS", "PASS", "FAIL"]


def rows_of_the_session(bundle: Path) -> list[dict[str, Any]]:
    report = json.loads((bundle / "report.json").read_text())
    runs = {run["artifact"]: run for run in report["verification"]["runs"]}
    rows: list[dict[str, Any]] = runs[SESSION_OF_ONNX]["tensors"]
    return rows


def test_a_build_checks_the_graphs_as_one_session(build_ranking_fixture: Build) -> None:
    bundle = built_golden(build_ranking_fixture)
    rows = rows_of_the_session(bundle)
    assert {row["status"] for row in rows} == {"PASS"}
    feeds = [row["feed"] for row in rows if row["tensor"] == "logits"]
    # 64 candidates each: 4 passes of 16 a user; without the cache one a user, because the divisor is the request's own.
    assert [feed for feed in feeds if feed.startswith("245 events")] == [
        "245 events, 64 candidates, packed, passes: 2",
        "245 events, 64 candidates, cold cache, passes: 8",
        "245 events, 64 candidates, warm cache, passes: 8",
    ]
    page = (bundle / "report.html").read_text()
    assert SESSION_OF_ONNX in page
    assert "245 events, 64 candidates, warm cache, passes: 8" in page


def wrong_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every graph is right; the session tells the scoring graph another moment than the history was encoded for."""
    right = ranking.score_feeds

    def late(*arguments: Any) -> dict[str, Any]:
        feeds = right(*arguments)
        return {**feeds, "request_timestamps": feeds["request_timestamps"] + 10**6}

    monkeypatch.setattr(ranking, "score_feeds", late)


def wrong_score_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two columns of the scoring graph's first projection change places behind all checks of graphs alone."""
    right = verify.open_built

    def opened(built: verify.BuiltGraph, *arguments: Any) -> Any:
        if built.graph.name == "score":
            model = onnx.ModelProto()
            model.CopyFrom(built.graph.model)
            swap_columns(model, FORM)
            built = dataclasses.replace(built, graph=dataclasses.replace(built.graph, model=model))
        return right(built, *arguments)

    monkeypatch.setattr(pipeline, "open_built", opened)


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("fault", [wrong_moment, wrong_score_graph])
def test_a_build_whose_session_is_wrong_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None]
) -> None:
    checkpoint, config = save_ranking_checkpoint(tmp_path, FORM)
    fault(monkeypatch)
    bundle = tmp_path / "b.hstu"
    command = ("build", checkpoint, "--config", config, "-o", bundle, "--backend", "onnx")
    result = hstu_compile(*command, *SMALL)
    assert result.exit_code == 6, result.stdout + result.stderr
    assert manifest_of(bundle)["status"] == "FAIL"
    report = json.loads((bundle / "report.json").read_text())
    statuses = {run["artifact"]: run["status"] for run in report["verification"]["runs"]}
    assert statuses == {"model.onnx": "PASS", "prefill.onnx": "PASS", "score.onnx": "PASS", SESSION_OF_ONNX: "FAIL"}
    assert SESSION_OF_ONNX in report["verification"]["worst_where"]
    failed = {row["feed"].split(", ")[-2] for row in rows_of_the_session(bundle) if row["status"] == "FAIL"}
    assert failed == {"cold cache", "warm cache"}


def test_the_recorded_polygraphy_commands_notice_a_changed_eager_output(
    build_ranking: Build, copy_of: Callable[[Path], Path]
) -> None:
    bundle = copy_of(built_small(build_ranking, FORM, *SMALL))
    change_an_output(bundle / "prefill_eager_outputs.json")
    rehash(bundle)
    result = hstu_compile("verify", bundle, "--json")
    assert result.exit_code == 6, result.stdout + result.stderr
    facts = json.loads(result.stdout)
    assert facts["status"] == "FAIL"
    assert [command["exit_code"] for command in facts["polygraphy"]] == [0, 1, 0]


# The bundle in bfloat16 once more; every run alters each graph's other files above.
@pytest.mark.slow
@pytest.mark.parametrize("engine", ["model.engine", "prefill.engine", "score.engine"])
def test_verify_names_an_engine_that_was_changed(
    build_ranking_fixture: Build, copy_of: Callable[[Path], Path], engine: str
) -> None:
    bundle = copy_of(built_engines(build_ranking_fixture))
    content = bytearray((bundle / engine).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / engine).write_bytes(bytes(content))
    result = hstu_compile("verify", bundle)
    assert result.exit_code == 8
    assert f"{engine} has another sha256" in result.stderr


# --- Options ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranking_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_ranking_checkpoint(tmp_path_factory.mktemp("options"), FORM)


def test_a_dry_run_says_what_would_be_built(ranking_checkpoint: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, config = ranking_checkpoint
    command = ("build", checkpoint, "--config", config, "--backend", "onnx", "--dry-run", "-o", tmp_path / "b.hstu")
    with_graphs = hstu_compile(*command, "--m-falcon", "micro-batch=256", "--max-batch", 16, "--max-candidates", 40)
    assert with_graphs.exit_code == 0, with_graphs.stderr
    lines = with_graphs.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["checkpoint", "model", "attention", "graphs", "profile", "backend"]
    assert lines[0] == "checkpoint  small.pt, dialect dlrm_v3"
    assert lines[3] == "graphs      packed, prefill, score"
    assert lines[4] == (
        "profile     1 to 16 sequences (typical 2) of up to 48 events (typical 24), up to 40 candidates each"
    )
    packed_alone = hstu_compile(*command)
    assert packed_alone.exit_code == 0, packed_alone.stderr
    assert "graphs      packed\n" in packed_alone.stdout
    assert "up to 24 candidates each" in packed_alone.stdout
    facts = json.loads(hstu_compile(*command, "--m-falcon", "micro-batch=7", "--json").stdout)
    assert facts["graphs"] == ["packed", "prefill", "score"]
    assert facts["limits"]["micro_batch"] == 7
    assert facts["limits"]["contextual_len"] == 4
    assert not (tmp_path / "b.hstu").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--m-falcon", "micro-batch=0"), r"--m-falcon micro-batch=0 cannot be used"),
        (("--m-falcon", "micro-batch=abc"), r"--m-falcon micro-batch=abc cannot be used"),
        (("--m-falcon", "micro-batch=-4"), r"--m-falcon micro-batch=-4 cannot be used"),
        (("--m-falcon", "256"), r"--m-falcon 256 cannot be used"),
        (("--m-falcon", "batch=256"), r"--m-falcon batch=256 cannot be used"),
        (("--m-falcon", "micro-batch="), r"--m-falcon micro-batch= cannot be used"),
        (("--max-candidates", "0"), r"--max-candidates 0 cannot be used"),
        (("--max-candidates", "-3"), r"--max-candidates -3 cannot be used"),
        (("--max-seq-len", "0"), r"--max-seq-len 0 cannot be used.*1 or more.*pass --max-seq-len N, or leave it out"),
        (("--max-batch", "0"), r"--max-batch 0 cannot be used.*1 or more.*pass --max-batch N, or leave it out for 64"),
        (("--opt-batch", "0"), r"--opt-batch 0 cannot be used"),
        (("--opt-seq-len", "-1"), r"--opt-seq-len -1 cannot be used"),
        (("--seed", "-1"), r"--seed -1 cannot be used.*0 or more"),
        (("--top-k", "10"), r"--top-k 10 cannot be used.*a ranking model scores the candidates it is given"),
        (("--opt-batch", "9", "--max-batch", "8"), r"--opt-batch 9 cannot be used.*1 to 8"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_an_option_that_a_ranking_model_cannot_have_is_named(
    ranking_checkpoint: tuple[Path, Path], tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    checkpoint, config = ranking_checkpoint
    result = hstu_compile("build", checkpoint, "--config", config, "-o", tmp_path / "b.hstu", *options)
    check_usage_error(result, message)
    assert not (tmp_path / "b.hstu").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--m-falcon", "micro-batch=256"),
            r"--m-falcon micro-batch=256 cannot be used.*this checkpoint is a retrieval model",
        ),
        (("--max-candidates", "10"), r"--max-candidates 10 cannot be used.*ranking models"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_an_option_of_ranking_models_is_refused_for_a_retrieval_checkpoint(
    tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    checkpoint = save_checkpoint(tmp_path / "small.pt", small_config(num_layers=1))
    result = hstu_compile("build", checkpoint, "-o", tmp_path / "b.hstu", *options)
    check_usage_error(result, message)
    assert not (tmp_path / "b.hstu").exists()


def test_external_tables_are_refused_for_a_retrieval_checkpoint(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "small.pt", small_config(num_layers=1))
    result = hstu_compile("build", checkpoint, "-o", tmp_path / "b.hstu", "--embeddings", "external")
    assert result.exit_code == 4, result.stdout + result.stderr
    assert "--embeddings external: a native model looks its ids up itself" in result.stderr
    assert "HSTU-E110" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "b.hstu").exists()


def check_usage_error(result: Any, message: str) -> None:
    assert result.exit_code == 2, result.stdout + result.stderr
    assert re.search(message, result.stderr, re.DOTALL), result.stderr
    assert "HSTU-E901" in result.stderr
    assert "{" not in result.stderr
    assert "Traceback" not in result.stderr


def test_the_run_command_answers_a_packed_batch(build_ranking: Build, tmp_path: Path) -> None:
    bundle = built_small(build_ranking, FORM, *SMALL)
    feeds = feeds_of(FORM, drawn(FORM, [(3, 2)]))
    np.savez(tmp_path / "in.npz", **feeds)
    result = hstu_compile("run", bundle, "--inputs", tmp_path / "in.npz", "--outputs", tmp_path / "out.npz")
    assert result.exit_code == 0, result.stdout + result.stderr
    with open_session("onnxruntime", onnx=bundle / "model.onnx") as session, np.load(tmp_path / "out.npz") as answers:
        np.testing.assert_array_equal(answers["preds"], session.run(feeds)["preds"])
    np.savez(tmp_path / "in.npz", **feeds, label=np.ones(2, np.int32))
    result = hstu_compile("run", bundle, "--inputs", tmp_path / "in.npz", "--outputs", tmp_path / "none.npz")
    assert result.exit_code == 7, result.stdout + result.stderr
    assert "'label' is not an input" in result.stderr
    assert not (tmp_path / "none.npz").exists()
