"""Ranking requests: what they hold, and the checks before a model sees them. Level 3; no torch.

The engines clamp ids into their tables, because a GPU kernel must not read outside them; this module is where a person
learns that an id was wrong, or says that clamping is meant.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from hstu_compile.errors import UsageError
from hstu_compile.runtime._faults import Faults, where
from hstu_compile.runtime._typed_values import array_or_fault, integers, too_far_apart
from hstu_compile.runtime.ranking_spec import ContextualFeature, IdFeature, RankingSpec

Arrays = Mapping[str, NDArray[Any]]
CacheUse = Literal["hit", "miss", "stale", "off"]
Truncation = Literal["refuse", "keep_last"]
UnknownIds = Literal["refuse", "clamp"]

_FIXES = {
    "HSTU-E701": "pass the features that `hstu-compile inspect` lists, one value per event or candidate; labels and "
    "actions of candidates are no inputs",
    "HSTU-E703": "map unknown ids to one the model was trained with, or choose unknown_ids='clamp' to let the table's "
    "first or last row stand for them",
    "HSTU-E704": "keep the last events of a long history (truncation='keep_last' does it and reports how many went), "
    "or rebuild with a larger limit",
    "HSTU-E705": "sort each history by time, and ask at or after its last event",
}


@dataclasses.dataclass(frozen=True)
class RankingPolicy:
    """What to do with requests that the model could only answer after a change.

    Attributes:
        truncation: a history over the limit: "refuse" raises HSTU-E704; "keep_last" drops the oldest events, and the
            result says how many.
        unknown_ids: an id outside its table: "refuse" raises HSTU-E703; "clamp" takes the nearest legal id, as the
            model's own code does. A negative id of a contextual feature is an absent value, and always legal.

    Raises:
        UsageError: HSTU-E901 for another value.
    """

    truncation: Truncation = "refuse"
    unknown_ids: UnknownIds = "refuse"

    def __post_init__(self) -> None:
        for name, allowed in (("truncation", get_args(Truncation)), ("unknown_ids", get_args(UnknownIds))):
            if getattr(self, name) not in allowed:
                raise UsageError(
                    "HSTU-E901",
                    f"there is no {name} policy {getattr(self, name)!r}",
                    f"it is not one of {', '.join(allowed)}",
                    f"choose one of these for {name}",
                )


@dataclasses.dataclass(frozen=True, eq=False)
class RankingRequest:
    """One user's history, and the candidates to be scored after it.

    Attributes:
        user: the name under which the history's keys and values are cached. Two users need two names.
        history: feature to values [U], oldest first. A feature whose table is outside the graph has rows [U, dim].
        candidates: feature to values [m], in any order. All time buckets are anchored at the LAST candidate's query
            time, as Meta's are; candidates do not see one another.
        context: contextual feature to values [max_length]; fewer are filled up with absent ones.
    """

    user: str | int
    history: Arrays
    candidates: Arrays
    context: Arrays = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class RankingResult:
    """The answer to one request.

    Attributes:
        preds: [m, tasks] float32 -- probability, or value for a regression task; in the request's candidate order.
        logits: [m, tasks] float32.
        cache: "hit" if the history's keys and values were there; "miss" or "stale" if they were computed, because
            nothing or something outdated was; "off" if no cache was used.
        truncated: oldest events that were dropped.
    """

    preds: NDArray[np.float32]
    logits: NDArray[np.float32]
    cache: CacheUse
    truncated: int


@dataclasses.dataclass(frozen=True, eq=False)
class CheckedRequest:
    """A request in the model's dtypes, in arrays of its own.

    Attributes:
        user: as given.
        history: feature to values [U].
        candidates: feature to values [m].
        context: feature to values [max_length].
        num_events: U.
        num_candidates: m.
        request_timestamp: query time of the last candidate; 0 without candidates.
        truncated: oldest events that were dropped.
    """

    user: str | int
    history: Arrays
    candidates: Arrays
    context: Arrays
    num_events: int
    num_candidates: int
    request_timestamp: int
    truncated: int


def checked_requests(
    requests: Sequence[RankingRequest], spec: RankingSpec, policy: RankingPolicy
) -> list[CheckedRequest]:
    """Check requests and give them the model's dtypes.

    Integers of other types are converted where no value changes. A request without candidates is legal; so is a user
    without history.

    Raises:
        RequestError: with every fault of every request; its code is the first fault's. HSTU-E701 names, types, ranks
            and lengths, E703 ids, E704 sizes, E705 times.
    """
    faults = Faults(_FIXES)
    checked = [_Check(index, request, spec, policy, faults).result() for index, request in enumerate(requests)]
    faults.raise_if_any()
    return checked


class _Check:
    """The checks of one request; faults name it by its index."""

    def __init__(
        self, index: int, request: RankingRequest, spec: RankingSpec, policy: RankingPolicy, faults: Faults
    ) -> None:
        self._request, self._spec, self._policy, self._faults = request, spec, policy, faults
        self._place = f"request {index} (user {request.user!r})"

    def _add(self, code: str, text: str) -> None:
        self._faults.add(code, f"{self._place}: {text}")

    def _add_malformed(self, text: str) -> None:
        self._add("HSTU-E701", text)

    def result(self) -> CheckedRequest:
        request, spec = self._request, self._spec
        if isinstance(request.user, bool) or not isinstance(request.user, str | numbers.Integral):
            self._add("HSTU-E701", f"user is a {type(request.user).__name__}, not a str or an int")
        history = self._typed("history", request.history, spec.history_names, spec.history_ids)
        candidates = self._typed("candidates", request.candidates, spec.candidate_names, spec.candidate_ids)
        context = self._typed("context", request.context, spec.contextual_names, spec.contextual)
        num_events = self._length(history, spec.history_names)
        num_candidates = self._length(candidates, spec.candidate_names)
        for features, arrays in ((spec.history_ids, history), (spec.candidate_ids, candidates)):
            for feature in features:
                self._clip(feature, arrays, lowest=0)
        for slot in spec.contextual:
            self._clip(slot, context, lowest=None)
            self._fill(slot, context)
        self._check_times(history.get(spec.history_time), candidates.get(spec.candidate_time))
        truncated = max(0, num_events - spec.max_history_len)
        if truncated and self._policy.truncation == "refuse":
            self._add("HSTU-E704", f"{num_events} events; at most {spec.max_history_len} fit")
        times = candidates.get(spec.candidate_time)
        return CheckedRequest(
            user=request.user,
            history={name: array[truncated:] for name, array in history.items()},
            candidates=candidates,
            context=context,
            num_events=num_events - truncated,
            num_candidates=num_candidates,
            request_timestamp=int(times[-1]) if times is not None and times.size else 0,
            truncated=truncated,
        )

    def _typed(
        self, part: str, given: Arrays, names: Sequence[str], features: Sequence[IdFeature]
    ) -> dict[str, NDArray[Any]]:
        """The arrays that have the right rank and type, as new ones."""
        if not hasattr(given, "keys"):
            self._add("HSTU-E701", f"{part} is a {type(given).__name__}, not a mapping of features to values")
            return {}
        for name in given:
            if name not in names:
                self._add("HSTU-E701", f"{name!r} is not a feature of the model's {part}")
        external = {feature.name: feature.external_dim for feature in features if feature.external_dim is not None}
        times = (self._spec.history_time, self._spec.candidate_time)
        arrays: dict[str, NDArray[Any]] = {}
        for name in names:
            if name not in given:
                self._add("HSTU-E701", f"{name} is missing in {part}")
                continue
            if name in external:
                values = self._rows(name, given[name], external[name])
            else:
                values = integers(name, given[name], "int64" if name in times else "int32", self._add_malformed)
            if values is not None:
                arrays[name] = values
        return arrays

    def _rows(self, name: str, given: object, width: int) -> NDArray[Any] | None:
        dtype, array = self._spec.row_dtype, array_or_fault(name, given, self._add_malformed)
        if array is None:
            return None
        if array.ndim != 2 or array.shape[1] != width:
            self._add("HSTU-E701", f"{name} has shape {list(array.shape)}; its embedding rows are [n, {width}]")
        elif not np.can_cast(array.dtype, dtype) or array.dtype.kind != "f":
            self._add("HSTU-E701", f"{name} is {array.dtype}; {dtype} cannot hold it unchanged")
        elif not (finite := np.isfinite(array).all(axis=1)).all():
            self._add("HSTU-E701", f"{name} holds NaN or infinity in row {int(np.flatnonzero(~finite)[0])}")
        else:
            return np.array(array, dtype)
        return None

    def _length(self, arrays: Arrays, names: Sequence[str]) -> int:
        """Rows that all arrays have; the first one's where they differ."""
        lengths = {name: arrays[name].shape[0] for name in names if name in arrays}
        if len(set(lengths.values())) > 1:
            shown = ", ".join(f"{name} {length}" for name, length in lengths.items())
            self._add("HSTU-E701", f"features have different lengths: {shown}")
        return next(iter(lengths.values()), 0)

    def _clip(self, feature: IdFeature, arrays: dict[str, NDArray[Any]], lowest: int | None) -> None:
        """Refuse or clamp ids outside the table; `lowest` None leaves negative ones, which are absent values."""
        if feature.external_dim is not None or feature.name not in arrays:
            return
        ids, last = arrays[feature.name], feature.table_size - 1
        if not ids.size or (ids.max() <= last and (lowest is None or ids.min() >= lowest)):
            return
        if self._policy.unknown_ids == "clamp":
            arrays[feature.name] = np.clip(ids, lowest, last).astype(np.int32)
        else:
            outside = (ids > last) if lowest is None else (ids > last) | (ids < lowest)
            self._add("HSTU-E703", f"{feature.name} outside 0..{last} {where(outside, ids)}")

    def _fill(self, slot: ContextualFeature, context: dict[str, NDArray[Any]]) -> None:
        """Fill a contextual feature up to its length with absent values."""
        if slot.name not in context:
            return
        array = context[slot.name]
        missing = slot.max_length - array.shape[0]
        if missing < 0 or (missing and slot.external_dim is not None):
            # Only an id can say that it is absent; the caller of an external table has to give the row for that.
            allowed = "" if slot.external_dim is not None else "at most "
            self._add("HSTU-E701", f"{slot.name} has {array.shape[0]} values; it takes {allowed}{slot.max_length}")
        elif missing:
            context[slot.name] = np.concatenate([array, np.full(missing, -1, array.dtype)])

    def _check_times(self, history: NDArray[Any] | None, candidates: NDArray[Any] | None) -> None:
        """History ascending, no candidate asked for before its last event, and differences that int64 holds."""
        ends: list[Any] = []
        if candidates is not None and candidates.size:
            ends += [candidates.min(), candidates.max()]
        if history is not None and history.size:
            falls = history[1:] < history[:-1]
            if falls.any():
                self._add_falls(history, np.flatnonzero(falls))
            if candidates is not None and ends and ends[0] < history[-1]:
                early = where(candidates < history[-1], candidates)
                self._add("HSTU-E705", f"query time before the last event ({history[-1]}) {early}")
            ends += [history[0], history[-1]]
        if ends and (why := too_far_apart(min(ends), max(ends))):
            self._add("HSTU-E705", why)

    def _add_falls(self, times: NDArray[Any], events: NDArray[np.intp]) -> None:
        first = int(events[0])
        more = f", and at {events.size - 1} more" if events.size > 1 else ""
        self._add("HSTU-E705", f"time goes back at event {first + 1}: {times[first]} then {times[first + 1]}{more}")
