"""The attention benchmark's CSV as Markdown tables with ratios and bars, and as a plot of speed over sequence length.

  attention_table.py [--csv FILE] [--into FILE.md] [--svg FILE]

A ratio is of times in one run, or the document around the table says of which: above 1, ours is faster. A row gets none
where one call in ten took 5 % longer than the median. (The coefficient of variation is large where one call in a
hundred waited for the host; the median is not.)
Standard library and NumPy alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

if str(Path(__file__).parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parent))

from attention_grid import (
    BACKENDS,
    CUDNN,
    DENSE_RAB,
    DIMS,
    DTYPES,
    FASTEST_PEERS,
    LENGTHS,
    OURS,
    Case,
    all_cases,
    why_not,
)
from bench_attention import RESULTS
from bench_plugin import put_between, read_rows
from svg_panel import COLOURS, GAP, MARGIN, PANEL, Panel, drawing, legend

BEGIN, END = "<!-- attention benchmark: begin -->", "<!-- attention benchmark: end -->"
LARGEST_SPREAD = 0.05
_TFLOPS_TICKS = (25.0, 50.0, 100.0, 200.0, 400.0, 600.0, 800.0)

Row = dict[str, Any]
Found = Mapping[str, Row]


def rows_by_case(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """Rows of each case, by backend."""
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(row["case"], {})[row["backend"]] = row
    return cases


def spread(row: Row) -> float:
    """By how much the slowest tenth of the calls exceeds the median, as a share of it."""
    return float(row["p90_ms"]) / float(row["median_ms"]) - 1.0


def milliseconds(row: Row | None) -> float | None:
    """Time of a row, with what filling its bias tensor takes; None where there is none, or it varied too much."""
    if row is None or row["status"] != "ok" or spread(row) > LARGEST_SPREAD:
        return None
    return float(row["median_ms"]) + float(row.get("fill_ms") or 0.0)


def over(found: Found, backends: Sequence[str]) -> float | None:
    """Speed of ours over the fastest of these backends."""
    own = milliseconds(found.get(OURS))
    theirs = [time for name in backends if (time := milliseconds(found.get(name))) is not None]
    return min(theirs) / own if own and theirs else None


def shortfalls(case: Case, cases: Mapping[str, Found]) -> list[str] | None:
    """What ours misses of a case's bar, in words; None where it has no bar, or something it needs was not measured."""
    bar, found = case.bar, cases.get(case.name, {})
    own = found.get(OURS)
    if bar is None or own is None:
        return None
    if milliseconds(own) is None:
        return [f"ours: {own['status']}" if own["status"] != "ok" else f"ours varies by {spread(own):.0%}"]
    plain = cases.get(f"{case.dtype}_D{case.dim}_{case.shape.removeprefix('bias_')}", {})
    unbiased = milliseconds(plain.get(OURS)) if bar.over_unbiased else None
    own_ms = float(own["median_ms"])
    asked = [
        (bar.over_peer, over(found, bar.peers), "x the fastest peer"),
        (bar.over_cudnn, over(found, (CUDNN,)), "x cuDNN softmax"),
        (bar.tflops, float(own["tflops"]), " TFLOP/s"),
        (bar.roof, float(own["roof_share"]) if own.get("roof_share") else None, " of the roof"),
        (bar.over_unbiased, unbiased / own_ms if unbiased else None, "x ours without bias"),
    ]
    wanted = [(least, got, unit) for least, got, unit in asked if least]
    if any(got is None for _, got, _ in wanted):
        return None
    return [f"{got:.4g} of {least:g}{unit}" for least, got, unit in wanted if got is not None and got < least]


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    if row["status"] != "ok":
        return str(row["status"]).split(":")[0]
    noisy = f" (varies by {spread(row):.0%})" if spread(row) > LARGEST_SPREAD else ""
    return f"{float(row['median_ms']):.3f} ({float(row['tflops']):.0f}){noisy}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _verdict(case: Case, cases: Mapping[str, Found]) -> str:
    if case.bar is None:
        return ""
    missed = shortfalls(case, cases)
    if missed is None:
        return "not all measured"
    return "met" if not missed else "missed: " + ", ".join(missed)


def table_lines(cases: Mapping[str, Found], dtype: str) -> Iterator[str]:
    """One line per case of a type."""
    shown = [case for case in all_cases([dtype]) if case.name in cases]
    used = {name for case in shown for name in cases[case.name]}
    columns = [name for name in BACKENDS if name in used]
    if not shown:
        return
    heads = ["case", *columns, f"ours / {' or '.join(FASTEST_PEERS)}", f"ours / {CUDNN}", "bar"]
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---|" * len(heads)
    for case in shown:
        found = cases[case.name]
        peers = (DENSE_RAB,) if case.has_bias else FASTEST_PEERS
        cells = ["" if why_not(name, case) else _cell(found.get(name)) for name in columns]
        cells += [_ratio(over(found, peers)), _ratio(over(found, (CUDNN,))), _verdict(case, cases)]
        yield f"| {case.name} | " + " | ".join(cells) + " |"


def problem_lines(rows: Sequence[Row]) -> Iterator[str]:
    """What has no time, with the reason: one line for the cases that share backend and reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            found.setdefault((row["backend"], row["status"]), []).append(row["case"])
    for (backend, status), names in found.items():
        which = names[0] if len(names) == 1 else f"{len(names)} cases, {names[0]} to {names[-1]}"
        yield f"- {backend}, {which}: {status}"


def table_text(rows: Sequence[Row]) -> str:
    """The tables, with where they come from, and what has no time."""
    cases = rows_by_case(rows)
    lines = [
        f"{column}: {'; '.join(sorted({row[column] for row in rows if row.get(column)}))}  "
        for column in ("gpu", "clocks", "versions", "commit", "date")
        if any(row.get(column) for row in rows)
    ]
    gemm = sorted(float(row["gemm_tflops"]) for row in rows if row.get("gemm_tflops"))
    if gemm:
        lines.append(f"a product of 8192 x 8192 matrices in the same runs: {gemm[0]:.0f} to {gemm[-1]:.0f} TFLOP/s  ")
    lines += [
        "",
        "H = 4. Cells: median device time in ms (TFLOP/s of the pairs that the mask lets through). N: 65,536 tokens in",
        "sequences of that length; t: targets at each tail; delta: 256 rows ask, against k older keys; graph: back to",
        "back in one CUDA graph with a warm L2 cache, all others alone with a cold one. The dense_rab kernel's ratio",
        "counts its time and that of writing its bias tensor once, at memory speed.",
    ]
    for dtype in DTYPES:
        table = list(table_lines(cases, dtype))
        lines += ["", *table] if table else []
    problems = list(problem_lines(rows))
    return "\n".join(lines + (["", "Without a time:", "", *problems] if problems else [])) + "\n"


def plot(rows: Sequence[Row], dtype: str) -> str:
    """SVG: for each head dim, TFLOP/s over sequence length of every backend that has two lengths or more."""
    cases = rows_by_case(rows)
    body: list[str] = []
    colours: dict[str, str] = {}
    for index, dim in enumerate(sorted(DIMS)):
        series: dict[str, list[tuple[float, float]]] = {}
        for n in LENGTHS:
            for name, row in cases.get(f"{dtype}_D{dim}_N{n}", {}).items():
                if row["status"] == "ok":
                    series.setdefault(name, []).append((float(n), float(row["tflops"])))
        series = {name: series[name] for name in BACKENDS if len(series.get(name, ())) > 1}
        if not series:
            continue
        points = [point for each in series.values() for point in each]
        panel = Panel(MARGIN + index * (PANEL[0] + GAP), MARGIN, points, (LENGTHS, _TFLOPS_TICKS))
        body += panel.frame(f"{dtype}, head dim {dim}, causal", "TFLOP/s", "sequence length N")
        for name, each in series.items():
            body.append(panel.line(each, colours.setdefault(name, COLOURS[len(colours) % len(COLOURS)])))
    left = MARGIN + len(DIMS) * (PANEL[0] + GAP) - 60
    body += legend(left, MARGIN + 10, colours)
    return drawing(left + 220, MARGIN + PANEL[1] + GAP, body)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--into", type=Path, metavar="FILE", help="also put the tables between this file's marks")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="also draw speed over sequence length")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of the drawing")
    arguments = parser.parse_args(argv)
    rows = read_rows(arguments.csv)
    if not rows:
        print(f"error: {arguments.csv} has no rows; measure first", file=sys.stderr)
        return 1
    text = table_text(rows)
    if arguments.into is not None:
        put_between(arguments.into, BEGIN, END, text)
    if arguments.svg is not None:
        arguments.svg.write_text(plot(rows, arguments.dtype), encoding="utf-8")
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
