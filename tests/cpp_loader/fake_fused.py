"""Bundles in segments whose engines and kernels the fakes run: the model of fake_bundle.py, cut as `hstu-compile` cuts.

Schedules are written by the package itself, so a new format of theirs fails the loader's tests. What segments and
kernels compute is in fakes/fakeSegments.h and fakes/fakeKernels.cpp: exact, so a bundle answers what the whole model
answers.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from hstu_compile.artifacts import ColumnView, Crossing, KernelCall, Schedule, Step, TensorSpec
from hstu_compile.bundle import model_files
from hstu_compile.op_schema import contract_of
from hstu_compile.plugin_library import KERNELS_LIBRARY
from hstu_compile.runtime.schedule_file import fused_files, schedule_text
from tests.cpp_loader.fake_bundle import Graph, engine_text, graphs_of, read_manifest, write_bundle, write_manifest

#: Attentions of each graph; the others have one.
ATTENTIONS = {"retrieval": 2, "packed": 3}
_ATTENTION = {"alpha": 1.5, "scaling_seq_len": 1.0, "max_query_len": 64, "max_seq_len": 64, "target_group_size": 1}
_NORM = {"epsilon": 1e-5, "num_groups": 1}


def attentions_of(graph: Graph) -> int:
    """Kernels between the segments come in as many groups."""
    return ATTENTIONS.get(graph.name, 1)


def main_width(graph: Graph) -> int:
    """Numbers in a row of the output that goes through the kernels."""
    return math.prod(graph.outputs[0][2][1:])


def _attributes(operator: str, given: dict[str, float]) -> dict[str, Any]:
    """Every attribute of a contract; what is not given is 0."""
    return {each.name: given.get(each.name, 0) for each in contract_of(operator).attributes}


def _calls(graph: Graph, group: int) -> list[KernelCall]:
    """An attention and the two norms behind it: one reads columns of the attention's result and of the wide tensor."""
    width = main_width(graph)
    offsets = next(name for name, *_ in graph.inputs if name.endswith("offsets"))
    wide, tensors = f"wide_{group}", {name: f"{name}_{group}" for name in ("attended", "gated", "normed")}
    columns = {name: ColumnView(index * width, 4 * width, (1, width)) for index, name in enumerate(("q", "k", "v"))}
    attention = KernelCall(
        "HstuAttention",
        f"attention {group}",
        _attributes("HstuAttention", {**_ATTENTION, "pos_bias": 1}),
        {"q": wide, "k": wide, "v": wide, "q_offsets": offsets, "k_offsets": offsets, "pos_table": "pos_table"},
        tensors["attended"],
        columns,
    )
    gate = {"x": ColumnView(0, width, (width,)), "gate": ColumnView(3 * width, 4 * width, (width,))}
    first = KernelCall(
        "HstuNorm",
        f"first norm {group}",
        _attributes("HstuNorm", {**_NORM, "activation": 1}),
        {"x": tensors["attended"], "scale": "half", "gate": wide},
        tensors["gated"],
        gate,
    )
    second = KernelCall(
        "HstuNorm",
        f"second norm {group}",
        _attributes("HstuNorm", _NORM),
        {"x": tensors["gated"], "scale": "quarter"},
        tensors["normed"],
    )
    return [attention, first, second]


def schedule_of(graph: Graph) -> Schedule:
    """Segments and kernels: n attentions, n + 1 segments."""
    groups, width, rows = attentions_of(graph), main_width(graph), graph.outputs[0][2][0]
    steps, calls, crossing = [Step("segment", 0)], [], []
    for group in range(groups):
        at = len(steps)
        steps += [Step("kernel", len(calls) + index) for index in range(3)] + [Step("segment", group + 1)]
        calls += _calls(graph, group)
        lives = {
            "wide": (at - 1, at + 1),
            "attended": (at, at + 1),
            "gated": (at + 1, at + 2),
            "normed": (at + 2, at + 3),
        }
        shapes = {"wide": (rows, 4 * width), "attended": (rows, 1, width)}
        crossing += [
            Crossing(TensorSpec(f"{name}_{group}", "float32", shapes.get(name, (rows, width))), *life)
            for name, life in lives.items()
        ]
    last = len(steps) - 1
    outputs = tuple(TensorSpec(*output) for output in graph.outputs)
    crossing += [Crossing(spec, last if spec is outputs[0] else 0, last) for spec in outputs]
    return Schedule(
        inputs=tuple(TensorSpec(name, dtype, shape) for name, dtype, shape, *_ in graph.inputs),
        outputs=outputs,
        calls=tuple(calls),
        steps=tuple(steps),
        crossing=tuple(crossing),
        constants={
            "pos_table": np.array([[0, 1, 0]], np.float32),
            "half": np.full(width, 0.5, np.float32),
            "quarter": np.full(width, 0.25, np.float32),
        },
    )


def segment_texts(graph: Graph, version: int, precision: str) -> list[str]:
    """Engine files of the segments: the first is the model with another main output, the others know rows alone."""
    groups, width = attentions_of(graph), main_width(graph)
    main, *others = graph.outputs
    whole = engine_text(graph, version, False).splitlines()
    head = [line for line in whole if not line.startswith("out ")]
    # Engines of float32 graphs are built without TF32.
    common = [f"name main {main[0]}", f"size main_width {width}", f"size tf32 {int(precision != 'fp32')}"]
    wide = [f"out wide_{group} float32 {4 * width} {4 * width}" for group in range(groups)]
    first = [*head, "stage first", "name wide wide_0", *common, "size segment 0", wide[0]]
    texts = [[*first, *(f"out {name} {dtype}" for name, dtype, _ in others)]]
    # A kernel's rows have no profile of their own: every engine that reads them takes any number.
    most = max(most[0] for _, _, _, _, most in graph.inputs) * 2
    for group in range(groups):
        lines = [*whole[:2], f"model {graph.name}", *common, f"size segment {group + 1}", f"name normed normed_{group}"]
        lines.append(f"in normed_{group} float32 1 {most} {width} {width}")
        if group + 1 < groups:
            lines += ["stage middle", f"name wide wide_{group + 1}", wide[group + 1]]
        else:
            row = " ".join(f"{size} {size}" for size in main[2][1:])
            lines += ["stage last", f"out {main[0]} {main[1]} {row}"]
        texts.append(lines)
    return ["\n".join(lines) + "\n" for lines in texts]


def write_fused_bundle(
    folder: Path, family: str, version: tuple[int, int, int], kernels: Path, precision: str = "fp32"
) -> Path:
    """A complete bundle in segments for a TensorRT-RTX version.

    Args:
        folder: to make.
        family: retrieval or ranking.
        version: major, minor, patch.
        kernels: library of the kernels.
        precision: what the manifest says; everything is float32 all the same.
    """
    write_bundle(folder, family, version)
    manifest = read_manifest(folder)
    (folder / KERNELS_LIBRARY).write_bytes(kernels.read_bytes())
    number = version[0] * 10000 + version[1] * 100 + version[2]
    for graph, entry in zip(graphs_of(family), manifest["graphs"], strict=True):
        schedule, texts = schedule_of(graph), segment_texts(graph, number, precision)
        engine = model_files(graph.name)[1]
        (folder / engine).unlink()
        name, files = fused_files(engine.removesuffix(".engine"), len(texts))
        (folder / name).write_text(schedule_text(schedule), "utf-8")
        for file, text in zip(files, texts, strict=True):
            (folder / file).write_text(text, "utf-8")
        entry |= {"engine": None, "fused": {"schedule": name, "engines": list(files)}}
    version_text = ".".join(map(str, (*version, 120)))
    manifest["backend"] = {"name": "tensorrt-rtx", "version": version_text, "compute_capabilities": []}
    manifest["precision"]["requested"] = precision
    manifest["kernels"] = {"file": KERNELS_LIBRARY, "archs": [90]}
    write_manifest(folder, manifest)
    return folder


def edit_schedule(folder: Path, change: Any, name: str = "model.schedule.json") -> None:
    """Change a schedule's content; the manifest vouches for what it becomes."""
    path = folder / name
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), "utf-8")
    write_manifest(folder, read_manifest(folder))
