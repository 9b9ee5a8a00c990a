"""Repeat a bundle's verification from its own files, without the checkpoint and without torch. Level 5."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from hstu_compile import bundle as bundles
from hstu_compile.artifacts import Feed, OnnxGraph
from hstu_compile.errors import BundleError, EngineError
from hstu_compile.graph_facts import tensor_specs
from hstu_compile.incremental_check import check_incremental
from hstu_compile.m_falcon_check import check_m_falcon
from hstu_compile.polygraphy_files import PolygraphyCheck, load_feeds, load_outputs, run_polygraphy
from hstu_compile.rewrite import affordable
from hstu_compile.rewrite.cut_at_attention import segmented_from_onnx
from hstu_compile.runtime.schedule_file import schedule_text
from hstu_compile.runtime.segmented_onnx_session import SegmentedOnnxSession
from hstu_compile.runtime.session import Session, open_session
from hstu_compile.session_check import (
    SEGMENTS,
    SESSION,
    Progress,
    Reference,
    RuntimeCheck,
    Status,
    VerifyReport,
    check_session,
    guarded_check,
    report_of,
)
from hstu_compile.table_files import read_model


@dataclasses.dataclass(frozen=True)
class Recheck:
    """What a repeated verification found."""

    status: Status
    verification: VerifyReport
    polygraphy: tuple[PolygraphyCheck, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "status": self.status,
            "verification": self.verification.to_dict(),
            "polygraphy": [command.to_dict() for command in self.polygraphy],
        }


def recheck_bundle(files: bundles.BundleFiles, progress: Progress) -> Recheck:
    """Run the stored feeds again and compare with the stored float64 outputs, under the rule of the build.

    Every graph runs in ONNX Runtime, one that was cut in segments as well, and its engine or engines on their backend
    where that can run; the graphs of a model built with
    --m-falcon or --incremental also run together, as a session. Then the stored Polygraphy commands are repeated, which
    also cover top-k scores.

    Args:
        files: an existing bundle whose hashes were checked.
        progress: called with (what, done, total).

    Raises:
        BundleError: HSTU-E803, if the bundle was built with --no-verify and holds nothing to compare with.
    """
    if files.manifest.get("verification") is None:
        raise BundleError(
            "HSTU-E803",
            f"{files.path} holds no reference",
            "it was built with --no-verify",
            "build it again without --no-verify",
        )
    checked = []
    commands = []
    for graph in files.manifest["graphs"]:
        reference = stored_reference(files.path, graph)
        checked.append(
            (reference, [_check(files, graph, name, reference, progress) for name in _runtimes(files, graph)])
        )
        commands.append(run_polygraphy(files.path, graph["verification"]["polygraphy_arguments"]))
    if files.manifest["verification"].get("session") is not None:
        reference = _stored_session_reference(files)
        engines = all(_runnable_file(graph) for graph in files.manifest["graphs"])
        runtimes = ["onnxruntime", *([files.manifest["backend"]["name"]] if engines else [])]
        checked.append((reference, [_check_session_of(files, name, reference, progress) for name in runtimes]))
    quantization = files.manifest.get("quantization")
    verification = report_of(
        checked, files.manifest["precision"]["requested"], quantization["kind"] if quantization else None
    )
    passed = verification.status == "PASS" and all(command.exit_code == 0 for command in commands)
    return Recheck("PASS" if passed else "FAIL", verification, tuple(commands))


def stored_reference(folder: Path, graph: Mapping[str, Any]) -> Reference:
    """What a bundle's folder holds to compare one graph with; `graph` is its entry in the manifest."""
    stored, names = graph["verification"], bundles.reference_files(graph["name"])
    feeds = zip(stored["feeds"], load_feeds(folder / names.feeds), strict=True)
    return Reference(
        graph=graph["name"],
        primary=stored["primary"],
        feeds=tuple(Feed(name, arrays) for name, arrays in feeds),
        exact=tuple(load_outputs(folder / names.exact)),
        eager=tuple(load_outputs(folder / names.eager)),
        eager_error=dict(stored["eager_error"]),
        item_vectors=None,
        eager_whole_error=stored.get("eager_whole_error"),
    )


def _runnable_file(graph: Mapping[str, Any]) -> str | None:
    """What stands for a graph on a GPU: its engine, or the schedule of its segments."""
    fused = graph.get("fused")
    return graph.get("engine") if fused is None else str(fused["schedule"])


def _runtimes(files: bundles.BundleFiles, graph: Mapping[str, Any]) -> list[str]:
    """Where a graph is checked."""
    segments = [] if graph.get("fused") is None else [SEGMENTS]
    engine = [files.manifest["backend"]["name"]] if _runnable_file(graph) else []
    return ["onnxruntime", *segments, *engine]


def _stored_session_reference(files: bundles.BundleFiles) -> Reference:
    """What a bundle holds to compare its graphs with as one session: the requests are those of its first graph."""
    (packed, *_), stored = files.manifest["graphs"], files.manifest["verification"]["session"]
    requests = stored_reference(files.path, packed)
    exact = tuple(load_outputs(files.path / bundles.reference_files(SESSION).exact))
    return dataclasses.replace(
        requests, graph=SESSION, exact=exact, eager=exact, eager_error=dict(stored["eager_error"])
    )


def _check_session_of(
    files: bundles.BundleFiles, runtime: str, reference: Reference, progress: Progress
) -> RuntimeCheck:
    graphs = {graph["name"]: graph for graph in files.manifest["graphs"]}
    names = {name: _artifact(graph, runtime) for name, graph in graphs.items()}
    precision = files.manifest["precision"]["requested"]

    def open_it(graph: str) -> Session:
        return _open(files, graphs[graph], runtime, reference.feeds)

    if files.ranking is not None:
        return check_m_falcon(runtime, open_it, names, files.ranking, reference, precision, progress)
    assert files.retrieval is not None  # builds of these two kinds alone check a session
    return check_incremental(runtime, open_it, names, files.retrieval, reference, precision, progress)


def _open(files: bundles.BundleFiles, graph: Mapping[str, Any], runtime: str, feeds: Sequence[Feed]) -> Session:
    if runtime not in ("onnxruntime", SEGMENTS):
        return bundles.open_graph(files, graph["name"], runtime)
    whole = read_model(files.path / graph["onnx"])
    runnable = affordable(whole, [feed.arrays for feed in feeds], files.contextual_len)
    if runtime == "onnxruntime":
        return open_session(runtime, onnx=runnable, folder=files.path)
    stored = files.path / graph["fused"]["schedule"]
    if schedule_text(segmented_from_onnx(_graph_of(files, graph, whole))) != stored.read_text(encoding="utf-8"):
        raise EngineError(
            "HSTU-E404",
            f"{stored.name} is not how this hstu-compile cuts {graph['onnx']}",
            f"the bundle was built by hstu-compile {files.manifest['hstu_compile']}",
            "verify it with that version, or build it again",
        )
    return SegmentedOnnxSession(segmented_from_onnx(_graph_of(files, graph, runnable)))


def _graph_of(files: bundles.BundleFiles, graph: Mapping[str, Any], model: onnx.ModelProto) -> OnnxGraph:
    """A stored graph as the build had it."""
    inputs, outputs = tensor_specs(model.graph.input), tensor_specs(model.graph.output)
    precision = files.manifest["precision"]["requested"]
    return OnnxGraph(graph["name"], model, precision, inputs, outputs, folder=files.path)


def _artifact(graph: Mapping[str, Any], runtime: str) -> str:
    """The file that a runtime runs of a graph."""
    name = graph["onnx"] if runtime == "onnxruntime" else _runnable_file(graph)
    return str(name)


def _check(
    files: bundles.BundleFiles, graph: Mapping[str, Any], runtime: str, reference: Reference, progress: Progress
) -> RuntimeCheck:
    artifact = _artifact(graph, runtime)
    precision = files.manifest["precision"]["requested"]

    def check(session: Session) -> RuntimeCheck:
        return check_session(session, artifact, reference, precision, progress)

    return guarded_check(runtime, artifact, lambda: _open(files, graph, runtime, reference.feeds), check)
