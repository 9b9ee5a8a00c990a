"""A graph that is cut at its attentions to one TensorRT-RTX engine a segment. Level 4, without torch.

Input: an `OnnxGraph`, or a `SegmentedGraph`, and the profile of the graph. Output: an `EngineArtifact` for each
segment, in order; with the schedule and the kernels that join them they are `FusedEngines`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hstu_compile.artifacts import EngineArtifact, FusedEngines, OnnxGraph, Profile, SegmentedGraph
from hstu_compile.engine import engine_from_onnx
from hstu_compile.profiles import derived_profile
from hstu_compile.rewrite.cut_at_attention import segmented_from_onnx
from hstu_compile.runtime.open_fused import FUSED_BACKEND
from hstu_compile.runtime.schedule_file import fused_files
from hstu_compile.trt_options import EngineOptions

# (segment, phase, fraction 0..1).
Progress = Callable[[str, str, float], None]


def fused_from_onnx(
    graph: OnnxGraph,
    profile: Profile,
    kernels: Path,
    stem: str,
    options: EngineOptions | None = None,
    on_progress: Progress | None = None,
) -> FusedEngines:
    """Cut a graph and build its engines.

    Args:
        graph: as it ships.
        profile: smallest, typical and largest shapes of its inputs.
        kernels: library that has a kernel for each of its attentions.
        stem: what the names of its files begin with.
        options: see `engines_from_segments`.
        on_progress: called while an engine is built.

    Raises:
        RewriteError: HSTU-E303, if the graph cannot be cut.
        EngineError, UsageError: see `engines_from_segments`.
    """
    cut = segmented_from_onnx(graph)
    engines = engines_from_segments(cut, profile, options, on_progress)
    return FusedEngines(cut, profile, engines, kernels, *fused_files(stem, len(engines)))


def engines_from_segments(
    graph: SegmentedGraph,
    profile: Profile,
    options: EngineOptions | None = None,
    on_progress: Progress | None = None,
) -> tuple[EngineArtifact, ...]:
    """Build every segment's engine.

    Each takes the shapes that the graph's profile gives its inputs, and is built so that a pass over all of them can be
    recorded as one CUDA graph.

    Args:
        graph: the cut graph.
        profile: smallest, typical and largest shapes of the graph's inputs.
        options: builder settings; their explicit shapes are the caller's to put into `profile`.
        on_progress: called while an engine is built.

    Raises:
        EngineError: HSTU-E401 without TensorRT-RTX; E402 if it refuses a segment; E405 if the profile gives the inputs
            of a segment no shapes.
        UsageError: HSTU-E901, if an option does not exist in TensorRT-RTX.
    """
    engines = []
    for segment in graph.segments:

        def report(phase: str, fraction: float, name: str = segment.name) -> None:
            if on_progress is not None:
                on_progress(name, phase, fraction)

        engines.append(
            engine_from_onnx(
                segment.model,
                backend=FUSED_BACKEND,
                profiles=(derived_profile(segment.name, profile, graph.inputs, segment.inputs),),
                options=options,
                on_progress=report,
                part_of=graph.precision,
                folder=segment.folder,
            )
        )
    return tuple(engines)
