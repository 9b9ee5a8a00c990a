"""The scripts around a GPU run: what they write down, and what they say when something failed. No GPU."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hstu_compile.errors import EngineError

REPOSITORY = Path(__file__).resolve().parents[2]


def load(path: str) -> ModuleType:
    file = REPOSITORY / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


bench = load("tests/bench/bench_plugin.py")
collect = load("tests/gpu/collect.py")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        # `fix` speaks of memory, and a warning follows the reason: neither decides.
        (
            EngineError("HSTU-E402", "not built", "[WARNING] a\n    [ERROR] no MatMul\n    [WARNING] b", "less memory"),
            "not built: HSTU-E402: [ERROR] no MatMul",
        ),
        (
            EngineError("HSTU-E404", "no context", "[ERROR] Cuda Runtime (out of memory)", "free GPU memory"),
            "out of memory: [ERROR] Cuda Runtime (out of memory)",
        ),
        (EngineError("HSTU-E404", "the CUDA call failed", "out of memory", "x"), "out of memory: out of memory"),
        (RuntimeError("memory layout differs"), "error: RuntimeError: memory layout differs"),
        (
            RuntimeError("NotImplementedError: SliceView\n\nSet TORCHDYNAMO_VERBOSE=1 for more"),
            "error: RuntimeError: NotImplementedError: SliceView",
        ),
    ],
)
def test_only_a_failed_allocation_is_called_out_of_memory(error: Exception, status: str) -> None:
    assert bench.status_of(error) == status


def part(folder: Path, backend: str, **facts: Any) -> None:
    row = {"case": "H=4 D=64 N=256 bias=none B=2 L=300", "backend": backend, "status": "ok", "tflops": 1.0, **facts}
    (folder / f"{backend}-d64-bias0-n256.json").write_text(json.dumps(row))


def test_merging_replaces_what_was_measured_again_and_keeps_the_rest(tmp_path: Path) -> None:
    first, second, target = tmp_path / "1", tmp_path / "2", tmp_path / "plugin.csv"
    first.mkdir()
    second.mkdir()
    part(first, "plugin", median_ms=2.0, peak_mib=10.0)
    part(first, "eager", median_ms=8.0, peak_mib=30.0)
    part(second, "native_rtx", median_ms=3.0, peak_mib=40.0)
    part(second, "eager", median_ms=6.0, peak_mib=30.0)
    assert bench.merge(first, target) == 0
    assert bench.merge(second, target) == 0
    with target.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["backend"], float(row["median_ms"])) for row in rows] == [
        ("plugin", 2.0),
        ("native_rtx", 3.0),
        ("eager", 6.0),
    ]
    line = bench.table_lines(rows)[-1]
    assert "| 2.000 (1, 10) | 3.000 (1, 40) | 1.5 | not measured |  | 6.000 (1, 30) | 3.0 | 4.0 |" in line


def test_a_run_without_parts_leaves_the_csv_alone(tmp_path: Path) -> None:
    target = tmp_path / "plugin.csv"
    target.write_text("untouched")
    assert bench.merge(tmp_path, target) == 1
    assert target.read_text() == "untouched"


def test_a_failed_check_stays_visible_in_the_collected_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "RESULTS", tmp_path / "results")
    run = tmp_path / "run" / "rtx"
    run.mkdir(parents=True)
    tensor = {"error": 3e-5, "bound": 1e-5}
    checks = [
        {"name": "deep: agrees", "passed": False, "facts": {"result": {"tensors": [tensor]}, "output": "x" * 9000}},
        {"name": "deep: builds", "passed": True, "facts": {"output": "long", "engine": "/some/where/a.engine"}},
    ]
    content = {
        "name": "rtx",
        "summary": "1 passed, 1 failed",
        "failed": ["deep: agrees"],
        "facts": {},
        "checks": checks,
    }
    (run / "rtx.json").write_text(json.dumps(content))
    (run / "run.json").write_text(json.dumps({"gpu": "G", "commit": "c" * 40, "date": "2026-01-01", "exit_code": 1}))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{collect.BEGIN}\nold\n{collect.END}\nafter\n")
    assert collect.main([str(tmp_path / "run"), "--into", str(readme)]) == 0
    stored = json.loads((tmp_path / "results" / "rtx.json").read_text())
    assert stored["run"]["commit"] == "c" * 40
    assert stored["failed"] == ["deep: agrees"]
    assert len(stored["checks"][0]["facts"]["output"]) < 1000
    assert stored["checks"][1]["facts"] == {"engine": "a.engine"}
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "rtx failed: deep: agrees" in text
    assert "| rtx | deep | 3e-05 | 1e-05 | **FAIL** |" in text


def test_conformance_counts_failures_and_sanitizer_verdicts(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"device": "D"},
        {"case": "a", "dtype": "float16", "mode": "m", "status": "pass", "componentwise": 0.1, "bound": 0.2},
        {"case": "a", "dtype": "float16", "mode": "n", "status": "fail", "componentwise": 0.3, "bound": 0.2},
    ]
    grid = tmp_path / "conformance.jsonl"
    grid.write_text("\n".join(map(json.dumps, lines)) + "\n1 passed, 1 failed\n")
    (tmp_path / "memcheck.txt").write_text(
        "== memcheck --filter a\n== ERROR SUMMARY: 0 errors\n== memcheck --filter b\n== ERROR SUMMARY: 2 errors\n"
    )
    found = collect.of_conformance(grid)
    assert found["summary"] == "1 passed, 1 failed"
    assert found["failed"][0]["mode"] == "n"
    assert found["cases"] == {"a float16": {"passed": 1, "worst": 0.3, "bound": 0.2}}
    assert found["sanitizers"] == {"memcheck": {"runs": 2, "clean": 1}}


def test_the_accuracy_step_is_kept_beside_the_other_checks_of_that_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect, "RESULTS", tmp_path / "results")
    for step in ("tensorrt85", "tensorrt85-accuracy"):
        folder = tmp_path / "run" / step
        folder.mkdir(parents=True)
        checks = [{"name": step, "passed": True, "facts": {"table": [{"tensor": "u", "own_worst": 1e-6}]}}]
        content = {"name": "tensorrt85", "summary": f"1 passed in {step}", "failed": [], "facts": {}, "checks": checks}
        (folder / f"{step}.json").write_text(json.dumps(content))
        (folder / "run.json").write_text(json.dumps({"gpu": "G", "commit": "c" * 40, "date": "2026-01-01"}))
    assert collect.main([str(tmp_path / "run")]) == 0
    for step in ("tensorrt85", "tensorrt85-accuracy"):
        stored = json.loads((tmp_path / "results" / f"{step}.json").read_text())
        assert stored["summary"] == f"1 passed in {step}"
        assert stored["checks"][0]["facts"]["table"] == [{"tensor": "u", "own_worst": 1e-6}]


def updated(tmp_path: Path, steps: tuple[str, ...], document: str, kept: tuple[str, ...] = ()) -> Path:
    """A repository of its own with a document and results, after update_results.sh: tmp_path / STEP is the run."""
    repository, run = tmp_path / "repository", tmp_path / "run"
    for folder in ("tests/bench/results", "tests/gpu", "plugins"):
        (repository / folder).mkdir(parents=True)
    for path in (REPOSITORY / "tests" / "bench").glob("*.py"):
        shutil.copy(path, repository / "tests" / "bench")
    for name in ("collect.py", "update_results.sh"):
        shutil.copy(REPOSITORY / "tests" / "gpu" / name, repository / "tests" / "gpu")
    (repository / "plugins" / "README.md").write_text(f"{bench.BEGIN}\n{bench.END}\n{collect.BEGIN}\n{collect.END}\n")
    for name in kept:
        shutil.copy(REPOSITORY / "tests" / "bench" / "results" / name, repository / "tests" / "bench" / "results")
    (repository / "document.md").write_text(document)
    subprocess.run(["git", "init", "-q"], cwd=repository, check=True)
    subprocess.run(["git", "add", "."], cwd=repository, check=True)
    run.mkdir()
    for step in steps:
        subprocess.run(["tar", "czf", str(run / f"{step}.tar.gz"), step], cwd=tmp_path, check=True)
    command = ["bash", str(repository / "tests" / "gpu" / "update_results.sh"), str(run)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHON": sys.executable}, capture_output=True)
    return repository


def test_each_benchmark_takes_the_parts_of_its_own_steps(tmp_path: Path) -> None:
    plugin, m_falcon = tmp_path / "bench-plugin" / "parts", tmp_path / "bench-m-falcon-engines" / "fp16"
    plugin.mkdir(parents=True)
    m_falcon.mkdir(parents=True)
    part(plugin, "plugin", median_ms=2.0, peak_mib=10.0)
    row = {"backend": "hstu_compile", "mode": "packed", "n": 1024, "m": 64, "micro_batch": 0, "dtype": "fp16"}
    row |= {"status": "ok", "median_ms": 3.0, "call_median_ms": 4.0}
    (m_falcon / "hstu_compile-packed-n1024-m64-b0.json").write_text(json.dumps(row))
    marks = "<!-- m-falcon benchmark: begin -->\n<!-- m-falcon benchmark: end -->\n"
    repository = updated(tmp_path, ("bench-plugin", "bench-m-falcon-engines"), marks)
    results = repository / "tests" / "bench" / "results"
    with (results / "plugin.csv").open() as file:
        assert [each["backend"] for each in csv.DictReader(file)] == ["plugin"]
    with (results / "m_falcon.csv").open() as file:
        assert [(each["mode"], each["median_ms"]) for each in csv.DictReader(file)] == [("packed", "3")]
    assert (results / "m_falcon.svg").read_text().startswith("<svg")
    assert "| 1024 | 64 |" in (repository / "document.md").read_text()


def test_timelines_reach_the_tables_without_times_of_the_same_run(tmp_path: Path) -> None:
    name = "timeline_fp16_B1_n1024_m256_pruned.csv"
    (tmp_path / "profile-end-to-end").mkdir()
    columns = ["case", "backend", "kernel", "kind", "launches", "us", "share"]
    kernels = [
        ("a_product", "product", 1, 7.5, 0.75),
        ("(gaps)", "(gaps)", 1, 2.5, 0.25),
        ("(span)", "(span)", 1, 10, 1),
    ]
    with (tmp_path / "profile-end-to-end" / name).open("w", newline="") as file:
        csv.writer(file).writerows([columns, *(("fp16_B1_n1024_m256_pruned", "eager", *kernel) for kernel in kernels)])
    marks = "<!-- end-to-end benchmark: begin -->\n<!-- end-to-end benchmark: end -->\n"
    repository = updated(tmp_path, ("profile-end-to-end",), marks, kept=("end_to_end.csv",))
    assert (repository / "tests" / "bench" / "results" / name).exists()
    assert "| `a_product` | product | 1 | 7.5 | 75.0% |" in (repository / "document.md").read_text()
