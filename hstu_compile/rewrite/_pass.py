"""The contract of a graph pass: requires, call, ensures, and counts that are checked. Level 3."""

from __future__ import annotations

import abc
import dataclasses
import time
from collections.abc import Iterable, Sequence

import onnx

from hstu_compile.artifacts import OnnxGraph, PassRecord
from hstu_compile.errors import InternalError, RewriteError
from hstu_compile.table_files import checkable


@dataclasses.dataclass(frozen=True)
class PassResult:
    """What a pass did: counts by kind; all zero means that it changed nothing."""

    counts: dict[str, int]

    @property
    def modified(self) -> bool:
        """Whether the graph was changed."""
        return any(self.counts.values())


class Pass(abc.ABC):
    """One change of the graph, in place. A subclass's docstring lists its cases; its name is its verb and noun."""

    name: str

    def requires(self, model: onnx.ModelProto) -> None:
        """Check what the pass needs of the graph. Raises RewriteError."""

    @abc.abstractmethod
    def call(self, model: onnx.ModelProto) -> PassResult:
        """Change the graph in place and count what changed. A second call must count nothing."""

    def ensures(self, model: onnx.ModelProto, result: PassResult) -> None:
        """Check what the pass promises. Raises RewriteError."""

    def expect(self, result: PassResult, kind: str, wanted: int) -> None:
        """Refuse a pass that changed fewer places than the model has.

        Raises:
            RewriteError: HSTU-E301.
        """
        if result.counts.get(kind, 0) != wanted:
            raise RewriteError(
                "HSTU-E301",
                f"pass {self.name} changed {result.counts.get(kind, 0)} of {wanted} {kind}",
                "the exported graph does not have the form that the pass expects",
                "report this with `hstu-compile env` and the .onnx of --keep-intermediates",
                {"pass": self.name, "kind": kind, "expected": wanted, "found": result.counts.get(kind, 0)},
            )


def apply_passes(graph: OnnxGraph, passes: Sequence[Pass]) -> Iterable[OnnxGraph]:
    """Run passes in order, yielding the graph after each one (a copy: the input is left alone).

    Raises:
        RewriteError: if a pass refuses.
        InternalError: if a pass leaves a graph that is not valid ONNX; the message names the pass and those before it.
    """
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    records = list(graph.passes)
    for step in passes:
        started = time.perf_counter()
        step.requires(model)
        result = step.call(model)
        step.ensures(model, result)
        try:
            onnx.checker.check_model(checkable(model))
        except onnx.checker.ValidationError as error:
            before = ", ".join(record.name for record in records) or "none"
            raise InternalError(
                f"pass {step.name} left an invalid graph (passes before it: {before}): {error}"
            ) from error
        records.append(PassRecord(step.name, result.counts, time.perf_counter() - started))
        snapshot = onnx.ModelProto()
        snapshot.CopyFrom(model)
        yield dataclasses.replace(graph, model=snapshot, passes=tuple(records))
