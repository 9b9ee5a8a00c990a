"""The arrays that the three retrieval graphs take, and what a cached history is known by. Private to the runtime."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_compile.runtime._jagged import joined, offsets_of
from hstu_compile.runtime.retrieval_request import CheckedHistory, Reason
from hstu_compile.runtime.retrieval_spec import RetrievalSpec

Feeds = dict[str, NDArray[Any]]


def clean_rows(num_events: int) -> int:
    """Of an encoded history, the rows that any longer one has too: all but the last.

    The last row's bias took the time of the request for that of an event to come. Its keys and values are another's
    from the second layer on, as soon as anything is asked or happens at another time.
    """
    return max(0, num_events - 1)


def validity_of(history: CheckedHistory, num_events: int, spec: RetrievalSpec) -> bytes:
    """Digest of the first events of a history: what their clean rows depend on. Not on when it is asked."""
    digest = hashlib.blake2b(digest_size=32)
    for name in spec.event_names:
        digest.update(np.ascontiguousarray(history.events[name][:num_events]).data)
    return digest.digest()


class KnownBeginning:
    """Whether a cached entry is what a history begins with, and may be extended to it; remembers why not.

    Args:
        history: the longer one.
        spec: of the model.

    Attributes:
        obstacle: why the entry that was looked at last may not be extended; "" if it may.
    """

    def __init__(self, history: CheckedHistory, spec: RetrievalSpec) -> None:
        self._history, self._spec = history, spec
        self._digests: dict[int, bytes] = {}
        self.obstacle: Reason = ""

    def __call__(self, rows: int, validity: bytes) -> bool:
        """See `KvWant.extends`. Called under the cache's lock: each beginning is digested once."""
        total = self._history.num_events
        if rows > total or self._digest(rows) != validity:
            self.obstacle = "truncated" if self._history.truncated else "changed"
        elif total - clean_rows(rows) > self._spec.max_append + 1:
            self.obstacle = "too_many_new"
        else:
            self.obstacle = ""
        return not self.obstacle

    def _digest(self, rows: int) -> bytes:
        if rows not in self._digests:
            self._digests[rows] = validity_of(self._history, rows, self._spec)
        return self._digests[rows]


def history_feeds(histories: Sequence[CheckedHistory], spec: RetrievalSpec) -> Feeds:
    """Feeds of `retrieval` and `prefill`: whole histories."""
    return {
        **joined([history.events for history in histories], spec.event_names),
        "seq_offsets": offsets_of([history.num_events for history in histories]),
        "request_timestamps": _asked(histories),
    }


def append_feeds(histories: Sequence[CheckedHistory], kept: Sequence[int], spec: RetrievalSpec) -> Feeds:
    """Feeds of `append` but for keys and values: the events of each history behind its first `kept` ones."""
    pairs = list(zip(histories, kept, strict=True))
    new = [{name: history.events[name][n:] for name in spec.event_names} for history, n in pairs]
    known = [{name: history.events[name][:n] for name in spec.event_names} for history, n in pairs]
    cached = joined(known, tuple(spec.cached_facts.values()))
    return {
        **joined(new, spec.event_names),
        "seq_offsets": offsets_of([history.num_events - n for history, n in pairs]),
        "request_timestamps": _asked(histories),
        "cache_offsets": offsets_of(kept),
        **{name: cached[feature] for name, feature in spec.cached_facts.items()},
    }


def _asked(histories: Sequence[CheckedHistory]) -> NDArray[np.int64]:
    return np.array([history.request_timestamp for history in histories], np.int64)


def input_names(spec: RetrievalSpec) -> Mapping[str, set[str]]:
    """The inputs of each graph that the feeds above fill."""
    whole = {*spec.event_names, "seq_offsets", "request_timestamps"}
    return {
        "retrieval": whole,
        "prefill": whole,
        "append": whole | {"cache_offsets", *spec.cached_facts, *spec.cached_names()},
    }
