"""What lets builds of these tests share their work: it must never take one model, or one option, for another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from hstu_compile import pipeline, table_files
from hstu_compile.artifacts import OnnxGraph
from hstu_compile.served import ServedGraph, retrieval_graph, served_graphs
from tests import traced_graphs
from tests.dlrm_reference import DlrmForm
from tests.e2e.conftest import Built, BuiltOnce, CommandResult
from tests.exported_models import ranking_model, small_config, small_model
from tests.traced_graphs import traced_from_served, tracing_once


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the graphs that were traced; the tracing itself is a stand-in."""
    names: list[str] = []

    def stand_in(served: ServedGraph, precision: Any, tables: Any = None) -> OnnxGraph:
        names.append(served.name)
        return OnnxGraph(served.name, onnx.ModelProto(), precision, (), (), folder=tables)

    monkeypatch.setattr(traced_graphs, "exported_from_served", stand_in)
    monkeypatch.setattr(traced_graphs, "_traced", {})
    return names


def small_graph(seed: int = 0, top_k: int = 0, **changes: Any) -> ServedGraph:
    return retrieval_graph(small_model(small_config(**changes), seed=seed), top_k)


def test_equal_models_are_traced_once(traced: list[str]) -> None:
    first = traced_from_served(small_graph(), "fp32")
    assert traced_from_served(small_graph(), "fp32") is first
    assert traced == ["retrieval"]
    for _ in range(2):
        for graph in served_graphs(ranking_model(DlrmForm()), micro_batch=5):
            traced_from_served(graph, "fp32")
    assert traced == ["retrieval", "packed", "prefill", "score"]


def test_whatever_changes_a_graph_is_traced_again(traced: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    one_weight = small_graph()
    with torch.no_grad():
        next(iter(one_weight.module.parameters()))[-1, -1] += 1e-7
    others = [
        *(small_graph(), small_graph(seed=1), one_weight, small_graph(top_k=5), small_graph(num_positions=23)),
        small_graph(attention={"alpha": 0.5}),
        *served_graphs(small_model(small_config()), max_append=4)[1:],
        *served_graphs(small_model(small_config()), max_append=5)[1:],
    ]
    graphs = [traced_from_served(graph, "fp32") for graph in others]
    graphs.append(traced_from_served(small_graph(), "fp16"))
    monkeypatch.setattr(table_files, "TABLE_BYTES", 480)
    graphs.append(traced_from_served(small_graph(), "fp32"))
    # A prefill does not depend on how many events may be appended.
    assert len({id(graph) for graph in graphs}) == len(graphs) - 1 == len(traced)


def test_a_graph_with_tables_beside_it_is_traced_for_every_build(traced: list[str], tmp_path: Path) -> None:
    folders: list[Any] = [tmp_path / "one", tmp_path / "other"]
    assert [traced_from_served(small_graph(), "fp32", folder).folder for folder in folders] == folders


def test_builds_outside_trace_for_themselves() -> None:
    real = pipeline.exported_from_served
    with tracing_once():
        assert pipeline.exported_from_served is traced_from_served
    assert pipeline.exported_from_served is real


def test_a_bundle_is_built_once_for_its_options(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tmp_path_factory, "getbasetemp", lambda: tmp_path / "one")
    (tmp_path / "one").mkdir()
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    folders: list[Path] = []

    def build(folder: Path) -> Built:
        folders.append(folder)
        return Built(folder, CommandResult(0, "said", "warned"))

    once = BuiltOnce("a", tmp_path_factory)
    first = once.get(("--fp32", 5), build)
    assert (first.path, first.result) == (folders[0], CommandResult(0, "said", "warned"))
    assert once.get(("--fp32", 5), build) == first
    assert [
        BuiltOnce(name, tmp_path_factory).get(key, build).path
        for name, key in (("a", ("--fp32", "5")), ("b", ("--fp32", 5)))
    ] == folders[1:]
    assert len(folders) == 3


def test_the_processes_of_a_run_share_bundles_and_two_runs_do_not(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    found = []
    for run, worker in (("1", "gw0"), ("1", "gw1"), ("2", "gw0")):
        base = tmp_path / run / worker
        base.mkdir(parents=True)
        monkeypatch.setattr(tmp_path_factory, "getbasetemp", lambda base=base: base)
        found.append(BuiltOnce("a", tmp_path_factory).get((), lambda folder: Built(folder, CommandResult(0, "", ""))))
    assert found[0] == found[1] != found[2]
