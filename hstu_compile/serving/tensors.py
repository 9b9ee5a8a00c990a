"""What a client of Triton sends and gets, derived from the axes of a graph. Level 5; no torch.

One request is one user: every tensor has a leading axis of 1. Triton joins the requests of a batch and makes the
offsets, so that offsets are no client's business.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Literal

from hstu_compile.artifacts import TensorSpec
from hstu_compile.bundle import BundleFiles
from hstu_compile.errors import BundleError

#: events, candidates: one value per event or candidate of the user. values: a fixed number per user.
Kind = Literal["events", "candidates", "values"]

#: Types of our graphs' inputs and outputs by Triton's name; TYPE_ is in front of it in a config.
DATATYPES = {"int32": "INT32", "int64": "INT64", "float32": "FP32", "float16": "FP16"}
_PER_USER = re.compile(r"B(?:_times_(\d+))?")
_KINDS: dict[str, Kind] = {"L": "events", "T": "candidates"}
_COUNTED_BY: dict[str, Kind] = {"seq_offsets": "events", "candidate_offsets": "candidates"}


@dataclasses.dataclass(frozen=True)
class ClientTensor:
    """An input or output of one request.

    Attributes:
        name: of the graph's input or output.
        dtype: NumPy's name.
        kind: what its first axis, behind that of the batch, counts.
        count: values per user; 0 where the user's events or candidates are counted.
        width: size of a further axis; 0 without one.
    """

    name: str
    dtype: str
    kind: Kind
    count: int = 0
    width: int = 0

    @property
    def datatype(self) -> str:
        """Triton's name of the type."""
        return DATATYPES[self.dtype]

    @property
    def dims(self) -> tuple[int, ...]:
        """Axes behind that of the batch; -1 is of any length."""
        return (self.count or -1, *((self.width,) if self.width else ()))


@dataclasses.dataclass(frozen=True)
class Offsets:
    """Offsets that Triton computes: the cumulative sum of the lengths of another input, with a 0 in front."""

    name: str
    source: str


@dataclasses.dataclass(frozen=True)
class GraphTensors:
    """Inputs and outputs of the graph that answers requests, as Triton's clients see them."""

    inputs: tuple[ClientTensor, ...]
    offsets: tuple[Offsets, ...]
    outputs: tuple[ClientTensor, ...]


def most_users(files: BundleFiles) -> int:
    """Users of the largest batch that the bundle was built for."""
    return int(files.manifest["limits"]["max_batch"])


def longest_history(files: BundleFiles) -> int:
    """Events of the longest history that the bundle was built for."""
    return int(files.manifest["limits"]["max_seq_len"])


def graph_tensors(files: BundleFiles) -> GraphTensors:
    """The tensors of a bundle's main graph.

    Raises:
        BundleError: HSTU-E804, naming every input or output that cannot be one of Triton's, and why.
    """
    problems: list[str] = []
    inputs: list[ClientTensor] = []
    for spec in files.inputs:
        if spec.shape != ("B_plus_1",) and (tensor := _client_tensor(spec, problems)):
            inputs.append(tensor)
    offsets = [_offsets(spec, inputs, problems) for spec in files.inputs if spec.shape == ("B_plus_1",)]
    outputs = [_per_user(tensor) for spec in files.outputs if (tensor := _client_tensor(spec, problems))]
    refuse_if_any(problems)
    return GraphTensors(tuple(inputs), tuple(each for each in offsets if each is not None), tuple(outputs))


def refuse_if_any(problems: Sequence[str], backend: str = "Triton") -> None:
    """Refuse a graph, naming everything about it that cannot be served.

    Raises:
        BundleError: HSTU-E804.
    """
    if problems:
        raise BundleError(
            "HSTU-E804",
            f"{backend} cannot serve this graph",
            "; ".join(problems),
            "serve it with `hstu-compile triton --backend python`, or through hstu_compile's own sessions",
            {"problems": list(problems)},
        )


def _client_tensor(spec: TensorSpec, problems: list[str]) -> ClientTensor | None:
    shown = f"{spec.name} {spec.dtype} {list(spec.shape)}"
    if spec.dtype not in DATATYPES:
        problems.append(f"{shown}: its type is none of {', '.join(DATATYPES)}")
        return None
    axis, inner = (spec.shape[0], spec.shape[1:]) if spec.shape else (None, ())
    if not isinstance(axis, str) or len(inner) > 1 or not all(isinstance(size, int) for size in inner):
        problems.append(
            f"{shown}: a request's tensor has one axis that counts, and at most one of fixed size behind it"
        )
        return None
    width = next((size for size in inner if isinstance(size, int)), 0)
    if axis in _KINDS:
        return ClientTensor(spec.name, spec.dtype, _KINDS[axis], 0, width)
    if per_user := _PER_USER.fullmatch(axis):
        return ClientTensor(spec.name, spec.dtype, "values", int(per_user[1] or 1), width)
    problems.append(f"{shown}: axis {axis} counts neither users (B), events (L) nor candidates (T)")
    return None


def _per_user(output: ClientTensor) -> ClientTensor:
    """An output [B, D] is D values for each user."""
    if output.kind == "values" and output.count == 1 and output.width:
        return dataclasses.replace(output, count=output.width, width=0)
    return output


def _offsets(spec: TensorSpec, inputs: Sequence[ClientTensor], problems: list[str]) -> Offsets | None:
    kind = _COUNTED_BY.get(spec.name)
    source = next((each.name for each in inputs if each.kind == kind), None)
    if kind is None:
        problems.append(f"{spec.name}: offsets of what is not known; known are {', '.join(_COUNTED_BY)}")
    elif spec.dtype != "int32":
        problems.append(f"{spec.name} is {spec.dtype}; Triton makes offsets of int32")
    elif source is None:
        problems.append(f"{spec.name}: no input has {kind} whose lengths it could count")
    else:
        return Offsets(spec.name, source)
    return None
