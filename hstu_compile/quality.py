"""How good a model's answers to labelled requests are, in any form of it: eager, fake-quantised, or built. Level 4.

Retrieval is judged by where the item that was really chosen ranks among all items outside the history, ranking by AUC
and normalised entropy of each binary task. A form of a model is a function of arrays, so that all are judged alike.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hstu_compile.labelled_requests import LabelledRequests, binary_tasks
from hstu_compile.metrics import RankMetrics, area_under_curve, normalised_entropy, rank_metrics, target_ranks
from hstu_compile.model.families import HstuModel
from hstu_compile.model.ranking import RankingModel

#: Feeds by graph input name -> user embeddings [B, D] of a retrieval model, logits [T, tasks] of a ranking model.
Answer = Callable[[Mapping[str, NDArray[Any]]], NDArray[Any]]


@dataclasses.dataclass(frozen=True)
class Quality:
    """How good one form of a model is.

    Attributes:
        values: by the name of the metric. "HR@10", "NDCG@10", "HR@50", "MRR"; or "AUC t" and "NE t" of each task t.
        ranks: [B] int64, of each request's target; None for a ranking model.
    """

    values: Mapping[str, float]
    ranks: NDArray[np.int64] | None = dataclasses.field(default=None, repr=False, compare=False)


@dataclasses.dataclass(frozen=True)
class Answers:
    """What one form of a model answers to labelled requests.

    Attributes:
        outputs: of each batch, as `Answer` gives them.
        item_vectors: [V, D] float32 -- what the user embeddings of a retrieval model meet; None for a ranking model.
    """

    outputs: tuple[NDArray[Any], ...] = dataclasses.field(repr=False)
    item_vectors: NDArray[Any] | None = dataclasses.field(default=None, repr=False)

    def scores(self, batch: int) -> NDArray[Any]:
        """Scores [B, V] of all items, or logits [T, tasks]."""
        outputs = self.outputs[batch]
        return outputs if self.item_vectors is None else outputs @ self.item_vectors.T


def eager_answer(model: HstuModel) -> Answer:
    """The eager model, as it is when it is called."""

    def answer(feeds: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        features = {name: torch.from_numpy(array) for name, array in feeds.items()}
        with torch.inference_mode():
            output = model.packed(features).logits if isinstance(model, RankingModel) else model(**features)
        result: NDArray[Any] = output.float().numpy()
        return result

    return answer


def answers_of(model: HstuModel, requests: LabelledRequests, answer: Answer | None = None) -> Answers:
    """Ask a form of a model all requests.

    Args:
        model: the eager model in the type of the form; its item vectors are those that user embeddings meet.
        requests: labelled.
        answer: the form; None is the model itself.
    """
    items = None if isinstance(model, RankingModel) else model.item_vectors().float().numpy()
    ask = answer or eager_answer(model)
    return Answers(tuple(ask(batch.feeds) for batch in requests.batches), items)


def quality_of(model: HstuModel, answers: Answers, requests: LabelledRequests) -> Quality:
    """How good the answers are.

    Args:
        model: decides which metrics there are.
        answers: to these requests.
        requests: labelled.

    Returns:
        AUC and NE are NaN where a logit is; a NaN score of a retrieval model ranks before the target.
    """
    if isinstance(model, RankingModel):
        labels = np.concatenate([batch.labels for batch in requests.batches])
        logits = np.concatenate(answers.outputs)
        values = {}
        for column, task in enumerate(binary_tasks(model.config)):
            is_number = not np.isnan(logits[:, column]).any()
            pair = logits[:, column], labels[:, column]
            values[f"AUC {task}"] = area_under_curve(*pair) if is_number else math.nan
            values[f"NE {task}"] = normalised_entropy(*pair) if is_number else math.nan
        return Quality(values)
    ranks = [
        target_ranks(answers.scores(index), batch.labels, batch.feeds["item_ids"], batch.feeds["seq_offsets"])
        for index, batch in enumerate(requests.batches)
    ]
    return Quality(_rank_values(rank_metrics(ranks)), np.concatenate(ranks))


def _rank_values(metrics: RankMetrics) -> dict[str, float]:
    return {"HR@10": metrics.hr10, "NDCG@10": metrics.ndcg10, "HR@50": metrics.hr50, "MRR": metrics.mrr}


def is_budgeted(metric: str) -> bool:
    """Whether a budget limits the change of this metric. HR@50 and MRR are shown beside those that it limits."""
    return metric in ("HR@10", "NDCG@10") or is_relative(metric)


def is_relative(metric: str) -> bool:
    """Whether a change of this metric is a share of its value: so for AUC and NE, whose size says nothing by itself."""
    return metric.startswith(("AUC ", "NE "))


def changes(reference: Quality, measured: Quality) -> dict[str, float]:
    """Signed change of each metric: absolute for rank metrics, relative to the reference for AUC and NE."""
    found = {}
    for name, before in reference.values.items():
        difference = measured.values[name] - before
        found[name] = difference / before if is_relative(name) else difference
    return found


def worst_change(reference: Quality, measured: Quality) -> float:
    """`largest_change` from one quality to another."""
    return largest_change(changes(reference, measured))


def largest_change(change: Mapping[str, float]) -> float:
    """Largest magnitude of the changes that a budget limits, to the better or to the worse; infinite for NaN.

    A change to the better counts: on a few hundred requests it is as much an accident as one to the worse.
    """
    sizes = [abs(value) for name, value in change.items() if is_budgeted(name)]
    return max(size if math.isfinite(size) else math.inf for size in sizes)


def score_difference(reference: Answers, measured: Answers) -> float:
    """Root mean square of the difference of all scores or logits over that of the reference's; infinite for NaN.

    Unlike a metric it has no steps: it tells two small effects apart with few requests.
    """
    squares, scale = [], []
    for index in range(len(reference.outputs)):
        exact = reference.scores(index).astype(np.float64)
        squares.append(float(np.square(measured.scores(index).astype(np.float64) - exact).sum()))
        scale.append(float(np.square(exact).sum()))
    share = math.sqrt(math.fsum(squares) / math.fsum(scale)) if math.fsum(scale) > 0 else math.inf
    return share if math.isfinite(share) else math.inf


@dataclasses.dataclass(frozen=True)
class QualityRow:
    """One form of the model.

    Attributes:
        name: of the form.
        quality: its metrics.
        worst: largest change that a budget limits, against the first row; 0 of the first row itself.
        is_artifact: it is a file of the bundle, which a budget holds; others are there for comparison.
    """

    name: str
    quality: Quality
    worst: float
    is_artifact: bool


@dataclasses.dataclass(frozen=True)
class QualityTable:
    """How good the forms of a model are that a build made, the eager float32 model first.

    Attributes:
        data: file, sha256 and number of the labelled requests.
        rows: of the forms.
        budget: what `QualityRow.worst` of an artifact may be; None is no limit.
    """

    data: Mapping[str, Any]
    rows: tuple[QualityRow, ...]
    budget: float | None

    @property
    def is_within(self) -> bool:
        """Whether every artifact is within the budget."""
        return self.budget is None or all(row.worst <= self.budget for row in self.rows if row.is_artifact)

    def to_dict(self) -> dict[str, Any]:
        """The report's `metrics`."""
        return {
            "columns": list(self.rows[0].quality.values),
            "rows": [{"name": row.name, "values": list(row.quality.values.values())} for row in self.rows],
            "data": dict(self.data),
            "budget": self.budget,
            "worst": max((row.worst for row in self.rows if row.is_artifact), default=None),
            "within": self.is_within,
        }


class QualityMeasurement:
    """Collects the rows of a `QualityTable`.

    Args:
        model: the eager float32 model, the first row.
        requests: labelled.
    """

    def __init__(self, model: HstuModel, requests: LabelledRequests) -> None:
        self._requests = requests
        self._reference = quality_of(model, answers_of(model, requests), requests)
        self._rows = [QualityRow("eager fp32", self._reference, 0.0, is_artifact=False)]

    def add(self, name: str, model: HstuModel, answer: Answer | None = None) -> None:
        """Measure a form: the eager model as it is now, or an artifact that answers in its place."""
        quality = quality_of(model, answers_of(model, self._requests, answer), self._requests)
        self._rows.append(QualityRow(name, quality, worst_change(self._reference, quality), answer is not None))

    def table(self, budget: float | None) -> QualityTable:
        """What was measured."""
        return QualityTable(self._requests.to_dict(), tuple(self._rows), budget)
