"""Sessions: ONNX Runtime for real; TensorRT's half of the work is played by a stand-in that computes with NumPy."""

from __future__ import annotations

import dataclasses
import itertools
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from hstu_compile.errors import EngineError, PluginError, RequestError, UsageError
from hstu_compile.runtime._bfloat16 import bits_of_values
from hstu_compile.runtime._cuda import CudaDriver, DeviceBuffers
from hstu_compile.runtime.resident import DeviceTensor, HostTensor, MemoryPool, ResidentTensor
from hstu_compile.runtime.session import open_session
from hstu_compile.runtime.tensorrt_session import TensorRtSession
from hstu_compile.tensorrt_api import TensorRtApi, tf32_override_off
from tests.exported_graphs import TAPS, exported_graph, request_batch, small_model
from tests.fake_cuda import FakeCuda
from tests.fake_tensorrt import FakeEngine, fake_tensorrt, sums_engine
from tests.tolerances import COMPONENTWISE


@pytest.mark.parametrize("lengths", [(5, 0, 24, 1), (0, 0), (1,), (24,)])
def test_onnx_runtime_equals_eager_at_every_layer(lengths: tuple[int, ...]) -> None:
    feeds = request_batch(lengths)
    with open_session("onnxruntime", onnx=exported_graph("fp32"), taps=TAPS) as session:
        assert session.name.startswith("onnxruntime ")
        assert [spec.name for spec in session.inputs] == list(feeds)
        outputs = session.run(feeds)
    tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
    model = small_model("fp32")
    with torch.no_grad():
        layers = model.layer_activations(**tensors)
        expected = {"user_embeddings": model.user_embeddings(layers[-1], tensors["seq_offsets"])}
    expected |= dict(zip(TAPS, layers, strict=True))
    assert set(outputs) == set(expected)
    for name, tensor in expected.items():
        reference = tensor.numpy()
        assert outputs[name].shape == reference.shape
        rms = np.sqrt(np.mean(np.square(reference))) if reference.size else 0.0
        assert (rms > 0) == bool(sum(lengths))
        assert np.abs(outputs[name] - reference).max(initial=0.0) <= 10 * COMPONENTWISE["float32"] * rms


def test_safe_conversions_and_refusals() -> None:
    feeds = request_batch((3,))
    with open_session("onnxruntime", onnx=exported_graph("fp32")) as session:
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
        open_session("onnxruntime", onnx=exported_graph("fp32"), taps=["layer_9"])
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x00garbage")
    with pytest.raises(EngineError, match="cannot load the graph") as caught:
        open_session("onnxruntime", onnx=path)
    assert caught.value.code == "HSTU-E404"


def test_arguments_that_do_not_belong_together() -> None:
    with pytest.raises(UsageError, match=r"needs a graph"):
        open_session("onnxruntime", engine=b"")
    with pytest.raises(UsageError, match=r"needs an engine"):
        open_session("tensorrt-rtx", onnx=exported_graph("fp32"))
    with pytest.raises(UsageError, match="layer_0 were fused away"):
        open_session("tensorrt", engine=b"", taps=["layer_0"])
    with pytest.raises(EngineError, match="'tflite' is not one of"):
        open_session("tflite")
    with pytest.raises(EngineError, match=r"no\.engine cannot be read"):
        open_session("tensorrt-rtx", engine=Path("no.engine"))


def open_fake(cuda: FakeCuda, engine: FakeEngine | None = None, **settings: Any) -> TensorRtSession:
    engine = engine or sums_engine(int64=settings.get("int64", True))
    module: Any = fake_tensorrt(engine, cuda, **settings)
    return TensorRtSession(TensorRtApi("tensorrt", module), b"plan", driver=CudaDriver(cuda))


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


HEADS, WIDTH = 1, 2


def prefill_engine(kind: str = "HALF") -> FakeEngine:
    """One context token per sequence: k_0 [B + U, 1, 2] is (id, -id); lengths [B] float32 counts the rows."""

    def compute(arrays: dict[str, Any]) -> dict[str, Any]:
        ids, users, offsets = arrays["item_ids"], arrays["user_id"], arrays["seq_offsets"]
        rows = [[users[b], *ids[start:stop]] for b, (start, stop) in enumerate(itertools.pairwise(offsets))]
        inside = [value for each in rows for value in each]
        # Events of no sequence come last.
        values = np.array([*inside, *ids[offsets[-1] :]], np.float32)
        keys = np.stack([values, -values], -1).reshape(-1, HEADS, WIDTH)
        return {
            "k_0": keys if kind == "BF16" else keys.astype(np.float16),
            "lengths": np.array([len(each) for each in rows], np.float32),
        }

    return FakeEngine(
        inputs={
            "item_ids": ("INT32", (1,), (8,)),
            "user_id": ("INT32", (1,), (4,)),
            "seq_offsets": ("INT32", (2,), (5,)),
        },
        outputs={"k_0": (kind, (-1, HEADS, WIDTH)), "lengths": ("FLOAT", (-1,))},
        infer=lambda shapes: {
            "k_0": (shapes["user_id"][0] + shapes["item_ids"][0], HEADS, WIDTH),
            "lengths": (shapes["seq_offsets"][0] - 1,),
        },
        compute=compute,
    )


def score_engine(kind: str = "HALF", most_candidates: int = 8) -> FakeEngine:
    """Of preds [T, 1]: a candidate times the sum of its sequence's first key column."""

    def compute(arrays: dict[str, Any]) -> dict[str, Any]:
        preds = np.zeros((len(arrays["item_id"]), 1), np.float32)
        spans = zip(
            itertools.pairwise(arrays["candidate_offsets"]), itertools.pairwise(arrays["cache_offsets"]), strict=True
        )
        for (a, b), (c, d) in spans:
            preds[a:b, 0] = arrays["item_id"][a:b] * arrays["k_0"][c:d, 0, 0].astype(np.float32).sum()
        return {"preds": preds}

    return FakeEngine(
        inputs={
            "item_id": ("INT32", (1,), (most_candidates,)),
            "candidate_offsets": ("INT32", (2,), (5,)),
            "cache_offsets": ("INT32", (2,), (5,)),
            "k_0": (kind, (1, HEADS, WIDTH), (12, HEADS, WIDTH)),
        },
        outputs={"preds": ("FLOAT", (-1, 1))},
        infer=lambda shapes: {"preds": (shapes["item_id"][0], 1)},
        compute=compute,
    )


def int32(*values: int) -> Any:
    return np.array(values, np.int32)


def tensor_in(pool: MemoryPool, shape: tuple[int, ...], dtype: str) -> ResidentTensor:
    region = pool.allocate(int(np.prod(shape)) * 4)
    assert region is not None
    return pool.tensor(region, 0, shape, dtype)


def prefill_feeds(*histories: list[int]) -> dict[str, Any]:
    return {
        "item_ids": int32(*(item for each in histories for item in each)),
        "user_id": int32(*range(10, 10 + len(histories))),
        "seq_offsets": np.cumsum([0, *map(len, histories)]).astype(np.int32),
    }


def test_one_engine_writes_what_another_reads_without_leaving_the_device() -> None:
    cuda = FakeCuda()
    with (
        open_fake(cuda, prefill_engine()) as prefill,
        open_fake(cuda, score_engine()) as score,
        prefill.memory_pool(4096) as pool,
    ):
        keys = tensor_in(pool, (5, HEADS, WIDTH), "float16")
        returned = prefill.run_resident(prefill_feeds([1, 2], [3]), {"k_0": keys})
        assert {name: array.tolist() for name, array in returned.items()} == {"lengths": [3.0, 2.0]}
        # No wait in between: what run_resident wrote is complete.
        assert pool.read(keys)[:, 0].tolist() == [[10, -10], [1, -1], [2, -2], [11, -11], [3, -3]]
        packed = tensor_in(pool, (3, HEADS, WIDTH), "float16")
        pool.copy([(keys.rows(3, 5), packed.rows(0, 2)), (keys.rows(1, 2), packed.rows(2, 3))])
        feeds = {
            "item_id": int32(1, 2, 3),
            "candidate_offsets": int32(0, 2, 3),
            "cache_offsets": int32(0, 2, 3),
            "k_0": packed,
        }
        allocations = cuda.allocations
        assert score.run_resident(feeds, {})["preds"].tolist() == [[14.0], [28.0], [3.0]]
        host_feeds = {**feeds, "k_0": pool.read(packed)}
        assert score.run(host_feeds)["preds"].tolist() == [[14.0], [28.0], [3.0]]
        uploaded = cuda.allocations
        assert uploaded - allocations == 3 + 1 + 1, "run_resident gave the resident keys a buffer of their own"
        prefill.close()
        assert pool.read(packed)[0, 0].tolist() == [11, -11], "a pool lives as long as its owner wants"
    assert not cuda.memory
    assert not cuda.streams
    assert cuda.contexts == cuda.depth == 0


def test_rows_that_an_empty_input_added_are_taken_from_the_outputs() -> None:
    cuda = FakeCuda()
    with (
        open_fake(cuda, prefill_engine()) as prefill,
        open_fake(cuda, score_engine()) as score,
        prefill.memory_pool(4096) as pool,
    ):
        feeds = prefill_feeds([], [])
        assert prefill.run(feeds)["k_0"][:, 0].tolist() == [[10, -10], [11, -11]]
        region = pool.allocate(256)
        assert region is not None
        block = pool.tensor(region, 0, (4, HEADS, WIDTH), "float16")
        pool.write(np.full(block.shape, 7, np.float16), block)
        lengths = prefill.run_resident(feeds, {"k_0": block.rows(0, 2)})["lengths"]
        assert lengths.tolist() == [1.0, 1.0]
        assert pool.read(block)[:, 0].tolist() == [[10, -10], [11, -11], [7, 7], [7, 7]]

        empty = block.rows(0, 0)
        nothing = {"candidate_offsets": int32(0, 0), "cache_offsets": int32(0, 0), "item_id": int32()}
        for keys in (empty, np.zeros((0, HEADS, WIDTH), np.float16)):
            assert score.run_resident({**nothing, "k_0": keys}, {})["preds"].shape == (0, 1)
        target = pool.tensor(region, 64, (0, 1), "float32")
        assert score.run_resident({**nothing, "k_0": empty}, {"preds": target}) == {}
        # No cached rows, but candidates: only the cache gets a row, and no candidate sees it.
        some = {"candidate_offsets": int32(0, 2), "cache_offsets": int32(0, 0), "item_id": int32(5, 6), "k_0": empty}
        assert score.run_resident(some, {})["preds"].tolist() == [[0.0], [0.0]]


def test_an_engine_of_exactly_one_row_does_not_tell_what_an_empty_input_added() -> None:
    feeds = {
        "candidate_offsets": int32(0, 0),
        "cache_offsets": int32(0, 1),
        "item_id": int32(),
        "k_0": np.ones((1, HEADS, WIDTH), np.float16),
    }
    with (
        open_fake(FakeCuda(), score_engine(most_candidates=1)) as session,
        pytest.raises(RequestError, match="item_id is empty; the engine takes exactly 1 row") as caught,
    ):
        session.run(feeds)
    assert caught.value.code == "HSTU-E704"


def test_output_rows_that_do_not_follow_from_the_input_rows_are_an_error() -> None:
    engine = dataclasses.replace(score_engine(), infer=lambda shapes: {"preds": (shapes["item_id"][0] ** 2, 1)})
    feeds = {
        "candidate_offsets": int32(0, 0),
        "cache_offsets": int32(0, 1),
        "item_id": int32(),
        "k_0": np.ones((1, HEADS, WIDTH), np.float16),
    }
    with (
        open_fake(FakeCuda(), engine) as session,
        pytest.raises(EngineError, match=r"preds is \[1, 1\] for 1 row of item_id, \[4, 1\] for 2"),
    ):
        session.run(feeds)


def test_a_batch_without_sequences_is_refused() -> None:
    with (
        open_fake(FakeCuda(), prefill_engine()) as session,
        pytest.raises(RequestError, match=r"seq_offsets is \[1\]; the engine takes \[2\] to \[5\]"),
    ):
        session.run(prefill_feeds())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_0": ("float32", (5, 1, 2), 0)}, "k_0 is float32, not float16"),
        ({"k_0": ("float16", (5, 2), 0)}, r"k_0 is \[5, 2\], not \['\?', 1, 2\]"),
        ({"k_0": ("float16", (5, 1, 3), 0)}, r"k_0 is \[5, 1, 3\], not \['\?', 1, 2\]"),
        ({"k_0": ("float16", (4, 1, 2), 0)}, r"k_0 is \[5, 1, 2\] for these feeds, and its target \[4, 1, 2\]"),
        ({"k_0": ("float16", (5, 1, 2), 4)}, r"k_0 starts at address 0x\w+, which is not a multiple of 256"),
        ({"v_0": ("float16", (5, 1, 2), 0)}, "v_0 is not an output"),
        (
            {"k_0": ("float16", (5, 1, 2), 0), "lengths": ("float32", (2,), 0)},
            "lengths overlaps k_0",
        ),
    ],
)
def test_targets_that_do_not_match_are_refused_before_anything_runs(change: dict[str, Any], message: str) -> None:
    cuda = FakeCuda()
    with open_fake(cuda, prefill_engine()) as session, session.memory_pool(4096) as pool:
        region = pool.allocate(256)
        assert region is not None
        targets = {name: pool.tensor(region, at, shape, dtype) for name, (dtype, shape, at) in change.items()}
        with pytest.raises(RequestError, match=message) as caught:
            session.run_resident(prefill_feeds([1, 2], [3]), targets)
        assert caught.value.code == "HSTU-E701"
        assert cuda.enqueued == 0


def test_resident_feeds_that_do_not_match_are_refused_before_anything_runs() -> None:
    cuda = FakeCuda()
    feeds = {"item_id": int32(1), "candidate_offsets": int32(0, 1), "cache_offsets": int32(0, 1)}
    with open_fake(cuda, score_engine()) as session, session.memory_pool(4096) as pool:
        keys = tensor_in(pool, (13, HEADS, WIDTH), "float16")
        host = HostTensor(np.ones((1, HEADS, WIDTH), np.float16))
        with pytest.raises(RequestError, match="k_0 is a HostTensor, and the session computes on DeviceTensor"):
            session.run_resident({**feeds, "k_0": host}, {})
        with pytest.raises(RequestError, match="k_1 is not an input"):
            session.run_resident({**feeds, "k_0": keys, "k_1": keys}, {})
        with pytest.raises(RequestError, match="cache_offsets is missing"):
            session.run_resident({"item_id": int32(1), "candidate_offsets": int32(0, 1), "k_0": keys}, {})
        with pytest.raises(RequestError, match=r"k_0 is \[13, 1, 2\]; the engine takes") as caught:
            session.run_resident({**feeds, "k_0": keys}, {})
        assert caught.value.code == "HSTU-E704"
        # Two inputs may be one tensor; an output may not be an input.
        target = DeviceTensor(keys.address, (1, 1), "float32")
        with pytest.raises(RequestError, match="preds overlaps k_0"):
            session.run_resident({**feeds, "k_0": keys.rows(0, 2)}, {"preds": target})
        assert cuda.enqueued == 0


def test_bfloat16_inputs_take_float32_that_bfloat16_holds() -> None:
    with open_fake(FakeCuda(), score_engine("BF16")) as session, session.memory_pool(1024) as pool:
        feeds = {"item_id": int32(2), "candidate_offsets": int32(0, 1), "cache_offsets": int32(0, 1)}
        keys = np.full((1, HEADS, WIDTH), 1.5, np.float32)
        assert session.run({**feeds, "k_0": keys})["preds"].tolist() == [[3.0]]
        resident = tensor_in(pool, keys.shape, "bfloat16")
        pool.write(np.full(keys.shape, 0x3FC0, np.uint16), resident)
        assert session.run_resident({**feeds, "k_0": resident}, {})["preds"].tolist() == [[3.0]]
        for refused in (keys + np.float32(2**-12), keys.astype(np.float64), np.full(keys.shape, 0x3FC0, np.uint16)):
            with pytest.raises(RequestError, match=r"k_0 is .*bfloat16 cannot hold it unchanged"):
                session.run({**feeds, "k_0": refused})


def test_an_engine_that_fails_has_let_go_of_the_callers_memory() -> None:
    cuda = FakeCuda()
    with open_fake(cuda, prefill_engine(), runs=False) as session:
        with pytest.raises(EngineError, match="enqueueing failed"):
            session.run(prefill_feeds([1, 2], [3]))
        assert cuda.enqueued == 4
        assert not any(cuda.streams.values()), "uploads were still waiting"


def ort_prefill(kind: int) -> onnx.ModelProto:
    """Of k [N, 2] = round(x / 3) in the graph's type; total = sum(k) as float32."""
    third = numpy_helper.from_array(np.array(3, np.float32), "three")
    nodes = [
        helper.make_node("Cast", ["x"], ["wide"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Div", ["wide", "three"], ["divided"]),
        helper.make_node("Cast", ["divided"], ["k"], to=kind),
        helper.make_node("Cast", ["k"], ["k_wide"], to=onnx.TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["k_wide"], ["total"], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "prefill",
        [helper.make_tensor_value_info("x", kind, ["N", 2])],
        [
            helper.make_tensor_value_info("k", kind, ["N", 2]),
            helper.make_tensor_value_info("total", onnx.TensorProto.FLOAT, []),
        ],
        [third],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("rows", [3, 0])
def test_onnx_runtime_reads_and_writes_resident_tensors_in_the_graphs_type(dtype: str, rows: int) -> None:
    kind = {"float32": 1, "float16": 10, "bfloat16": 16}[dtype]
    values = np.arange(1, 2 * rows + 1, dtype=np.float32).reshape(rows, 2)
    stored = bits_of_values(values) if dtype == "bfloat16" else values.astype(dtype)
    assert stored is not None
    with open_session("onnxruntime", onnx=ort_prefill(kind)) as session, session.memory_pool(4096) as pool:
        plain = session.run({"x": values if dtype == "bfloat16" else stored})
        x, k = tensor_in(pool, (rows, 2), dtype), tensor_in(pool, (rows, 2), dtype)
        assert k.nbytes == rows * 2 * (4 if dtype == "float32" else 2)
        pool.write(stored, x)
        returned = session.run_resident({"x": x}, {"k": k})
        assert list(returned) == ["total"]
        np.testing.assert_array_equal(returned["total"], plain["total"])
        assert (plain["total"] > 0) == bool(rows)
        expected = bits_of_values(plain["k"]) if dtype == "bfloat16" else plain["k"]
        assert expected is not None
        np.testing.assert_array_equal(pool.read(k), expected)
        # The result is a feed of the next run, from the place where it lies.
        again = session.run_resident({"x": k}, {})
        np.testing.assert_array_equal(again["k"], session.run({"x": plain["k"]})["k"])


def test_onnx_runtime_refuses_tensors_that_do_not_match_and_writes_none() -> None:
    with open_session("onnxruntime", onnx=ort_prefill(16)) as session, session.memory_pool(4096) as pool:
        x, k = tensor_in(pool, (3, 2), "bfloat16"), tensor_in(pool, (2, 2), "bfloat16")
        pool.write(np.full((3, 2), 0x3F80, np.uint16), x)
        pool.write(np.full((2, 2), 7, np.uint16), k)
        for feeds, targets, message in (
            ({"x": x}, {"k": k}, r"k is \[3, 2\] for these feeds, and its target \[2, 2\]"),
            ({"x": x}, {"k": HostTensor(np.zeros((3, 2), np.float32))}, "k is float32, not bfloat16"),
            ({"x": x}, {"k": x}, "k overlaps x"),
            ({"x": DeviceTensor(256, (3, 2), "bfloat16")}, {}, "x is a DeviceTensor, and the session computes on Host"),
            ({"y": x}, {}, "y is not an input"),
            ({}, {}, "x is missing"),
        ):
            with pytest.raises(RequestError, match=message) as caught:
                session.run_resident(feeds, targets)
            assert caught.value.code == "HSTU-E701"
        assert pool.read(k).tolist() == [[7, 7], [7, 7]]
