"""The report and the manifest of a build of several graphs, from what its stages handed over."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from hstu_compile.artifacts import CheckpointSpec, EngineArtifact, Feed, OnnxGraph, PassRecord, Precision, Profile
from hstu_compile.build_plan import BuildPlan
from hstu_compile.build_report import BuildOutcome, GraphOutcome, build_manifest, build_report
from hstu_compile.bundle import model_files, reference_files
from hstu_compile.config import Limits
from hstu_compile.environment import BackendChoice
from hstu_compile.graph_facts import tensor_specs
from hstu_compile.polygraphy_files import PolygraphyCheck
from hstu_compile.report import render_report
from hstu_compile.runtime.ranking_spec import RankingSpec
from hstu_compile.session_check import PREDICTIONS, Reference, TensorCheck, VerifyReport
from hstu_compile.session_check import RuntimeCheck as Run
from hstu_compile.verify import BuiltGraph
from tests.dlrm_reference import DlrmForm
from tests.exported_models import ranking_config, small_config

FORM = DlrmForm(
    contextual=(("user_id", 1, 20), ("genres", 3, 5)),
    additional=("movie_category",),
    item_only=("item_shop",),
    tasks=(("like", 0), ("minutes", 1)),
    scaling_seq_len=57.0,
)
GRAPHS = ("packed", "prefill", "score")
LIMITS = Limits(8, 2, 48, 24, 0, 24, 5, 4)
PASSED = PolygraphyCheck(("run", "model.onnx"), 0, "passed")


def graph_of(name: str, precision: Precision = "fp32", weight: float = 1.0) -> OnnxGraph:
    """A graph that multiplies its input by a number."""
    names = PREDICTIONS if name != "prefill" else ("k_0",)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", 2])
    outputs = [helper.make_tensor_value_info(each, TensorProto.FLOAT, ["T", 2]) for each in names]
    factor = onnx.numpy_helper.from_array(np.array(weight, np.float32), "factor")
    nodes = [helper.make_node("Mul", ["x", "factor"], [each], name=each) for each in names]
    model = helper.make_model(helper.make_graph(nodes, name, [x], outputs, [factor]))
    record = PassRecord("prune_last_layer", {"attention": 1 if name == "packed" else 0}, 0.1)
    return OnnxGraph(name, model, precision, tensor_specs(model.graph.input), tensor_specs(outputs), (record,))


def reference_of(name: str) -> Reference:
    answer = {each: np.ones((2, 2)) for each in (PREDICTIONS if name != "prefill" else ("k_0",))}
    errors = {**dict.fromkeys(answer, 1e-7), "layer_0": 1e-8}
    feed = Feed(f"{name} feed", {"candidate_offsets": np.array([0, 2], np.int32)})
    return Reference(name, next(iter(answer)), (feed,), (answer,), (answer,), errors, None)


def outcome_of(*names: str, checks: dict[str, PolygraphyCheck] | None = None, **changes: Any) -> BuildOutcome:
    """A verified build of these graphs; `changes` are `precision`, `weight`, `external`, `limits` and `engine`."""
    config: Any = ranking_config(FORM, external_embeddings=changes.get("external", False))
    spec = CheckpointSpec(Path("folder/ckpt.pt"), "ab" * 32, "dlrm_v3", config, {})
    plan = BuildPlan(spec, changes.get("limits", LIMITS), BackendChoice("onnx", "the test says so"))
    graphs = []
    for name in names:
        engine = changes.get("engine")
        graph = graph_of(name, changes.get("precision", "fp32"), changes.get("weight", {}).get(name, 1.0))
        built = BuiltGraph(graph, engine, *model_files(name))
        graphs.append(GraphOutcome(built, reference_of(name), (checks or {}).get(name, PASSED)))
    check = TensorCheck("logits", "packed feed", 1e-7, 1e-5, 1e-7, "PASS")
    run = Run("onnxruntime", "model.onnx", changes.get("status", "PASS"), None, (check,))
    report = VerifyReport(run.status, "rule", 1e-7, 1e-5, "logits", 1e-7, (), (run,))
    return BuildOutcome(plan, tuple(graphs), None, report, [{"name": "model", "seconds": 1.0, "summary": "small"}])


def manifest_of(outcome: BuildOutcome) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads(json.dumps(build_manifest(outcome, build_report(outcome, "b.hstu"))))
    return manifest


def spec_of(outcome: BuildOutcome) -> RankingSpec:
    return RankingSpec.from_manifest(manifest_of(outcome)["ranking"])


def test_a_build_passes_if_every_check_did() -> None:
    outcome = outcome_of(*GRAPHS)
    assert outcome.status == "PASS"
    assert outcome.main.graph.name == "packed"
    for name in GRAPHS:
        failed = PolygraphyCheck(("run", f"{name}.onnx"), 1, "failed")
        refused = outcome_of(*GRAPHS, checks={name: failed})
        assert refused.status == "FAIL"
        recorded = build_report(refused, "b.hstu")["verification"]["polygraphy"]
        assert [(each["artifact"], each["exit_code"]) for each in recorded] == [
            (model_files(graph)[0], int(graph == name)) for graph in GRAPHS
        ]
    assert outcome_of(*GRAPHS, status="FAIL").status == "FAIL"
    unverified = dataclasses.replace(outcome, verification=None)
    assert unverified.status == "NOT VERIFIED"
    assert build_report(unverified, "b.hstu")["verification"] is None


def test_the_report_tells_the_graphs_apart() -> None:
    report = build_report(outcome_of(*GRAPHS), "b.hstu")
    assert [(each["name"], each["file"]) for each in report["graphs"]] == [
        ("packed", "model.onnx"),
        ("prefill", "prefill.onnx"),
        ("score", "score.onnx"),
    ]
    assert [[(p["name"], p["counts"]) for p in each["passes"]] for each in report["graphs"]] == [
        [("prune_last_layer", {"attention": 1})],
        [("prune_last_layer", {"attention": 0})],
        [("prune_last_layer", {"attention": 0})],
    ]
    assert [each["operators"] for each in report["graphs"]] == [{"Mul": 2}, {"Mul": 1}, {"Mul": 2}]
    assert all(each["bytes"] > 50 for each in report["graphs"])
    purposes = [each["purpose"] for each in report["commands"]]
    for file in ("model.onnx", "prefill.onnx", "score.onnx"):
        assert f"repeat the check of {file} without hstu-compile" in purposes
    alone = build_report(outcome_of("packed"), "b.hstu")
    assert [each["name"] for each in alone["graphs"]] == ["packed"]


def test_the_report_has_every_engine_and_its_page_shows_it() -> None:
    profile = Profile("named by us", {"x": (1, 2)}, {"x": (4, 2)}, {"x": (8, 2)})
    engine = EngineArtifact(b"plan", "tensorrt", "10.0", ("9.0",), (profile,), {"fp16": 3}, (), 1.0)
    report = build_report(outcome_of(*GRAPHS, engine=engine), "b.hstu")
    assert [(each["engine"]["file"], each["engine"]["bytes"]) for each in report["graphs"]] == [
        ("model.engine", 4),
        ("prefill.engine", 4),
        ("score.engine", 4),
    ]
    page = render_report(report)
    for name in GRAPHS:
        assert f"Shapes that the engine of {name} accepts" in page


def test_timings_say_which_artifact_was_timed() -> None:
    outcome = outcome_of(*GRAPHS)
    assert outcome.verification is not None
    (run,) = outcome.verification.runs
    timing = {"name": "onnxruntime", "batch": 2, "events": 9, "median_ms": 1.0, "p90_ms": 2.0, "note": ""}
    runs = tuple(dataclasses.replace(run, artifact=model_files(name)[0], timing=timing) for name in GRAPHS)
    report = build_report(
        dataclasses.replace(outcome, verification=dataclasses.replace(outcome.verification, runs=runs)), "b.hstu"
    )
    assert [each["name"] for each in report["timings"]] == [
        "model.onnx, onnxruntime",
        "prefill.onnx, onnxruntime",
        "score.onnx, onnxruntime",
    ]


def test_the_manifest_lists_every_graph_with_what_verifies_it() -> None:
    manifest = manifest_of(outcome_of(*GRAPHS))
    assert [(g["name"], g["onnx"], g["engine"]) for g in manifest["graphs"]] == [
        ("packed", "model.onnx", None),
        ("prefill", "prefill.onnx", None),
        ("score", "score.onnx", None),
    ]
    assert (
        manifest["inputs"] == manifest["graphs"][0]["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["T", 2]}]
    )
    assert manifest["outputs"] == manifest["graphs"][0]["outputs"]
    checks = [graph["verification"] for graph in manifest["graphs"]]
    assert [check["primary"] for check in checks] == ["preds", "k_0", "preds"]
    assert [check["feeds"] for check in checks] == [["packed feed"], ["prefill feed"], ["score feed"]]
    # Of outputs alone: a shipped graph has no taps.
    assert [check["eager_error"] for check in checks] == [
        {"preds": 1e-7, "logits": 1e-7},
        {"k_0": 1e-7},
        {"preds": 1e-7, "logits": 1e-7},
    ]
    assert all(check["polygraphy_arguments"] == ["run", "model.onnx"] for check in checks)
    assert manifest["limits"] == {"max_batch": 8, "max_seq_len": 48, "max_candidates": 24, "micro_batch": 5}


def test_no_two_graphs_share_a_file() -> None:
    names = [file for graph in GRAPHS for file in (*model_files(graph), *dataclasses.astuple(reference_files(graph)))]
    assert len(set(names)) == len(names)
    assert model_files("retrieval") == model_files("packed") == ("model.onnx", "model.engine")


def test_the_engines_profile_is_in_the_manifest() -> None:
    profile = Profile("packed", {"x": (1, 2)}, {"x": (4, 2)}, {"x": (8, 2)})
    engine = EngineArtifact(b"plan", "tensorrt", "10.0", ("9.0",), (profile,), {}, (), 1.0)
    manifest = manifest_of(outcome_of("packed", engine=engine))
    assert manifest["graphs"][0]["engine"] == "model.engine"
    assert manifest["profiles"] == manifest["graphs"][0]["profiles"]
    assert manifest["profiles"] == [
        {"name": "packed", "min": {"x": [1, 2]}, "opt": {"x": [4, 2]}, "max": {"x": [8, 2]}}
    ]


# --- What the ranking runtime is told ---------------------------------------------------------------------------------


def test_the_ranking_entry_says_what_the_runtime_needs() -> None:
    spec = spec_of(outcome_of(*GRAPHS))
    assert spec.history_names == ("movie_id", "movie_category", "action_timestamp", "item_weights")
    assert spec.candidate_names == ("item_movie_id", "item_movie_category", "item_shop", "item_query_time")
    assert {each.table_size for each in (*spec.history_ids, *spec.candidate_ids, *spec.contextual)} == {40}
    assert [(f.name, f.max_length, f.min_history_len) for f in spec.contextual] == [
        ("user_id", 1, 20),
        ("genres", 3, 5),
    ]
    assert spec.tasks == ("like", "minutes")
    assert (spec.max_history_len, spec.max_candidates, spec.max_batch, spec.micro_batch) == (48, 24, 8, 5)
    assert (spec.scaling, spec.counts_candidates, spec.cache_rule) == (57.0, True, "request")
    assert (spec.num_layers, spec.num_heads, spec.attention_dim, spec.linear_dim) == (2, 2, 5, 7)
    assert (spec.kv_dtype, spec.row_dtype) == ("float32", "float32")
    assert all(each.external_dim is None for each in (*spec.history_ids, *spec.candidate_ids, *spec.contextual))


def test_rows_of_external_tables_have_a_width() -> None:
    spec = spec_of(outcome_of("packed", external=True))
    assert {each.external_dim for each in (*spec.history_ids, *spec.candidate_ids, *spec.contextual)} == {6}


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "float32"), ("fp16", "float16"), ("bf16", "bfloat16")])
def test_keys_and_values_have_the_type_of_the_graph(precision: str, dtype: str) -> None:
    assert spec_of(outcome_of(*GRAPHS, precision=precision)).kv_dtype == dtype


def test_without_m_falcon_a_pass_takes_all_candidates() -> None:
    limits = dataclasses.replace(LIMITS, micro_batch=None)
    assert spec_of(outcome_of("packed", limits=limits)).micro_batch == 24


def test_another_weight_in_any_graph_is_another_model() -> None:
    """A cached history must not outlive the weights that encoded it."""
    version = spec_of(outcome_of(*GRAPHS)).model_version
    assert version == spec_of(outcome_of(*GRAPHS)).model_version
    others = [spec_of(outcome_of(*GRAPHS, weight={name: 2.0})).model_version for name in GRAPHS]
    assert len({version, *others}) == 4


def test_another_row_in_a_table_of_a_file_is_another_model() -> None:
    outcome = outcome_of(*GRAPHS)
    digests = [{}, {"t.bin": "ab" * 32}, {"t.bin": "cd" * 32}, {"u.bin": "ab" * 32}]
    versions = {spec_of(dataclasses.replace(outcome, tables=each)).model_version for each in digests}
    assert len(versions) == 4
    assert spec_of(outcome).model_version in versions


def test_a_retrieval_build_has_no_ranking_entry() -> None:
    outcome = outcome_of("packed")
    retrieval = dataclasses.replace(outcome.plan.spec, config=small_config(num_layers=1))
    plan = dataclasses.replace(outcome.plan, spec=retrieval)
    manifest = manifest_of(dataclasses.replace(outcome, plan=plan))
    assert manifest["ranking"] is None
    assert manifest["limits"] == {"num_items": 40, "num_ratings": 0, "max_batch": 8, "max_seq_len": 48}
