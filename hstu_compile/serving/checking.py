"""Refuse what an engine would answer wrongly, and pass on the rest. Level 5; no torch and no runtime.

Triton's TensorRT backend joins requests value by value and counts them by one of their features. A request with
features of unequal lengths, or of two users, moves the rows of everybody behind it in the batch, and nothing is said.
So a step in front of the engine reads and checks each request as the sessions do, with their functions and messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_compile.bundle import read_bundle
from hstu_compile.errors import RequestError
from hstu_compile.runtime.ranking_request import CheckedRequest, RankingPolicy, RankingRequest, checked_requests
from hstu_compile.runtime.ranking_spec import RankingSpec
from hstu_compile.serving.answering import TRUNCATED, Answerer, Arrays, WholeHistories, ranking_request
from hstu_compile.serving.settings import RuntimeSettings


def open_checker(folder: Path, settings: RuntimeSettings) -> Answerer[Any]:
    """What answers each request with the engine's inputs for it, and TRUNCATED; or with its error.

    Args:
        folder: holds the manifest of the engine's bundle; no other file of it is needed.
        settings: `truncation` and `unknown_ids` count.

    Raises:
        BundleError: HSTU-E803 without such a manifest.
        UsageError: HSTU-E901 for a setting that is none.
    """
    files = read_bundle(folder, check_files=False)
    if files.ranking is not None:
        return RankingChecker(files.ranking, RankingPolicy(settings.truncation, settings.unknown_ids))
    return RetrievalChecker(WholeHistories(files, settings))


class RankingChecker(Answerer[RankingRequest]):
    """Checks requests with candidates.

    A session splits candidates over passes; an engine has one. Candidates beyond the profile's would fail the batch
    that they are in, so that they are refused here.

    Args:
        spec: of the model.
        policy: what to do with histories that are too long and ids that are unknown.
    """

    def __init__(self, spec: RankingSpec, policy: RankingPolicy) -> None:
        self._spec, self._policy = spec, policy

    def _read(self, arrays: Arrays) -> RankingRequest:
        return ranking_request(arrays, self._spec)

    def _check(self, request: RankingRequest) -> None:
        self._checked([request])

    def _run(self, requests: Sequence[RankingRequest]) -> list[dict[str, NDArray[Any]]]:
        return [
            _outputs({**each.history, **each.context, **each.candidates}, each.truncated)
            for each in self._checked(requests)
        ]

    def _checked(self, requests: Sequence[RankingRequest]) -> list[CheckedRequest]:
        checked = checked_requests(requests, self._spec, self._policy)
        most = self._spec.max_candidates
        for each in checked:
            if each.num_candidates > most:
                raise RequestError(
                    "HSTU-E704",
                    f"the request has {each.num_candidates} candidates",
                    f"at most {most} fit the engine's profile",
                    "ask about them in several requests, or rebuild with more --max-candidates",
                    {"num_candidates": each.num_candidates, "max_candidates": most},
                )
        return checked

    def close(self) -> None:
        """Nothing is open."""


class RetrievalChecker(Answerer[Arrays]):
    """Checks requests for user embeddings.

    Args:
        histories: of the model.
    """

    def __init__(self, histories: WholeHistories) -> None:
        self._histories = histories

    def _read(self, arrays: Arrays) -> Arrays:
        return self._histories.read(arrays)

    def _check(self, request: Arrays) -> None:
        self._histories.typed(request)

    def _run(self, requests: Sequence[Arrays]) -> list[dict[str, NDArray[Any]]]:
        # The engine's offsets are made by Triton.
        return [
            _outputs(
                {name: array for name, array in self._histories.typed(request).items() if name in request},
                int(request[TRUNCATED]),
            )
            for request in requests
        ]

    def close(self) -> None:
        """Nothing is open."""


def _outputs(tensors: Arrays, truncated: int) -> dict[str, NDArray[Any]]:
    """With the leading axis of 1."""
    return {
        **{name: array[None] for name, array in tensors.items()},
        TRUNCATED: np.array([[truncated]], np.int32),
    }
