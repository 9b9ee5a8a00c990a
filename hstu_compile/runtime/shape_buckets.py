"""Round a request's sizes up to a few, so that one recorded pass serves many requests. Arithmetic. Level 3; no torch.

A graph is recorded for one set of shapes, and requests of ever new lengths would never meet one. So every axis is
padded up to the next rung of a ladder: rows of events, candidates and cached keys with zeros that belong to no
sequence, because the offsets that are fed end before them; sequences with empty ones, whose offsets repeat the last.
Our graphs give neither any influence and put both last. The answers lose the rows that the padding added, and are
those of the request. The divisor of attention is an attribute, or counts offsets; it never comes from a padded shape.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_compile.artifacts import TensorSpec
from hstu_compile.axis_sizes import AxisSize, axis_size, axis_values
from hstu_compile.errors import UsageError

# Whose padding repeats the last value: an empty sequence of the last one's time, divisor and context is a legal one.
_SEQUENCES = "B"


@dataclasses.dataclass(frozen=True)
class Ladder:
    """Sizes that an axis is rounded up to.

    Attributes:
        rungs: ascending, each at least 1.

    Raises:
        UsageError: HSTU-E901 for rungs that do not ascend from 1 or more, or none.
    """

    rungs: tuple[int, ...]

    def __post_init__(self) -> None:
        steps = itertools.pairwise((0, *self.rungs))
        if not self.rungs or any(low >= high for low, high in steps):
            raise UsageError(
                "HSTU-E901",
                f"the sizes {', '.join(map(str, self.rungs)) or '(none)'} are no ladder",
                "each must be at least 1 and larger than the one before",
                "list them in ascending order",
                {"rungs": list(self.rungs)},
            )

    def up(self, size: int) -> int:
        """The least rung that holds `size`; the size itself beyond the last rung.

        >>> Ladder((4, 8)).up(5), Ladder((4, 8)).up(8), Ladder((4, 8)).up(9), Ladder((4, 8)).up(0)
        (8, 8, 9, 4)
        """
        place = bisect.bisect_left(self.rungs, size)
        return self.rungs[place] if place < len(self.rungs) else size

    @classmethod
    def geometric(cls, least: int, most: int, per_doubling: int = 2) -> Ladder:
        """Rungs from `least` to `most`, `per_doubling` of them between a size and its double.

        A size from `least` on is padded by less than a factor of 2 ** (1 / per_doubling), rounded up to a whole number.

        Raises:
            UsageError: HSTU-E901 unless 1 <= least <= most and 1 <= per_doubling.

        >>> Ladder.geometric(8, 40).rungs
        (8, 12, 16, 23, 32, 40)
        """
        if not (1 <= least <= most and per_doubling >= 1):
            raise UsageError(
                "HSTU-E901",
                f"no ladder leads from {least} to {most} with {per_doubling} rungs a doubling",
                "allowed: 1 <= least <= most, and at least 1 rung",
                "swap the two, or leave the ladder out",
            )
        count = math.ceil(per_doubling * math.log2(most / least)) + 1
        found = {min(most, math.ceil(least * 2 ** (i / per_doubling))) for i in range(count)}
        return cls(tuple(sorted(found | {most})))


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

    Raises:
        UsageError: HSTU-E901 for a ladder of an axis that the graph does not have.
    """

    def __init__(
        self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], ladders: Mapping[str, Ladder]
    ) -> None:
        self._inputs, self._outputs, self._ladders = tuple(inputs), tuple(outputs), dict(ladders)
        axes = {name for spec in inputs for name, _ in _first_axis(spec).terms}
        if unknown := sorted(set(ladders) - axes):
            raise UsageError(
                "HSTU-E901",
                f"the graph has no axis {', '.join(unknown)}",
                f"its inputs have {', '.join(sorted(axes))}",
                "give ladders for these alone",
            )

    def padded(self, arrays: Mapping[str, NDArray[Any]]) -> Padded:
        """A request at its bucket's shapes.

        Args:
            arrays: one per input of the graph, of its dtype.

        Raises:
            ValueError: if two arrays give one axis two sizes.
        """
        declared = {spec.name: spec.shape for spec in self._inputs}
        sizes = axis_values({name: arrays[name].shape for name in declared}, declared)
        bucket = {name: self._ladders[name].up(n) if name in self._ladders else n for name, n in sizes.items()}
        padded = {}
        for spec in self._inputs:
            axis, array = _first_axis(spec), arrays[spec.name]
            more = axis.at(bucket) - len(array)
            repeats = axis.terms[0][0] == _SEQUENCES and len(array) > 0
            filler = array[-1:] if repeats else np.zeros((1, *array.shape[1:]), array.dtype)
            padded[spec.name] = np.concatenate([array, np.repeat(filler, more, axis=0)]) if more else array
        return Padded(padded, sizes, bucket)

    def trimmed(self, outputs: Mapping[str, NDArray[Any]], padded: Padded) -> dict[str, NDArray[Any]]:
        """The answers to the request itself."""
        found = {}
        for spec in self._outputs:
            axis = spec.shape[0]
            expression = axis_size(axis) if isinstance(axis, str) else None
            rows = expression.at(padded.sizes) if expression is not None else len(outputs[spec.name])
            found[spec.name] = outputs[spec.name][:rows]
        return found


def _first_axis(spec: TensorSpec) -> AxisSize:
    """The dynamic axis of an input."""
    found = axis_size(spec.shape[0]) if spec.shape and isinstance(spec.shape[0], str) else None
    if found is None or len(found.terms) != 1:
        raise ValueError(f"{spec.name} {list(spec.shape)} has no axis that could be padded")
    return found
