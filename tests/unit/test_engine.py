"""The engine stage: real TensorRT-RTX builds on CPU, refusals, and what it may import."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from hstu_compile.artifacts import Profile
from hstu_compile.engine import engine_from_onnx, graph_precision, layer_kind, plugin_key, plugin_nodes
from hstu_compile.errors import EngineError, UsageError
from hstu_compile.profiles import ProfileSizes
from hstu_compile.tensorrt_api import PluginKey
from hstu_compile.trt_options import EngineOptions
from tests.exported_models import MAX_SEQ_LEN, NUM_LAYERS, TOP_K, exported_graph, retrieval_profile

RTX = pytest.mark.skipif(
    subprocess.run([sys.executable, "-c", "import tensorrt_rtx"], capture_output=True, check=False).returncode != 0,
    reason="tensorrt_rtx is not installed",
)
PROFILES = retrieval_profile(ProfileSizes(4, MAX_SEQ_LEN))


def add_model(op_type: str = "Add", domain: str = "") -> onnx.ModelProto:
    """One node: x + x, or another operator of two inputs."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node(op_type, ["x", "x"], ["y"], name="the_node", domain=domain)],
        "g",
        [value("x", TensorProto.FLOAT, ["L"])],
        [value("y", TensorProto.FLOAT, ["L"])],
    )
    opsets = [helper.make_opsetid("", 20), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def profile(low: int = 1, typical: int = 4, high: int = 8, name: str = "x") -> list[Profile]:
    return [Profile("p", {name: (low,)}, {name: (typical,)}, {name: (high,)})]


@RTX
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_model_builds_on_cpu_in_its_own_precision(precision: Any) -> None:
    model = exported_graph(precision, top_k=TOP_K)
    before = model.SerializeToString()
    artifact = engine_from_onnx(model, backend="tensorrt-rtx", profiles=PROFILES)
    assert model.SerializeToString() == before
    assert len(artifact.plan) > 100_000
    assert artifact.backend == "tensorrt-rtx"
    assert artifact.compute_capabilities == ()
    assert artifact.layers["plugin"] == 0
    assert artifact.layers["total"] == sum(artifact.layers[k] for k in ("plugin", "fp32", "fp16", "bf16", "other"))
    others = {"fp16", "bf16"} - {precision}
    assert all(artifact.layers[other] == 0 for other in others)
    assert artifact.layers[precision] > 0


@RTX
def test_progress_is_reported_and_an_error_in_it_stops_the_build() -> None:
    seen: list[tuple[str, float]] = []
    engine_from_onnx(
        add_model(), backend="tensorrt-rtx", profiles=profile(), on_progress=lambda *step: seen.append(step)
    )
    assert seen
    assert all(0 < fraction <= 1 for _, fraction in seen)

    def stop(phase: str, fraction: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine_from_onnx(add_model(), backend="tensorrt-rtx", profiles=profile(), on_progress=stop)


@RTX
def test_targets_and_an_unknown_target() -> None:
    options = EngineOptions(compute_capabilities=("8.6", "8.9"))
    artifact = engine_from_onnx(add_model(), backend="tensorrt-rtx", profiles=profile(), options=options)
    assert artifact.compute_capabilities == ("8.6", "8.9")
    with pytest.raises(UsageError, match="SM70 cannot be used") as caught:
        engine_from_onnx(
            add_model(),
            backend="tensorrt-rtx",
            profiles=profile(),
            options=EngineOptions(compute_capabilities=("7.0",)),
        )
    assert "SM89" in caught.value.why


@RTX
def test_builder_settings_are_taken_from_the_options() -> None:
    options = EngineOptions(
        builder_optimization_level=1,
        max_aux_streams=0,
        memory_pools=(("workspace", 2**26),),
        profiling_verbosity="layer_names_only",
        no_tf32=True,
    )
    artifact = engine_from_onnx(add_model(), backend="tensorrt-rtx", profiles=profile(), options=options)
    assert artifact.plan


@RTX
def test_rtx_has_no_timing_cache(tmp_path: Path) -> None:
    options = EngineOptions(timing_cache=tmp_path / "t.cache")
    with pytest.raises(UsageError, match="--timingCacheFile cannot be used"):
        engine_from_onnx(add_model(), backend="tensorrt-rtx", profiles=profile(), options=options)
    assert list(tmp_path.iterdir()) == []


@RTX
@pytest.mark.parametrize(
    ("profiles", "why"),
    [
        (profile(name="z"), "z is not an input; x .* has dynamic sizes and no range"),
        ([Profile("p", {"x": (1, 1)}, {"x": (1, 1)}, {"x": (1, 1)})], r"its min shape \[1, 1\] does not fit"),
    ],
)
def test_a_profile_that_does_not_fit_names_the_inputs(profiles: list[Profile], why: str) -> None:
    with pytest.raises(EngineError, match=why) as caught:
        engine_from_onnx(add_model(), backend="tensorrt-rtx", profiles=profiles)
    assert caught.value.code == "HSTU-E405"
    assert "Inputs: x [-1]" in caught.value.why


@RTX
def test_a_build_that_fails_for_want_of_memory_names_the_limit_that_was_set() -> None:
    options = EngineOptions(memory_pools=(("workspace", 0),))
    with pytest.raises(EngineError, match="could not build the engine") as caught:
        engine_from_onnx(add_model(), backend="tensorrt-rtx", profiles=profile(), options=options)
    assert caught.value.code == "HSTU-E402"
    assert "--memPoolSize limits workspace to 0 bytes" in caught.value.fix


@RTX
def test_what_the_parser_refuses_is_named_with_its_node() -> None:
    with pytest.raises(EngineError, match="the_node") as caught:
        engine_from_onnx(add_model("NotAnOperator"), backend="tensorrt-rtx", profiles=profile())
    assert caught.value.code == "HSTU-E402"
    assert caught.value.context["parser_errors"]


@RTX
def test_rtx_never_loads_a_plugin_and_needs_a_native_body(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="TensorRT-RTX takes no plugins"):
        engine_from_onnx(add_model(), backend="tensorrt-rtx", profiles=profile(), plugin_library=tmp_path / "absent.so")
    bare = exported_graph("fp32", top_k=TOP_K)
    del bare.functions[:]
    with pytest.raises(EngineError, match="has no native body") as caught:
        engine_from_onnx(bare, backend="tensorrt-rtx", profiles=PROFILES)
    assert len(caught.value.context["nodes"]) == 3 * NUM_LAYERS


def test_a_file_that_is_not_onnx_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x00garbage")
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(EngineError, match=r"model\.onnx cannot be read as ONNX"):
        engine_from_onnx(path, backend="tensorrt-rtx", profiles=profile())


def test_the_plugin_key_is_what_the_node_says() -> None:
    nodes = plugin_nodes(exported_graph("fp16", top_k=TOP_K))
    keys = Counter(plugin_key(node) for node in nodes)
    assert keys == {
        PluginKey("HstuAttention", "1", "hstu"): NUM_LAYERS,
        PluginKey("HstuNorm", "1", "hstu"): 2 * NUM_LAYERS,
    }
    assert plugin_key(add_model("Op", "space").graph.node[0]) == PluginKey("Op", "1", "space")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_precision_is_read_off_the_weights(precision: Any) -> None:
    assert graph_precision(exported_graph(precision, top_k=TOP_K)) == precision


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        ({"LayerType": "PluginV2", "Outputs": []}, "plugin"),
        ({"LayerType": "PluginV3", "Outputs": [{"Format/Datatype": "Row major linear FP16 format"}]}, "plugin"),
        ({"LayerType": "gemm", "Outputs": [{"Format/Datatype": "Row major linear FP16 format"}]}, "fp16"),
        ({"LayerType": "kgen", "Outputs": [{"Format": "Row major", "Datatype": "Float"}]}, "fp32"),
        ({"LayerType": "gemm", "Outputs": [{"Format/Datatype": "Row major linear BFloat16 format"}]}, "bf16"),
        ({"LayerType": "shape", "Outputs": [{"Format/Datatype": "Row major Int32 format"}]}, "other"),
        ({"LayerType": "none"}, "other"),
        ("node_hstu_attention_1", "plugin"),
        ("node_matmul", "other"),
    ],
)
def test_inspector_entries_are_classified(layer: Any, kind: str) -> None:
    assert layer_kind(layer, {"node_hstu_attention_1"}) == kind


def test_the_stage_imports_and_lowers_without_torch(tmp_path: Path) -> None:
    """The engine stage runs beside TensorRT 8.5 where torch and the exporter are not installed."""
    path = tmp_path / "model.onnx"
    onnx.save(exported_graph("fp16", top_k=TOP_K), path)
    script = """
import importlib.abc, json, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "onnxscript", "onnx_ir", "onnxruntime", "triton"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
import onnx
import hstu_compile.engine, hstu_compile.profiles, hstu_compile.trt_options, hstu_compile.environment
import hstu_compile.runtime.request, hstu_compile.runtime.session, hstu_compile.runtime.tensorrt_session
from hstu_compile.rewrite.lower_tensorrt8 import lowered_for_tensorrt8
counts = []
for native in (False, True):
    model, _ = lowered_for_tensorrt8(onnx.load(sys.argv[1]), "fp16", native=native)
    counts.append(sum(node.op_type == "HstuAttention" for node in model.graph.node))
print(json.dumps(counts))
"""
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [NUM_LAYERS, 0]
