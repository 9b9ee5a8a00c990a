"""What TensorRT 8 is told about types, on a stand-in of its network, and how its inspector's entries are read."""

from __future__ import annotations

import enum
from types import SimpleNamespace
from typing import Any

import pytest

from hstu_compile.engine import computes_in_eight_bits, computes_in_float32, pin_types

Kind = enum.Enum(
    "Kind",
    "CONSTANT SHAPE PLUGIN_V2 IDENTITY QUANTIZE DEQUANTIZE CONVOLUTION MATRIX_MULTIPLY ELEMENTWISE SHUFFLE",
)
Type = enum.Enum("Type", "FLOAT HALF INT8")
TRT = SimpleNamespace(LayerType=Kind, DataType=Type)


class Layer:
    """A layer as TensorRT's Python shows it, with what was set."""

    def __init__(self, kind: Kind, output: str, inputs: tuple[str, ...] = (), dtype: Type = Type.FLOAT) -> None:
        self.type, self.num_outputs, self.precision = kind, 1, None
        self._output = SimpleNamespace(name=output, dtype=dtype, is_shape_tensor=False)
        self._inputs = [SimpleNamespace(name=name) for name in inputs]
        self.output_types: dict[int, Type] = {}

    def get_output(self, index: int) -> Any:
        return self._output

    def get_input(self, index: int) -> Any:
        return self._inputs[index] if index < len(self._inputs) else None

    def set_output_type(self, index: int, dtype: Type) -> None:
        self.output_types[index] = dtype


def pinned(*, is_quantized: bool) -> dict[str, Layer]:
    """A quantised product as it is lowered, one that stays in half, and arithmetic in float32."""
    layers = [
        Layer(Kind.QUANTIZE, "codes", ("image", "scale"), Type.INT8),
        Layer(Kind.DEQUANTIZE, "operand", ("codes", "scale")),
        Layer(Kind.DEQUANTIZE, "filters", ("filter_codes", "filter_scales")),
        Layer(Kind.CONVOLUTION, "sum", ("operand", "filters")),
        Layer(Kind.IDENTITY, "half", ("sum",), Type.HALF),
        Layer(Kind.CONVOLUTION, "plain", ("half",), Type.HALF),
        Layer(Kind.CONVOLUTION, "wide", ("half",)),
        Layer(Kind.ELEMENTWISE, "norm", ("x", "y")),
        Layer(Kind.ELEMENTWISE, "gate", ("x", "y"), Type.HALF),
        Layer(Kind.PLUGIN_V2, "attention", ("q", "k"), Type.HALF),
    ]
    network = SimpleNamespace(num_layers=len(layers), get_layer=layers.__getitem__)
    pin_types(TRT, network, is_quantized=is_quantized)
    return {layer.get_output(0).name: layer for layer in layers}


def test_int8_convolutions_write_half_because_tensorrt_8_finds_no_kernel_otherwise() -> None:
    """Without a type 8.5.3.1 on an H100 stopped: "All of the candidates were removed ... marked as an int8 node"."""
    layers = pinned(is_quantized=True)
    assert layers["sum"].output_types == {0: Type.HALF}
    assert layers["sum"].precision is None
    for name in ("codes", "operand", "filters", "half", "plain", "wide", "gate", "attention"):
        assert layers[name].output_types == {}
    assert layers["norm"].output_types == {0: Type.FLOAT}
    assert layers["norm"].precision == Type.FLOAT


def test_float32_of_a_graph_without_quantisation_stays_float32() -> None:
    layers = pinned(is_quantized=False)
    assert layers["wide"].output_types == layers["norm"].output_types == {0: Type.FLOAT}
    assert layers["plain"].output_types == layers["half"].output_types == {}


@pytest.mark.parametrize(
    ("kind", "tactic", "expected"),
    [
        ("CaskConvolution", "sm80_xmma_fprop_implicit_gemm_interleaved_i8f16_i8i32_f32_nchw_vect_c_32kcrs_vect", True),
        ("CaskConvolution", "sm80_xmma_fprop_implicit_gemm_interleaved_i8f32_i8i32_f32_nchw_vect_c_32kcrs", True),
        ("CaskConvolution", "sm90_xmma_fprop_implicit_gemm_f16f16_f16f16_f16_nhwckrsc_nhwc_tilesize128x64x64", False),
        ("Reformat", "sm80_xmma_i8i8_i8i32_f32", False),
        ("CaskConvolution", "", False),
    ],
)
def test_the_kernel_says_what_the_inspector_of_dynamic_shapes_does_not(kind: str, tactic: str, expected: bool) -> None:
    tensor = {"Format/Datatype": "N/A due to dynamic shapes"}
    entry = {"LayerType": kind, "Inputs": [tensor], "Outputs": [tensor], "TacticName": tactic}
    assert computes_in_eight_bits(entry) is expected


@pytest.mark.parametrize(
    ("kind", "tactic", "expected"),
    [
        ("CaskGemmConvolution", "sm80_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize128x128x16_stage4", True),
        ("CaskGemmConvolution", "sm80_xmma_gemm_f32f32_f32f32_f32_tn_n_tilesize64x64x16_stage6", True),
        ("CaskConvolution", "sm70_xmma_gemm_as_conv1x1_f32f32_f32_f32_tn_n_simt_small_batch_bias_relu", True),
        ("CaskGemmConvolution", "sm80_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x32_stage4", False),
        ("CaskConvolution", "sm90_xmma_fprop_implicit_gemm_f16f16_f16f16_f16_nhwckrsc_nhwc_tilesize128x64x64", False),
        ("CaskConvolution", "sm80_xmma_fprop_implicit_gemm_interleaved_i8f32_i8i32_f32_nchw_vect_c_32kcrs", False),
        ("Reformat", "sm80_xmma_gemm_f32f32_tf32f32_f32_tn_n", False),
    ],
)
def test_a_kernels_name_says_that_a_product_reads_float32(kind: str, tactic: str, expected: bool) -> None:
    assert computes_in_float32({"LayerType": kind, "TacticName": tactic}) is expected
    assert not computes_in_float32("a name only")
