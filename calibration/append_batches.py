"""Draw requests for the graph that extends cached histories, from batches of whole ones."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from hstu_compile.calibration.batches import Arrays
from hstu_compile.model.config import RetrievalConfig

# Float64 keys and values of one batch, which are stored beside the bundle.
_MAX_CACHE_BYTES = 1 << 24


def most_cached_rows(config: RetrievalConfig) -> int:
    """Events of one batch whose keys and values are not too much to store."""
    attention = config.layer.attention
    row_bytes = 8 * config.num_layers * attention.num_heads * (attention.attention_dim + attention.linear_dim)
    return max(2, _MAX_CACHE_BYTES // row_bytes)


def append_arrays(
    config: RetrievalConfig, whole: Arrays, key_values: Mapping[str, NDArray[np.floating]], max_append: int, top_k: int
) -> Arrays:
    """Inputs of the `append` graph that have the answers of a batch of whole histories.

    The histories are cut in turn so that as many events are new as possible, none, and one; the event before the new
    ones is computed again, and so is not among the cached rows.

    Args:
        config: decides which facts of cached events the graph takes.
        whole: inputs of the `retrieval` graph.
        key_values: k_0, v_0, ... of every event, as `prefill` gives them for the same batch.
        max_append: most new events of one history.
        top_k: whether the graph lists items, and has to know those of the cached events.
    """
    offsets = whole["seq_offsets"].astype(np.int64)
    lengths = np.diff(offsets)
    added = np.fromiter(itertools.cycle((max_append, 0, 1)), np.int64, count=len(lengths))
    cached = np.maximum(lengths - 1 - added, 0)
    place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    is_cached = place < np.repeat(cached, lengths)
    arrays: Arrays = {name: whole[name][~is_cached] for name in ("item_ids", "timestamps", "ratings") if name in whole}
    arrays["seq_offsets"] = _offsets(lengths - cached)
    arrays["request_timestamps"] = whole["request_timestamps"]
    arrays["cache_offsets"] = _offsets(cached)
    if config.has_time_bias:
        arrays["cached_timestamps"] = whole["timestamps"][is_cached]
    if top_k:
        arrays["cached_item_ids"] = whole["item_ids"][is_cached]
    return arrays | {name: rows[is_cached] for name, rows in key_values.items()}


def _offsets(lengths: NDArray[np.int64]) -> NDArray[np.int32]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
