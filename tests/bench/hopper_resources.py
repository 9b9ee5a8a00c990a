"""What each Hopper kernel takes of an SM, as the assembler says: registers, spilled bytes, shared memory, threads.

  hopper_resources.py [--csv FILE] [--cache DIR] [--jobs N]     (needs nvcc, no GPU; about 45 minutes of one core)
  hopper_resources.py --only block_dim=256 --only shares=False  (those kernels alone; the CSV keeps the rows of others)
  hopper_resources.py --table [--csv FILE] [--into FILE]        (counts and worst values, from the CSV)

is_serialized: the assembler's remark that products wait for each other. warpgroup_products, warp_products: `HGMMA` and
`HMMA` instructions in the machine code. With --cache, kernels that were compiled before are taken from DIR.

Ends with 1 where a kernel spills, has a stack, is serialized, or multiplies by other instructions than HGMMA.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(REPOSITORY)]

from bench_plugin import commit_of, put_between, write_rows  # noqa: E402

from hstu_compile.plugins.kernels.hopper.compile import HopperImage, compile_hopper, resource_report  # noqa: E402
from hstu_compile.plugins.kernels.hopper.variants import (  # noqa: E402
    BLOCK_DIMS,
    SILU_FORMS,
    HopperVariant,
    hopper_variants_for,
)

RESULTS = Path(__file__).parent / "results" / "hopper_resources.csv"
BEGIN, END = "<!-- hopper resources: begin -->", "<!-- hopper resources: end -->"
#: What none of the kernels may have; see this file's first lines.
FAULTS = ("stack_bytes", "spill_store_bytes", "spill_load_bytes", "is_serialized", "warp_products")


def all_variants() -> list[HopperVariant]:
    """Every kernel that a model can ask for."""
    found = [
        variant
        for has_cache in (False, True)
        for dtype in ("bfloat16", "float16")
        for dim in BLOCK_DIMS
        for is_causal in (False, True)
        for pos_bias in (False, True)
        for bits in (0, 32, 64)
        for silu in SILU_FORMS
        for variant in hopper_variants_for(
            dtype,
            dim,
            dim,
            plain_causal=is_causal,
            pos_bias=pos_bias,
            time_bias=bits > 0,
            timestamp_bits=bits or 64,
            silu=silu,
            has_cache=has_cache,
        )
    ]
    return list(dict.fromkeys(found))


def disassembler() -> Path:
    """The nvdisasm that triton's wheel carries.

    Raises:
        SystemExit: triton is not installed.
    """
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        raise SystemExit("the machine code is read with triton's nvdisasm. Fix: pip install triton")
    return Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"


def products_of(image: HopperImage, nvdisasm: Path) -> dict[str, int]:
    """How many product instructions of warpgroups and of single warps are in a kernel's machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(image.data)
        cubin.flush()
        code = subprocess.run([nvdisasm, "-c", cubin.name], capture_output=True, text=True, check=True).stdout
    return {
        "warpgroup_products": len(re.findall(r"\bHGMMA\.", code)),
        "warp_products": len(re.findall(r"\bHMMA\.", code)),
    }


def chosen(variants: Sequence[HopperVariant], only: Sequence[str]) -> list[HopperVariant]:
    """Those whose fields have the values of `only`, each FIELD=VALUE as the CSV spells it.

    Raises:
        SystemExit: there is no such field, or no kernel has the values.
    """
    wanted = dict(each.partition("=")[::2] for each in only)
    fields = [field.name for field in dataclasses.fields(HopperVariant)]
    for name in wanted:
        if name not in fields:
            raise SystemExit(f"--only {name}: a kernel has no such field. Fix: one of {', '.join(fields)}")
    found = [each for each in variants if all(str(getattr(each, name)) == text for name, text in wanted.items())]
    if not found:
        raise SystemExit(f"no kernel has {', '.join(only)}. Fix: values as in {RESULTS.name}, such as shares=False")
    return found


def measure(cache_dir: Path | None, jobs: int | None, target: Path, only: Sequence[str]) -> int:
    """Compile kernels and write their rows; 1 if one of them has a fault."""
    variants = chosen(all_variants(), only)

    def show(done: int, total: int) -> None:
        print(f"\r{done}/{total} kernels", end="", file=sys.stderr, flush=True)

    images = compile_hopper(variants, cache_dir, jobs=jobs, progress=show)
    print(file=sys.stderr)
    nvdisasm = disassembler()
    release = f"{images[0].release[0]}.{images[0].release[1]}"
    rows = [
        {**row, **products_of(image, nvdisasm), "nvcc": release, "commit": commit_of()}
        for image, row in zip(images, resource_report(images), strict=True)
    ]
    write_rows(target, tuple(rows[0]), merged(target, rows) if only else rows)
    faulty = [row for row in rows if any(row[name] for name in FAULTS) or not row["warpgroup_products"]]
    print(f"{target}: {len(rows)} kernels, {len(faulty)} with a fault")
    for row in faulty:
        print(f"  {row}")
    return int(bool(faulty))


def merged(target: Path, measured: Sequence[dict[str, object]]) -> list[dict[str, object]]:
    """The file's rows, those that were measured in place of their kernels' old ones, in the order of all kernels."""
    fields = [field.name for field in dataclasses.fields(HopperVariant)]
    with target.open(encoding="utf-8", newline="") as file:
        old: list[dict[str, object]] = [{**row} for row in csv.DictReader(file)]
    known = {tuple(str(row[name]) for name in fields): row for row in (*old, *measured)}
    keys = (tuple(str(getattr(variant, name)) for name in fields) for variant in all_variants())
    return [known[key] for key in keys if key in known]


def table_text(rows: Sequence[dict[str, str]]) -> str:
    """Markdown: of each head dim, with and without a cache, how many kernels were compiled, and what they take."""
    commits = Counter(row["commit"] for row in rows).most_common()
    lines = [
        f"commit: {', '.join(f'{commit} ({count} kernels)' for commit, count in commits)}  ",
        f"nvcc: {rows[0]['nvcc']}  ",
        "",
        "| head dim | cache | kernels | registers at launch | shared KiB | spill, stack or are serialized | products |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[int, str], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault((int(row["block_dim"]), row["has_cache"]), []).append(row)
    asked = Counter((variant.block_dim, str(variant.has_cache)) for variant in all_variants())
    for (dim, has_cache), found in sorted(groups.items()):
        faulty = sum(any(row[name] not in ("0", "False") for name in FAULTS) for row in found)
        shared = [int(row["shared_bytes"]) // 1024 for row in found]
        products = [int(row["warpgroup_products"]) for row in found]
        registers = sorted({row["registers"] for row in found})
        lines.append(
            f"| {dim} | {'yes' if has_cache == 'True' else 'no'} | {len(found)} of {asked[dim, has_cache]} "
            f"| {', '.join(registers)} "
            f"| {min(shared)} to {max(shared)} | {faulty} | {min(products)} to {max(products)} HGMMA |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--cache", type=Path, metavar="DIR")
    parser.add_argument("--jobs", type=int, help="compilers at a time; one per usable core")
    parser.add_argument("--only", action="append", default=[], metavar="FIELD=VALUE", help="kernels with these values")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--into", type=Path, metavar="FILE", help="also put the table between this file's marks")
    arguments = parser.parse_args(argv)
    if not arguments.table:
        return measure(arguments.cache, arguments.jobs, arguments.csv, arguments.only)
    with arguments.csv.open(encoding="utf-8", newline="") as file:
        text = table_text(list(csv.DictReader(file)))
    if arguments.into is not None:
        put_between(arguments.into, BEGIN, END, text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
