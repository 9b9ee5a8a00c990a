"""Retrieval requests, one user each: what they hold, and the checks before a model sees them. Level 3; no torch."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hstu_compile.runtime._faults import Faults, where
from hstu_compile.runtime._typed_values import integers, too_far_apart
from hstu_compile.runtime.retrieval_spec import RetrievalSpec

Arrays = Mapping[str, NDArray[Any]]
Reuse = Literal["hit", "appended", "miss", "stale", "off"]
Reason = Literal["", "absent", "changed", "truncated", "too_many_new", "no_room", "not_asked", "over_budget"]
Truncation = Literal["refuse", "keep_last"]

_DTYPES = {"item_ids": "int32", "timestamps": "int64", "ratings": "int32"}
_FIXES = {
    "HSTU-E701": "pass item_ids [U] and timestamps [U], and ratings [U] where the model has them, and the time of the "
    "request in seconds",
    "HSTU-E703": "map unknown items to 0 (padding) or drop them",
    "HSTU-E704": "keep the last events of a long history (truncation='keep_last' does it and reports how many went), "
    "or rebuild with a larger limit",
    "HSTU-E705": "sort each history by time, and ask at or after its last event",
}


@dataclasses.dataclass(frozen=True, eq=False)
class RetrievalRequest:
    """One user's whole history, and when the next item is asked for.

    Attributes:
        user: the name under which the history's keys and values are cached. Two users need two names.
        events: `item_ids` and `timestamps` [U], oldest first; `ratings` [U] where the model has them.
        request_timestamp: seconds, not before the last event.
    """

    user: str | int
    events: Arrays
    request_timestamp: int


@dataclasses.dataclass(frozen=True, eq=False)
class RetrievalResult:
    """The answer to one request.

    Attributes:
        user_embedding: [D] float32, normalised; zeros for an empty history.
        top_items: [K] int32 -- the best items that are not in the history; None where the model lists none.
        top_scores: [K] float32, or None.
        cache: "hit" if the whole history was encoded already: its last row was encoded again. "appended" if its
            beginning was: the last of these rows and the new ones were encoded. "miss", "stale": all of it was.
            "off": all of it was, and nothing was kept.
        reason: why all of it was encoded; "" where it was not. "absent": nothing is known of the user (a first visit,
            or evicted, or forgotten). "changed": the known history is not what this one begins with. "truncated": so
            it is, and this request lost its oldest events, whose absence moves every position. "too_many_new": more
            new events than the graph takes. "no_room": the budget has no room for the old and the new rows at once.
            "not_asked", "over_budget": with `cache` "off".
        encoded: events that were encoded for this answer.
        truncated: oldest events that were dropped.
    """

    user_embedding: NDArray[np.float32]
    top_items: NDArray[np.int32] | None
    top_scores: NDArray[np.float32] | None
    cache: Reuse
    reason: Reason
    encoded: int
    truncated: int


@dataclasses.dataclass(frozen=True, eq=False)
class CheckedHistory:
    """A request in the model's dtypes, in arrays of its own.

    Attributes:
        user: as given.
        events: feature to values [U].
        num_events: U.
        request_timestamp: seconds.
        truncated: oldest events that were dropped.
    """

    user: str | int
    events: Arrays
    num_events: int
    request_timestamp: int
    truncated: int


def checked_histories(
    requests: Sequence[RetrievalRequest], spec: RetrievalSpec, truncation: Truncation
) -> list[CheckedHistory]:
    """Check requests and give them the model's dtypes.

    Integers of other types are converted where no value changes. A user without history is legal.

    Args:
        requests: of any users.
        spec: of the model.
        truncation: a history over the limit: "refuse" it, or "keep_last" events and report how many went.

    Raises:
        RequestError: with every fault of every request; its code is the first fault's. HSTU-E701 names, types, ranks
            and lengths, E703 ids, E704 sizes, E705 times.
    """
    faults = Faults(_FIXES)
    checked = [_Check(index, request, spec, truncation, faults).result() for index, request in enumerate(requests)]
    faults.raise_if_any()
    return checked


class _Check:
    """The checks of one request; faults name it by its index."""

    def __init__(
        self, index: int, request: RetrievalRequest, spec: RetrievalSpec, truncation: Truncation, faults: Faults
    ) -> None:
        self._request, self._spec, self._truncation, self._faults = request, spec, truncation, faults
        self._place = f"request {index} (user {request.user!r})"

    def _add(self, code: str, text: str) -> None:
        self._faults.add(code, f"{self._place}: {text}")

    def result(self) -> CheckedHistory:
        request, spec = self._request, self._spec
        if isinstance(request.user, bool) or not isinstance(request.user, str | numbers.Integral):
            self._add("HSTU-E701", f"user is a {type(request.user).__name__}, not a str or an int")
        events = self._typed()
        lengths = {name: array.shape[0] for name, array in events.items()}
        if len(set(lengths.values())) > 1:
            shown = ", ".join(f"{name} {length}" for name, length in lengths.items())
            self._add("HSTU-E701", f"features have different lengths: {shown}")
        for name, last in (("item_ids", spec.num_items), ("ratings", spec.num_ratings - 1)):
            if name in events and (outside := (events[name] < 0) | (events[name] > last)).any():
                self._add("HSTU-E703", f"{name} outside 0..{last} {where(outside, events[name])}")
        asked = self._asked()
        if "timestamps" in events:
            self._check_times(events["timestamps"], asked)
        num_events = next(iter(lengths.values()), 0)
        truncated = max(0, num_events - spec.max_seq_len)
        if truncated and self._truncation == "refuse":
            self._add("HSTU-E704", f"{num_events} events; at most {spec.max_seq_len} fit")
        return CheckedHistory(
            user=request.user,
            events={name: array[truncated:] for name, array in events.items()},
            num_events=num_events - truncated,
            request_timestamp=asked or 0,
            truncated=truncated,
        )

    def _typed(self) -> dict[str, NDArray[Any]]:
        """The features that have the right rank and type, as new arrays."""
        given, names = self._request.events, self._spec.event_names
        if not hasattr(given, "keys"):
            self._add("HSTU-E701", f"events is a {type(given).__name__}, not a mapping of features to values")
            return {}
        for name in given:
            if name not in names:
                self._add("HSTU-E701", f"{name!r} is not a feature of this model's events")
        arrays = {}
        for name in names:
            if name not in given:
                self._add("HSTU-E701", f"{name} is missing")
                continue
            array = integers(name, given[name], _DTYPES[name], lambda text: self._add("HSTU-E701", text))
            if array is not None:
                arrays[name] = array
        return arrays

    def _asked(self) -> int | None:
        """When; None if that is no time, which says nothing of the events' times."""
        given: object = self._request.request_timestamp
        if isinstance(given, bool) or not isinstance(given, numbers.Integral):
            self._add("HSTU-E701", f"request_timestamp is a {type(given).__name__}, not an int")
            return None
        time = int(given)
        if not -(2**63) <= time < 2**63:
            self._add("HSTU-E701", f"request_timestamp is {time}; int64 cannot hold it")
            return None
        return time

    def _check_times(self, times: NDArray[Any], asked: int | None) -> None:
        backwards = np.flatnonzero(times[1:] < times[:-1])
        if backwards.size:
            first = int(backwards[0])
            more = f", and at {backwards.size - 1} more" if backwards.size > 1 else ""
            self._add("HSTU-E705", f"time goes back at event {first + 1}: {times[first]} then {times[first + 1]}{more}")
        if not times.size or asked is None:
            return
        if asked < times[-1]:
            self._add("HSTU-E705", f"it is asked at {asked}, before its last event at {times[-1]}")
        elif why := too_far_apart(times[0], asked):
            self._add("HSTU-E705", why)
