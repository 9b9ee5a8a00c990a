"""The environment report and the choice of a backend."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest

from hstu_compile.environment import choose_backend, collect_environment, gpu_name, import_backend, render_environment
from hstu_compile.errors import EngineError


def loader(*present: str) -> object:
    def load(name: str) -> ModuleType:
        if name in present:
            return ModuleType(name)
        raise EngineError("HSTU-E401", f"{name} is absent", f"no module for {name}", "install it")

    return load


@pytest.mark.parametrize(
    ("present", "gpu", "name", "reason"),
    [
        (("tensorrt", "tensorrt-rtx"), True, "tensorrt", "a GPU is visible"),
        (("tensorrt", "tensorrt-rtx"), False, "tensorrt-rtx", "no GPU is visible"),
        (("tensorrt-rtx",), True, "tensorrt-rtx", "TensorRT is absent"),
        (("tensorrt",), False, "onnx", "TensorRT-RTX is absent"),
        ((), False, "onnx", "TensorRT is absent"),
    ],
)
def test_auto(present: tuple[str, ...], gpu: bool, name: str, reason: str) -> None:
    choice = choose_backend("auto", load=loader(*present), has_gpu=lambda: gpu)  # type: ignore[arg-type]
    assert choice.name == name
    assert reason in choice.reason


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_a_named_backend_is_never_replaced(name: str) -> None:
    with pytest.raises(EngineError, match=f"{name} is absent") as caught:
        choose_backend(name, load=loader(), has_gpu=lambda: True)  # type: ignore[arg-type]
    assert caught.value.code == "HSTU-E401"
    assert choose_backend(name, load=loader(name), has_gpu=lambda: True).name == name  # type: ignore[arg-type]


def test_tensorrt_without_a_gpu_is_refused() -> None:
    with pytest.raises(EngineError, match="no GPU is visible"):
        choose_backend("tensorrt", load=loader("tensorrt"), has_gpu=lambda: False)  # type: ignore[arg-type]


def test_no_engine_and_no_such_backend() -> None:
    assert choose_backend("onnx").name == "onnx"
    with pytest.raises(EngineError, match="'openvino' is not one of auto"):
        choose_backend("openvino")


def test_an_absent_module_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineError, match="import tensorrt") as caught:
        import_backend("tensorrt")
    assert "pip install" in caught.value.fix


def test_a_module_without_a_builder_is_not_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))
    with pytest.raises(EngineError, match="no engine builder"):
        import_backend("tensorrt")


def test_the_report_is_json_and_text() -> None:
    facts = collect_environment()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["packages"]["numpy"]
    assert facts["cpu"]["cores"] >= 1
    text = render_environment(facts)
    assert f"python: {facts['python']}" in text
    assert f"  numpy: {facts['packages']['numpy']}" in text


def test_the_report_survives_a_broken_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hstu_compile.environment.shutil.which", lambda *a, **k: "/nonexistent/nvidia-smi")
    facts = collect_environment()
    assert "FileNotFoundError" in facts["gpus"]["error"]
    assert "error: FileNotFoundError" in render_environment(facts)


def test_only_the_standard_library_is_imported() -> None:
    script = (
        "import sys; import hstu_compile.environment as e; e.collect_environment();"
        "print([m for m in ('numpy', 'onnx', 'torch', 'click', 'tensorrt_rtx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("device", "name"), [(0, "A GPU"), (101, None)])
def test_the_gpu_that_sessions_use_has_a_name(monkeypatch: pytest.MonkeyPatch, device: int, name: str | None) -> None:
    def write(text: ctypes.Array[ctypes.c_char], size: int, ordinal: object) -> int:
        text.value = b"A GPU"[:size]
        return 0

    driver = SimpleNamespace(cuInit=lambda flags: 0, cuDeviceGet=lambda *_: device, cuDeviceGetName=write)
    monkeypatch.setattr(ctypes, "CDLL", lambda library: driver)
    assert gpu_name() == name


def test_without_a_driver_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(library: str) -> None:
        raise OSError(f"{library}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert gpu_name() is None
