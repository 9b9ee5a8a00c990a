"""What Triton's Python backend calls, one process per instance. Level 5; no torch.

`triton_python_backend_utils` exists only inside that process, so nothing else imports this module.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from hstu_compile.errors import EngineError, HstuCompileError, RequestError
from hstu_compile.serving.answering import Answer, Answerer, open_answerer
from hstu_compile.serving.checking import open_checker
from hstu_compile.serving.process_guard import ProcessGuard
from hstu_compile.serving.settings import RuntimeSettings

BUNDLE_FOLDER = "bundle"


class TritonPythonModel:
    """Serves the bundle in the folder `bundle` of the model's version."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the bundle.

        Args:
            args: the backend's: the configuration, the model's folder and version, the kind and number of the device.

        Raises:
            pb_utils.TritonModelException: with the message of whatever refused; the server shows it as the reason why
                the model is not loaded.
        """
        _check_numpy()
        config = json.loads(args["model_config"])
        parameters = {name: entry["string_value"] for name, entry in config["parameters"].items()}
        self._inputs = [each["name"] for each in config["input"]]
        version = Path(args["model_repository"]) / args["model_version"]
        if args["model_instance_kind"] == "GPU":
            # This process serves one instance, and the runtime takes the first GPU that it sees.
            os.environ["CUDA_VISIBLE_DEVICES"] = args["model_instance_device_id"]
        try:
            settings = RuntimeSettings.from_parameters(parameters)
            self._answerer = self._opened(version, settings)
        except HstuCompileError as error:
            raise pb_utils.TritonModelException(str(error)) from error
        # Last: a model that is not loaded ends its process without being asked to.
        self._guard = ProcessGuard.of_this_process(args["model_name"], settings.lost_process == "stop_server")

    def _opened(self, version: Path, settings: RuntimeSettings) -> Answerer[Any]:
        return open_answerer(version / BUNDLE_FOLDER, settings)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer a batch of requests in one pass; what is wrong with one is that one's error alone."""
        answers = self._answerer.answer([self._arrays(request) for request in requests])
        return [_response(answer) for answer in answers]

    def finalize(self) -> None:
        """Free the runtime."""
        self._guard.release()
        self._answerer.close()

    def _arrays(self, request: Any) -> dict[str, NDArray[Any]]:
        tensors = {name: pb_utils.get_input_tensor_by_name(request, name) for name in self._inputs}
        return {name: tensor.as_numpy() for name, tensor in tensors.items() if tensor is not None}


class TritonCheckModel(TritonPythonModel):
    """Checks requests for an engine; the folder of the model's version has the manifest of the engine's bundle."""

    def _opened(self, version: Path, settings: RuntimeSettings) -> Answerer[Any]:
        return open_checker(version, settings)


def _check_numpy() -> None:
    """Refuse a Python backend that does not know the layout of the NumPy that it found.

    One built against NumPy 1 reads the size of an element from where NumPy 2 has something else. Every tensor then
    holds its first value as often as it is long, with no error from anyone. An array that goes through the backend
    shows it.

    Raises:
        pb_utils.TritonModelException: with HSTU-E401.
    """
    if int(np.__version__.split(".")[0]) < 2:
        return
    given = np.arange(3, dtype=np.int32)
    received = pb_utils.Tensor.from_dlpack("probe", given).as_numpy()
    if not np.array_equal(given, received):
        raise pb_utils.TritonModelException(
            str(
                EngineError(
                    "HSTU-E401",
                    "this tritonserver's Python backend does not work with the NumPy that it found",
                    f"with NumPy {np.__version__} it makes {received.tolist()} of {given.tolist()}: it was built "
                    "against NumPy 1",
                    "pip install 'numpy<2' into the Python that the backend uses, or take a newer tritonserver",
                    {"numpy": np.__version__},
                )
            )
        )


def _response(answer: Answer) -> Any:
    if isinstance(answer, HstuCompileError):
        code = pb_utils.TritonError.INVALID_ARG if isinstance(answer, RequestError) else pb_utils.TritonError.INTERNAL
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(answer), code))
    return pb_utils.InferenceResponse(
        [pb_utils.Tensor(name, np.ascontiguousarray(value)) for name, value in answer.items()]
    )
