"""The doctor: what a model asks for, what is registered, what is missing and what to do."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
from onnx import TensorProto, helper

from hstu_compile import doctor
from hstu_compile.doctor import diagnose, render_doctor
from hstu_compile.errors import EngineError, PluginError
from hstu_compile.plugin_library import SELF_REGISTERING, VERSION_COMPATIBLE
from hstu_compile.tensorrt_api import PluginKey

KEY = PluginKey("HstuAttention", "1", "hstu")


def write_model(path: Path, *, with_namespace: bool = True, with_body: bool = False, nodes: int = 2) -> Path:
    """Write a model with attention nodes, one of them in a subgraph of an If."""
    identity = {"plugin_version": "1", "plugin_namespace": "hstu"} if with_namespace else {}

    def attention(name: str) -> onnx.NodeProto:
        return helper.make_node("HstuAttention", ["x"], [name], domain="hstu", **identity)

    info = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    branch_out = helper.make_tensor_value_info("inner", TensorProto.FLOAT, [1])
    branch = helper.make_graph([attention("inner")], "branch", [], [branch_out])
    condition = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    top = [attention(f"y{i}") for i in range(nodes - 1)]
    top.append(helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch))
    graph = helper.make_graph(top, "g", [info, condition], [helper.make_tensor_value_info("z", TensorProto.FLOAT, [1])])
    body = helper.make_function("hstu", "HstuAttention", ["x"], ["y"], [helper.make_node("Identity", ["x"], ["y"])], [])
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("hstu", 1)]
    model = helper.make_model(graph, opset_imports=imports, functions=[body] if with_body else [])
    onnx.save(model, str(path))
    return path


def write_library(cache: Path, version: str) -> Path:
    """Put a library into the cache as a build leaves it."""
    folder = cache / "plugins" / f"hash-{version}"
    folder.mkdir(parents=True)
    files = dict.fromkeys((SELF_REGISTERING, VERSION_COMPATIBLE), "0")
    for name in files:
        (folder / name).write_bytes(b"")
    (folder / "manifest.json").write_text(
        json.dumps({"trt_version": version, "archs": [90, 120], "hopper": {"variants": [{}, {}]}, "files": files})
    )
    return folder


def fake_tensorrt(monkeypatch: pytest.MonkeyPatch, version: str, *keys: PluginKey) -> None:
    """Stand in for an importable TensorRT with these creators."""
    api = SimpleNamespace(trt=SimpleNamespace(__version__=version), registered=lambda: list(keys))
    monkeypatch.setattr(doctor, "tensorrt_api", lambda _: api)


def no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for a machine without TensorRT."""

    def refuse(_: str) -> None:
        raise EngineError("HSTU-E401", "TensorRT", "import tensorrt: No module named 'tensorrt'", "install it")

    monkeypatch.setattr(doctor, "tensorrt_api", refuse)


def test_a_registered_plugin_leaves_nothing_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tensorrt(monkeypatch, "10.14.1", KEY, PluginKey("NMS", "1", ""))
    report = diagnose(write_model(tmp_path / "m.onnx"), cache_dir=tmp_path)
    assert report.findings == ()
    (asked,) = report.requested
    assert (asked.key, asked.num_nodes) == (KEY, 3), "nodes of both branches of the If count"
    assert "nothing is missing" in render_doctor(report)


def test_a_bundle_is_read_through_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tensorrt(monkeypatch, "10.14.1", KEY)
    write_model(tmp_path / "model.onnx")
    assert diagnose(tmp_path, cache_dir=tmp_path).model == tmp_path / "model.onnx"


def test_a_missing_creator_names_the_built_library_of_this_tensorrt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_tensorrt(monkeypatch, "10.14.1", PluginKey("NMS", "1", ""))
    write_library(tmp_path, "11.1.0")
    fitting = write_library(tmp_path, "10.3.0")
    (finding,) = diagnose(write_model(tmp_path / "m.onnx"), cache_dir=tmp_path).findings
    assert "no creator of that name is registered" in finding.what
    assert str(fitting / SELF_REGISTERING) in finding.fix


def test_without_a_fitting_library_the_fix_is_to_build_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tensorrt(monkeypatch, "8.5.3.1")
    write_library(tmp_path, "10.3.0")
    (finding,) = diagnose(write_model(tmp_path / "m.onnx"), cache_dir=tmp_path).findings
    assert "hstu-compile plugin build (nothing in the cache is for TensorRT 8)" in finding.fix


def test_a_creator_in_another_namespace_is_shown_beside_the_wanted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_tensorrt(monkeypatch, "10.14.1", PluginKey("HstuAttention", "1", ""))
    (finding,) = diagnose(write_model(tmp_path / "m.onnx"), cache_dir=tmp_path).findings
    assert "namespace 'hstu'" in finding.what
    assert "registered under that name: (name 'HstuAttention', version '1', namespace '')" in finding.what


def test_a_node_without_the_namespace_attribute_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tensorrt(monkeypatch, "10.14.1", KEY)
    (finding,) = diagnose(write_model(tmp_path / "m.onnx", with_namespace=False), cache_dir=tmp_path).findings
    assert "3 HstuAttention node(s) have no plugin_namespace attribute" in finding.what


@pytest.mark.parametrize("with_body", [False, True])
def test_without_tensorrt_the_native_body_is_offered_if_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, with_body: bool
) -> None:
    no_tensorrt(monkeypatch)
    report = diagnose(write_model(tmp_path / "m.onnx", with_body=with_body), cache_dir=tmp_path)
    (finding,) = report.findings
    assert "No module named 'tensorrt'" in finding.what
    assert ("native body" in finding.fix) is with_body
    assert "not importable" in render_doctor(report)


def test_the_machine_alone_can_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_tensorrt(monkeypatch)
    built = write_library(tmp_path, "10.14.1")
    (tmp_path / "plugins" / "half").mkdir()
    (tmp_path / "plugins" / "half" / "manifest.json").write_text("{")
    report = diagnose(cache_dir=tmp_path)
    assert report.findings == ()
    assert [library.folder for library in report.built] == [built]
    text = render_doctor(report)
    assert "sm_90, sm_120  2 Hopper kernels" in text
    for loader in ("polygraphy", "--staticPlugins", "--dynamicPlugins", "Triton", "loadLibrary"):
        assert loader in text


@pytest.mark.parametrize("is_found", [True, False])
def test_it_says_whether_the_hopper_kernels_can_be_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_found: bool
) -> None:
    def usable_nvcc() -> tuple[Path, tuple[int, int]]:
        if not is_found:
            raise RuntimeError("none was found. Fix: install one")
        return Path("/opt/nvcc"), (13, 0)

    no_tensorrt(monkeypatch)
    monkeypatch.setattr(doctor, "usable_nvcc", usable_nvcc)
    expected = "13.0, /opt/nvcc" if is_found else "not usable: none was found. Fix: install one"
    report = diagnose(cache_dir=tmp_path)
    assert report.nvcc == expected
    assert expected in render_doctor(report)
    assert report.findings == (), "a library without Hopper kernels is a slower one, not a broken one"


def test_what_cannot_be_read_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="is not a file"):
        diagnose(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"\xff" * 10)
    with pytest.raises(PluginError, match="not an ONNX file"):
        diagnose(tmp_path / "model.onnx")
