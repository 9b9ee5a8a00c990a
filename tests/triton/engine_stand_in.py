"""What stands in for a TensorRT engine in a server without that backend: ONNX Runtime, fed as the backend feeds.

Triton's Python backend runs `TritonPythonModel`; `stand_in` puts it in the place of a model of the TensorRT backend.
Inputs, outputs, batches and how requests are joined are those of the TensorRT model's own configuration. No request is
looked at: what is wrong with one falls upon the batch, as it does in the TensorRT backend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from hstu_compile.graph_facts import tensor_specs
from hstu_compile.runtime.session import open_session
from tests.triton.ragged_backend import RaggedBackend, parse_config

ROOT = Path(__file__).resolve().parents[2]
_ENGINE_CONFIG = "tensorrt_config.pbtxt"
_MODEL_PY = f"""import sys

sys.path.insert(0, {str(ROOT)!r})
from tests.triton.engine_stand_in import TritonPythonModel
"""


def stand_in(model: Path) -> None:
    """Make a model of the TensorRT backend one of the Python backend: another backend, on a CPU, and nothing else.

    Args:
        model: the model's folder, with its graph.
    """
    from google.protobuf import text_format

    config_file = model / "config.pbtxt"
    config = parse_config(config_file)
    config_file.rename(model / _ENGINE_CONFIG)
    assert config.backend == "tensorrt"
    config.backend, config.default_model_filename = "python", "model.py"
    # The server makes neither for the Python backend; the stand-in makes both by the file that it keeps.
    config.ClearField("batch_input")
    config.ClearField("batch_output")
    (group,) = config.instance_group
    group.ClearField("profile")
    group.kind = group.KIND_CPU
    config_file.write_text(text_format.MessageToString(config), encoding="utf-8")
    (model / "1" / "model.py").write_text(_MODEL_PY, encoding="utf-8")


class TritonPythonModel:
    """Runs the graph on all requests of a batch at once."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the graph."""
        folder = Path(args["model_repository"])
        graph = onnx.load(str(folder / "model.onnx"))
        config = parse_config(folder / _ENGINE_CONFIG)
        self._names = [each.name for each in config.input]
        self._backend = RaggedBackend(config, tensor_specs(graph.graph.input), tensor_specs(graph.graph.output))
        self._session = open_session("onnxruntime", onnx=folder / "model.onnx")

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer a batch."""
        import triton_python_backend_utils as pb_utils

        arrays = [
            {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy().reshape(-1) for name in self._names}
            for request in requests
        ]
        outputs = self._session.run(self._backend.engine_feeds(arrays))
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor(name, value) for name, value in answer.items()])
            for answer in self._backend.responses(outputs, arrays)
        ]

    def finalize(self) -> None:
        """Free the runtime."""
        self._session.close()
