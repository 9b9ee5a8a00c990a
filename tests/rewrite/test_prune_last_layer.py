"""The last layer on the consumed rows alone: the same numbers, less work, and refusals of every other form."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from hstu_compile.artifacts import TAP_PREFIX, OnnxGraph, Precision, Profile
from hstu_compile.compare import EAGER_FLOOR, error_bound, row_error
from hstu_compile.engine import engine_from_onnx
from hstu_compile.errors import RewriteError
from hstu_compile.export import TORCH_DTYPES, exported_from_served
from hstu_compile.model.config import LayerConfig
from hstu_compile.model.jagged import sequence_index
from hstu_compile.model.layer import HstuLayer, JaggedBatch
from hstu_compile.op_schema import is_attention, node_attributes
from hstu_compile.profiles import ProfileSizes
from hstu_compile.rewrite import apply_passes, export_passes
from hstu_compile.rewrite._pass import Pass
from hstu_compile.rewrite.lower_tensorrt8 import lowered_for_tensorrt8
from hstu_compile.rewrite.project_by_convolution import ProjectByConvolution
from hstu_compile.rewrite.prune_last_layer import PruneLastLayer, RowSelection
from hstu_compile.rewrite.widen_bf16 import WidenBf16
from hstu_compile.served import GraphInput, ServedGraph
from tests.exported_models import retrieval_profile, small_config, small_model, traced_retrieval, with_layer
from tests.oracle import Array
from tests.rewrite.attention_graphs import run_onnx

# Both graphs round the same values; only the order of a product's sums may differ between matrix shapes.
SAME_FP32 = 1e-6

BATCHES = {
    "empty sequences and one of length 1": (0, 7, 0, 0, 20, 1, 0),
    "one event": (1,),
    "only empty sequences": (0, 0),
    "one full sequence": (20,),
}


def feeds_of(lengths: tuple[int, ...], *, rated: bool = False, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    feeds = {
        "item_ids": rng.integers(1, 41, total).astype(np.int32),
        "timestamps": np.sort(rng.integers(0, 10**6, total)),
        "seq_offsets": np.cumsum([0, *lengths]).astype(np.int32),
        "request_timestamps": np.full(len(lengths), 10**6 + 60),
    }
    if rated:
        feeds["ratings"] = rng.integers(0, 6, total).astype(np.int32)
    return feeds


GENREC = with_layer(
    small_config(attention={"linear_dim": 16, "attention_dim": 8, "time_bias": "own", "bias_per_head": True}),
    input_norm=False,
    output_projection=False,
    output_bias=False,
)
AFFINE = with_layer(
    small_config(), uvqk_bias=True, input_norm_affine=True, output_norm_affine=True, output_concat="u_norm_gated"
)
NO_TIME = small_config(attention={"time_bias": "none", "num_time_buckets": 0, "time_bucket_divisor": 1.0})
RETRIEVAL = {
    "research": small_config(),
    "one layer": small_config(num_layers=1),
    "no bias at all": dataclasses.replace(
        NO_TIME,
        layer=dataclasses.replace(
            NO_TIME.layer, attention=dataclasses.replace(NO_TIME.layer.attention, pos_table_len=0)
        ),
    ),
    "genrec": GENREC,
    "affine norms and every bias": AFFINE,
    "ratings and concat_ua, window, attention_dim is not linear_dim": with_layer(
        small_config(
            attention={"attention_dim": 12, "linear_dim": 20, "max_attn_len": 3},
            preprocessor="rated",
            item_embedding_dim=24,
            num_ratings=6,
        ),
        output_concat="u_norm_gated",
    ),
}


def _slow(kind: str) -> Any:
    """Without a bias the attention has inputs less: candidates' rows of DLRM's layer are so in every run."""
    return pytest.mark.slow if kind == "no bias at all" else ()


KINDS = [pytest.param(kind, marks=_slow(kind)) for kind in RETRIEVAL]


class CandidateModel(nn.Module):
    """Layers over histories with candidates at their tails, then a score of each candidate's row."""

    def __init__(self, layer: LayerConfig, num_layers: int, *, bare: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(HstuLayer(layer) for _ in range(num_layers))
        self.score = None if bare else nn.Parameter(torch.empty(layer.embedding_dim, 2))

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        x, timestamps, seq_offsets, candidate_ids, candidate_offsets = values
        num_targets = candidate_offsets[1:] - candidate_offsets[:-1]
        batch = JaggedBatch(seq_offsets, timestamps, timestamps, num_targets)
        activations = [x * 0.5]
        for layer in self.layers:
            activations.append(layer(activations[-1], batch))
        owner = sequence_index(candidate_offsets, candidate_ids.shape[0])
        first = (seq_offsets[1:] - num_targets - candidate_offsets[:-1]).to(torch.int64).index_select(0, owner)
        index = first + torch.arange(candidate_ids.shape[0])
        selected = activations[-1].index_select(0, index)
        return (selected if self.score is None else selected @ self.score, *activations)


def ranking_layer(kind: str, **attention: Any) -> LayerConfig:
    """The research layer, or that of DLRM-v3."""
    if kind == "research":
        return dataclasses.replace(small_config(attention=attention).layer, uvqk_bias=True)
    config = small_config(
        attention={
            "num_heads": 4,
            "attention_dim": 8,
            "linear_dim": 16,
            "alpha": 8**-0.5,
            "pos_table_len": 0,
            "time_bias": "none",
            "num_time_buckets": 0,
            "time_bucket_divisor": 1.0,
            "contextual_seq_len": 2,
            **attention,
        }
    )
    return dataclasses.replace(
        config.layer,
        silu_scope="u",
        uvqk_bias=True,
        input_norm_affine=True,
        output_norm="group",
        output_norm_affine=True,
        output_concat="u_attn_gated",
        output_bias=False,
    )


def candidate_model(layer: LayerConfig, precision: Precision, num_layers: int = 2, *, bare: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = CandidateModel(layer, num_layers, bare=bare).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) / max(parameter.shape[0], 4) ** 0.5)
    tables = {name: p.clone() for name, p in model.named_parameters() if name.endswith("_table")}
    model.to(TORCH_DTYPES[precision])
    for name, parameter in model.named_parameters():
        if name in tables:
            parameter.data = tables[name]
    return model


def candidate_feeds(
    histories: tuple[int, ...], candidates: tuple[int, ...], precision: Precision, seed: int = 0
) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    lengths = [h + t for h, t in zip(histories, candidates, strict=True)]
    return {
        "x": rng.normal(size=(sum(lengths), 32)).astype(np.float16 if precision == "fp16" else np.float32),
        "timestamps": np.sort(rng.integers(0, 10**6, sum(lengths))),
        "seq_offsets": np.cumsum([0, *lengths]).astype(np.int32),
        "candidate_ids": np.zeros(sum(candidates), np.int32),
        "candidate_offsets": np.cumsum([0, *candidates]).astype(np.int32),
    }


def exported_candidates(model: nn.Module, precision: Precision, num_layers: int = 2) -> OnnxGraph:
    axes = {"candidate_ids": "T", "seq_offsets": "B_plus_1", "candidate_offsets": "B_plus_1"}
    examples = {name: torch.from_numpy(array) for name, array in candidate_feeds((3, 4), (2, 3), "fp32").items()}
    examples["x"] = examples["x"].to(TORCH_DTYPES[precision])
    served = ServedGraph(
        name="candidates",
        module=model,
        inputs=tuple(GraphInput(name, axes.get(name, "L"), example) for name, example in examples.items()),
        outputs=("answers",),
        taps=taps(num_layers),
        num_attention=num_layers,
        consumed="candidates",
    )
    return exported_from_served(served, precision)


def taps(num_layers: int) -> tuple[str, ...]:
    return tuple(f"{TAP_PREFIX}{i}" for i in range(num_layers + 1))


def passes(num_layers: int, *extra: Pass) -> tuple[Pass, ...]:
    """The export passes, others after `name_dims`."""
    before = export_passes(num_layers, taps(num_layers))
    names = [step.name for step in before]
    place = names.index("name_dims") + 1
    return (*before[:place], *extra, *(step for step in before[place:] if step.name != "prune_last_layer"))


def rewritten(graph: OnnxGraph, num_layers: int, *extra: Pass) -> OnnxGraph:
    *_, last = apply_passes(graph, passes(num_layers, *extra))
    onnx.checker.check_model(last.model, full_check=True)
    return last


def _exported(kind: str, precision: Precision) -> OnnxGraph:
    _, _, graph = traced_retrieval(RETRIEVAL[kind], precision)
    return graph


@functools.cache
def _full_and_pruned(kind: str, precision: Precision) -> tuple[bytes, bytes]:
    graph, num_layers = _exported(kind, precision), RETRIEVAL[kind].num_layers
    pruned = rewritten(graph, num_layers, PruneLastLayer(num_layers, RowSelection()))
    records = {record.name: record.counts for record in pruned.passes}
    assert records["prune_last_layer"] == {"attention": 1, "projections": 1}
    return rewritten(graph, num_layers).model.SerializeToString(), pruned.model.SerializeToString()


def full_and_pruned(kind: str = "research", precision: Precision = "fp32") -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """The shipped graph of a retrieval model without and with the pass; new copies each time."""
    full, pruned = _full_and_pruned(kind, precision)
    return onnx.load_from_string(full), onnx.load_from_string(pruned)


def unpruned_prefix(graph: OnnxGraph, num_layers: int) -> onnx.ModelProto:
    """A copy of the graph as the pass finds it."""
    *_, last = apply_passes(graph, passes(num_layers)[:3])
    model = onnx.ModelProto()
    model.CopyFrom(last.model)
    return model


def attention_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if is_attention(node)]


def last_rows(offsets: Array, activation: Array) -> Array:
    """What the gather took: the last row of each sequence, zeros for an empty one."""
    padded = np.concatenate([activation, np.zeros_like(activation[:1], shape=(1, activation.shape[1]))])
    return padded[np.where(np.diff(offsets) > 0, offsets[1:] - 1, len(activation))]


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_user_embeddings_are_those_of_the_full_layer(kind: str, lengths: tuple[int, ...]) -> None:
    full, pruned = full_and_pruned(kind)
    config = RETRIEVAL[kind]
    feeds, out = feeds_of(lengths, rated=config.has_ratings), f"{TAP_PREFIX}{config.num_layers}"
    before, after = run_onnx(full, feeds, taps(config.num_layers)), run_onnx(pruned, feeds, taps(config.num_layers))
    for name in taps(config.num_layers - 1):
        np.testing.assert_array_equal(after[name], before[name])
    consumed = last_rows(feeds["seq_offsets"], before[out])
    assert row_error(after[out], consumed.astype(np.float64)).error <= SAME_FP32
    assert row_error(after["user_embeddings"], before["user_embeddings"].astype(np.float64)).error <= SAME_FP32
    empty = np.diff(feeds["seq_offsets"]) == 0
    assert (after[out][empty] == 0).all()
    assert (after["user_embeddings"][empty] == 0).all()
    assert np.abs(after["user_embeddings"][~empty]).sum(axis=1).all()


def eager_outputs(model: Any, feeds: dict[str, Array]) -> Array:
    with torch.no_grad():
        return np.asarray(model(**{name: torch.from_numpy(array) for name, array in feeds.items()}).double())


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        *(pytest.param(kind, "fp32", marks=_slow(kind)) for kind in RETRIEVAL),
        ("affine norms and every bias", "fp16"),
        pytest.param("genrec", "fp16", marks=pytest.mark.slow),
        ("affine norms and every bias", "bf16"),
    ],
)
def test_the_pruned_graph_equals_the_float64_model(kind: str, precision: Precision) -> None:
    _, model = full_and_pruned(kind, precision)
    widened = onnx.ModelProto()
    widened.CopyFrom(model)
    WidenBf16().call(widened)  # ONNX Runtime's CPU has no bfloat16 products; the roundings stay
    config = RETRIEVAL[kind]
    feeds = feeds_of(BATCHES["empty sequences and one of length 1"], rated=config.has_ratings)
    low = small_model(config, precision)
    exact = eager_outputs(small_model(config, precision).double(), feeds)
    bound = error_bound(row_error(eager_outputs(low, feeds), exact).error, precision)
    assert bound < 0.1
    assert row_error(run_onnx(widened, feeds)["user_embeddings"], exact).error <= bound


def test_an_empty_sequence_stays_zero_although_the_layer_moves_a_zero_row() -> None:
    _, model = full_and_pruned("affine norms and every bias")
    feeds = feeds_of((0, 5))
    outputs = run_onnx(model, feeds, ("prune_last_layer/unmasked", "layer_2"))
    assert np.isfinite(outputs["prune_last_layer/unmasked"]).all()
    assert np.abs(outputs["prune_last_layer/unmasked"][0]).min() > 0
    assert (outputs["layer_2"][0] == 0).all()
    assert (outputs["user_embeddings"][0] == 0).all()


def test_best_items_stay_the_same() -> None:
    full, pruned = full_and_pruned("one layer")
    feeds = feeds_of((0, 9, 20))
    before, after = run_onnx(full, feeds), run_onnx(pruned, feeds)
    np.testing.assert_array_equal(after["top_items"], before["top_items"])


def test_the_last_attention_has_one_query_per_sequence_and_all_keys() -> None:
    _, model = full_and_pruned("ratings and concat_ua, window, attention_dim is not linear_dim")
    *others, last = attention_nodes(model)
    assert [node_attributes(node)["max_query_len"] for node in others] == [20]
    assert node_attributes(last)["max_query_len"] == 1
    assert node_attributes(last)["max_seq_len"] == 20
    assert last.input[4] == "seq_offsets"
    feeds = feeds_of((3, 0, 9), rated=True)
    outputs = run_onnx(model, feeds, tuple(last.input[place] for place in (0, 1, 2, 3, 5)))
    assert [outputs[last.input[place]].shape for place in (0, 1, 2)] == [(3, 2, 12), (12, 2, 12), (12, 2, 20)]
    np.testing.assert_array_equal(outputs[last.input[3]], [0, 1, 2, 3])
    assert outputs[last.input[3]].dtype == np.int32
    # The time after each sequence's last event is the request's; an empty sequence has none.
    np.testing.assert_array_equal(outputs[last.input[5]], feeds["request_timestamps"] * [1, 0, 1])


def test_every_value_has_the_shape_that_its_info_says() -> None:
    _, model = full_and_pruned("affine norms and every bias", "fp16")
    feeds, sizes = feeds_of((3, 0, 9)), {"L": 12, "B": 3, "B_plus_1": 4}
    names = [name for node in model.graph.node for name in node.output]
    infos = {info.name: info.type.tensor_type for info in (*model.graph.value_info, *model.graph.output)}
    assert set(names) <= set(infos)
    values = run_onnx(model, feeds, tuple(infos))
    named = 0
    for name in names:
        assert helper.np_dtype_to_tensor_dtype(values[name].dtype) == infos[name].elem_type, name
        dims = infos[name].shape.dim
        assert len(dims) == values[name].ndim, name
        for dim, size in zip(dims, values[name].shape, strict=True):
            if dim.dim_value or dim.dim_param in sizes:
                assert size == (dim.dim_value or sizes[dim.dim_param]), name
                named += 1
    assert named > 100


def test_the_packed_weights_are_divided_and_the_old_ones_removed() -> None:
    full, pruned = full_and_pruned("affine norms and every bias")
    before = {tensor.name: numpy_helper.to_array(tensor) for tensor in full.graph.initializer}
    after = {tensor.name: numpy_helper.to_array(tensor) for tensor in pruned.graph.initializer}
    for name in ("model.layers.1.uvqk_weight", "model.layers.1.uvqk_bias"):
        assert name not in after
        u, v, q, k = np.split(before[name], [50, 100, 150], axis=-1)
        np.testing.assert_array_equal(after[f"{name}/uq"], np.concatenate([u, q], axis=-1))
        np.testing.assert_array_equal(after[f"{name}/vk"], np.concatenate([v, k], axis=-1))
        np.testing.assert_array_equal(after[name.replace("1", "0")], before[name.replace("1", "0")])
    read = {name for node in pruned.graph.node for name in node.input}
    assert set(after) <= read


@pytest.mark.parametrize("kind", ["research", "one layer"])
def test_a_second_run_changes_nothing(kind: str) -> None:
    num_layers = RETRIEVAL[kind].num_layers
    step = PruneLastLayer(num_layers, RowSelection())
    model = unpruned_prefix(_exported(kind, "fp32"), num_layers)
    assert step.call(model).modified
    before = model.SerializeToString(deterministic=True)
    step.requires(model)
    result = step.call(model)
    step.ensures(model, result)
    assert result.counts == {"attention": 0, "projections": 0}
    assert model.SerializeToString(deterministic=True) == before


PACKED_DLRM = 2 * 4 * (8 + 16)
CANDIDATES = {
    "several": ((5, 0, 9, 3, 1), (3, 4, 0, 1, 2)),
    "no candidates at all": ((4, 2), (0, 0)),
    "one sequence": ((2,), (7,)),
    "sequences without any row": ((0, 4, 0), (0, 2, 0)),
}
SELECTION = RowSelection(max_query_len=8, offsets="candidate_offsets")


@functools.cache
def _candidates(kind: str, precision: Precision, num_layers: int, bare: bool) -> OnnxGraph:
    return exported_candidates(
        candidate_model(ranking_layer(kind), precision, num_layers, bare=bare), precision, num_layers
    )


@pytest.mark.parametrize(
    ("kind", "num_layers", "bare"),
    [("research", 2, False), pytest.param("dlrm", 1, False, marks=pytest.mark.slow), ("dlrm", 2, True)],
)
def test_candidate_rows_are_those_of_the_full_layer(kind: str, num_layers: int, bare: bool) -> None:
    graph = _candidates(kind, "fp32", num_layers, bare)
    full = rewritten(graph, num_layers).model
    pruned = rewritten(graph, num_layers, PruneLastLayer(num_layers, SELECTION)).model
    assert attention_nodes(pruned)[-1].input[3] == "candidate_offsets"
    assert node_attributes(attention_nodes(pruned)[-1])["max_query_len"] == 8
    for histories, candidates in CANDIDATES.values():
        feeds = candidate_feeds(histories, candidates, "fp32")
        before, after = run_onnx(full, feeds), run_onnx(pruned, feeds, (f"{TAP_PREFIX}{num_layers}",))
        assert before["answers"].shape == (sum(candidates), 32 if bare else 2)
        assert row_error(after["answers"], before["answers"].astype(np.float64)).error <= SAME_FP32
        assert after[f"{TAP_PREFIX}{num_layers}"].shape == (sum(candidates), 32)


@pytest.mark.parametrize("kind", [pytest.param("research", marks=pytest.mark.slow), "dlrm"])
def test_candidate_rows_in_half_precision_equal_the_float64_model(kind: str) -> None:
    pruned = rewritten(_candidates(kind, "fp16", 2, True), 2, PruneLastLayer(2, SELECTION)).model
    feeds = candidate_feeds(*CANDIDATES["several"], "fp16")
    tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
    layer = ranking_layer(kind)
    eager = np.asarray(candidate_model(layer, "fp16", bare=True)(*tensors.values())[0].double())
    exact_model = candidate_model(layer, "fp16", bare=True).double()
    tensors["x"] = tensors["x"].double()
    exact = np.asarray(exact_model(*tensors.values())[0])
    bound = error_bound(row_error(eager, exact).error, "fp16")
    assert bound < 0.1
    assert row_error(run_onnx(pruned, feeds)["answers"], exact).error <= bound


def test_a_layer_whose_queries_are_the_candidates_already_is_left_alone() -> None:
    model = unpruned_prefix(_candidates("dlrm", "fp32", 2, True), 2)
    for node in attention_nodes(model):
        node.input[3] = "candidate_offsets"
    step = PruneLastLayer(2, SELECTION)
    result = step.call(model)
    step.ensures(model, result)
    assert not result.modified


def test_a_bias_too_large_for_the_exporter_to_fold_is_divided_too() -> None:
    graph = _candidates("dlrm", "fp16", 2, True)
    model = unpruned_prefix(graph, 2)
    biases = {tensor.name: tensor for tensor in model.graph.initializer if list(tensor.dims) == [PACKED_DLRM]}
    name = [name for node in model.graph.node for name in node.input if name in biases][-1]
    half = numpy_helper.to_array(biases[name]).astype(np.float16)
    biases[name].CopyFrom(numpy_helper.from_array(half, "half_bias"))
    model.graph.node.insert(0, helper.make_node("Cast", ["half_bias"], [name], name="cast", to=TensorProto.FLOAT))
    model.graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [PACKED_DLRM]))
    edited = dataclasses.replace(graph, model=model)
    *_, full = apply_passes(edited, passes(2)[3:])
    *_, pruned = apply_passes(edited, (PruneLastLayer(2, SELECTION), *passes(2)[3:]))
    feeds = candidate_feeds(*CANDIDATES["several"], "fp16")
    before, after = run_onnx(full.model, feeds)["answers"], run_onnx(pruned.model, feeds)["answers"]
    assert row_error(after, before.astype(np.float64)).error <= EAGER_FLOOR["fp16"]
    left = {tensor.name for tensor in pruned.model.graph.initializer}
    left |= {name for node in pruned.model.graph.node for name in (node.name, *node.input)}
    assert not left & {name, "half_bias", "cast"}
    assert {f"{name}/uq", f"{name}/vk"} <= left


def test_rows_behind_the_last_sequence_change_nothing() -> None:
    full, pruned = full_and_pruned()
    feeds = feeds_of((4, 0, 9, 6)) | {"seq_offsets": np.array([0, 4, 4, 13], np.int32)}
    feeds["request_timestamps"] = feeds["request_timestamps"][:3]
    before, after = run_onnx(full, feeds)["user_embeddings"], run_onnx(pruned, feeds)["user_embeddings"]
    assert row_error(after, before.astype(np.float64)).error <= SAME_FP32


def check_edited_graph(change: Any) -> onnx.ModelProto:
    """Prune a research graph after an edit that keeps its meaning; the answers must stay too."""
    graph = _exported("research", "fp32")
    model = unpruned_prefix(graph, 2)
    change(model)
    steps = (PruneLastLayer(2, RowSelection()), *passes(2)[3:])
    *_, pruned = apply_passes(dataclasses.replace(graph, model=model), steps)
    feeds = feeds_of((0, 6, 0, 2))
    before = run_onnx(full_and_pruned()[0], feeds)["user_embeddings"]
    after = run_onnx(pruned.model, feeds)["user_embeddings"]
    assert row_error(after, before.astype(np.float64)).error <= SAME_FP32
    return pruned.model


def test_the_number_of_rows_is_read_in_front_of_the_layer() -> None:
    def count_rows_of_the_result(model: onnx.ModelProto) -> None:
        count = helper.make_node("Shape", ["layer_2"], ["count"], name="count", start=0, end=1)
        place = list(model.graph.node).index(node_writing(model, "layer_2")) + 1
        where = next(node for node in model.graph.node[place:] if node.op_type == "Where")
        where.input[2] = "count"
        model.graph.node.insert(place, count)
        model.graph.value_info.append(helper.make_tensor_value_info("count", TensorProto.INT64, [1]))

    assert node_writing(check_edited_graph(count_rows_of_the_result), "count").input[0] == "layer_1"


def test_an_int32_index_is_compared_with_the_number_of_rows_too() -> None:
    def narrow_the_index(model: onnx.ModelProto) -> None:
        gather = last_gather(model)
        cast = helper.make_node("Cast", [gather.input[1]], ["narrow"], name="narrow", to=TensorProto.INT32)
        model.graph.node.insert(list(model.graph.node).index(gather), cast)
        gather.input[1] = "narrow"
        model.graph.value_info.append(helper.make_tensor_value_info("narrow", TensorProto.INT32, ["B"]))

    assert node_writing(check_edited_graph(narrow_the_index), "layer_1/consumed").input[1] == "narrow"


def test_timestamps_that_are_made_inside_the_layer_are_made_in_front_of_it() -> None:
    def copy_the_timestamps_late(model: onnx.ModelProto) -> None:
        attention = attention_nodes(model)[-1]
        late = helper.make_node("Identity", [attention.input[5]], ["late"], name="late")
        model.graph.node.insert(list(model.graph.node).index(attention), late)
        attention_nodes(model)[-1].input[5] = "late"
        model.graph.value_info.append(helper.make_tensor_value_info("late", TensorProto.INT64, ["L"]))

    names = [node.name for node in check_edited_graph(copy_the_timestamps_late).graph.node]
    assert names.index("late") < names.index("layer_1/consumed")


def node_writing(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if name in node.output)


def last_gather(model: onnx.ModelProto) -> onnx.NodeProto:
    """That of the consumed rows, from all of them and one of zeros."""
    rows = next(node for node in model.graph.node if node.op_type == "Concat" and "layer_2" in node.input)
    return next(node for node in model.graph.node if node.op_type == "Gather" and node.input[0] == rows.output[0])


def last_split(model: onnx.ModelProto) -> onnx.NodeProto:
    return [node for node in model.graph.node if node.op_type == "Split"][-1]


def keep_the_tap_as_output(model: onnx.ModelProto) -> None:
    model.graph.output.append(next(info for info in model.graph.value_info if info.name == "layer_2"))


def lose_the_tap(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                names[place] = "renamed" if name == "layer_2" else name


def read_every_row(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("ReduceSum", ["layer_2"], ["total"], name="reads_all"))


def append_a_row_of_ones(model: onnx.ModelProto) -> None:
    maker = next(node for node in model.graph.node if node.op_type == "ConstantOfShape")
    maker.attribute.append(helper.make_attribute("value", numpy_helper.from_array(np.ones(1, np.float32))))


def read_a_gate_elsewhere(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Abs", [last_split(model).output[0]], ["gate"], name="reads_u"))


def read_the_projection_elsewhere(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Abs", [last_split(model).input[0]], ["packed"], name="reads_packed"))


def norm_over_the_rows(model: onnx.ModelProto) -> None:
    node = [node for node in model.graph.node if node.op_type == "LayerNormalization"][-1]
    next(a for a in node.attribute if a.name == "axis").i = 0


def add_another_activation(model: onnx.ModelProto) -> None:
    node = node_writing(model, "layer_2")
    node.input[list(node.input).index("layer_1")] = "layer_0"


def softmax_in_the_gate(model: onnx.ModelProto) -> None:
    node = [node for node in model.graph.node if node.op_type == "Sigmoid"][-1]
    node.op_type = "Softmax"


def share_queries_and_keys(model: onnx.ModelProto) -> None:
    split = last_split(model)
    keys = next(node for node in model.graph.node if node.input and node.input[0] == split.output[3])
    keys.input[0] = split.output[2]


def give_queries_their_own_offsets(model: onnx.ModelProto) -> None:
    attention_nodes(model)[-1].input[3] = "other_offsets"


def index_from_the_layer(model: onnx.ModelProto) -> None:
    gather = last_gather(model)
    place = list(model.graph.node).index(gather)
    values = last_split(model).output[1]
    model.graph.node.insert(place, helper.make_node("Cast", [values], ["index"], name="index", to=TensorProto.INT64))
    gather.input[1] = "index"


REFUSALS = {
    "layer_2 is a graph output": keep_the_tap_as_output,
    "no node computes layer_2": lose_the_tap,
    "it is read by .*ReduceSum reads_all": read_every_row,
    "must append one zero row to layer_2": append_a_row_of_ones,
    "is also read by reads_u": read_a_gate_elsewhere,
    "is also read by reads_packed": read_the_projection_elsewhere,
    "it norms over the rows": norm_over_the_rows,
    "layer_0 is neither constant nor of this layer": add_another_activation,
    "Softmax .* mixes the columns": softmax_in_the_gate,
    "part 2 of .* is read by queries and keys": share_queries_and_keys,
    "has queries with offsets other_offsets of their own": give_queries_their_own_offsets,
    "the index of .* depend on the last layer": index_from_the_layer,
}


@pytest.mark.parametrize(("why", "change"), REFUSALS.items(), ids=[f.__name__ for f in REFUSALS.values()])
def test_another_form_is_refused_and_left_as_it_was(why: str, change: Any) -> None:
    model = unpruned_prefix(_exported("research", "fp32"), 2)
    change(model)
    before = model.SerializeToString(deterministic=True)
    with pytest.raises(RewriteError, match=why) as caught:
        PruneLastLayer(2, RowSelection()).call(model)
    assert caught.value.code == "HSTU-E301"
    assert "prune_last_layer changed 0 of 1 attention" in caught.value.what
    assert model.SerializeToString(deterministic=True) == before


def test_fewer_attention_nodes_than_layers_are_refused() -> None:
    with pytest.raises(RewriteError, match="prune_last_layer changed 2 of 3 attention") as caught:
        PruneLastLayer(3, RowSelection()).requires(_exported("research", "fp32").model)
    assert caught.value.code == "HSTU-E301"


def test_offsets_that_are_no_graph_input_are_refused_with_the_inputs() -> None:
    with pytest.raises(RewriteError, match="candidate_offsets are no graph input; inputs: item_ids, timestamps"):
        PruneLastLayer(2, SELECTION).requires(_exported("research", "fp32").model)


def test_more_queries_than_the_layer_has_rows_are_refused() -> None:
    model = unpruned_prefix(_candidates("dlrm", "fp32", 2, True), 2)
    with pytest.raises(RewriteError, match="max_query_len 21 of the selection exceeds that of the layer, 20"):
        PruneLastLayer(2, RowSelection(21, "candidate_offsets")).call(model)


@pytest.mark.parametrize(
    ("values", "why"), [({"max_query_len": 0, "offsets": "o"}, "at least 1"), ({"max_query_len": 2}, "without offsets")]
)
def test_a_selection_that_cannot_be_is_refused(values: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        RowSelection(**values)


@pytest.mark.parametrize("native", [True, False])
def test_tensorrt8_is_kept_from_a_graph_that_crashes_its_builder(native: bool) -> None:
    _, model = full_and_pruned("affine norms and every bias")
    with pytest.raises(RewriteError, match="one row per sequence, which crashes the builder") as caught:
        lowered_for_tensorrt8(model, "fp32", native=native)
    assert caught.value.code == "HSTU-E302"
    assert "--no-prune" in caught.value.fix


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tensorrt8_takes_a_pruned_graph_of_candidates(precision: Precision) -> None:
    model = unpruned_prefix(_candidates("dlrm", precision, 2, True), 2)
    assert PruneLastLayer(2, SELECTION).call(model).modified
    lowered, _ = lowered_for_tensorrt8(model, precision, native=False)
    lengths = [node_attributes(node)["max_query_len"] for node in attention_nodes(lowered)]
    assert lengths == [20, SELECTION.max_query_len]
    assert attention_nodes(lowered)[-1].input[3] == SELECTION.offsets


def test_both_halves_of_the_projection_become_convolutions() -> None:
    _, model = full_and_pruned("affine norms and every bias")
    feeds = feeds_of((0, 7, 20, 1))
    before = run_onnx(model, feeds)["user_embeddings"]
    assert ProjectByConvolution().call(model).counts == {
        "projections": 2 * 2 + 2,
        "biases": 5,
        "sums": 2,
    }  # and the items' scores
    assert "MatMul" not in {node.op_type for node in model.graph.node}
    after = run_onnx(model, feeds)["user_embeddings"]
    assert row_error(after, before.astype(np.float64)).error <= 2 * SAME_FP32


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_tensorrt_rtx_builds_the_pruned_retrieval_graph(precision: Precision) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    # Research weights without affine norms and biases differ in what is left out.
    _, model = full_and_pruned("affine norms and every bias", precision)
    profiles = retrieval_profile(ProfileSizes(4, 20))
    assert len(engine_from_onnx(model, backend="tensorrt-rtx", profiles=profiles).plan) > 100_000


@pytest.mark.parametrize("kind", ["research", "dlrm"])
def test_tensorrt_rtx_builds_the_pruned_candidate_graph(kind: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    model = rewritten(_candidates(kind, "fp16", 2, True), 2, PruneLastLayer(2, SELECTION)).model

    def shapes(batch: int, rows: int, candidates: int) -> dict[str, tuple[int, ...]]:
        sizes = {"x": (rows, 32), "timestamps": (rows,), "candidate_ids": (candidates,)}
        given = {**sizes, "seq_offsets": (batch + 1,), "candidate_offsets": (batch + 1,)}
        return {value.name: given[value.name] for value in model.graph.input}

    profiles = [Profile("p", shapes(1, 1, 1), shapes(2, 20, 8), shapes(4, 80, 32))]
    assert len(engine_from_onnx(model, backend="tensorrt-rtx", profiles=profiles).plan) > 50_000
