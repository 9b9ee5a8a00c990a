"""What int8 and fp8 do to ranking quality on MovieLens-100K: every observer, default recipe and --mixed auto; no test.

Three trained models: `demo`, the checkpoint of samples/01_movielens_demo; `research` and `dlrm`, Meta's checkpoints of
shared/fixtures. Scales come from the requests of the same 943 users before the labelled ones (one event earlier for
retrieval, ten for ranking); quality is measured on the labelled ones: leave-one-out HR@10 and NDCG@10 with the items of
the history left out, AUC and NE of the newest ten ratings. Each row of results/quantisation_quality.csv is one form of
one model:

- eager fp32, eager fp16: the PyTorch model, with the rounding of the plan unless the kind is "none";
- onnxruntime: the graph that `hstu-compile build` ships, fp16 with Q/DQ, in ONNX Runtime on a CPU.

Run: python tests/bench/quantisation_quality.py [--models demo research dlrm] [--output FILE]   (20 minutes on one core)
The files of requests are made by samples/04_quantisation/write_requests.py, the demo's checkpoint by `make demo`.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import datetime
import itertools
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from hstu_compile.artifacts import CheckpointSpec
from hstu_compile.calibrate import CalibrationRequest, calibrate
from hstu_compile.calibration.observers import OBSERVERS, Observer
from hstu_compile.calibration.quantization import plan_quantization
from hstu_compile.calibration.table import CalibrationTable
from hstu_compile.checkpoint import config_from_file, model_from_spec, spec_from_checkpoint
from hstu_compile.config import Quantization
from hstu_compile.errors import CalibrationError
from hstu_compile.export import exported_from_served
from hstu_compile.labelled_requests import LabelledRequests, labelled_requests
from hstu_compile.model.fake_quantization import fake_quantized, product_weights
from hstu_compile.model.families import HstuModel
from hstu_compile.model.ranking import RankingModel
from hstu_compile.quality import (
    Answer,
    Answers,
    Quality,
    answers_of,
    changes,
    quality_of,
    score_difference,
    worst_change,
)
from hstu_compile.quantized import QuantizationPlan
from hstu_compile.rewrite import RowSelection, apply_passes, export_passes
from hstu_compile.runtime.session import open_session
from hstu_compile.sensitivity import ShippedForm, climb_ladder
from hstu_compile.served import served_graphs

REPOSITORY = Path(__file__).resolve().parents[2]
FIXTURES = REPOSITORY.parent / "shared" / "fixtures"
REQUESTS = REPOSITORY / "build" / "quantisation"
RESULTS = Path(__file__).resolve().parent / "results" / "quantisation_quality.csv"
#: Checkpoint, configuration, the files of requests without their endings, and the budget of --mixed auto.
MODELS = {
    "demo": (REPOSITORY / "build" / "demo" / "checkpoint.pt", None, "retrieval", 0.002),
    "research": (
        FIXTURES / "meta_research_ml100k" / "ckpt.pt",
        FIXTURES / "meta_research_ml100k" / "config.json",
        "retrieval",
        0.002,
    ),
    "dlrm": (
        FIXTURES / "meta_dlrm_ml100k" / "ckpt.pt",
        FIXTURES / "meta_dlrm_ml100k" / "config.json",
        "ranking-meta",
        0.001,
    ),
}
KINDS: tuple[Quantization, ...] = ("int8", "fp8")
METRICS = {
    **{"hr10": ("HR@10",), "ndcg10": ("NDCG@10",), "hr50": ("HR@50",), "mrr": ("MRR",)},
    **{"auc": ("AUC like",), "ne": ("NE like",)},
}
FIELDS = (
    *("model", "kind", "observer", "recipe", "form", "budget", "quantised", "kept"),
    *METRICS,
    *(f"change_{name}" for name in METRICS),
    *("worst", "gained", "lost", "scores", "requests"),
    *("checkpoint_sha256", "data_sha256", "versions", "machine", "commit", "date"),
)
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """One model, its requests, and what is compared with.

    Attributes:
        name: of MODELS.
        spec: the checkpoint.
        models: eager, by type.
        table: of the earlier requests.
        requests: labelled.
        budget: of --mixed auto.
        exact: answers of the eager float32 model.
        reference: its quality.
    """

    name: str
    spec: CheckpointSpec
    models: Mapping[str, HstuModel]
    table: CalibrationTable
    requests: LabelledRequests
    budget: float
    exact: Answers
    reference: Quality


def open_case(name: str, folder: Path) -> Case:
    """Read a model, calibrate it, and measure it as it is."""
    checkpoint, config_file, data, budget = MODELS[name]
    request = CalibrationRequest(
        checkpoint, folder / f"{name}.json", (REQUESTS / f"{data}-earlier.npz",), config_file=config_file
    )
    table = calibrate(request, lambda *_: None).table
    spec = spec_from_checkpoint(checkpoint, config_from_file(config_file) if config_file is not None else None)
    models = {"fp32": model_from_spec(spec), "fp16": model_from_spec(spec, torch.float16)}
    requests = labelled_requests(REQUESTS / f"{data}.npz", spec.config)
    exact = answers_of(models["fp32"], requests)
    reference = quality_of(models["fp32"], exact, requests)
    return Case(name, spec, models, table, requests, budget, exact, reference)


@contextlib.contextmanager
def shipped_graph(case: Case, plan: QuantizationPlan | None) -> Iterator[Answer]:
    """The rewritten fp16 graph of a plan in ONNX Runtime, as the build makes it."""
    served = served_graphs(case.models["fp16"])[0]
    is_ranking = isinstance(case.models["fp16"], RankingModel)
    rows = RowSelection(served.max_candidates, "candidate_offsets") if is_ranking else RowSelection()
    passes = export_passes(served.num_attention, served.taps, rows, quantization=plan)
    *_, graph = apply_passes(exported_from_served(served, "fp16"), passes)
    output = "logits" if is_ranking else "user_embeddings"
    with open_session("onnxruntime", onnx=graph.model) as session:
        yield lambda feeds: session.run(dict(feeds))[output]


def forms(case: Case, plan: QuantizationPlan | None) -> Iterator[tuple[str, Answers, Quality]]:
    """Every form of a model with the rounding of a plan."""
    for dtype, model in case.models.items():
        with contextlib.nullcontext() if plan is None else fake_quantized(model, plan):
            answers = answers_of(model, case.requests)
        yield f"eager {dtype}", answers, quality_of(model, answers, case.requests)
    with shipped_graph(case, plan) as answer:
        answers = answers_of(case.models["fp16"], case.requests, answer)
    yield "onnxruntime", answers, quality_of(case.models["fp16"], answers, case.requests)


def measured(case: Case, plan: QuantizationPlan | None) -> Iterator[Row]:
    """A row for every form, without what says which plan it is."""
    for form, answers, quality in forms(case, plan):
        change = changes(case.reference, quality)
        row: Row = {"form": form, "worst": worst_change(case.reference, quality)}
        for column, (metric,) in METRICS.items():
            if metric in quality.values:
                row |= {column: quality.values[metric], f"change_{column}": change[metric]}
        if quality.ranks is not None and case.reference.ranks is not None:
            now, before = quality.ranks <= 10, case.reference.ranks <= 10
            row |= {"gained": int((now & ~before).sum()), "lost": int((before & ~now).sum())}
        yield {**row, "scores": score_difference(case.exact, answers)}


def mixed(case: Case, plan: QuantizationPlan, default: list[Row]) -> QuantizationPlan | None:
    """What --mixed auto makes of a plan; None where no mix is within the budget.

    The ladder's first step is the plan itself, which is measured already: where that is within the budget, it is the
    last one too.
    """
    if all(row["worst"] <= case.budget for row in default):
        return plan
    shipped = ShippedForm("onnxruntime", case.models["fp16"], lambda mix: shipped_graph(case, mix))
    try:
        return climb_ladder(case.models, plan, case.requests, case.budget, lambda *_: None, shipped).plan
    except CalibrationError:
        return None


def rows(case: Case, kinds: Sequence[Quantization], observers: Sequence[Observer]) -> Iterator[Row]:
    """All rows of one model."""
    for row in measured(case, None):
        yield {"kind": "none", "observer": "", "recipe": "", "quantised": 0, "kept": "", **row}
    weights = product_weights(case.models["fp32"])
    for kind, observer in itertools.product(kinds, observers):
        plan = plan_quantization(case.table, weights, kind, observer)
        facts: Row = {"kind": kind, "observer": observer}
        default = list(measured(case, plan))
        for row in default:
            yield {**facts, "recipe": "default", "quantised": len(plan.sites), "kept": "", **row}
        facts |= {"recipe": "mixed auto", "budget": case.budget}
        chosen = mixed(case, plan, default)
        if chosen is None:
            yield {**facts, "form": "refused", "quantised": 0, "kept": "", "worst": ""}
            continue
        kept = " ".join(name for name in plan.sites if name not in chosen.sites)
        for row in measured(case, chosen) if kept else default:
            yield {**facts, "quantised": len(chosen.sites), "kept": kept, **row}


def provenance(case: Case) -> Row:
    """What a row was made of, and with what."""
    git = ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]
    return {
        "requests": case.requests.num_requests,
        "checkpoint_sha256": case.spec.sha256,
        "data_sha256": case.requests.sha256,
        "versions": f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, numpy {np.__version__}",
        "machine": f"{platform.machine()} CPU",
        "commit": subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def main() -> int:
    """Measure, and write after every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--observers", nargs="+", choices=OBSERVERS, default=list(OBSERVERS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with arguments.output.open("w", encoding="utf-8", newline="") as file, tempfile.TemporaryDirectory() as folder:
        writer = csv.DictWriter(file, FIELDS, restval="", lineterminator="\n")
        writer.writeheader()
        for name in arguments.models:
            case = open_case(name, Path(folder))
            shared = {"model": name, **provenance(case)}
            for row in rows(case, arguments.kinds, arguments.observers):
                writer.writerow({**shared, **row})
                file.flush()
                print(
                    *(f"{key}={row[key]}" for key in ("kind", "observer", "recipe", "form", "worst", "kept")),
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
