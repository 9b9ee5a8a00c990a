"""What the stages hand to one another: frozen, and each knows where it came from. Level 2."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from torch import Tensor

    from hstu_compile.model.families import ModelConfig

Precision = Literal["fp32", "fp16", "bf16"]

# Intermediate values layer_0 .. layer_n of every graph are the residual stream before and after each layer.
TAP_PREFIX = "layer_"
# Further intermediate values of graphs with candidates: what the prediction head multiplies.
USER_EMBEDDINGS_TAP = "candidates_user_embeddings"
ITEM_EMBEDDINGS_TAP = "candidates_item_embeddings"


def is_tap(name: str) -> bool:
    """Whether a value is intermediate: shown by a runtime that can, and never served."""
    # An exporter may call a norm's value layer_norm.
    is_layer = name.startswith(TAP_PREFIX) and name.removeprefix(TAP_PREFIX).isdecimal()
    return is_layer or name in (USER_EMBEDDINGS_TAP, ITEM_EMBEDDINGS_TAP)


@dataclasses.dataclass(frozen=True)
class CheckpointSpec:
    """Stage 1: a checkpoint, understood.

    Attributes:
        path: the file or folder.
        sha256: of the file. Of a folder in shards, of a text with one line for each thing that was read, sorted: for
            each chunk of a tensor its key, first element, sizes and the sha256 of its bytes in the shard, for each
            other value its key and that sha256, for the file non_sparse.ckpt its name and sha256. What was not read,
            such as tables that stay outside and the state of an optimizer, is not covered; where nothing was read but
            non_sparse.ckpt, it is that file's.
        dialect: family name.
        config: the model's configuration.
        state_dict: float32 weights under our parameter names.
        ignored_keys: names of the checkpoint's tensors that inference does not need.
    """

    path: Path
    sha256: str
    dialect: str
    config: ModelConfig
    state_dict: dict[str, Tensor] = dataclasses.field(repr=False)
    ignored_keys: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One graph input or output: `shape` mixes sizes and the names of dynamic axes."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclasses.dataclass(frozen=True)
class PassRecord:
    """What one graph pass did: its name, what it counted, and how long it took."""

    name: str
    counts: dict[str, int]
    seconds: float


@dataclasses.dataclass(frozen=True)
class OnnxGraph:
    """Stage 2 and 3: one graph as exported, then as rewritten.

    Attributes:
        name: retrieval, packed, prefill, score or append.
        model: the ONNX model. A stage that changes it works on a copy.
        precision: type of weights and activations.
        inputs: graph inputs in order.
        outputs: graph outputs in order.
        passes: records of the passes that ran.
        folder: where the files are that `model` names for its large tables (`table_files`); None where it names none.
    """

    name: str
    model: onnx.ModelProto = dataclasses.field(repr=False)
    precision: Precision
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    passes: tuple[PassRecord, ...] = ()
    folder: Path | None = None


@dataclasses.dataclass(frozen=True)
class ColumnView:
    """Columns of a tensor that a kernel reads where they lie, in the shape of its input.

    Attributes:
        column: the first, from 0, where a row of the tensor is taken as one list of numbers.
        row_stride: elements from a row to the next: the numbers of the tensor's row.
        dims: of the input behind its rows: (heads, dim) of an attention's q, k and v, (width,) of a norm's x and gate.
    """

    column: int
    row_stride: int
    dims: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """One node that a kernel of ours computes between two segments.

    Attributes:
        operator: name of its contract: HstuAttention or HstuNorm.
        name: of the node.
        attributes: the contract's, defaults included.
        inputs: the contract's name of each input that the node has, in the contract's order, to the tensor's name.
        output: name of the tensor that it makes.
        views: those of the inputs that are columns of their tensor, by the contract's name.
    """

    operator: str
    name: str
    attributes: dict[str, Any]
    inputs: dict[str, str]
    output: str
    views: dict[str, ColumnView] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Step:
    """One entry of the schedule: a segment or a kernel's call, by its index in `SegmentedGraph`."""

    kind: Literal["segment", "kernel"]
    index: int


@dataclasses.dataclass(frozen=True)
class Crossing:
    """A tensor that one step makes and a later one reads, or that leaves the graph.

    Attributes:
        spec: name, type and shape; a dynamic axis is a normalised expression of the graph's axes (`axis_size`).
        first: the step that makes it.
        last: the last step that reads it; an output of the graph is read until the end.
    """

    spec: TensorSpec
    first: int
    last: int


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What runs in which order where a graph is cut at its attentions, and what crosses: all that a runtime needs.

    Attributes:
        inputs: of the graph, in order.
        outputs: of the graph, in order.
        calls: what kernels compute, attentions and norms.
        steps: segments and calls in the order in which they run.
        crossing: tensors that outlive the step that makes them, in the order in which they are made.
        constants: arrays that kernels read; the name of each is in some call's `inputs`.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    calls: tuple[KernelCall, ...]
    steps: tuple[Step, ...]
    crossing: tuple[Crossing, ...]
    constants: dict[str, np.ndarray[Any, Any]] = dataclasses.field(repr=False)

    def spec(self, name: str) -> TensorSpec:
        """Type and shape of an input of the graph, of a crossing tensor or of a constant."""
        if name in self.constants:
            array = self.constants[name]
            return TensorSpec(name, str(array.dtype), array.shape)
        specs = {spec.name: spec for spec in (*self.inputs, *(each.spec for each in self.crossing))}
        return specs[name]

    def input_spec(self, call: KernelCall, name: str) -> TensorSpec:
        """Type and shape of what a kernel reads as its input of this name in the contract."""
        spec = self.spec(call.inputs[name])
        if (view := call.views.get(name)) is None:
            return spec
        return TensorSpec(spec.name, spec.dtype, (spec.shape[0], *view.dims))

    def row_of(self, call: KernelCall) -> tuple[int, ...]:
        """The sizes of a row of what a kernel makes. Raises ValueError if one of them is not fixed."""
        _, *sizes = self.spec(call.output).shape
        row = tuple(size for size in sizes if isinstance(size, int))
        if len(row) != len(sizes):
            raise ValueError(f"{call.name} makes {call.output} with rows {sizes}")
        return row


@dataclasses.dataclass(frozen=True)
class SegmentedGraph(Schedule):
    """Stage 3, where the runtime takes no plugins: a graph cut at every attention.

    Attributes:
        name: of the graph.
        precision: type of weights and activations.
        segments: valid ONNX graphs between the kernels; their inputs are inputs of the graph or crossing tensors.
    """

    name: str
    precision: Precision
    segments: tuple[OnnxGraph, ...]

    def reads(self, step: Step) -> tuple[str, ...]:
        """Names of the tensors that a step reads, constants included."""
        if step.kind == "kernel":
            return tuple(dict.fromkeys(self.calls[step.index].inputs.values()))
        return tuple(spec.name for spec in self.segments[step.index].inputs)

    def writes(self, step: Step) -> tuple[str, ...]:
        """Names of the tensors that a step makes."""
        if step.kind == "kernel":
            return (self.calls[step.index].output,)
        return tuple(spec.name for spec in self.segments[step.index].outputs)


@dataclasses.dataclass(frozen=True)
class Profile:
    """Smallest, typical and largest shape of every graph input, for one optimisation profile."""

    name: str
    min: dict[str, tuple[int, ...]]
    opt: dict[str, tuple[int, ...]]
    max: dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class EngineKernel:
    """A kernel that an engine launches.

    Attributes:
        name: what the backend calls it.
        kind: product, copy (it moves or converts data and computes nothing) or other.
    """

    name: str
    kind: str


@dataclasses.dataclass(frozen=True)
class EngineArtifact:
    """Stage 4: a serialised engine and the facts about it.

    Attributes:
        plan: the serialised engine.
        backend: tensorrt or tensorrt-rtx.
        version: of the library that built it.
        compute_capabilities: GPU architectures it was built for; empty means any the backend supports.
        profiles: optimisation profiles in order.
        layers: counts by kind as the engine inspector shows them, where the backend shows them.
        messages: warnings of the builder.
        seconds: build time.
        kernels: what a pass launches, in order; None where the backend does not tell.
    """

    plan: bytes = dataclasses.field(repr=False)
    backend: str
    version: str
    compute_capabilities: tuple[str, ...]
    profiles: tuple[Profile, ...]
    layers: dict[str, int]
    messages: tuple[str, ...]
    seconds: float
    kernels: tuple[EngineKernel, ...] | None = None


@dataclasses.dataclass(frozen=True)
class FusedEngines:
    """Stage 4, where a graph was cut at its attentions: the engine of every segment, and what joins them.

    Attributes:
        cut: the graph in segments, and their schedule.
        profile: of the whole graph.
        engines: of the segments, in order.
        kernels: library of the kernels between them.
        schedule_file: name of the schedule's file in a bundle.
        engine_files: names of the engines' files there, in order.
    """

    cut: SegmentedGraph
    profile: Profile
    engines: tuple[EngineArtifact, ...]
    kernels: Path
    schedule_file: str
    engine_files: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Feed:
    """One request batch: graph input name to array."""

    name: str
    arrays: dict[str, np.ndarray[Any, Any]] = dataclasses.field(repr=False)

    @property
    def lengths(self) -> np.ndarray[Any, Any]:
        """[B] events of each sequence; candidates in a graph that takes no events."""
        offsets = self.arrays["seq_offsets" if "seq_offsets" in self.arrays else "candidate_offsets"]
        # Not np.diff: `hstu-compile -h` reads this module, and needs no numpy.
        lengths: np.ndarray[Any, Any] = offsets[1:] - offsets[:-1]
        return lengths
