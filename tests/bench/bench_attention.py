"""HSTU attention on a GPU, case by case: ours, the kernels of others, softmax attention and PyTorch.

  bench_attention.py --parts DIR [--cases PATTERN...] [--backends NAME...] [--meta-library LIB] [--nvidia-library LIB]
                     [--meta-repo REPO] [--budget SECONDS]     (measure; one JSON per case and backend)
  bench_attention.py --compile-kernels --meta-repo REPO [--cases PATTERN...]     (fill Triton's cache, in parallel)
  bench_attention.py --merge DIR [--csv FILE]                   (anywhere; rows that DIR lacks stay in the CSV)

Cases and how operations are counted: attention_grid.py. Libraries: attention_peers.py. The table: attention_table.py.

Every output is first compared with float64 (attention_reference.py); what is wrong, refused or failed is a row with its
reason and no time. Then all backends of a case run in turn, in an order that rotates, in one process, so a ratio is of
one run; eager, which waits for the GPU, in rounds of its own after the others. Before each call the L2 cache is flushed
(l2 = cold), and CUDA events around it give device time; a sleep on the GPU lets the host run ahead. host_us is how long
the host takes to enqueue a call. Cases of a graph are GRAPH_CALLS calls captured in one CUDA graph, back to back, and a
call's share of it (l2 = warm). Of a backend with several forms the fastest counts. fill_ms, of the kernel that takes
its bias as a tensor, is the time to write so many bytes: a lower bound of filling it, and no part of median_ms.

A worker process does the work; where it dies or hangs, its case and backend get a row that says so, and another worker
goes on. Without --parts or --merge nothing is measured: the results that are committed come from a GPU.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if str(Path(__file__).parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parent))

from attention_grid import BACKENDS, DENSE_RAB, EAGER, META_TRITON, Case, all_cases, chosen_cases, why_not
from bench_plugin import commit_of, gpu_name, read_rows, today, write_rows

RESULTS = Path(__file__).parent / "results" / "attention.csv"
COLUMNS = (
    "case",
    "backend",
    "status",
    "median_ms",
    "p90_ms",
    "p99_ms",
    "cv",
    "repeats",
    "tflops",
    "tb_per_s",
    "roof_share",
    "gemm_tflops",
    "host_us",
    "fill_ms",
    "peak_mib",
    "max_err",
    "err_bound",
    "form",
    "l2",
    "gpu",
    "clocks",
    "versions",
    "commit",
    "date",
    "command",
)
#: Slow to compile, to tune or to run: measured where they are named.
ON_REQUEST = (*META_TRITON, EAGER)
PROGRESS, PLAN = "progress.json", "plan.json"
#: A worker that is in its last step of a case is timing all of its backends.
TIMING = "timing"
_POLL_SECONDS = 0.2
# A Python exception's last line, with or without the module it is of.
_NAMED = re.compile(r"^[\w.]*(?:Error|Exception)\b", re.MULTILINE)

Row = dict[str, Any]
Pending = dict[str, list[str]]


def part_path(parts: Path, case: str, backend: str) -> Path:
    """File of one row."""
    return parts / f"{case}-{backend}.json"


def write_part(parts: Path, case: str, backend: str, row: Row) -> None:
    """One JSON file, in place as a whole or not at all."""
    path = part_path(parts, case, backend)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps({"case": case, "backend": backend} | row) + "\n", encoding="utf-8")
    aside.replace(path)


@functools.cache
def _origin() -> tuple[str, str, str]:
    """GPU, commit and date: asked of other programs once, as each row would pay for it."""
    return gpu_name(), commit_of(), today()


def common_facts(case: str, backend: str) -> Row:
    """Columns that every row has, measured or not."""
    command = f"bench_attention.py --parts DIR --cases {case} --backends {backend}"
    gpu, commit, date = _origin()
    return {"gpu": gpu, "commit": commit, "date": date, "command": command}


def pending_of(parts: Path, cases: Sequence[Case], backends: Sequence[str]) -> Pending:
    """Backends of each case that have no part yet, in the order given; those that the case is not for are left out."""
    pending: Pending = {}
    for case in cases:
        left = [name for name in backends if not why_not(name, case) and not part_path(parts, case.name, name).exists()]
        if left:
            pending[case.name] = left
    return pending


def failed_step(parts: Path) -> tuple[str, list[str]] | None:
    """The case, and the backends, that a worker that is gone was busy with."""
    path = parts / PROGRESS
    if not path.exists():
        return None
    step = json.loads(path.read_text(encoding="utf-8"))
    if step["case"] is None:
        return None
    return step["case"], (step["backends"] if step["step"] == TIMING else [step["step"]])


def run_worker(command: list[str], parts: Path, log: Path, deadline: float, step_seconds: float) -> str:
    """Run a worker until it ends, is stuck in one step for too long, or time is up; returns why it failed, if so."""
    progress = parts / PROGRESS
    progress.unlink(missing_ok=True)
    with log.open("w", encoding="utf-8") as file:
        worker = subprocess.Popen(command, stdout=sys.stdout, stderr=file, cwd=parts)
        changed, seen = time.monotonic(), 0
        try:
            while worker.poll() is None:
                time.sleep(_POLL_SECONDS)
                stamp = progress.stat().st_mtime_ns if progress.exists() else 0
                if stamp != seen:
                    changed, seen = time.monotonic(), stamp
                if time.monotonic() > deadline:
                    return "not run: the time budget was used up"
                if time.monotonic() - changed > step_seconds:
                    return f"error: not finished in {step_seconds:g} s"
        finally:
            worker.kill()
            worker.wait()
    if worker.returncode == 0:
        return ""
    said = log.read_text(encoding="utf-8", errors="replace")
    return f"error: the process ended with {worker.returncode}: {last_reason(said)}"


def last_reason(log: str) -> str:
    """What a program that failed said last: from the last line that names an error, else the end; 300 characters.

    PyTorch names CUDA's error first, and ends with a long paragraph of what one may do about any.
    """
    named = [match.start() for match in _NAMED.finditer(log)]
    words = " ".join(log[named[-1] :].split())[:300] if named else " ".join(log.split())[-300:]
    return words or "it said nothing"


def worker_command(arguments: argparse.Namespace) -> list[str]:
    """What starts a worker on the plan that lies with the parts."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", "--parts", str(arguments.parts.resolve())]
    for name in ("meta_library", "nvidia_library", "meta_repo"):
        if (path := getattr(arguments, name)) is not None:
            command += [f"--{name.replace('_', '-')}", str(path.resolve())]
    return command


def measure(arguments: argparse.Namespace) -> int:
    """Measure every case and backend asked for, or with --resume those without a part; always leaves a row of each."""
    parts: Path = arguments.parts.resolve()
    parts.mkdir(parents=True, exist_ok=True)
    cases = chosen_cases(arguments.cases)
    if not arguments.resume:
        for case in cases:
            for name in arguments.backends:
                part_path(parts, case.name, name).unlink(missing_ok=True)
    deadline = time.monotonic() + arguments.budget
    command = worker_command(arguments)
    while pending := pending_of(parts, cases, arguments.backends):
        (parts / PLAN).write_text(json.dumps(pending), encoding="utf-8")
        reason = run_worker(command, parts, parts / "worker.log", deadline, arguments.step_seconds)
        left = pending_of(parts, cases, arguments.backends)
        if not left:
            break
        step = failed_step(parts)
        # Without a step the worker could not even start: no other would.
        if step is None or reason.startswith("not run"):
            reason = reason or "error: the worker left it out"
            unfinished = [(case, name) for case, names in left.items() for name in names]
        else:
            case, names = step
            unfinished = [(case, name) for name in names if name in left.get(case, ())]
            reason = reason or "error: the worker left it out"
        for case, name in unfinished:
            write_part(parts, case, name, common_facts(case, name) | {"status": reason})
            print(f"{case} {name}: {reason}", flush=True)
    return 0


def compile_kernels(arguments: argparse.Namespace) -> int:
    """Meta's Triton kernels, in several processes at once: an autotuner compiles one candidate at a time."""
    command = [sys.executable, str(Path(__file__).resolve()), "--compile-kernels"]
    command += ["--meta-repo", str(arguments.meta_repo.resolve()), "--workers", str(arguments.workers)]
    if arguments.cases:
        command += ["--cases", *arguments.cases]
    started = time.monotonic()
    running = [subprocess.Popen([*command, "--slice", str(index)]) for index in range(arguments.workers)]
    codes = [process.wait() for process in running]
    print(f"Meta's kernels compiled in {time.monotonic() - started:.0f} s, exit codes {codes}")
    return int(any(codes))


def rows_of(parts: Path) -> Iterator[Row]:
    """Every row below a folder."""
    backends = tuple(f"-{name}.json" for name in BACKENDS)
    for path in sorted(parts.rglob("*.json")):
        if path.name.endswith(backends):
            yield json.loads(path.read_text(encoding="utf-8"))


def merge(parts: Path, target: Path) -> int:
    """All parts into the CSV, in the order of cases and backends; a part replaces the row of its case and backend."""
    fresh = list(rows_of(parts))
    if not fresh:
        print(f"error: {parts} holds no parts; measure first, with --parts", file=sys.stderr)
        return 1
    rows = {(row["case"], row["backend"]): row for row in [*read_rows(target), *fresh]}
    order = {case.name: index for index, case in enumerate(all_cases())}
    unknown = sorted({case for case, _ in rows} - order.keys())
    if unknown:
        print(f"error: no case is named {', '.join(unknown)}; measure again or remove them", file=sys.stderr)
        return 1
    write_rows(target, COLUMNS, [rows[key] for key in sorted(rows, key=lambda key: (order[key[0]], _place(key[1])))])
    print(f"{target}: {len(rows)} rows, {len(fresh)} of them new")
    return 0


def _place(backend: str) -> int:
    return BACKENDS.index(backend)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=Path, metavar="DIR", help="measure, and write one JSON per row here")
    parser.add_argument("--cases", nargs="+", default=[], metavar="PATTERN", help="such as 'bf16_*' (default: all)")
    usual = [name for name in BACKENDS if name not in ON_REQUEST]
    parser.add_argument(
        "--backends",
        nargs="+",
        choices=BACKENDS,
        default=usual,
        metavar="NAME",
        help=f"of {' '.join(BACKENDS)} (default: all but {' '.join(ON_REQUEST)})",
    )
    parser.add_argument("--meta-library", type=Path, metavar="LIB", help="Meta's CUTLASS kernel")
    parser.add_argument("--nvidia-library", type=Path, metavar="LIB", help="NVIDIA's CUTLASS kernel")
    parser.add_argument("--meta-repo", type=Path, metavar="REPO", help="checkout of Meta's generative-recommenders")
    parser.add_argument("--budget", type=float, default=280.0, help="seconds; later cases are rows 'not run'")
    parser.add_argument("--step-seconds", type=float, default=90.0, help="limit of checking one backend in one case")
    parser.add_argument("--resume", action="store_true", help="keep the rows that DIR has")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--compile-kernels", action="store_true", help="only fill Triton's cache with Meta's kernels")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="of --compile-kernels")
    parser.add_argument("--slice", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("--merge", type=Path, metavar="DIR", help="write the CSV from the parts under DIR")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    if arguments.worker:
        from attention_worker import work

        libraries = {"meta_cutlass": arguments.meta_library, "nvidia_cutlass": arguments.nvidia_library}
        libraries[DENSE_RAB] = arguments.nvidia_library
        return work(arguments.parts, {name: path for name, path in libraries.items() if path}, arguments.meta_repo)
    if arguments.compile_kernels:
        if arguments.meta_repo is None:
            parser.error("--compile-kernels needs --meta-repo")
        if arguments.slice < 0:
            return compile_kernels(arguments)
        from attention_worker import compile_slice

        compile_slice(chosen_cases(arguments.cases), arguments.meta_repo, arguments.slice, arguments.workers)
        return 0
    if arguments.parts is not None:
        return measure(arguments)
    if arguments.merge is not None:
        return merge(arguments.merge, arguments.csv)
    print("bench_attention.py measures on a GPU, with --parts; results/attention.csv stays as it is")
    return 0


if __name__ == "__main__":
    sys.exit(main())
