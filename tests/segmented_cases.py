"""Every served graph of small models, cut at its attentions, and requests to it."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from hstu_compile.artifacts import OnnxGraph, Precision, SegmentedGraph
from hstu_compile.calibration.append_batches import append_arrays
from hstu_compile.calibration.batches import retrieval_batches
from hstu_compile.calibration.ranking_batches import prefill_arrays, ranking_batches, score_arrays
from hstu_compile.graph_facts import tensor_specs
from hstu_compile.model.families import HstuModel
from hstu_compile.model.retrieval import RetrievalModel
from hstu_compile.rewrite import RowSelection, apply_passes, export_passes
from hstu_compile.rewrite.cut_at_attention import segmented_from_onnx
from hstu_compile.rewrite.norm_body import ELEMENT_TYPES
from hstu_compile.runtime.onnxruntime_session import OnnxRuntimeSession
from hstu_compile.served import ServedGraph
from tests.dlrm_reference import DlrmForm
from tests.exported_models import (
    MAX_APPEND,
    MICRO_BATCH,
    TOP_K,
    small_config,
    traced_ranking,
    traced_retrieval,
)
from tests.oracle import Array

MAX_BATCH = 4
_MAX_SCORES = 1 << 20

# Several contextual features, an item tower with a table of its own, two tasks, a fixed divisor.
WIDE_FORM = DlrmForm(
    contextual=(("user_id", 1, 0), ("genres", 3, 0)),
    additional=("movie_category",),
    item_only=("item_shop",),
    action_weights=(),
    tasks=(("like", 0), ("minutes", 1)),
    scaling_seq_len=57.0,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One graph as it ships, the same cut, and requests.

    Attributes:
        served: its description.
        whole: in one piece, with native bodies.
        cut: in segments.
        feeds: requests, empty histories and the longest among them.
    """

    served: ServedGraph
    whole: OnnxGraph
    cut: SegmentedGraph
    feeds: list[dict[str, Array]]


def rounding_what_kernels_make(case: Case) -> onnx.ModelProto:
    """The graph in one piece as a runtime computes it that stores what kernels make in its own type.

    Where a norm ends in a Cast to float16 and its reader is a product, which ONNX Runtime computes in float32 on a CPU,
    ONNX Runtime hands the product the numbers from before the Cast. A Reshape in between keeps it from that. What the
    norms at the end of towers make, which is float32 in the graph, is rounded to the type that they store.
    """
    model = onnx.ModelProto()
    model.CopyFrom(case.whole.model)
    graph, calls = model.graph, {call.output: call for call in case.cut.calls if call.operator == "HstuNorm"}
    graph.initializer.append(numpy_helper.from_array(np.array([0, -1], np.int64), "as it is"))
    for place, node in reversed(list(enumerate(graph.node))):
        made = node.output[0]
        if made in calls:
            node.output[0] = f"{made}/computed"
            graph.node.insert(place + 1, helper.make_node("Reshape", [node.output[0], "as it is"], [made]))
        elif (call := calls.get(f"{made}/stored")) is not None:
            node.output[0] = f"{made}/computed"
            half = ELEMENT_TYPES[call.attributes["output_type"]]
            rounding = [
                helper.make_node("Cast", [node.output[0]], [f"{made}/half"], to=half),
                helper.make_node("Reshape", [f"{made}/half", "as it is"], [f"{made}/stored"]),
                helper.make_node("Cast", [f"{made}/stored"], [made], to=TensorProto.FLOAT),
            ]
            for each in reversed(rounding):
                graph.node.insert(place + 1, each)
    return model


def _selection(served: ServedGraph) -> RowSelection | None:
    if served.consumed == "all":
        return None
    return RowSelection() if served.max_candidates == 0 else RowSelection(served.max_candidates, "candidate_offsets")


def _shipped(
    served: ServedGraph, traced: OnnxGraph, *, prune: bool, fuse_norms: bool, tabulate: bool = False
) -> OnnxGraph:
    passes = export_passes(
        served.num_attention,
        served.taps,
        _selection(served) if prune else None,
        fuse_norms=fuse_norms,
        tabulate=evaluated if tabulate else None,
    )
    *_, last = apply_passes(traced, passes)
    # As the pipeline does: taps are no outputs any more.
    return dataclasses.replace(
        last, inputs=tensor_specs(last.model.graph.input), outputs=tensor_specs(last.model.graph.output)
    )


def _rows(graph: OnnxGraph, rows: int) -> dict[str, Array]:
    """Keys and values of a cache, which bfloat16 holds exactly where the graph does."""
    rng = np.random.default_rng(0)
    found = {}
    for spec in graph.inputs:
        if spec.name.startswith(("k_", "v_")):
            values = rng.standard_normal((rows, *spec.shape[1:])).astype(np.float32)
            found[spec.name] = (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
            if spec.dtype == "float16":
                found[spec.name] = found[spec.name].astype(np.float16)
    return found


def _feeds(model: HstuModel, served: ServedGraph, graph: OnnxGraph) -> list[dict[str, Array]]:
    if isinstance(model, RetrievalModel):
        batches = [each.arrays for each in retrieval_batches(model.config, MAX_BATCH, 2, _MAX_SCORES, 0, None)]
        if served.name != "append":
            return batches
        return [
            append_arrays(model.config, batch, _rows(graph, len(batch["item_ids"])), MAX_APPEND, TOP_K)
            for batch in batches
        ]
    batches = [each.arrays for each in ranking_batches(model.config, MAX_BATCH, 2, _MAX_SCORES, 0)]
    if served.name == "packed":
        return batches
    if served.name == "prefill":
        return [prefill_arrays(model.config, batch) for batch in batches]
    found = []
    for batch in batches:
        offsets = batch["seq_offsets"]
        rows = int(offsets[-1]) + model.config.contextual_len * (len(offsets) - 1)
        found.append(score_arrays(model.config, batch, _rows(graph, rows), MICRO_BATCH))
    return found


def evaluated(model: onnx.ModelProto) -> Array:
    """The output of a graph without inputs."""
    with OnnxRuntimeSession(model) as session:
        (result,) = session.run({}).values()
    return result


@functools.cache
def retrieval_case(name: str, precision: Precision, *, prune: bool = True, fuse_norms: bool = True) -> Case:
    """A graph of a retrieval model of two layers with position and time bias."""
    return _case(*traced_retrieval(small_config(), precision, name), prune=prune, fuse_norms=fuse_norms)


@functools.cache
def ranking_case(
    name: str, precision: Precision, *, prune: bool = True, fuse_norms: bool = True, tabulate: bool = False
) -> Case:
    """A graph of a ranking model of two layers."""
    traced = traced_ranking(WIDE_FORM, precision, name)
    return _case(*traced, prune=prune, fuse_norms=fuse_norms, tabulate=tabulate)


def _case(
    model: HstuModel, served: ServedGraph, traced: OnnxGraph, *, prune: bool, fuse_norms: bool, tabulate: bool = False
) -> Case:
    whole = _shipped(served, traced, prune=prune, fuse_norms=fuse_norms, tabulate=tabulate)
    return Case(served, whole, segmented_from_onnx(whole), _feeds(model, served, whole))
