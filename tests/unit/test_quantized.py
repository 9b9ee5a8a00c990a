"""Grids of eight bits, against their definitions and against the same types of other packages."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hstu_compile.config import Quantization
from hstu_compile.model.fake_quantization import _rounded_to_grid
from hstu_compile.quantized import (
    LARGEST,
    SMALLEST_SCALE,
    codes_of,
    levels_of,
    quantized_weight,
    rounded_to_grid,
    usable_scales,
)

KINDS = pytest.mark.parametrize("kind", ["int8", "fp8"])
CODES = np.arange(256, dtype=np.uint8)
FLOAT8 = CODES.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
MATRICES = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 9), st.integers(1, 7)),
    elements=st.floats(-100, 100, width=16, allow_subnormal=True),
)


def test_codes_of_e4m3_mean_what_they_mean_elsewhere() -> None:
    finite = np.isfinite(FLOAT8)
    assert finite.sum() == 254
    np.testing.assert_array_equal(levels_of(CODES, "fp8")[finite], FLOAT8[finite])
    np.testing.assert_array_equal(codes_of(FLOAT8[finite], "fp8"), CODES[finite])


@given(arrays.arrays(np.float64, 40, elements=st.floats(-1e4, 1e4)))
def test_rounding_to_e4m3_is_that_of_another_package_saturated(steps: np.ndarray) -> None:
    finite = np.sort(FLOAT8[np.isfinite(FLOAT8)])
    halfway = (finite[1:] + finite[:-1]) / 2
    for values in (steps, steps / 1e4, halfway, finite):
        # float32 first is exact enough: no float64 of these lies between a tie and its float32.
        expected = values.clip(-448, 448).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
        nearly_ties = np.isin(values.astype(np.float32).astype(np.float64), halfway) & ~np.isin(values, halfway)
        np.testing.assert_array_equal(rounded_to_grid(values, "fp8")[~nearly_ties], expected[~nearly_ties])


@pytest.mark.parametrize(
    ("steps", "levels"),
    [(0.5, 0), (1.5, 2), (-0.5, 0), (-2.5, -2), (126.5, 126), (127.4, 127), (300, 127), (-128.4, -128), (-300, -128)],
)
def test_rounding_to_int8_breaks_ties_to_even_and_saturates_as_onnx_has_it(steps: float, levels: int) -> None:
    assert rounded_to_grid(np.array([steps]), "int8")[0] == levels


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_and_numpy_round_alike(kind: Quantization, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(20_000, generator=generator, dtype=dtype) * 10.0 ** torch.randint(
        -4, 4, (20_000,), generator=generator
    )
    steps[:4] = torch.tensor([0.0, -0.0, 1e30, -1e30])
    np.testing.assert_array_equal(_rounded_to_grid(steps, kind).numpy(), rounded_to_grid(steps.numpy(), kind))


@KINDS
@given(MATRICES, st.booleans())
def test_dequantised_weights_are_within_half_a_step(kind: Quantization, matrix: np.ndarray, smooth: bool) -> None:
    smoothing = np.exp2(np.arange(len(matrix)) % 5 - 2).astype(np.float32) if smooth else None
    quantized = quantized_weight(matrix, kind, smoothing)
    assert np.isfinite(quantized.scales).all()
    assert (quantized.scales > 0).all()
    # What the graph stores as float16 is the scale itself.
    np.testing.assert_array_equal(quantized.scales.astype(np.float16).astype(np.float32), quantized.scales)
    exact = matrix.astype(np.float16).astype(np.float64)
    exact = exact if smoothing is None else exact * smoothing[:, None]
    steps = np.abs(exact) / quantized.scales
    spacing = np.ones_like(steps)
    if kind == "fp8":
        _, exponent = np.frexp(steps)
        spacing = 2.0 ** (np.maximum(exponent - 1, -6) - 3)
    assert (np.abs(quantized.values() - exact) <= spacing / 2 * quantized.scales).all()
    assert np.abs(levels_of(quantized.codes, kind)).max(initial=0) <= LARGEST[kind]


@KINDS
@given(MATRICES)
def test_a_column_alone_gets_the_same_codes(kind: Quantization, matrix: np.ndarray) -> None:
    whole = quantized_weight(matrix, kind)
    part = quantized_weight(matrix[:, ::2], kind)
    np.testing.assert_array_equal(part.codes, whole.codes[:, ::2])
    np.testing.assert_array_equal(part.scales, whole.scales[::2])


@KINDS
@given(MATRICES, st.integers(-24, 9), st.booleans())
def test_a_scale_of_the_whole_and_factors_of_columns_are_exact(
    kind: Quantization, matrix: np.ndarray, exponent: int, smooth: bool
) -> None:
    """Of matrices of any size, with columns of any ratio, and of zeros."""
    smoothing = np.exp2(np.arange(len(matrix)) % 17 - 8).astype(np.float32) if smooth else None
    with np.errstate(under="ignore"):
        quantized = quantized_weight(matrix * np.float32(2.0**exponent), kind, smoothing)
    common, factors = quantized.common_scale(), quantized.column_factors()
    assert np.frexp(common)[0] == 0.5
    assert 2.0**-14 <= common <= 1
    assert np.isfinite(factors).all()
    assert (factors > 0).all()
    levels = levels_of(quantized.codes, kind)
    np.testing.assert_array_equal(levels * common, (levels * common).astype(np.float16))
    np.testing.assert_array_equal(levels * common * factors.astype(np.float64), quantized.values())


@KINDS
@given(MATRICES, st.integers(-14, 9), st.floats(2.0**-14, 100, width=16))
def test_no_activation_goes_beyond_the_largest_sum(
    kind: Quantization, matrix: np.ndarray, exponent: int, input_scale: float
) -> None:
    quantized = quantized_weight(matrix * np.float32(2.0**exponent), kind)
    levels, reached = levels_of(quantized.codes, kind), quantized.largest_sum(input_scale)
    largest = rounded_to_grid(np.array(-np.inf), kind)
    worst = np.where(levels > 0, largest, -largest).T @ levels * input_scale * quantized.common_scale()
    behind = worst * quantized.column_factors().astype(np.float64)
    found = max(np.abs(np.diagonal(worst)).max(), np.abs(np.diagonal(behind)).max())
    # Saturated with the signs of a column an activation does reach it; int8 saturates at 127 on the other side.
    assert found <= reached * (1 + 1e-12)
    assert found >= reached * 127 / 128 * (1 - 1e-12)


@KINDS
def test_zero_columns_have_a_scale_and_stay_zero(kind: Quantization) -> None:
    quantized = quantized_weight(np.array([[0.0, 1.0], [0.0, -2.0]]), kind)
    assert quantized.scales[0] == 1
    np.testing.assert_array_equal(quantized.values()[:, 0], [0, 0])
    assert quantized.values()[1, 1] == pytest.approx(-2, rel=1e-3)
    # The scale of zeros, one, is not the scale of the whole.
    assert quantized.common_scale() == 2.0 ** np.floor(np.log2(quantized.scales[1]))
    assert quantized.column_factors()[0] == 1
    nothing = quantized_weight(np.zeros((3, 2)), kind)
    assert (nothing.common_scale(), nothing.largest_sum(1.0)) == (1, 0)


@KINDS
def test_a_scale_is_never_below_what_float16_has_nor_beyond(kind: Quantization) -> None:
    assert usable_scales(np.array(1e-12), kind) == SMALLEST_SCALE
    bounds = np.geomspace(1e-5, 1e4, 999)
    scales = usable_scales(bounds, kind).astype(np.float64)
    assert (scales * LARGEST[kind] >= bounds).all()
    for bound in (np.nan, np.inf, -1.0, 1e9):
        with pytest.raises(ValueError, match="no float16 scale"):
            usable_scales(np.array(bound), kind)
