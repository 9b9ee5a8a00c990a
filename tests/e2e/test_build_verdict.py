"""A build whose artifact is wrong says so: exit code, last line, manifest and report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest

from hstu_compile import pipeline
from hstu_compile.artifacts import OnnxGraph
from tests.e2e.conftest import Build, hstu_compile, save_checkpoint
from tests.exported_models import small_config

pytestmark = pytest.mark.e2e


def test_a_rewrite_that_changes_the_model_fails_the_build_and_marks_the_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = pipeline._Build.rewritten

    def wrong(*arguments: Any) -> OnnxGraph:
        result = right(*arguments)
        table = next(t for t in result.model.graph.initializer if list(t.dims) == [41, 32])
        values = onnx.numpy_helper.to_array(table).copy()
        values[1:] = values[:0:-1]
        table.CopyFrom(onnx.numpy_helper.from_array(values, table.name))
        return result

    monkeypatch.setattr(pipeline._Build, "rewritten", wrong)
    checkpoint = save_checkpoint(tmp_path / "small.pt", small_config(num_layers=1))
    result = hstu_compile("build", checkpoint, "-o", tmp_path / "b.hstu", "--fp16", "--backend", "onnx")
    assert result.exit_code == 6, result.stderr
    assert "FAIL" in result.stdout.strip().splitlines()[-1]
    assert json.loads((tmp_path / "b.hstu" / "manifest.json").read_text())["status"] == "FAIL"
    report = json.loads((tmp_path / "b.hstu" / "report.json").read_text())
    assert report["status"] == "FAIL"
    assert report["verification"]["worst_error"] > report["verification"]["worst_bound"]
    assert hstu_compile("verify", tmp_path / "b.hstu").exit_code == 6


def test_every_stage_prints_one_line_with_its_time(build_small: Build) -> None:
    result = build_small("--fp16", "--top-k", 10).result
    lines = [line for line in result.stderr.splitlines() if line.startswith("[")]
    assert [line.split()[:2] for line in lines] == [
        [f"[{index}/{len(pipeline.STAGES)}]", name] for index, name in enumerate(pipeline.STAGES, start=1)
    ]
    assert all(line.endswith(" s") for line in lines)


def test_a_build_prints_nothing_but_its_own_lines(build_small: Build) -> None:
    result = build_small("--fp16", "--top-k", 10).result
    assert "Saving inference results" not in result.stdout + result.stderr
    assert ".partial" not in result.stdout + result.stderr
