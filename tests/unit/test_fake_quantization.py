"""The eager model with the rounding of a quantised engine, against the same written down with NumPy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from hstu_compile.config import Quantization
from hstu_compile.model.fake_quantization import fake_quantized, product_weights
from hstu_compile.model.product import product_sites
from hstu_compile.quantized import QuantizationPlan, SiteScales, quantized_weight, rounded_to_grid
from tests.exported_models import research_model

SITE = "layers.0.uvqk"
INPUT_SCALE = 2.0**-5 + 2.0**-9
KINDS = pytest.mark.parametrize("kind", ["int8", "fp8"])


def plan_of(model: torch.nn.Module, kind: Quantization, smoothing: np.ndarray | None = None) -> QuantizationPlan:
    weight = product_weights(model)[SITE]
    scales = quantized_weight(weight.matrix, kind, smoothing).scales
    return QuantizationPlan(kind, {SITE: SiteScales(weight.name, INPUT_SCALE, scales, smoothing)}, {})


@KINDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("is_smooth", [False, True])
def test_both_operands_are_rounded_as_a_graph_rounds_them(
    kind: Quantization, dtype: torch.dtype, is_smooth: bool
) -> None:
    model = research_model("fp32")
    width = model.config.layer.embedding_dim
    smoothing = np.exp2(np.arange(width) % 4 - 1).astype(np.float32) if is_smooth else None
    plan = plan_of(model, kind, smoothing)
    codes = quantized_weight(product_weights(model)[SITE].matrix, kind, smoothing)
    model.cast(dtype)
    x = (4 * torch.randn(11, width, generator=torch.Generator().manual_seed(0))).to(dtype)
    site = product_sites(model)[SITE].module
    weight = model.layers[0].uvqk_weight
    plain = site(x, weight)
    seen = []
    with fake_quantized(model, plan) as quantized:
        assert quantized is model
        site.register_forward_hook(lambda module, operands, result: seen.append(operands))
        rounded = site(x, weight)
    [(actual_x, actual_weight)] = seen
    divided = x.numpy().astype(np.float64) / (1 if smoothing is None else smoothing)
    wide = np.float64 if dtype == torch.float64 else np.float32
    steps = divided.astype(wide) / wide(INPUT_SCALE)
    expected = torch.from_numpy(rounded_to_grid(steps, kind) * INPUT_SCALE).to(dtype)
    torch.testing.assert_close(actual_x, expected, rtol=0, atol=0)
    # The integers of every type of the model are those of the checkpoint's weights in float16.
    torch.testing.assert_close(actual_weight, torch.from_numpy(codes.values()).to(dtype), rtol=0, atol=0)
    assert not torch.equal(rounded, plain)
    assert torch.equal(site(x, weight), plain), "the context left its hooks"


def test_jitter_moves_what_lies_near_a_step_and_nothing_else() -> None:
    model = research_model("fp16")
    plan = plan_of(model, "int8")
    site, weight = product_sites(model)[SITE].module, model.layers[0].uvqk_weight
    width = weight.shape[0]
    on_steps = torch.full((3, width), INPUT_SCALE * 8, dtype=torch.float16)
    between = torch.full((3, width), INPUT_SCALE * 8.5, dtype=torch.float16)

    def result(x: torch.Tensor, jitter: int | None) -> torch.Tensor:
        with fake_quantized(model, plan, jitter):
            return site(x, weight)

    assert torch.equal(result(on_steps, 1), result(on_steps, None))
    assert not torch.equal(result(between, 1), result(between, None))
    assert torch.equal(result(between, 1), result(between, 1))
    assert not torch.equal(result(between, 1), result(between, 2))


def test_a_plan_of_another_model_is_refused() -> None:
    model = research_model("fp32")
    plan = plan_of(model, "int8")
    strange = dataclasses.replace(plan, sites={"layers.9.uvqk": plan.sites[SITE]})
    with (
        pytest.raises(ValueError, match=r"layers\.9\.uvqk; the model has layers\.0\.uvqk"),
        fake_quantized(model, strange),
    ):
        pass


def test_a_plan_without_a_site_says_why_it_stays() -> None:
    plan = plan_of(research_model("fp32"), "int8")
    rest = plan.without([SITE], "it costs too much")
    assert not rest.sites
    assert rest.kept == {SITE: "it costs too much"}
    assert rest.to_dict() == {"kind": "int8", "sites": {}, "kept": {SITE: "it costs too much"}}
