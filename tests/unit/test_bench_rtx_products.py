"""The forms of a product that are timed on TensorRT-RTX, the engines' own among them, and the table of the results."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from hstu_compile.rewrite.float_epilogues import FloatEpilogues
from hstu_compile.rewrite.widen_accumulators import WidenAccumulators

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "tests" / "bench"))
import bench_rtx_products as bench  # noqa: E402
from bench_plugin import read_rows  # noqa: E402

DEPTH, WIDTH, ROWS = 48, 32, 20
WAYS = [(dtype, form) for dtype in bench.TYPES for form in bench.forms_of(dtype)]
#: What rounding in a type costs a product of O(1).
BOUNDS = {"float16": 2e-3, "bfloat16": 1.6e-2}


def operators(model: onnx.ModelProto) -> list[tuple[str, int | None]]:
    """Nodes in order, Casts with what they make."""
    return [
        (node.op_type, next((each.i for each in node.attribute if each.name == "to"), None))
        for node in model.graph.node
    ]


@pytest.mark.parametrize("follows", [bench.BIAS, bench.RESIDUAL, bench.NOTHING])
@pytest.mark.parametrize(("dtype", "form"), WAYS)
def test_every_form_is_the_same_product(dtype: str, form: str, follows: str) -> None:
    model = bench.product_graph(DEPTH, WIDTH, follows, form, dtype)
    onnx.checker.check_model(model, full_check=True)
    rng = np.random.default_rng(1)
    kind = onnx.helper.tensor_dtype_to_np_dtype(bench.TYPES[dtype])
    given = {name: rng.standard_normal((ROWS, size)).astype(kind) for name, size in (("x", DEPTH), ("r", WIDTH))}
    weight, bias = (array.astype(np.float64) for array in bench.weights_of(DEPTH, WIDTH, dtype))
    expected = given["x"].astype(np.float64) @ weight
    expected += {bench.BIAS: bias, bench.RESIDUAL: given["r"].astype(np.float64), bench.NOTHING: 0.0}[follows]
    read = {name: given[name] for name in (value.name for value in model.graph.input)}
    (found,) = ReferenceEvaluator(model).run(["y"], read)
    assert found.dtype == kind
    error = np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected)
    assert 0 < error < BOUNDS[dtype]


@pytest.mark.parametrize("follows", [bench.BIAS, bench.RESIDUAL, bench.NOTHING])
@pytest.mark.parametrize("dtype", bench.TYPES)
def test_the_last_form_is_what_engines_are_built_of(dtype: str, follows: str) -> None:
    made = bench.product_graph(DEPTH, WIDTH, follows, "half", dtype)
    FloatEpilogues().call(made)
    WidenAccumulators().call(made)
    assert operators(made) == operators(bench.product_graph(DEPTH, WIDTH, follows, "last", dtype))


def test_the_document_shows_the_results() -> None:
    rows = read_rows(bench.RESULTS)
    measured = {row["dtype"] for row in rows}
    assert "float16" in measured
    ways = sum(1 + len(bench.forms_of(dtype)) for dtype in measured)
    assert len(rows) == len(bench.PRODUCTS) * len(bench.ROWS) * ways
    assert {row["status"] for row in rows} == {"ok"}
    text = (REPOSITORY / "docs" / "end-to-end.md").read_text(encoding="utf-8")
    shown = text.partition(bench.BEGIN)[2].partition(bench.END)[0]
    assert shown.strip() == bench.table_of(rows).strip()


def test_without_a_place_for_results_nothing_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([]) == 0
    assert "measures on a GPU, with --out" in capsys.readouterr().out
