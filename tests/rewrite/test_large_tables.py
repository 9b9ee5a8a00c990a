"""Graphs with tables in files: the passes make the same graph of them, and every session the same answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest

from hstu_compile import table_files
from hstu_compile.artifacts import OnnxGraph
from hstu_compile.export import exported_from_served
from hstu_compile.graph_facts import graph_facts
from hstu_compile.rewrite import apply_passes, export_passes
from hstu_compile.rewrite.cut_at_attention import segmented_from_onnx
from hstu_compile.rewrite.lower_tensorrt8 import lowered_for_tensorrt8
from hstu_compile.rewrite.widen_bf16 import WidenBf16
from hstu_compile.runtime.onnxruntime_session import OnnxRuntimeSession
from hstu_compile.runtime.segmented_onnx_session import SegmentedOnnxSession
from hstu_compile.runtime.session import Session
from hstu_compile.table_files import TableFiles, is_external, table_names
from tests import segmented_cases
from tests.exported_models import traced_ranking
from tests.large_tables import with_tables_inside, with_tables_outside
from tests.segmented_cases import WIDE_FORM, Case, ranking_case, retrieval_case

CASES = {
    "retrieval": (retrieval_case, "retrieval", "fp32"),
    "packed": (ranking_case, "packed", "fp16"),
    "bf16 packed": (ranking_case, "packed", "bf16"),
}


@pytest.fixture(autouse=True)
def _small_tables_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    # Rows of 6 float16: of 40 rows in the smallest table.
    monkeypatch.setattr(table_files, "TABLE_BYTES", 480)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    make, name, precision = CASES[request.param]
    return make(name, precision)


def outside(graph: OnnxGraph, folder: Path) -> OnnxGraph:
    return dataclasses.replace(graph, model=with_tables_outside(graph.model, folder), folder=folder)


def assert_same_answers(one: Session, other: Session, feeds: list[dict[str, np.ndarray]]) -> None:
    for feed in feeds:
        expected, actual = one.run(feed), other.run(feed)
        assert expected.keys() == actual.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(actual[name], array)


# It traces a graph twice. In every run tests/e2e/test_large_tables.py compares answers with those of one file.
@pytest.mark.slow
def test_the_exporter_writes_tables_and_changes_nothing_else(tmp_path: Path) -> None:
    model, served, whole = traced_ranking(WIDE_FORM, "fp16", "packed")
    tables = TableFiles(tmp_path)
    graph = exported_from_served(served, "fp16", tables)
    assert (graph.folder, whole.folder) == (tmp_path, None)
    assert with_tables_inside(graph.model, tmp_path) == whole.model
    assert graph_facts(graph.model) == graph_facts(whole.model)
    assert {file.name for file in tmp_path.iterdir()} == set(tables.sha256) == set(table_names(graph.model))
    for number, table in enumerate(model.tables.parameters()):
        rows = np.fromfile(tmp_path / f"tables.{number}.bin", np.float16)
        np.testing.assert_array_equal(rows, table.numpy().ravel())


def test_passes_make_the_same_graph_and_leave_the_files_alone(tmp_path: Path) -> None:
    _, served, traced = traced_ranking(WIDE_FORM, "fp16", "packed")
    passes = export_passes(served.num_attention, served.taps, segmented_cases._selection(served))
    *_, inside = apply_passes(traced, passes)
    *_, moved = apply_passes(outside(traced, tmp_path), passes)
    assert moved.folder == tmp_path
    assert len(table_names(moved.model)) >= 5
    assert with_tables_inside(moved.model, tmp_path) == inside.model


def test_answers_are_the_same_in_one_piece_and_in_segments(case: Case, tmp_path: Path) -> None:
    graph = outside(case.whole, tmp_path)
    assert table_names(graph.model)
    with OnnxRuntimeSession(case.whole.model) as inside, OnnxRuntimeSession(graph.model, folder=tmp_path) as moved:
        assert moved.name == inside.name
        assert_same_answers(inside, moved, case.feeds)
    cut = segmented_from_onnx(graph)
    assert cut.steps == case.cut.steps
    assert cut.crossing == case.cut.crossing
    with SegmentedOnnxSession(case.cut) as inside, SegmentedOnnxSession(cut) as moved:
        assert_same_answers(inside, moved, case.feeds)


def test_no_segment_copies_a_table_and_only_one_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hstu_compile.rewrite.cut_at_attention._LARGE_BYTES", 480)
    case = ranking_case("packed", "fp16")
    cut = segmented_from_onnx(outside(case.whole, tmp_path))
    names = [name for segment in cut.segments for name in table_names(segment.model)]
    assert sorted(names) == sorted(set(names))
    assert {segment.folder for segment in cut.segments} == {tmp_path}


def test_a_table_in_bfloat16_stays_in_its_file_and_a_second_run_changes_nothing(tmp_path: Path) -> None:
    model = with_tables_outside(ranking_case("packed", "bf16").whole.model, tmp_path)
    widened = WidenBf16().call(model)
    assert widened.modified
    half = [tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.BFLOAT16]
    assert half
    assert all(map(is_external, half))
    before = model.SerializeToString(deterministic=True)
    assert not WidenBf16().call(model).modified
    assert model.SerializeToString(deterministic=True) == before


def test_the_graph_for_tensorrt_8_is_the_same(tmp_path: Path) -> None:
    model = ranking_case("packed", "fp16", prune=False, fuse_norms=False).whole.model
    inside, _ = lowered_for_tensorrt8(model, "fp16", native=True)
    moved, _ = lowered_for_tensorrt8(with_tables_outside(model, tmp_path), "fp16", native=True)
    assert with_tables_inside(moved, tmp_path) == inside
