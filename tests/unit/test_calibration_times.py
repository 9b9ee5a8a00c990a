"""The times of quantised engines that docs/calibration.md shows are those that are kept."""

from __future__ import annotations

import csv

from tests.bench.quality_table import PAGE, REPOSITORY

BEGIN, END = "<!-- times: begin -->", "<!-- times: end -->"


def test_the_page_shows_the_times_that_are_kept():
    path = REPOSITORY / "tests" / "bench" / "results" / "calibration.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = {(row["kind"], row["tokens"]): row for row in csv.DictReader(file) if row["backend"] == "tensorrt-rtx"}
    assert {row["status"] for row in rows.values()} == {"ok"}
    wanted = []
    for tokens in dict.fromkeys(tokens for _, tokens in rows):
        half, int8, fp8 = (float(rows[kind, tokens]["median_ms"]) for kind in ("fp16", "int8", "fp8"))
        ratios = f"{int8 / half:.2f} | {fp8 / half:.2f}"
        wanted.append(f"| {int(tokens):,} | {half:.2f} | {int8:.2f} | {fp8:.2f} | {ratios} |")
    shown = PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip().splitlines()
    assert len(wanted) == 7
    assert shown[2:] == wanted
