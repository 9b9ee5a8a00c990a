"""Draw ranking requests that look like traffic, for each graph of a ranking model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_compile.calibration.batches import RequestBatch, event_times, most_sequences, stratified_lengths
from hstu_compile.model.ranking import (
    CACHE_OFFSETS,
    CANDIDATE_OFFSETS,
    NUM_CANDIDATES,
    REQUEST_TIMESTAMPS,
    SCALING_SEQ_LENS,
    SEQ_OFFSETS,
)
from hstu_compile.model.ranking_config import RankingConfig

# Candidates of one request are asked for within an hour.
_ASKING_SECONDS = 3600

# Float64 keys and values of one batch.
_MAX_CACHE_BYTES = 1 << 24

Arrays = dict[str, NDArray[Any]]


def _offsets(lengths: Sequence[int]) -> NDArray[np.int32]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def ranking_batch(
    name: str, config: RankingConfig, lengths: Sequence[int], candidates: Sequence[int], seed: int
) -> RequestBatch:
    """Random histories and candidates: the inputs of the `packed` graph.

    Args:
        name: name of the batch.
        config: decides features and vocabularies.
        lengths: events of each user; 0 is allowed.
        candidates: candidates of each user; 0 is allowed.
        seed: of the generator.
    """
    rng = np.random.default_rng(seed)
    rows = {table.name: table.num_rows for table in config.tables}

    def ids(table: str, count: int, lowest: int = 0) -> NDArray[Any]:
        if config.external_embeddings:
            return rng.standard_normal((count, config.table_dim), dtype=np.float32)
        return rng.integers(lowest, rows[table], count, dtype=np.int32)

    total, total_candidates = int(sum(lengths)), int(sum(candidates))
    times = [event_times(rng, length + 1) for length in lengths]
    arrays: Arrays = {feature: ids(table, total) for feature, table in config.history_ids.items()}
    none = np.zeros(0, np.int64)
    arrays[config.history_time_feature] = np.concatenate([none, *(each[:-1] for each in times)])
    if config.action_feature:
        every_bit = int(np.bitwise_or.reduce(config.action_weights))
        arrays[config.action_feature] = rng.integers(0, every_bit + 1, total, dtype=np.int32)
    for context in config.contextual_features:
        arrays[context.name] = ids(
            context.table, len(lengths) * context.max_length, -1 if context.max_length > 1 else 0
        )
    arrays |= {feature: ids(table, total_candidates) for feature, table in config.candidate_ids.items()}
    # Not all at once: what a row's time is counted from is the last candidate's query time.
    asked = np.repeat(np.array([each[-1] for each in times], np.int64), candidates)
    arrays[config.candidate_time_feature] = asked + rng.integers(0, _ASKING_SECONDS, total_candidates)
    arrays[SEQ_OFFSETS], arrays[CANDIDATE_OFFSETS] = _offsets(lengths), _offsets(candidates)
    return RequestBatch(name, arrays)


def ranking_batches(
    config: RankingConfig, max_batch: int, opt_batch: int, max_scores: int, seed: int = 0
) -> list[RequestBatch]:
    """Batches that exercise the edges of a profile: one candidate, a mix with empty users, the longest, the most users.

    Args:
        config: its max_history_len and max_candidates are the limits.
        max_batch: most users.
        opt_batch: typical number of users.
        max_scores: largest B * H * N * N for which a padded attention is affordable here. Batches get fewer users,
            and then shorter ones, never left out; the name of the longest says how long it is.
        seed: of the generator.
    """
    heads = config.layer.attention.num_heads
    affordable = max(1, int((max_scores / heads) ** 0.5) - config.contextual_len)
    # Keys and values of the requests are stored beside the bundle, as what the scoring graph is compared on.
    attention = config.layer.attention
    row_bytes = 8 * config.num_layers * heads * (attention.attention_dim + attention.linear_dim)
    max_rows = max(2, _MAX_CACHE_BYTES // row_bytes)
    affordable = min(affordable, max_rows)
    candidates = min(config.max_candidates, max(1, affordable // 4))
    longest = min(config.max_history_len, max(1, affordable - candidates))
    width = config.contextual_len + longest + candidates
    users = max(1, min(max_scores // (heads * width * width), max_rows // width, most_sequences(width)))
    mixed = stratified_lengths(max(1, min(opt_batch, users) - 2), longest, seed)
    counts = stratified_lengths(len(mixed), candidates, seed + 1)
    if max_batch > 2:
        mixed, counts = [*mixed[:1], 0, *mixed[1:], longest], [*counts[:1], counts[0], *counts[1:], 0]
    many = stratified_lengths(min(max_batch, users), min(longest, 8), seed + 2)
    both = min(2, max_batch, users)
    return [
        ranking_batch("one event, one candidate", config, [1], [1], seed),
        ranking_batch("mixed lengths", config, mixed, counts, seed + 1),
        ranking_batch(
            f"{longest} events, {candidates} candidates", config, [longest] * both, [candidates] * both, seed + 2
        ),
        ranking_batch("most users", config, many, [1] * len(many), seed + 3),
    ]


def single_user_arrays(config: RankingConfig, packed: Mapping[str, NDArray[Any]]) -> list[Arrays]:
    """A `packed` batch taken apart: inputs of the `packed` graph for each user who has candidates, in order."""
    events, candidates = packed[SEQ_OFFSETS], packed[CANDIDATE_OFFSETS]
    users = []
    for user in np.flatnonzero(np.diff(candidates)):
        own = {name: slice(events[user], events[user + 1]) for name in config.history_features}
        own |= {name: slice(candidates[user], candidates[user + 1]) for name in config.candidate_features}
        for context in config.contextual_features:
            own[context.name] = slice(user * context.max_length, (user + 1) * context.max_length)
        arrays = {name: packed[name][part] for name, part in own.items()}
        arrays[SEQ_OFFSETS] = _offsets([events[user + 1] - events[user]])
        arrays[CANDIDATE_OFFSETS] = _offsets([candidates[user + 1] - candidates[user]])
        users.append(arrays)
    return users


def prefill_arrays(config: RankingConfig, packed: Mapping[str, NDArray[Any]]) -> Arrays:
    """Inputs of the `prefill` graph for the requests of a `packed` batch."""
    names = [*config.history_features, *config.contextual_names, SEQ_OFFSETS]
    return {**{name: packed[name] for name in names}, **_request_arrays(config, packed, prefill=True)}


def score_arrays(
    config: RankingConfig, packed: Mapping[str, NDArray[Any]], key_values: Mapping[str, NDArray[Any]], micro_batch: int
) -> Arrays:
    """Inputs of the `score` graph for the first `micro_batch` candidates of a `packed` batch.

    Args:
        config: of the model.
        packed: inputs of the `packed` graph.
        key_values: k_0, v_0, ... of `prefill` for the same requests, in the graph's type.
        micro_batch: most candidates of one pass.
    """
    counts = np.diff(packed[CANDIDATE_OFFSETS])
    # Shared out evenly, so that a pass of many users has candidates of most of them.
    share = max(1, micro_batch // max(1, int((counts > 0).sum())))
    kept = np.minimum(counts, share)
    kept[np.cumsum(kept) > micro_batch] = 0
    owner = np.repeat(np.arange(len(counts)), counts)
    place = np.arange(len(owner)) - packed[CANDIDATE_OFFSETS][owner]
    taken = place < kept[owner]
    lengths = np.diff(packed[SEQ_OFFSETS]) + config.contextual_len
    return {
        **{name: packed[name][taken] for name in config.candidate_features},
        CANDIDATE_OFFSETS: _offsets(kept.tolist()),
        **_request_arrays(config, packed, prefill=False),
        CACHE_OFFSETS: _offsets(lengths.tolist()),
        **key_values,
    }


def _request_arrays(config: RankingConfig, packed: Mapping[str, NDArray[Any]], *, prefill: bool) -> Arrays:
    """What a packed forward derives from its inputs, and the other graphs are told."""
    events, candidates = packed[SEQ_OFFSETS].astype(np.int64), packed[CANDIDATE_OFFSETS].astype(np.int64)
    history_len, num_candidates = np.diff(events), np.diff(candidates)
    # The last element of a sequence: its last candidate, or its last event, or nothing but context at time 0.
    asked = np.append(packed[config.candidate_time_feature], 0)[candidates[1:] - 1]
    last = np.where(history_len > 0, np.append(packed[config.history_time_feature], 0)[events[1:] - 1], 0)
    arrays: Arrays = {REQUEST_TIMESTAMPS: np.where(num_candidates > 0, asked, last).astype(np.int64)}
    if prefill and config.counts_candidates:
        arrays[NUM_CANDIDATES] = num_candidates.astype(np.int32)
    if config.scaling == "batch":
        longest = history_len.max(initial=0) + num_candidates.max(initial=0) + config.contextual_len
        arrays[SCALING_SEQ_LENS] = np.full(len(history_len), longest, np.float32)
    return arrays
