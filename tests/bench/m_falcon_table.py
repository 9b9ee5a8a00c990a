"""The M-FALCON benchmark's CSV as a Markdown table with ratios, and as a plot of cost and memory over candidates.

  m_falcon_table.py [--csv FILE] [--into README.md] [--svg FILE]

Ratios are of device times on the same GPU: above 1, ours is faster. Standard library alone.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

if str(Path(__file__).parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parent))

from bench_plugin import put_between, read_rows
from m_falcon_rows import ALONE, BACKENDS, COLD, ENGINES, MODES, PACKED, PEERS, RESULTS, WARM
from m_falcon_workload import ALONE_SAMPLE

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
    heads = ["n", "m", *ours, "alone / packed", "packed / warm", "fastest peer", "peer / packed", "peer / warm"]
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---|" * len(heads)
    for n, m in sorted({(int(row["n"]), int(row["m"])) for row in rows}):
        alone, packed = found(ENGINES, ALONE, n, m), found(ENGINES, PACKED, n, m)
        cold, warm = found(ENGINES, COLD, n, m), found(ENGINES, WARM, n, m)
        peer = fastest_peer(found, n, m)
        name = "-" if peer is None else f"{_time(peer)} {peer['backend']} {peer['dtype']}"
        cells = [str(n), str(m), _time(alone), _time(packed, call=True), _time(cold, call=True), _time(warm, call=True)]
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
        "",
        *table_lines(rows),
        "",
        "Peers, median device time in ms:",
        "",
        *peer_lines(rows),
    ]
    problems = list(problem_lines(rows))
    return "\n".join(lines + (["", "Without a time:", "", *problems] if problems else [])) + "\n"


_PANEL, _MARGIN, _GAP = (360, 240), 60, 90
_COLOURS = ("#1b6ca8", "#c8553d", "#2a9d5c", "#8a5a9e", "#8c8c2f", "#555555", "#0f8b8d", "#b5446e")


class _Panel:
    """One plot with two logarithmic axes, at a place of the drawing."""

    def __init__(self, left: float, top: float, points: Sequence[tuple[float, float]]) -> None:
        self._left, self._top = left, top
        (width, height) = _PANEL
        xs, ys = [x for x, _ in points], [y for _, y in points]
        self._x = _scale(xs, left, left + width)
        self._y = _scale(ys, top + height, top)
        self._ticks = {axis: _powers(min(values), max(values)) for axis, values in (("x", xs), ("y", ys))}

    def frame(self, title: str, unit: str) -> Iterator[str]:
        """Border, ticks and labels."""
        width, height = _PANEL
        left, top = self._left, self._top
        yield f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#999"/>'
        yield _text(left, top - 12, title, size=13)
        yield _text(left + width / 2, top + height + 36, "candidates m", anchor="middle")
        yield _text(left - 46, top - 12, unit)
        for value in self._ticks["x"]:
            yield _text(self._x(value), top + height + 16, f"{value:g}", anchor="middle")
        for value in self._ticks["y"]:
            y = self._y(value)
            yield f'<line x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#eee"/>'
            yield _text(left - 6, y + 4, f"{value:g}", anchor="end")

    def line(self, points: Sequence[tuple[float, float]], colour: str) -> str:
        """One series."""
        shown = " ".join(f"{self._x(x):.1f},{self._y(y):.1f}" for x, y in sorted(points))
        return f'<polyline points="{shown}" fill="none" stroke="{colour}" stroke-width="1.8"/>'


def _scale(values: Sequence[float], start: float, end: float) -> Callable[[float], float]:
    low, high = math.log(min(values)) - 0.1, math.log(max(values)) + 0.1
    return lambda value: start + (end - start) * (math.log(value) - low) / (high - low)


def _powers(low: float, high: float) -> list[float]:
    inside = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    kept = [value for value in inside if low * 0.9 <= value <= high * 1.1]
    return kept if len(kept) > 1 else sorted({low, high})


def _text(x: float, y: float, content: str, *, anchor: str = "start", size: int = 11) -> str:
    escaped = content.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="#333">{escaped}</text>'


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
    top, width = float(_MARGIN), 2 * (_PANEL[0] + _GAP) + 330
    for n in sorted({int(row["n"]) for row in rows}):
        legend: dict[str, str] = {}
        panels = (("median_ms", "device time", "ms"), ("used_mib", "device memory", "MiB"))
        for index, (column, title, unit) in enumerate(panels):
            series = _series(rows, n, column)
            if not series:
                continue
            panel = _Panel(
                _MARGIN + index * (_PANEL[0] + _GAP), top, [point for points in series.values() for point in points]
            )
            body += panel.frame(f"{title}, n = {n}", unit)
            for name, points in series.items():
                colour = legend.setdefault(name, _COLOURS[len(legend) % len(_COLOURS)])
                body.append(panel.line(points, colour))
        for line, (name, colour) in enumerate(legend.items()):
            x, y = _MARGIN + 2 * (_PANEL[0] + _GAP) - 60, top + 10 + 15 * line
            body.append(f'<line x1="{x}" x2="{x + 18}" y1="{y - 4}" y2="{y - 4}" stroke="{colour}" stroke-width="3"/>')
            body.append(_text(x + 24, y, name))
        top += max(_PANEL[1] + _GAP, 15 * len(legend) + 40)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{top:.0f}" font-family="sans-serif">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *body, "</svg>"]) + "\n"


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
