"""Proves the C++ loader in real TensorRT 8.5: answers equal those of Python's sessions to the bit; memcheck, soak.

Runs with TensorRT 8.5's Python (3.10, no torch) on a GPU; needs the folder that prepare_job.py made, with cpp_loader.
Usage: python run_cpp_loader.py JOB OUT [--engines DIR ...] [--budget 225]   (OUT/cpp_loader.json and OUT/rows.csv)

Engines are those that the steps trt85 and ranking left; what is missing is built here. Bundles are put together in a
scratch folder: what prepare_job.py built, its engines, the plugin library, and a manifest that vouches for all of it.
Exit 0 if every check passed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(REPOSITORY / "tests" / "bench")]

from checks import Check, Checks, Finished, run_command  # noqa: E402
from ranking_checks import fitting, ranking_session  # noqa: E402
from served_bundles import BUNDLES, Clock, compute_capability, found_engine, served_bundle  # noqa: E402

from hstu_compile import bundle as bundles  # noqa: E402
from hstu_compile.environment import loaded_libraries  # noqa: E402
from hstu_compile.m_falcon_check import requests_of  # noqa: E402
from hstu_compile.recheck import stored_reference  # noqa: E402
from hstu_compile.runtime.kv_layout import KvLayout  # noqa: E402
from hstu_compile.runtime.ranking_spec import RankingSpec  # noqa: E402
from hstu_compile.runtime.session import Session, open_session  # noqa: E402
from hstu_compile.tensorrt_api import tensorrt_api  # noqa: E402

RANKING = "ranking"
SOAK_REQUESTS = 10_000
#: Users of full length that the soak's cache holds: far fewer than there are, so that some go.
SOAK_USERS = 1
#: Seconds that each command may take at most; all together are held to --budget.
BUILD_SECONDS, RUN_SECONDS, MEMCHECK_SECONDS, SOAK_SECONDS = 150.0, 45.0, 75.0, 60.0
#: Requests per measured case.
ITERATIONS = {RANKING: 50}
DEFAULT_ITERATIONS = 200
_CLEAN = re.compile(r"ERROR SUMMARY: 0 errors")

Answers = list[dict[str, np.ndarray[Any, Any]]]
#: Opens one graph of the bundle that is checked.
Opener = Callable[[str], Session]
#: The loader's program for a backend, and the library of it that Python loads.
PROGRAMS = {"tensorrt": ("hstu_score", "libnvinfer"), "tensorrt-rtx": ("hstu_score_rtx", "libtensorrt_rtx")}


@dataclasses.dataclass(frozen=True)
class Program:
    """hstu_score on this machine.

    Attributes:
        path: of the program.
        tensorrt: library that Python loaded, or None for the loader's own search.
        environment: of its process.
    """

    path: Path
    tensorrt: Path | None
    environment: Mapping[str, str]

    def command(self, *words: object) -> list[str]:
        """The command as typed."""
        library = [] if self.tensorrt is None else ["--tensorrt-library", str(self.tensorrt)]
        return [str(self.path), *map(str, words), *library]

    def run(self, words: Sequence[object], timeout: float, before: Sequence[str] = ()) -> Finished:
        """Run it, under another program where `before` names one."""
        return run_command([*before, *self.command(*words)], timeout=timeout, env=dict(self.environment))


def program_of(job: Path, backend: str = "tensorrt") -> Program:
    """The program, which finds the libraries that Python's TensorRT has loaded."""
    name, library = PROGRAMS[backend]
    tensorrt_api(backend)
    found = loaded_libraries()
    folders = {str(Path(path).parent) for paths in found.values() for path in paths}
    paths = [*sorted(folders), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    path = job / "cpp_loader" / name
    path.chmod(0o755)
    return Program(path, Path(found[library][0]), {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(paths)})


def build_engine(onnx: Path, engine: Path, plugin: Path, max_batch: int, timeout: float) -> Finished:
    """Build with the real command line."""
    engine.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "hstu_compile", "engine", str(onnx), "-o", str(engine), "--backend", "tensorrt"]
    command += ["--plugins", str(plugin), "--max-batch", str(max_batch)]
    return run_command(command, timeout=timeout, cwd=engine.parent)


def engines_of(
    checks: Checks, job: Path, names: Sequence[str], places: Sequence[Path], scratch: Path, plugin: Path, clock: Clock
) -> dict[str, dict[str, Path]]:
    """Engines by bundle and graph; those that no step left are built, all at the same time."""
    engines: dict[str, dict[str, Path]] = {}
    missing: list[tuple[str, str, Path, int]] = []
    for name in names:
        manifest = json.loads((job / "models" / name / bundles.MANIFEST).read_text(encoding="utf-8"))
        engines[name] = {}
        for graph in (entry["name"] for entry in manifest["graphs"]):
            found = found_engine(name, graph, places)
            if found is None:
                found = scratch / "engines" / name / bundles.model_files(graph)[1]
                missing.append((name, graph, found, manifest["limits"]["max_batch"]))
            engines[name][graph] = found

    def build(each: tuple[str, str, Path, int]) -> Finished:
        name, graph, engine, max_batch = each
        onnx = job / "models" / name / bundles.model_files(graph)[0]
        return build_engine(onnx, engine, plugin, max_batch, clock.at_most(BUILD_SECONDS))

    with ThreadPoolExecutor(max(1, len(missing))) as pool:
        for each, done in zip(missing, pool.map(build, missing), strict=True):
            with checks.check(f"{each[0]} {each[1]}: no step left an engine; it is built") as check:
                check.facts |= {"exit_code": done.exit_code, "seconds_built": round(done.seconds, 1)}
                check.facts["output"] = done.tail
                check.passed = done.exit_code == 0
    return engines


def python_answers(bundle: Path, graph: str, opener: Opener) -> Answers:
    """What Python's session answers to every reference feed of a graph that its engine can be asked."""
    manifest = json.loads((bundle / bundles.MANIFEST).read_text(encoding="utf-8"))
    entry = next(each for each in manifest["graphs"] if each["name"] == graph)
    with opener(graph) as session:
        feeds, _ = fitting(stored_reference(bundle, entry), session.inputs)
        return [session.run(feed.arrays) for feed in feeds.feeds]


def _open(bundle: Path, plugin: Path, graph: str) -> Session:
    return open_session("tensorrt", engine=bundle / bundles.model_files(graph)[1], plugin_library=plugin)


def python_ranking_answers(bundle: Path, opener: Opener) -> Answers:
    """What Python's ranking session answers, one request of the packed feeds after the other."""
    manifest = json.loads((bundle / bundles.MANIFEST).read_text(encoding="utf-8"))
    spec = RankingSpec.from_manifest(manifest["ranking"])
    packed = manifest["graphs"][0]
    with opener(packed["name"]) as session:
        feeds, _ = fitting(stored_reference(bundle, packed), session.inputs)
    answers = []
    with ranking_session(spec, opener, spec.max_batch) as ranking:
        for feed in feeds.feeds:
            for request in requests_of(feed, spec):
                [result] = ranking.score([request])
                answers.append({"preds": result.preds, "logits": result.logits})
            ranking.clear()
    return answers


def stored_answers(folder: Path, count: int) -> Answers:
    """What the program wrote."""
    answers = []
    for index in range(count):
        with np.load(folder / f"{index}.npz", allow_pickle=False) as file:
            answers.append({name: file[name] for name in file.files})
    return answers


def differences(actual: Answers, expected: Answers) -> list[str]:
    """Every tensor that is not the same to the bit."""
    if len(actual) != len(expected):
        return [f"{len(actual)} answers, and Python gave {len(expected)}"]
    found = []
    for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
        if set(one) != set(other):
            found.append(f"{index}: outputs {sorted(one)}, and Python has {sorted(other)}")
        for name in set(one) & set(other):
            same = one[name].dtype == other[name].dtype and one[name].shape == other[name].shape
            if not same or one[name].tobytes() != other[name].tobytes():
                found.append(f"{index}: {name}")
    return found


def words_of(bundle: Path, graph: str) -> list[object]:
    """The command line for a graph, or for a ranking session."""
    return [bundle, "--ranking"] if graph == RANKING else [bundle, "--graph", graph]


def checked_report(check: Check, done: Finished) -> dict[str, Any]:
    """The program's report, into the facts; an end without one is what it said."""
    check.facts |= {"exit_code": done.exit_code, "seconds_run": round(done.seconds, 2)}
    try:
        report: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        check.facts["output"] = done.tail
        return {}
    check.facts["report"] = report
    return report


def check_answers(
    checks: Checks, program: Program, bundle: Path, graph: str, expected: Answers, out: Path, clock: Clock
) -> None:
    """Equal to Python to the bit, with and without CUDA graphs; the same runs are measured."""
    for cuda_graphs in (16, 0):
        label = f"{bundle.name} {graph}, {'CUDA graphs' if cuda_graphs else 'no CUDA graphs'}"
        name = f"{label}: equals Python to the bit, and float64 within the bound"
        with tempfile.TemporaryDirectory() as place, checks.check(name) as check:
            folder = Path(place)
            words = [*words_of(bundle, graph), "--cuda-graphs", cuda_graphs, "--outputs", folder, "--json"]
            words += ["--csv", out / "rows.csv", "--iterations", ITERATIONS.get(graph, DEFAULT_ITERATIONS)]
            check.facts["command"] = " ".join(map(str, ["hstu_score", *words]))
            report = checked_report(check, program.run(words, clock.at_most(RUN_SECONDS)))
            check.facts["differences"] = differences(stored_answers(folder, len(report["cases"])), expected)
            replays = report["graphs"]["replays"]
            check.passed = (
                check.facts["exit_code"] == 0
                and not check.facts["differences"]
                and len(expected) > 0
                and report["compared"] is True
                and (replays > 0) == (cuda_graphs > 0)
                and report["graphs"]["failures"] == 0
            )


def check_memcheck(checks: Checks, program: Program, bundle: Path, graph: str, out: Path, clock: Clock) -> None:
    """A short run under compute-sanitizer, graphs and all."""
    with checks.check(f"{bundle.name} {graph}: compute-sanitizer memcheck") as check:
        tool = os.environ.get("COMPUTE_SANITIZER") or shutil.which("compute-sanitizer")
        tool = tool or next(map(str, sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))), None)
        assert tool is not None, "compute-sanitizer was not found; set COMPUTE_SANITIZER to its path"
        # TensorRT asks the runtime for what may not be there; those answers are no faults.
        before = [tool, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "99"]
        words = [*words_of(bundle, graph), "--iterations", 0]
        done = program.run(words, clock.at_most(MEMCHECK_SECONDS), before)
        (out / f"memcheck-{bundle.name}.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
        check.facts |= {"exit_code": done.exit_code, "seconds_run": round(done.seconds, 1), "output": done.tail}
        check.passed = done.exit_code == 0 and _CLEAN.search(done.stdout + done.stderr) is not None


def soak_budget_kib(bundle: Path) -> int:
    """A KV cache of `SOAK_USERS` users of full length; 0 for bundles that have none."""
    entry = json.loads((bundle / bundles.MANIFEST).read_text(encoding="utf-8")).get("ranking")
    if entry is None:
        return 0
    spec = RankingSpec.from_manifest(entry)
    layout = KvLayout(spec.num_layers, spec.num_heads, spec.attention_dim, spec.linear_dim, spec.kv_dtype)
    return -(-SOAK_USERS * layout.entry_bytes(spec.contextual_len + spec.max_history_len) // 1024)


def check_soak(checks: Checks, program: Program, bundle: Path, graph: str, requests: int, clock: Clock) -> None:
    """Two streams, every answer that of the first run, no growth of device or host memory."""
    with checks.check(f"{bundle.name} {graph}: soak of {requests} requests over two streams") as check:
        words = [*words_of(bundle, graph), "--soak", requests, "--streams", 2, "--iterations", 0, "--json"]
        if budget := soak_budget_kib(bundle):
            words += ["--kv-budget-kib", budget]
        check.facts["command"] = " ".join(map(str, ["hstu_score", *words]))
        report = checked_report(check, program.run(words, clock.at_most(SOAK_SECONDS)))
        soak = report["soak"]
        check.passed = check.facts["exit_code"] == 0 and soak["different"] == 0 and soak["requests"] == requests


def check_bundle(
    checks: Checks, program: Program, bundle: Path, opener: Opener, out: Path, soak_requests: int, clock: Clock
) -> None:
    """All that must hold for one bundle."""
    manifest = json.loads((bundle / bundles.MANIFEST).read_text(encoding="utf-8"))
    for graph in (entry["name"] for entry in manifest["graphs"]):
        expected: Answers = []
        with checks.check(f"{bundle.name} {graph}: Python's session answers") as check:
            expected = python_answers(bundle, graph, opener)
            check.facts["feeds"] = len(expected)
            check.passed = bool(expected)
        check_answers(checks, program, bundle, graph, expected, out, clock)
    main = manifest["graphs"][0]["name"]
    if manifest["ranking"] is not None:
        main = RANKING
        answers: Answers = []
        with checks.check(f"{bundle.name}: Python's ranking session answers") as check:
            answers = python_ranking_answers(bundle, opener)
            check.facts["requests"] = len(answers)
            check.passed = bool(answers)
        check_answers(checks, program, bundle, main, answers, out, clock)
    check_soak(checks, program, bundle, main, soak_requests, clock)
    check_memcheck(checks, program, bundle, main, out, clock)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bundles", nargs="+", default=list(BUNDLES))
    parser.add_argument("--engines", type=Path, nargs="+", default=[], help="folders that trt85 and ranking left")
    parser.add_argument("--scratch", type=Path, help="for bundles with engines (default: beside OUT)")
    parser.add_argument("--soak-requests", type=int, default=SOAK_REQUESTS)
    parser.add_argument("--budget", type=float, default=225.0, help="seconds for everything")
    arguments = parser.parse_args(argv)
    job, out = arguments.job.resolve(), arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    scratch = (arguments.scratch or out.with_name(f"{out.name}-bundles")).resolve()
    scratch.mkdir(parents=True, exist_ok=True)
    (out / "rows.csv").unlink(missing_ok=True)
    clock, checks, results = Clock(arguments.budget), Checks("cpp_loader"), out / "cpp_loader.json"
    plugin = next((job / "plugin").glob("*.so"))
    program = program_of(job)
    version = tensorrt_api("tensorrt").version
    checks.facts |= {"job": json.loads((job / "job.json").read_text(encoding="utf-8")), "tensorrt": version}
    places = [place.resolve() for place in arguments.engines]
    engines = engines_of(checks, job, arguments.bundles, places, scratch, plugin, clock)
    for name in arguments.bundles:
        with checks.check(f"{name}: the bundle is put together") as check:
            source, target = job / "models" / name, scratch / name
            bundle = served_bundle(source, engines[name], plugin, target, version, compute_capability())
            check.passed = True
        if check.passed:
            opener = functools.partial(_open, bundle, plugin)
            check_bundle(checks, program, bundle, opener, out, arguments.soak_requests, clock)
        checks.write(results)
    return checks.write(results)


if __name__ == "__main__":
    sys.exit(main())
