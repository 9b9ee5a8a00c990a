"""Soak a real tritonserver: a retrieval and a ranking model with their KV caches, 16 clients, every answer checked.

Half of the clients speak HTTP and half gRPC. They ask for users that come back, with histories that grew and with other
candidates; six requests of ten carry the user's key. The caches have room for a part of the users only. Every answer is
compared with the eager PyTorch model's, which were computed before. Memory is that of tritonserver and of each model's
process.

Run: python tests/bench/soak_triton.py [--requests 20000] [--clients 16] [--users 300] [--output FILE]
     python tests/bench/soak_triton.py --into docs/serving.md     the table of the kept result, between the file's marks

Writes a JSON report and exits with 1 if a request was lost or wrong, the server counted otherwise than the clients, or
memory grew. It is no measurement of speed: clients, server and models share the machine's cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

if str(Path(__file__).resolve().parents[2]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hstu_compile.serving.local_server import SERVER_NUMPY, Installation, find_installation
from hstu_compile.serving.settings import RuntimeSettings
from tests.bench.bench_plugin import commit_of, put_between, today
from tests.triton.load import LoadPlan, LoadReport, run_load
from tests.triton.models import build_ranking, build_retrieval, deploy
from tests.triton.server import TritonServer, http_client
from tests.triton.workload import Question, distinct, questions

RESULT = Path(__file__).parent / "results" / "soak_triton.json"
BEGIN, END = "<!-- triton soak: begin -->", "<!-- triton soak: end -->"
#: Of each process, from the end of the warm-up to the end: an allocator's arenas settle within that, and a leak of one
#: request's tensors (1 to 2 KiB) over 15,000 requests does not.
MOST_GROWTH_MIB, MOST_SLOPE_BYTES = 8.0, 512.0
#: MiB of each model's KV cache: less than what the users need.
KV_BUDGET_MIB = 1
_PACKAGES = ("hstu-compile", "numpy", "onnxruntime", "torch", "tritonclient", "nvidia-pytriton")


def soak(
    found: Installation, folder: Path, plan: LoadPlan, users: int
) -> tuple[LoadReport, list[Question], dict[str, str]]:
    """Build both bundles, serve them, run the plan; the report, the pool, and the server's name and version."""
    built = (build_retrieval(folder), build_ranking(folder))
    with TritonServer(found, folder / "server") as server:
        settings = RuntimeSettings(kv_budget_mib=KV_BUDGET_MIB)
        models = {deploy(server, model, model.name, settings=settings): model for model in built}
        with http_client(server) as client:
            metadata = client.get_server_metadata()
        pool = questions(models, users, plan.seed)
        report = run_load(server, pool, plan, lambda done: print(f"{done} requests", file=sys.stderr))
    return report, pool, {"tritonserver": metadata["version"]}


def cpu_model() -> str:
    """As Linux names it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def versions() -> dict[str, str]:
    """Of what ran on both sides."""
    (server_numpy,) = SERVER_NUMPY.glob("numpy-*.dist-info")
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return found | {"numpy of the server": server_numpy.stem.partition("-")[2], "python": platform.python_version()}


def table_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """Markdown of a result."""
    report, plan, machine = result["report"], result["plan"], result["machine"]
    packages = result["versions"]
    yield (
        f"{report['requests']:,} requests of {result['distinct_requests']} distinct ones by {plan['clients']} clients, "
        f"half of them over HTTP and half over gRPC: {report['lost']} lost, {report['wrong']} wrong. tritonserver "
        f"{packages['tritonserver']}, ONNX Runtime {packages['onnxruntime']}, {machine['cpu']}, {machine['cores']} "
        "cores that clients, server, models and other programs shared (load average before: "
        f"{machine['load_before']:.1f}); commit {result['commit'][:7]}, {result['date']}. This shows that load is "
        "held; it says nothing about speed. "
        f"Made by `{result['command']}`; raw: "
        "[soak_triton.json](../tests/bench/results/soak_triton.json)."
    )
    yield ""
    yield "| protocol, model | p50 ms | p90 ms | p99 ms |"
    yield "|---|---|---|---|"
    for name, latency in report["latency_ms"].items():
        yield f"| {name} | {latency['p50']:.1f} | {latency['p90']:.1f} | {latency['p99']:.1f} |"
    yield ""
    yield "| model | requests sent | counted by the server | passes | failures | what the cache said |"
    yield "|---|---|---|---|---|---|"
    for model, counts in report["statistics"].items():
        cache = [f"{name.split()[1]} {count}" for name, count in report["outcomes"].items() if name.split()[0] == model]
        yield (
            f"| {model} | {report['sent'][model]} | {counts['requests']} | {counts['passes']} | {counts['failures']} "
            f"| {', '.join(cache)} |"
        )
    yield ""
    yield "| process | MiB after the warm-up | MiB at the end | slope, bytes per request |"
    yield "|---|---|---|---|"
    for process, memory in report["memory"].items():
        yield f"| {process} | {memory['warm_mib']:.1f} | {memory['end_mib']:.1f} | {memory['slope_bytes']:.0f} |"


def table_text(result: Mapping[str, Any]) -> str:
    """`table_lines` as a block of the documentation."""
    return "\n".join(table_lines(result)) + "\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--users", type=int, default=300, help="of each model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=None, help="default: standard output")
    parser.add_argument("--into", type=Path, default=None, metavar="FILE", help="measure nothing; write the table")
    return parser.parse_args()


def main() -> int:
    options = _arguments()
    if options.into is not None:
        put_between(options.into, BEGIN, END, table_text(json.loads(RESULT.read_text(encoding="utf-8"))))
        return 0
    found = find_installation()
    if isinstance(found, str):
        print(f"error: {found}", file=sys.stderr)
        return 2
    plan = LoadPlan(options.requests, options.clients, options.seed)
    commit = commit_of()  # of what runs; it takes minutes
    machine = {"cpu": cpu_model(), "cores": os.cpu_count(), "load_before": round(os.getloadavg()[0], 2)}
    with tempfile.TemporaryDirectory(prefix="soak-triton-") as folder:
        report, pool, server = soak(found, Path(folder), plan, options.users)
    failures = report.failures(plan, MOST_GROWTH_MIB, MOST_SLOPE_BYTES)
    result = {
        "status": "FAIL" if failures else "PASS",
        "failures": failures,
        "plan": dataclasses.asdict(plan),
        "distinct_requests": distinct(pool),
        "bounds": {"growth_mib": MOST_GROWTH_MIB, "slope_bytes": MOST_SLOPE_BYTES, "kv_budget_mib": KV_BUDGET_MIB},
        "report": dataclasses.asdict(report),
        "versions": versions() | server,
        "machine": machine,
        "commit": commit,
        "date": today(),
        "command": shlex.join(["python", "tests/bench/soak_triton.py", *sys.argv[1:]]),
    }
    text = json.dumps(result, indent=1) + "\n"
    if options.output is None:
        print(text, end="")
    else:
        options.output.write_text(text, encoding="utf-8")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
