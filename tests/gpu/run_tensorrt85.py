"""Proves the plugin inside real TensorRT 8.5 engines: built, inspected, run and compared with the eager model.

Runs with TensorRT 8.5's Python (3.10, no torch) on a GPU; needs the folder that prepare_job.py made.
Usage: python run_tensorrt85.py JOB OUT [--parallel 3]      (JSON in OUT/tensorrt85.json; exit 0 if every check passed)
       python run_tensorrt85.py JOB OUT --only-accuracy     (values inside the layers; OUT/tensorrt85-accuracy.json)
       python run_tensorrt85.py JOB OUT --only-timing       (afterwards, alone on the GPU; OUT/tensorrt85-timing.json)
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(REPOSITORY / "tests" / "bench")]

from accuracy_checks import SPELLINGS, TAPPED_FEEDS, check_functions, check_layers, tapped_graph  # noqa: E402
from checks import Checks, Finished, run_command  # noqa: E402
from device_timing import EngineRunner  # noqa: E402
from references import (  # noqa: E402
    Arrays,
    PreparedModel,
    compare_ranking,
    empty_requests,
    leave_one_out,
    prepared_model,
)

from hstu_compile.compare import error_bound  # noqa: E402
from hstu_compile.polygraphy_files import save_feeds, save_outputs  # noqa: E402
from hstu_compile.runtime._feeds import converted  # noqa: E402
from hstu_compile.runtime.session import Session, open_session  # noqa: E402
from hstu_compile.session_check import check_session  # noqa: E402
from hstu_compile.tensorrt_api import tensorrt_api  # noqa: E402

PLUGIN_MODELS = ("research-fp16", "research-fp32", "cycled-fp16", "cycled-fp32", "deep-fp16", "deep-fp32")
NATIVE_MODELS = ("research-fp32", "research-fp16")
BUILD_SECONDS = 300.0
#: Loads an engine in a process of its own, where no plugin library was loaded before.
_LOAD_BARE = """
import json, sys
from pathlib import Path
from hstu_compile.errors import HstuCompileError
from hstu_compile.runtime.session import open_session
try:
    open_session("tensorrt", engine=Path(sys.argv[1])).close()
except HstuCompileError as error:
    print(json.dumps(error.to_dict()))
else:
    print(json.dumps({"code": None}))
"""


def build_engine(graph: Path, out: Path, plugin: Path | None) -> Finished:
    """Build with the real command line; the engine and the inspector's JSON land beside each other."""
    command = [sys.executable, "-m", "hstu_compile", "engine", str(graph), "-o", str(out)]
    command += ["--backend", "tensorrt", "--exportLayerInfo", str(out.with_suffix(".layers.json")), "--json"]
    if plugin is not None:
        command += ["--plugins", str(plugin)]
    # Not in the repository: its hstu_compile folder lacks the subpackages that installing adds.
    return run_command(command, timeout=BUILD_SECONDS, cwd=out.parent)


def plugin_layers(path: Path) -> list[str]:
    """Names of the plugin layers in the inspector's JSON."""
    entries = json.loads(path.read_text(encoding="utf-8"))["Layers"]
    return [entry["Name"] for entry in entries if "plugin" in str(entry.get("LayerType", "")).lower()]


def silent(what: str, done: int, total: int) -> None:
    """No progress bar in a log."""


def check_runs(checks: Checks, label: str, model: PreparedModel, session: Session) -> None:
    """Every stored feed through our session, under the rule of `hstu-compile verify`; then batches without events."""
    with checks.check(f"{label}: our session agrees with float64 on every feed") as check:
        result = check_session(session, label, model.reference, model.precision, silent)
        check.facts["result"] = result
        check.passed = result.status == "PASS" and len(result.tensors) == len(model.reference.feeds)
    for batch in (1, 3):
        with checks.check(f"{label}: {batch} empty sequences, no events at all, give zeros") as check:
            users = session.run(empty_requests(batch))["user_embeddings"]
            check.facts["shape"] = list(users.shape)
            check.passed = users.shape[0] == batch and not users.any()
    with checks.check(f"{label}: the same request twice gives the same bits") as check:
        feed = model.reference.feeds[1].arrays
        first, second = (session.run(feed)["user_embeddings"] for _ in range(2))
        check.passed = first.tobytes() == second.tobytes() and bool(first.any())


def int32_feeds(model: PreparedModel) -> list[tuple[int, Arrays]]:
    """The stored feeds that have events, as TensorRT 8 takes them, with their place in the reference."""
    feeds = []
    for index, feed in enumerate(model.reference.feeds):
        narrow = {name: converted(values, "int32") for name, values in feed.arrays.items()}
        if all(values is not None for values in narrow.values()) and feed.lengths.sum() > 0:
            feeds.append((index, {name: values for name, values in narrow.items() if values is not None}))
    return feeds


def polygraphy_environment(scratch: Path) -> dict[str, str]:
    """Where Polygraphy finds a CUDA runtime: it takes any libcudart.so in LD_LIBRARY_PATH, which 8.5 does not bring."""
    folders = [Path("/usr/local/cuda/lib64"), *Path("/usr/local").glob("cuda-*/lib64")]
    for entry in (
        "/usr/lib/python3*/dist-packages",
        "/usr/local/lib/python3*/*-packages",
        "/opt/*/lib/python3*/*-packages",
    ):
        folders += [path for site in Path("/").glob(entry[1:]) for path in site.glob("nvidia/*/lib")]
    candidates = [file for folder in folders if folder.is_dir() for file in sorted(folder.glob("libcudart.so*"))]
    environment = dict(os.environ)
    if candidates:
        # A folder of its own: the others hold libraries that must not shadow TensorRT's.
        own = scratch / "cudart"
        own.mkdir(parents=True, exist_ok=True)
        link = own / "libcudart.so"
        link.unlink(missing_ok=True)
        link.symlink_to(candidates[0].resolve())
        environment["LD_LIBRARY_PATH"] = os.pathsep.join([str(own), environment.get("LD_LIBRARY_PATH", "")])
    return environment


def check_polygraphy(checks: Checks, model: PreparedModel, engine: Path, plugin: Path, scratch: Path) -> None:
    """`polygraphy run` on the engine against the eager outputs: exit 0, and not 0 once the reference is altered."""
    feeds = int32_feeds(model)
    eager = [{"user_embeddings": model.reference.eager[index]["user_embeddings"]} for index, _ in feeds]
    altered = [{name: values * np.float32(0.9) for name, values in each.items()} for each in eager]
    scratch.mkdir(parents=True, exist_ok=True)
    save_feeds(scratch / "feeds.json", [arrays for _, arrays in feeds])
    save_outputs(scratch / "eager.json", "eager", eager)
    save_outputs(scratch / "altered.json", "eager", altered)
    # Polygraphy compares absolute differences; both sides may lie a bound away from float64, in different directions.
    scale = max(float((each["user_embeddings"] ** 2).mean(axis=1).max()) ** 0.5 for each in model.reference.exact)
    eager_error = model.reference.eager_error["user_embeddings"]
    atol = f"user_embeddings:{(error_bound(eager_error, model.precision) + eager_error) * scale:.3g}"
    entry = "import sys; from polygraphy.tools import main; sys.exit(main())"
    for reference, expected in (("eager.json", 0), ("altered.json", 1)):
        words = ["run", str(engine), "--model-type", "engine", "--trt", "--plugins", str(plugin), "--load-inputs"]
        words += ["feeds.json", "--load-outputs", reference, "--atol", atol, "--rtol", "0"]
        with checks.check(f"{model.name}: polygraphy run against {reference} exits {expected}") as check:
            done = run_command(
                [sys.executable, "-c", entry, *words],
                timeout=120,
                cwd=scratch,
                env=polygraphy_environment(scratch.parent),
            )
            check.facts |= {"command": shlex.join(["polygraphy", *words]), "exit_code": done.exit_code}
            check.facts |= {"feeds": len(feeds), "output": done.tail}
            # A crash also exits 1: only Polygraphy's own verdict counts.
            verdict = "PASSED" if expected == 0 else "FAILED"
            said = f"{verdict} | Runtime" in done.stdout + done.stderr
            check.passed = done.exit_code == expected and said and len(feeds) >= 3


def check_ranking(checks: Checks, label: str, job: Path, session: Session, precision: str) -> None:
    """Leave-one-out on every MovieLens user."""
    with checks.check(f"{label}: HR@10 and NDCG@10 within 0.002 of eager fp32") as check:
        stored = leave_one_out(job)
        check.passed = compare_ranking(
            check.facts, stored, lambda feeds: session.run(feeds)["user_embeddings"], precision
        )


def check_missing_plugin(checks: Checks, label: str, engine: Path) -> None:
    """Without the library the engine must be refused by name, not crash."""
    with checks.check(f"{label}: without the plugin library the engine is refused with HSTU-E503") as check:
        done = run_command([sys.executable, "-c", _LOAD_BARE, str(engine)], timeout=120, cwd=engine.parent)
        check.facts |= {"exit_code": done.exit_code, "output": done.tail}
        check.passed = done.exit_code == 0 and json.loads(done.stdout.splitlines()[-1])["code"] == "HSTU-E503"


def check_timing(checks: Checks, label: str, model: PreparedModel, engine: Path, plugin: Path | None) -> None:
    """Device time of the mixed feed, for the record; passes when it could be measured."""
    with checks.check(f"{label}: device time of feed '{model.reference.feeds[1].name}'") as check:
        api = tensorrt_api("tensorrt")
        feed = dict(int32_feeds(model))[1]
        with EngineRunner(api, engine.read_bytes(), plugin) as runner:
            runner.set_inputs(feed)
            timing = runner.time()
        lengths = model.reference.feeds[1].lengths
        check.facts |= {"batch": len(lengths), "events": int(lengths.sum()), **timing}
        check.passed = timing["median_ms"] > 0


def check_plugin_engine(checks: Checks, model: PreparedModel, engine: Path, done: Finished, job: Path) -> None:
    """All that must hold for an engine with the plugin."""
    plugin = next((job / "plugin").glob("*.so"))
    label = f"{model.name} (plugin)"
    with checks.check(f"{label}: hstu-compile engine") as check:
        check.facts |= {
            "exit_code": done.exit_code,
            "wall_seconds": round(done.seconds, 1),
            "stderr": done.stderr[-2000:],
        }
        check.facts["engine"] = json.loads(done.stdout)
        check.passed = done.exit_code == 0
    if done.exit_code != 0:
        return
    with checks.check(f"{label}: the inspector shows one plugin layer per HSTU layer and norm") as check:
        names = plugin_layers(engine.with_suffix(".layers.json"))
        check.facts |= {"layers": names, "norms": model.num_norms}
        check.passed = len(names) == model.num_layers + model.num_norms
    with checks.check(f"{label}: our session opens") as check:
        session = open_session("tensorrt", engine=engine, plugin_library=plugin)
        check.passed = True
    if not check.passed:
        return
    with session:
        check_runs(checks, label, model, session)
        if model.name.startswith("research"):
            check_ranking(checks, label, job, session, model.precision)
    check_polygraphy(checks, model, engine, plugin, engine.parent / f"polygraphy-{model.name}")
    check_missing_plugin(checks, label, engine)


def check_native_engine(checks: Checks, model: PreparedModel, engine: Path, done: Finished) -> None:
    """The native body in TensorRT 8.5: either it is built and right, or our error says why not."""
    label = f"{model.name} (native body)"
    with checks.check(f"{label}: hstu-compile engine builds it or says why not") as check:
        check.facts |= {"exit_code": done.exit_code, "wall_seconds": round(done.seconds, 1), "output": done.tail}
        refused = done.exit_code != 0 and any(code in done.stderr for code in ("HSTU-E302", "HSTU-E402"))
        check.facts["built"] = done.exit_code == 0
        check.passed = done.exit_code == 0 or refused
    if done.exit_code != 0:
        return
    with checks.check(f"{label}: our session opens") as check:
        session = open_session("tensorrt", engine=engine)
        check.passed = True
    if not check.passed:
        return
    with session:
        check_runs(checks, label, model, session)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--parallel", type=int, default=3, help="engine builds at the same time")
    parser.add_argument(
        "--only-timing", action="store_true", help="measure the engines that an earlier run left in OUT, on a quiet GPU"
    )
    parser.add_argument("--only-accuracy", action="store_true", help="compare values inside the layers, nothing else")
    arguments = parser.parse_args(argv)
    job, out = arguments.job.resolve(), arguments.out.resolve()
    engines = out / "engines"
    engines.mkdir(parents=True, exist_ok=True)
    plugin = next((job / "plugin").glob("*.so"))
    checks = Checks("tensorrt85")
    checks.facts["job"] = json.loads((job / "job.json").read_text(encoding="utf-8"))
    checks.facts["parallel_builds"] = arguments.parallel
    checks.facts["tensorrt"] = tensorrt_api("tensorrt").version
    wanted: list[tuple[str, Path | None]] = [(name, plugin) for name in PLUGIN_MODELS]
    wanted += [(name, None) for name in NATIVE_MODELS]
    models = [(prepared_model(job, name), library) for name, library in wanted]
    paths = [engines / f"{model.name}-{'plugin' if library else 'native'}.engine" for model, library in models]
    if arguments.only_timing:
        for (model, library), path in zip(models, paths, strict=True):
            if path.exists():
                check_timing(checks, path.stem, model, path, library)
        return checks.write(out / "tensorrt85-timing.json")
    if arguments.only_accuracy:
        models, paths = [], []
    tapped = {
        engines / f"{name}-{spelling}.engine": (prepared_model(job, name), spelling)
        for name in TAPPED_FEEDS
        for spelling in SPELLINGS
    }
    with ThreadPoolExecutor(arguments.parallel) as pool:
        futures = [
            pool.submit(build_engine, model.onnx, path, lib) for (model, lib), path in zip(models, paths, strict=True)
        ]
        tapped_futures = [
            pool.submit(build_engine, tapped_graph(model, spelling, path), path, plugin)
            for path, (model, spelling) in tapped.items()
        ]
    # All builds have ended here, so that none disturbs a measurement.
    results = out / ("tensorrt85-accuracy.json" if arguments.only_accuracy else "tensorrt85.json")
    for (model, library), path, future in zip(models, paths, futures, strict=True):
        if library is not None:
            check_plugin_engine(checks, model, path, future.result(), job)
        else:
            check_native_engine(checks, model, path, future.result())
        checks.write(results)
    for (path, (model, spelling)), future in zip(tapped.items(), tapped_futures, strict=True):
        check_layers(checks, model, spelling, path, future.result(), plugin)
        checks.write(results)
    check_functions(checks)
    return checks.write(results)


if __name__ == "__main__":
    sys.exit(main())
