"""A session whose requests are padded to a few sets of shapes, so that what is done once a shape is done seldom.

Level 3; no torch. It wraps a session of any runtime: pads what comes in, cuts what goes out. What is done once a shape
is a CUDA graph, the kernels that TensorRT-RTX compiles, a plan of memory.

The rows that padding adds belong to no sequence: the offsets that are fed end before them. The contract of attention
(`op_schema`, HstuAttention) reads keys inside the offsets alone and writes zeros to rows beyond the last one; every
other operator of our graphs treats a row by itself, or gathers by offsets. So nothing of these rows reaches another,
whatever they hold. The sequences that padding adds are empty and come last. Divisors, times and numbers of candidates
are fed once a sequence, or derived from the offsets, and stay those of the request.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hstu_compile.artifacts import TensorSpec
from hstu_compile.axis_sizes import AxisSize
from hstu_compile.runtime._resident_io import Copies, Feeds, split_feeds
from hstu_compile.runtime.graph_cache import GraphStats
from hstu_compile.runtime.ladder import Buckets
from hstu_compile.runtime.resident import MemoryPool, ResidentTensor
from hstu_compile.runtime.session import Session
from hstu_compile.runtime.shape_buckets import ShapeBuckets, axis_limits, axis_names

if TYPE_CHECKING:
    from typing_extensions import Self

_SEQUENCES = "B"

#: (axis, size) of every axis that was rounded, in the order of the names.
Bucket = tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True)
class BucketStats:
    """Counters of a session's buckets since it was opened.

    Attributes:
        passes: of each bucket. Axes that a resident input has are as the caller laid them, and not named.
        exact: passes at their own shapes: longer than the ladder, or the session refused them.
        rows: events and candidates that were asked, of the passes in buckets.
        added_rows: that padding added to these.
    """

    passes: Mapping[Bucket, int] = dataclasses.field(default_factory=dict)
    exact: int = 0
    rows: int = 0
    added_rows: int = 0


class BucketedSession:
    """A `Session` in buckets.

    A pass keeps its own shapes where a size is beyond its ladder, and where resident outputs have no room for padding.
    No axis is padded beyond the profile of the engine: near its end, the profile's own end is the bucket. Resident
    inputs are never padded here: their rows are what the caller laid out, of which `resident_rows` tells the number,
    and host arrays of the same axis are padded to it.

    Args:
        session: that runs; this one owns it.
        inputs: of the graph, dynamic axes by name, as its bundle's manifest has them.
        outputs: likewise.
        buckets: what sizes are rounded to.

    Raises:
        ValueError: if an input has no axis that could be padded.
    """

    def __init__(
        self, session: Session, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], buckets: Buckets
    ) -> None:
        self._session, self._lock = session, threading.Lock()
        self._names = {spec.name for spec in inputs}
        self._shapes = ShapeBuckets(
            inputs,
            outputs,
            {axis: buckets.ladder(axis) for axis in axis_names(inputs)},
            axis_limits(inputs, session.most_rows),
        )
        self._passes: collections.Counter[Bucket] = collections.Counter()
        self._exact = self._rows = self._added_rows = 0

    @property
    def name(self) -> str:
        """See `Session.name`."""
        return self._session.name

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """See `Session.inputs`."""
        return self._session.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """See `Session.outputs`."""
        return self._session.outputs

    @property
    def graph_stats(self) -> GraphStats | None:
        """See `Session.graph_stats`."""
        return self._session.graph_stats

    @property
    def bucket_stats(self) -> BucketStats:
        """Counters."""
        with self._lock:
            return BucketStats(dict(self._passes), self._exact, self._rows, self._added_rows)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """See `Session.run`."""
        return self.run_resident(feeds, {})

    def run_resident(
        self,
        feeds: Feeds,
        outputs: Mapping[str, ResidentTensor],
        *,
        before: Copies = (),
        after: Copies = (),
    ) -> dict[str, NDArray[Any]]:
        """See `Session.run_resident`; resident tensors may have the rows of the bucket, see `resident_rows`."""
        fed, residents = split_feeds(feeds)
        arrays = {name: np.asarray(array) for name, array in fed.items()}
        sizes = self._sizes(arrays, residents) if set(feeds) == self._names else None
        bucket = None if sizes is None else self._bucket(sizes, residents, outputs)
        if sizes is None or bucket is None:
            # Where feeds do not fit together, the session itself says what is wrong.
            found = self._session.run_resident(feeds, outputs, before=before, after=after)
            with self._lock:
                self._exact += 1
            return found
        padded = dataclasses.replace(self._shapes.padded(arrays, bucket), sizes=sizes)
        found = self._session.run_resident({**padded.arrays, **residents}, outputs, before=before, after=after)
        self._count(sizes, bucket, residents)
        return self._shapes.trimmed(found, padded)

    def resident_rows(self, tensor: str, rows: int, most: int, feeds: Mapping[str, NDArray[Any]]) -> int:
        """Rows that a resident tensor should have so that its pass runs in a bucket.

        Args:
            tensor: input or output.
            rows: that the pass reads or writes.
            most: that there is memory for, at least `rows`.
            feeds: the pass's arrays.

        Returns:
            At least `rows`, at most `most`. What the rows behind the first `rows` of an input hold is of no matter.
        """
        expression = self._shapes.rows(tensor)
        sizes = self._sizes(feeds, {})
        if expression is None or sizes is None:
            return rows
        if tensor in self._names:
            (axis, factor), rest = expression.terms[0], rows - expression.constant
            return min(most, factor * self._shapes.rounded(axis, rest // factor) + expression.constant)
        bucket = {axis: self._shapes.rounded(axis, size) for axis, size in sizes.items()}
        wanted = expression.at(bucket)
        if wanted <= most:
            return wanted
        least = expression.at({**bucket, **{axis: sizes[axis] for axis in _rows_of(expression)}})
        # The memory's end is the bucket, unless the tokens of the sequences that were added leave no room at all.
        return most if least <= most else rows

    def most_rows(self, name: str) -> int | None:
        """See `Session.most_rows`."""
        return self._session.most_rows(name)

    def memory_pool(self, capacity_bytes: int) -> MemoryPool:
        """See `Session.memory_pool`."""
        return self._session.memory_pool(capacity_bytes)

    def close(self) -> None:
        """See `Session.close`."""
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _sizes(
        self, arrays: Mapping[str, NDArray[Any]], residents: Mapping[str, ResidentTensor]
    ) -> dict[str, int] | None:
        """The request's own sizes; None if the arrays do not fit the graph or one another."""
        try:
            sizes = self._shapes.sizes({name: array.shape for name, array in arrays.items()})
            return {**self._laid(residents), **sizes}
        except ValueError:
            return None

    def _laid(self, residents: Mapping[str, ResidentTensor]) -> dict[str, int]:
        """The axes of resident inputs."""
        return self._shapes.sizes({name: tensor.shape for name, tensor in residents.items()})

    def _bucket(
        self,
        sizes: Mapping[str, int],
        residents: Mapping[str, ResidentTensor],
        targets: Mapping[str, ResidentTensor],
    ) -> dict[str, int] | None:
        """Size of every axis in the pass; None where it keeps its own."""
        laid = self._laid(residents)
        if not all(axis in laid or self._shapes.is_within(axis, size) for axis, size in sizes.items()):
            return None
        bucket = rounded = {axis: laid.get(axis, self._shapes.rounded(axis, size)) for axis, size in sizes.items()}
        written = [(self._shapes.rows(name), target.shape[0]) for name, target in targets.items()]
        for expression, rows in written:
            # Where memory ends before the rung, as many events are written as there is room for.
            if expression is not None and len(axes := _rows_of(expression)) == 1 and axes[0] not in laid:
                bucket = {**bucket, axes[0]: rows - expression.at({**bucket, axes[0]: 0})}
        fits = all(expression is None or expression.at(bucket) == rows for expression, rows in written)
        if not fits or any(bucket[axis] < size for axis, size in sizes.items()):
            return None
        if bucket == sizes != rounded:
            return None  # there was no room for padding
        return bucket

    def _count(
        self, sizes: Mapping[str, int], bucket: Mapping[str, int], residents: Mapping[str, ResidentTensor]
    ) -> None:
        laid = self._laid(residents)
        rounded = sorted((axis, size) for axis, size in bucket.items() if axis not in laid)
        with self._lock:
            self._passes[tuple(rounded)] += 1
            self._rows += sum(sizes[axis] for axis, _ in rounded if axis != _SEQUENCES)
            self._added_rows += sum(size - sizes[axis] for axis, size in rounded if axis != _SEQUENCES)


def _rows_of(expression: AxisSize) -> list[str]:
    """The axes that count one row each: not the sequences, which have as many as they have contextual tokens."""
    return [axis for axis, factor in expression.terms if axis != _SEQUENCES and factor == 1]


def resident_rows(
    session: Session | None, tensor: str, rows: int, most: int, feeds: Mapping[str, NDArray[Any]] | None = None
) -> int:
    """See `BucketedSession.resident_rows`; `rows` for any other session."""
    return session.resident_rows(tensor, rows, most, feeds or {}) if isinstance(session, BucketedSession) else rows


def has_buckets(session: Session | None) -> bool:
    """Whether the session pads, so that equal shapes recur."""
    return isinstance(session, BucketedSession)


def bucket_stats(sessions: Mapping[str, Session | None]) -> dict[str, BucketStats]:
    """Counters of each session that has buckets, by its name here."""
    return {name: each.bucket_stats for name, each in sessions.items() if isinstance(each, BucketedSession)}
