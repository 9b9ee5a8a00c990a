from __future__ import annotations

import onnx
import pytest

from hstu_compile.errors import RewriteError
from hstu_compile.rewrite.detach_taps import DetachTaps

TAPS = ("layer_0", "layer_1", "layer_2")


def run(model: onnx.ModelProto, taps: tuple[str, ...] = TAPS) -> dict[str, int]:
    step = DetachTaps(taps)
    step.requires(model)
    result = step.call(model)
    step.ensures(model, result)
    return result.counts


def test_taps_become_intermediate_values_of_the_same_name_and_type(exported: onnx.ModelProto) -> None:
    before = {output.name: output.type.SerializeToString() for output in exported.graph.output}
    answers = ["user_embeddings", "top_items", "top_scores"]
    assert list(before) == [*answers, *TAPS]
    assert run(exported) == {"taps": 3}
    assert [output.name for output in exported.graph.output] == answers
    infos = {info.name: info.type.SerializeToString() for info in exported.graph.value_info}
    assert {name: infos[name] for name in TAPS} == {name: before[name] for name in TAPS}
    onnx.checker.check_model(exported)


def test_a_second_run_reports_nothing(exported: onnx.ModelProto) -> None:
    run(exported)
    assert run(exported) == {"taps": 0}


def test_a_tap_that_no_node_computes_is_refused(exported: onnx.ModelProto) -> None:
    with pytest.raises(RewriteError, match="changed 3 of 4 taps") as caught:
        run(exported, (*TAPS, "layer_3"))
    assert caught.value.code == "HSTU-E301"
