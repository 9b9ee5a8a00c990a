"""Session on ONNX Runtime: the reference runtime, and the only one that shows intermediate values. Level 3."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from hstu_compile.artifacts import TensorSpec
from hstu_compile.errors import EngineError
from hstu_compile.rewrite.widen_bf16 import WidenBf16
from hstu_compile.runtime._feeds import matched_feeds

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(double)": "float64",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}
_ERRORS_ONLY = 3


class OnnxRuntimeSession:
    """A graph in ONNX Runtime, on CPU unless `use_gpu`.

    bfloat16 graphs are run by `WidenBf16`, because the CPU kernels have no bfloat16; bfloat16 taps come out as float32.

    Args:
        model: graph or file.
        taps: intermediate values to return besides the graph's outputs.
        use_gpu: use the CUDA provider, and nothing else.

    Raises:
        EngineError: HSTU-E401 if ONNX Runtime or the provider is absent, E404 if it cannot load the graph.
    """

    def __init__(self, model: Path | onnx.ModelProto, *, taps: Sequence[str] = (), use_gpu: bool = False) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise EngineError(
                "HSTU-E401",
                "ONNX Runtime cannot be imported",
                str(error),
                "pip install 'hstu-compile[cpu]'",
                {"runtime": "onnxruntime"},
            ) from error
        provider = "CUDAExecutionProvider" if use_gpu else "CPUExecutionProvider"
        if provider not in onnxruntime.get_available_providers():
            raise EngineError(
                "HSTU-E401",
                f"ONNX Runtime has no {provider}",
                f"available: {', '.join(onnxruntime.get_available_providers())}",
                "pip install onnxruntime-gpu in place of onnxruntime",
            )
        options = onnxruntime.SessionOptions()
        options.use_deterministic_compute = True
        options.log_severity_level = _ERRORS_ONLY
        try:
            prepared = _prepared(model, taps)
            self._session: Any = onnxruntime.InferenceSession(prepared, options, providers=[provider])
        except EngineError:
            raise
        except Exception as error:  # protobuf and ONNX Runtime raise types of their own
            raise EngineError(
                "HSTU-E404",
                "ONNX Runtime cannot load the graph",
                f"{type(error).__name__}: {error}",
                "check the file with `hstu-compile inspect`, and the versions with `hstu-compile env`",
            ) from error
        if use_gpu and provider not in self._session.get_providers():
            raise EngineError(
                "HSTU-E401",
                f"ONNX Runtime could not start {provider}",
                f"it fell back to {', '.join(self._session.get_providers())}",
                "check CUDA and cuDNN with `hstu-compile env`, or leave the GPU out",
            )
        self._lock = threading.Lock()
        self.name = f"onnxruntime {onnxruntime.__version__}"
        self.inputs = tuple(_spec(value) for value in self._session.get_inputs())
        self.outputs = tuple(_spec(value) for value in self._session.get_outputs())

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """See `Session.run`."""
        arrays = matched_feeds(feeds, self.inputs)
        with self._lock:
            if self._session is None:
                raise RuntimeError("the session is closed")
            try:
                results = self._session.run(None, arrays)
            except Exception as error:  # ONNX Runtime raises types of its own
                raise EngineError(
                    "HSTU-E404",
                    "ONNX Runtime failed while running the graph",
                    f"{type(error).__name__}: {error}",
                    "check the request with `hstu-compile run`, which names illegal values",
                ) from error
        return {spec.name: np.asarray(result) for spec, result in zip(self.outputs, results, strict=True)}

    def close(self) -> None:
        """See `Session.close`."""
        with self._lock:
            self._session = None

    def __enter__(self) -> OnnxRuntimeSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _spec(value: Any) -> TensorSpec:
    shape = tuple("?" if size is None else size for size in value.shape)
    return TensorSpec(value.name, _DTYPES.get(value.type, value.type), shape)


def _prepared(model: Path | onnx.ModelProto, taps: Sequence[str]) -> bytes:
    """The graph as it is run: a copy with taps as outputs, bfloat16 widened."""
    copy = onnx.ModelProto()
    copy.CopyFrom(onnx.load(str(model)) if isinstance(model, Path) else model)
    present = {value.name for value in copy.graph.output}
    produced = {name for node in copy.graph.node for name in node.output}
    if absent := [name for name in taps if name not in produced | present]:
        raise EngineError(
            "HSTU-E404",
            "the graph has no such intermediate values",
            f"{', '.join(absent)} are not computed by any node",
            "use the names layer_0 .. layer_n of a graph that hstu-compile exported",
            {"missing": absent},
        )
    types = {value.name: value for value in onnx.shape_inference.infer_shapes(copy).graph.value_info}
    for name in taps:
        if name not in present:
            copy.graph.output.append(types.get(name, onnx.ValueInfoProto(name=name)))
    WidenBf16().call(copy)
    return bytes(copy.SerializeToString())
