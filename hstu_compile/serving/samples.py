"""Requests that a model takes, for warm-up, clients and load: random, of mixed lengths. Level 5; no torch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_compile.bundle import BundleFiles
from hstu_compile.runtime.ranking_spec import IdFeature, RankingSpec
from hstu_compile.runtime.request import RequestLimits
from hstu_compile.serving.tensors import longest_history

Sample = dict[str, NDArray[Any]]

_EPOCH = 1_700_000_000
_MINUTE = 60


def sample_requests(files: BundleFiles, count: int, seed: int = 0) -> list[Sample]:
    """Legal requests of one user each, each the same for the same seed and place.

    The first has one event, the second as many as the model takes; the others as histories are, many short and few
    long. A ranking model's requests have between one candidate and half of what a forward takes.

    Args:
        files: the bundle.
        count: of requests.
        seed: of the ids and lengths.

    Returns:
        For each request, input name to array, without the batch axis.
    """
    longest = longest_history(files)
    samples = []
    for index in range(count):
        # A request of its own seed: it is the same, however many are asked for.
        rng = np.random.default_rng([seed, index])
        drawn = int(np.exp(rng.uniform(0, np.log(longest))))
        length = {0: 1, 1: longest}.get(index, drawn)
        if files.ranking is not None:
            samples.append(_ranking(files.ranking, length, rng))
        else:
            samples.append(_retrieval(files.limits, length, rng))
    return samples


def _retrieval(limits: RequestLimits, length: int, rng: np.random.Generator) -> Sample:
    times = _times(length, rng)
    sample: Sample = {
        "item_ids": rng.integers(1, limits.num_items + 1, length, dtype=np.int32),
        "timestamps": times,
        "request_timestamps": times[-1:] + _MINUTE,
    }
    if limits.num_ratings:
        sample["ratings"] = rng.integers(0, limits.num_ratings, length, dtype=np.int32)
    return sample


def _ranking(spec: RankingSpec, length: int, rng: np.random.Generator) -> Sample:
    times = _times(length, rng)
    candidates = int(rng.integers(1, max(1, spec.max_candidates // 2) + 1))
    sample: Sample = {each.name: _ids(each, length, spec, rng) for each in spec.history_ids}
    sample[spec.history_time] = times
    if spec.history_action is not None:
        sample[spec.history_action] = np.ones(length, np.int32)
    sample |= {each.name: _ids(each, each.max_length, spec, rng) for each in spec.contextual}
    sample |= {each.name: _ids(each, candidates, spec, rng) for each in spec.candidate_ids}
    sample[spec.candidate_time] = np.full(candidates, times[-1] + _MINUTE)
    return sample


def _ids(feature: IdFeature, length: int, spec: RankingSpec, rng: np.random.Generator) -> NDArray[Any]:
    if feature.external_dim is not None:
        return rng.normal(size=(length, feature.external_dim)).astype(spec.row_dtype)
    return rng.integers(0, feature.table_size, length, dtype=np.int32)


def _times(length: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Ascending, between seconds and days apart."""
    gaps = np.exp(rng.uniform(0, np.log(86_400), length)).astype(np.int64)
    return np.asarray(_EPOCH + np.cumsum(gaps), np.int64)
