"""Recorded requests to calibrate with: a sample of all lengths, in batches of bounded size. Level 2.

A file is what `hstu-compile run --inputs` takes, of any number of users; an array of labels in it is left alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_compile.calibration.request_layout import Arrays, RequestLayout, request_layout
from hstu_compile.calibration.table import CalibrationData, require_distinct_files
from hstu_compile.errors import CalibrationError
from hstu_compile.model.families import ModelConfig
from hstu_compile.model.ranking_config import RankingConfig

# Rows of one batch, and numbers of its padded attention scores: 16 MiB of float32 a tensor.
_MAX_ROWS = 1 << 14
_MAX_SCORES = 1 << 22

#: Fewest requests that say anything about others.
FEWEST_REQUESTS = 2


@dataclasses.dataclass(frozen=True)
class RequestFile:
    """One file of requests: its name, the sha256 of its bytes, and its arrays as stored."""

    name: str
    sha256: str
    arrays: Mapping[str, NDArray[Any]] = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class RecordedRequests:
    """The requests of one or several files.

    Attributes:
        layout: of the arrays.
        files: names, hashes and numbers of requests, in the order of the users.
        arrays: of all users of all files.
        rows: [B] int64 -- rows of each user's sequence: contextual, events and candidates.
        batch_size: most users of a batch.
        heads: of an attention.
    """

    layout: RequestLayout
    files: tuple[tuple[str, str, int], ...]
    arrays: Arrays = dataclasses.field(repr=False)
    rows: NDArray[np.int64] = dataclasses.field(repr=False)
    batch_size: int
    heads: int

    def sample(self, count: int, seed: int) -> NDArray[np.int64]:
        """Users, the shortest first: one drawn from each of `count` equal parts of all users in order of length.

        So the lengths of the sample are spread as those of the data, whatever the draw. All users where there are no
        more than `count`.
        """
        order = np.argsort(self.rows, kind="stable")
        if count >= len(order):
            return order
        edges = np.arange(count + 1) * len(order) // count
        return order[np.random.default_rng(seed).integers(edges[:-1], edges[1:])]

    def batches(self, users: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Users cut into batches in their order: as many as stay within the bounds, at least one."""
        cuts, first, longest = [0], 0, 0
        for index, length in enumerate(self.rows[users].tolist()):
            wider, size = max(longest, length), index - first + 1
            full = size > self.batch_size or size * wider > _MAX_ROWS or size * self.heads * wider**2 > _MAX_SCORES
            if full and index > first:
                cuts.append(index)
                first, wider = index, length
            longest = wider
        return [users[start:end] for start, end in zip(cuts, [*cuts[1:], len(users)], strict=True)]

    def feeds(self, users: NDArray[np.int64]) -> Arrays:
        """Inputs of the graph for some users."""
        return self.layout.taken(self.arrays, users)

    def names(self, users: NDArray[np.int64]) -> str:
        """Where the requests of users are stored, for a message."""
        starts = np.cumsum([0, *(requests for _, _, requests in self.files)])
        named = []
        for user in users[:3].tolist():
            index = int(np.searchsorted(starts, user, side="right")) - 1
            named.append(f"{user - starts[index]} of {self.files[index][0]}")
        more = f" and {len(users) - len(named)} more" if len(users) > len(named) else ""
        return f"request{'s' if len(users) > 1 else ''} {', '.join(named)}{more}"

    def provenance(self, users: NDArray[np.int64], seed: int) -> tuple[CalibrationData, ...]:
        """What a table records of the files when it was made of these users."""
        starts = np.cumsum([0, *(requests for _, _, requests in self.files)])
        drawn = np.histogram(users, starts)[0] if len(users) else np.zeros(len(self.files), np.int64)
        return tuple(
            CalibrationData(name, sha256, requests, int(samples), seed)
            for (name, sha256, requests), samples in zip(self.files, drawn, strict=True)
        )


def recorded_requests(files: Sequence[RequestFile], config: ModelConfig) -> RecordedRequests:
    """Check files and join them.

    Args:
        files: at least one.
        config: of the model that is calibrated.

    Raises:
        CalibrationError: HSTU-E810, with every fault of every file, or if there are fewer than two requests in all;
            HSTU-E815, if two files are the same.
    """
    names: dict[str, list[str]] = {}
    for file in files:
        names.setdefault(file.sha256, []).append(file.name)
    require_distinct_files(names)
    layout = request_layout(config)
    faults = [f"{file.name}: {'; '.join(found)}" for file in files if (found := layout.faults(file.arrays))]
    if faults:
        raise CalibrationError(
            "HSTU-E810",
            f"the data are no requests to this {config.dialect} model",
            "; ".join(faults),
            f"record the inputs {', '.join([*layout.features, *layout.jagged])}, as `hstu-compile run --inputs` takes "
            "them; keep the last events of a long history, and map unknown ids as the service does",
            {"faults": faults},
        )
    typed = [layout.typed(file.arrays) for file in files]
    offsets = next(iter(layout.jagged))
    counts = [max(len(arrays[offsets]) - 1, 0) for arrays in typed]
    if sum(counts) < FEWEST_REQUESTS:
        raise CalibrationError(
            "HSTU-E810",
            "there is too little calibration data",
            f"{' and '.join(file.name for file in files)} {'has' if len(files) == 1 else 'have'} {sum(counts)} "
            f"request{'' if sum(counts) == 1 else 's'}; at least {FEWEST_REQUESTS} are needed",
            "record some hundred requests of real users",
            {"requests": sum(counts)},
        )
    arrays = layout.joined([each for each, count in zip(typed, counts, strict=True) if count])
    context = config.contextual_len if isinstance(config, RankingConfig) else 0
    rows = context + sum(np.diff(arrays[each].astype(np.int64)) for each in layout.jagged)
    # Where the divisor is that of the batch, a session scores each request as its own batch.
    alone = isinstance(config, RankingConfig) and config.scaling == "batch"
    return RecordedRequests(
        layout,
        tuple((file.name, file.sha256, count) for file, count in zip(files, counts, strict=True)),
        arrays,
        np.asarray(rows),
        1 if alone else _MAX_ROWS,
        config.layer.attention.num_heads,
    )
