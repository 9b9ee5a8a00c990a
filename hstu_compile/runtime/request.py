"""Refuse requests that a model must not be run on, naming every fault. Level 3; no torch.

The engine itself clamps ids into its tables, because a GPU kernel must not read outside them; this module is where a
person learns that an id was wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_compile.errors import RequestError
from hstu_compile.runtime._faults import MOST_NAMED, Faults, check_offsets, where
from hstu_compile.runtime._typed_values import integers, too_far_apart

_DTYPES = {
    "item_ids": "int32",
    "timestamps": "int64",
    "seq_offsets": "int32",
    "request_timestamps": "int64",
    "ratings": "int32",
}
_FIXES = {
    "HSTU-E701": "pass these arrays: item_ids int32 [L], timestamps int64 [L], seq_offsets int32 [B + 1], "
    "request_timestamps int64 [B], and ratings int32 [L] where the model has ratings",
    "HSTU-E702": "seq_offsets is the cumulative sum of the lengths with a 0 in front",
    "HSTU-E703": "map unknown items to 0 (padding) or drop them",
    "HSTU-E704": "split the batch, keep the last events of a long history, or rebuild with larger limits",
    "HSTU-E705": "sort each sequence by time, and ask at or after its last event",
}


@dataclasses.dataclass(frozen=True)
class RequestLimits:
    """What a request may hold; read from a bundle's manifest.

    Attributes:
        num_items: largest item id; 0 is padding.
        num_ratings: rows of the rating table; 0 for a model without ratings.
        max_batch: most sequences.
        max_seq_len: most events in one sequence.
    """

    num_items: int
    num_ratings: int
    max_batch: int
    max_seq_len: int


def check_request(feeds: Mapping[str, NDArray[Any]], limits: RequestLimits) -> dict[str, NDArray[Any]]:
    """Check a request batch and give it the model's dtypes.

    Args:
        feeds: item_ids [L], timestamps [L] seconds, seq_offsets [B + 1], request_timestamps [B] seconds, and ratings
            [L] for a model with ratings. Integers of other types are converted where no value changes.
        limits: what the model was built for.

    Returns:
        New contiguous arrays: int32 ids, offsets and ratings, int64 timestamps.

    Raises:
        RequestError: with every fault; its code is the first fault's. HSTU-E701 names, types and ranks, E702 offsets,
            E703 ids, E704 sizes, E705 times.
    """
    problems = Faults(_FIXES)
    arrays = _typed(feeds, limits, problems)
    problems.raise_if_any()
    num_events = arrays["item_ids"].shape[0]
    for name in ("timestamps", "ratings"):
        if name in arrays and arrays[name].shape[0] != num_events:
            problems.add("HSTU-E701", f"{name} has {arrays[name].shape[0]} entries and item_ids has {num_events}")
    _check_vocabulary(arrays, limits, problems)
    offsets = arrays["seq_offsets"]
    if check_offsets("seq_offsets", offsets, num_events, "events", problems):
        _check_sizes(arrays, limits, problems)
        if arrays["timestamps"].shape[0] == num_events:
            _check_times(arrays, problems)
    problems.raise_if_any()
    return arrays


def _typed(feeds: Mapping[str, NDArray[Any]], limits: RequestLimits, problems: Faults) -> dict[str, NDArray[Any]]:
    names = [name for name in _DTYPES if name != "ratings" or limits.num_ratings]
    for name in names:
        if name not in feeds:
            problems.add("HSTU-E701", f"{name} is missing")
    for name in feeds:
        if name not in names:
            problems.add("HSTU-E701", f"{name!r} is not an input of this model")
    arrays = {}
    for name in names:
        if name not in feeds:
            continue
        array = integers(name, feeds[name], _DTYPES[name], lambda text: problems.add("HSTU-E701", text))
        if array is not None:
            arrays[name] = array
    return arrays


def _check_vocabulary(arrays: Mapping[str, NDArray[Any]], limits: RequestLimits, problems: Faults) -> None:
    for name, last in (("item_ids", limits.num_items), ("ratings", limits.num_ratings - 1)):
        if name not in arrays:
            continue
        outside = (arrays[name] < 0) | (arrays[name] > last)
        if outside.any():
            problems.add("HSTU-E703", f"{name} outside 0..{last} {where(outside, arrays[name])}")


def _check_sizes(arrays: Mapping[str, NDArray[Any]], limits: RequestLimits, problems: Faults) -> None:
    lengths = np.diff(arrays["seq_offsets"])
    if lengths.shape[0] > limits.max_batch:
        problems.add("HSTU-E704", f"{lengths.shape[0]} sequences; at most {limits.max_batch} fit")
    long = lengths > limits.max_seq_len
    for index in np.flatnonzero(long)[:MOST_NAMED]:
        problems.add("HSTU-E704", f"sequence {index} has {lengths[index]} events; at most {limits.max_seq_len} fit")
    if long.sum() > MOST_NAMED:
        problems.add("HSTU-E704", f"{long.sum() - MOST_NAMED} more sequences are too long")


def _check_times(arrays: Mapping[str, NDArray[Any]], problems: Faults) -> None:
    """Ascending inside each sequence, and the request not before the last event."""
    times, offsets, asked = arrays["timestamps"], arrays["seq_offsets"], arrays["request_timestamps"]
    num_sequences = offsets.shape[0] - 1
    if times.size > 1:
        backwards = times[1:] < times[:-1]
        starts = offsets[1:-1]
        # The step into a sequence's first event compares two sequences, which have no order.
        backwards[starts[(starts > 0) & (starts < times.size)] - 1] = False
        for event in np.flatnonzero(backwards)[:MOST_NAMED]:
            sequence = int(np.searchsorted(offsets, event, side="right")) - 1
            problems.add(
                "HSTU-E705",
                f"sequence {sequence} goes back in time at event {event + 1 - offsets[sequence]}: "
                f"{times[event]} then {times[event + 1]}",
            )
    if asked.shape[0] != num_sequences:
        problems.add("HSTU-E701", f"request_timestamps has {asked.shape[0]} entries for {num_sequences} sequences")
        return
    filled = np.flatnonzero(np.diff(offsets) > 0)
    last = times[offsets[filled + 1] - 1]
    early = filled[asked[filled] < last]
    for sequence in early[:MOST_NAMED]:
        end = times[offsets[sequence + 1] - 1]
        problems.add("HSTU-E705", f"sequence {sequence} is asked at {asked[sequence]}, before its last event at {end}")
    first, late = times[offsets[filled]], asked[filled]
    # Unsigned, so that the difference of any two is right; where the request is the earlier one, that is said above.
    wide = (late.astype(np.uint64) - first.astype(np.uint64) >= 1 << 63) & (late >= first)
    for row in np.flatnonzero(wide)[:MOST_NAMED]:
        problems.add("HSTU-E705", f"sequence {filled[row]}: {too_far_apart(first[row], late[row])}")


def feeds_from_npz(path: Path) -> dict[str, NDArray[Any]]:
    """Arrays of an .npz file, without pickles.

    Raises:
        RequestError: HSTU-E706.
    """
    try:
        # Opened here: NumPy leaves the file of an archive that it cannot read to the garbage collector.
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it is a single .npy array, not an .npz archive")
            with archive:
                return {name: archive[name] for name in archive.files}
    except Exception as error:  # A damaged file makes zipfile and NumPy fail in whatever operation the damage leads to.
        raise RequestError(
            "HSTU-E706",
            f"{path} cannot be read as feeds",
            f"{type(error).__name__}: {error}",
            "write it with numpy.savez(path, item_ids=..., timestamps=..., seq_offsets=..., request_timestamps=...)",
            {"path": str(path)},
        ) from error
