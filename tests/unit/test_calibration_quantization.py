"""From a table and weights to a plan: which products, which scales, and which requests for it are refused."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from hstu_compile.calibration.quantization import plan_quantization, smoothing_factors
from hstu_compile.calibration.site_statistics import SiteStatistics
from hstu_compile.calibration.table import CalibrationTable
from hstu_compile.errors import UsageError
from hstu_compile.quantized import ProductWeight, usable_scales

RNG = np.random.default_rng(0)
ROWS = {
    "item_mlp.hidden": RNG.normal(size=(50, 4)).astype(np.float32),
    "layers.0.uvqk": (RNG.normal(size=(50, 4)) * [1, 1, 1, 100]).astype(np.float32),
    "layers.0.output": np.zeros((50, 4), np.float32),
    "action_mlp.hidden": np.zeros((0, 4), np.float32),
    "time_combiner": np.ones((50, 4), np.float32),
    "contextual.0": np.ones((50, 4), np.float32),
    "head.output": np.ones((50, 4), np.float32),
}
WEIGHTS = {name: ProductWeight(f"{name}.weight", RNG.normal(size=(4, 3)).astype(np.float32)) for name in ROWS}


def table(observer: Any = "percentile") -> CalibrationTable:
    sites = {name: SiteStatistics.of(name, rows, 3) for name, rows in ROWS.items()}
    return CalibrationTable("0" * 64, "native", {}, observer, (), sites)


def test_layers_and_towers_are_quantised_and_every_other_product_has_a_reason() -> None:
    plan = plan_quantization(table(), WEIGHTS, "int8")
    assert list(plan.sites) == ["item_mlp.hidden", "layers.0.uvqk"]
    assert set(plan.kept) == set(ROWS) - set(plan.sites)
    assert "all zero in calibration" in plan.kept["layers.0.output"]
    assert "saw none" in plan.kept["action_mlp.hidden"]
    for name, scales in plan.sites.items():
        bound = table().bound(name, "percentile", "int8")
        assert scales.input_scale == usable_scales(np.array(bound), "int8")
        assert scales.smoothing is None
        assert scales.weight_scales.shape == (3,)
        assert scales.weight_name == f"{name}.weight"


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("observer", ["amax", "percentile", "entropy", "mse"])
def test_the_rule_that_is_asked_for_goes_before_the_tables(kind: Any, observer: Any) -> None:
    plan = plan_quantization(table("amax"), WEIGHTS, kind, observer)
    bound = table().bound("layers.0.uvqk", observer, kind)
    assert plan.sites["layers.0.uvqk"].input_scale == usable_scales(np.array(bound), kind)


def test_products_that_are_kept_on_request_say_so() -> None:
    plan = plan_quantization(table(), WEIGHTS, "fp8", keep=["layers.0.uvqk"])
    assert list(plan.sites) == ["item_mlp.hidden"]
    assert plan.kept["layers.0.uvqk"] == "--keep-fp16"


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize(("activation", "weight"), [(4e8, 1.0), (1.0, 7e4)], ids=["activations", "weights"])
def test_a_product_without_a_float16_scale_stays_with_the_reason(kind: Any, activation: float, weight: float) -> None:
    name = "layers.0.uvqk"
    sites = {**table("amax").sites, name: SiteStatistics.of(name, np.full((8, 4), activation, np.float32), 3)}
    made = CalibrationTable("0" * 64, "native", {}, "amax", (), sites)
    large = ProductWeight("w", np.full((4, 3), weight, np.float32))
    plan = plan_quantization(made, {**WEIGHTS, name: large}, kind)
    assert list(plan.sites) == ["item_mlp.hidden"]
    shown = f"activations up to {activation:.3g} and its weights up to {weight:.3g}"
    assert plan.kept[name] == f"no float16 scale covers its {shown}"


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("is_beyond", [False, True])
def test_a_product_whose_sums_could_leave_float16_stays_with_the_reason(kind: Any, is_beyond: bool) -> None:
    name, size = "item_mlp.hidden", 256
    largest = 65504 / size * (1.05 if is_beyond else 0.95)  # times `size` weights of one
    rows = np.full((8, size), largest, np.float32)
    sites = {**table("amax").sites, name: SiteStatistics.of(name, rows, 2)}
    ones = ProductWeight("w", np.ones((size, 2), np.float32))
    made = CalibrationTable("0" * 64, "native", {}, "amax", (), sites)
    plan = plan_quantization(made, {**WEIGHTS, name: ones}, kind)
    assert (name in plan.sites) is not is_beyond
    assert "layers.0.uvqk" in plan.sites
    if is_beyond:
        found = re.fullmatch(r"its sums can reach ([0-9,]+), and float16 ends at 65,504", plan.kept[name])
        assert found is not None, plan.kept[name]
        # int8 reaches 128 where calibration saw 127; scales are rounded up to the next float16 number.
        assert 1.05 <= int(found[1].replace(",", "")) / 65504 <= 1.05 * 128 / 127 * 1.002


def test_smoothing_moves_the_range_of_a_large_column_into_the_weight() -> None:
    plain = plan_quantization(table(), WEIGHTS, "int8", "amax").sites["layers.0.uvqk"]
    smooth = plan_quantization(table(), WEIGHTS, "int8", smooth_alpha=0.5).sites["layers.0.uvqk"]
    assert smooth.smoothing is not None
    assert smooth.smoothing[3] >= 4 * smooth.smoothing[:3].max()
    assert smooth.input_scale < plain.input_scale / 4
    largest = (np.abs(ROWS["layers.0.uvqk"]).max(axis=0) / smooth.smoothing).max()
    assert smooth.input_scale == usable_scales(np.array(largest), "int8")


def test_smoothing_factors_are_powers_of_two_near_the_formula() -> None:
    amax = np.array([0.3, 20.0, 0.0, 1.0, 1e6])
    matrix = np.array([[0.5], [0.01], [1.0], [0.0], [1e-6]], np.float32)
    factors = smoothing_factors(amax, matrix, 0.5)
    np.testing.assert_array_equal(factors, [1, 32, 1, 1, 256])  # sqrt(.6), sqrt(2000) = 45, zeros, the limit
    np.testing.assert_array_equal(np.frexp(factors)[0], 0.5)
    assert (smoothing_factors(amax[:2], matrix[:2], 0.0) == [2, 128]).all()


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        ({"keep": ["layers.0.uvkq", "nothing"]}, "HSTU-E905", "nearest: layers.0.uvqk"),
        ({"smooth_alpha": 1.5}, "HSTU-E901", "0 to 1"),
        ({"smooth_alpha": 0.5, "observer": "mse"}, "HSTU-E901", "exclude each other"),
    ],
)
def test_what_cannot_be_planned_is_refused(options: dict[str, Any], code: str, text: str) -> None:
    with pytest.raises(UsageError, match=text) as refused:
        plan_quantization(table(), WEIGHTS, "int8", **options)
    assert refused.value.code == code
