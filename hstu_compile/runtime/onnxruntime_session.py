"""Session on ONNX Runtime: the reference runtime, and the only one that shows intermediate values. Level 3."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from hstu_compile.artifacts import TensorSpec
from hstu_compile.errors import EngineError
from hstu_compile.rewrite.inline_native_body import InlineNativeBody
from hstu_compile.rewrite.spell_out_sigmoid import SpellOutSigmoid
from hstu_compile.rewrite.widen_bf16 import WidenBf16
from hstu_compile.runtime._host_session import HostSession
from hstu_compile.table_files import read_model

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
_TABLES_FOLDER = "session.model_external_initializers_file_folder_path"
#: 1.23.2 gives wrong predictions for ranking graphs, far beyond the bound; those up to 1.31 were not looked at.
_OLDEST = (1, 31)

_HALVES = frozenset({onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16})

#: Behind the name of a session that holds bfloat16 in float32: what ran is not quite what ships.
WIDENED = "bf16 widened to float32"
#: Likewise of one that computes the sigmoids of a float32 graph with exponentials.
SPELLED_OUT = "sigmoids by exp"


class OnnxRuntimeSession(HostSession):
    """A graph in ONNX Runtime, on CPU unless `use_gpu`.

    bfloat16 graphs are run by `WidenBf16`, because the CPU kernels have no bfloat16: the session's name says so,
    `inputs` and `outputs` say float32 where the graph says bfloat16, and `run` takes and gives float32. Resident
    tensors keep the graph's type, so that a cached row takes as many bytes here as in an engine; they are widened and
    narrowed on the way, which is exact.

    Sigmoids of float32 graphs are run by `SpellOutSigmoid` on a CPU, whose Sigmoid is less accurate than float32 can
    be, so that a session errs by what the graph does; the session's name says that too.

    Args:
        model: graph or file.
        taps: intermediate values to return besides the graph's outputs.
        use_gpu: use the CUDA provider, and nothing else.
        folder: where the files of the large tables are that a graph in memory names; a file's are beside it.

    Raises:
        EngineError: HSTU-E401 if ONNX Runtime or the provider is absent or too old, E404 if it cannot load the graph.
    """

    def __init__(
        self,
        model: Path | onnx.ModelProto,
        *,
        taps: Sequence[str] = (),
        use_gpu: bool = False,
        folder: Path | None = None,
    ) -> None:
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
        _require_version(onnxruntime.__version__)
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
        folder = model.parent if isinstance(model, Path) else folder
        if folder is not None:
            # ONNX Runtime maps the files into memory, and refuses what lies outside of the folder.
            options.add_session_config_entry(_TABLES_FOLDER, str(folder.absolute()))
        try:
            prepared, bfloat16_names, notes = _prepared(model, taps, spell_out=not use_gpu)
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
        self.name = f"onnxruntime {onnxruntime.__version__}" + "".join(f" ({note})" for note in notes)
        self.inputs = tuple(_spec(value) for value in self._session.get_inputs())
        self.outputs = tuple(_spec(value) for value in self._session.get_outputs())
        self.resident_inputs = tuple(_declared(spec, bfloat16_names) for spec in self.inputs)
        self.resident_outputs = tuple(_declared(spec, bfloat16_names) for spec in self.outputs)

    def execute(self, arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """See `HostSession.execute`."""
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


def _spec(value: Any) -> TensorSpec:
    shape = tuple("?" if size is None else size for size in value.shape)
    return TensorSpec(value.name, _DTYPES.get(value.type, value.type), shape)


def _declared(spec: TensorSpec, bfloat16_names: frozenset[str]) -> TensorSpec:
    """The spec as the graph declares it."""
    return dataclasses.replace(spec, dtype="bfloat16") if spec.name in bfloat16_names else spec


def _require_version(version: str) -> None:
    oldest = ".".join(map(str, _OLDEST))
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
        raise EngineError(
            "HSTU-E401",
            f"ONNX Runtime {version} is too old",
            f"it computes some of our graphs wrong; {oldest} is the oldest that was found right",
            f"pip install 'onnxruntime>={oldest}' (Python 3.11 or newer), or use an engine",
            {"runtime": "onnxruntime", "version": version, "oldest": oldest},
        )


def _prepared(
    model: Path | onnx.ModelProto, taps: Sequence[str], *, spell_out: bool
) -> tuple[bytes, frozenset[str], tuple[str, ...]]:
    """A copy with taps as outputs that ONNX Runtime computes well, what was bfloat16 at its ends, and what was changed.

    Args:
        model: graph or file.
        taps: intermediate values to return.
        spell_out: compute the sigmoids of a float32 graph with exponentials.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(read_model(model) if isinstance(model, Path) else model)
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
    narrow = frozenset(
        value.name
        for value in [*copy.graph.input, *copy.graph.output]
        if value.type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16
    )
    notes = []
    if WidenBf16().call(copy).modified:
        notes.append(WIDENED)
    elif spell_out and not _holds_halves(copy):
        InlineNativeBody().call(copy)
        if SpellOutSigmoid().call(copy).modified:
            notes.append(SPELLED_OUT)
    return bytes(copy.SerializeToString()), narrow, tuple(notes)


def _holds_halves(model: onnx.ModelProto) -> bool:
    """Whether the graph is of half precision: rounding to that hides how a Sigmoid is computed."""
    kinds = {value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)}
    return not _HALVES.isdisjoint(kinds | {tensor.data_type for tensor in model.graph.initializer})
