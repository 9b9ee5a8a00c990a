"""Proves ranking in real TensorRT 8.5 engines: packed, prefill and score with the plugin, and M-FALCON over them.

Runs with TensorRT 8.5's Python (3.10, no torch) on a GPU; needs the folder that prepare_job.py made.
Usage: python run_ranking.py JOB OUT [--models DIR ...] [--resident FILE]    (JSON in OUT/ranking.json)
       python run_ranking.py JOB OUT --only-soak [--engines DIR]    (afterwards; OUT/ranking-soak.json)

The engines stay in OUT/engines/BUNDLE/{model,prefill,score}.engine, for the soak and for bench_m_falcon.py --engines.
Exit 0 if every check passed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import shlex
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(REPOSITORY / "tests" / "bench")]

from bench_m_falcon import free_bytes  # noqa: E402
from checks import Checks, Finished, run_command  # noqa: E402
from graph_checks import GRAPHS as CUDA_GRAPHS  # noqa: E402
from graph_checks import check_graphs  # noqa: E402
from ranking_checks import (  # noqa: E402
    GRAPHS,
    LEAST_FEEDS,
    Open,
    PreparedBundle,
    check_feeds,
    check_golden,
    check_m_falcon,
    chosen_feeds,
    fitting,
    golden_requests,
    ranking_session,
    synthetic_requests,
)
from run_tensorrt85 import plugin_layers, polygraphy_environment  # noqa: E402
from soak_ranking import SoakPlan, soak  # noqa: E402

from hstu_compile import bundle as bundles  # noqa: E402
from hstu_compile.polygraphy_files import save_feeds, save_outputs  # noqa: E402
from hstu_compile.runtime._feeds import converted  # noqa: E402
from hstu_compile.runtime.session import Session, open_session  # noqa: E402
from hstu_compile.session_check import Reference  # noqa: E402
from hstu_compile.tensorrt_api import tensorrt_api  # noqa: E402

#: The longest builds first.
BUNDLES = ("m_falcon-fp16", "dlrm-fp32", "dlrm-fp16")
GOLDEN_FILE = "golden_dlrm.npz"
SOAK_BUNDLE = "dlrm-fp32"
SOAK = SoakPlan(requests=20_000, users=2_000, threads=8, tolerance=1e-4)
#: Users of full length that the soak's cache holds: far fewer than there are.
SOAK_CACHE_USERS = 150
#: CUDA graphs of each engine; the soak's lengths are random, so that most of them are soon evicted.
SOAK_GRAPHS = 8
#: Memory of process and device that may come after a tenth of the soak: buffers that grow to the largest request.
MOST_GROWTH_MIB = 64.0
BUILD_SECONDS = 400.0
_MIB = 2.0**20


def bundle_folder(name: str, places: Sequence[Path]) -> Path:
    """Where a bundle lies.

    Raises:
        FileNotFoundError: if none of the places has it.
    """
    for place in places:
        if (place / name / bundles.MANIFEST).is_file():
            return place / name
    raise FileNotFoundError(f"none of {', '.join(map(str, places))} has the bundle {name}")


def engine_path(engines: Path, name: str, graph: str) -> Path:
    """Where a graph's engine is put."""
    return engines / name / bundles.model_files(graph)[1]


def build_engine(bundle: PreparedBundle, graph: str, engine: Path, plugin: Path) -> Finished:
    """Build with the real command line, which reads the graph's limits from the graph."""
    engine.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "hstu_compile", "engine", str(bundle.onnx(graph)), "-o", str(engine)]
    command += ["--backend", "tensorrt", "--plugins", str(plugin), "--max-batch", str(bundle.max_batch), "--json"]
    command += ["--exportLayerInfo", str(engine.with_suffix(".layers.json"))]
    # Not in the repository: its hstu_compile folder lacks the subpackages that installing adds.
    return run_command(command, timeout=BUILD_SECONDS, cwd=engine.parent)


def check_build(checks: Checks, bundle: PreparedBundle, graph: str, engine: Path, done: Finished) -> bool:
    """The build, and that attention and norm nodes became plugin layers; True if there is an engine to go on with."""
    label = f"{bundle.name} {graph}"
    with checks.check(f"{label}: hstu-compile engine") as check:
        check.facts |= {"exit_code": done.exit_code, "wall_seconds": round(done.seconds, 1)}
        check.facts["stderr"] = done.stderr[-2000:]
        check.facts["engine"] = json.loads(done.stdout)
        check.passed = done.exit_code == 0
    if done.exit_code != 0:
        return False
    with checks.check(f"{label}: the inspector shows one plugin layer per attention and norm node") as check:
        names = plugin_layers(engine.with_suffix(".layers.json"))
        check.facts |= {"layers": names, "nodes": bundle.num_plugin_nodes(graph)}
        check.passed = len(names) == check.facts["nodes"] > 0
    return True


def polygraphy_reference(reference: Reference, session: Session) -> Reference:
    """The stored feeds that Polygraphy can give the engine: it knows no empty tensors, and the engine no int64."""
    kept, _ = fitting(reference, session.inputs)
    full = [index for index, feed in enumerate(kept.feeds) if all(array.size for array in feed.arrays.values())]
    return chosen_feeds(kept, full)


def check_polygraphy(
    checks: Checks, bundle: PreparedBundle, graph: str, session: Session, engine: Path, plugin: Path, scratch: Path
) -> None:
    """`polygraphy run` on the engine against the eager outputs: exit 0, and exit 1 once the reference is altered."""
    dtypes = {tensor.name: tensor.dtype for tensor in session.inputs}
    outputs = [tensor.name for tensor in session.outputs]
    reference = polygraphy_reference(bundle.references[graph], session)
    feeds = [{name: converted(array, dtypes[name]) for name, array in each.arrays.items()} for each in reference.feeds]
    eager = [{name: values[name] for name in outputs} for values in reference.eager]
    altered = [{name: values * np.float32(0.9) for name, values in each.items()} for each in eager]
    scratch.mkdir(parents=True, exist_ok=True)
    save_feeds(
        scratch / "feeds.json", [{name: array for name, array in each.items() if array is not None} for each in feeds]
    )
    save_outputs(scratch / "eager.json", "eager", eager)
    save_outputs(scratch / "altered.json", "eager", altered)
    entry = "import sys; from polygraphy.tools import main; sys.exit(main())"
    for file, expected in (("eager.json", 0), ("altered.json", 1)):
        words = ["run", str(engine), "--model-type", "engine", "--trt", "--plugins", str(plugin)]
        words += ["--load-inputs", "feeds.json", "--load-outputs", file]
        words += ["--atol", *bundle.tolerances[graph], "--rtol", "0"]
        with checks.check(f"{bundle.name} {graph}: polygraphy run against {file} exits {expected}") as check:
            environment = polygraphy_environment(scratch.parent)
            done = run_command([sys.executable, "-c", entry, *words], timeout=120, cwd=scratch, env=environment)
            check.facts |= {"command": shlex.join(["polygraphy", *words]), "exit_code": done.exit_code}
            check.facts |= {"feeds": [feed.name for feed in reference.feeds], "output": done.tail}
            # A crash also exits 1: only Polygraphy's own verdict counts.
            said = f"{'PASSED' if expected == 0 else 'FAILED'} | Runtime" in done.stdout + done.stderr
            check.passed = done.exit_code == expected and said and len(feeds) >= LEAST_FEEDS


def check_bundle(
    checks: Checks, bundle: PreparedBundle, engines: Path, builds: dict[str, Finished], plugin: Path, golden: Path
) -> None:
    """All that must hold for one bundle."""
    built = [
        check_build(checks, bundle, graph, engine_path(engines, bundle.name, graph), builds[graph]) for graph in GRAPHS
    ]
    if not all(built):
        return
    open_graph = functools.partial(open_engine, engines, plugin, bundle.name)
    arrays = dict(np.load(golden, allow_pickle=False)) if bundle.name.startswith("dlrm") else {}
    for graph in GRAPHS:
        engine = engine_path(engines, bundle.name, graph)
        with checks.check(f"{bundle.name} {graph}: the session") as check, open_graph(graph) as session:
            check_feeds(checks, bundle, graph, session)
            if graph == "packed" and arrays:
                check_golden(checks, bundle, arrays, session)
            check_polygraphy(checks, bundle, graph, session, engine, plugin, engine.parent / f"polygraphy-{graph}")
            check.passed = True
    requests = synthetic_requests(bundle.spec) + (golden_requests(arrays, bundle.spec) if arrays else [])
    check_m_falcon(checks, bundle, open_graph, requests)
    with (
        checks.check(f"{bundle.name}: score reads the cache where it lies") as check,
        ranking_session(bundle.spec, open_graph, 4) as session,
    ):
        check.passed = session.stats().scores_in_place
    check_graphs(checks, bundle, open_graph, functools.partial(open_graph, cuda_graphs=CUDA_GRAPHS), free_bytes)


def check_resident(checks: Checks, report: Path) -> None:
    """What pytest wrote about the device pools' tests on the real GPU; a skipped one shows nothing."""
    with checks.check("device pools: tests/unit/test_resident.py on this GPU") as check:
        suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
        counts = {
            name: sum(int(suite.get(name, "0")) for suite in suites)
            for name in ("tests", "failures", "errors", "skipped")
        }
        check.facts |= counts
        check.passed = counts["tests"] > 0 and not any(counts[name] for name in ("failures", "errors", "skipped"))


def growth(samples: Sequence[int]) -> float:
    """MiB of device memory taken after the first tenth of the samples, which are free bytes."""
    warm = samples[len(samples) // 10]
    return (warm - min(samples[len(samples) // 10 :])) / _MIB


def check_soak(checks: Checks, bundle: PreparedBundle, open_graph: Open, plan: SoakPlan) -> None:
    """Every cached answer equals the uncached one, the budget holds, and neither process nor device memory grows."""
    with checks.check(f"{bundle.name}: soak of {plan.requests} requests, {plan.users} users") as check:
        free: list[int] = []
        with ranking_session(bundle.spec, open_graph, SOAK_CACHE_USERS) as session:
            report = soak(session, plan, lambda _: free.append(free_bytes()))
            free.append(free_bytes())
            graphs = session.stats().graphs
        check.facts["graphs"] = graphs
        check.facts |= {"plan": dataclasses.asdict(plan), "report": dataclasses.asdict(report)}
        check.facts |= {"device_growth_mib": growth(free), "relative_error": report.worst_logit / report.rms_logit}
        failures = report.failures(plan, MOST_GROWTH_MIB)
        if graphs.failures:
            failures.append(f"{graphs.failures} CUDA graphs could not be recorded, or gave another answer")
        if len(free) < 2:
            failures.append("the soak was too short to see device memory grow")
        if not growth(free) <= MOST_GROWTH_MIB:
            failures.append(f"device memory grew by {growth(free):.1f} MiB")
        check.facts["failures"] = failures
        check.passed = not failures


def open_engine(engines: Path, plugin: Path, name: str, graph: str, cuda_graphs: int = 0) -> Session:
    """Our session over an engine that was built here."""
    engine = engine_path(engines, name, graph)
    return open_session("tensorrt", engine=engine, plugin_library=plugin, cuda_graphs=cuda_graphs)


def run_checks(checks: Checks, arguments: argparse.Namespace, places: Sequence[Path], plugin: Path) -> int:
    """Build all engines, then check bundle after bundle; what was found is written after each."""
    results, engines = arguments.out / "ranking.json", arguments.out / "engines"
    prepared = []
    for name in arguments.bundles:
        with checks.check(f"{name}: the bundle is there") as check:
            prepared.append(PreparedBundle.read(bundle_folder(name, places)))
            check.passed = True
    with ThreadPoolExecutor(arguments.parallel) as pool:
        futures = {
            (bundle.name, graph): pool.submit(
                build_engine, bundle, graph, engine_path(engines, bundle.name, graph), plugin
            )
            for bundle in prepared
            for graph in GRAPHS
        }
    # All builds have ended here, so that a check that fails for want of memory failed by itself.
    golden = arguments.job / GOLDEN_FILE
    for bundle in prepared:
        builds = {graph: futures[bundle.name, graph].result() for graph in GRAPHS}
        check_bundle(checks, bundle, engines, builds, plugin, golden)
        checks.write(results)
    if arguments.resident is not None:
        check_resident(checks, arguments.resident)
    return checks.write(results)


def run_soak(checks: Checks, arguments: argparse.Namespace, places: Sequence[Path], plugin: Path) -> int:
    """The soak over engines that an earlier run left."""
    engines = arguments.engines or arguments.out / "engines"
    bundle = PreparedBundle.read(bundle_folder(arguments.soak_bundle, places))
    plan = dataclasses.replace(SOAK, requests=arguments.soak_requests)
    open_graph = functools.partial(open_engine, engines, plugin, bundle.name, cuda_graphs=SOAK_GRAPHS)
    check_soak(checks, bundle, open_graph, plan)
    return checks.write(arguments.out / "ranking-soak.json")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bundles", nargs="+", default=list(BUNDLES))
    parser.add_argument("--models", type=Path, nargs="+", default=[], help="folders of bundles besides JOB/models")
    parser.add_argument("--parallel", type=int, default=5, help="engine builds at the same time")
    parser.add_argument(
        "--resident", type=Path, metavar="FILE", help="pytest's JUnit report of the device pools' tests"
    )
    parser.add_argument("--only-soak", action="store_true", help="on the engines that an earlier run left")
    parser.add_argument("--engines", type=Path, metavar="DIR", help="of --only-soak (default: OUT/engines)")
    parser.add_argument("--soak-bundle", default=SOAK_BUNDLE)
    parser.add_argument("--soak-requests", type=int, default=SOAK.requests)
    arguments = parser.parse_args(argv)
    arguments.job, arguments.out = arguments.job.resolve(), arguments.out.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    plugin = next((arguments.job / "plugin").glob("*.so"))
    checks = Checks("ranking-soak" if arguments.only_soak else "ranking")
    checks.facts["job"] = json.loads((arguments.job / "job.json").read_text(encoding="utf-8"))
    checks.facts |= {"parallel_builds": arguments.parallel, "tensorrt": tensorrt_api("tensorrt").version}
    places = [arguments.job / "models", *(place.resolve() for place in arguments.models)]
    return (run_soak if arguments.only_soak else run_checks)(checks, arguments, places, plugin)


if __name__ == "__main__":
    sys.exit(main())
