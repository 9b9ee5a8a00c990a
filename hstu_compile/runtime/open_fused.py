"""Open what a cut graph became: schedule, engines and kernels. Level 3; no torch, no ONNX."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from hstu_compile.artifacts import Schedule
from hstu_compile.errors import EngineError
from hstu_compile.runtime.attention_kernels import KernelLibrary
from hstu_compile.runtime.fused_session import FusedSession
from hstu_compile.runtime.schedule_file import schedule_from_text
from hstu_compile.runtime.session import Session
from hstu_compile.tensorrt_api import tensorrt_api

#: The only backend whose engines a session of segments runs.
FUSED_BACKEND: Literal["tensorrt-rtx"] = "tensorrt-rtx"


def open_fused_session(
    schedule: Path | Schedule,
    engines: Sequence[Path | bytes],
    kernels: Path,
    *,
    allow_tf32: bool = True,
    cuda_graphs: int = 0,
    graph_budget_bytes: int | None = None,
) -> Session:
    """Load a graph that was cut at its attentions.

    Args:
        schedule: what runs in which order, or its file.
        engines: of the segments in order, serialised or their files.
        kernels: library of the attention kernels.
        allow_tf32: False for engines that were built without TF32: those of float32 graphs.
        cuda_graphs: most CUDA graphs that are kept; 0 records none.
        graph_budget_bytes: device memory that they may take together; None sets no limit.

    Raises:
        BundleError: HSTU-E803, if the schedule cannot be read.
        EngineError: HSTU-E401 without TensorRT-RTX or a GPU; E404 if an engine cannot be loaded, or is not of this
            schedule.
        PluginError: HSTU-E504 if the library of kernels cannot be loaded, E505 if it has no kernel for an attention on
            this GPU.
        UsageError: HSTU-E901 for a negative number of graphs or bytes.
    """
    if isinstance(schedule, Path):
        schedule = schedule_from_text(_content(schedule).decode("utf-8", errors="replace"), schedule.name)
    return FusedSession(
        tensorrt_api(FUSED_BACKEND),
        schedule,
        [engine if isinstance(engine, bytes) else _content(engine) for engine in engines],
        KernelLibrary(kernels),
        allow_tf32=allow_tf32,
        cuda_graphs=cuda_graphs,
        graph_budget_bytes=graph_budget_bytes,
    )


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise EngineError(
            "HSTU-E404", f"{path} cannot be read", str(error), "check the path, or build the bundle again"
        ) from error
