"""What must hold for CUDA graphs of ranking engines: a replay is a plain run, to the bit, whatever came before.

NumPy alone, so that it runs beside TensorRT 8.5. Two sessions answer every request, one with graphs and one without.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from checks import Checks
from ranking_checks import Open, PreparedBundle, ranking_session, same_bits

from hstu_compile.runtime.graph_cache import GraphStats
from hstu_compile.runtime.ranking import RankingSession
from hstu_compile.runtime.ranking_request import RankingRequest, RankingResult
from hstu_compile.runtime.ranking_spec import RankingSpec
from tests.ranking_requests import request_of

#: Graphs per engine, fewer than there are shapes.
GRAPHS = 4
THREADS = 4
#: A plain run, one that is recorded, a replay that is compared, and replays that are not.
_ROUNDS = 5
_MIB = 2.0**20


def shapes_of(spec: RankingSpec) -> list[tuple[int, int]]:
    """(events, candidates) of requests: more than a pass has graphs, from the smallest to the largest."""
    most, cap = spec.max_history_len, spec.max_candidates
    micro = min(spec.micro_batch, cap)
    shapes = [
        (most, micro),
        (most, cap),
        (most // 2, micro),
        (1, 1),
        (7, max(1, micro // 2)),
        (0, micro),
        (most // 3, 3),
    ]
    return list(dict.fromkeys(shapes))


def _requests(spec: RankingSpec, shapes: Sequence[tuple[int, int]], label: str) -> Iterator[RankingRequest]:
    """A user with new data for each shape in turn."""
    for number, (events, candidates) in enumerate(shapes):
        yield request_of(spec, f"{label} {number}", events, candidates, seed=number)


def _answers(session: RankingSession, request: RankingRequest) -> list[RankingResult]:
    """Cold, warm, and without the cache."""
    return [*session.score([request]), *session.score([request]), *session.score_packed([request])]


def _difference(one: GraphStats, other: GraphStats) -> dict[str, int]:
    names = ("captures", "replays", "evictions", "failures")
    return {name: getattr(one, name) - getattr(other, name) for name in names}


def check_graphs(
    checks: Checks,
    bundle: PreparedBundle,
    plain: Open,
    recorded: Open,
    free_bytes: Callable[[], int],
    thread_seconds: float = 20.0,
) -> None:
    """Replays equal plain runs: over changing data, interleaved shapes, after evictions, from several threads.

    Args:
        checks: takes the results.
        bundle: of the engines.
        plain: opens a graph's session without CUDA graphs.
        recorded: opens it with `GRAPHS` of them.
        free_bytes: free device memory.
        thread_seconds: of requests from several threads; recordings beside other sessions' passes once crashed within
            a minute, and not in every run (results/graph_recording.csv).
    """
    spec, shapes = bundle.spec, shapes_of(bundle.spec)
    usual = [shapes[0]] * (2 * _ROUNDS)
    orders = {
        "equal shapes, new data": usual,
        "three shapes in turn": [*itertools.islice(itertools.cycle(shapes[:3]), 3 * _ROUNDS)],
        "more shapes than graphs, twice": [shape for shape in (*shapes, *shapes) for _ in range(_ROUNDS)],
        "the first shape again": usual,
    }
    with (
        checks.check(f"{bundle.name}: sessions with and without CUDA graphs") as opened,
        ranking_session(spec, plain, 4) as expected,
        ranking_session(spec, recorded, 4) as session,
        warnings.catch_warnings(record=True) as warned,
    ):
        warnings.simplefilter("always")
        for label, order in orders.items():
            with checks.check(f"{bundle.name}, CUDA graphs, {label}: to the bit as without") as check:
                before, free = session.stats().graphs, free_bytes()
                same = [
                    same_bits(_answers(session, request), _answers(expected, request))
                    for request in _requests(spec, order, label)
                ]
                counts = _difference(session.stats().graphs, before)
                check.facts |= counts | {"requests": len(same), "device_mib": (free - free_bytes()) / _MIB}
                check.facts["kept"] = session.stats().graphs.kept
                turned_over = len(set(order)) <= GRAPHS or counts["evictions"] > 0
                check.passed = all(same) and counts["replays"] > 0 and not counts["failures"] and turned_over
        with checks.check(f"{bundle.name}, CUDA graphs, {THREADS} threads: to the bit as without") as check:
            order = [*itertools.islice(itertools.cycle(shapes[:3]), 3 * THREADS * _ROUNDS)]
            order += [shape for shape in shapes for _ in range(_ROUNDS)]
            requests = list(_requests(spec, order, "thread"))
            wanted = [_answers(expected, request) for request in requests]
            before, same, started = session.stats().graphs, list[bool](), time.monotonic()
            with ThreadPoolExecutor(THREADS) as pool:
                while not same or time.monotonic() - started < thread_seconds:
                    found = pool.map(lambda request: _answers(session, request), requests)
                    same += [same_bits(one, other) for one, other in zip(found, wanted, strict=True)]
            counts = _difference(session.stats().graphs, before)
            check.facts |= counts | {"requests": len(same)}
            turned_over = len(shapes) <= GRAPHS or counts["evictions"] > 0
            check.passed = all(same) and counts["replays"] > 0 and not counts["failures"] and turned_over
        opened.facts |= {"graphs": session.stats().graphs, "warnings": [str(each.message) for each in warned]}
        opened.passed = not warned
