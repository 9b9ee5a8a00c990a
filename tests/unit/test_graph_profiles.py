"""Shape ranges of each graph, from the names of its axes and the limits that it was exported for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from hstu_compile.artifacts import Profile, TensorSpec
from hstu_compile.engine_stage import EngineRequest, profiles_of
from hstu_compile.errors import EngineError, UsageError
from hstu_compile.graph_limits import GraphLimits, read_limits, write_limits
from hstu_compile.profiles import ProfileSizes, derived_profile, graph_profiles
from hstu_compile.served import ServedGraph, served_graphs
from hstu_compile.trt_options import EngineOptions
from tests.dlrm_reference import ACTIONS, CANDIDATE, HISTORY, QUERY_TIME, TIME, DlrmForm
from tests.exported_models import TOP_K, exported_graph, ranking_model, small_config, small_model

FORM = DlrmForm(contextual=(("user_id", 1, 20), ("genres", 3, 5)))
LIMITS = {
    "packed": GraphLimits("packed", 48, 24, 4),
    "prefill": GraphLimits("prefill", 48, 0, 4),
    "score": GraphLimits("score", 48, 16, 4),
}
APPEND = GraphLimits("append", 20, max_append=4)


def specs_of(graph: ServedGraph) -> list[TensorSpec]:
    return [
        TensorSpec(each.name, str(each.example.dtype).removeprefix("torch."), (each.axis, *each.example.shape[1:]))
        for each in graph.inputs
    ]


def profile_of(name: str, max_batch: int = 8, opt_batch: int = 2, **changes: int | None) -> Profile:
    graph = {each.name: each for each in served_graphs(ranking_model(FORM), micro_batch=16)}[name]
    sizes = LIMITS[name].sizes(max_batch, opt_batch, changes.get("max_seq_len"), changes.get("opt_seq_len", 10))
    (profile,) = graph_profiles(name, specs_of(graph), sizes)
    return profile


def ranges(profile: Profile) -> dict[str, tuple[tuple[int, ...], ...]]:
    return {name: (profile.min[name], profile.opt[name], profile.max[name]) for name in profile.max}


def test_packed_takes_every_users_candidates() -> None:
    events, asked, users = ((1,), (20,), (384,)), ((1,), (24,), (192,)), ((2,), (3,), (9,))
    assert ranges(profile_of("packed")) == {
        HISTORY: events,
        TIME: events,
        ACTIONS: events,
        "user_id": ((1,), (2,), (8,)),
        "genres": ((3,), (6,), (24,)),
        CANDIDATE: asked,
        QUERY_TIME: asked,
        "seq_offsets": users,
        "candidate_offsets": users,
    }


def test_prefill_takes_histories() -> None:
    each = ((1,), (2,), (8,))
    assert ranges(profile_of("prefill")) == {
        HISTORY: ((1,), (20,), (384,)),
        TIME: ((1,), (20,), (384,)),
        ACTIONS: ((1,), (20,), (384,)),
        "user_id": each,
        "genres": ((3,), (6,), (24,)),
        "seq_offsets": ((2,), (3,), (9,)),
        "request_timestamps": each,
        "num_candidates": each,
        "scaling_seq_lens": each,
    }


def test_score_takes_one_micro_batch_of_all_users_and_their_cached_rows() -> None:
    cached = (1, 2 * (10 + 4), 8 * (48 + 4))
    found = ranges(profile_of("score"))
    assert found[CANDIDATE] == found[QUERY_TIME] == ((1,), (8,), (16,))
    assert found["candidate_offsets"] == found["cache_offsets"] == ((2,), (3,), (9,))
    assert found["k_0"] == found["k_1"] == tuple((rows, 2, 5) for rows in cached)
    assert found["v_0"] == found["v_1"] == tuple((rows, 2, 7) for rows in cached)


def test_score_with_our_kernels_takes_the_whole_cache_and_a_sequence_in_front_of_each() -> None:
    graph = served_graphs(ranking_model(FORM), micro_batch=16)[-1]
    limits = dataclasses.replace(LIMITS["score"], cache_rows=5000)
    for has_kernels, most, users in ((True, 5000, (5, 17)), (False, 8 * 52, (3, 9))):
        sizes = limits.sizes(8, 2, None, 10, has_kernels=has_kernels)
        (profile,) = graph_profiles("score", specs_of(graph), sizes)
        found = ranges(profile)
        assert found["k_0"] == ((1, 2, 5), (28, 2, 5), (most, 2, 5))
        assert found["cache_offsets"] == found["candidate_offsets"] == ((2,), *((each,) for each in users))
        assert found[CANDIDATE] == ((1,), (8,), (16,))


def test_append_takes_new_events_the_one_before_them_and_cached_rows() -> None:
    *_, graph = served_graphs(small_model(small_config()), top_k=3, max_append=4)
    (profile,) = graph_profiles("append", specs_of(graph), APPEND.sizes(8, 2, None, 10))
    found, new, cached, users = ranges(profile), ((1,), (6,), (40,)), ((1,), (20,), (160,)), ((2,), (3,), (9,))
    assert found["item_ids"] == found["timestamps"] == new
    assert found["cached_timestamps"] == found["cached_item_ids"] == cached
    assert found["seq_offsets"] == found["cache_offsets"] == users
    assert found["k_1"] == tuple((rows, 2, 25) for (rows,) in cached)


@pytest.mark.parametrize("name", LIMITS)
def test_a_profile_of_one_user_is_legal(name: str) -> None:
    profile = profile_of(name, 1, 1, opt_seq_len=None)
    for shapes in ranges(profile).values():
        for low, typical, high in zip(*shapes, strict=True):
            assert 1 <= low <= typical <= high


def test_a_shorter_history_narrows_events_and_cached_rows_alone() -> None:
    assert profile_of("prefill", max_seq_len=20).max[HISTORY] == (160,)
    score = profile_of("score", max_seq_len=20)
    assert (score.max["k_0"], score.max[CANDIDATE]) == ((192, 2, 5), (16,))


@pytest.mark.parametrize(
    ("axis", "sizes"),
    [
        ("T", ProfileSizes(4, 10)),
        ("A", ProfileSizes(4, 10)),
        ("rows", ProfileSizes(4, 10, max_candidates=3)),
        ("B_times_", None),
    ],
)
def test_an_axis_that_nothing_explains_is_named(axis: str, sizes: ProfileSizes | None) -> None:
    with pytest.raises(EngineError, match=rf"strange \['{axis}'\]") as caught:
        graph_profiles("packed", [TensorSpec("strange", "int32", (axis,))], sizes or ProfileSizes(4, 10))
    assert caught.value.code == "HSTU-E405"
    assert "--minShapes" in caught.value.fix


def test_more_rows_than_int32_offsets_count_are_refused() -> None:
    ProfileSizes(1 << 10, (1 << 20), max_candidates=(1 << 20), contextual_len=1)
    for sizes in ({"max_candidates": 1 << 31}, {"contextual_len": 1 << 21}):
        with pytest.raises(EngineError, match="which int32 offsets cannot count") as caught:
            ProfileSizes(1 << 10, 1 << 20, **sizes)
        assert "lower --max-batch or --max-seq-len" in caught.value.fix


# --- Limits inside a graph --------------------------------------------------------------------------------------------


def empty_model() -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["L"])
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])], "g", [x], [helper.make_value_info("y", x.type)]
    )
    return helper.make_model(graph)


@pytest.mark.parametrize(
    "limits", [*LIMITS.values(), APPEND, GraphLimits("score", 9, 1, cache_rows=7)], ids=lambda limits: limits.graph
)
def test_limits_survive_in_the_file(limits: GraphLimits) -> None:
    model = empty_model()
    write_limits(model, limits)
    assert read_limits(onnx.load_from_string(model.SerializeToString())) == limits
    write_limits(model, dataclasses.replace(limits, max_seq_len=7))
    assert read_limits(model) == dataclasses.replace(limits, max_seq_len=7)


def test_a_file_from_before_append_has_no_limit_for_it() -> None:
    model = empty_model()
    write_limits(model, APPEND)
    kept = [prop for prop in model.metadata_props if prop.key != "hstu.max_append"]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    assert read_limits(model) == dataclasses.replace(APPEND, max_append=0)


def test_a_graph_of_somebody_else_has_the_limits_of_its_attention_nodes() -> None:
    assert read_limits(exported_graph("fp32", top_k=TOP_K)) == GraphLimits("retrieval", 24)
    assert read_limits(empty_model()) is None


@pytest.mark.parametrize("value", [0, -8])
@pytest.mark.parametrize("option", ["--max-batch", "--opt-batch", "--max-seq-len", "--opt-seq-len"])
def test_the_engine_command_refuses_a_count_below_one_before_it_reads_the_graph(
    tmp_path: Path, option: str, value: int
) -> None:
    given = {"max_batch": 8, "opt_batch": 1, "max_seq_len": None, "opt_seq_len": None}
    counts: dict[str, Any] = {**given, option.removeprefix("--").replace("-", "_"): value}
    request = EngineRequest(tmp_path / "absent.onnx", tmp_path / "x.engine", "auto", options=EngineOptions(), **counts)
    with pytest.raises(UsageError, match=f"{option} {value} cannot be used") as caught:
        profiles_of(request)
    assert caught.value.why == "allowed: 1 or more"
    assert option in caught.value.fix


def test_a_part_of_a_graph_takes_the_sizes_that_its_axes_expressions_have() -> None:
    inputs = (
        TensorSpec("ids", "int32", ("L",)),
        TensorSpec("item", "int32", ("T",)),
        TensorSpec("genres", "int32", ("B_times_3",)),
        TensorSpec("seq_offsets", "int32", ("B_plus_1",)),
    )
    (whole,) = graph_profiles("packed", inputs, ProfileSizes(max_batch=4, max_seq_len=10, max_candidates=6))
    parts = (
        TensorSpec("seq_offsets", "int32", ("B_plus_1",)),
        TensorSpec("rows", "float16", ("4*B + L + T", 2, 5)),
        TensorSpec("offsets", "int32", ("B + 1",)),
    )
    found = derived_profile("packed_segment_1", whole, inputs, parts)
    assert found.min == {"seq_offsets": (2,), "rows": (6, 2, 5), "offsets": (2,)}
    assert found.opt == {"seq_offsets": (5,), "rows": (16 + 20 + 3, 2, 5), "offsets": (5,)}
    assert found.max == {"seq_offsets": (5,), "rows": (16 + 40 + 6, 2, 5), "offsets": (5,)}


@pytest.mark.parametrize(
    ("sizes", "text"),
    [({"ids": (7,), "times": (8,)}, r"times of shape \[8\] does not fit L = 7"), ({}, "no size for the axis 'L'")],
)
def test_a_profile_that_gives_a_part_no_size_is_refused(sizes: dict[str, tuple[int, ...]], text: str) -> None:
    inputs = (TensorSpec("ids", "int32", ("L",)), TensorSpec("times", "int64", ("L",)))
    profile = Profile("mine", sizes, sizes, sizes)
    with pytest.raises(EngineError, match=rf"HSTU-E405[\s\S]*{text}"):
        derived_profile("part", profile, inputs, [TensorSpec("rows", "float16", ("L + 1", 4))])
