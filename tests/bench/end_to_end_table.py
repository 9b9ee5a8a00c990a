"""The end-to-end benchmark's CSV as Markdown tables with ratios and bars, and as a plot of how time grows.

  end_to_end_table.py [--csv FILE] [--into FILE.md] [--svg FILE] [--timelines DIR]

Ratios are of device times of one run: above 1, ours is faster. A row has none where one call in ten took 5 % longer
than the median. Standard library and NumPy alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

if str(Path(__file__).parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parent))

from attention_table import LARGEST_SPREAD, milliseconds, rows_by_case, spread
from bench_plugin import put_between, read_rows
from end_to_end_retrieval_workload import retrieval_cases
from end_to_end_rows import BACKENDS, GRAPH, PEERS, RESULTS, RTX_FUSED, backends_of
from end_to_end_timeline import timeline_lines, timeline_path
from end_to_end_workload import (
    CACHED,
    CEILING_TFLOPS,
    DTYPES,
    FULL,
    AnyCase,
    Case,
    all_cases,
    growth_cases,
    known_cases,
)
from svg_panel import COLOURS, GAP, MARGIN, PANEL, Panel, drawing, legend

BEGIN, END = "<!-- end-to-end benchmark: begin -->", "<!-- end-to-end benchmark: end -->"
#: What the bars are asked of.
BEST = RTX_FUSED + GRAPH
BASELINES = tuple(backend for family in PEERS for backend in backends_of(family))

_SIZES = FULL.retrieval
RETRIEVAL_TEXT = (
    f"Retrieval: Meta's research HSTU at the sizes of ml-20m-large, D {_SIZES.width}, {_SIZES.num_heads} heads of "
    f"{_SIZES.linear_dim}, {_SIZES.num_layers} layers, {_SIZES.num_items:,} items;",
    f"histories of B users, each of {_SIZES.max_history} events, or `ragged`, as the data set's users have them",
    "(half of them 68 events or fewer). The answer is a vector for each user; search among the items is no part of it.",
    "The baselines' attention is two batched products and what lies between them, which torch.compile makes one kernel",
    "of. Pruned: of the last layer, only what the last row of each history needs.",
)

Row = dict[str, Any]
Found = Mapping[str, Row]


def fastest(found: Found, backends: Sequence[str]) -> tuple[str, float] | None:
    """The backend with the shortest time, and that time."""
    times = [(time, name) for name in backends if (time := milliseconds(found.get(name))) is not None]
    return (min(times)[1], min(times)[0]) if times else None


def ratio(theirs: Found, ours: Found) -> float | None:
    """Speed of ours over the fastest baseline."""
    best, own = fastest(theirs, BASELINES), milliseconds(ours.get(BEST))
    return best[1] / own if best is not None and own is not None else None


def pruned(case: AnyCase) -> AnyCase:
    """The same case with a pruned last layer; a cached one has no other form."""
    return case if case.mode == CACHED else dataclasses.replace(case, is_pruned=True)


def verdict(case: AnyCase, cases: Mapping[str, Found]) -> str:
    """Whether ours meets a case's bar against baselines that are pruned as well."""
    found = cases.get(pruned(case).name, {})
    own = found.get(BEST)
    if own is None or fastest(found, BASELINES) is None:
        return "not all measured"
    if milliseconds(own) is None:
        return f"ours: {own['status']}" if own["status"] != "ok" else f"ours varies by {spread(own):.0%}"
    reached = ratio(found, found)
    assert reached is not None
    return "met" if reached >= case.bar else f"missed: {reached:.2f} of {case.bar:g}"


def summary_lines(cases: Mapping[str, Found], chosen: Iterable[AnyCase]) -> Iterator[str]:
    """One line for each batch: the fastest baseline, ours, and the ratios with and without pruning."""
    shown = [case for case in chosen if case.mode == CACHED or not case.is_pruned]
    shown = [case for case in shown if case.name in cases or pruned(case).name in cases]
    if not shown:
        return
    heads = ["case", "tokens", "fastest baseline", "the same, pruned", f"{BEST}, unpruned", BEST]
    heads += ["both unpruned", "ours pruned alone", "both pruned", "of the ceiling"]
    heads += ["bar"] if any(case.bar for case in shown) else []
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---|" * len(heads)
    for case in shown:
        plain, short = cases.get(case.name, {}), cases.get(pruned(case).name, {})
        is_cached = case.mode == CACHED
        own = short.get(BEST)
        share = f"{float(own['ceiling_share']):.0%}" if own is not None and own["status"] == "ok" else ""
        cells = [
            f"{case.tokens:,}",
            "" if is_cached else _fastest_cell(plain),
            _fastest_cell(short),
            "" if is_cached else _cell(plain.get(BEST)),
            _cell(own),
            "" if is_cached else _ratio(ratio(plain, plain)),
            "" if is_cached else _ratio(ratio(plain, short)),
            _ratio(ratio(short, short)),
            share,
        ]
        cells += [f"{case.bar:g}: {verdict(case, cases)}"] if case.bar else []
        yield f"| {case.name} | " + " | ".join(cells) + " |"


def backend_lines(cases: Mapping[str, Found], chosen: Sequence[AnyCase]) -> Iterator[str]:
    """Every backend of every case: device time, and the whole call in brackets."""
    shown = [case for case in chosen if case.name in cases]
    used = {name for case in shown for name in cases[case.name]}
    columns = [name for name in BACKENDS if name in used]
    if not shown:
        return
    yield "| case | GFLOP | " + " | ".join(columns) + " |"
    yield "|" + "---|" * (len(columns) + 2)
    for case in shown:
        found = cases[case.name]
        flop = next((f"{float(row['gflop']):.4g}" for row in found.values() if row.get("gflop")), "")
        yield f"| {case.name} | {flop} | " + " | ".join(_cell(found.get(name), call=True) for name in columns) + " |"


def _cell(row: Row | None, *, call: bool = False) -> str:
    if row is None:
        return "-"
    if row["status"] != "ok":
        return str(row["status"]).split(":")[0]
    noisy = f", varies by {spread(row):.0%}" if spread(row) > LARGEST_SPREAD else ""
    whole = f" ({float(row['call_median_ms']):.3f})" if call and row.get("call_median_ms") else ""
    return f"{float(row['median_ms']):.3f}{whole}{noisy}"


def _fastest_cell(found: Found) -> str:
    best = fastest(found, BASELINES)
    return "-" if best is None else f"{best[1]:.3f} {best[0]}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def problem_lines(rows: Sequence[Row]) -> Iterator[str]:
    """What has no time, with the reason: one line for the cases that share backend and reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            found.setdefault((row["backend"], row["status"]), []).append(row["case"])
    for (backend, status), names in found.items():
        which = names[0] if len(names) == 1 else f"{len(names)} cases, {names[0]} to {names[-1]}"
        yield f"- {backend}, {which}: {status}"


def table_text(rows: Sequence[Row], timelines: Path | None = None) -> str:
    """The tables, with where they come from, what they leave out and what went wrong."""
    cases = rows_by_case(rows)
    lines = [
        f"{column}: {'; '.join(sorted({row[column] for row in rows if row.get(column)}))}  "
        for column in ("gpu", "clocks", "versions", "commit", "date")
    ]
    lines += [
        "",
        "D 512, 4 heads of 128, 5 layers; B users with n events and m candidates each, embeddings and preprocessing",
        "inside. Median device time in ms with a cold L2 cache; in brackets the whole call, from host arrays to host",
        "arrays. Speeds are of ours over the fastest baseline; above 1, ours is faster. Ours drops what the last layer",
        "computes for nobody: `ours pruned alone` is against baselines that do not, `both pruned` against those that",
        f"do, of which the bar is asked. Of the ceiling: useful operations over {CEILING_TFLOPS:g} TFLOP/s, those of a",
        "large product. Keys and values of cached cases lie where the forward reads them, for everybody.",
        "",
    ]
    lines += tables_of(cases, [list(all_cases([dtype])) for dtype in DTYPES], "Every backend")
    growing = list(backend_lines(cases, list(growth_cases())))
    lines += ["How time grows:", "", *growing, ""] if growing else []
    retrieval = tables_of(cases, [list(retrieval_cases([dtype])) for dtype in DTYPES], "Every backend of retrieval")
    lines += [*RETRIEVAL_TEXT, "", *retrieval] if retrieval else []
    if problems := list(problem_lines(rows)):
        lines += ["Without a time:", "", *problems, ""]
    for case in known_cases():
        path = None if timelines is None else timeline_path(timelines, case.name)
        if path is not None and path.exists():
            lines += [
                f"Kernels of {case.name}, warm L2 cache, under a profiler:",
                "",
                *timeline_lines(read_rows(path)),
                "",
            ]
    return "\n".join(lines).rstrip() + "\n"


def tables_of(cases: Mapping[str, Found], chosen: Sequence[Sequence[AnyCase]], title: str) -> list[str]:
    """A summary of each group of cases, then every backend of all; none of what was not measured.

    Args:
        cases: rows by case and backend.
        chosen: groups of cases.
        title: of the table of every backend.
    """
    lines: list[str] = []
    for group in chosen:
        summary = list(summary_lines(cases, group))
        lines += [*summary, ""] if summary else []
    table = list(backend_lines(cases, [case for group in chosen for case in group]))
    return [*lines, f"{title}:", "", *table, ""] if table else []


@dataclasses.dataclass(frozen=True)
class _Axis:
    """What changes in one panel."""

    title: str
    unit: str
    size: Any


_AXES = (
    _Axis("B 4, m 256", "events n", lambda case: case.lengths[0]),
    _Axis("n 2048, m 256", "users B", lambda case: case.batch),
    _Axis("B 4, n 2048", "candidates m", lambda case: case.candidates),
    _Axis("B 4, n 2048, m 256", "layers", lambda case: case.layers or FULL.ranking.num_layers),
)


def plot(rows: Sequence[Row], dtype: str) -> str:
    """SVG: device time over events, users, candidates and layers, of every backend that has two sizes or more."""
    cases = rows_by_case(rows)
    growing = [case for case in growth_cases([dtype]) if case.name in cases]
    body: list[str] = []
    colours: dict[str, str] = {}
    for index, axis in enumerate(_AXES):
        own = [case for case in growing if _varies(case, axis)]
        series: dict[str, list[tuple[float, float]]] = {}
        for case in own:
            for name, row in cases[case.name].items():
                if row["status"] == "ok":
                    series.setdefault(name, []).append((float(axis.size(case)), float(row["median_ms"])))
        series = {name: series[name] for name in BACKENDS if len(series.get(name, ())) > 1}
        if not series:
            continue
        points = [point for each in series.values() for point in each]
        ticks = sorted({x for x, _ in points})
        panel = Panel(MARGIN + index * (PANEL[0] + GAP), MARGIN, points, (ticks, None))
        body += panel.frame(f"{dtype}, pruned, {axis.title}", "ms", axis.unit)
        for name, each in series.items():
            body.append(panel.line(each, colours.setdefault(name, COLOURS[len(colours) % len(COLOURS)])))
    left = MARGIN + len(_AXES) * (PANEL[0] + GAP) - 60
    body += legend(left, MARGIN + 10, colours)
    return drawing(left + 240, MARGIN + PANEL[1] + GAP, body)


def _varies(case: Case, axis: _Axis) -> bool:
    """Whether a case lies on an axis: the other numbers are those in the middle."""
    middle = {"events n": 2048, "users B": 4, "candidates m": 256, "layers": FULL.ranking.num_layers}
    return all(each is axis or each.size(case) == middle[each.unit] for each in _AXES)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--into", type=Path, metavar="FILE", help="also put the tables between this file's marks")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="also draw how time grows")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of the drawing")
    parser.add_argument("--timelines", type=Path, metavar="DIR", help="of timeline_*.csv (default: beside the CSV)")
    arguments = parser.parse_args(argv)
    rows = read_rows(arguments.csv)
    if not rows:
        print(f"error: {arguments.csv} has no rows; measure first", file=sys.stderr)
        return 1
    text = table_text(rows, arguments.timelines or arguments.csv.parent)
    if arguments.into is not None:
        put_between(arguments.into, BEGIN, END, text)
    if arguments.svg is not None:
        arguments.svg.write_text(plot(rows, arguments.dtype), encoding="utf-8")
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
