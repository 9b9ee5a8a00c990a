"""Proves the C++ loader on bundles in segments, in real TensorRT-RTX: answers, CUDA graphs, memcheck, soak, times.

Runs with any Python that has TensorRT-RTX, numpy and onnx; needs the parts `fused` and `cpp-loader-fused` of
prepare_job.py. Nothing is built here. The same is checked as by run_cpp_loader.py: every answer equals that of Python's
session on the same engines and kernels to the bit, with and without CUDA graphs, and lies within its bound of float64.
Usage: python run_cpp_fused.py JOB OUT [--bundles NAME ...] [--budget 285]  (OUT/cpp_loader_fused.json, OUT/rows.csv)
Exit 0 if every check passed.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent)]

from checks import Checks  # noqa: E402
from run_cpp_loader import SOAK_REQUESTS, Clock, Program, check_bundle, program_of  # noqa: E402

from hstu_compile import bundle as bundles  # noqa: E402
from hstu_compile.runtime.open_fused import FUSED_BACKEND  # noqa: E402
from hstu_compile.tensorrt_api import tensorrt_api  # noqa: E402

BUNDLES = ("research-fp16-fused", "dlrm-fp16-fused")
_REFUSAL_SECONDS = 20.0


def check_other_program(checks: Checks, job: Path, bundle: Path, clock: Clock) -> None:
    """The program that was compiled for TensorRT says why it cannot run the bundle; no answer comes of it."""
    other = job / "cpp_loader" / "hstu_score"
    if not other.is_file():
        return
    with checks.check(f"{bundle.name}: the program for TensorRT names the one that is needed") as check:
        other.chmod(0o755)
        done = Program(other, None, {}).run([bundle], clock.at_most(_REFUSAL_SECONDS))
        check.facts |= {"exit_code": done.exit_code, "output": done.tail}
        check.passed = done.exit_code == 5 and "is for another TensorRT than this program" in done.stderr


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bundles", nargs="+", default=list(BUNDLES))
    parser.add_argument("--models", type=Path, nargs="+", default=[], help="folders of bundles besides JOB/models")
    parser.add_argument("--soak-requests", type=int, default=SOAK_REQUESTS)
    parser.add_argument("--budget", type=float, default=285.0, help="seconds for everything")
    arguments = parser.parse_args(argv)
    job, out = arguments.job.resolve(), arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "rows.csv").unlink(missing_ok=True)
    clock, checks, results = Clock(arguments.budget), Checks("cpp_loader_fused"), out / "cpp_loader_fused.json"
    program = program_of(job, FUSED_BACKEND)
    checks.facts["job"] = json.loads((job / "job.json").read_text(encoding="utf-8"))
    checks.facts[FUSED_BACKEND] = tensorrt_api(FUSED_BACKEND).version
    places = [job / "models", *(place.resolve() for place in arguments.models)]
    for name in arguments.bundles:
        folder = next((place / name for place in places if (place / name / bundles.MANIFEST).is_file()), None)
        with checks.check(f"{name}: every file is the manifest's") as check:
            assert folder is not None, f"{name} is in none of {', '.join(map(str, places))}"
            files = bundles.read_bundle(folder)
            check.passed = all(files.fused_graph(entry["name"]) is not None for entry in files.manifest["graphs"])
        if check.passed:
            assert folder is not None
            opener = functools.partial(bundles.open_graph, files, runtime=FUSED_BACKEND)
            check_bundle(checks, program, folder, opener, out, arguments.soak_requests, clock)
            check_other_program(checks, job, folder, clock)
        checks.write(results)
    return checks.write(results)


if __name__ == "__main__":
    sys.exit(main())
