"""The parts of prepare_job.py for run_fused.py: bundles in segments, with engines and kernels. Needs no GPU.

The small ones are of both fixtures, with what ONNX Runtime has between their steps. The large one is the model of the
M-FALCON benchmark (5 layers, DLRMv3 sizes), with two archives that can be carried one after the other: its engines, and
what they are compared with. Its graphs stay out: nothing is built from them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

REPOSITORY = Path(__file__).resolve().parents[2]
BENCH = REPOSITORY / "tests" / "bench"
FIXTURES = REPOSITORY.parent / "shared" / "fixtures"
sys.path[:0] = [str(REPOSITORY), str(Path(__file__).resolve().parent)]

from archives import save_archive  # noqa: E402
from served_bundles import vouch_for  # noqa: E402

from hstu_compile import bundle as bundles  # noqa: E402
from hstu_compile.artifacts import OnnxGraph, SegmentedGraph  # noqa: E402
from hstu_compile.graph_facts import tensor_specs  # noqa: E402
from hstu_compile.recheck import stored_reference  # noqa: E402
from hstu_compile.rewrite.cut_at_attention import segmented_from_onnx  # noqa: E402
from hstu_compile.runtime.onnxruntime_session import OnnxRuntimeSession  # noqa: E402
from hstu_compile.runtime.segmented_onnx_session import kernel_model  # noqa: E402

#: Folder of a fixture, and options of the build.
SMALL: dict[str, tuple[str, tuple[str, ...]]] = {
    "research-fp16-fused": ("meta_research_ml100k", ("--max-batch", "16")),
    "dlrm-fp16-fused": ("meta_dlrm_ml100k", ("--m-falcon", "micro-batch=16", "--max-batch", "8")),
}
GOLDEN = ("meta_dlrm_ml100k", "golden.npz", "golden_dlrm.npz")
M_FALCON = "m_falcon-fp16-fused"
M_FALCON_OPTIONS = ("--m-falcon", "micro-batch=2048", "--max-batch", "2", "--opt-batch", "1")
#: Folder of the job with what ONNX Runtime has between the steps.
STEPS = "fused_steps"
#: Files of a bundle that no check reads.
UNREAD = ("report.html", "report.json", "*onnxruntime_outputs.json")


def build_fused(folder: Path, source: Path, options: Sequence[str]) -> None:
    """A bundle in segments, of a folder with a checkpoint and its configuration."""
    program = Path(sys.executable).with_name("hstu-compile")
    command = [program, "build", source / "ckpt.pt", "--config", source / "config.json", "--fp16", *options]
    command += ["--attention", "fused", "-o", folder, "--force"]
    subprocess.run([str(word) for word in command], check=True, stdin=subprocess.DEVNULL)


def trim(folder: Path, patterns: Sequence[str]) -> None:
    """Leave out what no check reads; the manifest vouches for the rest."""
    manifest = json.loads((folder / bundles.MANIFEST).read_text(encoding="utf-8"))
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink()
    vouch_for(folder, manifest)


def save_steps(target: Path, folder: Path) -> None:
    """What ONNX Runtime reads and makes in every step of every graph, on the second stored request."""
    target.mkdir(exist_ok=True)
    manifest = json.loads((folder / bundles.MANIFEST).read_text(encoding="utf-8"))
    for entry in manifest["graphs"]:
        model = onnx.load(folder / entry["onnx"])
        inputs, outputs = tensor_specs(model.graph.input), tensor_specs(model.graph.output)
        cut = segmented_from_onnx(OnnxGraph(entry["name"], model, "fp16", inputs, outputs))
        values = step_values(cut, stored_reference(folder, entry).feeds[1].arrays)
        np.savez_compressed(target / f"{folder.name}-{entry['name']}.npz", **values)


def step_values(cut: SegmentedGraph, feeds: Mapping[str, Any]) -> dict[str, Any]:
    """Every tensor that a step of a request reads or makes, by name, and the names of each step by its number."""
    values = dict(feeds)
    for number, step in enumerate(cut.steps):
        is_segment = step.kind == "segment"
        graph = cut.segments[step.index].model if is_segment else kernel_model(cut, cut.calls[step.index])
        with OnnxRuntimeSession(graph) as session:
            values |= session.execute({spec.name: values[spec.name] for spec in session.inputs})
        values[f"reads {number}"] = np.array(cut.reads(step))
        values[f"writes {number}"] = np.array(cut.writes(step))
    return values


def prepare_small(job: Path) -> None:
    """The bundles of both fixtures."""
    for name, (fixture, options) in SMALL.items():
        folder = job / "models" / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        build_fused(folder, FIXTURES / fixture, options)
        save_steps(job / STEPS, folder)
        trim(folder, UNREAD)
    fixture, source, target = GOLDEN
    shutil.copyfile(FIXTURES / fixture / source, job / target)


def prepare_m_falcon(place: Path) -> None:
    """The benchmark's model, and two archives of it; minutes."""
    place.mkdir(parents=True, exist_ok=True)
    folder, checkpoint = place / M_FALCON, place / "checkpoint"
    program = [sys.executable, str(BENCH / "m_falcon_prepare.py"), "--checkpoint", str(checkpoint)]
    subprocess.run(program, check=True)
    build_fused(folder, checkpoint, M_FALCON_OPTIONS)
    trim(folder, (*UNREAD, "*.onnx"))
    files = sorted(folder.iterdir())
    save_archive(place / f"{M_FALCON}-engines.tar.gz", place, [path for path in files if path.suffix == ".engine"])
    save_archive(place / f"{M_FALCON}-references.tar.gz", place, [path for path in files if path.suffix != ".engine"])
