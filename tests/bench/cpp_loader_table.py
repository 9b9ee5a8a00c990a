"""The C++ loader's CSV, and its table: what a GPU run measured with and without CUDA graphs.

  cpp_loader_table.py --merge FOLDER [--csv FILE]      rows.csv and run.json of the step cpp-loader into the CSV
  cpp_loader_table.py [--csv FILE] [--into README.md]  the Markdown table, also between FILE's marks

Rows that FOLDER lacks stay in the CSV as they are. Standard library alone.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

if str(Path(__file__).parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parent))

from bench_plugin import put_between, read_rows, write_rows

RESULTS = Path(__file__).parent / "results" / "cpp_loader.csv"
BEGIN, END = "<!-- cpp-loader benchmark: begin -->", "<!-- cpp-loader benchmark: end -->"
#: As hstu_score writes them, then what only the run knows.
MEASURED = (
    *("case", "backend", "way", "streams", "cuda_graphs", "status", "requests", "p50_ms", "p90_ms", "p99_ms", "cv"),
    *("device_p50_ms", "device_cv", "requests_per_s", "sequences_per_s", "candidates_per_s", "peak_mib"),
    *("max_err", "err_bound"),
)
COLUMNS = (*MEASURED, "gpu", "commit", "date", "command")
_KEY = ("case", "backend", "way", "streams", "cuda_graphs")

Row = dict[str, Any]


def key_of(row: Row) -> tuple[str, ...]:
    """What a row is about; a later measurement of the same replaces it."""
    return tuple(str(row[name]) for name in _KEY)


def merge(folder: Path, target: Path) -> int:
    """The rows of a run, with its GPU, commit and date, into the CSV; 1 if there are none."""
    fresh = []
    for file in sorted(folder.rglob("rows.csv")):
        run = json.loads(file.with_name("run.json").read_text(encoding="utf-8"))
        for row in read_rows(file):
            bundle, graph = row["case"].partition(":")[0].split()
            words = "--ranking" if graph == "ranking" else f"--graph {graph}"
            command = f"hstu_score {bundle} {words} --cuda-graphs {row['cuda_graphs']} --iterations {row['requests']}"
            fresh.append({**row, "gpu": run["gpu"], "commit": run["commit"], "date": run["date"], "command": command})
    if not fresh:
        print(f"error: {folder} holds no rows.csv with a row", file=sys.stderr)
        return 1
    rows = {key_of(row): row for row in [*read_rows(target), *fresh]}
    write_rows(target, COLUMNS, sorted(rows.values(), key=key_of))
    print(f"{target}: {len(rows)} rows, {len(fresh)} of them new")
    return 0


def _milliseconds(row: Row | None, name: str) -> str:
    return "not measured" if row is None else f"{float(row[name]):.3f}"


def table_lines(rows: Iterable[Row]) -> Iterator[str]:
    """One line per case and way: percentiles of the whole call, and of the device, with graphs and without."""
    cases: dict[tuple[str, str, str], dict[bool, Row]] = {}
    for row in rows:
        if row["streams"] == "1":
            cases.setdefault((row["case"], row["way"], row["backend"]), {})[int(row["cuda_graphs"]) > 0] = row
    heads = ["case", "way", "p50", "p90", "p99", "device p50", "requests/s", "p50, no graph", "device p50, no graph"]
    heads += ["plain / graph", "peak MiB", "max err", "allowed", "status"]
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---|" * len(heads)
    for (case, way, _), found in sorted(cases.items()):
        graph, plain = found.get(True), found.get(False)
        shown = graph or plain
        assert shown is not None  # a case is there because it has a row
        cells = [case, way, *(_milliseconds(graph, name) for name in ("p50_ms", "p90_ms", "p99_ms", "device_p50_ms"))]
        cells += ["" if graph is None else f"{float(graph['requests_per_s']):.0f}"]
        cells += [_milliseconds(plain, "p50_ms"), _milliseconds(plain, "device_p50_ms")]
        both = graph is not None and plain is not None and float(graph["p50_ms"]) > 0
        cells += [f"{float(plain['p50_ms']) / float(graph['p50_ms']):.2f}x" if both and plain and graph else ""]
        cells += [f"{float(shown['peak_mib']):.0f}"]
        cells += [f"{float(shown[name]):.2g}" if shown[name] else "" for name in ("max_err", "err_bound")]
        states = dict.fromkeys(_short(row["status"]) for row in (graph, plain) if row is not None)
        yield "| " + " | ".join([*cells, "; ".join(states)]) + " |"


def _short(status: str) -> str:
    """A status with the numbers in it to two digits."""
    return re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.2g}", status)


def table_text(rows: Sequence[Row]) -> str:
    """The table, with the conditions it was measured under."""
    facts = [", ".join(sorted({row[name] for row in rows})) for name in ("gpu", "backend", "commit", "date")]
    lines = [
        f"GPU {facts[0]}; {facts[1]}; commit {facts[2]}; {facts[3]}. One stream, warm. Times in ms: the whole call, "
        "from feeds in host memory to answers in host memory, and the device's part without copies. `unsteady` marks "
        "rows whose coefficient of variation is above 5 %; their percentiles say little. Made from "
        f"`tests/bench/results/{RESULTS.name}`, which has the command of each row.",
        "",
        *table_lines(rows),
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--merge", type=Path, metavar="FOLDER")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--into", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    if arguments.merge is not None:
        return merge(arguments.merge, arguments.csv)
    rows = read_rows(arguments.csv)
    if not rows:
        print(f"error: {arguments.csv} has no rows; merge a run first", file=sys.stderr)
        return 1
    text = table_text(rows)
    if arguments.into is not None:
        put_between(arguments.into, BEGIN, END, text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
