"""Serves TensorRT engines in a real tritonserver through its Python backend, and holds every answer to the bundle.

Runs with TensorRT 8.5's Python (3.10, no torch, no tritonclient) on a GPU; needs the folder that prepare_job.py made
and, on PYTHONPATH, the tritonserver of prepare_job.py's part `triton`.
Usage: python run_triton.py JOB OUT --engines DIR... [--budget 132]   (OUT/triton.json, OUT/tritonserver.log)

Engines are those that the steps trt85, ranking and cpp-loader left; nothing is built here. `hstu-compile triton` writes
the repository and its launch.sh starts the server. With --runtime onnxruntime the same runs without a GPU. Exit 0 if
every check passed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(REPOSITORY / "tests" / "bench")]

from checks import Checks, run_command  # noqa: E402
from served_bundles import BUNDLES, Clock, compute_capability, found_engine, served_bundle, vouch_for  # noqa: E402
from triton_checks import check_load, check_one_by_one, check_refusals, check_stop, check_together  # noqa: E402
from triton_client import Client  # noqa: E402
from triton_questions import AskedModel, ask_python, described  # noqa: E402

from hstu_compile import bundle as bundles  # noqa: E402
from hstu_compile.serving.local_server import Installation, find_installation, server_environment  # noqa: E402
from hstu_compile.tensorrt_api import tensorrt_api  # noqa: E402
from tests.triton.server import TritonServer  # noqa: E402

RUNTIMES = ("tensorrt", "onnxruntime")
LOAD_REQUESTS, LOAD_CLIENTS = 5_000, 16
#: Holds some of the questions' users and not all: entries come and go under load.
KV_BUDGET_MIB = 4
#: Microseconds that a request waits for others.
QUEUE_DELAY = 2_000
#: Seconds that each part may take at most; all together are held to --budget.
COMMAND_SECONDS, ASKING_SECONDS, LOAD_SECONDS = 20.0, 25.0, 45.0
_CANNOT_START = 127
_LOADER_SAYS = ("error while loading shared libraries", "not found (required by")


class LaunchedServer(TritonServer):
    """A server that the repository's own launch.sh starts.

    Args:
        found: the binaries.
        folder: a new folder, whose `repository` becomes the model repository.
    """

    def __init__(self, found: Installation, folder: Path) -> None:
        programs, python = folder / "programs", folder / "python" / "bin"
        programs.mkdir(parents=True)
        (programs / "tritonserver").symlink_to(found.binary)
        path = os.pathsep.join([str(python), str(programs), os.environ.get("PATH", "")])
        # The machine's own metrics need a service of it that nobody started.
        super().__init__(
            found, folder, explicit=False, environment={"PATH": path}, arguments=["--allow-gpu-metrics=false"]
        )

    def command(self) -> list[str]:
        """See `TritonServer.command`; launch.sh names the repository."""
        return ["bash", str(self.repository / "launch.sh"), *self.options()]


def check_programs(checks: Checks) -> Installation | None:
    """The server, its backend and its stub are there, and this machine can start them."""
    with checks.check("tritonserver and the stub of this Python are here, with all their libraries") as check:
        found = find_installation()
        if isinstance(found, str):
            raise FileNotFoundError(found)
        environment = server_environment(found, Path("/nowhere"))
        ends = {}
        for program in (found.binary, found.stub):
            program.chmod(0o755)
            # Neither starts anything; the loader says which library or symbol version it misses.
            done = run_command([str(program), "--help"], timeout=COMMAND_SECONDS, env=environment)
            ends[program.name] = done.exit_code
            if done.exit_code in (_CANNOT_START, 124) or any(words in done.stderr for words in _LOADER_SAYS):
                raise RuntimeError(f"{program.name} cannot be started here: {done.tail[-500:]}")
        shared = shutil.disk_usage("/dev/shm").free
        check.facts |= {"exit_codes": ends, "shared_memory_mib": shared >> 20, "python": platform.python_version()}
        check.passed = True
        return found
    return None


def onnx_bundle(source: Path, target: Path) -> Path:
    """A bundle without engines, whose manifest vouches for what prepare_job.py left of it."""
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(source, target)
    vouch_for(target, json.loads((target / bundles.MANIFEST).read_text(encoding="utf-8")))
    return target


def engine_bundle(source: Path, places: Sequence[Path], plugin: Path, target: Path) -> Path:
    """A bundle with the engines that other steps left.

    Raises:
        FileNotFoundError: naming the engines that no step left.
    """
    manifest = json.loads((source / bundles.MANIFEST).read_text(encoding="utf-8"))
    engines = {graph["name"]: found_engine(source.name, graph["name"], places) for graph in manifest["graphs"]}
    if missing := [graph for graph, engine in engines.items() if engine is None]:
        raise FileNotFoundError(
            f"no engine of {source.name} for {', '.join(missing)} in {', '.join(map(str, places))}: "
            "run the step cpp-loader, or trt85 and ranking, before"
        )
    found = {graph: engine for graph, engine in engines.items() if engine is not None}
    version = tensorrt_api("tensorrt").version
    return served_bundle(source, found, plugin, target, version, compute_capability(), without=("report.*",))


def write_model(checks: Checks, bundle: Path, repository: Path, runtime: str, clock: Clock) -> bool:
    """Write one model with the real command line."""
    with checks.check(f"{bundle.name}: hstu-compile triton writes the model") as check:
        words = ["triton", str(bundle), "-o", str(repository), "--backend", "python", "--runtime", runtime]
        words += ["--max-queue-delay-us", str(QUEUE_DELAY), "--kv-budget-mib", str(KV_BUDGET_MIB)]
        command = [sys.executable, "-m", "hstu_compile", *words]
        done = run_command(command, timeout=clock.at_most(COMMAND_SECONDS), cwd=repository.parent)
        check.facts |= {"command": " ".join(["hstu-compile", *words]), "exit_code": done.exit_code, "output": done.tail}
        config = repository / bundle.name / "config.pbtxt"
        wanted = "KIND_CPU" if runtime == "onnxruntime" else "KIND_GPU"
        check.passed = done.exit_code == 0 and wanted in config.read_text(encoding="utf-8")
    return check.passed


def versions_of(server: TritonServer, python: Path) -> dict[str, Any]:
    """Of the server, and of the NumPy that its backend's Python has."""
    code = "import numpy; print(numpy.__version__)"
    done = run_command([str(python), "-c", code], timeout=COMMAND_SECONDS)
    with Client(server.http_port) as client:
        return {"tritonserver": client.get("")["version"], "numpy_of_the_backend": done.stdout.strip()}


def check_served(checks: Checks, server: TritonServer, models: Sequence[AskedModel], load: int, clock: Clock) -> None:
    """All that must hold for a server that is ready; the last check ends it."""
    for model in models:
        check_one_by_one(checks, server, model, clock.at_most(ASKING_SECONDS))
    check_together(checks, server, models, clock.at_most(ASKING_SECONDS))
    for model in models:
        check_refusals(checks, server, model, clock.at_most(ASKING_SECONDS))
    check_load(checks, server, models, load, LOAD_CLIENTS, clock.at_most(LOAD_SECONDS))
    check_stop(checks, server, models)


def run(checks: Checks, arguments: argparse.Namespace, clock: Clock) -> None:
    """Every check; one that others need ends the run if it fails."""
    job, scratch, runtime = arguments.job.resolve(), arguments.scratch.resolve(), arguments.runtime
    if (found := check_programs(checks)) is None:
        return
    models: list[AskedModel] = []
    (scratch / "served").mkdir()
    for name in arguments.bundles:
        with checks.check(f"{name}: the bundle is put together, and Python's session answers") as check:
            source, target = job / "models" / name, scratch / name
            if runtime == "onnxruntime":
                bundle = onnx_bundle(source, target)
            else:
                places = [place.resolve() for place in arguments.engines]
                bundle = engine_bundle(source, places, next((job / "plugin").glob("*.so")), target)
            model = ask_python(bundle, runtime)
            check.facts |= described(model)
            check.passed = any(question.stored for question in model.questions)
        if check.passed and write_model(checks, target, scratch / "served" / "repository", runtime, clock):
            models.append(model)
        checks.write(arguments.results)
    if len(models) != len(arguments.bundles):
        return
    server = LaunchedServer(found, scratch / "served")
    try:
        with checks.check("launch.sh starts the server, and it is ready with all models") as check:
            server.start()
            check.facts |= versions_of(server, scratch / "served" / "python" / "bin" / "python3")
            checks.facts |= check.facts
            check.passed = True
        if check.passed:
            check_served(checks, server, models, arguments.load_requests, clock)
    finally:
        # The last check has ended it; whatever else brought us here must not wait for it.
        server.stop(signal.SIGKILL)
        if server.log_file.exists():
            shutil.copyfile(server.log_file, arguments.results.with_name("tritonserver.log"))


def _end(signal_number: int, _: object) -> NoReturn:
    raise SystemExit(128 + signal_number)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bundles", nargs="+", default=list(BUNDLES))
    parser.add_argument("--engines", type=Path, nargs="+", default=[], help="folders that trt85 and ranking left")
    parser.add_argument("--runtime", choices=RUNTIMES, default="tensorrt", help="what the Python backend runs")
    parser.add_argument("--scratch", type=Path, help="for bundles and repository (default: beside OUT)")
    parser.add_argument("--load-requests", type=int, default=LOAD_REQUESTS)
    parser.add_argument("--budget", type=float, default=132.0, help="seconds for everything")
    arguments = parser.parse_args(argv)
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    arguments.results = out / "triton.json"
    arguments.scratch = arguments.scratch or out.with_name(f"{out.name}-served")
    shutil.rmtree(arguments.scratch, ignore_errors=True)
    arguments.scratch.mkdir(parents=True)
    # Whoever ends this script ends the server with it.
    signal.signal(signal.SIGTERM, _end)
    clock, checks = Clock(arguments.budget), Checks("triton")
    checks.facts |= {"job": json.loads((arguments.job / "job.json").read_text(encoding="utf-8"))}
    checks.facts |= {"runtime": arguments.runtime, "backend": "python", "client": "http.client, over loopback"}
    if arguments.runtime == "tensorrt":
        checks.facts["tensorrt"] = tensorrt_api("tensorrt").version
    try:
        run(checks, arguments, clock)
    finally:
        status = checks.write(arguments.results)
    return status


if __name__ == "__main__":
    sys.exit(main())
