"""Latency of whole models on a GPU: ours on two runtimes against eager, torch.compile and AOTInductor.

  bench_end_to_end.py --parts DIR --scratch DIR --backends reference [--meta-library LIB] [--nvidia-library LIB]
  bench_end_to_end.py --parts DIR --scratch DIR --compile-ahead [--workers N]          (fills the compilers' caches)
  bench_end_to_end.py --parts DIR --scratch DIR --backends eager compile aoti compile_max_autotune [libraries]
  bench_end_to_end.py --scratch DIR --build --backends ours_rtx_fused --bundles DIR    (engines; needs no GPU but 8.5's)
  bench_end_to_end.py --parts DIR --scratch DIR --backends ours_rtx_fused --bundles DIR [--kernels LIB]
  bench_end_to_end.py --parts DIR --scratch DIR --backends ours_trt85_plugin --bundles DIR --plugin-library LIB
  bench_end_to_end.py --merge DIR [--csv FILE]                  (anywhere; rows that DIR lacks stay in the CSV)
  bench_end_to_end.py --parts DIR --scratch DIR --profile CASE --backends ...     (timelines: end_to_end_timeline.py)

Cases, and how operations are counted: end_to_end_workload.py. Baselines: end_to_end_peers.py, their model
end_to_end_model.py, their attention end_to_end_attention.py. Ours: end_to_end_engines.py. Tables: end_to_end_table.py.
What is named in --cases: the ranking model's ('bf16_*'), those that show how time grows ('bf16_grow_*'), and those of
the retrieval model ('bf16_retrieval_*'), of which the end_to_end_retrieval_*.py are.
`reference` comes first; everything else is compared with it, and what is wrong, refused or failed is a row with its
reason and no time. Every family yields two rows, as it is and in a CUDA graph (_graph).

median_ms is between two CUDA events around a forward whose inputs are on the GPU; a flush of the L2 cache goes before
each (l2 = cold). call_median_ms is by the host's clock, from ordinary host arrays to host arrays (warm L2 cache).
Embedding lookups and preprocessing are inside both. Keys and values of cached cases lie on the GPU where the forward
reads them, for everybody. peak_mib is of weights, activations and workspace: of PyTorch what its allocator gave out at
most, of ours what the driver had given out afterwards. build_s is compiling, or building engines.

A family runs in a process of its own; where that dies or hangs, the case gets rows that say so, and another goes on.
Without --parts or --merge nothing is measured: the results that are committed come from a GPU. --tiny tries everything
but CUDA graphs and engines on a CPU, with a small model.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if str(Path(__file__).parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parent))

from bench_attention import PROGRESS, run_worker
from bench_plugin import status_of
from end_to_end_engines import Engines, OurRows
from end_to_end_reference import reference_path
from end_to_end_retrieval_workload import RetrievalCase
from end_to_end_rows import (
    AOTI,
    COMPILE,
    EAGER,
    FAMILIES,
    MAX_AUTOTUNE,
    OURS,
    PEERS,
    REFERENCE,
    RESULTS,
    RTX_FUSED,
    TRT85,
    backends_of,
    keys_path,
    merge,
    part_path,
    pending_of,
    plan_path,
    write_part,
)
from end_to_end_workload import (
    CACHED,
    FULL,
    SMALL,
    AnyCase,
    AnySizes,
    Case,
    Models,
    chosen_cases,
    known_cases,
)

PLAN = "plan.json"
#: Compiled in parallel before anything is timed. What max-autotune tries out it times, alone.
COMPILED_AHEAD = (COMPILE, AOTI)
_OPTIONS = ("meta_library", "nvidia_library", "meta_repo", "bundles", "plugin_library", "kernels")

Row = dict[str, Any]


def tiny_cases() -> Iterator[AnyCase]:
    """Cases of the small models: one of every kind."""
    for is_pruned in (True, False):
        yield Case("tiny_B1_n40_m8", "fp16", (40,), 8, is_pruned=is_pruned)
        yield Case("tiny_B3_m8", "bf16", (40, 25, 33), 8, is_pruned=is_pruned)
    yield Case("cached_tiny_B2_n40_m8", "fp16", (40, 40), 8, mode=CACHED)
    yield Case("grow_tiny_B1_n40_m8_layers1", "fp16", (40,), 8, is_pruned=True, layers=1)
    yield RetrievalCase("retrieval_tiny_B3", "fp16", (40, 7, 33), is_pruned=True)


def cases_of(arguments: argparse.Namespace) -> list[AnyCase]:
    """The cases that were asked for."""
    if arguments.tiny:
        return [case for case in tiny_cases() if not arguments.cases or case.name in arguments.cases]
    return chosen_cases(arguments.cases)


def unfinished(arguments: argparse.Namespace, cases: Sequence[AnyCase], family: str) -> list[AnyCase]:
    """Cases of which a family has something to do."""
    parts: Path = arguments.parts
    if family != REFERENCE:
        return pending_of(parts, cases, family)
    return [case for case in cases if not _is_planned(arguments, case)]


def _is_planned(arguments: argparse.Namespace, case: AnyCase) -> bool:
    plan = plan_path(arguments.parts, case)
    if not plan.exists():
        return False
    has_keys = not isinstance(case, Case) or case.mode != CACHED or keys_path(arguments.scratch, case).exists()
    is_answered = reference_path(arguments.parts, case).exists()
    return (has_keys and is_answered) or "problem" in json.loads(plan.read_text(encoding="utf-8"))


def give_up(arguments: argparse.Namespace, case: AnyCase, family: str, reason: str) -> None:
    """Say why a family has nothing for a case."""
    print(f"{case.name} {family}: {reason}", flush=True)
    if family == REFERENCE:
        path = plan_path(arguments.parts, case)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"problem": reason}) + "\n", encoding="utf-8")
        return
    for backend in backends_of(family):
        if not part_path(arguments.parts, case.name, backend).exists():
            write_part(arguments.parts, case, backend, {"status": reason}, models_of(arguments).of(case))


def models_of(arguments: argparse.Namespace) -> Models:
    """What is measured."""
    return SMALL if arguments.tiny else FULL


def command_for(arguments: argparse.Namespace, family: str) -> list[str]:
    """What starts a worker on the plan that lies with the parts."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", family]
    command += ["--parts", str(arguments.parts), "--scratch", str(arguments.scratch)]
    for name in _OPTIONS:
        if (path := getattr(arguments, name)) is not None:
            command += [f"--{name.replace('_', '-')}", str(path.resolve())]
    return command + switches(arguments)


def switches(arguments: argparse.Namespace) -> list[str]:
    """Options without a value that other processes need as well."""
    return [f"--{name.replace('_', '-')}" for name in ("tiny", "all_forms") if getattr(arguments, name)]


def measure(arguments: argparse.Namespace) -> int:
    """Every case and family asked for, family by family; always leaves a row of each."""
    parts: Path = arguments.parts
    parts.mkdir(parents=True, exist_ok=True)
    cases = cases_of(arguments)
    if not arguments.resume:
        for family in arguments.backends:
            for case in cases:
                for backend in backends_of(family) if family != REFERENCE else ():
                    part_path(parts, case.name, backend).unlink(missing_ok=True)
    deadline = time.monotonic() + arguments.budget
    for family in arguments.backends:
        started = time.monotonic()
        run_family(arguments, cases, family, deadline)
        print(f"{family}: {time.monotonic() - started:.0f} s", flush=True)
    return 0


def run_family(arguments: argparse.Namespace, cases: Sequence[AnyCase], family: str, deadline: float) -> None:
    """One family's cases, in as many workers as it takes: each that ends early leaves out one case."""
    parts: Path = arguments.parts
    limit = arguments.autotune_seconds if family == MAX_AUTOTUNE else arguments.step_seconds
    while left := unfinished(arguments, cases, family):
        if time.monotonic() > deadline:
            reason, blamed = "not run: the time budget was used up", left
        else:
            (parts / PLAN).write_text(json.dumps([case.name for case in left]), encoding="utf-8")
            log = parts / f"{family}.log"
            reason = run_worker(command_for(arguments, family), parts, log, deadline, limit)
            left = unfinished(arguments, cases, family)
            name = busy_with(parts)
            blamed = [case for case in left if case.name == name]
            # Without a case the worker could not even start: no other would.
            if reason.startswith("not run") or not blamed:
                blamed = left
            reason = reason or "error: the worker left it out"
        for case in blamed:
            give_up(arguments, case, family, reason)


def busy_with(parts: Path) -> str | None:
    """The case that a worker that is gone had begun."""
    path = parts / PROGRESS
    return json.loads(path.read_text(encoding="utf-8"))["case"] if path.exists() else None


def note(parts: Path, case: str | None) -> None:
    """Say which case is begun, so that whoever waits knows what killed the worker."""
    aside = parts / "progress.tmp"
    aside.write_text(json.dumps({"case": case}), encoding="utf-8")
    aside.replace(parts / PROGRESS)


def work(arguments: argparse.Namespace) -> int:
    """Be a worker: the cases of the plan, for one family."""
    parts, family = arguments.parts, arguments.worker
    cases = {case.name: case for case in (*known_cases(), *tiny_cases())}
    chosen = [cases[name] for name in json.loads((parts / PLAN).read_text(encoding="utf-8"))]
    note(parts, None)
    # One of each model.
    made: dict[AnySizes, Any] = {}
    for case in chosen:
        sizes = models_of(arguments).of(case)
        if sizes not in made:
            made[sizes] = worker_of(arguments, family, sizes)
        note(parts, case.name)
        if family in OURS:
            made[sizes].measure(case)
        elif family == REFERENCE:
            made[sizes].plan(case)
        else:
            made[sizes].measure(case, family)
    return 0


def worker_of(arguments: argparse.Namespace, family: str, sizes: AnySizes) -> Any:
    """Who measures a family's cases of one model."""
    if family in OURS:
        return OurRows(engines_of(arguments, family), family, arguments.parts, arguments.scratch, sizes)
    return peers_of(arguments, sizes)


def peers_of(arguments: argparse.Namespace, sizes: AnySizes) -> Any:
    """The baselines of a model, on the GPU; with --tiny on the CPU.

    Raises:
        RuntimeError: torch finds no GPU.
    """
    import torch
    from end_to_end_peers import make_peers

    if not arguments.tiny and not torch.cuda.is_available():
        raise RuntimeError("torch finds no GPU")
    libraries = {name: getattr(arguments, name) for name in ("meta_library", "nvidia_library", "meta_repo")}
    device = torch.device("cpu" if arguments.tiny else "cuda")
    given = (arguments.parts, arguments.scratch, sizes, device, libraries)
    return make_peers(*given, all_forms=arguments.all_forms)


def engines_of(arguments: argparse.Namespace, family: str) -> Engines:
    """A family's engines."""
    bundles = arguments.bundles or arguments.scratch
    return Engines(family, bundles, arguments.scratch / "engines", arguments.plugin_library, arguments.kernels)


def in_parallel(commands: Sequence[Sequence[str]], folder: Path, name: str, limit: float) -> int:
    """Run all at once, each with a log of its own; returns how many failed. What outlasts the limit is ended."""
    folder.mkdir(parents=True, exist_ok=True)
    # Each would start a compiler process per core.
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "2"}
    started, running = time.monotonic(), []
    for index, command in enumerate(commands):
        with (folder / f"{name}-{index}.log").open("w", encoding="utf-8") as file:
            running.append(
                subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=folder, env=environment)
            )
    codes = []
    for process in running:
        try:
            codes.append(process.wait(timeout=max(1.0, limit - (time.monotonic() - started))))
        except subprocess.TimeoutExpired:
            process.kill()
            codes.append(process.wait())
    print(f"{name}: {len(commands)} processes in {time.monotonic() - started:.0f} s, exit codes {codes}", flush=True)
    return sum(code != 0 for code in codes)


def slices(
    arguments: argparse.Namespace, count: int, *options: str, cases: Sequence[AnyCase] | None = None
) -> list[list[str]]:
    """Commands that share a stage's work, of all cases that were asked for or of some."""
    command = [sys.executable, str(Path(__file__).resolve()), *options, "--scratch", str(arguments.scratch)]
    if arguments.parts is not None:
        command += ["--parts", str(arguments.parts)]
    for name in _OPTIONS:
        if (path := getattr(arguments, name)) is not None:
            command += [f"--{name.replace('_', '-')}", str(path.resolve())]
    chosen = cases_of(arguments) if cases is None else cases
    command += ["--backends", *arguments.backends, "--cases", *(case.name for case in chosen)]
    command += switches(arguments)
    return [[*command, "--slice", str(index), "--workers", str(count)] for index in range(count)]


def compile_ahead(arguments: argparse.Namespace) -> int:
    """Compile what COMPILED_AHEAD needs, in parallel; the workers find it in the compilers' caches."""
    families = [family for family in COMPILED_AHEAD if family in arguments.backends]
    jobs = [(case, family) for case in cases_of(arguments) for family in families]
    if arguments.slice < 0:
        count = max(1, min(arguments.workers, len(jobs)))
        in_parallel(slices(arguments, count, "--compile-ahead"), arguments.parts, "compile-ahead", arguments.budget)
        # What failed here fails again, with a row, when it is measured.
        return 0
    made: dict[AnySizes, Any] = {}
    for case, family in jobs[arguments.slice :: arguments.workers]:
        started, sizes = time.monotonic(), models_of(arguments).of(case)
        try:
            if sizes not in made:
                made[sizes] = peers_of(arguments, sizes)
            made[sizes].warm(case, family)
            done = "compiled"
        except Exception as error:
            done = status_of(error)
        print(f"{case.name} {family}: {done}, {time.monotonic() - started:.1f} s", flush=True)
    return 0


def build(arguments: argparse.Namespace) -> int:
    """Build the engines of our families that are missing, in parallel; returns 1 if one could not be built."""
    failed = 0
    for family in arguments.backends:
        if family not in OURS:
            continue
        cases = unbuilt(arguments, family)
        if arguments.slice >= 0:
            failed += sum(not built(engines_of(arguments, family), case, family) for case in cases)
        elif cases:
            count = min(arguments.workers, len(cases))
            # By name: the list of what is missing shrinks while they work.
            shares = [argparse.Namespace(**vars(arguments) | {"backends": [family]}) for _ in range(count)]
            commands = [slices(share, 1, "--build", cases=cases[index::count])[0] for index, share in enumerate(shares)]
            failed += in_parallel(commands, arguments.scratch, f"build-{family}", arguments.budget)
    return int(failed > 0)


def unbuilt(arguments: argparse.Namespace, family: str) -> list[AnyCase]:
    """A case for each graph of which a family lacks the engines."""
    engines, found = engines_of(arguments, family), dict[Path, AnyCase]()
    for case in cases_of(arguments):
        if not engines.why_not(case) and not engines.target(case).exists():
            found.setdefault(engines.target(case), case)
    return list(found.values())


def built(engines: Engines, case: AnyCase, family: str) -> bool:
    """Build one case's engines and say so, or why not."""
    try:
        print(f"{case.name} {family}: built in {engines.build(case):.1f} s", flush=True)
    except Exception as error:
        print(f"{case.name} {family}: {status_of(error)}", flush=True)
        return False
    return True


def parser_of() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=Path, metavar="DIR", help="measure, and write one JSON per row here")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="what is built and compiled; large")
    parser.add_argument(
        "--cases", nargs="+", default=[], metavar="PATTERN", help="such as 'bf16_*' (default: the ranking model's)"
    )
    parser.add_argument(
        "--backends",
        nargs="+",
        choices=(REFERENCE, *FAMILIES),
        default=[EAGER, COMPILE, AOTI],
        metavar="NAME",
        help=f"of {REFERENCE} {' '.join(FAMILIES)}, in this order",
    )
    parser.add_argument("--meta-library", type=Path, metavar="LIB", help="Meta's CUTLASS attention")
    parser.add_argument("--nvidia-library", type=Path, metavar="LIB", help="NVIDIA's CUTLASS attention")
    parser.add_argument(
        "--meta-repo", type=Path, metavar="REPO", help="Meta's generative-recommenders: Triton attention"
    )
    parser.add_argument("--bundles", type=Path, metavar="DIR", help="folder of the end_to_end and retrieval bundles")
    parser.add_argument("--plugin-library", type=Path, metavar="LIB", help=f"of {TRT85}")
    parser.add_argument("--kernels", type=Path, metavar="LIB", help=f"of {RTX_FUSED} (default: that of a bundle)")
    parser.add_argument("--budget", type=float, default=280.0, help="seconds; later cases are rows 'not run'")
    parser.add_argument("--step-seconds", type=float, default=120.0, help="limit of one case of one family")
    parser.add_argument("--autotune-seconds", type=float, default=150.0, help=f"the same of {MAX_AUTOTUNE}")
    parser.add_argument("--resume", action="store_true", help="keep the rows that DIR has")
    parser.add_argument("--compile-ahead", action="store_true", help=f"only compile {' and '.join(COMPILED_AHEAD)}")
    parser.add_argument("--build", action="store_true", help=f"only build the engines of {', '.join(OURS)}")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="processes at once")
    parser.add_argument("--profile", metavar="CASE", help="only write the timelines of the backends")
    parser.add_argument("--out", type=Path, metavar="DIR", help="of the timelines (default: results)")
    parser.add_argument("--all-forms", action="store_true", help=f"let {COMPILE} try both forms of the model")
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU, to try the program")
    parser.add_argument("--merge", type=Path, metavar="DIR", help="write the CSV from the parts under DIR")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--worker", choices=(REFERENCE, *PEERS, *OURS), help=argparse.SUPPRESS)
    parser.add_argument("--slice", type=int, default=-1, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of()
    arguments = parser.parse_args(argv)
    if arguments.merge is not None:
        known = [*known_cases(), *(tiny_cases() if arguments.tiny else ())]
        return merge(arguments.merge, arguments.csv, known)
    if arguments.parts is None and not (arguments.build and arguments.scratch):
        print("bench_end_to_end.py measures on a GPU, with --parts; results/end_to_end.csv stays as it is")
        return 0
    if arguments.scratch is None:
        parser.error("--parts needs --scratch")
    arguments.scratch = arguments.scratch.resolve()
    if arguments.parts is not None:
        arguments.parts = arguments.parts.resolve()
    if arguments.worker is not None:
        return work(arguments)
    if arguments.build:
        return build(arguments)
    if arguments.compile_ahead:
        return compile_ahead(arguments)
    if arguments.profile is not None:
        from end_to_end_timeline import profile

        return profile(arguments)
    return measure(arguments)


if __name__ == "__main__":
    sys.exit(main())
