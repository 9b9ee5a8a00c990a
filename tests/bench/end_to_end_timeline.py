"""Timelines of the end-to-end benchmark: every kernel of a forward, its time and share, and the gaps between them.

  bench_end_to_end.py --parts DIR --scratch DIR --profile CASE --backends NAME... [--out DIR]   (on a GPU, beside torch)

What is recorded, and how, is hstu_compile/kernel_timeline.py. Written is one timeline_CASE.csv with the backends'
kernels, each name once with its launches; a run replaces its backends' rows.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench_plugin import commit_of, gpu_name, read_rows, today, write_rows
from end_to_end_rows import GRAPH, OURS, RESULTS, Row, keys_path
from end_to_end_workload import CACHED, AnyCase, AnySizes, Case

from hstu_compile.kernel_timeline import GAPS, KINDS, SPAN, Event, start_tracer, timeline_rows, traced, us_by_kind

COLUMNS = ("case", "backend", "kernel", "kind", "launches", "us", "share", "first", "gpu", "commit", "date")


def timeline_path(folder: Path, case: str) -> Path:
    """File of a case's timelines."""
    return folder / f"timeline_{case}.csv"


def save_timeline(folder: Path, case: str, backend: str, rows: Sequence[Row]) -> None:
    """Put a backend's rows into the case's file, instead of those that are there."""
    path = timeline_path(folder, case)
    facts = {"case": case, "backend": backend, "gpu": gpu_name(), "commit": commit_of(), "date": today()}
    kept = [row for row in read_rows(path) if row["backend"] != backend]
    write_rows(path, COLUMNS, [*kept, *(facts | row for row in rows)])


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
    from end_to_end_engines import session_feeds

    from hstu_compile.runtime._cuda_graph import CudaGraph

    start_tracer()
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
    backends = dict.fromkeys(row["backend"] for row in rows)
    return {backend: us_by_kind(row for row in rows if row["backend"] == backend) for backend in backends}


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
