"""The GPU step of the loader without a GPU: on fakes it passes, wrong answers fail, what it leaves is collected."""

from __future__ import annotations

import csv
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hstu_compile.plugin_library import KERNELS_LIBRARY
from tests.cpp_loader.conftest import SANITIZER, Loader
from tests.cpp_loader.fake_fused import write_fused_bundle

REPOSITORY = Path(__file__).resolve().parents[2]
NAMES = {"research-fp32": "retrieval", "dlrm-fp32": "ranking"}


@pytest.fixture(scope="module")
def step() -> ModuleType:
    """The script as the GPU machine imports it: from its own folder."""
    for folder in (REPOSITORY / "tests" / "gpu", REPOSITORY / "tests" / "bench"):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    return importlib.import_module("run_cpp_loader")


@pytest.fixture
def job(loader10: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: ModuleType) -> Path:
    """A job folder with bundles that have no engines, and engines as the steps trt85 and ranking leave them."""
    job, engines = tmp_path / "job", tmp_path / "engines"
    (job / "plugin").mkdir(parents=True)
    (job / "cpp_loader").mkdir()
    shutil.copy(loader10.program, job / "cpp_loader")
    shutil.copy(loader10.folder / "libfake_plugin.so", job / "plugin" / "libhstu_trt_plugin.so")
    (job / "job.json").write_text('{"commit": "c"}')
    for name, family in NAMES.items():
        made = loader10.bundle(tmp_path / name, family, plugin=False)
        shutil.copytree(made, job / "models" / name)
        for engine in (job / "models" / name).glob("*.engine"):
            target = engines / (f"{name}-plugin.engine" if family == "retrieval" else f"{name}/{engine.name}")
            target.parent.mkdir(parents=True, exist_ok=True)
            engine.rename(target)
        manifest = json.loads((job / "models" / name / "manifest.json").read_text())
        manifest["backend"] = {"name": "onnx", "version": None, "compute_capabilities": []}
        for graph in manifest["graphs"]:
            graph["engine"] = None
        (job / "models" / name / "manifest.json").write_text(json.dumps(manifest))
    environment = {**os.environ, **SANITIZER, "LD_LIBRARY_PATH": str(loader10.folder)}
    program = step.Program(job / "cpp_loader" / "hstu_score", None, environment)
    monkeypatch.setattr(step, "program_of", lambda _: program)
    monkeypatch.setattr(
        step, "tensorrt_api", lambda _: SimpleNamespace(version=f"{'.'.join(map(str, loader10.version))}.1")
    )
    monkeypatch.setattr(step, "compute_capability", lambda: "9.0")
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text('#!/bin/sh\nshift 6\n"$@"; code=$?\necho "========= ERROR SUMMARY: 0 errors"\nexit $code\n')
    sanitizer.chmod(0o755)
    monkeypatch.setenv("COMPUTE_SANITIZER", str(sanitizer))

    def answers(bundle: Path, words: list[object]) -> Any:
        """In place of Python's sessions: the same fake engines in a process of their own, without graphs."""
        folder = tmp_path / "python" / f"{bundle.name}-{'-'.join(map(str, words))}"
        folder.mkdir(parents=True)
        run = [bundle, *words, "--cuda-graphs", 0, "--iterations", 0, "--outputs", folder, "--json"]
        done = program.run(run, 60)
        return step.stored_answers(folder, len(json.loads(done.stdout)["cases"]))

    monkeypatch.setattr(step, "python_answers", lambda bundle, graph, _: answers(bundle, ["--graph", graph]))
    monkeypatch.setattr(step, "python_ranking_answers", lambda bundle, _: answers(bundle, ["--ranking"]))
    return job


def run(step: ModuleType, job: Path, *words: object) -> tuple[int, dict[str, Any]]:
    out = job.parent / "out"
    options = [job, out, "--engines", job.parent / "engines", "--bundles", *NAMES, "--soak-requests", 300, *words]
    code = step.main([str(word) for word in options])
    return code, json.loads((out / "cpp_loader.json").read_text())


def test_the_step_passes_on_fakes_and_is_collected(step: ModuleType, job: Path) -> None:
    code, result = run(step, job)
    assert result["failed"] == []
    assert code == 0
    names = [check["name"] for check in result["checks"]]
    assert "dlrm-fp32 ranking: soak of 300 requests over two streams" in names
    assert "research-fp32 retrieval: compute-sanitizer memcheck" in names
    assert sum("equals Python to the bit" in name for name in names) == 2 * 5
    soak = next(check for check in result["checks"] if "dlrm-fp32 ranking: soak" in check["name"])
    assert soak["facts"]["report"]["cache"]["evictions"] > 0
    collect_it(job, code)


def failed(result: dict[str, Any]) -> list[str]:
    found: list[str] = result["failed"]
    return found


def test_a_bit_that_differs_from_pythons_answer_fails_the_step(
    step: ModuleType, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = step.python_answers

    def altered(bundle: Path, graph: str, plugin: Path) -> Any:
        answers = real(bundle, graph, plugin)
        if graph == "retrieval":
            answers[1]["user_embeddings"].view(np.uint8)[2, 0] ^= 1
        return answers

    monkeypatch.setattr(step, "python_answers", altered)
    code, result = run(step, job, "--bundles", "research-fp32")
    assert code == 1
    label = "equals Python to the bit, and float64 within the bound"
    assert failed(result) == [f"research-fp32 retrieval, {kind}: {label}" for kind in ("CUDA graphs", "no CUDA graphs")]
    facts = next(check for check in result["checks"] if not check["passed"])["facts"]
    assert facts["differences"] == ["1: user_embeddings"]


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [("HSTU_FAKE_FLIP", "197", "soak"), ("HSTU_FAKE_SM", "80", "equals Python")],
)
def test_a_failure_of_the_program_fails_the_step(
    step: ModuleType, job: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, words: str
) -> None:
    program = step.program_of(job)
    broken = step.Program(program.path, None, {**program.environment, variable: value})
    monkeypatch.setattr(step, "program_of", lambda _: broken)
    code, result = run(step, job, "--bundles", "research-fp32")
    assert code == 1
    assert any(words in name for name in failed(result)), failed(result)


def test_findings_of_the_sanitizer_fail_the_step(step: ModuleType, job: Path) -> None:
    tool = Path(os.environ["COMPUTE_SANITIZER"])
    tool.write_text('#!/bin/sh\nshift 6\n"$@"\necho "========= ERROR SUMMARY: 2 errors"\nexit 99\n')
    code, result = run(step, job, "--bundles", "research-fp32")
    assert code == 1
    assert failed(result) == ["research-fp32 retrieval: compute-sanitizer memcheck"]


def test_an_engine_that_no_step_left_and_that_cannot_be_built_is_a_failure(step: ModuleType, job: Path) -> None:
    (job.parent / "engines" / "research-fp32-plugin.engine").unlink()
    code, result = run(step, job, "--bundles", "research-fp32")
    assert code == 1
    assert "research-fp32 retrieval: no step left an engine; it is built" in failed(result)
    assert "research-fp32: the bundle is put together" in failed(result)


@pytest.fixture
def fused_step(
    step: ModuleType, loader_rtx: Loader, loader10: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[ModuleType, Path]:
    """The script for bundles in segments, and a job folder with them and with both programs."""
    module, job = importlib.import_module("run_cpp_fused"), tmp_path / "job"
    (job / "cpp_loader").mkdir(parents=True)
    shutil.copy(loader10.program, job / "cpp_loader")
    shutil.copy(loader_rtx.program, job / "cpp_loader" / "hstu_score_rtx")
    (job / "job.json").write_text('{"commit": "c"}')
    for name, family in (("research-fp16-fused", "retrieval"), ("dlrm-fp16-fused", "ranking")):
        folder = job / "models" / name
        write_fused_bundle(folder, family, loader_rtx.version, loader_rtx.folder / KERNELS_LIBRARY)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest |= {"inputs": [], "outputs": []}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    environment = {**os.environ, **SANITIZER, "LD_LIBRARY_PATH": str(loader_rtx.folder)}
    program = step.Program(job / "cpp_loader" / "hstu_score_rtx", None, environment)
    monkeypatch.setattr(module, "program_of", lambda *_: program)
    # What is measured on fakes is of no interest.
    monkeypatch.setattr(step, "ITERATIONS", {})
    monkeypatch.setattr(step, "DEFAULT_ITERATIONS", 2)
    monkeypatch.setattr(module, "tensorrt_api", lambda _: SimpleNamespace(version="1.6.1.120"))
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text('#!/bin/sh\nshift 6\n"$@"; code=$?\necho "========= ERROR SUMMARY: 0 errors"\nexit $code\n')
    sanitizer.chmod(0o755)
    monkeypatch.setenv("COMPUTE_SANITIZER", str(sanitizer))

    def answers(bundle: Path, words: list[object]) -> Any:
        folder = tmp_path / "python" / f"{bundle.name}-{'-'.join(map(str, words))}"
        folder.mkdir(parents=True)
        done = program.run([bundle, *words, "--cuda-graphs", 0, "--iterations", 0, "--outputs", folder, "--json"], 60)
        return step.stored_answers(folder, len(json.loads(done.stdout)["cases"]))

    monkeypatch.setattr(step, "python_answers", lambda bundle, graph, _: answers(bundle, ["--graph", graph]))
    monkeypatch.setattr(step, "python_ranking_answers", lambda bundle, _: answers(bundle, ["--ranking"]))
    return module, job


def test_the_step_for_segments_passes_on_fakes_and_is_collected(fused_step: tuple[ModuleType, Path]) -> None:
    module, job = fused_step
    out = job.parent / "out"
    code = module.main([str(job), str(out), "--soak-requests", "50"])
    result = json.loads((out / "cpp_loader_fused.json").read_text())
    assert result["failed"] == []
    assert code == 0
    names = [check["name"] for check in result["checks"]]
    assert sum("equals Python to the bit" in name for name in names) == 2 * 5
    assert sum("names the one that is needed" in name for name in names) == 2
    collect_it(job, code, "cpp-loader-fused")


def test_a_bundle_that_is_not_there_fails_the_step_for_segments(fused_step: tuple[ModuleType, Path]) -> None:
    module, job = fused_step
    assert module.main([str(job), str(job.parent / "out"), "--bundles", "nowhere"]) == 1
    result = json.loads((job.parent / "out" / "cpp_loader_fused.json").read_text())
    assert failed(result) == ["nowhere: every file is the manifest's"]


def collect_it(job: Path, code: int, name: str = "cpp-loader") -> None:
    """What the step left, through job.sh's archive and update_results.sh, in a repository of its own."""
    root, suffix = job.parent, name.removeprefix("cpp-loader")
    step, repository, run_folder = root / name, root / "repository", root / "run"
    shutil.copytree(root / "out", step)
    record = {"step": name, "exit_code": code, "commit": "c" * 40, "gpu": "G, driver 1", "date": "2026-01-02"}
    (step / "run.json").write_text(json.dumps(record))
    run_folder.mkdir()
    subprocess.run(["tar", "czf", str(run_folder / f"{name}.tar.gz"), step.name], cwd=root, check=True)
    for folder in ("tests/bench/results", "tests/gpu", "plugins"):
        (repository / folder).mkdir(parents=True)
    for path in (REPOSITORY / "tests" / "bench").glob("*.py"):
        shutil.copy(path, repository / "tests" / "bench")
    for script in ("collect.py", "update_results.sh"):
        shutil.copy(REPOSITORY / "tests" / "gpu" / script, repository / "tests" / "gpu")
    marks = "<!-- plugin benchmark: begin -->\n<!-- plugin benchmark: end -->\n"
    marks += "<!-- gpu checks: begin -->\n<!-- gpu checks: end -->\n"
    (repository / "plugins" / "README.md").write_text(marks)
    document = repository / "loader.md"
    document.write_text("<!-- cpp-loader benchmark: begin -->\n<!-- cpp-loader benchmark: end -->\n")
    subprocess.run(["git", "init", "-q"], cwd=repository, check=True)
    subprocess.run(["git", "add", "."], cwd=repository, check=True)
    command = ["bash", str(repository / "tests" / "gpu" / "update_results.sh"), str(run_folder)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHON": sys.executable}, capture_output=True)
    with (repository / "tests" / "bench" / "results" / "cpp_loader.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["gpu"] for row in rows} == {"G, driver 1"}
    assert {row["cuda_graphs"] for row in rows} == {"0", "16"}
    assert {row["way"] for row in rows} == {"graph", "packed", "cold", "cached"}
    kind = "fp16-fused" if suffix else "fp32"
    assert rows[0]["command"].startswith(f"hstu_score dlrm-{kind} ")
    text = document.read_text()
    assert f"GPU G, driver 1; {'TensorRT-RTX 1.' if suffix else 'TensorRT 10.'}" in text
    assert "commit " + "c" * 40 in text
    assert f"| research-{kind} retrieval: mixed | graph | " in text
    assert "not measured" not in text
    stored = json.loads(
        (repository / "tests" / "gpu" / "results" / f"cpp_loader{suffix.replace('-', '_')}.json").read_text()
    )
    assert stored["failed"] == []
    assert stored["run"]["commit"] == "c" * 40
    assert (
        f"| cpp_loader{suffix.replace('-', '_')} | {stored['summary']} |"
        in (repository / "plugins" / "README.md").read_text()
    )
