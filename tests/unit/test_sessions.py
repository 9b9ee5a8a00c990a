"""Sessions: ONNX Runtime for real; TensorRT's half of the work is played by a stand-in that computes with NumPy."""

from __future__ import annotations

import itertools
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper

from hstu_compile.artifacts import Precision
from hstu_compile.errors import EngineError, PluginError, RequestError, UsageError
from hstu_compile.runtime._cuda import CudaDriver, DeviceBuffers
from hstu_compile.runtime.session import open_session
from hstu_compile.tensorrt_api import tf32_override_off
from tests.exported_models import TAPS, TOP_K, exported_graph, request_batch, research_model
from tests.fake_cuda import FakeCuda
from tests.fake_tensorrt import open_fake
from tests.tolerances import COMPONENTWISE


@pytest.mark.parametrize("lengths", [(5, 0, 24, 1), (0, 0), (1,), (24,)])
def test_onnx_runtime_equals_eager_at_every_layer(lengths: tuple[int, ...]) -> None:
    feeds = request_batch(lengths)
    with open_session("onnxruntime", onnx=exported_graph("fp32", top_k=TOP_K), taps=TAPS) as session:
        assert session.name.startswith("onnxruntime ")
        assert [spec.name for spec in session.inputs] == list(feeds)
        outputs = session.run(feeds)
    tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
    model = research_model("fp32")
    with torch.no_grad():
        layers = model.layer_activations(**tensors)
        expected = {"user_embeddings": model.user_embeddings(layers[-1], tensors["seq_offsets"])}
    expected |= dict(zip(TAPS, layers, strict=True))
    assert set(outputs) == {*expected, "top_items", "top_scores"}
    for name, tensor in expected.items():
        reference = tensor.numpy()
        assert outputs[name].shape == reference.shape
        rms = np.sqrt(np.mean(np.square(reference))) if reference.size else 0.0
        assert (rms > 0) == bool(sum(lengths))
        assert np.abs(outputs[name] - reference).max(initial=0.0) <= 10 * COMPONENTWISE["float32"] * rms


@pytest.mark.parametrize(
    ("precision", "note"), [("fp32", " (sigmoids by exp)"), ("fp16", ""), ("bf16", " (bf16 widened to float32)")]
)
def test_the_name_says_how_what_runs_differs_from_the_graph(precision: Precision, note: str) -> None:
    with open_session("onnxruntime", onnx=exported_graph(precision, top_k=TOP_K)) as session:
        assert session.name == f"onnxruntime {onnxruntime.__version__}{note}"


def silu_model(kind: int) -> onnx.ModelProto:
    """X * Sigmoid(x) inside of a local function, as in the bodies of attentions and norms, and an unused weight."""
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    nodes = [helper.make_node("Sigmoid", ["x"], ["s"]), helper.make_node("Mul", ["x", "s"], ["y"])]
    silu = helper.make_function("local", "Silu", ["x"], ["y"], nodes, opsets[:1])
    graph = helper.make_graph(
        [helper.make_node("Silu", ["x"], ["y"], domain="local")],
        "silu",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None])],
        [helper.make_tensor("weight", kind, [1], [1.0])],
    )
    model = helper.make_model(graph, opset_imports=opsets, functions=[silu], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def test_a_float32_silu_in_a_local_function_keeps_its_digits_far_below_zero() -> None:
    """ONNX Runtime's Sigmoid is off by 1e-7 at any x: of -16 by half of its value, which failed float32 builds."""
    model = silu_model(onnx.TensorProto.FLOAT)
    before = model.SerializeToString()
    x = np.concatenate([np.linspace(-80, 80, 4001), [-1e30, -200, -88.5, np.nan]]).astype(np.float32)
    with open_session("onnxruntime", onnx=model) as session:
        y = session.run({"x": x})["y"]
    assert model.SerializeToString() == before
    exact = x[:4001] / (1 + np.exp(-x[:4001].astype(np.float64)))
    np.testing.assert_allclose(y[:4001], exact, rtol=4 * 2.0**-24, atol=0)
    # An exponential that overflows gives 0, not NaN; NaN stays.
    np.testing.assert_allclose(y[4001:], [0, 0, 0, np.nan], rtol=0, atol=1e-36)


def test_a_graph_with_half_weights_runs_with_its_own_sigmoids() -> None:
    with open_session("onnxruntime", onnx=silu_model(onnx.TensorProto.FLOAT16)) as session:
        assert session.name == f"onnxruntime {onnxruntime.__version__}"
        y = session.run({"x": np.full(1, -18, np.float32)})["y"]
    assert not y.any()  # docs/pitfalls.md: of -18 ONNX Runtime's own is 0


def test_safe_conversions_and_refusals() -> None:
    feeds = request_batch((3,))
    with open_session("onnxruntime", onnx=exported_graph("fp32", top_k=TOP_K)) as session:
        expected = session.run(feeds)["user_embeddings"]
        wide = {name: array.astype(np.int64) for name, array in feeds.items()}
        np.testing.assert_array_equal(session.run(wide)["user_embeddings"], expected)
        with pytest.raises(RequestError, match="timestamps is missing; extra is not an input") as caught:
            session.run({**{k: v for k, v in feeds.items() if k != "timestamps"}, "extra": np.zeros(1)})
        assert caught.value.code == "HSTU-E701"
        with pytest.raises(RequestError, match=r"item_ids is int64 with values 1099511627776\.\."):
            session.run({**feeds, "item_ids": np.full(3, 2**40)})
        with pytest.raises(RequestError, match="item_ids has rank 2, not 1"):
            session.run({**feeds, "item_ids": feeds["item_ids"][None]})
    with pytest.raises(RuntimeError, match="closed"):
        session.run(feeds)


def test_an_absent_tap_and_a_damaged_graph_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="layer_9 are not computed"):
        open_session("onnxruntime", onnx=exported_graph("fp32", top_k=TOP_K), taps=["layer_9"])
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x00garbage")
    with pytest.raises(EngineError, match="cannot load the graph") as caught:
        open_session("onnxruntime", onnx=path)
    assert caught.value.code == "HSTU-E404"


def test_arguments_that_do_not_belong_together() -> None:
    with pytest.raises(UsageError, match=r"needs a graph"):
        open_session("onnxruntime", engine=b"")
    with pytest.raises(UsageError, match=r"needs an engine"):
        open_session("tensorrt-rtx", onnx=exported_graph("fp32", top_k=TOP_K))
    with pytest.raises(UsageError, match="layer_0 were fused away"):
        open_session("tensorrt", engine=b"", taps=["layer_0"])
    with pytest.raises(EngineError, match="'tflite' is not one of"):
        open_session("tflite")
    with pytest.raises(EngineError, match=r"no\.engine cannot be read"):
        open_session("tensorrt-rtx", engine=Path("no.engine"))


def small_feeds(*lengths: int) -> dict[str, Any]:
    batch = request_batch(lengths)
    return {name: batch[name] for name in ("item_ids", "timestamps", "seq_offsets")}


def expected_sums(feeds: dict[str, Any]) -> list[float]:
    offsets = feeds["seq_offsets"]
    return [float(feeds["item_ids"][a:b].sum()) for a, b in itertools.pairwise(offsets)]


def test_an_engine_runs_and_its_buffers_are_reused() -> None:
    cuda = FakeCuda()
    with open_fake(cuda) as session:
        assert session.name == "tensorrt 10.0.0"
        assert [(s.name, s.dtype, s.shape) for s in session.outputs] == [("sums", "float32", ("?",))]
        for lengths in ((2, 0, 6), (1,), (8,), (0, 0), (3, 4)):
            feeds = small_feeds(*lengths)
            assert session.run(feeds)["sums"].tolist() == expected_sums(feeds)
            if lengths == (2, 0, 6):
                first = cuda.allocations
        assert cuda.allocations == first, "a smaller request allocated memory"
        assert cuda.memory
    assert not cuda.memory
    assert cuda.depth == 0
    session.close()
    with pytest.raises(RuntimeError, match="closed"):
        session.run(feeds)


@pytest.mark.parametrize(("lengths", "name"), [((5, 4), "item_ids"), ((1, 1, 1, 1, 1), "seq_offsets")])
def test_a_request_outside_the_profile_is_refused_before_it_runs(lengths: tuple[int, ...], name: str) -> None:
    cuda = FakeCuda()
    with (
        open_fake(cuda) as session,
        pytest.raises(RequestError, match=rf"{name} is \[\d\]; the engine takes") as caught,
    ):
        session.run(small_feeds(*lengths))
    assert caught.value.code == "HSTU-E704"
    assert cuda.allocations == 0


def test_tensorrt_8_takes_timestamps_that_fit_int32() -> None:
    with open_fake(FakeCuda(), int64=False) as session:
        feeds = small_feeds(2, 3)
        assert feeds["timestamps"].dtype == np.int64
        assert session.run(feeds)["sums"].tolist() == expected_sums(feeds)
        with pytest.raises(RequestError, match=r"timestamps is int64 with values .* int32 cannot hold it"):
            session.run({**feeds, "timestamps": feeds["timestamps"] + 2**33})


@pytest.mark.parametrize(
    "message",
    [
        "IPluginRegistry::getCreator: Cannot find plugin: HstuAttention, version: 1, namespace: hstu",
        "getPluginCreator could not find plugin: HstuAttention version: 1",
    ],
)
def test_a_missing_plugin_is_told_apart(message: str) -> None:
    cuda = FakeCuda()
    with pytest.raises(PluginError, match="HstuAttention") as caught:
        open_fake(cuda, loads=False, log=message)
    assert caught.value.code == "HSTU-E503"
    assert cuda.depth == 0


def test_an_engine_of_another_version_is_refused() -> None:
    with pytest.raises(EngineError, match="Version tag does not match") as caught:
        open_fake(FakeCuda(), loads=False, log="Version tag does not match")
    assert caught.value.code == "HSTU-E404"


def test_one_request_at_a_time() -> None:
    with open_fake(FakeCuda()) as session:
        failures: list[Any] = []

        def serve(seed: int) -> None:
            for _ in range(50):
                batch = request_batch((seed + 1, 2), seed=seed)
                feeds = {name: batch[name] for name in ("item_ids", "timestamps", "seq_offsets")}
                if session.run(feeds)["sums"].tolist() != expected_sums(feeds):
                    failures.append(seed)

        threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_a_failing_cuda_call_is_named() -> None:
    driver = CudaDriver(FakeCuda())
    with driver.current(), pytest.raises(EngineError, match=r"cuMemAlloc_v2 failed\n  Why: out of memory \(2\)"):
        DeviceBuffers(driver).address("big", 2**21)


@pytest.mark.parametrize("before", [None, "1"])
def test_tf32_is_off_only_while_a_float32_rtx_engine_is_built_or_loaded(monkeypatch, before):
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    if before is not None:
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", before)
    with tf32_override_off(False):
        assert os.environ.get("NVIDIA_TF32_OVERRIDE") == before
    with tf32_override_off(True):
        assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"
    assert os.environ.get("NVIDIA_TF32_OVERRIDE") == before


def test_an_onnxruntime_that_computes_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "1.23.2")
    with pytest.raises(EngineError, match=r"ONNX Runtime 1\.23\.2 is too old") as caught:
        open_session("onnxruntime", onnx=exported_graph("fp32", top_k=TOP_K))
    assert caught.value.code == "HSTU-E401"
    assert caught.value.context["oldest"] == "1.31"
