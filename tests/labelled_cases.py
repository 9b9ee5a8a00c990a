"""Labelled requests of small models, as arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from hstu_compile.calibration.batches import retrieval_batch
from hstu_compile.calibration.ranking_batches import ranking_batch
from hstu_compile.model.config import RetrievalConfig
from hstu_compile.model.ranking_config import RankingConfig

Arrays = dict[str, np.ndarray[Any, Any]]


def retrieval_arrays(config: RetrievalConfig, lengths: list[int], seed: int = 0) -> Arrays:
    """Random histories and targets."""
    arrays = retrieval_batch("labelled", config, lengths, seed).arrays
    targets = np.random.default_rng([seed, 1]).integers(1, config.num_items + 1, len(lengths), dtype=np.int32)
    return {**arrays, "target_ids": targets}


def ranking_arrays(config: RankingConfig, lengths: list[int], candidates: list[int], seed: int = 0) -> Arrays:
    """Random histories, candidates and labels of every binary task, of which the first two are of both kinds."""
    arrays = ranking_batch("labelled", config, lengths, candidates, seed).arrays
    tasks = sum(task.kind == "binary" for task in config.tasks)
    labels = np.random.default_rng([seed, 1]).integers(0, 2, (sum(candidates), tasks), dtype=np.int8)
    labels[:2] = [[0], [1]]
    return {**arrays, "labels": labels}
