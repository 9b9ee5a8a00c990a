"""The checks of quantised engines, with ONNX Runtime in their place: right graphs pass, wrong ones fail by name."""

from __future__ import annotations

import csv
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from hstu_compile.__main__ import main as command_line
from hstu_compile.artifacts import TensorSpec
from hstu_compile.runtime.session import Session, open_session
from tests.calibrated_models import calibration_table
from tests.dlrm_reference import DlrmForm, dlrm_state_dict

FOLDER = Path(__file__).parent


@pytest.fixture(scope="module")
def step() -> ModuleType:
    """The script as it is run: beside those that it imports."""
    for folder in (FOLDER, FOLDER.parent / "bench"):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    return importlib.import_module("run_quantised")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    form, place = DlrmForm(), tmp_path_factory.mktemp("quantised")
    checkpoint, config, table = place / "ckpt.pt", place / "config.json", place / "calibration.json"
    torch.save(dlrm_state_dict(form), checkpoint)
    config.write_text(json.dumps(form.user_config()))
    calibration_table(checkpoint, config).save(table)
    words = ["build", checkpoint, "--config", config, "--int8", "--calib", table, "--max-batch", "4"]
    assert command_line([*map(str, words), "--backend", "onnx", "-o", str(place / "tiny-int8")]) == 0
    return place / "tiny-int8"


class Altered:
    """A session whose answers or inputs are changed."""

    def __init__(self, session: Session, change: Callable[[dict[str, Any]], None], time_type: str = "int64") -> None:
        self._session, self._change, self.name = session, change, session.name
        self.inputs = tuple(
            TensorSpec(spec.name, time_type if spec.dtype == "int64" else spec.dtype, spec.shape)
            for spec in session.inputs
        )
        self.outputs = session.outputs

    def __enter__(self) -> Altered:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

    def run(self, feeds: dict[str, Any]) -> dict[str, Any]:
        outputs = dict(self._session.run(feeds))
        self._change(outputs)
        return outputs


def checked(step: ModuleType, bundle: Path, place: Path, monkeypatch: pytest.MonkeyPatch, open_it: Any) -> Any:
    """The only check's entry in the file that the step writes."""
    monkeypatch.setattr(step, "open_session", open_it)
    (graph,) = json.loads((bundle / "manifest.json").read_text())["graphs"]
    checks = step.Checks("quantised")
    step.check_engine(checks, "tiny-int8 packed", bundle, graph, Path("unread"), "tensorrt", None)
    checks.write(place / "quantised.json")
    (check,) = json.loads((place / "quantised.json").read_text())["checks"]
    return check


def nothing(outputs: dict[str, Any]) -> None:
    pass


def infinite(outputs: dict[str, Any]) -> None:
    outputs["logits"][0] = np.inf


def scaled(outputs: dict[str, Any]) -> None:
    outputs["preds"] = outputs["preds"] * 0.8


@pytest.mark.slow
@pytest.mark.parametrize(("change", "passes"), [(nothing, True), (infinite, False), (scaled, False)])
def test_right_answers_pass_and_wrong_ones_fail(
    step: ModuleType,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[dict[str, Any]], None],
    passes: bool,
) -> None:
    def open_it(*_: object, **__: object) -> Altered:
        return Altered(open_session("onnxruntime", onnx=bundle / "model.onnx"), change)

    check = checked(step, bundle, tmp_path, monkeypatch, open_it)
    assert check["passed"] is passes
    assert check["facts"]["feeds_beyond_int32"] == []
    assert {row["feed"] for row in check["facts"]["result"]["tensors"]} >= {"all feeds together, rms"}


@pytest.mark.slow
def test_feeds_beyond_int32_are_left_out_and_named(
    step: ModuleType, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_it(*_: object, **__: object) -> Altered:
        return Altered(open_session("onnxruntime", onnx=bundle / "model.onnx"), nothing, "int32")

    real = step.stored_reference

    def late_reference(folder: Path, graph: dict[str, Any]) -> Any:
        reference = real(folder, graph)
        times = next(name for name, array in reference.feeds[1].arrays.items() if array.dtype == np.int64)
        reference.feeds[1].arrays[times][:] = 2**31
        return reference

    monkeypatch.setattr(step, "stored_reference", late_reference)
    check = checked(step, bundle, tmp_path, monkeypatch, open_it)
    late = real(bundle, json.loads((bundle / "manifest.json").read_text())["graphs"][0]).feeds[1].name
    assert late in check["facts"]["feeds_beyond_int32"]
    assert late not in check["facts"]["feeds"]
    assert check["passed"], check


def test_a_pattern_that_matches_no_bundle_is_an_error(
    step: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Api:
        version = "1.0"

    monkeypatch.setattr(step, "tensorrt_api", lambda _: Api)
    (tmp_path / "quantised").mkdir()
    with pytest.raises(SystemExit, match=r"holds none of \*-int8"):
        step.main([str(tmp_path), str(tmp_path / "out"), "--backend", "tensorrt-rtx", "--bundles", "*-int8"])


def test_rows_of_a_run_replace_those_of_its_backend_and_type_alone(step: ModuleType, tmp_path: Path) -> None:
    calibration = importlib.import_module("bench_calibration")
    kept, run = tmp_path / "kept.csv", tmp_path / "run.csv"
    row = {"backend": "tensorrt-rtx", "status": "ok"}
    calibration.merged(kept, [{**row, "kind": kind, "median_ms": 1.0, "users": 1} for kind in ("fp16", "int8")])
    calibration.merged(run, [{**row, "kind": "int8", "median_ms": 2.0, "users": users} for users in (1, 2)])
    assert calibration.main(["--merge", str(run), "--out", str(kept)]) == 0
    with kept.open(newline="") as file:
        found = [(each["kind"], each["users"], float(each["median_ms"])) for each in csv.DictReader(file)]
    assert found == [("fp16", "1", 1.0), ("int8", "1", 2.0), ("int8", "2", 2.0)]
