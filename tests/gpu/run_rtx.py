"""TensorRT-RTX engines of the research model in fp32, fp16 and bf16: built, run through our session and compared.

Runs on a GPU with any Python that has TensorRT-RTX; needs the folder that prepare_job.py made. `--build-only` stops
after the builds, which need no GPU.
Usage: python run_rtx.py JOB OUT [--build-only]            (JSON in OUT/rtx.json; exit 0 if every check passed)
       python run_rtx.py JOB OUT --only-timing             (afterwards, alone on the GPU; OUT/rtx-timing.json)
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(REPOSITORY / "tests" / "bench")]

from checks import Checks, run_command  # noqa: E402
from device_timing import EngineRunner  # noqa: E402
from references import (  # noqa: E402
    PreparedModel,
    compare_ranking,
    empty_requests,
    leave_one_out,
    prepared_model,
)

from hstu_compile.runtime.session import open_session  # noqa: E402
from hstu_compile.session_check import check_session  # noqa: E402
from hstu_compile.tensorrt_api import tensorrt_api, tf32_override_off  # noqa: E402

MODELS = ("research-fp32", "research-fp16", "research-bf16", "cycled-fp16", "cycled-fp32", "deep-fp16", "deep-fp32")


def build_engine(checks: Checks, model: PreparedModel, engine: Path) -> bool:
    """Build with the real command line."""
    command = [sys.executable, "-m", "hstu_compile", "engine", str(model.onnx), "-o", str(engine)]
    command += ["--backend", "tensorrt-rtx", "--json"]
    with checks.check(f"{model.name}: hstu-compile engine") as check:
        done = run_command(command, timeout=240, cwd=engine.parent)
        check.facts |= {
            "exit_code": done.exit_code,
            "wall_seconds": round(done.seconds, 1),
            "stderr": done.stderr[-2000:],
        }
        check.facts["engine"] = json.loads(done.stdout)
        check.passed = done.exit_code == 0
    return check.passed


def check_engine(checks: Checks, model: PreparedModel, engine: Path, job: Path) -> None:
    """Compare every feed, the empty batch and the ranking."""
    with checks.check(f"{model.name}: our session opens") as check:
        session = open_session("tensorrt-rtx", engine=engine, allow_tf32=model.precision != "fp32")
        check.passed = True
    if not check.passed:
        return
    with session:
        with checks.check(f"{model.name}: our session agrees with float64 on every feed") as check:
            result = check_session(session, model.name, model.reference, model.precision, lambda *_: None)
            check.facts["result"] = result
            check.passed = result.status == "PASS" and len(result.tensors) == len(model.reference.feeds)
        with checks.check(f"{model.name}: empty sequences, no events at all, give zeros") as check:
            users = session.run(empty_requests(3))["user_embeddings"]
            check.passed = users.shape[0] == 3 and not users.any()
        if model.name.startswith("research"):
            with checks.check(f"{model.name}: HR@10 and NDCG@10 within 0.002 of eager fp32") as check:
                check.passed = compare_ranking(
                    check.facts,
                    leave_one_out(job),
                    lambda feeds: session.run(feeds)["user_embeddings"],
                    model.precision,
                )


def check_timing(checks: Checks, model: PreparedModel, engine: Path) -> None:
    """Device time of the mixed feed, for the record."""
    with checks.check(f"{model.name}: device time of feed '{model.reference.feeds[1].name}'") as check:
        api, is_float32 = tensorrt_api("tensorrt-rtx"), model.precision == "fp32"
        with tf32_override_off(is_float32), EngineRunner(api, engine.read_bytes(), None) as runner:
            runner.set_inputs(model.reference.feeds[1].arrays)
            timing = runner.time()
        lengths = model.reference.feeds[1].lengths
        check.facts |= {"batch": len(lengths), "events": int(lengths.sum()), **timing}
        check.passed = timing["median_ms"] > 0


def checked_model(job: Path, engines: Path, name: str, only: str) -> Checks:
    """All of one model, or only its "build" or "timing". For a process of its own: TF32 is chosen once per process."""
    checks = Checks("rtx")
    model = prepared_model(job, name)
    engine = engines / f"{name}.engine"
    if only == "timing":
        check_timing(checks, model, engine)
    elif build_engine(checks, model, engine) and only != "build":
        check_engine(checks, model, engine, job)
    return checks


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--build-only", action="store_true", help="stop after the builds")
    parser.add_argument(
        "--only-timing", action="store_true", help="measure the engines that an earlier run left in OUT, on a quiet GPU"
    )
    arguments = parser.parse_args(argv)
    job, out = arguments.job.resolve(), arguments.out.resolve()
    engines = out / "engines"
    engines.mkdir(parents=True, exist_ok=True)
    checks = Checks("rtx")
    checks.facts["job"] = json.loads((job / "job.json").read_text(encoding="utf-8"))
    checks.facts["tensorrt-rtx"] = tensorrt_api("tensorrt-rtx").version
    only = "timing" if arguments.only_timing else "build" if arguments.build_only else "all"
    for name in arguments.models:
        if only == "timing" and not (engines / f"{name}.engine").exists():
            continue
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            try:
                checks.take(pool.submit(checked_model, job, engines, name, only).result())
            except BrokenProcessPool as error:
                with checks.check(f"{name}: its process lives") as check:
                    check.facts["error"] = str(error)
    return checks.write(out / ("rtx-timing.json" if arguments.only_timing else "rtx.json"))


if __name__ == "__main__":
    sys.exit(main())
