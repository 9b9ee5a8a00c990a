"""What --attention fused plans, against what the graphs turn out to need."""

from __future__ import annotations

import dataclasses

import pytest

from hstu_compile.fused_plan import FusedPlan, fused_plan
from hstu_compile.graph_plugin import kernels_request_of
from hstu_compile.plugin_library import PluginBuildRequest
from hstu_compile.rewrite import apply_passes, export_passes
from hstu_compile.rewrite.cut_at_attention import segmented_from_onnx
from hstu_compile.table_files import TABLE_BYTES
from tests.dlrm_reference import DlrmForm
from tests.exported_models import ranking_config, small_config, traced_ranking
from tests.segmented_cases import WIDE_FORM, ranking_case, retrieval_case


def assert_same_kernels(plan: FusedPlan, request: PluginBuildRequest) -> None:
    assert (plan.kernels, plan.hopper_kernels) == (request.variants, request.hopper_variants)
    assert plan.norm_kernels == request.norm_variants


WIDE = dict.fromkeys(("attention_dim", "linear_dim"), 64)


@pytest.mark.parametrize("name", ["retrieval", "append"])
def test_a_retrieval_plan_names_the_kernels_and_segments_of_the_graph(name: str) -> None:
    case = retrieval_case(name, "fp16")  # type: ignore[arg-type]
    plan = fused_plan(small_config(2), (name,), "fp16", "fast")
    request = kernels_request_of([case.whole.model])
    assert_same_kernels(plan, request)
    assert [norm.activation for norm in plan.norm_kernels] == [1]
    assert (plan.attentions, plan.segments) == ({name: case.served.num_attention}, {name: len(case.cut.segments)})


@pytest.mark.parametrize(("name", "activations"), [("packed", [1, 2, 0]), ("prefill", [1, 2, 0]), ("score", [1])])
def test_a_ranking_plan_names_the_kernels_and_segments_of_the_graph(name: str, activations: list[int]) -> None:
    case = ranking_case(name, "bf16")
    plan = fused_plan(ranking_config(WIDE_FORM), (name,), "bf16", "fast")
    request = kernels_request_of([case.whole.model])
    assert_same_kernels(plan, request)
    assert [norm.activation for norm in plan.norm_kernels] == activations
    assert (plan.attentions, plan.segments) == ({name: case.served.num_attention}, {name: len(case.cut.segments)})


def test_without_norms_as_operators_none_is_planned_and_none_is_cut_out() -> None:
    """`--no-fuse-norms --dry-run` said more engines and kernels than the build made."""
    _, served, traced = traced_ranking(WIDE_FORM, "bf16", "packed")
    *_, whole = apply_passes(traced, export_passes(served.num_attention, served.taps, fuse_norms=False))
    cut = segmented_from_onnx(whole)
    plan = fused_plan(ranking_config(WIDE_FORM), ("packed",), "bf16", "fast", fuse_norms=False)
    assert_same_kernels(plan, kernels_request_of([whole.model]))
    assert plan.norm_kernels == ()
    assert plan.segments == {"packed": len(cut.segments)}


def test_each_kernel_is_named_once_and_only_scores_read_a_cache() -> None:
    plan = fused_plan(ranking_config(DlrmForm(num_layers=3)), ("packed", "prefill", "score"), "fp16", "accurate")
    assert plan.segments == {"packed": 7, "prefill": 6, "score": 4}
    assert [(each.mask_kind, each.has_cache) for each in plan.kernels] == [(1, False), (0, False), (1, True)]
    assert plan.to_dict()["engines"] == 17


@pytest.mark.parametrize("looked_up", [True, False])
def test_a_table_of_the_size_of_a_file_leaves_its_tower_in_the_graph(looked_up: bool) -> None:
    config = ranking_config(DlrmForm(num_layers=3))
    float16_row = 2 * max(config.table_dim, config.layer.embedding_dim)
    num_rows = -(-TABLE_BYTES // float16_row) - looked_up
    tables = tuple(dataclasses.replace(table, num_rows=num_rows) for table in config.tables)
    config = dataclasses.replace(config, tables=tables, action_feature="", action_weights=())
    segments = {
        tabulate: fused_plan(config, ("packed",), "fp16", "fast", tabulate_towers=tabulate).segments
        for tabulate in (False, True)
    }
    assert segments == {False: {"packed": 7}, True: {"packed": 4 if looked_up else 7}}


def test_a_graph_without_attention_needs_no_kernel() -> None:
    plan = fused_plan(ranking_config(DlrmForm(num_layers=1)), ("prefill",), "fp16", "fast")
    assert (plan.segments, plan.kernels, plan.norm_kernels) == ({"prefill": 1}, (), ())


def test_hopper_kernels_are_of_the_builds_silu_and_of_half_precision() -> None:
    model = small_config(1, attention=WIDE)
    found = {silu: fused_plan(model, ("retrieval",), "bf16", silu).hopper_kernels for silu in ("fast", "accurate")}  # type: ignore[arg-type]
    assert all(each.is_accurate for each in found["accurate"])
    assert not any(each.is_accurate for each in found["fast"])
    assert found["fast"]
    assert fused_plan(model, ("retrieval",), "fp32", "fast").hopper_kernels == ()
