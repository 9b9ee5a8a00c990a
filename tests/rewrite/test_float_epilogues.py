"""Products of half types by weights end in float32: where the zeros go, that no number changes, what the plan says."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from hstu_compile.artifacts import Profile
from hstu_compile.engine import engine_from_onnx
from hstu_compile.rewrite.float_epilogues import FloatEpilogues
from hstu_compile.rewrite.widen_accumulators import WidenAccumulators
from tests.oracle import Array
from tests.rewrite.attention_graphs import run_onnx
from tests.unit.test_engine import RTX

HALF, WIDE, BRAIN = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.BFLOAT16
ROWS, WIDTH = 33, 64
Run = Callable[[onnx.ModelProto, Mapping[str, Array]], dict[str, Array]]
#: A row of zeros, and one so small that products round it to 0 and -0.
ZERO, TINY = 3, 7
SHAPES = {
    "w": (WIDTH, 128),
    "b": (128,),
    "w2": (128, WIDTH),
    "w3": (WIDTH, 32),
    "w4": (WIDTH, WIDTH),
    "w5": (WIDTH, 48),
}
#: Products by the value that their zeros end in, and its width.
ENDS = {"p": ("s", 128), "p2": ("o", WIDTH), "a": ("a", 32), "q": ("q", WIDTH), "n": ("n", 48)}


def node(op_type: str, inputs: str, output: str) -> onnx.NodeProto:
    return helper.make_node(op_type, inputs.split(), [output], name=output)


def small_graph(
    nodes: Sequence[onnx.NodeProto],
    outputs: Sequence[str],
    kind: int = HALF,
    constants: Mapping[str, Array] | None = None,
) -> onnx.ModelProto:
    """Nodes over inputs of [R, 64] and the weights of SHAPES, whose products are O(1); `constants` adds or replaces."""
    rng = np.random.default_rng(0)
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    known = {name: (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(dtype) for name, shape in SHAPES.items()}
    known |= constants or {}
    read = list(dict.fromkeys(name for each in nodes for name in each.input))
    made = {name for each in nodes for name in each.output}
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info(name, kind, ["R", WIDTH]) for name in read if name not in known.keys() | made],
        [helper.make_tensor_value_info(name, kind, None) for name in outputs],
        [numpy_helper.from_array(known[name], name) for name in read if name in known],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    # Only the outputs get shapes: what is inside, the pass infers itself.
    shaped = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph.output
    del model.graph.output[:]
    model.graph.output.extend(shaped)
    return model


def products(kind: int = HALF) -> onnx.ModelProto:
    """(x w + b) w2 + r, the residual first; a = y w3 alone; q = z w4, which an addition and a product read.

    Each has operands of its own: TensorRT-RTX makes one product of several that read the same rows.
    """
    nodes = [
        node("MatMul", "x w", "p"),
        node("Add", "p b", "s"),
        node("MatMul", "s w2", "p2"),
        node("Add", "r p2", "o"),
        node("MatMul", "y w3", "a"),
        node("MatMul", "z w4", "q"),
        node("Add", "q z", "m"),
        node("MatMul", "q w5", "n"),
    ]
    return small_graph(nodes, ["o", "a", "m", "n"], kind)


def feeds_of_rows(kind: int = HALF) -> dict[str, Array]:
    rng = np.random.default_rng(1)
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    feeds = {name: rng.standard_normal((ROWS, WIDTH)).astype(dtype) for name in "xryz"}
    for array in feeds.values():
        array[ZERO] = 0
        array[TINY] = np.where(np.arange(WIDTH) < 1, -(2.0**-24), 0).astype(dtype)
    return feeds


def run_as_written(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Outputs node by node, each rounded to its type: nothing is fused or folded."""
    outputs = [value.name for value in model.graph.output]
    return dict(zip(outputs, ReferenceEvaluator(model).run(outputs, dict(feeds)), strict=True))


@pytest.mark.parametrize("kind", [HALF, BRAIN])
def test_the_zeros_come_last(kind: int) -> None:
    model = products(kind)
    assert FloatEpilogues().call(model).counts == {"products": 5}
    onnx.checker.check_model(model, full_check=True)
    assert [each.op_type for each in model.graph.node] == [
        *("MatMul", "Add", "Cast", "Add", "Cast"),
        *("MatMul", "Add", "Cast", "Add", "Cast"),
        *("MatMul", "Cast", "Add", "Cast"),
        *("MatMul", "Cast", "Add", "Cast", "Add"),
        *("MatMul", "Cast", "Add", "Cast"),
    ]
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    writers = {name: each for each in model.graph.node for name in each.output}
    for end, width in ENDS.values():
        narrowing = writers[end]
        addition = writers[narrowing.input[0]]
        widening = writers[addition.input[0]]
        assert [each.attribute[0].i for each in (narrowing, widening)] == [kind, WIDE]
        assert writers[widening.input[0]].name == end  # the node that wrote `end`: an addition or the product
        zeros = constants[addition.input[1]]
        assert zeros.dtype == np.float32
        assert zeros.shape == (width,)
        assert not zeros.any()
    inputs = {each.name: list(each.input) for each in model.graph.node if each.name in (*ENDS, "s", "o", "m")}
    assert inputs == {
        **{"p": ["x", "w"], "s": ["p", "b"], "p2": ["s", "w2"], "o": ["r", "p2"]},
        **{"a": ["y", "w3"], "q": ["z", "w4"], "m": ["q", "z"], "n": ["q", "w5"]},
    }


def test_an_addition_behind_a_product_that_is_an_output_stays_behind_the_zeros() -> None:
    model = small_graph([node("MatMul", "z w4", "q"), node("Add", "q r", "m")], ["q", "m"])
    assert FloatEpilogues().call(model).counts == {"products": 1}
    onnx.checker.check_model(model, full_check=True)
    assert [each.op_type for each in model.graph.node] == ["MatMul", "Cast", "Add", "Cast", "Add"]
    assert list(model.graph.node[-1].input) == ["q", "r"]


# ONNX Runtime has no products of bfloat16 on a CPU.
@pytest.mark.parametrize(("run", "kind"), [(run_onnx, HALF), (run_as_written, HALF), (run_as_written, BRAIN)])
def test_no_number_changes(run: Run, kind: int) -> None:
    model, feeds = products(kind), feeds_of_rows(kind)
    before = run(model, feeds)
    FloatEpilogues().call(model)
    after = run(model, feeds)
    for name, numbers in before.items():
        assert numbers.dtype == after[name].dtype == helper.tensor_dtype_to_np_dtype(kind)
        assert np.abs(numbers).max() > 1
        np.testing.assert_array_equal(after[name], numbers)


def test_minus_zero_becomes_zero() -> None:
    model, feeds = products(), feeds_of_rows()
    before = run_as_written(model, feeds)["a"][TINY]
    FloatEpilogues().call(model)
    after = run_as_written(model, feeds)["a"][TINY]
    assert (np.signbit(before) & (before == 0)).any()
    assert not np.signbit(after[after == 0]).any()


def test_with_wide_accumulators_numbers_change_by_one_rounding_at_most() -> None:
    model, feeds = products(), feeds_of_rows()
    before = run_onnx(model, feeds)
    FloatEpilogues().call(model)
    assert WidenAccumulators().call(model).counts == {"products": 5}
    onnx.checker.check_model(model, full_check=True)
    after = run_onnx(model, feeds)
    for name, numbers in before.items():
        # One step of float16 at the largest number: sums that lie at the border between two may go either way.
        step = np.spacing(np.abs(numbers).max()).astype(np.float64)
        assert step < 2.0**-7
        np.testing.assert_allclose(after[name].astype(np.float64), numbers.astype(np.float64), rtol=0, atol=step)
    assert not any(after[name][ZERO].any() for name in "amn")


CODES: dict[str, Array] = {"codes": np.ones((WIDTH, WIDTH), np.int8), "scale": np.array(0.5, np.float16)}
LEFT_ALONE: dict[str, onnx.ModelProto] = {
    "float32": small_graph([node("MatMul", "z w4", "o")], ["o"], WIDE),
    "computed values": small_graph(
        [node("Relu", "z", "c"), node("Transpose", "z", "t"), node("MatMul", "c t", "o")], ["o"]
    ),
    "weights first": small_graph([node("Transpose", "z", "t"), node("MatMul", "w4 t", "o")], ["o"]),
    "quantised weights": small_graph(
        [node("DequantizeLinear", "codes scale", "dq"), node("MatMul", "z dq", "o")], ["o"], constants=CODES
    ),
    "quantised operands": small_graph(
        [
            node("QuantizeLinear", "z scale", "zq"),
            node("DequantizeLinear", "zq scale", "zd"),
            node("DequantizeLinear", "codes scale", "dq"),
            node("MatMul", "zd dq", "p"),
            node("Add", "p r", "o"),
        ],
        ["o"],
        constants=CODES,
    ),
    "quantised rows": small_graph(
        [
            node("QuantizeLinear", "z scale", "zq"),
            node("DequantizeLinear", "zq scale", "zd"),
            node("MatMul", "zd w4", "o"),
        ],
        ["o"],
        constants=CODES,
    ),
    "Gemm": small_graph([node("Gemm", "z w4", "o")], ["o"]),
    "several matrices": small_graph(
        [node("MatMul", "z stack", "o")], ["o"], constants={"stack": np.ones((2, WIDTH, WIDTH), np.float16)}
    ),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone(case: str) -> None:
    model = LEFT_ALONE[case]
    onnx.checker.check_model(model, full_check=True)
    before = model.SerializeToString(deterministic=True)
    assert not FloatEpilogues().call(model).modified
    assert model.SerializeToString(deterministic=True) == before


def test_a_second_call_changes_nothing() -> None:
    model = products()
    assert FloatEpilogues().call(model).counts == {"products": 5}
    assert WidenAccumulators().call(model).counts == {"products": 5}
    before = model.SerializeToString(deterministic=True)
    assert not FloatEpilogues().call(model).modified
    assert not WidenAccumulators().call(model).modified
    assert model.SerializeToString(deterministic=True) == before


def test_rows_of_a_type_that_cannot_be_inferred() -> None:
    """As those that a segment gathers by indices which a function made: the weights say what type the product is of."""
    model = small_graph([node("MatMul", "z w4", "o")], ["o"])
    model.graph.node.insert(0, helper.make_node("Opaque", ["z"], ["rows"], name="rows", domain="test"))
    model.graph.node[1].input[0] = "rows"
    model.opset_import.append(helper.make_opsetid("test", 1))
    assert FloatEpilogues().call(model).counts == {"products": 1}
    assert WidenAccumulators().call(model).counts == {"products": 1}
    kinds = [each.op_type for each in model.graph.node]
    assert kinds == ["Opaque", "Cast", "Cast", "MatMul", "Cast", "Cast", "Add", "Cast"]


@RTX
@pytest.mark.parametrize("kind", [HALF, BRAIN])
def test_tensorrt_rtx_keeps_the_zeros_in_the_kernel_of_the_product(kind: int) -> None:
    shapes: list[dict[str, tuple[int, ...]]] = [dict.fromkeys("xryz", (count, WIDTH)) for count in (1, 512, 1024)]
    profile = Profile("p", *shapes)
    plan = engine_from_onnx(products(kind), backend="tensorrt-rtx", profiles=[profile]).plan.decode("latin-1")
    fused: dict[str, tuple[str, int, bool]] = {}
    for name, operands, layers in re.findall(
        r'runtime_fusion=\{ name=(__myl_[A-Za-z]+)\S* input_args=\{([^}]*)\}[^\n]*? layers="([^"\n]*)"', plan
    ):
        inside = set(re.findall(r"\[ONNX Layer: ([^]]+)\]", layers))
        for product in ENDS.keys() & inside:
            fused[product] = (name, operands.count("_dconst"), f"{ENDS[product][0]}/epilogue/sum" in inside)
    # Constants besides the weights: the zeros, and of p a bias.
    assert fused == {
        "p": ("__myl_FcAddCastAddCast", 2, True),
        "p2": ("__myl_FcAddCastAddCast", 1, True),
        "a": ("__myl_FcCastAddCast", 1, True),
        "q": ("__myl_FcCastAddCastAdd", 1, True),
        "n": ("__myl_FcCastAddCast", 1, True),
    }
    # Of bfloat16 nothing is asked: it has no narrower sums than float32.
    sums = "2" if kind == HALF else "0"
    assert re.findall(r"fully_connected=\{[^\n]*?accumulation_type=(\d)", plan) == [sums] * len(ENDS)
    assert "__myl_Cast" not in plan
