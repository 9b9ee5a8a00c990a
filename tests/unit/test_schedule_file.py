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
    content["steps"][0], content["steps"][3] = content["steps"][3], content["steps"][0]


def _vary_what_the_first_call_makes(content: dict[str, Any]) -> None:
    (made,) = (each for each in content["crossing"] if each["name"] == content["calls"][0]["output"])
    made["shape"][1] = "D"


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
        (_set(("format_version",), 1), "format 1"),
        (_set(("operators", "HstuAttention"), "99"), "'99'"),
        (_set(("operators", "HstuSoftmax"), "1"), "HstuSoftmax"),
        (_set(("operators",), {"HstuNorm": "1"}), r"calls of other operators than \['HstuNorm'\]"),
        (_set(("calls", 1, "operator"), "HstuSoftmax"), "calls of other operators"),
        (_swap_steps, r"segment steps \[1, 0, 2\]"),
        (_set(("steps", 1, "index"), 1), r"kernel steps \[1, 1, 2, 3\]"),
        (_set(("steps", 1, "kind"), "shell"), "neither a segment nor a kernel"),
        (_set(("calls", 0, "inputs", "q"), "nowhere"), "nowhere"),
        (_set(("calls", 0, "attributes", "alpha"), float("inf")), "alpha is inf"),
        (_set(("calls", 0, "attributes", "time_bias"), 0), "its attributes say"),
        (_set(("crossing", 0, "last"), 99), "lives from step 0 to 99"),
        (_vary_what_the_first_call_makes, r"with rows \['D'"),
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
        (_set(("calls", 0, "views", "q", "column"), 151), r"column=151.*of a tensor \['L', 200\] as q"),
        (_set(("calls", 0, "views", "q", "column"), -1), "column=-1"),
        (_set(("calls", 0, "views", "q", "column"), 50.0), r"column=50\.0"),
        (_set(("calls", 0, "views", "k", "row_stride"), 400), "row_stride=400"),
        (_set(("calls", 0, "views", "v", "dims"), [2, 0]), r"dims=\(2, 0\)"),
        (_set(("calls", 0, "views", "v", "dims"), [True, 25]), r"dims=\(True, 25\)"),
        (_set(("calls", 1, "views", "gate", "column"), 151), r"column=151.*of a tensor \['L', 200\] as gate"),
        (_set(("calls", 1, "views", "x", "dims"), [51]), r"dims=\(51,\).*of a tensor \['L', 2, 25\] as x"),
        (_set(("calls", 0, "views", "v", "first"), 0), "first"),
        (_set(("calls", 0, "inputs", "v"), "timestamps"), r"of a tensor \['L'\] as v"),
        (_set(("calls", 0, "views"), {"q_offsets": {}}), "dims"),
        (lambda content: content["calls"][0].pop("views"), "views"),
    ],
)
def test_columns_outside_of_their_tensor_are_refused(damage: Callable[[dict[str, Any]], None], why: str) -> None:
    content = json.loads(schedule_text(retrieval_case("retrieval", "fp16").cut))
    damage(content)
    with pytest.raises(BundleError, match=rf"HSTU-E803.*{SOURCE}[\s\S]*{why}"):
        schedule_from_text(json.dumps(content), SOURCE)


def test_columns_of_an_input_that_kernels_read_contiguous_are_refused() -> None:
    content = json.loads(schedule_text(retrieval_case("retrieval", "fp16").cut))
    views = content["calls"][0]["views"]
    views["q_offsets"] = views["q"]
    with pytest.raises(BundleError, match="has q_offsets as columns, and only q, k, v may be"):
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
