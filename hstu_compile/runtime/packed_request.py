"""Refuse ranking batches in the packed graph's own form that a model must not be run on. Level 3; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_compile.runtime._faults import Faults, check_offsets, whole_numbers
from hstu_compile.runtime._feeds import converted
from hstu_compile.runtime._typed_values import array_or_fault
from hstu_compile.runtime.ranking_request import RankingPolicy, RankingRequest, checked_requests
from hstu_compile.runtime.ranking_spec import RankingSpec

_OFFSETS = ("seq_offsets", "candidate_offsets")
_FIXES = {
    "HSTU-E701": "pass the inputs that `hstu-compile inspect` lists; labels and actions of candidates are no inputs",
    "HSTU-E702": "offsets are the cumulative sum of the lengths with a 0 in front",
    "HSTU-E704": "split the batch, or rebuild with a larger --max-batch or --max-candidates",
}


def check_packed_request(feeds: Mapping[str, NDArray[Any]], spec: RankingSpec) -> dict[str, NDArray[Any]]:
    """Check a batch for the `packed` graph and give it the model's dtypes.

    Args:
        feeds: one array per graph input: history features [U], contextual features [B * max_length], candidate
            features [T], seq_offsets and candidate_offsets [B + 1].
        spec: what the model takes.

    Returns:
        New arrays, input name to array.

    Raises:
        RequestError: with every fault; its code is the first fault's. HSTU-E701 names, types, ranks and lengths, E702
            offsets, E703 ids, E704 sizes, E705 times.
    """
    faults = Faults(_FIXES)
    names = (*spec.history_names, *spec.contextual_names, *spec.candidate_names, *_OFFSETS)
    for name in names:
        if name not in feeds:
            faults.add("HSTU-E701", f"{name} is missing")
    for name in feeds:
        if name not in names:
            faults.add("HSTU-E701", f"{name!r} is not an input of this model")
    arrays = {}
    for name in (name for name in names if name in feeds):
        array = array_or_fault(name, feeds[name], lambda text: faults.add("HSTU-E701", text))
        if array is not None:
            arrays[name] = array
    for name in (name for name in _OFFSETS if name in arrays):
        cast = converted(whole_numbers(arrays[name]), "int32") if arrays[name].ndim == 1 else None
        if cast is None:
            faults.add(
                "HSTU-E701", f"{name} is {arrays[name].dtype} of shape {list(arrays[name].shape)}, not int32 [B + 1]"
            )
        else:
            arrays[name] = np.array(cast)
    faults.raise_if_any()
    batch = _check_division(arrays, spec, faults)
    faults.raise_if_any()
    events, candidates = (arrays[name] for name in _OFFSETS)
    lengths = {feature.name: feature.max_length for feature in spec.contextual}
    checked = checked_requests(
        [
            RankingRequest(
                user=b,
                history={name: arrays[name][events[b] : events[b + 1]] for name in spec.history_names},
                candidates={name: arrays[name][candidates[b] : candidates[b + 1]] for name in spec.candidate_names},
                context={name: arrays[name][b * length : (b + 1) * length] for name, length in lengths.items()},
            )
            for b in range(batch)
        ],
        spec,
        RankingPolicy(),
    )
    return {
        **{name: np.concatenate([each.history[name] for each in checked]) for name in spec.history_names},
        **{name: np.concatenate([each.context[name] for each in checked]) for name in spec.contextual_names},
        **{name: np.concatenate([each.candidates[name] for each in checked]) for name in spec.candidate_names},
        **{name: arrays[name] for name in _OFFSETS},
    }


def _check_division(arrays: Mapping[str, NDArray[Any]], spec: RankingSpec, faults: Faults) -> int:
    """Whether every array divides into users; returns their number."""
    batch = int(arrays["seq_offsets"].shape[0]) - 1
    if arrays["candidate_offsets"].shape != arrays["seq_offsets"].shape:
        faults.add(
            "HSTU-E702",
            f"seq_offsets has {arrays['seq_offsets'].shape[0]} entries and candidate_offsets "
            f"{arrays['candidate_offsets'].shape[0]}",
        )
    for offsets, names, what in (
        ("seq_offsets", spec.history_names, "events"),
        ("candidate_offsets", spec.candidate_names, "candidates"),
    ):
        lengths = {name: len(arrays[name]) if arrays[name].ndim else -1 for name in names}
        if len(set(lengths.values())) > 1:
            shown = ", ".join(f"{name} {length}" for name, length in lengths.items())
            faults.add("HSTU-E701", f"features of {what} have different lengths: {shown}")
        else:
            check_offsets(offsets, arrays[offsets], lengths[names[0]], what, faults)
    for feature in spec.contextual:
        array, wanted = arrays[feature.name], batch * feature.max_length
        if array.ndim == 0 or len(array) != wanted:
            faults.add("HSTU-E701", f"{feature.name} has shape {list(array.shape)}; {batch} users need {wanted} values")
    if batch > spec.max_batch:
        faults.add("HSTU-E704", f"{batch} users; at most {spec.max_batch} fit")
    counts = np.diff(arrays["candidate_offsets"].astype(np.int64))
    for user in np.flatnonzero(counts > spec.max_candidates)[:1]:
        faults.add("HSTU-E704", f"user {user} has {counts[user]} candidates; at most {spec.max_candidates} fit")
    return batch
