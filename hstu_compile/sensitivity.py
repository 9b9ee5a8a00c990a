"""Which products cost quality when they are quantised, and which of them a mixed build leaves in float16. Level 5.

Each site is quantised alone, and left out alone, and the whole ladder is climbed: the site whose absence brings the
scores closest to the float32 model's is left in float16 first, then the next, until the quality on labelled requests
differs from the float32 model's by no more than the budget, in the graph that ships as well. Order comes from the
scores, which have no steps; the metrics, in which a few hundred requests are coarse, decide where to stop. A site whose
absence alone brings them within the budget comes before all others, so that one is kept where one is enough.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from hstu_compile.errors import CalibrationError
from hstu_compile.labelled_requests import LabelledRequests
from hstu_compile.model.fake_quantization import fake_quantized
from hstu_compile.model.families import HstuModel
from hstu_compile.quality import (
    Answer,
    Answers,
    Quality,
    answers_of,
    changes,
    largest_change,
    quality_of,
    score_difference,
    worst_change,
)
from hstu_compile.quantized import QuantizationPlan

Progress = Callable[[str, int, int], None]

#: Why a site that a ladder took out stays in float16.
REASON = "--mixed auto: its rounding changes the answers most of those that were still quantised"


@dataclasses.dataclass(frozen=True)
class ShippedForm:
    """The graph that ships, as something that answers.

    A budget of few requests is decided by their last bits, and the graph rounds where its eager model does not. So a
    step that is within the budget in the eager types is asked in this form too.

    Attributes:
        name: of what runs it.
        model: the eager model in the graph's type, whose item vectors its answers meet.
        opened: a plan's graph, for as long as it is asked.
    """

    name: str
    model: HstuModel
    opened: Callable[[QuantizationPlan], AbstractContextManager[Answer]]


@dataclasses.dataclass(frozen=True)
class Effect:
    """What quantising some sites does to the answers of the float32 model.

    Attributes:
        change: signed change of each metric, see `quality.changes`.
        scores: relative root mean square difference of the scores or logits.
    """

    change: Mapping[str, float]
    scores: float


@dataclasses.dataclass(frozen=True)
class SiteEffect:
    """What one site contributes.

    Attributes:
        site: its name.
        alone: only this site is quantised.
        others: all sites but this one are.
    """

    site: str
    alone: Effect
    others: Effect


@dataclasses.dataclass(frozen=True)
class Rung:
    """One step of the ladder.

    Attributes:
        kept: the site that this step leaves in float16 in addition; None on the first, where all are quantised.
        quality: metrics of the quantised model in each form that was measured: the eager types by their name, and the
            graph that ships by that of its runtime where the eager types are within the budget.
        worst: largest change of a metric that the budget limits, over these forms.
        scores: relative root mean square difference of the scores in float32.
    """

    kept: str | None
    quality: Mapping[str, Mapping[str, float]]
    worst: float
    scores: float


@dataclasses.dataclass(frozen=True)
class SensitivityLadder:
    """What was measured, and what follows.

    Attributes:
        kind: int8 or fp8.
        budget: largest change allowed: absolute of HR@10 and NDCG@10, relative of AUC and NE.
        data: file, sha256 and number of the labelled requests.
        reference: metrics of the eager float32 model.
        sites: effect of each site, in the order in which the ladder takes them out.
        rungs: of the ladder, the last one within the budget.
        plan: that of the last rung.
    """

    kind: str
    budget: float
    data: Mapping[str, Any]
    reference: Mapping[str, float]
    sites: tuple[SiteEffect, ...]
    rungs: tuple[Rung, ...]
    plan: QuantizationPlan = dataclasses.field(repr=False)

    @property
    def kept(self) -> tuple[str, ...]:
        """Sites that stay in float16, the most harmful first."""
        return tuple(rung.kept for rung in self.rungs if rung.kept is not None)

    def to_dict(self) -> dict[str, Any]:
        """JSON form for manifest and report; the plan is there already."""
        return {
            "kind": self.kind,
            "budget": self.budget,
            "data": dict(self.data),
            "reference": dict(self.reference),
            "sites": [dataclasses.asdict(site) for site in self.sites],
            "rungs": [dataclasses.asdict(rung) for rung in self.rungs],
            "kept": list(self.kept),
        }


class _Measurement:
    """Runs quantised forms of a model on labelled requests, and compares them with the float32 model."""

    def __init__(
        self, models: Mapping[str, HstuModel], requests: LabelledRequests, budget: float, shipped: ShippedForm | None
    ) -> None:
        self.models, self.requests, self.budget, self.shipped = models, requests, budget, shipped
        self.exact = answers_of(models["fp32"], requests)
        self.reference = quality_of(models["fp32"], self.exact, requests)

    def run(self, plan: QuantizationPlan, dtype: str) -> tuple[Answers, Quality]:
        """Answers and quality of the model of one type with the rounding of a plan."""
        model = self.models[dtype]
        with fake_quantized(model, plan):
            answers = answers_of(model, self.requests)
        return answers, quality_of(model, answers, self.requests)

    def effect(self, plan: QuantizationPlan) -> Effect:
        """Of a plan in float32, free of other rounding."""
        answers, quality = self.run(plan, "fp32")
        return Effect(changes(self.reference, quality), score_difference(self.exact, answers))

    def rung(self, plan: QuantizationPlan, kept: str | None) -> Rung:
        """Of a plan in every form: where one is within the budget by luck, another may not be."""
        measured = {dtype: self.run(plan, dtype) for dtype in self.models}
        qualities = {dtype: quality for dtype, (_, quality) in measured.items()}
        worst = max(worst_change(self.reference, quality) for quality in qualities.values())
        if self.shipped is not None and worst <= self.budget:
            with self.shipped.opened(plan) as answer:
                answers = answers_of(self.shipped.model, self.requests, answer)
            quality = qualities[self.shipped.name] = quality_of(self.shipped.model, answers, self.requests)
            worst = max(worst, worst_change(self.reference, quality))
        values = {name: quality.values for name, quality in qualities.items()}
        return Rung(kept, values, worst, score_difference(self.exact, measured["fp32"][0]))


def climb_ladder(
    models: Mapping[str, HstuModel],
    plan: QuantizationPlan,
    requests: LabelledRequests,
    budget: float,
    progress: Progress,
    shipped: ShippedForm | None = None,
) -> SensitivityLadder:
    """Leave sites in float16, the most harmful first, until the quality is within the budget.

    The same models, plan and requests give the same ladder.

    Args:
        models: the eager model in each type that has to be within the budget, by the type's name; "fp32" is the
            reference and one of them.
        plan: with every site that may be quantised.
        requests: labelled.
        budget: largest change of a metric, see `quality.worst_change`.
        progress: called with (what, done, total).
        shipped: the graph, which has to be within the budget too; None asks the eager models alone.

    Raises:
        CalibrationError: HSTU-E832, if no plan with at least one quantised site is within the budget.
    """
    measurement = _Measurement(models, requests, budget, shipped)
    effects = _site_effects(measurement, plan, budget, progress)
    rungs: list[Rung] = []
    for number in range(len(effects)):
        kept = [each.site for each in effects[:number]]
        progress("sensitivity ladder", number, len(effects))
        rungs.append(measurement.rung(plan.without(kept, REASON), kept[-1] if kept else None))
        if rungs[-1].worst <= budget:
            progress("sensitivity ladder", len(effects), len(effects))
            return SensitivityLadder(
                plan.kind,
                budget,
                requests.to_dict(),
                dict(measurement.reference.values),
                tuple(effects),
                tuple(rungs),
                plan.without(kept, REASON),
            )
    best = min((rung.worst for rung in rungs), default=0.0)
    raise CalibrationError(
        "HSTU-E832",
        f"no {plan.kind} build of this model is within the budget of {budget:g}",
        f"all of its {len(rungs)} ladder steps changed a metric by at least {best:.4g} on {requests.num_requests} "
        f"requests of {requests.file}"
        if rungs
        else "every product is kept in float16 already",
        "raise --budget, try another --observer, give more labelled requests, or build with --fp16 alone",
        {"budget": budget, "rungs": [dataclasses.asdict(rung) for rung in rungs]},
    )


def first_ladder(
    models: Mapping[str, HstuModel],
    plans: Mapping[str, QuantizationPlan],
    requests: LabelledRequests,
    budget: float,
    progress: Progress,
    shipped: ShippedForm | None = None,
) -> tuple[str, SensitivityLadder]:
    """The first of several plans that some mix brings within the budget, and its ladder.

    A rule for bounds may suit a model badly whatever is left out, and another one well with everything quantised.

    Args:
        models: see `climb_ladder`.
        plans: by the name of the rule that bounds were taken by, in the order in which they are asked; at least one.
        requests: labelled.
        budget: see `climb_ladder`.
        progress: see `climb_ladder`.
        shipped: see `climb_ladder`.

    Raises:
        CalibrationError: HSTU-E832, if no plan has such a mix.
    """
    refusals: dict[str, CalibrationError] = {}
    for rule, plan in plans.items():
        try:
            return rule, climb_ladder(models, plan, requests, budget, progress, shipped)
        except CalibrationError as error:
            refusals[rule] = error
    first = next(iter(refusals.values()))
    if len(refusals) == 1:
        raise first
    raise CalibrationError(
        "HSTU-E832",
        first.what,
        "; ".join(f"by {rule}, {error.why}" for rule, error in refusals.items()),
        "raise --budget, give more labelled requests, or build with --fp16 alone",
        {"budget": budget, "rules": {rule: error.context for rule, error in refusals.items()}},
    )


def _site_effects(
    measurement: _Measurement, plan: QuantizationPlan, budget: float, progress: Progress
) -> list[SiteEffect]:
    """Effect of every site, in the order in which they are left out."""
    effects = []
    for number, site in enumerate(plan.sites):
        progress("sensitivity of sites", number, len(plan.sites))
        others = [name for name in plan.sites if name != site]
        alone = measurement.effect(plan.without(others, REASON))
        effects.append(SiteEffect(site, alone, measurement.effect(plan.without([site], REASON))))
    progress("sensitivity of sites", len(plan.sites), len(plan.sites))
    place = {site: number for number, site in enumerate(plan.sites)}

    def order(each: SiteEffect) -> tuple[bool, float, float, int]:
        is_enough = largest_change(each.others.change) <= budget
        return not is_enough, each.others.scores, -each.alone.scores, place[each.site]

    return sorted(effects, key=order)
