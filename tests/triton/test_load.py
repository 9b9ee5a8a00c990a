"""16 clients of both protocols at once: nothing lost, nothing wrong, memory flat; and what the long form found."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hstu_compile.serving.settings import RuntimeSettings
from tests.bench import soak_triton
from tests.triton.load import LoadPlan, LoadReport, Memory, run_load
from tests.triton.models import ServedModel, deploy
from tests.triton.server import TritonServer
from tests.triton.workload import Question, distinct, questions

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

DOCS = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
PLAN = LoadPlan(requests=1_200)
#: Too short for a slope: lengths and batch sizes still come for the first time.
MOST_GROWTH_MIB, MOST_SLOPE_BYTES = 16.0, float("inf")


def test_sixteen_clients_get_every_answer_and_the_right_one(
    triton_server: TritonServer, retrieval: ServedModel, ranking: ServedModel
) -> None:
    settings = RuntimeSettings(kv_budget_mib=1)
    models = {
        deploy(triton_server, model, f"{model.name}_load", settings=settings): model for model in (retrieval, ranking)
    }
    pool = questions(models, users=40)
    assert distinct(pool) > 200
    report = run_load(triton_server, pool, PLAN)
    assert report.failures(PLAN, MOST_GROWTH_MIB, MOST_SLOPE_BYTES) == []
    for outcome in ("ranking_load hit", "ranking_load off", "retrieval_load hit", "retrieval_load appended"):
        assert report.outcomes[outcome] > 10, report.outcomes
    assert {"tritonserver", "stub of ranking_load", "stub of retrieval_load"} <= report.memory.keys()
    # A wrong answer would have been noticed: each is another request's under the same names.
    for first, other in itertools.pairwise(pool):
        if first.kind == other.kind and first.exact.keys() == other.exact.keys() and first.user != other.user:
            answer = {**other.exact, "truncated": np.zeros((1, 1), np.int32), "cache": np.array([[b"hit"]])}
            assert first.fault(answer) is not None
            assert other.fault(answer) is None


def question() -> Question:
    return Question("m", "ranking", 0, {}, {"preds": np.full((1, 3, 2), 0.5)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda answer: answer | {"preds": answer["preds"] * 0.99}, "preds differs by"),
        (lambda answer: answer | {"preds": np.zeros_like(answer["preds"])}, "preds differs by"),
        (lambda answer: answer | {"preds": answer["preds"] * np.nan}, "preds differs by"),
        (lambda answer: answer | {"preds": answer["preds"][:, :2]}, "shape"),
        (lambda answer: answer | {"truncated": np.array([[2]])}, "2 events were cut"),
        (lambda answer: {name: array for name, array in answer.items() if name != "preds"}, "no preds"),
    ],
)
def test_an_answer_that_is_wrong_is_called_wrong(change: Any, message: str) -> None:
    right = {
        "preds": np.full((1, 3, 2), 0.5, np.float32),
        "truncated": np.zeros((1, 1), np.int32),
        "cache": np.array([[b"off"]]),
    }
    assert question().fault(right) is None
    assert message in str(question().fault(change(right)))


COUNTS = {"requests": 10, "passes": 5, "successes": 10, "failures": 0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lost": 1, "answered": 9}, "1 lost"),
        ({"wrong": 1}, "1 wrong"),
        ({"requests": 9}, "9 of 10 requests were sent"),
        ({"sent": {"m": 9}}, "9 requests were sent, and the server counts"),
        ({"statistics": {"m": {**COUNTS, "failures": 1}}}, "the server counts"),
        ({"statistics": {"m": {**COUNTS, "passes": 10}}}, "nothing was merged"),
        ({"memory": {"tritonserver": Memory(40.0, 49.0, 1.0)}}, "memory grew by 9.0 MiB"),
        ({"memory": {"tritonserver": Memory(40.0, 41.0, 2000.0)}}, "2000 bytes per request"),
        ({"memory": {"tritonserver": Memory(40.0, float("nan"), 1.0)}}, "memory grew"),
    ],
)
def test_a_report_that_is_not_good_says_why(changes: dict[str, Any], message: str) -> None:
    good = LoadReport(
        requests=10,
        answered=10,
        sent={"m": 10},
        statistics={"m": COUNTS},
        memory={"tritonserver": Memory(40.0, 41.0, 1.0)},
    )
    bounds = (soak_triton.MOST_GROWTH_MIB, soak_triton.MOST_SLOPE_BYTES)
    assert good.failures(LoadPlan(10), *bounds) == []
    found = dataclasses.replace(good, **changes).failures(LoadPlan(10), *bounds)
    assert message in " ".join(found)


def test_the_documentation_has_the_numbers_of_the_kept_soak() -> None:
    result = json.loads(soak_triton.RESULT.read_text(encoding="utf-8"))
    assert (result["status"], result["failures"]) == ("PASS", [])
    report = result["report"]
    assert (report["requests"], report["answered"], report["lost"], report["wrong"]) == (20_000, 20_000, 0, 0)
    assert result["plan"]["clients"] == 16
    # The caches were too small: somebody's rows were computed again.
    for model in report["statistics"]:
        assert report["outcomes"][f"{model} miss"] > 300
    text = DOCS.read_text(encoding="utf-8")
    shown = text.partition(f"{soak_triton.BEGIN}\n")[2].partition(soak_triton.END)[0]
    assert shown == soak_triton.table_text(result)
