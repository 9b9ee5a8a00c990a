"""TritonPythonModel in front of a stand-in for the backend's utilities; the real ones are used by tests/triton."""

from __future__ import annotations

import importlib
import json
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from hstu_compile.errors import EngineError, RequestError


class TritonError:
    """What a response says."""

    INVALID_ARG, INTERNAL = "invalid", "internal"

    def __init__(self, message: str, code: str) -> None:
        self.message, self.code = message, code


class Response:
    """A response of the backend."""

    def __init__(self, output_tensors: list[Any] | None = None, error: TritonError | None = None) -> None:
        self.tensors, self.error = output_tensors, error


class Tensor:
    """A tensor of the backend; `mistaken` is a backend that does not know NumPy's layout."""

    mistaken = False

    def __init__(self, name: str, array: Any) -> None:
        self.name, self.array = name, array

    @classmethod
    def from_dlpack(cls, name: str, array: Any) -> Tensor:
        return cls(name, np.full_like(array, array[0]) if cls.mistaken else array)

    def as_numpy(self) -> Any:
        return self.array


class ModelError(Exception):
    """What ends the loading of a model."""


class Guard:
    """What watches the process; the tests' own needs no watching."""

    made: ClassVar[list[tuple[str, bool]]] = []
    released = 0

    @classmethod
    def of_this_process(cls, model: str, stop_server: bool) -> Guard:
        cls.made.append((model, stop_server))
        return cls()

    def release(self) -> None:
        Guard.released += 1


@pytest.fixture
def model_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """hstu_compile.serving.triton_model over the stand-in."""
    utilities: Any = types.ModuleType("triton_python_backend_utils")
    utilities.TritonError, utilities.InferenceResponse, utilities.Tensor = TritonError, Response, Tensor
    utilities.TritonModelException = ModelError
    utilities.get_input_tensor_by_name = lambda request, name: request.get(name)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utilities)
    monkeypatch.delitem(sys.modules, "hstu_compile.serving.triton_model", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    module = importlib.import_module("hstu_compile.serving.triton_model")
    monkeypatch.setattr(module, "ProcessGuard", Guard)
    yield module
    sys.modules.pop("hstu_compile.serving.triton_model", None)


class Answers:
    """An answerer that answers what it is told to."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.closed = False

    def answer(self, requests: Any) -> list[Any]:
        self.asked = list(requests)
        return [
            {"y": np.array([[1.0]])},
            RequestError("HSTU-E703", "the request has 1 fault", "x outside", "none"),
            EngineError("HSTU-E404", "the runtime failed", "out of memory", "none"),
        ][: len(requests)]

    def close(self) -> None:
        self.closed = True


def arguments(kind: str = "CPU", **parameters: str) -> dict[str, str]:
    config = {
        "input": [{"name": "x"}, {"name": "user_key"}],
        "parameters": {name: {"string_value": value} for name, value in parameters.items()},
    }
    return {
        "model_config": json.dumps(config),
        "model_name": "m",
        "model_repository": "/models/m",
        "model_version": "3",
        "model_instance_kind": kind,
        "model_instance_device_id": "2",
    }


def test_requests_become_arrays_and_answers_responses(model_module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    answers = Answers()
    monkeypatch.setattr(model_module, "open_answerer", lambda *each: opened.append(each) or answers)
    model = model_module.TritonPythonModel()
    model.initialize(arguments(hstu_kv_budget_mib="3"))
    ((bundle, settings),) = opened
    assert (bundle, settings.kv_budget_mib) == (Path("/models/m/3/bundle"), 3)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"
    given = [{"x": Tensor("x", np.array([[1]]))}, {"x": Tensor("x", np.array([[2]])), "user_key": Tensor("k", 7)}, {}]
    good, wrong, failed = model.execute(given)
    assert [set(each) for each in answers.asked] == [{"x"}, {"x", "user_key"}, set()]
    assert [(each.name, each.array.tolist()) for each in good.tensors] == [("y", [[1.0]])]
    assert (wrong.error.code, failed.error.code) == ("invalid", "internal")
    assert wrong.error.message.startswith("error[HSTU-E703] request:")
    assert Guard.made[-1] == ("m", False)
    released = Guard.released
    model.finalize()
    assert answers.closed
    assert Guard.released == released + 1


def test_the_check_opens_the_manifest_beside_it(model_module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    monkeypatch.setattr(model_module, "open_checker", lambda *each: opened.append(each) or Answers())
    model = model_module.TritonCheckModel()
    model.initialize(arguments(hstu_truncation="keep_last"))
    ((folder, settings),) = opened
    assert (folder, settings.truncation) == (Path("/models/m/3"), "keep_last")
    (good,) = model.execute([{"x": Tensor("x", np.array([[1]]))}])
    assert [each.name for each in good.tensors] == ["y"]


def test_the_process_is_watched_as_the_configuration_says_and_only_if_the_model_was_opened(
    model_module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = len(Guard.made)
    with pytest.raises(ModelError):
        model_module.TritonPythonModel().initialize(arguments())
    assert len(Guard.made) == made
    monkeypatch.setattr(model_module, "open_answerer", lambda *each: Answers())
    model_module.TritonPythonModel().initialize(arguments(hstu_lost_process="stop_server"))
    assert Guard.made[made:] == [("m", True)]


def test_an_instance_on_a_gpu_sees_that_one_alone(model_module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "open_answerer", lambda *each: Answers())
    model_module.TritonPythonModel().initialize(arguments("GPU"))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2"


def test_what_cannot_be_opened_is_the_reason_why_the_model_is_not_loaded(model_module: Any) -> None:
    with pytest.raises(ModelError, match=r"(?s)HSTU-E803.*/models/m/3/bundle is not a bundle"):
        model_module.TritonPythonModel().initialize(arguments())
    with pytest.raises(ModelError, match=r"(?s)HSTU-E901.*hstu_typo"):
        model_module.TritonPythonModel().initialize(arguments(hstu_typo="1"))


@pytest.mark.parametrize(("version", "mistaken", "refused"), [("2.3.5", True, True), ("2.3.5", False, False)])
def test_a_backend_that_does_not_know_this_numpy_is_refused(
    model_module: Any, monkeypatch: pytest.MonkeyPatch, version: str, mistaken: bool, refused: bool
) -> None:
    monkeypatch.setattr(model_module, "open_answerer", lambda *each: Answers())
    monkeypatch.setattr(Tensor, "mistaken", mistaken)
    monkeypatch.setattr(model_module.np, "__version__", version)
    model = model_module.TritonPythonModel()
    if refused:
        with pytest.raises(ModelError, match=r"(?s)HSTU-E401.*\[0, 0, 0\] of \[0, 1, 2\].*numpy<2"):
            model.initialize(arguments())
    else:
        model.initialize(arguments())


def test_numpy_1_is_not_tried(model_module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under NumPy 1 the attempt itself ends the backend's process: its capsules have another name there."""
    monkeypatch.setattr(model_module, "open_answerer", lambda *each: Answers())
    monkeypatch.setattr(Tensor, "mistaken", True)
    monkeypatch.setattr(model_module.np, "__version__", "1.26.4")
    model_module.TritonPythonModel().initialize(arguments())
