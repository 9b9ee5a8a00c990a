"""Which passes are recorded as CUDA graphs, and which graphs are kept: pure policy, no CUDA. Level 3; no torch."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Hashable
from typing import Generic, Protocol, TypeVar

#: Passes that were seen once are remembered for this many graphs' worth of others.
_SEEN_PER_GRAPH = 4


class Closeable(Protocol):
    """What is kept."""

    def close(self) -> None:
        """Free it."""


Kept = TypeVar("Kept", bound=Closeable)


@dataclasses.dataclass(frozen=True)
class GraphStats:
    """Counters of a session's CUDA graphs since it was opened.

    Attributes:
        captures: graphs that were recorded.
        replays: passes that were one launch of a graph.
        evictions: graphs that went: the least recently used for a new one, or all when the session's buffers moved.
        failures: passes that could not be recorded, or whose graph gave another answer; each was warned of.
        kept: graphs now.
        kept_bytes: device memory that they took when they were made.
    """

    captures: int = 0
    replays: int = 0
    evictions: int = 0
    failures: int = 0
    kept: int = 0
    kept_bytes: int = 0

    def __add__(self, other: GraphStats) -> GraphStats:
        """Of two sessions."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return GraphStats(*(one + another for one, another in pairs))


class GraphCache(Generic[Kept]):
    """The most recently replayed graphs, by a key that says all that a graph depends on.

    A pass is recorded when its key comes a second time: most shapes never come again, and recording costs as much as
    several passes. Not safe to use from several threads; the session's lock guards it.

    Args:
        capacity: graphs that are kept, at least 1.
        budget_bytes: device memory that they may take together; None sets no limit. A graph that alone takes more is
            kept all the same, alone: its pass recurs, and nothing else would be kept in its place.
    """

    def __init__(self, capacity: int, budget_bytes: int | None = None) -> None:
        self._capacity, self._budget_bytes = capacity, budget_bytes
        self._kept: collections.OrderedDict[Hashable, Kept] = collections.OrderedDict()
        self._nbytes: dict[Hashable, int] = {}
        self._seen: collections.OrderedDict[Hashable, bool] = collections.OrderedDict()
        # Every name from the start, so that other threads may read while one counts.
        self._counts = dict.fromkeys(("captures", "replays", "evictions", "failures"), 0)

    @property
    def stats(self) -> GraphStats:
        """Counters."""
        return GraphStats(**self._counts, kept=len(self._kept), kept_bytes=sum(list(self._nbytes.values())))

    def find(self, key: Hashable) -> Kept | None:
        """The graph of a key, which is then the most recently used."""
        kept = self._kept.get(key)
        if kept is not None:
            self._kept.move_to_end(key)
        return kept

    def replayed(self) -> None:
        """Count a replay."""
        self._counts["replays"] += 1

    def failed(self) -> None:
        """Count a failure."""
        self._counts["failures"] += 1

    def is_due(self, key: Hashable) -> bool:
        """Note that a pass ran without a graph; whether it should be recorded now."""
        if key in self._kept:
            return False
        again = key in self._seen
        refused = self._seen.get(key, False)
        self._remember(key, refused)
        return again and not refused

    def keep(self, key: Hashable, graph: Kept, nbytes: int = 0) -> None:
        """Keep a new graph, which takes that much device memory; the least recently used go if there is too much."""
        while self._kept and (len(self._kept) >= self._capacity or self._exceeds(nbytes)):
            self._evict(next(iter(self._kept)))
        self._kept[key], self._nbytes[key] = graph, nbytes
        self._seen.pop(key, None)
        self._counts["captures"] += 1

    def refuse(self, key: Hashable) -> None:
        """Count a failure, drop the key's graph if it has one, and never say again that the key is due."""
        self.failed()
        if (kept := self._kept.pop(key, None)) is not None:
            del self._nbytes[key]
            kept.close()
        self._remember(key, True)

    def clear(self) -> None:
        """Drop every graph, and what was seen: the addresses that they know are no longer the session's."""
        for key in list(self._kept):
            self._evict(key)
        self._seen = collections.OrderedDict((key, True) for key, refused in self._seen.items() if refused)

    def _exceeds(self, more: int) -> bool:
        return self._budget_bytes is not None and sum(self._nbytes.values()) + more > self._budget_bytes

    def _evict(self, key: Hashable) -> None:
        self._kept.pop(key).close()
        del self._nbytes[key]
        self._counts["evictions"] += 1

    def _remember(self, key: Hashable, refused: bool) -> None:
        self._seen[key] = refused
        self._seen.move_to_end(key)
        # A refused key is forgotten last: asking for it again would fail again.
        while len(self._seen) > _SEEN_PER_GRAPH * self._capacity:
            oldest = next((each for each, gone in self._seen.items() if not gone), next(iter(self._seen)))
            del self._seen[oldest]
