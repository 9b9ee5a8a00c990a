"""Draw request batches that look like traffic: ragged lengths, ascending event times with bursts and gaps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hstu_compile.model.config import RetrievalConfig

# 2024-01-01T00:00:00Z. Any real epoch time will do; float32 cannot hold its seconds, which is the point.
_EPOCH = 1_704_067_200
# Up to a week before the last second of int32.
_MAX_SPAN = 2**31 - 7 * 86400 - _EPOCH
# Gaps between events from one second to a year: every reachable time bucket is used.
_LOG10_GAP_RANGE = (0.0, 7.5)
# Pairs of a row and a sequence in one batch: the model compares every row with the end of every sequence, in 9 bytes.
_MAX_OWNER_PAIRS = 1 << 26


Arrays = dict[str, np.ndarray[Any, Any]]


@dataclasses.dataclass(frozen=True)
class RequestBatch:
    """One batch by graph input name: see `RetrievalModel.forward` for shapes and units."""

    name: str
    arrays: dict[str, np.ndarray[Any, Any]] = dataclasses.field(repr=False)

    @property
    def lengths(self) -> np.ndarray[Any, Any]:
        """[B] events of each sequence."""
        return np.diff(self.arrays["seq_offsets"])


def event_times(rng: np.random.Generator, count: int) -> np.ndarray[Any, Any]:
    """[count] int64 seconds, ascending, with gaps from a second to a year; shorter ones where they would pass 2038.

    TensorRT 8 keeps timestamps in int32.
    """
    passed = np.cumsum(10.0 ** rng.uniform(*_LOG10_GAP_RANGE, count))
    longest = float(passed[-1]) if count else 0.0
    return _EPOCH + (passed * min(1.0, _MAX_SPAN / max(longest, 1.0))).astype(np.int64)


def retrieval_batch(name: str, config: RetrievalConfig, lengths: Sequence[int], seed: int) -> RequestBatch:
    """Random histories of the given lengths.

    Args:
        name: name of the batch.
        config: decides vocabulary and whether there are ratings.
        lengths: events of each sequence; 0 is allowed.
        seed: of the generator.
    """
    rng = np.random.default_rng(seed)
    total = int(sum(lengths))
    timestamps = np.zeros(total, np.int64)
    request_timestamps = np.zeros(len(lengths), np.int64)
    start = 0
    for b, length in enumerate(lengths):
        times = event_times(rng, length + 1)
        timestamps[start : start + length] = times[:length]
        request_timestamps[b] = times[length]
        start += length
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "item_ids": rng.integers(1, config.num_items + 1, total, dtype=np.int32),
        "timestamps": timestamps,
        "seq_offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        "request_timestamps": request_timestamps,
    }
    if config.has_ratings:
        arrays["ratings"] = rng.integers(0, config.num_ratings, total, dtype=np.int32)
    return RequestBatch(name, arrays)


def stratified_lengths(count: int, longest: int, seed: int) -> list[int]:
    """`count` lengths in 1..longest, one from each of `count` equal strata, in random order."""
    rng = np.random.default_rng(seed)
    edges = np.linspace(1, longest + 1, count + 1)
    lengths = np.floor(rng.uniform(edges[:-1], edges[1:])).astype(int).clip(1, longest)
    return [int(length) for length in rng.permutation(lengths)]


def most_sequences(rows: int) -> int:
    """Sequences of so many rows each that fit into a batch here, however many the profile allows."""
    return max(1, math.isqrt(_MAX_OWNER_PAIRS // rows))


def retrieval_batches(
    config: RetrievalConfig,
    max_batch: int,
    opt_batch: int,
    max_scores: int,
    seed: int = 0,
    max_rows: int | None = None,
) -> list[RequestBatch]:
    """Batches that exercise the edges of a profile: the shortest, the longest, the most, an empty one, and a mix.

    Args:
        config: its max_seq_len is the longest history.
        max_batch: most sequences.
        opt_batch: typical number of sequences.
        max_scores: largest B * H * N * N for which a padded attention is affordable here; batches are made smaller,
            never left out.
        seed: of the generator.
        max_rows: most events of a batch, where they cost more than a forward pass: then the longest history is no
            longer than this, and its name says how long. None is no limit.
    """
    longest, heads = config.max_seq_len, config.layer.attention.num_heads
    longest = longest if max_rows is None else min(longest, max_rows)
    affordable = max(1, max_scores // (heads * longest * longest))
    short = min(longest, 8)
    affordable, most = min(affordable, most_sequences(longest)), min(affordable, most_sequences(short))
    if max_rows is not None:
        affordable, most = min(affordable, max_rows // longest), min(most, max_rows // short)
    mixed = stratified_lengths(max(1, min(opt_batch, affordable) - 1), longest, seed)
    many = stratified_lengths(min(max_batch, most), short, seed + 1)
    with_empty = [*mixed[:1], 0, *mixed[1:]] if max_batch > 1 else mixed
    return [
        retrieval_batch("one event", config, [1], seed),
        retrieval_batch("mixed lengths", config, with_empty[:max_batch], seed + 1),
        retrieval_batch(
            "longest" if longest == config.max_seq_len else f"{longest} events",
            config,
            [longest] * min(2, max_batch, affordable),
            seed + 2,
        ),
        retrieval_batch("most sequences", config, many, seed + 3),
    ]
