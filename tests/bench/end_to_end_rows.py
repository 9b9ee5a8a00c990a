"""Rows of the end-to-end benchmark: backends, columns, the parts that a run writes and the CSV made from them.

NumPy and the standard library alone: used by both Pythons of the GPU machine and by none of its packages.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_plugin import commit_of, gpu_name, read_rows, today, write_rows
from end_to_end_workload import CEILING_TFLOPS, AnyCase, AnySizes, Case, flop_of
from numpy.typing import NDArray

RESULTS = Path(__file__).parent / "results" / "end_to_end.csv"
COLUMNS = (
    "case",
    "backend",
    "status",
    "median_ms",
    "p90_ms",
    "p99_ms",
    "cv",
    "repeats",
    "call_median_ms",
    "call_p90_ms",
    "tokens",
    "candidates_per_s",
    "gflop",
    "tflops",
    "ceiling_share",
    "gemm_tflops",
    "peak_mib",
    "max_err",
    "err_bound",
    "rms_err",
    "rms_bound",
    "build_s",
    "nodes",
    "form",
    "l2",
    "gpu",
    "clocks",
    "versions",
    "commit",
    "date",
    "command",
)
EAGER, COMPILE, MAX_AUTOTUNE, AOTI = "eager", "compile", "compile_max_autotune", "aoti"
RTX_FUSED, RTX_NATIVE, TRT85 = "ours_rtx_fused", "ours_rtx_native", "ours_trt85_plugin"
#: What takes part; each is measured as it is and in a CUDA graph.
PEERS = (EAGER, COMPILE, AOTI, MAX_AUTOTUNE)
OURS = (RTX_FUSED, RTX_NATIVE, TRT85)
FAMILIES = (*PEERS, *OURS)
GRAPH = "_graph"
#: TensorRT-RTX compiles kernels while it runs: a session of one engine records nothing.
_WITHOUT_GRAPH = (RTX_NATIVE,)
#: Not an answer that is timed: what the answers are compared with, and which attention the baselines take.
REFERENCE = "reference"

Row = dict[str, Any]


def backends_of(family: str) -> tuple[str, ...]:
    """Rows of a family."""
    return (family,) if family in _WITHOUT_GRAPH else (family, family + GRAPH)


BACKENDS = tuple(backend for family in FAMILIES for backend in backends_of(family))


def part_path(parts: Path, case: str, backend: str) -> Path:
    """File of one row."""
    return parts / f"{case}-{backend}.json"


@functools.cache
def _origin() -> tuple[str, str, str]:
    """GPU, commit and date: asked of other programs once, as each row would pay for it."""
    return gpu_name(), commit_of(), today()


def write_part(parts: Path, case: AnyCase, backend: str, row: Row, sizes: AnySizes) -> None:
    """One JSON file, in place as a whole or not at all, with what every row says and what follows from its times."""
    gpu, commit, date = _origin()
    family = backend.removesuffix(GRAPH)
    flop = flop_of(case, sizes)
    facts = {
        "case": case.name,
        "backend": backend,
        "tokens": case.tokens,
        "gflop": flop / 1e9,
        "gpu": gpu,
        "commit": commit,
        "date": date,
        "command": f"bench_end_to_end.py --parts DIR --cases {case.name} --backends {family}",
    }
    path = part_path(parts, case.name, backend)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(facts | row | rates_of(case, flop, row)) + "\n", encoding="utf-8")
    aside.replace(path)


def plan_path(parts: Path, case: AnyCase) -> Path:
    """Where a case's plan lies."""
    return parts / "plans" / f"{case.name}.json"


def keys_path(scratch: Path, case: Case) -> Path:
    """Where the keys and values of a cached case lie."""
    return scratch / f"keys-{case.name}.npz"


def save_keys(path: Path, bits: Mapping[str, NDArray[np.int16]]) -> None:
    """Write k_i and v_i [Lc, H, d] as the bits of their half type, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial.npz")
    np.savez(aside, **bits)  # type: ignore[arg-type]
    aside.replace(path)


def load_keys(path: Path, case: Case) -> dict[str, NDArray[Any]]:
    """Read them as a session takes them: float16, or uint16 for the bits of bfloat16."""
    with np.load(path) as stored:
        return {name: stored[name].view(np.uint16 if case.dtype == "bf16" else np.float16) for name in stored.files}


def rates_of(case: AnyCase, flop: float, row: Row) -> Row:
    """What follows from a row's time: tflops and ceiling_share, and candidates_per_s where there are candidates."""
    if "median_ms" not in row:
        return {}
    tflops = flop / row["median_ms"] / 1e9
    rates = {"tflops": tflops, "ceiling_share": tflops / CEILING_TFLOPS}
    if case.num_candidates:
        rates["candidates_per_s"] = 1e3 * case.num_candidates / row["median_ms"]
    return rates


def line_of(case: str, backend: str, row: Row) -> str:
    """A row for the log."""
    times = [f"{name} {row[name]:.4f}" for name in ("median_ms", "call_median_ms") if name in row]
    return f"{case} {backend}: {row['status']} {', '.join(times)}".rstrip()


def rows_below(folder: Path) -> Iterator[Row]:
    """Every row below a folder."""
    names = tuple(f"-{name}.json" for name in BACKENDS)
    for path in sorted(folder.rglob("*.json")):
        if path.name.endswith(names):
            yield json.loads(path.read_text(encoding="utf-8"))


def merge(parts: Path, target: Path, cases: Sequence[AnyCase]) -> int:
    """All parts into the CSV, in the order of cases and backends; a part replaces the row of its case and backend."""
    fresh = list(rows_below(parts))
    if not fresh:
        print(f"error: {parts} holds no parts; measure first, with --parts", file=sys.stderr)
        return 1
    rows = {(row["case"], row["backend"]): row for row in [*read_rows(target), *fresh]}
    order = {case.name: index for index, case in enumerate(cases)}
    if unknown := sorted({case for case, _ in rows} - order.keys()):
        print(f"error: no case is named {', '.join(unknown)}; measure again or remove them", file=sys.stderr)
        return 1
    ordered = sorted(rows, key=lambda key: (order[key[0]], BACKENDS.index(key[1])))
    write_rows(target, COLUMNS, [rows[key] for key in ordered])
    print(f"{target}: {len(rows)} rows, {len(fresh)} of them new")
    return 0


def pending_of(parts: Path, cases: Iterable[AnyCase], family: str) -> list[AnyCase]:
    """Cases of a family that lack a row."""
    return [
        case
        for case in cases
        if not all(part_path(parts, case.name, backend).exists() for backend in backends_of(family))
    ]
