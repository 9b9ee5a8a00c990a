"""Timelines of the end-to-end benchmark: every kernel of a forward, its time and share, and the gaps between them.

  bench_end_to_end.py --parts DIR --scratch DIR --profile CASE --backends NAME... [--out DIR]   (on a GPU, beside torch)

torch.profiler records what runs on the GPU in this process, whoever enqueued it: also engines of TensorRT-RTX and the
kernels between them. A forward is run a few times with a wait in between; the L2 cache is warm. Written is one
timeline_CASE.csv with the backends' kernels, each name once with its launches; a run replaces its backends' rows.
Profiling makes launches slower, so gaps of what is not in a CUDA graph are larger than in the benchmark.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_plugin import commit_of, gpu_name, read_rows, today, write_rows
from end_to_end_rows import GRAPH, OURS, RESULTS, Row, keys_path
from end_to_end_workload import CACHED, AnyCase, AnySizes, Case

COLUMNS = ("case", "backend", "kernel", "kind", "launches", "us", "share", "first", "gpu", "commit", "date")
#: What is no kernel: time in which none ran, and from the beginning of the first to the end of the last.
GAPS, SPAN = "(gaps)", "(span)"
ATTENTION, PRODUCT, COPY, OTHER = "attention", "product", "copy", "other"
KINDS = (ATTENTION, PRODUCT, COPY, OTHER, GAPS)
CALLS, WARM_UP_CALLS = 8, 5
#: Between calls lies a wait of this long, within one no kernel waits for half of it.
PAUSE_SECONDS = 0.02
_LARGEST_GAP_US = 1e6 * PAUSE_SECONDS / 2
_LONGEST_NAME = 160
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_KIND_OF = (
    (ATTENTION, re.compile(r"hstu(?!_norm)|attn|attention|fmha|flash", re.IGNORECASE)),
    (COPY, re.compile(r"memcpy|memset|copy|transpose|permut|reformat|slice|concat|_cat|CatArray", re.IGNORECASE)),
    (PRODUCT, re.compile(r"gemm|nvjet|cublas|cutlass|matmul|xmma|wgmma|_mm_|_addmm|_bmm|splitk", re.IGNORECASE)),
)

Event = Mapping[str, Any]


def kind_of(kernel: str) -> str:
    """What a kernel does, by its name."""
    return next((kind for kind, pattern in _KIND_OF if pattern.search(kernel)), OTHER)


def device_events(trace: Mapping[str, Any]) -> list[Event]:
    """What ran on the GPU, of a Chrome trace, in the order in which it began; ts and dur in microseconds."""
    found = [event for event in trace["traceEvents"] if event.get("cat") in _DEVICE and event.get("ph") == "X"]
    return sorted(found, key=lambda event: float(event["ts"]))


def calls_of(events: Sequence[Event], largest_gap_us: float = _LARGEST_GAP_US) -> list[list[Event]]:
    """Split at long waits."""
    calls: list[list[Event]] = []
    end = float("-inf")
    for event in events:
        if float(event["ts"]) - end > largest_gap_us:
            calls.append([])
        calls[-1].append(event)
        end = max(end, float(event["ts"]) + float(event["dur"]))
    return calls


def busy_us(call: Sequence[Event]) -> float:
    """Time in which at least one kernel ran."""
    total, end = 0.0, float("-inf")
    for event in call:
        start, stop = float(event["ts"]), float(event["ts"]) + float(event["dur"])
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def timeline_rows(calls: Sequence[Sequence[Event]]) -> Iterator[Row]:
    """One row for each kernel, in the order of their first launch, then the gaps and the span.

    Times are medians over those calls that have the usual number of launches.

    Raises:
        ValueError: no call, or no kernel in it.
    """
    if not calls or not all(calls):
        raise ValueError("the trace has no kernels: nothing ran on the GPU, or the profiler could not see it")
    usual = statistics.mode(len(call) for call in calls)
    kept = [call for call in calls if len(call) == usual]
    spans = [max(float(e["ts"]) + float(e["dur"]) for e in call) - float(call[0]["ts"]) for call in kept]
    span = statistics.median(spans)
    names = list(dict.fromkeys(str(event["name"]) for event in kept[0]))
    for first, name in enumerate(names):
        times = [sum(float(e["dur"]) for e in call if e["name"] == name) for call in kept]
        launches = sum(event["name"] == name for event in kept[0])
        us = statistics.median(times)
        row = {"kernel": name[:_LONGEST_NAME], "kind": kind_of(name), "launches": launches, "us": us}
        yield row | {"share": us / span, "first": first}
    gaps = statistics.median(whole - busy_us(call) for whole, call in zip(spans, kept, strict=True))
    yield {"kernel": GAPS, "kind": GAPS, "launches": usual, "us": gaps, "share": gaps / span}
    yield {"kernel": SPAN, "kind": SPAN, "launches": usual, "us": span, "share": 1.0}


def timeline_path(folder: Path, case: str) -> Path:
    """File of a case's timelines."""
    return folder / f"timeline_{case}.csv"


def save_timeline(folder: Path, case: str, backend: str, rows: Sequence[Row]) -> None:
    """Put a backend's rows into the case's file, instead of those that are there."""
    path = timeline_path(folder, case)
    facts = {"case": case, "backend": backend, "gpu": gpu_name(), "commit": commit_of(), "date": today()}
    kept = [row for row in read_rows(path) if row["backend"] != backend]
    write_rows(path, COLUMNS, [*kept, *(facts | row for row in rows)])


def traced(run: Callable[[], Any], wait: Callable[[], Any]) -> list[list[Event]]:
    """The device's events of some calls.

    Args:
        run: enqueue one.
        wait: until all is done.
    """
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    for _ in range(WARM_UP_CALLS):
        run()
    wait()
    with torch_profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(CALLS):
            time.sleep(PAUSE_SECONDS)
            run()
            wait()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        return calls_of(device_events(json.loads(path.read_text(encoding="utf-8"))))


def profile(arguments: argparse.Namespace) -> int:
    """Write the timelines of the families that were asked for; returns 1 if one could not be made."""
    from bench_end_to_end import cases_of, engines_of, models_of, peers_of
    from bench_plugin import status_of

    arguments.cases = [arguments.profile]
    (case,) = cases_of(arguments)
    folder, sizes = arguments.out or RESULTS.parent, models_of(arguments).of(case)
    folder.mkdir(parents=True, exist_ok=True)
    failed = 0
    for family in arguments.backends:
        try:
            if family in OURS:
                found = _our_calls(engines_of(arguments, family), case, arguments.scratch, sizes)
            else:
                found = peers_of(arguments, sizes).traces(case, family, traced)
            for suffix, calls in found:
                save_timeline(folder, case.name, family + suffix, list(timeline_rows(calls)))
                print(f"{case.name} {family}{suffix}: {len(calls)} calls", flush=True)
        except Exception as error:
            failed = 1
            print(f"{case.name} {family}: {status_of(error)}", flush=True)
    return failed


def _our_calls(engines: Any, case: AnyCase, scratch: Path, sizes: AnySizes) -> Iterator[tuple[str, list[list[Event]]]]:
    """Traces of a session's passes, enqueued as they are and as a CUDA graph."""
    import torch
    from end_to_end_engines import session_feeds

    from hstu_compile.runtime._cuda_graph import CudaGraph

    torch.zeros(1, device="cuda")  # the profiler follows a GPU that torch has begun to use
    with engines.opened(case) as session:
        keys = keys_path(scratch, case) if isinstance(case, Case) and case.mode == CACHED else None
        with session_feeds(case, session, sizes, keys) as feeds:
            session._graphs = None
            session.run_resident(feeds, {})
            driver = session._driver
            with driver.current(), session._api.capture() as log:
                yield "", traced(lambda: session._execute(log), driver.synchronise)
                if not session._api.is_rtx or hasattr(session, "_schedule"):
                    graph = CudaGraph(driver, lambda: session._execute(log))
                    try:
                        yield GRAPH, traced(graph.launch, driver.synchronise)
                    finally:
                        graph.close()


def shares_by_kind(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Microseconds of each kind, of the gaps and of the span, by backend."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        kinds = found.setdefault(row["backend"], dict.fromkeys((*KINDS, SPAN), 0.0))
        kinds[row["kind"]] += float(row["us"])
    return found


def timeline_lines(rows: Sequence[Row], longest: int = 8) -> Iterator[str]:
    """Markdown: microseconds by kind for each backend, then the longest kernels of each.

    Args:
        rows: of one case.
        longest: kernels that are named.
    """
    yield "| backend | launches | " + " | ".join(KINDS) + " | span, us |"
    yield "|" + "---|" * (len(KINDS) + 3)
    for backend, kinds in shares_by_kind(rows).items():
        (launches,) = (row["launches"] for row in rows if row["backend"] == backend and row["kernel"] == SPAN)
        cells = [f"{kinds[kind]:.1f} ({kinds[kind] / kinds[SPAN]:.0%})" for kind in KINDS]
        yield f"| {backend} | {launches} | " + " | ".join(cells) + f" | {kinds[SPAN]:.1f} |"
    for backend, group in itertools.groupby(rows, key=lambda row: row["backend"]):
        kernels = [row for row in group if row["kernel"] not in (GAPS, SPAN)]
        kernels.sort(key=lambda row: -float(row["us"]))
        yield ""
        yield f"The longest of {len(kernels)} kernels of {backend}:"
        yield ""
        yield "| kernel | kind | launches | us | share |"
        yield "|---|---|---|---|---|"
        for row in kernels[:longest]:
            name = str(row["kernel"]).replace("|", "\\|")
            cells = [f"`{name}`", row["kind"], str(row["launches"]), f"{float(row['us']):.1f}"]
            yield "| " + " | ".join([*cells, f"{float(row['share']):.1%}"]) + " |"
