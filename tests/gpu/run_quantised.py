"""Quantised engines: built, their products of eight bits counted, run through our session and compared.

Runs on a GPU with TensorRT 8.5's Python (3.10, no torch) and the plugin of the job folder, or with any Python that has
TensorRT-RTX; needs the folder that prepare_quantised.py made. TensorRT 8 must refuse fp8 by name. `--build-only` stops
after the builds, which TensorRT-RTX does without a GPU.
Usage: python run_quantised.py JOB OUT --backend tensorrt|tensorrt-rtx [--plugin LIBRARY] [--bundles PATTERN...]
       [--build-only]   (JSON in OUT/quantised-BACKEND.json; exit 0 if every check passed)
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(REPOSITORY)]

from checks import Checks, run_command  # noqa: E402
from ranking_checks import LEAST_FEEDS, fitting  # noqa: E402

from hstu_compile.recheck import stored_reference  # noqa: E402
from hstu_compile.runtime.session import open_session  # noqa: E402
from hstu_compile.session_check import check_session  # noqa: E402
from hstu_compile.tensorrt_api import tensorrt_api  # noqa: E402

BUILD_SECONDS = 300.0


def build_engine(checks: Checks, label: str, graph: Path, engine: Path, backend: str, plugin: Path | None) -> bool:
    """Build with the real command line; on TensorRT 8 an fp8 graph has to be refused instead."""
    command = [sys.executable, "-m", "hstu_compile", "engine", str(graph), "-o", str(engine), "--backend", backend]
    command += ["--max-batch", "8", "--json", *(["--plugins", str(plugin)] if plugin is not None else [])]
    lacks_type = backend == "tensorrt" and tensorrt_api(backend).is_tensorrt8 and "fp8" in label
    with checks.check(f"{label}: hstu-compile engine{' refuses it with HSTU-E302' if lacks_type else ''}") as check:
        done = run_command(command, timeout=BUILD_SECONDS, cwd=engine.parent)
        check.facts |= {
            "exit_code": done.exit_code,
            "wall_seconds": round(done.seconds, 1),
            "stderr": done.stderr[-2000:],
        }
        if lacks_type:
            check.passed = done.exit_code == 5 and "HSTU-E302" in done.stderr and "float8" in done.stderr
        else:
            check.facts["engine"] = json.loads(done.stdout)
            check.passed = done.exit_code == 0
    if lacks_type or not check.passed:
        return False
    with checks.check(f"{label}: every quantised product computes with operands of eight bits") as counted:
        counted.facts |= check.facts["engine"]["layers"]
        # Layers of an engine may hold more than one product; fewer than products is to be explained by hand.
        counted.passed = counted.facts["eight_bit_layers"] >= counted.facts["quantized_products"] > 0
    return True


def check_engine(
    checks: Checks, label: str, folder: Path, graph: dict[str, Any], engine: Path, backend: str, plugin: Path | None
) -> None:
    """Every stored feed that the engine can hold, by row and as a whole, under the rule of `hstu-compile verify`."""
    with checks.check(f"{label}: our session agrees with the reference on every feed") as check:
        stored = stored_reference(folder, graph)
        assert stored.eager_whole_error is not None
        with open_session(backend, engine=engine, plugin_library=plugin) as session:
            reference, dropped = fitting(stored, session.inputs)
            check.facts |= {"feeds": [feed.name for feed in reference.feeds], "feeds_beyond_int32": dropped}
            result = check_session(session, label, reference, "fp16", lambda *_: None)
        check.facts["result"] = result
        wholes = [row for row in result.tensors if row.feed.startswith("all feeds")]
        complete = len(reference.feeds) >= LEAST_FEEDS and len(wholes) == len(stored.eager_whole_error)
        check.passed = result.status == "PASS" and complete


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--backend", choices=("tensorrt", "tensorrt-rtx"), required=True)
    parser.add_argument("--plugin", type=Path, help="library for tensorrt (default: that of JOB/plugin)")
    parser.add_argument(
        "--bundles", nargs="+", default=["*"], metavar="PATTERN", help="of JOB/quantised, such as *-int8"
    )
    parser.add_argument("--build-only", action="store_true", help="stop after the builds")
    arguments = parser.parse_args(argv)
    job, out = arguments.job.resolve(), arguments.out.resolve()
    plugin = None
    if arguments.backend == "tensorrt":
        plugin = (arguments.plugin or next((job / "plugin").glob("*.so"))).resolve()
    engines = out / "quantised-engines"
    engines.mkdir(parents=True, exist_ok=True)
    checks = Checks(f"quantised-{arguments.backend}")
    checks.facts |= {"backend": arguments.backend, "version": tensorrt_api(arguments.backend).version}
    folders = sorted({path for each in arguments.bundles for path in (job / "quantised").glob(each) if path.is_dir()})
    if not folders:
        raise SystemExit(f"error: {job / 'quantised'} holds none of {', '.join(arguments.bundles)}")
    for folder in folders:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for graph in manifest["graphs"]:
            label = f"{folder.name} {graph['name']}"
            engine = engines / f"{folder.name}-{graph['name']}.engine"
            built = build_engine(checks, label, folder / graph["onnx"], engine, arguments.backend, plugin)
            if built and not arguments.build_only:
                check_engine(checks, label, folder, graph, engine, arguments.backend, plugin)
            checks.write(out / f"{checks.name}.json")
    return checks.write(out / f"{checks.name}.json")


if __name__ == "__main__":
    raise SystemExit(main())
