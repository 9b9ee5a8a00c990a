"""Proves bundles built with --attention fused on a GPU: engines of segments with our kernels between them.

Runs with any Python that has TensorRT-RTX, numpy and onnx; needs the parts `fused` and `fused-m_falcon` of
prepare_job.py. Nothing is built here. Every step of a graph is also run alone, on the values that ONNX Runtime had
there: if an answer is wrong, these say which step makes it so.
Usage: python run_fused.py JOB OUT [--bundles NAME ...] [--models DIR ...]    (JSON in OUT/fused.json)
       `--runtime onnxruntime` rehearses on a CPU what does not need the engines.
Exit 0 if every check passed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import multiprocessing
import os
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(REPOSITORY / "tests" / "bench")]

from bench_m_falcon import free_bytes  # noqa: E402
from bucket_checks import BUCKETS, check_buckets  # noqa: E402
from checks import Checks  # noqa: E402
from graph_checks import GRAPHS as CUDA_GRAPHS  # noqa: E402
from graph_checks import check_graphs  # noqa: E402
from ranking_checks import (  # noqa: E402
    GRAPHS,
    Open,
    PreparedBundle,
    check_feeds,
    check_golden,
    check_m_falcon,
    golden_requests,
    synthetic_requests,
)

from hstu_compile import bundle as bundles  # noqa: E402
from hstu_compile.artifacts import Schedule, Step, TensorSpec  # noqa: E402
from hstu_compile.compare import row_error, whole_error  # noqa: E402
from hstu_compile.ranking_bundle import open_ranking_session  # noqa: E402
from hstu_compile.recheck import stored_reference  # noqa: E402
from hstu_compile.runtime.ladder import Buckets  # noqa: E402
from hstu_compile.runtime.open_fused import FUSED_BACKEND, open_fused_session  # noqa: E402
from hstu_compile.runtime.schedule_file import schedule_from_text  # noqa: E402
from hstu_compile.runtime.session import Session  # noqa: E402
from hstu_compile.session_check import check_session  # noqa: E402
from hstu_compile.tensorrt_api import tensorrt_api  # noqa: E402
from tests.triton.processes import rss_mib  # noqa: E402

BUNDLES = ("research-fp16-fused", "dlrm-fp16-fused", "m_falcon-fp16-fused")
GOLDEN_FILE = "golden_dlrm.npz"
#: Folder of the job with what ONNX Runtime had between the steps.
STEPS = "fused_steps"
#: Of all values that a step makes, against the same step in ONNX Runtime: both round to float16, by half a thousandth a
#: value, and so do a few sums inside.
STEP_BOUND = 0.005
#: A plain run, one that is recorded, a replay that is compared, and replays that are not.
_ROUNDS = 6
_TIMED_SECONDS = 1.0
_MOST_TIMED = 200
_KV_BUDGET = 64 << 20


def open_graph(
    files: bundles.BundleFiles, runtime: str, graph: str, cuda_graphs: int = 0, buckets: Buckets | None = None
) -> Session:
    """One graph of a bundle, as a server opens it."""
    return bundles.open_graph(files, graph, runtime, cuda_graphs=cuda_graphs, buckets=buckets)


def check_steps(checks: Checks, files: bundles.BundleFiles, graph: str, stored: Mapping[str, Any]) -> None:
    """Each engine and each kernel alone, on the inputs that it had in ONNX Runtime."""
    fused = files.fused_graph(graph)
    assert fused is not None
    schedule = schedule_from_text(fused.schedule.read_text(encoding="utf-8"), fused.schedule.name)
    for number, step in enumerate(schedule.steps):
        with checks.check(
            f"{files.path.name} {graph}: {step.kind} {step.index} alone agrees with ONNX Runtime"
        ) as check:
            part = single_step(schedule, number, stored[f"reads {number}"], stored[f"writes {number}"])
            engines = [fused.engines[step.index]] if step.kind == "segment" else []
            with open_fused_session(part, engines, fused.kernels) as session:
                outputs = session.run({spec.name: stored[spec.name] for spec in session.inputs})
            errors = {name: step_errors(array, stored[name]) for name, array in outputs.items()}
            check.facts |= {"whole_and_worst_row": errors, "bound": STEP_BOUND}
            check.passed = bool(errors) and max(whole for whole, _ in errors.values()) <= STEP_BOUND


def single_step(schedule: Schedule, number: int, reads: Sequence[str], writes: Sequence[str]) -> Schedule:
    """A schedule of one step of another, whose inputs are fed."""
    step = schedule.steps[number]
    calls = (schedule.calls[step.index],) if step.kind == "kernel" else ()
    made = [each for each in schedule.crossing if each.spec.name in set(map(str, writes))]
    return Schedule(
        inputs=tuple(schedule.spec(str(name)) for name in reads if str(name) not in schedule.constants),
        outputs=tuple(each.spec for each in made),
        calls=calls,
        steps=(Step(step.kind, 0),),
        crossing=tuple(dataclasses.replace(each, first=0, last=0) for each in made),
        constants={name: array for name, array in schedule.constants.items() if name in set(map(str, reads))},
    )


def step_errors(actual: Any, expected: Any) -> tuple[float, float]:
    """Error of a tensor as a whole, and of its worst row; integers have to be equal."""
    if actual.shape != expected.shape:
        return float("inf"), float("inf")
    if not np.issubdtype(expected.dtype, np.floating):
        error = 0.0 if np.array_equal(actual, expected) else float("inf")
        return error, error
    one, other = (np.asarray(each, np.float64).reshape(len(each), -1) for each in (actual, expected))
    return whole_error([one], [other]), row_error(one, other).error


def feeds_of(reference: Any, inputs: Sequence[TensorSpec]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every stored request by name."""
    for feed in reference.feeds:
        yield feed.name, {spec.name: feed.arrays[spec.name] for spec in inputs}


def check_replays(checks: Checks, label: str, reference: Any, plain: Session, recorded: Session) -> None:
    """Every stored request over and over, in turn with the others: the same bits with CUDA graphs as without."""
    with (
        checks.check(f"{label}: replays equal plain runs to the bit") as check,
        warnings.catch_warnings(record=True) as warned,
    ):
        warnings.simplefilter("always")
        different = []
        for _ in range(_ROUNDS):
            for name, arrays in feeds_of(reference, plain.inputs):
                one, other = plain.run(arrays), recorded.run(arrays)
                different += [f"{name}: {key}" for key in one if one[key].tobytes() != other[key].tobytes()]
        stats = recorded.graph_stats
        check.facts |= {"different": different, "graphs": stats, "warnings": [str(each.message) for each in warned]}
        replayed = stats is not None and stats.replays > 0 and not stats.failures
        check.passed = replayed and not different and not warned


def check_first_passes(checks: Checks, label: str, reference: Any, plain: Session) -> None:
    """Milliseconds of every request's first pass in a session that has run none, and of the next, for the record."""
    with checks.check(f"{label}: time of every request's first pass, and memory") as check:
        for name, arrays in feeds_of(reference, plain.inputs):
            before = rss_mib(os.getpid())
            times = {"first_pass_ms": _run_ms(plain, arrays), "next_pass_ms": _run_ms(plain, arrays)}
            check.facts[name] = times | {"host_mib_more": rss_mib(os.getpid()) - before}
        check.passed = bool(check.facts)


def check_times(checks: Checks, label: str, reference: Any, plain: Session, recorded: Session) -> None:
    """Milliseconds of a request from arrays to arrays, host copies included, for the record."""
    with checks.check(f"{label}: time of every request, with and without CUDA graphs") as check:
        for name, arrays in feeds_of(reference, plain.inputs):
            check.facts[name] = {
                "plain_ms": median_ms(plain, arrays),
                "replayed_ms": median_ms(recorded, arrays),
                "shapes": {key: list(array.shape) for key, array in arrays.items()},
            }
        check.passed = bool(check.facts)


def median_ms(session: Session, arrays: dict[str, Any]) -> float:
    """Median of runs after some that are not counted."""
    samples: list[float] = []
    for _ in range(_ROUNDS):
        session.run(arrays)
    while len(samples) < _MOST_TIMED and sum(samples) < 1e3 * _TIMED_SECONDS:
        samples.append(_run_ms(session, arrays))
    return statistics.median(samples)


def _run_ms(session: Session, arrays: dict[str, Any]) -> float:
    started = time.perf_counter()
    session.run(arrays)
    return 1e3 * (time.perf_counter() - started)


def check_retrieval(checks: Checks, files: bundles.BundleFiles, runtime: str) -> None:
    """Every graph of a retrieval bundle: stored feeds, and replays."""
    precision = files.manifest["precision"]["requested"]
    for entry in files.manifest["graphs"]:
        graph, reference = entry["name"], stored_reference(files.path, entry)
        label = f"{files.path.name} {graph}"
        with checks.check(f"{label}: our session agrees with float64 on every feed") as check:
            with open_graph(files, runtime, graph) as session:
                result = check_session(session, graph, reference, precision, lambda *_: None)
            check.facts["result"] = result
            check.passed = result.status == "PASS" and bool(result.tensors)
        _check_recorded(checks, files, runtime, graph, reference)


def _check_recorded(checks: Checks, files: bundles.BundleFiles, runtime: str, graph: str, reference: Any) -> None:
    if runtime != FUSED_BACKEND:
        return
    label = f"{files.path.name} {graph}"
    with checks.check(f"{label}: sessions with and without CUDA graphs") as opened:
        kept = len(reference.feeds)
        with open_graph(files, runtime, graph) as plain, open_graph(files, runtime, graph, kept) as recorded:
            opened.facts["runtime"] = plain.name
            check_first_passes(checks, label, reference, plain)
            check_replays(checks, label, reference, plain, recorded)
            check_times(checks, label, reference, plain, recorded)
        opened.passed = True


def check_ranking(
    checks: Checks, files: bundles.BundleFiles, runtime: str, golden: Path, mixed: int, partial: Path
) -> None:
    """All that holds for a ranking bundle in one piece holds for one in segments."""
    bundle = PreparedBundle.read(files.path)
    opener: Open = functools.partial(open_graph, files, runtime)
    arrays = dict(np.load(golden, allow_pickle=False)) if bundle.name.startswith("dlrm") else {}
    for graph in GRAPHS:
        with checks.check(f"{bundle.name} {graph}: the session") as check, opener(graph) as session:
            check.facts["runtime"] = session.name
            check_feeds(checks, bundle, graph, session)
            if graph == "packed" and arrays:
                check_golden(checks, bundle, arrays, session)
            check.passed = True
        _check_recorded(checks, files, runtime, graph, bundle.references[graph])
    requests = synthetic_requests(bundle.spec) + (golden_requests(arrays, bundle.spec) if arrays else [])
    check_m_falcon(checks, bundle, opener, requests)
    if runtime == FUSED_BACKEND:
        check_graphs(checks, bundle, opener, functools.partial(opener, cuda_graphs=CUDA_GRAPHS), free_bytes)
    records = runtime == FUSED_BACKEND
    bucketed = functools.partial(opener, cuda_graphs=CUDA_GRAPHS if records else 0, buckets=BUCKETS)
    # Should the time end, what was checked so far is there.
    checks.write(partial)
    check_buckets(checks, bundle, opener, bucketed, mixed, records=records)
    if all(bundle.onnx(graph).is_file() for graph in GRAPHS):
        with checks.check(f"{bundle.name}: open_ranking_session serves it as any bundle") as check:
            with open_ranking_session(files.path, runtime, kv_budget_bytes=_KV_BUDGET) as served:
                outcomes = [[each.cache for each in served.score(requests[:1])] for _ in range(3)]
                check.facts |= {"outcomes": outcomes, "stats": served.stats()}
            check.passed = outcomes == [["miss"], ["hit"], ["hit"]]


def checked_bundle(job: Path, folder: Path, runtime: str, partial: Path, mixed: int) -> Checks:
    """All of one bundle, for a process of its own: one that crashes takes no other with it.

    What the steps alone gave is in `partial` before the sessions are opened, and what they answered before the mixed
    requests.
    """
    checks = Checks("fused")
    with checks.check(f"{folder.name}: every file is the manifest's") as check:
        files = bundles.read_bundle(folder)
        check.facts |= {"backend": files.manifest["backend"], "kernels": files.manifest["kernels"]}
        check.passed = all(files.fused_graph(entry["name"]) is not None for entry in files.manifest["graphs"])
    if not check.passed:
        return checks
    if runtime == FUSED_BACKEND:
        for entry in files.manifest["graphs"]:
            stored = job / STEPS / f"{folder.name}-{entry['name']}.npz"
            if stored.is_file():
                check_steps(checks, files, entry["name"], dict(np.load(stored, allow_pickle=False)))
        checks.write(partial)
    if files.ranking is None:
        check_retrieval(checks, files, runtime)
    else:
        check_ranking(checks, files, runtime, job / GOLDEN_FILE, mixed, partial)
    return checks


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bundles", nargs="+", default=list(BUNDLES))
    parser.add_argument("--models", type=Path, nargs="+", default=[], help="folders of bundles besides JOB/models")
    parser.add_argument("--mixed-requests", type=int, default=10_000, help="in buckets, of each ranking bundle")
    parser.add_argument("--runtime", choices=(FUSED_BACKEND, "onnxruntime"), default=FUSED_BACKEND)
    arguments = parser.parse_args(argv)
    job, out = arguments.job.resolve(), arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    checks = Checks("fused")
    checks.facts["job"] = json.loads((job / "job.json").read_text(encoding="utf-8"))
    if arguments.runtime == FUSED_BACKEND:
        checks.facts[FUSED_BACKEND] = tensorrt_api(FUSED_BACKEND).version
    places = [job / "models", *(place.resolve() for place in arguments.models)]
    for name in arguments.bundles:
        folder = next((place / name for place in places if (place / name / bundles.MANIFEST).is_file()), None)
        if folder is None:
            with checks.check(f"{name}: the bundle is there") as check:
                check.facts["places"] = [str(place) for place in places]
            continue
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            try:
                partial = out / f"{name}-steps.json"
                found = pool.submit(checked_bundle, job, folder, arguments.runtime, partial, arguments.mixed_requests)
                checks.take(found.result())
            except BrokenProcessPool as error:
                with checks.check(f"{name}: its process lives") as check:
                    check.facts["error"] = str(error)
        checks.write(out / "fused.json")
    return checks.write(out / "fused.json")


if __name__ == "__main__":
    sys.exit(main())
