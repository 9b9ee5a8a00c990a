from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

from hstu_compile.model.product import Product, product_sites
from tests.dlrm_reference import DlrmForm
from tests.exported_models import TOP_K, exported_graph, ranking_model, research_model

ITEM_AND_CONTENT = ("item_mlp.hidden", "item_mlp.output", "content_mlp.hidden", "content_mlp.output")


def test_every_product_of_a_ranking_model_is_a_site_and_names_its_weight() -> None:
    model = ranking_model(DlrmForm())
    sites = product_sites(model)
    parameters = dict(model.named_parameters())
    assert {"layers.0.uvqk", "layers.0.output", "layers.1.uvqk", *ITEM_AND_CONTENT, "head.output"} <= set(sites)
    for site in sites.values():
        assert parameters[site.weight_name].ndim == 2


def test_a_hook_on_a_site_sees_both_operands_and_can_replace_them() -> None:
    model = research_model("fp32")
    site = product_sites(model)["layers.0.uvqk"]
    seen: list[tuple[torch.Size, torch.Size]] = []

    def zeroed(module: torch.nn.Module, operands: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        seen.append((operands[0].shape, operands[1].shape))
        return torch.zeros_like(operands[0]), operands[1]

    layer, x = model.layers[0], torch.randn(3, model.config.layer.embedding_dim)
    before = layer.project_uvqk(x)
    with torch.no_grad():
        site.module.register_forward_pre_hook(zeroed)
        after = layer.project_uvqk(x)
    assert seen == [(x.shape, layer.uvqk_weight.shape)]
    assert np.abs(before.q.detach().numpy()).max() > 0
    expected = 0 if layer.uvqk_bias is None else torch.nn.functional.silu(layer.uvqk_bias)
    packed = torch.cat([after.u, after.v, after.q, after.k], 1)
    assert torch.equal(packed, torch.zeros_like(packed) + expected)


def test_the_graph_has_a_constant_of_each_sites_name() -> None:
    model: onnx.ModelProto = exported_graph("fp32", top_k=TOP_K)
    constants = {tensor.name for tensor in model.graph.initializer}
    sites = product_sites(research_model("fp32"))
    assert sites
    for site in sites.values():
        assert sum(name.endswith(site.weight_name) for name in constants) == 1, site


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_product_is_its_float32_sum_rounded_once_and_one_operator_when_traced(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=random).to(dtype) for shape in ((7, 512), (512, 30)))
    result = Product()(x, weight)
    assert result.dtype == dtype
    exact = x.double() @ weight.double()
    # Half a unit in the last place, and what the sum of 512 float32 numbers adds to it.
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + 512 * torch.finfo(torch.float32).eps
    assert ((result.double() - exact).abs() <= bound).all()
    traced = torch.export.export(Product(), (x, weight))
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert called == [torch.ops.aten.matmul.default]
