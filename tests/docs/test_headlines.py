"""README shows the times that the kept benchmarks have, and no others."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "bench"))

import headline_table  # noqa: E402

ROW = {"status": "ok", "p90_ms": "1", "fill_ms": "", "gpu": "G", "commit": "c"}


def row(case: str, backend: str, ms: str, **others: str) -> dict[str, str]:
    return {**ROW, "case": case, "backend": backend, "median_ms": ms, "p90_ms": ms, **others}


def test_readme_has_what_the_kept_rows_give():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    [shown] = re.findall(rf"{headline_table.BEGIN}\n(.*?){headline_table.END}", text, re.DOTALL)
    assert shown == headline_table.current_text(), "run: python tests/bench/headline_table.py --into README.md"


def test_a_slower_kernel_of_ours_is_shown_as_slower():
    case = next(iter(headline_table.ATTENTION))
    cases = {
        case: {
            "ours": row(case, "ours", "0.4"),
            "meta_cutlass": row(case, "meta_cutlass", "0.3"),
            "nvidia_cutlass": row(case, "nvidia_cutlass", "0.2"),
        }
    }
    line = list(headline_table.attention_lines(cases))[2]
    assert "| 0.400 ms | 0.200 ms, NVIDIA's CUTLASS | 0.50x | not measured |  |" in line


def test_what_was_not_measured_has_no_ratio():
    lines = [*headline_table.attention_lines({}), *headline_table.model_lines({}), *headline_table.falcon_lines([])]
    cells = [
        line
        for line in lines
        if not line.startswith(("| one attention", "| whole", "| one user, 4096 events, fp16", "|--"))
    ]
    assert len(cells) == len(headline_table.ATTENTION) + len(headline_table.MODELS) + len(
        headline_table.FALCON_CANDIDATES
    )
    for line in cells:
        assert "not measured" in line
        assert not re.search(r"\dx|\d ms", line)


@pytest.mark.parametrize(("triton", "is_said"), [("c", False), ("d", True)])
def test_times_of_another_run_are_said_to_be(triton: str, is_said: bool):
    case = next(iter(headline_table.ATTENTION))
    rows = [row(case, "ours", "0.4"), row(case, "meta_triton", "0.8", commit=triton)]
    assert ("of another run than ours" in headline_table.text_of(rows, [], [])) == is_said
