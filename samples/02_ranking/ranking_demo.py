"""Ranking on real data: train on MovieLens-100K, build three graphs, serve with a KV cache, compare with eager."""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hstu_compile import RankingRequest, RankingSession, open_ranking_session
from hstu_compile.checkpoint import model_from_spec, spec_from_checkpoint
from hstu_compile.errors import EXIT_VERIFICATION
from hstu_compile.model.ranking import RankingModel

import ranking_data
import train_ranker
from ranking_data import Request, prepare_data

MICRO_BATCH = 64
#: Requests of one forward pass when the whole data set is scored.
EVALUATION_BATCH = 64
#: Of cached keys and values: 31 users with full histories.
KV_BUDGET_BYTES = 4 << 20

#: Requests -> probability of a like per candidate, all requests one after the other, float32.
Scorer = Callable[[Sequence[Request]], NDArray[np.float32]]


@dataclasses.dataclass(frozen=True)
class Quality:
    """How good predicted probabilities are.

    Attributes:
        auc: probability that a liked film scores above another one; ties count half.
        ne: normalised entropy: log loss over that of always predicting the share of likes; below 1 is better than that.
    """

    auc: float
    ne: float


def quality(preds: NDArray[np.floating[Any]], liked: NDArray[np.bool_]) -> Quality:
    """AUC and NE of [T] probabilities against [T] outcomes, in float64.

    Raises:
        ValueError: if every outcome is the same: neither number is defined.
    """
    share = float(liked.mean())
    if not 0 < share < 1:
        raise ValueError(f"the share of likes is {share}; both outcomes must occur")
    _, group, counts = np.unique(preds, return_inverse=True, return_counts=True)
    # A tie takes the mean of the ranks that it spans.
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[group.reshape(-1)]
    positives = int(liked.sum())
    auc = (ranks[liked].sum() - positives * (positives + 1) / 2) / (positives * (len(liked) - positives))
    exact = preds.astype(np.float64)
    log_loss = -np.log(np.where(liked, exact, 1 - exact)).mean()
    base = -(share * np.log(share) + (1 - share) * np.log(1 - share))
    return Quality(float(auc), float(log_loss / base))


def eager_scorer(model: RankingModel) -> Scorer:
    """The PyTorch model's packed forward."""

    def score(requests: Sequence[Request]) -> NDArray[np.float32]:
        feeds = {name: torch.from_numpy(array) for name, array in ranking_data.packed_feeds(requests).items()}
        with torch.inference_mode():
            preds: NDArray[np.float32] = model.packed(feeds).preds[:, 0].numpy()
        return preds

    return score


def served_scorer(session: RankingSession, *, cache: bool) -> Scorer:
    """The bundle: prefill and score with the cache, or packed without it."""

    def score(requests: Sequence[Request]) -> NDArray[np.float32]:
        results = session.score([served(request) for request in requests], cache=cache)
        return np.concatenate([result.preds[:, 0] for result in results])

    return score


def served(request: Request) -> RankingRequest:
    """The request as a session takes it."""
    return RankingRequest(request.user, request.history, request.candidates, request.context)


def evaluate(scorer: Scorer, requests: Sequence[Request]) -> NDArray[np.float32]:
    """Probability per candidate of all requests."""
    batches = [requests[i : i + EVALUATION_BATCH] for i in range(0, len(requests), EVALUATION_BATCH)]
    return np.concatenate([scorer(batch) for batch in batches])


def table(preds: Mapping[str, NDArray[np.float32]], liked: NDArray[np.bool_]) -> str:
    """One row per form of the model; the difference is to the first row."""
    reference = next(iter(preds.values()))
    rows = [f"{'':<34}{'AUC':>9}{'NE':>9}{'largest difference':>21}"]
    for name, values in preds.items():
        found = quality(values, liked)
        rows.append(f"{name:<34}{found.auc:>9.4f}{found.ne:>9.4f}{np.abs(values - reference).max():>21.1e}")
    return "\n".join(rows)


@dataclasses.dataclass(frozen=True)
class Visit:
    """One answered request of the serving example.

    Attributes:
        what: description.
        cache: what the cache said: hit, miss or stale.
        milliseconds: of the call.
        best_item: id of the candidate with the highest probability.
        best_pred: that probability.
        difference: largest absolute difference of a probability to the eager packed forward.
    """

    what: str
    cache: str
    milliseconds: float
    best_item: int
    best_pred: float
    difference: float


def visit_pages(session: RankingSession, scorer: Scorer, histories: prepare_data.Histories) -> list[Visit]:
    """The user with the most events opens two pages of films, and the second again a minute later.

    Args:
        session: serves the pages.
        scorer: the eager model, for comparison.
        histories: all users.
    """
    other, user = np.argsort(np.diff(histories.seq_offsets), kind="stable")[-2:].tolist()
    # Somebody else is served first: a runtime's first run also allocates its memory.
    session.score([served(ranking_data.page_request(histories, other, 0, MICRO_BATCH, delay=30))])
    visits = []
    for what, number, delay in (("first page", 0, 30), ("second page", 1, 30), ("second page a minute later", 1, 90)):
        request = ranking_data.page_request(histories, user, number, MICRO_BATCH, delay)
        started = time.perf_counter()
        [result] = session.score([served(request)])
        milliseconds = 1000 * (time.perf_counter() - started)
        preds = result.preds[:, 0]
        best, difference = int(preds.argmax()), float(np.abs(preds - scorer([request])).max())
        item = int(request.candidates["item_movie_id"][best])
        visits.append(Visit(what, result.cache, milliseconds, item, float(preds[best]), difference))
    return visits


def visits_table(visits: Sequence[Visit]) -> str:
    """One row per visit."""
    rows = [f"{'':<34}{'cache':>7}{'ms':>9}{'best film':>17}{'difference to eager':>21}"]
    for visit in visits:
        best = f"{visit.best_item} at {visit.best_pred:.3f}"
        rows.append(f"{visit.what:<34}{visit.cache:>7}{visit.milliseconds:>9.1f}{best:>17}{visit.difference:>21.1e}")
    return "\n".join(rows)


def build_bundle(checkpoint: Path, bundle: Path) -> int:
    """Run `hstu-compile build` as a user would, its output passed through; returns its exit status."""
    arguments = ["build", str(checkpoint), "--m-falcon", f"micro-batch={MICRO_BATCH}", "-o", str(bundle), "--force"]
    print(f"\n$ hstu-compile {' '.join(arguments)}", flush=True)
    program = Path(sysconfig.get_path("scripts")) / "hstu-compile"
    return subprocess.run([str(program), *arguments], stdin=subprocess.DEVNULL, check=False).returncode


def serve(checkpoint: Path, bundle: Path, histories: prepare_data.Histories) -> None:
    """Serve pages, then score every held-out rating in every form of the model, and print both."""
    model = model_from_spec(spec_from_checkpoint(checkpoint))
    assert isinstance(model, RankingModel)
    eager = eager_scorer(model)
    requests = ranking_data.held_out_requests(histories)
    with open_ranking_session(bundle, kv_budget_bytes=KV_BUDGET_BYTES) as session:
        visits = visit_pages(session, eager, histories)
        print(f"\nOne user, {MICRO_BATCH} films a page, on {session.runtime}:\n{visits_table(visits)}", flush=True)
        preds = {
            "eager packed": evaluate(eager, requests),
            "built packed": evaluate(served_scorer(session, cache=False), requests),
            "built prefill, score": evaluate(served_scorer(session, cache=True), requests),
        }
        stats = session.stats()
    liked = np.concatenate([request.liked for request in requests])
    print(f"\n{len(liked)} held-out ratings of {len(requests)} users, {liked.mean():.0%} of them likes:")
    print(table(preds, liked))
    print(
        f"\ncache: {stats.cache.hits} hits, {stats.cache.misses} misses, {stats.cache.stale} stale, "
        f"{stats.cache.evictions} evictions, {stats.cache.used_bytes} of {stats.cache.capacity_bytes} bytes used; "
        f"passes: {stats.prefill_passes} prefill, {stats.score_passes} score, {stats.packed_passes} packed"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare, train, build, serve; the exit status is that of the build.

    A bundle that failed verification exists and is served all the same: the tables show what the error does.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    train_ranker.add_training_arguments(parser)
    arguments = parser.parse_args(argv)
    try:
        histories = prepare_data.load_histories(prepare_data.fetch(arguments.data_dir))
    except prepare_data.DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"MovieLens-100K: {histories.num_users} users, {histories.item_ids.shape[0]} events", flush=True)
    checkpoint, bundle = train_ranker.train_from_arguments(arguments, histories), arguments.output / "bundle"
    status = build_bundle(checkpoint, bundle)
    if status not in (0, EXIT_VERIFICATION):
        return status
    serve(checkpoint, bundle, histories)
    print(f"\nbundle  {bundle}\nreport  {bundle / 'report.html'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
