"""The end-to-end benchmark's baselines of the retrieval model: what differs from those of the ranking model.

Its attention is batched products between which torch.compile makes one kernel (end_to_end_retrieval_model.py). No
library of others takes part: Meta's open kernels have no bias of positions and times.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from end_to_end_clock import timed
from end_to_end_peers import Captured, Inputs, Peers, Plan
from end_to_end_reference import AnswersTwice, Reference, torch_dtype
from end_to_end_retrieval_model import PADDED, RETRIEVAL_FORMS, PlainRetrievalModel
from end_to_end_retrieval_reference import RetrievalReferenceModel
from end_to_end_retrieval_workload import Arrays, RetrievalCase, retrieval_arrays, retrieval_state_dict
from torch import nn

#: The attention, for the column `form`.
PRODUCTS = "batched_products"


class RetrievalPeers(Peers):
    """One process's baselines of the retrieval model; arguments as of `Peers`, without providers."""

    def _parameters(self) -> Arrays:
        return retrieval_state_dict(self._sizes)

    def _reference_model(self) -> AnswersTwice:
        return RetrievalReferenceModel(self._sizes, self._device)

    def _all_forms_of(self, case: RetrievalCase) -> Sequence[str]:
        return (PADDED,) if case.is_even else RETRIEVAL_FORMS

    def _planned(self, case: RetrievalCase, reference: Reference) -> Plan:
        """The form that is faster as a CUDA graph of eager operators, of those that are right."""
        times: dict[Plan, float] = {}
        problems = []
        for form in self._all_forms_of(case):
            plan = Plan(PRODUCTS, None, form)
            judged = reference.judged(self._answer(case, plan))
            if judged["status"] == "ok":
                times[plan] = self._time(case, plan)
            else:
                problems.append(f"{form}: {judged['status']}, off by {judged['max_err']:.3g}")
        if not times:
            raise RuntimeError("; ".join(problems))
        return min(times, key=lambda plan: times[plan])

    def _time(self, case: RetrievalCase, plan: Plan) -> float:
        if self._device.type != "cuda":
            return 0.0
        model, inputs = self._model(case, plan)
        with torch.inference_mode():
            graph = Captured(model, inputs.features)
            found = float(timed(self._clock.samples(functools.partial(graph, {})))["median_ms"])
        self._release()
        return found

    def _model(self, case: RetrievalCase, plan: Plan, *, direct: bool = True) -> tuple[nn.Module, Inputs]:
        model = PlainRetrievalModel(self._state, self._sizes, case, torch_dtype(case), plan.form)
        keys: dict[str, Any] = {}
        return model.to(self._device).eval(), Inputs(retrieval_arrays(case, self._sizes), self._device, keys)
