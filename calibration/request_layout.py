"""How a model's request arrays divide into users, and what may be in them. Level 2."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_compile.model.families import ModelConfig
from hstu_compile.model.ranking import CANDIDATE_OFFSETS, REQUEST_TIMESTAMPS, SEQ_OFFSETS
from hstu_compile.model.ranking_config import RankingConfig

Arrays = dict[str, NDArray[Any]]

#: Arrays that a file of requests may also hold: what really happened afterwards.
LABEL_NAMES = frozenset({"target_ids", "labels"})

_INT32, _INT64 = np.iinfo(np.int32), np.iinfo(np.int64)
_MOST_NAMED = 5


@dataclasses.dataclass(frozen=True)
class RequestLayout:
    """The inputs of a model's first graph, `retrieval` or `packed`.

    Attributes:
        family: retrieval or ranking.
        jagged: offsets [B + 1] to the names of the arrays that they divide.
        most: most rows of one user, by offsets.
        per_user: names of arrays with so many entries for every user.
        ranges: lowest and highest whole number of each array of them.
        wide: names of arrays of embedding rows float32 [n, columns], and their columns.
        times: names of the arrays of seconds, int64; other whole numbers are int32.
        history_ids: name of the ids of history events; None where rows are given in their place.
        history_times: name of the times of history events.
    """

    family: str
    jagged: Mapping[str, tuple[str, ...]]
    most: Mapping[str, int]
    per_user: Mapping[str, int]
    ranges: Mapping[str, tuple[int, int]]
    wide: Mapping[str, int]
    times: tuple[str, ...]
    history_ids: str | None
    history_times: str

    @property
    def features(self) -> tuple[str, ...]:
        """Names of all inputs but the offsets."""
        return (*(name for names in self.jagged.values() for name in names), *self.per_user)

    def faults(self, arrays: Mapping[str, NDArray[Any]]) -> list[str]:
        """Why arrays are no requests to this model; all reasons of one kind at once, empty if they are."""
        return self._name_faults(arrays) or self._type_faults(arrays) or self._size_faults(arrays)

    def _name_faults(self, arrays: Mapping[str, NDArray[Any]]) -> list[str]:
        wanted = (*self.features, *self.jagged)
        missing = [name for name in wanted if name not in arrays]
        unknown = [name for name in arrays if name not in wanted and name not in LABEL_NAMES]
        faults = [f"missing: {', '.join(missing)}"] if missing else []
        faults += [f"not inputs of this model: {', '.join(unknown)}"] if unknown else []
        if faults and self.family == "retrieval" and CANDIDATE_OFFSETS in arrays:
            faults.append("they look like requests to a ranking model, as they have candidates")
        if faults and self.family == "ranking" and REQUEST_TIMESTAMPS in arrays:
            faults.append(f"they look like requests to a retrieval model, as they have {REQUEST_TIMESTAMPS}")
        return faults

    def _type_faults(self, arrays: Mapping[str, NDArray[Any]]) -> list[str]:
        faults = []
        for name in (*self.features, *self.jagged):
            array, columns = arrays[name], self.wide.get(name)
            rank = 1 if columns is None else 2
            if array.ndim != rank or (columns is not None and array.shape[1] != columns):
                shape = "[n]" if columns is None else f"[n, {columns}]"
                faults.append(f"{name} has shape {list(array.shape)}; it must be {shape}")
            elif columns is not None:
                if array.dtype.kind != "f":
                    faults.append(f"{name} is {array.dtype}; embedding rows are float")
                elif bad := int(array.size - np.isfinite(array).sum()):
                    faults.append(f"{name} holds {bad} numbers that are NaN or infinite")
            elif array.size and array.dtype.kind not in "iu":
                faults.append(f"{name} is {array.dtype}; it must hold whole numbers")
            elif array.size:
                lowest, highest = self.ranges.get(
                    name, (_INT64.min, _INT64.max) if name in self.times else (0, _INT32.max)
                )
                seen = int(array.min()), int(array.max())
                if seen[0] < lowest or seen[1] > highest:
                    faults.append(f"{name} are {seen[0]}..{seen[1]}; allowed: {lowest}..{highest}")
        return faults

    def _size_faults(self, arrays: Mapping[str, NDArray[Any]]) -> list[str]:
        users = max(len(arrays[SEQ_OFFSETS]) - 1, 0)
        faults = []
        for offsets, names in self.jagged.items():
            bounds = arrays[offsets].astype(np.int64)
            if len(bounds) != users + 1:
                faults.append(
                    f"{offsets} has {len(bounds)} entries for {users} users; it must have one more than users"
                )
                continue
            lengths = np.diff(bounds)
            if bounds[0] != 0 or (lengths < 0).any():
                faults.append(f"{offsets} does not ascend from 0")
                continue
            faults += [
                f"{name} has {len(arrays[name])} entries, and {offsets} ends at {bounds[-1]}"
                for name in names
                if len(arrays[name]) != bounds[-1]
            ]
            long = np.flatnonzero(lengths > self.most[offsets])
            faults += [
                f"user {user} has {lengths[user]} {_ROWS[offsets]}; the model takes at most {self.most[offsets]}"
                for user in long[:_MOST_NAMED]
            ]
            if len(long) > _MOST_NAMED:
                faults.append(f"{len(long) - _MOST_NAMED} more users have too many {_ROWS[offsets]}")
        faults += [
            f"{name} has {len(arrays[name])} entries; {users} users need {users * count}"
            for name, count in self.per_user.items()
            if len(arrays[name]) != users * count
        ]
        return faults

    def typed(self, arrays: Mapping[str, NDArray[Any]]) -> Arrays:
        """Arrays without faults, in the types of the graph's inputs and without labels."""
        types = {**dict.fromkeys(self.times, np.int64), **dict.fromkeys(self.wide, np.float32)}
        return {
            name: np.ascontiguousarray(arrays[name], dtype=types.get(name, np.int32))
            for name in (*self.features, *self.jagged)
        }

    def joined(self, files: list[Arrays]) -> Arrays:
        """The users of several sets of typed arrays, one after the other."""
        result: Arrays = {name: np.concatenate([arrays[name] for arrays in files]) for name in self.features}
        for offsets in self.jagged:
            lengths = np.concatenate([np.diff(arrays[offsets]) for arrays in files])
            result[offsets] = offsets_of(lengths)
        return result

    def taken(self, arrays: Arrays, users: NDArray[np.int64]) -> Arrays:
        """The requests of some users, in that order."""
        result: Arrays = {}
        for offsets, names in self.jagged.items():
            bounds = arrays[offsets].astype(np.int64)
            lengths = bounds[users + 1] - bounds[users]
            result[offsets] = offsets_of(lengths)
            # Row i of user u lies at the user's start plus i less the rows of the users before.
            shift = np.repeat(bounds[users] - result[offsets][:-1], lengths)
            rows = shift + np.arange(lengths.sum())
            result |= {name: arrays[name][rows] for name in names}
        for name, count in self.per_user.items():
            result[name] = arrays[name][(users[:, None] * count + np.arange(count)).reshape(-1)]
        return result


_ROWS = {SEQ_OFFSETS: "events", CANDIDATE_OFFSETS: "candidates"}


def offsets_of(lengths: NDArray[Any]) -> NDArray[np.int32]:
    """[B] lengths to [B + 1] bounds."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def request_layout(config: ModelConfig) -> RequestLayout:
    """The layout of a model's requests."""
    if not isinstance(config, RankingConfig):
        ratings = ("ratings",) if config.has_ratings else ()
        return RequestLayout(
            family="retrieval",
            jagged={SEQ_OFFSETS: ("item_ids", "timestamps", *ratings)},
            most={SEQ_OFFSETS: config.max_seq_len},
            per_user={REQUEST_TIMESTAMPS: 1},
            ranges={"item_ids": (0, config.num_items), **dict.fromkeys(ratings, (0, config.num_ratings - 1))},
            wide={},
            times=("timestamps", REQUEST_TIMESTAMPS),
            history_ids="item_ids",
            history_times="timestamps",
        )
    rows = {table.name: table.num_rows for table in config.tables}
    tables = {**config.history_ids, **config.candidate_ids}
    ranges = {name: (0, rows[table] - 1) for name, table in tables.items()}
    # A negative contextual id is an absent value.
    ranges |= {each.name: (int(_INT32.min), rows[each.table] - 1) for each in config.contextual_features}
    external = config.external_embeddings
    return RequestLayout(
        family="ranking",
        jagged={SEQ_OFFSETS: config.history_features, CANDIDATE_OFFSETS: config.candidate_features},
        most={SEQ_OFFSETS: config.max_history_len, CANDIDATE_OFFSETS: config.max_candidates},
        per_user={each.name: each.max_length for each in config.contextual_features},
        ranges={} if external else ranges,
        wide=dict.fromkeys(ranges, config.table_dim) if external else {},
        times=(config.history_time_feature, config.candidate_time_feature),
        history_ids=None if external else config.sequence_features[0].history,
        history_times=config.history_time_feature,
    )
