"""Which kernels TensorRT 8.5 computed the products of ranking engines by, from the layers of a GPU run's engines.

  tensorrt85_kernels.py RUN [--csv FILE]      (RUN: the unpacked step `ranking`, with engines/BUNDLE/GRAPH.layers.json)

A name says the types of operands, of what is multiplied, and of sums and results: f32f32_tf32f32_f32 reads float32 and
multiplies TF32. Needs no GPU and no TensorRT.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if str(Path(__file__).parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parent))

from bench_plugin import write_rows

RESULTS = Path(__file__).parent / "results" / "tensorrt85_kernels.csv"
VERSION = "TensorRT 8.5.3.1"
COLUMNS = ("bundle", "graph", "kernel", "products", "version", "gpu", "commit", "date")
#: What follows says how a kernel is tiled.
_TILES = re.compile(r"_(tilesize|bias_relu).*")


def rows_of(run: Path) -> list[dict[str, Any]]:
    """A row for each engine and kernel, with the number of products that it computes."""
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    known = {"version": VERSION} | {name: facts[name] for name in ("gpu", "commit", "date")}
    rows = []
    for path in sorted(run.glob("engines/*/*.layers.json")):
        layers = json.loads(path.read_text(encoding="utf-8"))["Layers"]
        found = Counter(_TILES.sub("", each["TacticName"]) for each in layers if "conv" in each["LayerType"].lower())
        for kernel, count in sorted(found.items(), key=lambda item: (-item[1], item[0])):
            named = {"bundle": path.parent.name, "graph": path.name.removesuffix(".layers.json")}
            rows.append({**named, "kernel": kernel, "products": count, **known})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--csv", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    if not (rows := rows_of(arguments.run)):
        print(f"error: {arguments.run} has no engines/*/*.layers.json", file=sys.stderr)
        return 1
    write_rows(arguments.csv, COLUMNS, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
