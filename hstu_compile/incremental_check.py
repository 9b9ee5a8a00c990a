"""Let histories grow in a retrieval session, and compare with what the eager model answers at once. Level 4; no torch.

Every graph is checked alone elsewhere. Here they work together as they are served: the beginning of a history is
encoded and kept, the rest is encoded against it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from hstu_compile.artifacts import Feed, Precision
from hstu_compile.compare import error_bound
from hstu_compile.runtime.kv_layout import KvLayout
from hstu_compile.runtime.retrieval import RetrievalSession
from hstu_compile.runtime.retrieval_request import RetrievalRequest, RetrievalResult
from hstu_compile.runtime.retrieval_spec import RetrievalSpec
from hstu_compile.runtime.session import Session
from hstu_compile.session_check import (
    Progress,
    Reference,
    RuntimeCheck,
    Status,
    TensorCheck,
    check_served_feeds,
    tensor_error,
)

GRAPHS = ("retrieval", "prefill", "append")

# What a session is compared by.
OUTPUT = "user_embeddings"

_YEAR_S = 365 * 86400


def check_incremental(
    runtime: str,
    open_graph: Callable[[str], Session],
    files: Mapping[str, str],
    spec: RetrievalSpec,
    reference: Reference,
    precision: Precision,
    progress: Progress,
) -> RuntimeCheck:
    """Check the three graphs of a retrieval model as one session.

    Every history is answered by `retrieval` alone; then its beginning is encoded by `prefill`, the rest is added by
    `append`, and it is asked for once more. The answers are held to the bound of a graph; and the cache to what it
    should have held. Beginnings are asked for at another time than that of the event that follows them, so that a last
    row that is kept, and not encoded again, shows.

    Args:
        runtime: what runs the graphs, in case it cannot.
        open_graph: opens retrieval, prefill or append on that runtime.
        files: name of each graph's file.
        spec: of the graphs.
        reference: what the eager model answers to whole histories.
        precision: of the graphs.
        progress: called with (what, done, total).
    """
    asked = [histories_of(feed, spec) for feed in reference.feeds]
    return check_served_feeds(
        runtime,
        {graph: files[graph] for graph in GRAPHS},
        open_graph,
        lambda graphs: RetrievalSession(spec, *graphs, kv_budget_bytes=_budget(asked, spec)),
        lambda session, index: _check_feed(session, asked[index], reference, index, precision),
        len(asked),
        progress,
    )


def histories_of(feed: Feed, spec: RetrievalSpec) -> list[RetrievalRequest]:
    """The users of a `retrieval` feed as requests, each under a name of its own."""
    arrays, bounds = feed.arrays, feed.arrays["seq_offsets"]
    return [
        RetrievalRequest(
            user=user,
            events={name: arrays[name][bounds[user] : bounds[user + 1]] for name in spec.event_names},
            request_timestamp=int(arrays["request_timestamps"][user]),
        )
        for user in range(len(bounds) - 1)
    ]


def _beginnings(requests: Sequence[RetrievalRequest], spec: RetrievalSpec) -> list[RetrievalRequest]:
    """What was known of each user before as many events as possible, one, or none came."""
    earlier = []
    for place, request in enumerate(requests):
        times = request.events["timestamps"]
        added = min(len(times), (spec.max_append, 1, 0)[place % 3])
        known = len(times) - added
        asked = int(times[known - 1]) + _YEAR_S if known else request.request_timestamp
        events = {name: array[:known] for name, array in request.events.items()}
        earlier.append(RetrievalRequest(request.user, events, asked))
    return earlier


def _budget(asked: Sequence[Sequence[RetrievalRequest]], spec: RetrievalSpec) -> int:
    """Bytes that hold the users of any one feed, before and after they grow."""
    layout = KvLayout(spec.num_layers, spec.num_heads, spec.attention_dim, spec.linear_dim, spec.kv_dtype)
    lengths = [[len(request.events["timestamps"]) for request in requests] for requests in asked]
    return max(2 * sum(layout.entry_bytes(length) for length in feed) for feed in lengths)


def _check_feed(
    session: RetrievalSession,
    requests: Sequence[RetrievalRequest],
    reference: Reference,
    index: int,
    precision: Precision,
) -> list[TensorCheck]:
    """Answers and cache of one feed: at once, grown, and asked for again."""
    name, rows = reference.feeds[index].name, []
    session.clear()
    beginnings = _beginnings(requests, session.spec)
    grown = [
        "appended" if len(before.events["timestamps"]) < len(request.events["timestamps"]) else "hit"
        for before, request in zip(beginnings, requests, strict=True)
    ]
    ways = (
        ("at once", requests, ["off"] * len(requests)),
        ("beginnings", beginnings, ["miss"] * len(requests)),
        ("grown", requests, grown),
        ("again", requests, ["hit"] * len(requests)),
    )
    for way, asked, expected in ways:
        label = f"{name}, {way}"
        results = session.encode(asked, cache=way != "at once")
        if way != "beginnings":
            rows.append(_compared(label, results, reference, index, precision))
        if wrong := _wrong_cache(results, expected):
            rows.append(TensorCheck("cache", label, math.inf, 1.0, math.inf, "FAIL", wrong))
    return rows


def _compared(
    label: str, results: Sequence[RetrievalResult], reference: Reference, index: int, precision: Precision
) -> TensorCheck:
    actual = np.stack([result.user_embedding for result in results])
    error = tensor_error(OUTPUT, actual, reference.exact[index][OUTPUT])
    bound = error_bound(reference.eager_error[OUTPUT], precision)
    status: Status = "PASS" if error.error <= bound else "FAIL"
    detail = "" if status == "PASS" else f"row {error.row}"
    return TensorCheck(OUTPUT, label, error.error, bound, error.max_abs, status, detail)


def _wrong_cache(results: Sequence[RetrievalResult], expected: Sequence[str]) -> str:
    """Users whom the cache served otherwise than it should."""
    pairs = enumerate(zip(results, expected, strict=True))
    return ", ".join(
        f"user {user}: {result.cache} {result.reason}, not {wanted}"
        for user, (result, wanted) in pairs
        if result.cache != wanted
    )
