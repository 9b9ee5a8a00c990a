"""Run a ranking session end to end and compare it with what the eager model answered. Level 4, without torch.

Every graph is checked alone elsewhere. Here they work together as they are served: a request's history is encoded, its
keys and values go through the cache, its candidates are split into micro-batches that several users share.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from hstu_compile.artifacts import Feed, Precision
from hstu_compile.compare import error_bound
from hstu_compile.runtime.kv_layout import KvLayout
from hstu_compile.runtime.ranking import RankingSession
from hstu_compile.runtime.ranking_request import RankingRequest, RankingResult
from hstu_compile.runtime.ranking_spec import RankingSpec
from hstu_compile.runtime.session import Session
from hstu_compile.session_check import (
    PREDICTIONS,
    Progress,
    Reference,
    RuntimeCheck,
    Status,
    TensorCheck,
    check_served_feeds,
    tensor_error,
)

GRAPHS = ("packed", "prefill", "score")


def check_m_falcon(
    runtime: str,
    open_graph: Callable[[str], Session],
    files: Mapping[str, str],
    spec: RankingSpec,
    reference: Reference,
    precision: Precision,
    progress: Progress,
) -> RuntimeCheck:
    """Check the three graphs of a ranking model as one session.

    Every feed is scored by `packed` alone, by `prefill` and `score` with an empty cache, and by `score` alone with the
    cache that this left. The predictions are held to the bound of a graph; and the cache to what it should have held.

    Args:
        runtime: what runs the graphs, in case it cannot.
        open_graph: opens packed, prefill or score on that runtime.
        files: name of each graph's file.
        spec: of the graphs.
        reference: what the eager model answers, every request being a batch of its own.
        precision: of the graphs.
        progress: called with (what, done, total).
    """
    rehearsal = _with_short_passes(spec, reference.feeds)
    asked = [requests_of(feed, rehearsal) for feed in reference.feeds]
    return check_served_feeds(
        runtime,
        {graph: files[graph] for graph in GRAPHS},
        open_graph,
        lambda graphs: RankingSession(rehearsal, *graphs, kv_budget_bytes=_budget(asked, rehearsal)),
        lambda session, index: _check_feed(session, asked[index], reference, index, precision),
        len(asked),
        progress,
    )


def requests_of(feed: Feed, spec: RankingSpec) -> list[RankingRequest]:
    """The users of a `packed` feed as requests, each under a name of its own."""
    arrays = feed.arrays
    events, candidates = arrays["seq_offsets"], arrays["candidate_offsets"]
    return [
        RankingRequest(
            user=user,
            history={name: arrays[name][events[user] : events[user + 1]] for name in spec.history_names},
            candidates={name: arrays[name][candidates[user] : candidates[user + 1]] for name in spec.candidate_names},
            context={
                each.name: arrays[each.name][user * each.max_length : (user + 1) * each.max_length]
                for each in spec.contextual
            },
        )
        for user in range(len(events) - 1)
    ]


def _with_short_passes(spec: RankingSpec, feeds: Sequence[Feed]) -> RankingSpec:
    """The spec with a micro-batch that cuts the most candidates of a request into two full passes and a short one.

    A graph takes any pass up to the micro-batch it was built for; one that no request exceeds would never be split.
    """
    most = max(int(np.diff(feed.arrays["candidate_offsets"]).max(initial=0)) for feed in feeds)
    return dataclasses.replace(spec, micro_batch=min(spec.micro_batch, max(1, (most - 1) // 2)))


def _budget(asked: Sequence[Sequence[RankingRequest]], spec: RankingSpec) -> int:
    """Bytes that hold the users of any one feed."""
    layout = KvLayout(spec.num_layers, spec.num_heads, spec.attention_dim, spec.linear_dim, spec.kv_dtype)
    events = [[len(request.history[spec.history_time]) for request in requests] for requests in asked]
    return max(sum(layout.entry_bytes(spec.contextual_len + each) for each in feed) for feed in events)


def _check_feed(
    session: RankingSession, requests: Sequence[RankingRequest], reference: Reference, index: int, precision: Precision
) -> list[TensorCheck]:
    """Predictions and cache of one feed, by every way to score it."""
    name, rows = reference.feeds[index].name, []
    session.clear()
    for way, expected in (("packed", "off"), ("cold cache", "miss"), ("warm cache", "hit")):
        before = session.stats()
        results = session.score(requests, cache=expected != "off")
        after = session.stats()
        passes = after.score_passes - before.score_passes + after.packed_passes - before.packed_passes
        label = f"{name}, {way}, passes: {passes}"
        rows += [_compared(output, label, results, reference, index, precision) for output in PREDICTIONS]
        if wrong := _wrong_cache(results, expected):
            rows.append(TensorCheck("cache", label, math.inf, 1.0, math.inf, "FAIL", wrong))
    return rows


def _compared(
    output: str, label: str, results: Sequence[RankingResult], reference: Reference, index: int, precision: Precision
) -> TensorCheck:
    # One column of all users' candidates, as in a packed forward: a prediction has no scale of its own.
    actual = np.concatenate([getattr(result, output) for result in results])
    error = tensor_error(output, actual, reference.exact[index][output])
    bound = error_bound(reference.eager_error[output], precision)
    status: Status = "PASS" if error.error <= bound else "FAIL"
    detail = "" if status == "PASS" else f"task {error.row}"
    return TensorCheck(output, label, error.error, bound, error.max_abs, status, detail)


def _wrong_cache(results: Sequence[RankingResult], expected: str) -> str:
    """Users whom the cache served otherwise than it should; nobody looks up a user who has no candidates."""
    wrong = {
        user: result.cache for user, result in enumerate(results) if len(result.preds) and result.cache != expected
    }
    return ", ".join(f"user {user}: {found}, not {expected}" for user, found in wrong.items())
