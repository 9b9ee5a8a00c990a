"""Run one artifact on one runtime and compare it with what the eager model answered. Level 3, without torch.

Input: a session and a `Reference`. Output: a `RuntimeCheck`; `report_of` sums several up to a `VerifyReport`.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Literal, Protocol, TypeVar

import numpy as np

from hstu_compile.artifacts import TAP_PREFIX, Feed, Precision, is_tap
from hstu_compile.compare import (
    Array,
    RowError,
    bound_rule,
    error_bound,
    row_error,
    row_errors,
    top_items_problem,
    whole_error,
)
from hstu_compile.config import Quantization
from hstu_compile.errors import HstuCompileError, VerifyError
from hstu_compile.metrics import kendall_tau, top_k_overlap
from hstu_compile.runtime.session import Session

Status = Literal["PASS", "FAIL", "NOT RUN"]
Outputs = dict[str, Array]
Progress = Callable[[str, int, int], None]

# Outputs with one number per candidate and task: [T, tasks].
PREDICTIONS = ("preds", "logits")

# How a check calls ONNX Runtime over the segments of a graph that was cut at its attentions.
SEGMENTS = "onnxruntime, in segments"

# Stands for a graph's name where graphs are checked together, as a session runs them.
SESSION = "session"

_Opened = TypeVar("_Opened", bound=AbstractContextManager[Any])
_Served = TypeVar("_Served", bound="_Serving")

# No artifact passes by bounds that an output of this share of the right one would keep as well.
_WRONG_SCALE = 0.9

_TOP = 10
_TIMED_RUNS = 7
_TIMING_SECONDS = 3.0


@dataclasses.dataclass(frozen=True)
class ItemVectors:
    """What user embeddings are ranked by, in float64, some rows at a time: all of them would be twice the item table.

    Attributes:
        count: V.
        longest: largest length of a vector.
        parts: gives the vectors anew, [n, D] each, V rows in all.
    """

    count: int
    longest: float
    parts: Callable[[], Iterable[Array]] = dataclasses.field(repr=False)

    @classmethod
    def of(cls, parts: Callable[[], Iterable[Array]]) -> ItemVectors:
        """Look through the vectors once."""
        sizes = [(len(part), float(np.linalg.norm(part, axis=1).max(initial=0.0))) for part in parts()]
        return cls(sum(count for count, _ in sizes), max((longest for _, longest in sizes), default=0.0), parts)

    def scores(self, users: Array) -> Array:
        """[B, V] float64: users [B, D] times every vector."""
        return np.concatenate([users @ part.T for part in self.parts()], axis=1)


@dataclasses.dataclass(frozen=True)
class Reference:
    """What the eager model answers, per feed.

    Attributes:
        graph: name of the graph.
        primary: the output that stands for the graph in a summary.
        feeds: the requests.
        exact: float64 outputs.
        eager: outputs of the eager model in the build's precision.
        eager_error: largest row error of each eager tensor over all feeds.
        item_vectors: to rank with; None where only stored outputs are compared.
        eager_whole_error: `whole_error` of each eager tensor of a quantised model; None where nothing is quantised.
    """

    graph: str
    primary: str
    feeds: tuple[Feed, ...]
    exact: tuple[Outputs, ...] = dataclasses.field(repr=False)
    eager: tuple[Outputs, ...] = dataclasses.field(repr=False)
    eager_error: dict[str, float]
    item_vectors: ItemVectors | None = dataclasses.field(repr=False)
    eager_whole_error: dict[str, float] | None = None


@dataclasses.dataclass(frozen=True)
class TensorCheck:
    """One tensor of one feed."""

    tensor: str
    feed: str
    error: float
    bound: float
    max_abs: float
    status: Status
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class LayerCheck:
    """Residual stream after one layer, worst over all feeds; layer 0 is the input."""

    layer: int
    error: float
    eager_error: float


@dataclasses.dataclass(frozen=True)
class RuntimeCheck:
    """One artifact on one runtime."""

    runtime: str
    artifact: str
    status: Status
    reason: str | None
    tensors: tuple[TensorCheck, ...] = ()
    layers: tuple[LayerCheck, ...] = ()
    ranking: dict[str, float] | None = None
    timing: dict[str, Any] | None = None


def _finite_or_none(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite_or_none(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite_or_none(each) for each in value]
    return value


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """The verdict: PASS only if at least one artifact ran and none that ran failed.

    Attributes:
        status: PASS or FAIL.
        rule: the bound in words.
        worst_error: error of the tensor nearest to, or farthest beyond, its bound.
        worst_bound: that bound.
        worst_where: tensor, feed, runtime and artifact.
        eager_error: of the eager model's primary output in the build's precision.
        feeds: name and size of every feed.
        runs: one per artifact and runtime.
    """

    status: Status
    rule: str
    worst_error: float
    worst_bound: float
    worst_where: str
    eager_error: float
    feeds: tuple[dict[str, Any], ...]
    runs: tuple[RuntimeCheck, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON form for report.json and the manifest; JSON has no infinity, so an infinite error is null."""
        facts = {
            "bound_rule": self.rule,
            "worst_error": self.worst_error,
            "worst_bound": self.worst_bound,
            "worst_where": self.worst_where,
            "eager_error": self.eager_error,
            "feeds": list(self.feeds),
            "runs": [dataclasses.asdict(run) for run in self.runs],
        }
        return {name: _finite_or_none(value) for name, value in facts.items()}


def tensor_error(name: str, actual: Array, reference: Array) -> RowError:
    """`row_error` of one named tensor.

    A prediction is one number and may be near zero, so it has no scale of its own: its row is the task's column.
    """
    if name in PREDICTIONS and actual.ndim == 2 and reference.ndim == 2:
        return row_error(actual.T, reference.T)
    return row_error(actual, reference)


def _seen(feed: Feed, num_items: int) -> Array:
    owner = np.repeat(np.arange(len(feed.lengths)), feed.lengths)
    seen = np.zeros((len(feed.lengths), num_items + 1), bool)
    seen[owner, feed.arrays["item_ids"].clip(0, num_items)] = True
    if "cached_item_ids" in feed.arrays:
        owner = np.repeat(np.arange(len(feed.lengths)), np.diff(feed.arrays["cache_offsets"]))
        seen[owner, feed.arrays["cached_item_ids"].clip(0, num_items)] = True
    return seen[:, 1:]


def _check_top_items(reference: Reference, index: int, outputs: Outputs, bound: float) -> TensorCheck:
    feed, items = reference.feeds[index], reference.item_vectors
    assert items is not None
    users = reference.exact[index]["user_embeddings"]
    scores = items.scores(users)
    # |<du, item>| <= |du| * |item|, and the user embedding's own bound limits |du| to bound * |u|.
    reach = np.linalg.norm(users, axis=1).max(initial=0.0) * items.longest
    tolerance = float(bound * reach)
    seen = _seen(feed, items.count)
    problem = top_items_problem(outputs["top_items"], outputs["top_scores"], scores, seen, tolerance)
    worst = _worst_score_gap(outputs["top_items"], outputs["top_scores"], scores)
    relative = worst / reach if reach else 0.0
    return TensorCheck("top_items", feed.name, relative, bound, worst, "FAIL" if problem else "PASS", problem or "")


def _worst_score_gap(ids: Array, top_scores: Array, scores: Array) -> float:
    """Largest difference of a listed score; infinite where the list cannot be looked up in `scores` [B, V]."""
    if ids.shape != top_scores.shape or len(ids) != len(scores) or ids.max(initial=0) > scores.shape[1]:
        return math.inf
    gap = np.abs(top_scores - np.take_along_axis(scores, ids.clip(1) - 1, 1))
    worst = float(np.where(ids > 0, gap, 0.0).max(initial=0.0))
    return worst if math.isfinite(worst) else math.inf


def _ranking(reference: Reference, index: int, outputs: Outputs) -> dict[str, float] | None:
    """Rank agreement on one feed; None where the outputs give no order."""
    items, users = reference.item_vectors, outputs["user_embeddings"]
    assert items is not None
    expected = reference.exact[index]["user_embeddings"]
    if users.shape != expected.shape or not np.isfinite(users).all():
        return None
    exact, actual = items.scores(expected), items.scores(users.astype(np.float64))
    # Where all items score the same there is no order: of an empty history, and in a vocabulary of one item.
    rows = np.flatnonzero(np.ptp(exact, axis=1) > 0)
    if not rows.size:
        return None
    top = min(_TOP, items.count)
    best = [np.argsort(-scores, axis=1, kind="stable")[:, :top] + 1 for scores in (exact, actual)]
    # Answers without an order agree with none.
    taus = [kendall_tau(exact[row], actual[row]) if np.ptp(actual[row]) > 0 else 0.0 for row in rows[:4]]
    return {
        "top10_overlap": top_k_overlap(best[0][rows], best[1][rows], top),
        "kendall_tau": float(statistics.fmean(taus)),
    }


def _time(session: Session, feed: Feed, label: str) -> dict[str, Any]:
    samples: list[float] = []
    while len(samples) < _TIMED_RUNS and sum(samples) < 1e3 * _TIMING_SECONDS:
        started = time.perf_counter()
        session.run(feed.arrays)
        samples.append(1e3 * (time.perf_counter() - started))
    samples.sort()
    return {
        "name": label,
        "batch": len(feed.lengths),
        "events": int(feed.lengths.sum()),
        "median_ms": statistics.median(samples),
        "p90_ms": samples[math.ceil(0.9 * len(samples)) - 1],
        "note": f"{len(samples)} runs on this machine, host copies included",
    }


def check_session(
    session: Session, artifact: str, reference: Reference, precision: Precision, progress: Progress
) -> RuntimeCheck:
    """Run every feed and compare every output, and every layer that the session exposes.

    An output whose bound is too wide to tell it from 0.9 of it fails too: then the eager model is so far off in this
    precision that a comparison with it shows nothing.
    """
    outputs: list[Outputs] = []
    for index, feed in enumerate(reference.feeds):
        progress(session.name, index, len(reference.feeds))
        outputs.append(session.run(feed.arrays))
    progress(session.name, len(reference.feeds), len(reference.feeds))
    bounds = {name: error_bound(error, precision) for name, error in reference.eager_error.items()}
    checks: list[TensorCheck] = []
    layers: dict[int, float] = {}
    for index, (feed, actual) in enumerate(zip(reference.feeds, outputs, strict=True)):
        for name in (n for n in reference.exact[index] if not is_tap(n) and n not in actual):
            checks.append(
                TensorCheck(name, feed.name, math.inf, 1.0, math.inf, "FAIL", "the artifact has no such output")
            )
        for name in (n for n in actual if n in bounds):
            error = tensor_error(name, actual[name], reference.exact[index][name])
            status: Status = "PASS" if error.error <= bounds[name] else "FAIL"
            if name.startswith(TAP_PREFIX):
                layer = int(name.removeprefix(TAP_PREFIX))
                layers[layer] = max(layers.get(layer, 0.0), error.error)
                if status == "PASS":
                    continue
            detail = "" if status == "PASS" else f"row {error.row}"
            checks.append(TensorCheck(name, feed.name, error.error, bounds[name], error.max_abs, status, detail))
        if "top_items" in actual and reference.item_vectors is not None:
            checks.append(_check_top_items(reference, index, actual, bounds["user_embeddings"]))
    checks += _check_whole(reference, outputs, precision)
    checks += _check_bounds(reference, precision)
    mixed = min(1, len(reference.feeds) - 1)
    return RuntimeCheck(
        runtime=session.name,
        artifact=artifact,
        status="FAIL" if any(check.status == "FAIL" for check in checks) else "PASS",
        reason=None,
        tensors=tuple(checks),
        layers=tuple(
            LayerCheck(layer, error, reference.eager_error[f"{TAP_PREFIX}{layer}"])
            for layer, error in sorted(layers.items())
        ),
        ranking=_ranking(reference, mixed, outputs[mixed]) if reference.item_vectors is not None else None,
        timing=_time(session, reference.feeds[mixed], session.name),
    )


def _check_whole(reference: Reference, outputs: Sequence[Outputs], precision: Precision) -> list[TensorCheck]:
    """Each tensor of a quantised graph over all feeds together."""
    checks = []
    for name, eager_error in (reference.eager_whole_error or {}).items():
        if is_tap(name) or any(name not in actual for actual in outputs):
            continue  # an output that is missing has failed already
        error = whole_error([actual[name] for actual in outputs], [exact[name] for exact in reference.exact])
        bound = error_bound(eager_error, precision)
        status: Status = "PASS" if error <= bound else "FAIL"
        worst = max(tensor_error(name, a[name], e[name]).max_abs for a, e in zip(outputs, reference.exact, strict=True))
        checks.append(TensorCheck(name, "all feeds together, rms", error, bound, worst, status))
    return checks


def _check_bounds(reference: Reference, precision: Precision) -> list[TensorCheck]:
    """The outputs that would pass with 0.9 of what they should be.

    Of a quantised graph they are told only if all do: what rounding to a coarse grid does to one output, a small task
    for instance, is often larger, and where any output fails the artifact does.
    """
    wholes = reference.eager_whole_error or {}
    checks, num_told = [], 0
    for name, eager_error in reference.eager_error.items():
        if is_tap(name):
            continue
        bound = error_bound(eager_error, precision)
        scaled = _error_of_wrong_scale(name, [exact[name] for exact in reference.exact])
        if not scaled:
            continue
        if bound < scaled or (name in wholes and error_bound(wholes[name], precision) < 1 - _WRONG_SCALE):
            num_told += 1
            continue
        remedy = "leave products in float16 (--mixed auto, --keep-fp16)" if wholes else "build with a wider type"
        problem = (
            f"{_WRONG_SCALE:g} of it would pass, with an error of {scaled:.3g}: the eager {precision} model errs by "
            f"{eager_error:.3g} itself, so this comparison shows nothing; {remedy}"
        )
        checks.append(TensorCheck(name, "the bound itself", bound, scaled, 0.0, "FAIL", problem))
    return [] if wholes and num_told else checks


def _error_of_wrong_scale(name: str, exact: Sequence[Array]) -> float:
    """Error over all feeds of 0.9 of an output; of predictions that of the task in which it shows least.

    Zero where no number is other than zero: then the artifact's has to be zero exactly.
    """
    if name not in PREDICTIONS:
        return max((tensor_error(name, _WRONG_SCALE * each, each).error for each in exact), default=0.0)
    tasks = np.max([row_errors(_WRONG_SCALE * each.T, each.T) for each in exact], axis=0)
    return float(tasks[tasks > 0].min(initial=math.inf)) if tasks.any() else 0.0


def guarded_check(
    runtime: str, artifact: str, open_it: Callable[[], _Opened], check: Callable[[_Opened], RuntimeCheck]
) -> RuntimeCheck:
    """A runtime that is absent or cannot take the artifact is reported with its reason, never left out."""
    try:
        session = open_it()
    except HstuCompileError as error:
        return RuntimeCheck(runtime, artifact, "NOT RUN", f"{error.what}: {error.why}")
    with session:
        return check(session)


class _Serving(AbstractContextManager[Any], Protocol):
    """A session over several graphs, which closes them."""

    @property
    def runtime(self) -> str:
        """What it runs on."""
        ...


def check_served_feeds(
    runtime: str,
    graphs: Mapping[str, str],
    open_graph: Callable[[str], Session],
    join: Callable[[list[Session]], _Served],
    check_feed: Callable[[_Served, int], list[TensorCheck]],
    num_feeds: int,
    progress: Progress,
) -> RuntimeCheck:
    """Check graphs as the one session that serves them, feed by feed.

    Args:
        runtime: shown where the session could not be opened.
        graphs: name to file name, in the order in which `join` takes them.
        open_graph: opens one, or raises HstuCompileError with the reason.
        join: makes the session, which owns the graphs from then on.
        check_feed: the rows of one feed, by its index.
        num_feeds: how many there are.
        progress: called with (what, done, total).
    """
    artifact = f"session of {', '.join(graphs.values())}"

    def open_it() -> _Served:
        with ExitStack() as opened:
            session = join([opened.enter_context(open_graph(graph)) for graph in graphs])
            opened.pop_all()
            return session

    def check(session: _Served) -> RuntimeCheck:
        rows: list[TensorCheck] = []
        for index in range(num_feeds):
            progress(f"{session.runtime}, session", index, num_feeds)
            rows += check_feed(session, index)
        progress(f"{session.runtime}, session", num_feeds, num_feeds)
        status: Status = "FAIL" if any(row.status == "FAIL" for row in rows) else "PASS"
        return RuntimeCheck(session.runtime, artifact, status, None, tuple(rows))

    return guarded_check(runtime, artifact, open_it, check)


def report_of(
    checked: Sequence[tuple[Reference, Sequence[RuntimeCheck]]],
    precision: Precision,
    quantization: Quantization | None = None,
) -> VerifyReport:
    """Sum up the runs of every graph; the worst tensor is the one nearest to, or farthest beyond, its bound.

    Args:
        checked: graph by graph, the one that answers a request by itself first.
        precision: of the graphs.
        quantization: of their products.

    Raises:
        VerifyError: HSTU-E602, if a graph did not run at all: what was not compared must not be called PASS.
    """
    for reference, runs in checked:
        if not any(run.tensors for run in runs):
            raise VerifyError(
                "HSTU-E602",
                f"no artifact of the graph {reference.graph} could be run on this machine",
                "; ".join(f"{run.artifact} on {run.runtime}: {run.reason}" for run in runs) or "there is none",
                "install a runtime: pip install 'hstu-compile[cpu]'",
            )
    every_run = [run for _, runs in checked for run in runs]
    checks = [(check.error / check.bound, check, run) for run in every_run for check in run.tensors]
    _, worst, where = max(checks, key=lambda each: (each[1].status == "FAIL", each[0]))
    feeds = tuple(
        {
            "name": feed.name if number == 0 else f"{reference.graph}: {feed.name}",
            "sequences": len(feed.lengths),
            "events": int(feed.lengths.sum()),
            "max_len": int(feed.lengths.max(initial=0)),
        }
        for number, (reference, _) in enumerate(checked)
        for feed in reference.feeds
    )
    first = checked[0][0]
    return VerifyReport(
        status="FAIL" if any(run.status == "FAIL" for run in every_run) else "PASS",
        rule=bound_rule(precision, quantization),
        worst_error=worst.error,
        worst_bound=worst.bound,
        worst_where=f"{worst.tensor} of '{worst.feed}' on {where.runtime} ({where.artifact})",
        eager_error=first.eager_error[first.primary],
        feeds=feeds,
        runs=tuple(every_run),
    )
