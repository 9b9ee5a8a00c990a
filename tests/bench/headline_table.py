"""The few measured times that README shows, from the benchmarks' CSVs.

  headline_table.py [--into README.md]

Every time is a median on the GPU; above a speed-up of 1, ours is faster. Where rows are missing, the line says so.
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

import attention_grid
import attention_table
import bench_attention
import end_to_end_rows
import end_to_end_table
import m_falcon_rows
import m_falcon_table
from bench_plugin import put_between, read_rows

BEGIN, END = "<!-- headlines: begin -->", "<!-- headlines: end -->"
README = Path(__file__).resolve().parents[2] / "README.md"

#: Short, long and wide, ragged, few users, and candidates beside a cache; met and missed bars alike.
ATTENTION = {
    "bf16_D64_N4096": "head dim 64, 4096 events",
    "bf16_D128_N256": "head dim 128, 256 events",
    "bf16_D128_N1024": "head dim 128, 1024 events",
    "bf16_D128_N8192": "head dim 128, 8192 events",
    "bf16_D256_N4096": "head dim 256, 4096 events",
    "bf16_D128_uniform8192_B32_t256": "32 users of 5 to 100 % of 8192 events, 256 candidates each",
    "bf16_D128_B1_N4096_t512": "one user, 4096 events, 512 candidates",
    "bf16_D128_delta_B8_k16384_t256": "8 users, 256 candidates against 16,384 cached events",
}
PEER_NAMES = {"meta_cutlass": "Meta's CUTLASS", "nvidia_cutlass": "NVIDIA's CUTLASS", "meta_triton": "Meta's Triton"}
MODELS = {
    "fp16_cached_B1_n4096_m256": "256 candidates against 4096 cached events, one user",
    "fp16_cached_B8_n4096_m256": "the same, 8 users",
    "fp16_B1_n1024_m256_pruned": "1024 events and 256 candidates, one user",
    "fp16_B1_n4096_m512_pruned": "4096 events and 512 candidates, one user",
    "fp16_B8_n2048_m256_pruned": "2048 events and 256 candidates, 8 users",
    "fp16_B16_n4096_m256_pruned": "4096 events and 256 candidates, 16 users",
}
FALCON_EVENTS, FALCON_CANDIDATES = 4096, (256, 1024)

Row = dict[str, Any]
Cases = Mapping[str, Mapping[str, Row]]


def attention_lines(cases: Cases) -> Iterator[str]:
    """One attention: ours, the fastest kernel of others, and Meta's Triton kernel, which its PyTorch models call."""
    yield "| one attention, bf16, 4 heads | ours | fastest of others | speed-up | Meta's Triton kernel | speed-up |"
    yield "|---|---|---|---|---|---|"
    for case, text in ATTENTION.items():
        found = cases.get(case, {})
        own = attention_table.milliseconds(found.get(attention_grid.OURS))
        times = {name: attention_table.milliseconds(found.get(name)) for name in PEER_NAMES}
        best = min((time, name) for name, time in times.items() if time is not None) if any(times.values()) else None
        shown = f"{best[0]:.3f} ms, {PEER_NAMES[best[1]]}" if best else "not measured"
        triton = times["meta_triton"]
        yield (
            f"| {text} | {_milliseconds(own)} | {shown} | {_speed(best and best[0], own)} "
            f"| {_milliseconds(triton)} | {_speed(triton, own)} |"
        )


def model_lines(cases: Cases) -> Iterator[str]:
    """Whole models: ours and the fastest PyTorch."""
    yield "| whole ranking model, fp16 | ours | fastest PyTorch | speed-up |"
    yield "|---|---|---|---|"
    for case, text in MODELS.items():
        found = cases.get(case, {})
        own = attention_table.milliseconds(found.get(end_to_end_table.BEST))
        best = end_to_end_table.fastest(found, end_to_end_table.BASELINES)
        yield f"| {text} | {_milliseconds(own)} | {_milliseconds(best and best[1])} | {_speed(best and best[1], own)} |"


def falcon_lines(rows: Sequence[Row]) -> Iterator[str]:
    """What M-FALCON and its cache save, on TensorRT 8.5 with the plugin."""
    found = m_falcon_table.finder(rows)
    yield "| one user, 4096 events, fp16 | one forward each (from 8) | one forward | against cached events |"
    yield "|---|---|---|---|"
    for m in FALCON_CANDIDATES:
        times = [
            None if row is None else float(row["median_ms"])
            for mode in (m_falcon_rows.ALONE, m_falcon_rows.PACKED, m_falcon_rows.WARM)
            for row in [found(m_falcon_rows.ENGINES, mode, FALCON_EVENTS, m)]
        ]
        yield f"| {m} candidates | {' | '.join(_milliseconds(time) for time in times)} |"


def _milliseconds(time: float | None) -> str:
    return "not measured" if time is None else f"{time:,.0f} ms" if time >= 100 else f"{time:.3f} ms"


def _speed(theirs: float | None, ours: float | None) -> str:
    return "" if theirs is None or ours is None else f"{theirs / ours:.2f}x"


def text_of(attention: Sequence[Row], models: Sequence[Row], falcon: Sequence[Row]) -> str:
    """Markdown, from the rows of the three benchmarks."""
    cases = attention_table.rows_by_case(attention)
    gpus = sorted({row["gpu"].split(",")[0] for row in (*attention, *models, *falcon) if row.get("gpu")})
    own = {row["commit"] for row in attention if row["backend"] == attention_grid.OURS}
    triton = {row["commit"] for row in attention if row["backend"] == "meta_triton"}
    lines = [
        f"Medians on one {', '.join(gpus)}, the host's work not included, after every answer was compared with",
        "float64 or float32. About 65,536 tokens where no number of users is said. PyTorch is torch.compile in a CUDA",
        "graph around the fastest of those attention kernels.",
        *(["Times of Meta's Triton kernel are of another run than ours.", ""] if not own & triton else [""]),
        *attention_lines(cases),
        "",
        *model_lines(attention_table.rows_by_case(models)),
        "",
        *falcon_lines(falcon),
    ]
    return "\n".join(lines) + "\n"


def current_text() -> str:
    """What the kept CSVs give."""
    return text_of(
        read_rows(bench_attention.RESULTS), read_rows(end_to_end_rows.RESULTS), read_rows(m_falcon_rows.RESULTS)
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, metavar="README.md", help="also put the text between this file's marks")
    arguments = parser.parse_args(argv)
    text = current_text()
    if arguments.into is not None:
        put_between(arguments.into, BEGIN, END, text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
