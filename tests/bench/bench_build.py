"""Measure what a build costs and append the rows to results/build.csv; not a test, nothing here has a time limit.

Cases: export of an 8-layer model, its TensorRT-RTX engine, and the whole `hstu-compile build` of the fixture with
verification (process start and imports included, each case in a process of its own). `wall_s` is what a user waits,
`cpu_s` what the machine worked, children included: on a shared machine only the second repeats. `peak_rss_mib` is the
largest resident set of the case's process or of a child.

Targets on 2 cores, in wall seconds: export 15, engine 5, whole build 40.

Run: python tests/bench/bench_build.py [--repeat N] [--output FILE]
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import multiprocessing
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
FIXTURE = REPOSITORY.parent / "shared" / "fixtures" / "meta_research_ml100k"
RESULTS = Path(__file__).resolve().parent / "results" / "build.csv"
NUM_LAYERS = 8
TARGETS = {"export_8_layers": 15.0, "rtx_engine_8_layers": 5.0, "build_fixture_fp16": 40.0}
PACKAGES = (
    "hstu-compile",
    "torch",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "tensorrt-rtx-cu13",
    "tensorrt-rtx",
    "polygraphy",
)
COLUMNS = ["case", "wall_s", "cpu_s", "peak_rss_mib", "target_s", "repeats", "commit", "dirty", "versions"]
COLUMNS += ["python", "cpu", "cores", "load_average", "command", "date"]

Measured = tuple[float, float, float]


def _cpu_seconds() -> float:
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def _peak_rss_mib() -> float:
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024


def _timed(action: Callable[[], object]) -> Measured:
    wall, cpu = time.perf_counter(), _cpu_seconds()
    action()
    return time.perf_counter() - wall, _cpu_seconds() - cpu, _peak_rss_mib()


def _eight_layers() -> Any:
    sys.path.insert(0, str(REPOSITORY))
    from tests.exported_models import small_config, small_model

    attention = {
        "max_seq_len": 200,
        "pos_table_len": 211,
        "num_time_buckets": 128,
        "attention_dim": 64,
        "linear_dim": 64,
    }
    config = small_config(NUM_LAYERS, attention, embedding_dim=128, num_items=10_000, num_positions=211)
    return small_model(config, "fp16")


def export_8_layers() -> Measured:
    """Tracing and every rewrite pass; imports and the model's construction are not counted."""
    from tests.exported_models import exported_retrieval, rewritten

    model = _eight_layers()
    return _timed(lambda: rewritten(exported_retrieval(model, "fp16"), NUM_LAYERS))


def rtx_engine_8_layers() -> Measured:
    """The engine alone, from the graph in memory."""
    from hstu_compile.engine import engine_from_onnx
    from hstu_compile.profiles import ProfileSizes
    from hstu_compile.trt_options import EngineOptions
    from tests.exported_models import exported_retrieval, retrieval_profile, rewritten

    graph = rewritten(exported_retrieval(_eight_layers(), "fp16"), NUM_LAYERS).model
    profiles = retrieval_profile(ProfileSizes(64, 200, 8, 100))
    return _timed(
        lambda: engine_from_onnx(
            graph, backend="tensorrt-rtx", profiles=profiles, plugin_library=None, options=EngineOptions()
        )
    )


def build_fixture_fp16() -> Measured:
    """The command as a user types it."""
    program = Path(sysconfig.get_path("scripts")) / "hstu-compile"
    with tempfile.TemporaryDirectory() as folder:
        command = [program, "build", FIXTURE / "ckpt.pt", "--config", FIXTURE / "config.json", "--fp16"]
        command += ["--backend", "tensorrt-rtx", "-o", Path(folder) / "meta.hstu"]
        return _timed(lambda: subprocess.run(command, check=True, capture_output=True))


CASES = {case.__name__: case for case in (export_8_layers, rtx_engine_8_layers, build_fixture_fp16)}


def _in_own_process(case: str, queue: Any) -> None:
    sys.path.insert(0, str(REPOSITORY))
    queue.put(CASES[case]())


def measured(case: str) -> Measured:
    """One run of a case in a fresh process, so that its peak memory is its own.

    Raises:
        RuntimeError: if the process fails; its traceback was printed.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_in_own_process, args=(case, queue))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"{case} failed with exit code {process.exitcode}")
    result: Measured = queue.get()
    return result


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.strip()


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _versions() -> str:
    installed = {
        distribution.name.replace("_", "-"): distribution.version for distribution in importlib.metadata.distributions()
    }
    return " ".join(f"{name}={installed[name]}" for name in PACKAGES if name in installed)


def main() -> int:
    """Run every case and append its row."""
    parser = argparse.ArgumentParser(description="Measure what a build costs.")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each case; the median is recorded")
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file to append to")
    arguments = parser.parse_args()
    facts = {
        "repeats": arguments.repeat,
        "commit": _git("rev-parse", "HEAD"),
        "dirty": int(bool(_git("status", "--porcelain", "--untracked-files=no"))),
        "versions": _versions(),
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "command": shlex.join(["python", "tests/bench/bench_build.py", "--repeat", str(arguments.repeat)]),
    }
    rows = []
    for case in CASES:
        if case == "build_fixture_fp16" and not FIXTURE.is_dir():
            print(f"{case}: skipped, shared/fixtures/meta_research_ml100k is absent")
            continue
        load = os.getloadavg()[0]
        runs = [measured(case) for _ in range(arguments.repeat)]
        wall, cpu = (statistics.median(run[index] for run in runs) for index in (0, 1))
        peak = max(run[2] for run in runs)
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        row = {"case": case, "wall_s": round(wall, 2), "cpu_s": round(cpu, 2), "peak_rss_mib": round(peak)}
        rows.append({**row, "target_s": TARGETS[case], **facts, "load_average": round(load, 1), "date": date})
        print(f"{case:<22} wall {wall:6.1f} s  cpu {cpu:6.1f} s  peak {peak:5.0f} MiB  target {TARGETS[case]:g} s")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    is_new = not arguments.output.exists()
    with arguments.output.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if is_new:
            writer.writeheader()
        writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
