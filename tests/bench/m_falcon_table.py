"""The M-FALCON benchmark's CSV as a Markdown table with ratios, and as a plot of cost and memory over candidates.

  m_falcon_table.py [--csv FILE] [--into README.md] [--svg FILE]

Ratios are of device times on the same GPU: above 1, ours is faster. Standard library alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

if str(Path(__file__).parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parent))

from bench_plugin import put_between, read_rows
from m_falcon_rows import ALONE, BACKENDS, COLD, ENGINES, MODES, NO_GRAPH, PACKED, PEERS, RESULTS, WARM
from m_falcon_workload import ALONE_SAMPLE
from svg_panel import COLOURS, GAP, MARGIN, PANEL, Panel, drawing, legend

BEGIN, END = "<!-- m-falcon benchmark: begin -->", "<!-- m-falcon benchmark: end -->"

Row = dict[str, Any]
Found = Callable[..., Row | None]


def finder(rows: Sequence[Row]) -> Found:
    """Look a measured row up: (backend, mode, n, m), and the micro-batch, or the fastest of several."""

    def found(backend: str, mode: str, n: int, m: int, micro_batch: int | None = None) -> Row | None:
        fits = [
            row
            for row in rows
            if (row["backend"], row["mode"], int(row["n"]), int(row["m"])) == (backend, mode, n, m)
            and (micro_batch is None or int(row["micro_batch"]) == micro_batch)
            and row["status"] == "ok"
        ]
        return min(fits, key=lambda row: float(row["median_ms"]), default=None)

    return found


def fastest_peer(found: Found, n: int, m: int) -> Row | None:
    """The packed forward of whichever peer is fastest at this point."""
    rows = [row for name in PEERS if (row := found(name, PACKED, n, m)) is not None]
    return min(rows, key=lambda row: float(row["median_ms"]), default=None)


def _time(row: Row | None, *, call: bool = False) -> str:
    if row is None:
        return "-"
    value = float(row["median_ms"])
    shown = f"{value:.1f}" if value >= 100 else f"{value:.3f}"
    split = f" b={row['micro_batch']}" if int(row["micro_batch"]) else ""
    whole = f" ({float(row['call_median_ms']):.3f})" if call and row.get("call_median_ms") else ""
    return shown + split + whole


def _ratio(slow: Row | None, fast: Row | None) -> str:
    if slow is None or fast is None:
        return ""
    return f"{float(slow['median_ms']) / float(fast['median_ms']):.1f}x"


def table_lines(rows: Sequence[Row]) -> Iterator[str]:
    """One line per history length and candidate count."""
    found = finder(rows)
    ours = [f"{mode.replace('_', ' ')}" for mode in MODES]
    heads = ["n", "m", *ours, "packed, no graph", "warm, no graph", "alone / packed", "packed / warm", "fastest peer"]
    heads += ["peer / packed", "peer / warm"]
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---|" * len(heads)
    for n, m in sorted({(int(row["n"]), int(row["m"])) for row in rows}):
        # Ratios are of one kind: with graphs where those were measured, else without.
        backend = NO_GRAPH if found(ENGINES, PACKED, n, m) is None else ENGINES
        alone, packed, cold, warm = (found(backend, mode, n, m) for mode in (ALONE, PACKED, COLD, WARM))
        peer = fastest_peer(found, n, m)
        name = "-" if peer is None else f"{_time(peer)} {peer['backend']} {peer['dtype']}"
        cells = [
            f"{n} (no graph)" if backend == NO_GRAPH else str(n),
            str(m),
            _time(alone),
            *(_time(row, call=True) for row in (packed, cold, warm)),
        ]
        cells += [_time(found(NO_GRAPH, mode, n, m), call=True) for mode in (PACKED, WARM)]
        cells += [_ratio(alone, packed), _ratio(packed, warm), name, _ratio(peer, packed), _ratio(peer, warm)]
        yield "| " + " | ".join(cells) + " |"


def peer_lines(rows: Sequence[Row]) -> Iterator[str]:
    """Every peer's packed time, and Meta's cache."""
    found = finder(rows)
    columns = [(name, mode) for name, modes in PEERS.items() for mode in modes if mode != ALONE]
    heads = ["n", "m", *(f"{name} {mode}" for name, mode in columns)]
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---|" * len(heads)
    for n, m in sorted({(int(row["n"]), int(row["m"])) for row in rows}):
        cells = [_time(found(name, mode, n, m)) for name, mode in columns]
        yield "| " + " | ".join([str(n), str(m), *cells]) + " |"


def problem_lines(rows: Sequence[Row]) -> Iterator[str]:
    """What has no time, with the reason: one line for the cases that share backend, mode and reason."""
    cases: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            split = f" b={row['micro_batch']}" if int(row["micro_batch"]) else ""
            key = (row["backend"], row["mode"], row["status"])
            cases.setdefault(key, []).append(f"n={row['n']} m={row['m']}{split}")
    for (backend, mode, status), names in cases.items():
        which = names[0] if len(names) == 1 else f"{len(names)} cases, {names[0]} to {names[-1]}"
        yield f"- {backend} {mode}, {which}: {status}"


def table_text(rows: Sequence[Row]) -> str:
    """The tables, with where they come from, what they leave out and what went wrong."""
    lines = [
        f"{column}: {'; '.join(sorted({row[column] for row in rows if row.get(column)}))}  "
        for column in ("gpu", "versions", "dtype", "commit", "date")
    ]
    lines += [
        "",
        "One user with n events and m candidates; D 512, 4 heads of 128, 5 layers. Cells: median device time in ms, of",
        "the fastest micro-batch b where there are several; in brackets the whole call, from host arrays to host",
        f"arrays. One at a time is m forwards of one candidate, beyond {ALONE_SAMPLE} extrapolated from that many. The",
        "fastest peer is that of the packed forward at the same n and m. Warm L2 cache; embedding lookups are inside.",
        "Each pass is one CUDA graph, except in the columns and lines that say no graph. Cached times with graphs",
        "include the copy of the user's keys and values to where the graph reads them.",
        "",
        *table_lines(rows),
        "",
        "Peers, median device time in ms:",
        "",
        *peer_lines(rows),
    ]
    problems = list(problem_lines(rows))
    return "\n".join(lines + (["", "Without a time:", "", *problems] if problems else [])) + "\n"


def _series(rows: Sequence[Row], n: int, column: str) -> dict[str, list[tuple[float, float]]]:
    """Points by name: every backend and mode, each of our micro-batches apart."""
    series: dict[str, list[tuple[float, float]]] = {}
    order = {name: index for index, name in enumerate(BACKENDS)}
    for row in sorted(rows, key=lambda row: (order[row["backend"]], MODES.index(row["mode"]), int(row["micro_batch"]))):
        if int(row["n"]) == n and row["status"] == "ok" and row.get(column) and float(row[column]) > 0:
            split = f" b={row['micro_batch']}" if int(row["micro_batch"]) else ""
            name = f"{row['backend']} {row['mode']}{split}"
            series.setdefault(name, []).append((float(row["m"]), float(row[column])))
    return {name: points for name, points in series.items() if points}


def plot(rows: Sequence[Row]) -> str:
    """SVG: for each history length, device time and memory over the number of candidates, both logarithmic."""
    body: list[str] = []
    top, width = float(MARGIN), 2 * (PANEL[0] + GAP) + 330
    for n in sorted({int(row["n"]) for row in rows}):
        colours: dict[str, str] = {}
        panels = (("median_ms", "device time", "ms"), ("used_mib", "device memory", "MiB"))
        for index, (column, title, unit) in enumerate(panels):
            series = _series(rows, n, column)
            if not series:
                continue
            points = [point for points in series.values() for point in points]
            panel = Panel(MARGIN + index * (PANEL[0] + GAP), top, points)
            body += panel.frame(f"{title}, n = {n}", unit, "candidates m")
            for name, points in series.items():
                colour = colours.setdefault(name, COLOURS[len(colours) % len(COLOURS)])
                body.append(panel.line(points, colour))
        body += legend(MARGIN + 2 * (PANEL[0] + GAP) - 60, top + 10, colours)
        top += max(PANEL[1] + GAP, 15 * len(colours) + 40)
    return drawing(width, top, body)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--into", type=Path, metavar="FILE", help="also put the table between this file's marks")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="also draw cost and memory over candidates")
    arguments = parser.parse_args(argv)
    rows = read_rows(arguments.csv)
    if not rows:
        print(f"error: {arguments.csv} has no rows; measure first", file=sys.stderr)
        return 1
    text = table_text(rows)
    if arguments.into is not None:
        put_between(arguments.into, BEGIN, END, text)
    if arguments.svg is not None:
        arguments.svg.write_text(plot(rows), encoding="utf-8")
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
