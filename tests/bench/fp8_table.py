"""The tables of docs/fp8-attention.md: an e4m3 kernel's floors, time at best, error and ranking quality; not a test.

Floors and times are arithmetic over this file's constants and measured times of the 16-bit kernel (attention.csv,
bfloat16); errors are those of fp8_attention.py, quality that of fp8_quality.py.

  fp8_table.py [--into docs/fp8-attention.md]
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

if str(Path(__file__).parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parent))

from attention_table import milliseconds, rows_by_case
from bench_plugin import put_between, read_rows

from hstu_compile.kernel_timeline import SPAN

RESULTS = Path(__file__).resolve().parent / "results"
DIMS, LENGTHS = (64, 128, 256), (1024, 2048, 4096, 8192)

#: Of one SM and clock: operations of 16-bit products (e4m3: twice as many), special functions, bytes of shared memory.
_OPERATIONS, _SPECIAL, _SHARED_BYTES = 4096, 16, 128
_SMS, _HZ, _BYTES_PER_S = 132, 1.75e9, 3.35e12
#: What a large 16-bit product reaches, in operations a second; e4m3 is given twice that.
_REACHED = 786e12
#: Of the measured times.
_DTYPE = "bf16"
_TOKENS, _HEADS = 65_536, 4
#: Of a block: query rows, of which each warpgroup reads all keys and values of a step.
_ROWS, _WARPGROUPS = 128, 2
#: Of a head dim: keys of a step, and the share of the queries that lies in registers, with 16 bits and with 8.
_STEP = {64: (128, 1.0, 1.0), 128: (128, 1.0, 1.0), 256: (64, 0.25, 0.5)}
#: A prompt of 4096 events and 256 candidates for each of 16 users: 4 full layers and one whose queries are candidates.
_LAYERS_CASE = "fp16_B16_n4096_m256_pruned"
_LAYERS_TOKENS, _LAYERS = 69_648, 5


def line(cells: Iterable[object]) -> str:
    """One row of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def table(heads: Sequence[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """A Markdown table."""
    return [line(heads), line(["---"] * len(heads)), *(line(row) for row in rows)]


def tensor_clocks(dim: int, e4m3_products: int) -> float:
    """Of the tensor cores, for one score element: two products of 2 D operations."""
    return (2 - e4m3_products / 2) * 2 * dim / _OPERATIONS


def shared_clocks(dim: int, size: int, *, is_transposed: bool) -> float:
    """Of shared memory, for one score element: operands of the products, the copies, and a transposition of values."""
    keys, *held = _STEP[dim]
    tile = keys * dim * size
    queries = (1 - held[0 if size == 2 else 1]) * _ROWS * dim * size
    transposition = 2 * tile if is_transposed else 0
    return (2 * _WARPGROUPS * tile + queries + 2 * tile + transposition) / (_ROWS * keys) / _SHARED_BYTES


def floors() -> list[str]:
    """Clocks of an SM for a score element."""
    heads = ("clocks of an SM for a score element", *(f"D = {dim}" for dim in DIMS))
    rows = [
        ("tensor cores, 16-bit products", *(f"{tensor_clocks(dim, 0):.4f}" for dim in DIMS)),
        ("tensor cores, e4m3 scores, 16-bit sums", *(f"{tensor_clocks(dim, 1):.4f}" for dim in DIMS)),
        ("tensor cores, e4m3 products", *(f"{tensor_clocks(dim, 2):.4f}" for dim in DIMS)),
        ("special functions, one tanh", *[f"{1 / _SPECIAL:.4f}"] * 3),
        ("shared memory, 16-bit", *(f"{shared_clocks(dim, 2, is_transposed=False):.4f}" for dim in DIMS)),
        (
            "shared memory, e4m3, values transposed before",
            *(f"{shared_clocks(dim, 1, is_transposed=False):.4f}" for dim in DIMS),
        ),
        (
            "shared memory, e4m3, values transposed in the kernel",
            *(f"{shared_clocks(dim, 1, is_transposed=True):.4f}" for dim in DIMS),
        ),
    ]
    return table(heads, rows)


def pass_ms(tokens: int, dim: int) -> float:
    """Least time to read q, k and v with 16 bits and to write them as e4m3."""
    return tokens * _HEADS * dim * 3 * (2 + 1) / _BYTES_PER_S * 1e3


def pairs(tokens: int, length: int) -> float:
    """Score elements of causal sequences."""
    return tokens * _HEADS * (length + 1) / 2


def kernel_ms(times: Mapping[str, float | None], dim: int, length: int) -> float | None:
    """What an e4m3 kernel may take.

    Its products take the clocks that those of half the head dim do with 16 bits, and its special functions what they
    do there, so at 128 and 256 the measured time of half the head dim. At 64 the measured time without half of the
    products' clocks, as if nothing had run beside them.
    """
    if dim > DIMS[0]:
        return times.get(f"{_DTYPE}_D{dim // 2}_N{length}")
    own = times.get(f"{_DTYPE}_D{dim}_N{length}")
    saved = pairs(_TOKENS, length) * tensor_clocks(dim, 2) / (_SMS * _HZ) * 1e3
    return None if own is None else own - saved


def time_rows(times: Mapping[str, float | None]) -> list[str]:
    """The operator at best, for 65,536 tokens."""
    rows = []
    for dim in DIMS:
        for length in LENGTHS:
            own, kernel = times.get(f"{_DTYPE}_D{dim}_N{length}"), kernel_ms(times, dim, length)
            if own is None or kernel is None:
                rows.append((dim, length, *["not measured"] * 5))
                continue
            ahead = pass_ms(_TOKENS, dim)
            numbers = (own, kernel, ahead)
            ratios = (own / kernel, own / (kernel + ahead))
            rows.append((dim, length, *(f"{x:.3f}" for x in numbers), *(f"{x:.2f}" for x in ratios)))
    heads = (
        "D",
        "N",
        "16-bit, ms",
        "e4m3 kernel at best, ms",
        "pass before it, ms",
        "speed, kernel alone",
        "with the pass",
    )
    return table(heads, rows)


def model_text(times: Mapping[str, float | None]) -> str:
    """What it would be of a whole model."""
    rows = read_rows(RESULTS / f"timeline_{_LAYERS_CASE}.csv")
    timeline = {row["kernel"]: row for row in rows if row["backend"] == "ours_rtx_fused_graph"}
    whole, attention = (float(timeline[name]["us"]) for name in (SPAN, "hstu_attention_sm90"))
    own, kernel = times.get(f"{_DTYPE}_D128_N4096"), kernel_ms(times, 128, 4096)
    if own is None or kernel is None:
        return "The share of a whole model needs the times of D = 128, N = 4096, which vary.\n"
    saved, ahead = attention * (1 - kernel / own), _LAYERS * pass_ms(_LAYERS_TOKENS, 128) * 1e3
    text = (
        f"Of a whole model (`{_LAYERS_CASE}` of [end-to-end](end-to-end.md), commit {timeline[SPAN]['commit'][:7]}) "
        f"attention takes {attention:.0f} of {whole:.0f} us. An e4m3 kernel at best saves {saved:.0f} us, "
        f"{saved / whole:.0%}; five passes in front of it take {ahead:.0f} us, which leaves "
        f"{(saved - ahead) / whole:.0%}."
    )
    return textwrap.fill(text, 130, break_on_hyphens=False) + "\n"


def cached_rows(cases: Mapping[str, Mapping[str, Mapping[str, str]]]) -> list[str]:
    """Candidates against cached keys: what binds, with a cache of 16 bits and of 8; medians, however they vary."""
    rows = []
    for users, candidates, cached, name in (
        (8, 256, 4096, f"{_DTYPE}_D128_delta_B8_k4096_t256"),
        (8, 256, 16384, f"{_DTYPE}_D128_delta_B8_k16384_t256"),
        (32, 64, 4096, ""),
        (64, 16, 4096, ""),
    ):
        dim = 128
        rest = users * candidates * _HEADS * dim * 4 * 2  # q, out, and the candidates' own keys and values
        memory = [(users * cached * _HEADS * dim * 2 * size + rest) / _BYTES_PER_S * 1e6 for size in (2, 1)]
        padded = -(-candidates // _ROWS) * _ROWS
        operations = users * _HEADS * padded * (cached + 1) * 4 * dim
        products = [operations / reached * 1e6 for reached in (_REACHED, 2 * _REACHED)]
        own = cases.get(name, {}).get("ours")
        bound = [max(pair) for pair in zip(memory, products, strict=True)]
        shown = "not measured" if own is None else f"{float(own['median_ms']) * 1e3:.0f}"
        rows.append(
            (
                users,
                candidates,
                cached,
                shown,
                *(f"{x:.0f}" for x in (memory[0], products[0], memory[1], products[1])),
                f"{bound[0] / bound[1]:.1f}",
            )
        )
    heads = (
        "users",
        "candidates",
        "cached keys",
        "measured, us",
        "bytes, 16-bit",
        "products",
        "bytes, e4m3 cache",
        "products",
        "ratio of the floors",
    )
    return table(heads, rows)


def error_rows() -> list[str]:
    """Smallest and largest error over head dims and lengths."""
    found = read_rows(RESULTS / "fp8_attention.csv")
    inputs = list(dict.fromkeys(row["inputs"] for row in found))
    heads = ("form", *(f"{name}: rms" for name in inputs), *(f"{name}: worst" for name in inputs))
    rows = []
    for form in dict.fromkeys(row["form"] for row in found):
        cells = [form]
        for column in ("rms", "worst"):
            for name in inputs:
                values = sorted(float(row[column]) for row in found if (row["form"], row["inputs"]) == (form, name))
                cells.append(
                    f"{values[0]:.2%} to {values[-1]:.2%}" if column == "rms" else f"{values[len(values) // 2]:.1%}"
                )
        rows.append(cells)
    return [_origin(found[0]), "", *table(heads, rows)]


def quality_rows() -> list[str]:
    """Changes of the metrics that a budget limits."""
    found = read_rows(RESULTS / "fp8_quality.csv")
    rows = []
    for row in found:
        metrics = ("hr10", "ndcg10") if row["hr10"] else ("auc", "ne")
        shown = [
            f"{float(row[f'change_{name}']):+.4f}" if row["hr10"] else f"{float(row[f'change_{name}']):+.3%}"
            for name in metrics
        ]
        moved = f"{row['gained']}, {row['lost']}" if row["hr10"] else ""
        first = [f"{float(row[name]):.4f}" for name in metrics] if row["form"] == "float32" else shown
        rows.append(
            (
                row["model"],
                row["form"],
                *first,
                moved,
                f"{float(row['scores']):.2%}",
                f"{float(row['attention_rms']):.2%}",
            )
        )
    heads = ("model", "attention", "HR@10, or AUC", "NDCG@10, or NE", "users gained, lost", "scores", "attention")
    return [_origin(found[0]), "", *table(heads, rows)]


def _origin(row: Mapping[str, str]) -> str:
    return f"`{row['command'].split(' --')[0]}`, torch {row['torch']}, commit {row['commit'][:7]}, {row['date']}."


def texts() -> dict[str, str]:
    """Each table by the name of its marks."""
    cases = rows_by_case(read_rows(RESULTS / "attention.csv"))
    times = {name: milliseconds(found.get("ours")) for name, found in cases.items()}
    parts = {
        "floors": floors(),
        "times": [*time_rows(times), "", model_text(times).rstrip()],
        "cached": cached_rows(cases),
        "errors": error_rows(),
        "quality": quality_rows(),
    }
    return {name: "\n".join(lines) + "\n" for name, lines in parts.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, metavar="FILE", help="also put the tables between this file's marks")
    arguments = parser.parse_args(argv)
    for name, text in texts().items():
        if arguments.into is not None:
            put_between(arguments.into, f"<!-- {name}: begin -->", f"<!-- {name}: end -->", text)
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
