"""The config.pbtxt of a graph's engine in Triton's TensorRT backend: ragged batching. Level 5; no torch.

What the backend does with a batch of n requests, one user each, and what the graph makes of it:

1. An input with allow_ragged_batch is one axis in the engine: the requests' values, one after the other.
2. A batch_input of the kind BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO is the offsets [n + 1] of such an input. It
   counts requests, so a request with two users would have one row of offsets for both: a client sends one.
3. An input with one value per user is no ragged one: `dims: [1]` with `reshape: {shape: []}` is [n] in the engine, and
   the server refuses requests with another number of values. A fixed number k > 1 per user has to be ragged ([n * k] in
   the engine), and nobody refuses another number there.
4. An output with a row per candidate is scattered by an input with a value per candidate; one with a row per user is
   split by itself.
5. A CUDA graph that was recorded for a larger batch and more values gets what there is, offsets filled up with their
   last entry, and behind the values whatever an earlier batch left. Users without events at the end and values that
   belong to nobody change no bit of anybody's answer.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import onnx

from hstu_compile.artifacts import TensorSpec
from hstu_compile.bundle import BundleFiles
from hstu_compile.errors import BundleError
from hstu_compile.graph_facts import tensor_specs
from hstu_compile.graph_limits import GraphLimits
from hstu_compile.profiles import ProfileSizes
from hstu_compile.serving.pbtxt import Field, Message, Word
from hstu_compile.serving.settings import Scheduling
from hstu_compile.serving.tensors import (
    ClientTensor,
    GraphTensors,
    graph_tensors,
    longest_history,
    most_users,
    refuse_if_any,
)

PLAN_FILE = "model.plan"
_OFFSETS_KIND = Word("BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO")
#: Sizes of graphs, as shares of the most values that a batch may hold. Each graph holds the arguments of its kernels.
_FILLED_PERCENT = (25, 50, 100)


def max_batch(files: BundleFiles) -> int:
    """Most requests of one batch: one for a model whose answer depends on who is asked about beside it.

    With `scaling_seq_len: batch` attention is divided by the longest history of the batch. A session makes each request
    a batch of its own; so does this.
    """
    if files.ranking is not None and files.ranking.scaling == "batch":
        return 1
    return most_users(files)


def tensorrt_config(name: str, files: BundleFiles, scheduling: Scheduling, warmup: Sequence[Message]) -> Message:
    """The configuration.

    Args:
        name: of the model in the repository.
        files: the bundle.
        scheduling: batching, instances and CUDA graphs.
        warmup: requests that run before the model is ready.

    Raises:
        BundleError: HSTU-E804 for a graph whose inputs cannot be joined by Triton, or are not those of the manifest.
    """
    tensors = graph_tensors(files)
    check_ragged(tensors)
    check_real_inputs(files)
    most = max_batch(files)
    per_candidate = [each for each in tensors.outputs if each.kind != "values"]
    message: dict[str, Field] = {
        "name": name,
        "backend": "tensorrt",
        "max_batch_size": most,
        "default_model_filename": PLAN_FILE,
        "input": [_input(each) for each in tensors.inputs],
        "output": [
            {"name": each.name, "data_type": Word(f"TYPE_{each.datatype}"), "dims": list(each.dims)}
            for each in tensors.outputs
        ],
        "batch_input": [
            {
                "kind": _OFFSETS_KIND,
                "target_name": [each.name],
                "data_type": Word("TYPE_INT32"),
                "source_input": [each.source],
            }
            for each in tensors.offsets
        ],
        "batch_output": [
            {
                "target_name": [each.name],
                "kind": Word("BATCH_SCATTER_WITH_INPUT_SHAPE"),
                "source_input": [_first(tensors.inputs, each.kind).name],
            }
            for each in per_candidate
        ],
        "instance_group": [
            {
                "count": scheduling.instances,
                "kind": Word("KIND_GPU"),
                # An engine has one profile or several; the server takes the one whose typical shapes are nearest.
                "profile": [str(index) for index in range(max(1, len(_profiles(files))))],
            }
        ],
        "dynamic_batching": scheduling.dynamic_batching(),
        "model_warmup": list(warmup),
    }
    if scheduling.cuda_graphs:
        message["optimization"] = {
            "cuda": {
                "graphs": True,
                "busy_wait_events": True,
                "graph_spec": graph_specs(tensors, profile_sizes(files, most), most),
            }
        }
    return message


def _input(tensor: ClientTensor) -> Message:
    field: dict[str, Field] = {"name": tensor.name, "data_type": Word(f"TYPE_{tensor.datatype}")}
    if _is_ragged(tensor):
        return {**field, "dims": [-1], "allow_ragged_batch": True}
    return {**field, "dims": [1], "reshape": {}}


def _is_ragged(tensor: ClientTensor) -> bool:
    return tensor.count != 1


def _first(inputs: Sequence[ClientTensor], kind: str) -> ClientTensor:
    return next(each for each in inputs if each.kind == kind)


def check_ragged(tensors: GraphTensors) -> None:
    """Refuse inputs that Triton cannot join, and outputs that it cannot split.

    Raises:
        BundleError: HSTU-E804.
    """
    problems = [
        f"{each.name} has rows of {each.width} numbers: Triton joins ragged inputs value by value, and counts values "
        "where the offsets need rows (build the model with --embeddings inside)"
        for each in tensors.inputs
        if each.width
    ]
    known = {each.kind for each in tensors.inputs}
    problems += [
        f"{each.name} has a row per {each.kind.rstrip('s')}, and no input has one whose shape could split it"
        for each in tensors.outputs
        if each.kind not in known
    ]
    if not tensors.offsets:
        problems.append("it has no offsets, by which requests of different lengths could be told apart")
    refuse_if_any(problems, "Triton's TensorRT backend")


def check_real_inputs(files: BundleFiles) -> None:
    """Compare what the configuration is made from, the manifest, with the graph itself.

    Raises:
        BundleError: HSTU-E804, naming every input or output that differs.
    """
    graph = onnx.load(str(files.path / "model.onnx"), load_external_data=False).graph
    problems = [
        *_differences("input", files.inputs, tensor_specs(graph.input)),
        *_differences("output", files.outputs, tensor_specs(graph.output)),
    ]
    if problems:
        raise BundleError(
            "HSTU-E804",
            f"{files.path / 'model.onnx'} is not what the manifest says",
            "; ".join(problems),
            "build the bundle again",
            {"problems": problems},
        )


def _differences(what: str, stated: Sequence[TensorSpec], real: Sequence[TensorSpec]) -> list[str]:
    def by_name(specs: Sequence[TensorSpec]) -> Mapping[str, str]:
        return {each.name: f"{each.dtype} {list(each.shape)}" for each in specs}

    ours, theirs = by_name(stated), by_name(real)
    return [
        f"{what} {name} is {theirs.get(name, 'absent')} in the graph and {ours.get(name, 'absent')} in the manifest"
        for name in sorted({*ours, *theirs})
        if ours.get(name) != theirs.get(name)
    ]


def _profiles(files: BundleFiles) -> Sequence[Any]:
    profiles: Sequence[Any] = files.manifest.get("profiles") or ()
    return profiles


def profile_sizes(files: BundleFiles, most: int) -> ProfileSizes:
    """The numbers behind the engine's profile, for batches of at most so many users."""
    ranking = files.ranking
    graph = "retrieval" if ranking is None else "packed"
    candidates = 0 if ranking is None else ranking.max_candidates
    return GraphLimits(graph, longest_history(files), candidates).sizes(most, None, None, None)


def graph_specs(tensors: GraphTensors, sizes: ProfileSizes, most: int) -> list[Message]:
    """Shapes to record CUDA graphs for.

    Batches by powers of two, and for each of them shares of the most events and candidates that it may hold. A graph
    serves every batch that has more users than the graphs before it and no more of anything than it has itself; the
    server takes the smallest, so a batch runs as one of at most twice as many users and, unless its users have
    many events and few candidates or the reverse, at most twice as many values beyond a quarter of the most.
    """
    specs: list[Message] = []
    batches = sorted({*itertools.takewhile(lambda size: size < most, (1 << i for i in range(31))), most})
    for fewer, batch in zip([0, *batches], batches, strict=False):
        totals = []
        for percent in _FILLED_PERCENT:
            total = {
                "events": max(1, batch * sizes.max_seq_len * percent // 100),
                "candidates": max(1, batch * (sizes.max_candidates // most) * percent // 100),
            }
            if total not in totals:
                totals.append(total)
        lower: Message = {"batch_size": fewer + 1, "input": _shapes(tensors, fewer + 1, {"events": 0, "candidates": 0})}
        specs += [
            {"batch_size": batch, "input": _shapes(tensors, batch, total), "graph_lower_bound": lower}
            for total in totals
        ]
    return specs


def _shapes(tensors: GraphTensors, batch: int, total: Mapping[str, int]) -> list[Message]:
    """Every engine input's shape; the batch axis of one that is not ragged is left out, as everywhere in a config."""
    shapes: list[tuple[str, list[int]]] = [(each.name, [batch + 1]) for each in tensors.offsets]
    for each in tensors.inputs:
        size = batch * each.count if each.kind == "values" else total[each.kind]
        shapes.append((each.name, [size] if _is_ragged(each) else []))
    return [{"key": name, "value": {"dim": dims}} for name, dims in shapes]
