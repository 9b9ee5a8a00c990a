"""Round a request's sizes up to a few, so that one recorded pass serves many requests. Arithmetic. Level 3; no torch.

A graph is recorded for one set of shapes, and requests of ever new lengths would never meet one. So every axis is
padded up to the next rung of a ladder: rows of events, candidates and cached keys with zeros that belong to no
sequence, because the offsets that are fed end before them; sequences with empty ones, whose offsets repeat the last.
Our graphs give neither any influence and put both last. The answers lose the rows that the padding added, and are
those of the request. The divisor of attention is an attribute, or counts offsets; it never comes from a padded shape.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_compile.artifacts import TensorSpec
from hstu_compile.axis_sizes import AxisSize, axis_size, axis_values
from hstu_compile.errors import UsageError
from hstu_compile.runtime.ladder import Ladder

# Whose padding repeats the last value: an empty sequence of the last one's time, divisor and context is a legal one.
_SEQUENCES = "B"


@dataclasses.dataclass(frozen=True)
class Padded:
    """A request in its bucket.

    Attributes:
        arrays: as the graph takes them.
        sizes: of the request's own axes.
        bucket: of the padded ones: equal buckets have equal shapes.
    """

    arrays: dict[str, NDArray[Any]] = dataclasses.field(repr=False)
    sizes: dict[str, int]
    bucket: dict[str, int]


class ShapeBuckets:
    """The buckets of one graph.

    Args:
        inputs: of the graph; the first axis of each is dynamic and a multiple of one name.
        outputs: of the graph; the first axis of each is fixed or an expression of the same names.
        ladders: by the name of an axis: L, T, A, Lc, B. An axis without one keeps its size.
        most: by the same names, what an axis is never padded beyond.

    Raises:
        UsageError: HSTU-E901 for a ladder of an axis that the graph does not have.
    """

    def __init__(
        self,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        ladders: Mapping[str, Ladder],
        most: Mapping[str, int] | None = None,
    ) -> None:
        self._inputs, self._outputs = tuple(inputs), tuple(outputs)
        self._ladders, self._most = dict(ladders), dict(most or {})
        axes = axis_names(inputs)
        if unknown := sorted(set(ladders) - axes):
            raise UsageError(
                "HSTU-E901",
                f"the graph has no axis {', '.join(unknown)}",
                f"its inputs have {', '.join(sorted(axes))}",
                "give ladders for these alone",
            )

    def sizes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """Size of every axis that these inputs have.

        Raises:
            ValueError: if two of them give one axis two sizes.
        """
        return axis_values(shapes, {spec.name: spec.shape for spec in self._inputs if spec.name in shapes})

    def rounded(self, axis: str, size: int) -> int:
        """The size of the axis in its bucket: the least rung that holds it, or the most that the axis may have."""
        ladder = self._ladders.get(axis)
        up = size if ladder is None else ladder.up(size)
        return max(size, min(up, self._most.get(axis, up)))

    def is_within(self, axis: str, size: int) -> bool:
        """Whether the axis' ladder reaches so far: else the size would be a bucket of its own."""
        ladder = self._ladders.get(axis)
        return ladder is None or size <= ladder.rungs[-1]

    def rows(self, tensor: str) -> AxisSize | None:
        """The first axis of an input or output; None where it is fixed, or no expression of the inputs' axes."""
        spec = next(each for each in (*self._inputs, *self._outputs) if each.name == tensor)
        return axis_size(spec.shape[0]) if spec.shape and isinstance(spec.shape[0], str) else None

    def padded(self, arrays: Mapping[str, NDArray[Any]], bucket: Mapping[str, int] | None = None) -> Padded:
        """A request at its bucket's shapes.

        Args:
            arrays: one per input of the graph, of its dtype, but for inputs that the caller pads.
            bucket: size of every axis, none smaller than the request's; None rounds each by its ladder.

        Raises:
            ValueError: if two arrays give one axis two sizes.
        """
        sizes = self.sizes({name: array.shape for name, array in arrays.items()})
        found = {name: self.rounded(name, n) for name, n in sizes.items()} if bucket is None else dict(bucket)
        padded = {}
        for spec in self._inputs:
            if spec.name not in arrays:
                continue
            axis, array = _first_axis(spec), arrays[spec.name]
            more = axis.at(found) - len(array)
            repeats = axis.terms[0][0] == _SEQUENCES and len(array) > 0
            filler = array[-1:] if repeats else np.zeros((1, *array.shape[1:]), array.dtype)
            padded[spec.name] = np.concatenate([array, np.repeat(filler, more, axis=0)]) if more else array
        return Padded(padded, sizes, found)

    def trimmed(self, outputs: Mapping[str, NDArray[Any]], padded: Padded) -> dict[str, NDArray[Any]]:
        """The answers to the request itself."""
        found = {}
        for spec in self._outputs:
            if spec.name not in outputs:
                continue  # it is resident
            expression = self.rows(spec.name)
            rows = expression.at(padded.sizes) if expression is not None else len(outputs[spec.name])
            found[spec.name] = outputs[spec.name][:rows]
        return found


def axis_names(inputs: Sequence[TensorSpec]) -> set[str]:
    """The names that the first axes of inputs are multiples of."""
    return {name for spec in inputs for name, _ in _first_axis(spec).terms}


def axis_limits(inputs: Sequence[TensorSpec], most_rows: Callable[[str], int | None]) -> dict[str, int]:
    """Greatest size of each axis.

    Args:
        inputs: of the graph.
        most_rows: of an input, the most entries that its first axis may have; None where nothing says.
    """
    limits: dict[str, int] = {}
    for spec in inputs:
        axis, rows = _first_axis(spec), most_rows(spec.name)
        if rows is not None:
            (name, factor), most = axis.terms[0], rows - axis.constant
            limits[name] = min(limits.get(name, most // factor), most // factor)
    return limits


def _first_axis(spec: TensorSpec) -> AxisSize:
    """The dynamic axis of an input."""
    found = axis_size(spec.shape[0]) if spec.shape and isinstance(spec.shape[0], str) else None
    if found is None or len(found.terms) != 1:
        raise ValueError(f"{spec.name} {list(spec.shape)} has no axis that could be padded")
    return found
