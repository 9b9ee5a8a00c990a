"""The arrays that the three ranking graphs take. Private to the ranking runtime."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_compile.runtime._jagged import joined, offsets_of
from hstu_compile.runtime.ranking_request import Arrays, CheckedRequest
from hstu_compile.runtime.ranking_spec import RankingSpec

Feeds = dict[str, NDArray[Any]]


def rows_of(request: CheckedRequest, spec: RankingSpec) -> int:
    """Tokens before the candidates, which are the rows that are cached."""
    return spec.contextual_len + request.num_events


def scaling_of(request: CheckedRequest, spec: RankingSpec) -> float:
    """The divisor: with "batch", the request is its own batch."""
    if spec.scaling == "batch":
        return float(rows_of(request, spec) + request.num_candidates)
    return float(spec.scaling)


def counted_events(request: CheckedRequest, num_candidates: int, spec: RankingSpec) -> list[bool]:
    """Of each contextual feature, whether the sequence is long enough for it."""
    length = request.num_events + (num_candidates if spec.counts_candidates else 0)
    return [length >= feature.min_history_len for feature in spec.contextual]


def validity_of(request: CheckedRequest, spec: RankingSpec) -> bytes:
    """Digest of everything that the cached keys and values of a request depend on, by the model's cache rule.

    Under both rules that is the history, the context, the divisor, and whether contextual features are long enough;
    under "request" also the query time, at which positions and time buckets are anchored.
    """
    digest = hashlib.blake2b(digest_size=32)
    parts = {**{name: request.history[name] for name in spec.history_names}, **request.context}
    for name in (*spec.history_names, *spec.contextual_names):
        # The length keeps one feature's last value from passing as the next one's first.
        digest.update(len(parts[name]).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(parts[name]).data)
    facts = [scaling_of(request, spec), *counted_events(request, request.num_candidates, spec)]
    if spec.cache_rule == "request":
        facts.append(request.request_timestamp)
    digest.update(repr(facts).encode())
    return digest.digest()


def _history(requests: Sequence[CheckedRequest], spec: RankingSpec) -> Feeds:
    return {
        **joined([request.history for request in requests], spec.history_names),
        **joined([request.context for request in requests], spec.contextual_names),
        "seq_offsets": offsets_of([request.num_events for request in requests]),
    }


def _query(requests: Sequence[CheckedRequest], spec: RankingSpec) -> Feeds:
    """What is the same for all candidates of a request."""
    feeds: Feeds = {"request_timestamps": np.array([request.request_timestamp for request in requests], np.int64)}
    if spec.scaling == "batch":
        feeds["scaling_seq_lens"] = np.array([scaling_of(request, spec) for request in requests], np.float32)
    return feeds


def prefill_feeds(requests: Sequence[CheckedRequest], spec: RankingSpec) -> Feeds:
    """Feeds of `prefill` for requests of different users."""
    feeds = {**_history(requests, spec), **_query(requests, spec)}
    if spec.has_minimum:
        feeds["num_candidates"] = np.array([request.num_candidates for request in requests], np.int32)
    return feeds


def score_feeds(requests: Sequence[CheckedRequest], candidates: Sequence[Arrays], spec: RankingSpec) -> Feeds:
    """Feeds of `score` but for keys and values: some candidates for each request."""
    return {
        **joined(candidates, spec.candidate_names),
        "candidate_offsets": offsets_of([part[spec.candidate_time].shape[0] for part in candidates]),
        "cache_offsets": offsets_of([rows_of(request, spec) for request in requests]),
        **_query(requests, spec),
    }


def among_all_rows(feeds: Feeds, first_rows: Sequence[int]) -> Feeds:
    """The feeds of a `score` pass, for keys and values that are those of all users in the cache.

    A pass says where each sequence's cached rows end and the next one's begin by one number. So a sequence without
    candidates comes in front of each user's, and owns the rows between the last user's and this one's: nothing is
    computed for it, and none of its rows is read. There are twice as many sequences in every case, also where there is
    nothing between, so that passes of as many users have equal shapes wherever these lie.

    Args:
        feeds: of `score_feeds`.
        first_rows: of each user, in ascending order; no user's rows reach beyond the next one's first.
    """
    starts = np.asarray(first_rows, np.int32)
    ends = starts + np.diff(feeds["cache_offsets"])
    counts = np.diff(feeds["candidate_offsets"])
    per_user: Feeds = {
        name: feeds[name].repeat(2) for name in ("request_timestamps", "scaling_seq_lens") if name in feeds
    }
    return {
        **feeds,
        **per_user,
        "candidate_offsets": offsets_of(np.column_stack([np.zeros_like(counts), counts]).ravel()),
        "cache_offsets": np.concatenate([[0], np.column_stack([starts, ends]).ravel()]).astype(np.int32),
    }


def packed_feeds(requests: Sequence[CheckedRequest], candidates: Sequence[Arrays], spec: RankingSpec) -> Feeds:
    """Feeds of `packed`: some candidates after each request's history."""
    return {
        **_history(requests, spec),
        **joined(candidates, spec.candidate_names),
        "candidate_offsets": offsets_of([part[spec.candidate_time].shape[0] for part in candidates]),
    }


def input_names(spec: RankingSpec) -> Mapping[str, set[str]]:
    """The inputs of each graph that the feeds above fill."""
    query = {"request_timestamps"} | ({"scaling_seq_lens"} if spec.scaling == "batch" else set())
    history = {*spec.history_names, *spec.contextual_names, "seq_offsets"}
    candidates = {*spec.candidate_names, "candidate_offsets"}
    return {
        "packed": history | candidates,
        "prefill": history | query | ({"num_candidates"} if spec.has_minimum else set()),
        "score": candidates | query | {"cache_offsets", *spec.cached_names()},
    }
