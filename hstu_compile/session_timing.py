"""How long a session takes for a request, as it is and by replays of a CUDA graph, and what runs meanwhile. Level 4."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

from hstu_compile.artifacts import Feed
from hstu_compile.errors import EngineError
from hstu_compile.kernel_timeline import WARM_UP_CALLS, Event, timeline_rows
from hstu_compile.runtime.session import Session

#: Calls in front of those that are measured take this long together, and are `WARM_UP_CALLS` at least.
WARM_UP_MS = 60
Way = Literal["plain", "replayed"]
#: Records the device's events of some calls, see `kernel_timeline.traced`.
Tracer = Callable[[Callable[[], Any], Callable[[], Any]], list[list[Event]]]


@dataclasses.dataclass(frozen=True)
class Latency:
    """Whole calls, from host arrays to host arrays.

    Attributes:
        calls: that were measured.
        median_ms: of them.
        p90_ms: 90th percentile.
    """

    calls: int
    median_ms: float
    p90_ms: float


@dataclasses.dataclass(frozen=True)
class Timeline:
    """What a call runs on the GPU, copies from and to the host included.

    Attributes:
        calls: that were traced; times are medians over those with the usual number of launches.
        kernels: name, kind, launches, us and share of the span of each, in the order of their first launch.
        launches: of all together.
        gaps_us: in which nothing ran.
        gaps_share: of the span.
        span_us: from the beginning of the first to the end of the last.
    """

    calls: int
    kernels: tuple[dict[str, Any], ...]
    launches: int
    gaps_us: float
    gaps_share: float
    span_us: float


@dataclasses.dataclass(frozen=True)
class RequestTiming:
    """What was measured of one request.

    Attributes:
        way: plain, or replayed by a CUDA graph.
        session: runtime and version.
        latency: None if a replay was wanted and there was none.
        timeline: None likewise, or without a tracer.
        reason: why there is no latency.
        warnings: what the session warned of meanwhile.
    """

    way: Way
    session: str
    latency: Latency | None = None
    timeline: Timeline | None = None
    reason: str | None = None
    warnings: tuple[str, ...] = ()


def time_request(session: Session, feed: Feed, way: Way, num_calls: int, trace: Tracer | None) -> RequestTiming:
    """Measure whole calls, then trace some.

    Args:
        session: opened with CUDA graphs if `way` is replayed, without if it is plain.
        feed: the request; no other is run meanwhile.
        way: how the session answers it.
        num_calls: calls that are measured, at least 1.
        trace: records timelines; None leaves them out.

    Raises:
        EngineError: HSTU-E406 if the tracer saw nothing.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        _warm_up(session, feed)
        replays = _replays(session)
        latency = _latency(session, feed, num_calls)
        replays = _replays(session) - replays
    said = tuple(dict.fromkeys(str(each.message) for each in caught))
    if replays != (num_calls if way == "replayed" else 0):
        reason = f"{replays} of {num_calls} calls were replays of a CUDA graph"
        return RequestTiming(way, session.name, reason="; ".join((reason, *said)), warnings=said)
    timeline = None if trace is None else _timeline(session, feed, trace)
    return RequestTiming(way, session.name, latency, timeline, warnings=said)


def _warm_up(session: Session, feed: Feed) -> None:
    """Call until nothing happens for the first time."""
    # A pass is recorded when it comes a second time; its graph is compared with another pass when it is first launched.
    start, calls = time.perf_counter(), 0
    while calls < WARM_UP_CALLS or 1e3 * (time.perf_counter() - start) < WARM_UP_MS:
        session.run(feed.arrays)
        calls += 1


def _replays(session: Session) -> int:
    stats = session.graph_stats
    return 0 if stats is None else stats.replays


def _latency(session: Session, feed: Feed, num_calls: int) -> Latency:
    samples = []
    for _ in range(num_calls):
        started = time.perf_counter()
        session.run(feed.arrays)
        samples.append(1e3 * (time.perf_counter() - started))
    return latency_of(samples)


def latency_of(samples_ms: Sequence[float]) -> Latency:
    """Median and 90th percentile of calls, at least one."""
    ordered = sorted(samples_ms)
    return Latency(len(ordered), statistics.median(ordered), ordered[math.ceil(0.9 * len(ordered)) - 1])


def _timeline(session: Session, feed: Feed, trace: Tracer) -> Timeline:
    # The session waits for its own stream: there is nothing left to wait for.
    calls = trace(lambda: session.run(feed.arrays), lambda: None)
    try:
        *kernels, gaps, span = timeline_rows(calls)
    except ValueError as error:
        raise EngineError(
            "HSTU-E406",
            f"no kernel of {session.name} was traced",
            str(error),
            "let no other profiler watch this process, or pass --no-timeline",
        ) from error
    kept = ("kernel", "kind", "launches", "us", "share")
    return Timeline(
        calls=len(calls),
        kernels=tuple({key: row[key] for key in kept} for row in kernels),
        launches=span["launches"],
        gaps_us=gaps["us"],
        gaps_share=gaps["share"],
        span_us=span["us"],
    )
