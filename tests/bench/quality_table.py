"""The tables of docs/calibration.md from results/quantisation_quality.csv; not a test.

Run: python tests/bench/quality_table.py            (prints them)
     python tests/bench/quality_table.py --write    (puts them into docs/calibration.md)
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results" / "quantisation_quality.csv"
PAGE = REPOSITORY / "docs" / "calibration.md"
BEGIN, END = "<!-- quality: begin -->", "<!-- quality: end -->"

Row = Mapping[str, str]
TITLES = {
    "demo": "The demo's checkpoint, retrieval",
    "research": "Meta's research HSTU, retrieval",
    "dlrm": "Meta's DLRM-HSTU, ranking",
}
#: Column of the file, its heading, and how a change of it is shown.
RETRIEVAL = (("hr10", "HR@10"), ("ndcg10", "NDCG@10"))
RANKING = (("auc", "AUC"), ("ne", "NE"))


def load(path: Path = RESULTS) -> list[Row]:
    """The rows as they are stored."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def tables(rows: Sequence[Row]) -> str:
    """One table for each model that was measured."""
    parts = []
    for model, title in TITLES.items():
        own = [row for row in rows if row["model"] == model]
        if own:
            parts.append(f"**{title}** ({_origin(own[0])})\n\n{_table(own)}")
    return "\n\n".join(parts)


def _origin(row: Row) -> str:
    return (
        f"{row['requests']} users; {row['versions']}, {row['machine']}; commit {row['commit'][:7]}, {row['date']}; "
        f"checkpoint {row['checkpoint_sha256'][:8]}"
    )


def _table(rows: Sequence[Row]) -> str:
    """A line for each plan: the float32 model as it is, then changes against it."""
    metrics = RANKING if rows[0]["auc"] else RETRIEVAL
    reference = next(row for row in rows if row["kind"] == "none" and row["form"] == "eager fp32")
    names = [name for _, name in metrics]
    headings = [
        *("type", "observer", "recipe", "left in fp16"),
        *(f"{name}, eager fp32" for name in names),
        *(f"{name}, eager fp16" for name in names),
        *(f"{name}, ONNX Runtime" for name in names),
        *(["users gained, lost"] if metrics is RETRIEVAL else []),
        "scores",
    ]
    lines = [_line(headings), _line(["---"] * 4 + ["---:"] * (len(headings) - 4))]
    absolute = [f"{float(reference[column]):.4f}" for column, _ in metrics]
    lines.append(_line(["none", "", "", "", *absolute, *_changes(rows, "none", "", "", metrics)]))
    plans = list(dict.fromkeys((row["kind"], row["observer"], row["recipe"]) for row in rows if row["kind"] != "none"))
    for kind, observer, recipe in plans:
        own = [row for row in rows if (row["kind"], row["observer"], row["recipe"]) == (kind, observer, recipe)]
        if own[0]["form"] == "refused":
            lines.append(_line([kind, observer, recipe, "no mix is within the budget", *[""] * (len(headings) - 4)]))
            continue
        kept = own[0]["kept"].split()
        first = [_change(own[0], column) for column, _ in metrics]
        cells = [kind, observer, recipe, ", ".join(f"`{name}`" for name in kept) or "none", *first]
        lines.append(_line([*cells, *_changes(rows, kind, observer, recipe, metrics)]))
    return "\n".join(lines)


def _changes(
    rows: Sequence[Row], kind: str, observer: str, recipe: str, metrics: Sequence[tuple[str, str]]
) -> list[str]:
    """The cells of eager fp16 and of ONNX Runtime, and what belongs to the latter."""
    forms = {
        row["form"]: row for row in rows if (row["kind"], row["observer"], row["recipe"]) == (kind, observer, recipe)
    }
    half, graph = forms["eager fp16"], forms["onnxruntime"]
    cells = [_change(row, column) for row in (half, graph) for column, _ in metrics]
    moved = [f"{graph['gained']}, {graph['lost']}"] if metrics is RETRIEVAL else []
    return [*cells, *moved, f"{float(graph['scores']):.2%}"]


def _change(row: Row, column: str) -> str:
    """Absolute for rank metrics, in percent of the value for AUC and NE."""
    change = float(row[f"change_{column}"])
    return f"{change:+.3%}" if column in ("auc", "ne") else f"{change:+.4f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def page_with(text: str, page: str) -> str:
    """The page with other tables between the marks."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


def main() -> int:
    """Print the tables, or put them into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the tables of docs/calibration.md")
    arguments = parser.parse_args()
    text = tables(load())
    if arguments.write:
        PAGE.write_text(page_with(text, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
