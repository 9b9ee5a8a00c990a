"""Rows of the M-FALCON benchmark: their identity, their reference, the parts a run writes and the CSV made from them.

NumPy and the standard library alone: used by both Pythons of the GPU machine and by none of its packages.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_plugin import commit_of, gpu_name, read_rows, today, write_rows
from m_falcon_workload import ALONE_SAMPLE, CANDIDATE_COUNTS, HISTORY_LENGTHS, MICRO_BATCHES
from numpy.typing import NDArray

RESULTS = Path(__file__).parent / "results" / "m_falcon.csv"
COLUMNS = (
    "backend",
    "mode",
    "n",
    "m",
    "micro_batch",
    "dtype",
    "status",
    "median_ms",
    "p90_ms",
    "cv",
    "repeats",
    "call_median_ms",
    "call_p90_ms",
    "candidates_per_s",
    "call_candidates_per_s",
    "peak_mib",
    "used_mib",
    "max_err",
    "err_bound",
    "note",
    "gpu",
    "versions",
    "commit",
    "date",
    "command",
)
ALONE, PACKED, COLD, WARM = "one_at_a_time", "packed", "cached_cold", "cached_warm"
MODES = (ALONE, PACKED, COLD, WARM)
#: Modes of each peer, most telling first.
PEERS: dict[str, tuple[str, ...]] = {
    "torch_eager": (PACKED, ALONE),
    "meta_triton": (PACKED, ALONE),
    "meta_triton_graph": (PACKED, ALONE),
    "meta_triton_cached": (WARM, COLD),
    "meta_compiled_graph": (PACKED, ALONE),
}
#: Events and candidates that are measured first, so that a run that is cut off has them.
FIRST = ((4096, 256), (4096, 1024))
ENGINES = "hstu_compile"
#: The same engines, every kernel launched by itself.
NO_GRAPH = "hstu_compile_no_graph"
OURS = (ENGINES, NO_GRAPH)
BACKENDS = (*OURS, *PEERS)
_MODES_OF: dict[str, tuple[str, ...]] = {ENGINES: MODES, NO_GRAPH: (PACKED, WARM), **PEERS}
#: A logit may be as wrong as twice plain PyTorch in the same type, but never by a twentieth of the logits' spread.
EAGER_FACTOR, LARGEST_ERROR = 2.0, 0.05

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, order=True)
class Case:
    """What one row measures. `micro_batch` is 0 where nothing is split."""

    backend: str
    mode: str
    n: int
    m: int
    micro_batch: int = 0

    @property
    def part_name(self) -> str:
        """File of its row."""
        return f"{self.backend}-{self.mode}-n{self.n}-m{self.m}-b{self.micro_batch}.json"

    @property
    def sample(self) -> int:
        """Candidates that are forwarded alone to measure `one_at_a_time`."""
        return min(self.m, ALONE_SAMPLE)

    @property
    def measured(self) -> Case:
        """The case whose measurement this one's row is made from: itself, unless it is extrapolated."""
        return dataclasses.replace(self, m=self.sample) if self.mode == ALONE else self


def cases_of(
    backend: str,
    lengths: Sequence[int] = HISTORY_LENGTHS,
    counts: Sequence[int] = CANDIDATE_COUNTS,
    micro_batches: Sequence[int] = MICRO_BATCHES,
) -> Iterator[Case]:
    """Every case of a backend, by `turn`; of the micro-batches that m does not fill, the smallest.

    Without graphs there is one micro-batch for each m, the smallest that holds it, or else the largest.
    """
    smallest = min(micro_batches)
    for n, m in sorted(((n, m) for n in lengths for m in counts), key=lambda shape: turn(*shape)):
        for mode in _MODES_OF[backend]:
            if backend == ENGINES and mode in (COLD, WARM):
                yield from (Case(backend, mode, n, m, b) for b in sorted(micro_batches) if b <= max(m, smallest))
            elif backend == NO_GRAPH and mode == WARM:
                fitting = min((b for b in micro_batches if b >= m), default=max(micro_batches))
                yield Case(backend, mode, n, m, fitting)
            else:
                yield Case(backend, mode, n, m)


def turn(n: int, m: int) -> tuple[int, bool, int, int]:
    """Sorts by when a request is measured: `FIRST`, the others with their history, the other histories."""
    place = FIRST.index((n, m)) if (n, m) in FIRST else len(FIRST)
    return place, n != FIRST[0][0], n, m


@dataclasses.dataclass(frozen=True)
class Reference:
    """float32 logits of every request with one history, and what counts as agreement with them.

    Attributes:
        logits: [m] of the request with m candidates, by m.
        alone: [sample] of the first candidates, each the only one of its request: the divisor N differs.
        spread: standard deviation of the logits of the longest request: the unit of every error.
        eager_error: largest error of plain PyTorch in the half type, over all of these.
    """

    logits: dict[int, NDArray[Any]]
    alone: NDArray[Any]
    spread: float
    eager_error: float

    @property
    def bound(self) -> float:
        """Largest error of a result that counts as right."""
        return min(EAGER_FACTOR * self.eager_error, LARGEST_ERROR)

    def error(self, actual: NDArray[Any], expected: NDArray[Any]) -> float:
        """Largest difference over the spread; infinite for another shape or a value that is not finite."""
        if actual.shape != expected.shape or not np.isfinite(actual).all():
            return float("inf")
        difference = np.abs(actual.astype(np.float64) - expected.astype(np.float64))
        return float(difference.max(initial=0.0)) / self.spread

    def judged(self, case: Case, actual: NDArray[Any]) -> Row:
        """max_err, err_bound, and status "wrong result" where the error is beyond the bound."""
        expected = self.alone[: case.sample] if case.mode == ALONE else self.logits[case.m]
        error = self.error(actual, expected)
        row: Row = {"max_err": error, "err_bound": self.bound}
        return row if error <= self.bound else row | {"status": "wrong result"}

    def save(self, path: Path) -> None:
        """Write it for the other processes."""
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = np.array([self.spread, self.eager_error])
        np.savez(path, alone=self.alone, facts=facts, **{f"m{m}": logits for m, logits in self.logits.items()})

    @classmethod
    def load(cls, path: Path) -> Reference:
        """Read what `save` wrote."""
        with np.load(path) as stored:
            logits = {int(name[1:]): stored[name] for name in stored.files if name[0] == "m"}
            spread, eager_error = map(float, stored["facts"])
            return cls(logits, stored["alone"], spread, eager_error)


def reference_path(parts: Path, n: int, dtype: str) -> Path:
    """Where the reference of one history lies."""
    return parts / "references" / f"n{n}-{dtype}.npz"


def finished(case: Case, measured: Row) -> Row:
    """The row of a case from the row that `case.measured` gave: extrapolated, with candidates per second."""
    row = extrapolated(case, measured)
    rates = {"candidates_per_s": "median_ms", "call_candidates_per_s": "call_median_ms"}
    return row | {rate: 1e3 * case.m / row[time] for rate, time in rates.items() if time in row}


def extrapolated(case: Case, timing: Row) -> Row:
    """Times of m candidates one at a time, from those of `sample` of them measured one after the other."""
    if case.measured == case:
        return timing
    times = {name: value * case.m / case.sample for name, value in timing.items() if name.endswith("_ms")}
    note = f"extrapolated: {case.sample} forwards of one candidate, x {case.m}/{case.sample}"
    return timing | times | {"note": "; ".join(filter(None, [note, timing.get("note", "")]))}


def write_part(parts: Path, case: Case, row: Row, command: str) -> None:
    """One JSON file per row, with where it comes from."""
    facts = {**dataclasses.asdict(case), "gpu": gpu_name(), "commit": commit_of(), "date": today(), "command": command}
    (parts / case.part_name).write_text(json.dumps(facts | {"status": "ok"} | row) + "\n", encoding="utf-8")


def show_part(parts: Path, case: Case, failed: Row, command: str) -> None:
    """Print one row; where its process left none, write what is known instead: the reason, as its status."""
    path = parts / case.part_name
    if not path.exists():
        write_part(parts, case, failed, command)
    row = json.loads(path.read_text(encoding="utf-8"))
    times = [f"{name} {row[name]:.3f}" for name in ("median_ms", "call_median_ms") if name in row]
    print(f"{path.stem}: {row['status']} {', '.join(times)}".rstrip(), flush=True)


def _key(row: Row) -> tuple[Case, str]:
    case = Case(row["backend"], row["mode"], int(row["n"]), int(row["m"]), int(row["micro_batch"]))
    return case, row["dtype"]


def merge(parts: Path, target: Path) -> int:
    """All parts into the CSV; a part replaces the row of its case and type, rows that the parts lack stay."""
    fresh = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(parts.rglob("*-n*-m*-b*.json"))]
    if not fresh:
        print(f"error: {parts} holds no parts; measure first, with --parts", file=sys.stderr)
        return 1
    rows = {_key(row): row for row in [*read_rows(target), *fresh]}

    def order(key: tuple[Case, str]) -> tuple[Any, ...]:
        case, dtype = key
        return case.n, BACKENDS.index(case.backend), dtype, MODES.index(case.mode), case.m, case.micro_batch

    write_rows(target, COLUMNS, [rows[key] for key in sorted(rows, key=order)])
    print(f"{target}: {len(rows)} rows, {len(fresh)} of them new")
    return 0
