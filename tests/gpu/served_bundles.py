"""Bundles as they are served: what prepare_job.py built, with the engines that the steps trt85 and ranking left."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hstu_compile import bundle as bundles
from hstu_compile.plugin_library import SELF_REGISTERING

BUNDLES = ("research-fp16", "dlrm-fp16")


class Clock:
    """What is left of the script's time."""

    def __init__(self, budget: float) -> None:
        self._end = time.monotonic() + budget

    def at_most(self, seconds: float) -> float:
        """That many seconds, or what is left, but always long enough to fail with a message."""
        return max(1.0, min(seconds, self._end - time.monotonic()))


def compute_capability() -> str:
    """Of the first GPU, "9.0"."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]


def served_bundle(
    source: Path,
    engines: Mapping[str, Path],
    plugin: Path,
    target: Path,
    version: str,
    capability: str,
    without: Sequence[str] = ("*.onnx", "report.*"),
) -> Path:
    """Put a bundle with engines together: files, engines, the plugin library, and a manifest that vouches for all.

    Args:
        source: the bundle without engines.
        engines: by graph.
        plugin: the library that the engines need.
        target: replaced.
        version: of TensorRT.
        capability: of the GPU, "9.0".
        without: patterns of files that are left out.
    """
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*without))
    for graph, engine in engines.items():
        shutil.copyfile(engine, target / bundles.model_files(graph)[1])
    shutil.copyfile(plugin, target / SELF_REGISTERING)
    manifest = json.loads((target / bundles.MANIFEST).read_text(encoding="utf-8"))
    manifest["backend"] = {
        "name": "tensorrt",
        "reason": "the engines were built where they run",
        "version": version,
        "compute_capabilities": [capability],
    }
    for graph in manifest["graphs"]:
        graph["engine"] = bundles.model_files(graph["name"])[1]
    vouch_for(target, manifest)
    return target


def vouch_for(target: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of a bundle's folder anew, with the sizes and hashes of all that lies there."""
    (target / bundles.MANIFEST).unlink()
    manifest["files"] = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(target.iterdir())
    }
    (target / bundles.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def found_engine(name: str, graph: str, places: Sequence[Path]) -> Path | None:
    """An engine that the steps trt85 or ranking left."""
    file = bundles.model_files(graph)[1]
    candidates = [place / each for place in places for each in (f"{name}/{file}", f"{name}-plugin.engine")]
    # The step trt85 names an engine by its bundle: of one graph.
    fitting_names = [path for path in candidates if path.parent.name == name or graph == "retrieval"]
    return next((path for path in fitting_names if path.is_file()), None)
