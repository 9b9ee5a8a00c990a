"""Users that come back: several hundred distinct requests with the eager model's answers, computed before the load."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_compile.compare import row_error
from hstu_compile.serving.answering import USER_KEY
from hstu_compile.serving.samples import Sample
from tests.triton.models import TOLERANCE, ServedModel

Arrays = dict[str, NDArray[Any]]

#: A person asks with the history as it was so many events ago.
_EVENTS_AGO = (3, 0)
_CANDIDATE_SETS = 2
_SERVED_OUTPUTS = ("truncated", "cache")


@dataclasses.dataclass(frozen=True)
class Question:
    """One request and its answer.

    Attributes:
        model: name in the repository.
        kind: retrieval or ranking.
        user: whose it is; the key under which the server may keep rows.
        sample: without the batch axis and without the key.
        exact: what the eager model in float64 answers, by output, with the batch axis as Triton gives it.
    """

    model: str
    kind: str
    user: int
    sample: Sample
    exact: Arrays

    def keyed(self) -> Sample:
        """The request as one whose rows may be cached."""
        return {**self.sample, USER_KEY: np.array([self.user], np.int64)}

    def fault(self, answer: Mapping[str, Any]) -> str | None:
        """What is wrong with an answer; None if it is the eager model's within the tolerance."""
        if missing := [name for name in (*self.exact, *_SERVED_OUTPUTS) if answer.get(name) is None]:
            return f"no {', '.join(missing)}"
        for name, exact in self.exact.items():
            actual = answer[name]
            if actual.shape != exact.shape:
                return f"{name} has shape {actual.shape}, not {exact.shape}"
            if name == "top_items":
                if not np.array_equal(actual, exact):
                    return f"{name} is {actual.tolist()}, not {exact.tolist()}"
            else:
                rows = exact.reshape(-1, exact.shape[-1])
                error = row_error(actual.reshape(rows.shape), rows).error
                # Written so that a NaN fails.
                if not error <= TOLERANCE:
                    return f"{name} differs by {error:.3g}; at most {TOLERANCE:.3g} may be"
        return f"{answer['truncated'].item()} events were cut" if answer["truncated"].item() else None


def questions(models: Mapping[str, ServedModel], users: int, seed: int = 0) -> list[Question]:
    """Each user's requests: an older and a newer history, and for ranking two sets of candidates for each.

    Args:
        models: by their names in the repository.
        users: of each model; their histories have between one event and as many as the model takes.
        seed: of everything drawn.
    """
    asked = []
    for name, model in models.items():
        for user, sample in enumerate(model.samples(users, seed)):
            for variant in _variants(model, sample, np.random.default_rng([seed, user])):
                exact = model.expected(variant)
                whole = model.eager.name == "retrieval"
                rows = {output: array if whole else array[None] for output, array in exact.items()}
                asked.append(Question(name, model.eager.name, user, variant, rows))
    return asked


def _variants(model: ServedModel, sample: Sample, rng: np.random.Generator) -> list[Sample]:
    axes = {each.name: each.axis for each in model.eager.inputs}
    (events, *_) = (len(sample[name]) for name, axis in axes.items() if axis == "L" and name in sample)
    found = []
    for ago in _EVENTS_AGO:
        kept = max(1, events - ago)
        older = {name: array[:kept] if axes[name] == "L" else array for name, array in sample.items()}
        candidates = [name for name in sample if axes[name] == "T"]
        if not candidates:
            found.append(older)
            continue
        for _ in range(_CANDIDATE_SETS):
            # The same candidates in another order: everybody's time of asking stays.
            order = rng.permutation(len(sample[candidates[0]]))
            found.append(older | {name: sample[name][order] for name in candidates})
    return found


def distinct(asked: Sequence[Question]) -> int:
    """How many of the requests differ in a byte."""
    return len({(each.model, *(array.tobytes() for array in each.sample.values())) for each in asked})
