"""Resident feeds and targets: ONNX Runtime for real, TensorRT played by engines that compute with NumPy."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from hstu_compile.artifacts import TensorSpec
from hstu_compile.errors import EngineError, RequestError
from hstu_compile.runtime._bfloat16 import bits_of_values
from hstu_compile.runtime._resident_io import check_residents
from hstu_compile.runtime.resident import DeviceTensor, HostTensor, MemoryPool, ResidentTensor
from hstu_compile.runtime.session import open_session
from tests.fake_cuda import FakeCuda
from tests.fake_tensorrt import FakeEngine, open_fake

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
        uploaded = cuda.uploaded_bytes
        assert score.run_resident(feeds, {})["preds"].tolist() == [[14.0], [28.0], [3.0]]
        assert cuda.uploaded_bytes - uploaded == 3 * 256, "more than the three small feeds went to the device"
        host_feeds = {**feeds, "k_0": pool.read(packed)}
        assert score.run(host_feeds)["preds"].tolist() == [[14.0], [28.0], [3.0]]
        assert cuda.uploaded_bytes - uploaded == (3 + 4) * 256
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
        whole = pool.allocate(4096 - 256)
        assert whole is not None
        nothing = {"candidate_offsets": int32(0, 0), "cache_offsets": int32(0, 0), "item_id": int32()}
        end = pool.tensor(whole, 0, (whole.nbytes // 4, HEADS, WIDTH), "float16").rows(
            whole.nbytes // 4, whole.nbytes // 4
        )
        for keys in (empty, end, np.zeros((0, HEADS, WIDTH), np.float16)):
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
        target = DeviceTensor(keys.address, (1, 1), "float32")
        with pytest.raises(RequestError, match="preds overlaps k_0"):
            session.run_resident({**feeds, "k_0": keys.rows(0, 2)}, {"preds": target})
        assert cuda.enqueued == 0


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 4), st.booleans()), max_size=6))
def test_tensors_overlap_where_a_written_byte_is_anothers_too(spans: list[tuple[int, int, bool]]) -> None:
    tensors = {f"{i}": DeviceTensor(256 + first, (size,), "int8") for i, (first, size, _) in enumerate(spans)}
    specs = [TensorSpec(name, "int8", ("n",)) for name in tensors]
    reads = {f"{i}": tensors[f"{i}"] for i, (_, _, written) in enumerate(spans) if not written}
    writes = {name: tensor for name, tensor in tensors.items() if name not in reads}
    places = {name: {*range(each.address, each.address + each.nbytes)} for name, each in tensors.items()}
    pairs = [(one, two) for one, two in itertools.combinations([*reads, *writes], 2) if places[one] & places[two]]
    shared = [f"{two} overlaps {one}" for one, two in pairs if one in writes or two in writes]

    def check() -> None:
        check_residents(reads, writes, inputs=specs, outputs=specs, kind=DeviceTensor)

    if not shared:
        check()
        return
    with pytest.raises(RequestError) as caught:
        check()
    assert caught.value.context["problems"] == shared


def test_two_inputs_may_be_one_tensor() -> None:
    engine = score_engine()
    engine = dataclasses.replace(engine, inputs={**engine.inputs, "v_0": engine.inputs["k_0"]})
    with open_fake(FakeCuda(), engine) as session, session.memory_pool(1024) as pool:
        keys = tensor_in(pool, (1, HEADS, WIDTH), "float16")
        pool.write(np.full(keys.shape, 3, np.float16), keys)
        feeds = {"item_id": int32(2), "candidate_offsets": int32(0, 1), "cache_offsets": int32(0, 1)}
        assert session.run_resident({**feeds, "k_0": keys, "v_0": keys}, {})["preds"].tolist() == [[6.0]]


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
        with pytest.raises(RequestError, match="k_0 cannot be read as an array"):
            session.run({**feeds, "k_0": [[1.0], [2.0, 3.0]]})  # type: ignore[dict-item]


def test_an_engine_that_fails_has_let_go_of_the_callers_memory() -> None:
    cuda = FakeCuda()
    with open_fake(cuda, prefill_engine(), runs=False) as session:
        with pytest.raises(EngineError, match="enqueueing failed"):
            session.run(prefill_feeds([1, 2], [3]))
        assert cuda.enqueued == 2, "one upload and the engine"
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
