"""How candidates are split over passes of the packed graph. Pure arithmetic; private to the ranking runtime."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from hstu_compile.errors import RequestError
from hstu_compile.runtime._ranking_feeds import counted_events
from hstu_compile.runtime.ranking_request import CheckedRequest
from hstu_compile.runtime.ranking_spec import RankingSpec


@dataclasses.dataclass(frozen=True, eq=False)
class PackedPart:
    """Some candidates of one request.

    Attributes:
        sequence: index of the request.
        taken: indices of the candidates in the pass: start .. stop - 1, then the anchor where it is needed.
        start: first candidate whose answer counts.
        stop: one after the last.
    """

    sequence: int
    taken: NDArray[np.intp]
    start: int
    stop: int


def packed_passes(requests: Sequence[CheckedRequest], spec: RankingSpec) -> list[list[PackedPart]]:
    """Passes of at most `max_batch` parts, in the order of the requests, each of which has candidates.

    With `scaling` "batch" every part is a pass of its own, because the graph takes its divisor from the whole pass.

    Raises:
        RequestError: HSTU-E704 if a request has to be split and no split gives its answer.
    """
    parts = [part for index, request in enumerate(requests) for part in _parts(index, request, spec)]
    size = 1 if spec.scaling == "batch" else spec.max_batch
    return [parts[start : start + size] for start in range(0, len(parts), size)]


def _parts(index: int, request: CheckedRequest, spec: RankingSpec) -> Iterator[PackedPart]:
    total = request.num_candidates
    if total <= spec.max_candidates:
        yield PackedPart(index, np.arange(total), 0, total)
        return
    if spec.scaling == "batch":
        raise _cannot_split(request, spec, "the divisor counts the candidates of a pass")
    if counted_events(request, total, spec) != counted_events(request, spec.max_candidates, spec):
        why = "with fewer candidates a contextual feature counts the history as too short"
        raise _cannot_split(request, spec, why)
    times = request.candidates[spec.candidate_time]
    anchor = np.full(int((times != times[-1]).any()), total - 1)
    step = spec.max_candidates - anchor.size
    if not step:
        raise _cannot_split(request, spec, "the anchor, which is the last candidate, leaves no room for another")
    for start in range(0, total, step):
        stop = min(start + step, total)
        # The last part is as long as the others, for what counts candidates.
        first = stop - step
        kept = np.arange(first, stop)
        yield PackedPart(index, np.concatenate([kept, anchor]), first, stop)


def _cannot_split(request: CheckedRequest, spec: RankingSpec, why: str) -> RequestError:
    return RequestError(
        "HSTU-E704",
        f"the {request.num_candidates} candidates of user {request.user!r} do not fit one packed pass",
        f"at most {spec.max_candidates} fit, and a split would change the scores: {why}",
        "score with a cache that holds the user, which splits exactly (a bundle built with --m-falcon, and enough "
        "kv_budget_bytes), or rebuild with more --max-candidates",
        {"user": request.user, "num_candidates": request.num_candidates, "max_candidates": spec.max_candidates},
    )
