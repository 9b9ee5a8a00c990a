from __future__ import annotations

import onnx

from hstu_compile.rewrite.name_dims import NameDims


def axis_names(model: onnx.ModelProto) -> list[str]:
    values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    return [dim.dim_param for value in values for dim in value.type.tensor_type.shape.dim if dim.dim_param]


def test_the_exporters_expression_for_the_batch_becomes_b(exported: onnx.ModelProto) -> None:
    count = axis_names(exported).count("B_plus_1 - 1")
    assert count > 0
    assert NameDims().call(exported).counts == {"axes": count}
    assert "B_plus_1 - 1" not in axis_names(exported)


def test_a_second_run_reports_nothing(exported: onnx.ModelProto) -> None:
    NameDims().call(exported)
    assert not NameDims().call(exported).modified


def test_other_axes_keep_their_names(exported: onnx.ModelProto) -> None:
    before = [name for name in axis_names(exported) if name != "B_plus_1 - 1"]
    renamed = axis_names(exported)
    NameDims().call(exported)
    after = axis_names(exported)
    assert [new for old, new in zip(renamed, after, strict=True) if old != "B_plus_1 - 1"] == before
