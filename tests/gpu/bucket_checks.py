"""What must hold for ranking sessions in buckets: mixed requests are answered as at exact shapes, whatever was evicted.

NumPy alone, as `graph_checks`. One session pads every pass to a bucket and replays a CUDA graph of it; the other
answers every request once, alone, at its own shapes, and records none. A set of shapes that is new costs TensorRT-RTX
up to a second, so requests have few sizes, and are mixed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence

import numpy as np
from checks import Checks
from ranking_checks import Open, PreparedBundle, difference, ranking_session

from hstu_compile.runtime.ladder import Buckets, Ladder
from hstu_compile.runtime.ranking import RankingSession
from hstu_compile.runtime.ranking_request import RankingRequest, RankingResult
from hstu_compile.runtime.ranking_spec import RankingSpec
from tests.ranking_requests import request_of

#: Far apart, so that nearly every pass is padded; more combinations than each graph of a bundle keeps CUDA graphs.
BUCKETS = Buckets(events=Ladder((32, 128, 512, 2048)), candidates=Ladder((3, 16, 64)), sequences=Ladder((1, 3, 8)))
USERS = 300
#: (events, candidates) that a user may have.
SIZES = 40
#: Full histories that the cache holds: fewer than there are users.
CACHED_USERS = 8
#: Of a call; most calls have one alone.
MOST_AT_ONCE = 4
#: Share of calls that are answered without the cache.
PACKED_SHARE = 0.3
#: What the comparison must notice: every answer a tenth too small.
TOO_SMALL = 0.9
#: Calls from one line of progress to the next.
_PROGRESS = 500


@dataclasses.dataclass(frozen=True)
class Call:
    """Requests that are made together, and how."""

    requests: tuple[RankingRequest, ...]
    is_packed: bool

    def answered(self, session: RankingSession) -> list[RankingResult]:
        """By either way of scoring."""
        return (session.score_packed if self.is_packed else session.score)(self.requests)


def mixed_calls(spec: RankingSpec, count: int) -> Iterator[Call]:
    """Calls of `count` requests in all: users come back, of lengths from none to the longest, few of them often."""
    rng = np.random.default_rng(count)
    # Squared: many short histories, some of every length.
    events = np.rint(spec.max_history_len * np.linspace(0, 1, SIZES) ** 2).astype(int)
    candidates = rng.integers(0, spec.max_candidates + 1, SIZES)
    sizes = rng.integers(0, SIZES, USERS)
    while count > 0:
        size = 1 if rng.uniform() < 0.5 else int(rng.integers(1, MOST_AT_ONCE + 1))
        size = min(size, spec.max_batch, count)
        users = np.minimum(rng.geometric(8 / USERS, size) - 1, USERS - 1)
        # A user is asked for once in a call: a cache entry has one owner at a time.
        users = np.unique(users)
        count -= len(users)
        requests = tuple(
            request_of(spec, f"user {user}", events[sizes[user]], candidates[sizes[user]], seed=user) for user in users
        )
        yield Call(requests, bool(rng.uniform() < PACKED_SHARE))


def check_buckets(
    checks: Checks, bundle: PreparedBundle, exact: Open, bucketed: Open, count: int, *, records: bool
) -> None:
    """`count` mixed requests in buckets and at exact shapes.

    Args:
        checks: takes the result.
        bundle: of the graphs.
        exact: opens a graph's session without buckets; it answers each request alone.
        bucketed: opens it with `BUCKETS`.
        count: requests.
        records: the bucketed sessions keep CUDA graphs, fewer than there are buckets.
    """
    with (
        checks.check(f"{bundle.name}: {count} mixed requests in buckets are answered as at exact shapes") as check,
        ranking_session(bundle.spec, exact, CACHED_USERS) as expected,
        ranking_session(bundle.spec, bucketed, CACHED_USERS) as session,
    ):
        worst, notices, alone, seconds = 0.0, True, _Alone(expected), 0.0
        for number, call in enumerate(mixed_calls(bundle.spec, count)):
            wanted, started = alone.answered(call), time.perf_counter()
            found = call.answered(session)
            seconds += time.perf_counter() - started
            if number % _PROGRESS == 0:
                print(f"{number} calls in {seconds:.1f} s", flush=True)
            if any(len(each.logits) for each in wanted):
                worst = max(worst, difference(found, wanted))
                notices &= difference(_scaled(found, TOO_SMALL), wanted) > bundle.bound
        stats = session.stats()
        passes = {name: sum(each.passes.values()) for name, each in stats.buckets.items()}
        check.facts |= {
            "difference": worst,
            "bound": bundle.bound,
            "a_tenth_less_is_noticed": notices,
            "seconds_in_buckets": seconds,
            "passes_in_buckets": passes,
            "buckets": {name: len(each.passes) for name, each in stats.buckets.items()},
            "passes_at_exact_shapes": {name: each.exact for name, each in stats.buckets.items()},
            "added_rows": {name: each.added_rows for name, each in stats.buckets.items()},
            "cache": stats.cache,
            "graphs": stats.graphs,
        }
        graphs = stats.graphs
        turned_over = not records or (
            graphs is not None and graphs.replays > 0 and graphs.evictions > 0 and not graphs.failures
        )
        check.passed = (
            worst <= bundle.bound
            and notices
            and min(passes.values()) > 0
            and min(stats.cache.hits, stats.cache.misses, stats.cache.evictions) > 0
            and turned_over
        )


class _Alone:
    """What a session answers to every request of a call alone; each is asked about once, packed and not."""

    def __init__(self, session: RankingSession) -> None:
        self._session = session
        self._known: dict[tuple[str | int, bool], RankingResult] = {}

    def answered(self, call: Call) -> list[RankingResult]:
        return [self._answer(request, call.is_packed) for request in call.requests]

    def _answer(self, request: RankingRequest, is_packed: bool) -> RankingResult:
        key = request.user, is_packed
        if key not in self._known:
            (self._known[key],) = Call((request,), is_packed).answered(self._session)
        return self._known[key]


def _scaled(results: Sequence[RankingResult], factor: float) -> list[RankingResult]:
    return [dataclasses.replace(each, logits=each.logits * np.float32(factor)) for each in results]
