"""Which requests a model must answer and which it must refuse, written down a second time for the fuzzed ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hstu_compile.bundle import BundleFiles
from hstu_compile.runtime.ranking_spec import RankingSpec
from hstu_compile.serving.samples import Sample

_RETRIEVAL = {"item_ids": "int32", "timestamps": "int64", "ratings": "int32", "request_timestamps": "int64"}


def is_legal(files: BundleFiles, sample: Mapping[str, Any]) -> bool:
    """Whether a request without the batch axis has an answer, under the policies that refuse."""
    return _ranking(files.ranking, sample) if files.ranking is not None else _retrieval(files, sample)


def completed(files: BundleFiles, sample: Sample) -> Sample:
    """A legal request as the eager model takes it: contextual features filled up with absent values."""
    widths = {each.name: each.max_length for each in files.ranking.contextual} if files.ranking is not None else {}
    return {
        name: np.concatenate([array, np.full(widths[name] - len(array), -1, array.dtype)]) if name in widths else array
        for name, array in sample.items()
    }


def _apart(times: list[int]) -> int:
    """Seconds from the first to the last, which int64 has to hold: a model subtracts one from the other."""
    return max(times, default=0) - min(times, default=0)


def _inside(array: Any, last: int) -> bool:
    return all(0 <= value <= last for value in array.tolist())


def _retrieval(files: BundleFiles, sample: Mapping[str, Any]) -> bool:
    if {name: str(array.dtype) for name, array in sample.items()} != _RETRIEVAL:
        return False
    if any(array.ndim != 1 for array in sample.values()):
        return False
    ids, times, ratings, asked = (sample[name] for name in _RETRIEVAL)
    in_order = times.tolist() == sorted(times.tolist())
    return (
        len(ids) == len(times) == len(ratings) <= files.limits.max_seq_len
        and len(asked) == 1
        and _inside(ids, files.limits.num_items)
        and _inside(ratings, files.limits.num_ratings - 1)
        and in_order
        and (not len(times) or asked[0] >= times[-1])
        and _apart([*times.tolist(), *asked.tolist()]) < 2**63
    )


def _ranking(spec: RankingSpec, sample: Mapping[str, Any]) -> bool:
    times = (spec.history_time, spec.candidate_time)
    wanted = {
        name: "int64" if name in times else "int32"
        for name in (*spec.history_names, *spec.contextual_names, *spec.candidate_names)
    }
    if {name: str(array.dtype) for name, array in sample.items()} != wanted:
        return False
    if any(array.ndim != 1 for array in sample.values()):
        return False
    events, candidates = ({len(sample[name]) for name in names} for names in (spec.history_names, spec.candidate_names))
    if len(events) != 1 or len(candidates) != 1 or max(events) > spec.max_history_len:
        return False
    if not all(_inside(sample[each.name], each.table_size - 1) for each in (*spec.history_ids, *spec.candidate_ids)):
        return False
    # A negative value of the context is an absent one.
    if any(
        len(sample[each.name]) > each.max_length or max(sample[each.name].tolist(), default=-1) >= each.table_size
        for each in spec.contextual
    ):
        return False
    happened, asked = (sample[name].tolist() for name in times)
    in_order = happened == sorted(happened) and (not happened or all(time >= happened[-1] for time in asked))
    return in_order and _apart([*happened, *asked]) < 2**63
