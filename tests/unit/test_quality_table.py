"""The kept quality of quantised models: complete, within the bars of the default recipe, and what the page shows."""

from __future__ import annotations

import itertools

import pytest

from hstu_compile.calibrate import DEFAULT_OBSERVER
from hstu_compile.calibration.observers import OBSERVERS
from tests.bench.quality_table import BEGIN, END, PAGE, load, tables

ROWS = load()
#: Largest change of a metric by int8 without --mixed: absolute of HR@10 and NDCG@10, relative of AUC and NE.
BARS = {"demo": 0.005, "research": 0.005, "dlrm": 0.001}


def own(model, kind, observer, recipe):
    return [
        row
        for row in ROWS
        if (row["model"], row["kind"], row["observer"], row["recipe"]) == (model, kind, observer, recipe)
    ]


def test_every_rule_was_measured_with_both_types():
    plans = [(*plan, "default") for plan in itertools.product(BARS, ("int8", "fp8"), OBSERVERS)]
    plans += [(*plan, "mixed auto") for plan in itertools.product(BARS, ("int8",), OBSERVERS)]
    assert not [plan for plan in plans if not own(*plan)]
    assert {row["requests"] for row in ROWS} == {"943"}


@pytest.mark.parametrize("model", BARS)
def test_int8_by_the_default_rule_is_within_the_bar_in_every_form(model):
    found = {row["form"]: float(row["worst"]) for row in own(model, "int8", DEFAULT_OBSERVER, "default")}
    assert set(found) == {"eager fp32", "eager fp16", "onnxruntime"}
    assert max(found.values()) <= BARS[model]


def test_mixed_auto_keeps_its_budget_in_every_form_or_is_refused():
    rows = [row for row in ROWS if row["recipe"] == "mixed auto" and row["form"] != "refused"]
    assert len(rows) >= 3 * 3 * len(BARS)
    assert {row["form"] for row in rows} == {"eager fp32", "eager fp16", "onnxruntime"}
    assert all(float(row["worst"]) <= float(row["budget"]) for row in rows)


@pytest.mark.parametrize("model", BARS)
def test_mixed_auto_finds_a_rule_for_int8(model):
    """Left the choice of the rule, it takes the first in this order by which a mix is within the budget."""
    asked = (DEFAULT_OBSERVER, *(each for each in OBSERVERS if each != DEFAULT_OBSERVER))
    found = [rule for rule in asked if own(model, "int8", rule, "mixed auto")[0]["form"] != "refused"]
    assert found[0] == {"demo": "percentile"}.get(model, DEFAULT_OBSERVER)


def test_the_page_shows_what_is_kept():
    shown = PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip()
    assert shown == tables(ROWS)
