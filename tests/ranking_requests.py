"""Ranking requests from a seed. Needs numpy only: benchmark machines import it too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hstu_compile.runtime.ranking_request import RankingRequest
from hstu_compile.runtime.ranking_spec import IdFeature, RankingSpec

# Histories lie before this second, queries within as many after it.
NOW = 200_000


def values_of(feature: IdFeature, spec: RankingSpec, count: int, rng: np.random.Generator, lowest: int = 0) -> Any:
    """Ids of a feature, or rows where its table is outside the graph."""
    if feature.external_dim is None:
        return rng.integers(lowest, feature.table_size, count)
    return rng.normal(0, 1, (count, feature.external_dim)).astype(spec.row_dtype)


def history_of(spec: RankingSpec, events: int, rng: np.random.Generator) -> dict[str, Any]:
    """A history in ascending time."""
    history = {feature.name: values_of(feature, spec, events, rng) for feature in spec.history_ids}
    history[spec.history_time] = np.sort(rng.integers(0, NOW, events))
    if spec.history_action is not None:
        history[spec.history_action] = rng.integers(0, 8, events)
    return history


def candidates_of(spec: RankingSpec, count: int, rng: np.random.Generator) -> dict[str, Any]:
    """Candidates with query times of their own."""
    candidates = {feature.name: values_of(feature, spec, count, rng) for feature in spec.candidate_ids}
    return {**candidates, spec.candidate_time: rng.integers(NOW, 2 * NOW, count)}


def context_of(spec: RankingSpec, rng: np.random.Generator) -> dict[str, Any]:
    """Contextual values, some absent."""
    return {slot.name: values_of(slot, spec, slot.max_length, rng, lowest=-1) for slot in spec.contextual}


def request_of(
    spec: RankingSpec, user: int | str, events: int, candidates: int, seed: int | Sequence[int] = 0
) -> RankingRequest:
    """A legal request; everything in it but the lengths comes from the seed."""
    rng = np.random.default_rng([*(seed if isinstance(seed, Sequence) else [seed]), events, candidates])
    return RankingRequest(
        user, history_of(spec, events, rng), candidates_of(spec, candidates, rng), context_of(spec, rng)
    )
