"""A schedule written and read: the same again, and nothing that a session could not run."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hstu_compile.errors import BundleError
from hstu_compile.runtime.schedule_file import schedule_from_text, schedule_text
from tests.fake_cuda import FakeCuda
from tests.fused_fakes import FakeKernels, fused_session
from tests.segmented_cases import retrieval_case

SOURCE = "model.schedule.json"


@pytest.fixture(scope="module")
def text() -> str:
    return schedule_text(retrieval_case("append", "fp16").cut)


def test_what_is_read_is_what_was_written(text: str) -> None:
    cut = retrieval_case("append", "fp16").cut
    found = schedule_from_text(text, SOURCE)
    for field in ("inputs", "outputs", "calls", "steps", "crossing"):
        assert getattr(found, field) == getattr(cut, field), field
    assert set(found.constants) == set(cut.constants)
    for name, array in cut.constants.items():
        np.testing.assert_array_equal(found.constants[name], array)
        assert found.constants[name].dtype == array.dtype
    assert schedule_text(found) == text


def test_a_session_runs_by_what_was_read(text: str) -> None:
    case, cuda = retrieval_case("append", "fp16"), FakeCuda(2**24)
    feeds = case.feeds[1]
    with fused_session(case.cut, cuda) as session:
        expected = session.run(feeds)
    read = schedule_from_text(text, SOURCE)
    with fused_session(case.cut, cuda, FakeKernels(case.cut, cuda), schedule=read) as session:
        for name, values in session.run(feeds).items():
            np.testing.assert_array_equal(values, expected[name])


def _drop(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.pop(key)


def _swap_steps(content: dict[str, Any]) -> None:
    content["steps"][0], content["steps"][2] = content["steps"][2], content["steps"][0]


def _set(path: tuple[Any, ...], value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for part in path[:-1]:
            content = content[part]
        content[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (_drop("steps"), "steps"),
        (_drop("constants"), "constants"),
        (_set(("format_version",), 2), "format 2"),
        (_set(("operator", "version"), "99"), "'99'"),
        (_swap_steps, r"segment steps \[1, 0, 2\]"),
        (_set(("steps", 1, "index"), 1), r"attention steps \[1, 1\]"),
        (_set(("steps", 1, "kind"), "shell"), "neither a segment nor an attention"),
        (_set(("attentions", 0, "inputs", "q"), "nowhere"), "nowhere"),
        (_set(("attentions", 0, "attributes", "alpha"), float("inf")), "alpha is inf"),
        (_set(("attentions", 0, "attributes", "time_bias"), 0), "its attributes say"),
        (_set(("crossing", 0, "last"), 99), "lives from step 0 to 99"),
        (_set(("inputs", 0, "shape"), [None]), r"shape \[None\]"),
        (_set(("inputs", 0, "dtype"), "float7"), "float7"),
    ],
)
def test_a_damaged_file_is_refused(text: str, damage: Callable[[dict[str, Any]], None], why: str) -> None:
    content = json.loads(text)
    damage(content)
    with pytest.raises(BundleError, match=rf"HSTU-E803.*{SOURCE}[\s\S]*{why}"):
        schedule_from_text(json.dumps(content), SOURCE)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (_set(("attentions", 0, "views", "q", "column"), 151), r"column=151.*of a tensor \['L', 200\] as q"),
        (_set(("attentions", 0, "views", "q", "column"), -1), "column=-1"),
        (_set(("attentions", 0, "views", "q", "column"), 50.0), r"column=50\.0"),
        (_set(("attentions", 0, "views", "k", "row_stride"), 400), "row_stride=400"),
        (_set(("attentions", 0, "views", "v", "dim"), 0), "dim=0"),
        (_set(("attentions", 0, "views", "v", "heads"), True), "heads=True"),
        (_set(("attentions", 0, "views", "v", "first"), 0), "first"),
        (_set(("attentions", 0, "inputs", "v"), "timestamps"), r"of a tensor \['L'\] as v"),
        (_set(("attentions", 0, "views"), {"q_offsets": {}}), "ColumnView"),
        (lambda content: content["attentions"][0].pop("views"), "views"),
    ],
)
def test_columns_outside_of_their_tensor_are_refused(damage: Callable[[dict[str, Any]], None], why: str) -> None:
    content = json.loads(schedule_text(retrieval_case("retrieval", "fp16").cut))
    damage(content)
    with pytest.raises(BundleError, match=rf"HSTU-E803.*{SOURCE}[\s\S]*{why}"):
        schedule_from_text(json.dumps(content), SOURCE)


def test_columns_of_another_input_than_queries_keys_and_values_are_refused() -> None:
    content = json.loads(schedule_text(retrieval_case("retrieval", "fp16").cut))
    views = content["attentions"][0]["views"]
    views["q_offsets"] = views["q"]
    with pytest.raises(BundleError, match="has q_offsets as columns, and only q, k and v may be"):
        schedule_from_text(json.dumps(content), SOURCE)


@pytest.mark.parametrize("broken", ["", "{", "[]", "null", "[" * 100_000])
def test_what_is_no_json_object_is_refused(broken: str) -> None:
    with pytest.raises(BundleError, match=rf"HSTU-E803.*{SOURCE}"):
        schedule_from_text(broken, SOURCE)


def test_a_constant_of_another_size_is_refused(text: str) -> None:
    content = json.loads(text)
    entry = next(iter(content["constants"].values()))
    entry["data"] = entry["data"][:-8]
    with pytest.raises(BundleError, match="HSTU-E803"):
        schedule_from_text(json.dumps(content), SOURCE)
