"""One way to run a model, whatever the runtime. Level 3; no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from hstu_compile.artifacts import TensorSpec
from hstu_compile.errors import EngineError, UsageError
from hstu_compile.runtime.graph_cache import GraphStats
from hstu_compile.runtime.resident import MemoryPool, ResidentTensor

if TYPE_CHECKING:
    import onnx

RUNTIMES = ("onnxruntime", "tensorrt", "tensorrt-rtx")


class Session(Protocol):
    """A model loaded into a runtime. Calls of `run` from several threads are served one after the other."""

    @property
    def name(self) -> str:
        """Runtime and version."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What `run` takes, in order."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What `run` gives, in order."""

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run one request batch.

        Args:
            feeds: one array per input, of its dtype and rank; integers are converted where no value changes.

        Returns:
            One new array per output.
        """

    def run_resident(
        self,
        feeds: Mapping[str, NDArray[Any] | ResidentTensor],
        outputs: Mapping[str, ResidentTensor],
        *,
        before: Sequence[tuple[ResidentTensor, ResidentTensor]] = (),
        after: Sequence[tuple[ResidentTensor, ResidentTensor]] = (),
    ) -> dict[str, NDArray[Any]]:
        """Run one request batch on tensors that stay where the session computes.

        Everything is complete on return: resident outputs may be read by any session or pool of the process.

        Args:
            feeds: as for `run`; resident tensors have the input's dtype and are read in place.
            outputs: where to write outputs: tensors of the output's dtype and of exactly the shape that the feeds give
                it. They overlap neither each other nor a resident feed. Their content is undefined after an error.
            before: (source, target) of copies that are made first, so that the feeds may read the targets.
            after: likewise of copies that are made last, so that their sources may be outputs.

        Returns:
            One new array per output that is not in `outputs`.

        Raises:
            RequestError: HSTU-E701 if feeds or outputs do not match the model.
            ValueError: if a copy is not of the session's memory, or its two sides differ.
        """

    @property
    def graph_stats(self) -> GraphStats | None:
        """Counters of the session's CUDA graphs; None where it records none.

        A session with graphs replays a pass whose shapes and resident addresses are those of an earlier one, so it pays
        to keep addresses the same by copies `before` and `after`.
        """

    def most_rows(self, name: str) -> int | None:
        """Most entries that the first axis of an input may have; None where no profile says.

        Raises:
            KeyError: if there is no such input.
        """

    def memory_pool(self, capacity_bytes: int) -> MemoryPool:
        """A new pool of which this session takes tensors. The caller closes it; it may outlive the session.

        Raises:
            EngineError: HSTU-E404 if the device has not that much memory free.
        """

    def close(self) -> None:
        """Free the runtime's memory. A second call does nothing."""

    def __enter__(self) -> Session:
        """Return the session."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the session."""


def open_session(
    runtime: str,
    *,
    onnx: Path | onnx.ModelProto | None = None,
    engine: Path | bytes | None = None,
    plugin_library: Path | None = None,
    taps: Sequence[str] = (),
    use_gpu: bool = False,
    allow_tf32: bool = True,
    cuda_graphs: int = 0,
    folder: Path | None = None,
) -> Session:
    """Load a model.

    Args:
        runtime: onnxruntime runs `onnx`; tensorrt and tensorrt-rtx run `engine`.
        onnx: graph or its file.
        engine: serialised engine or its file.
        plugin_library: plugin that the engine needs (tensorrt only).
        taps: intermediate values to give as further outputs (onnxruntime only).
        use_gpu: use ONNX Runtime's CUDA provider; the engines always use the GPU.
        allow_tf32: False for engines that were built without TF32: float32 ones, and those of --noTF32 (TensorRT-RTX
            only; see `tf32_override_off`).
        cuda_graphs: most CUDA graphs that are kept (tensorrt only; see `TensorRtSession`). None by default: who runs
            each shape once or twice, as a verification does, would pay for graphs and never launch one.
        folder: where the files of a graph's large tables are, if `onnx` is no file: its own folder otherwise.

    Raises:
        EngineError: HSTU-E401 if the runtime is absent or has no GPU; E404 if the model cannot be loaded.
        PluginError: HSTU-E503 if the engine asks for a plugin that no loaded library has.
        UsageError: HSTU-E901 for arguments that do not belong together.
    """
    if cuda_graphs and runtime == "onnxruntime":
        raise UsageError(
            "HSTU-E901",
            f"{runtime} keeps no CUDA graphs",
            f"cuda_graphs is {cuda_graphs}",
            "pass cuda_graphs=0, or use the runtime tensorrt",
        )
    if runtime == "onnxruntime":
        if onnx is None:
            raise _lacks(runtime, "a graph (model.onnx)")
        from hstu_compile.runtime.onnxruntime_session import OnnxRuntimeSession

        return OnnxRuntimeSession(onnx, taps=taps, use_gpu=use_gpu, folder=folder)
    if runtime not in RUNTIMES:
        raise EngineError(
            "HSTU-E401",
            f"there is no runtime {runtime!r}",
            f"{runtime!r} is not one of {', '.join(RUNTIMES)}",
            "choose one of these with --runtime",
        )
    if engine is None:
        raise _lacks(runtime, "an engine (model.engine)")
    if taps:
        raise UsageError(
            "HSTU-E901",
            f"{runtime} cannot show intermediate values",
            f"{', '.join(taps)} were fused away when the engine was built",
            "use --runtime onnxruntime",
        )
    from hstu_compile.runtime.tensorrt_session import TensorRtSession
    from hstu_compile.tensorrt_api import tensorrt_api

    return TensorRtSession(
        tensorrt_api(runtime),
        _engine_bytes(engine),
        plugin_library,
        allow_tf32=allow_tf32,
        cuda_graphs=cuda_graphs,
    )


def _lacks(runtime: str, what: str) -> UsageError:
    return UsageError(
        "HSTU-E901",
        f"the runtime {runtime} has nothing to run",
        f"it needs {what}, and none was given",
        "choose another --runtime, or build the bundle with an engine",
    )


def _engine_bytes(engine: Path | bytes) -> bytes:
    if isinstance(engine, bytes):
        return engine
    try:
        return engine.read_bytes()
    except OSError as error:
        raise EngineError(
            "HSTU-E404", f"the engine {engine} cannot be read", str(error), "check the path, or rebuild the engine"
        ) from error
