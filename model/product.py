"""The places of a model where activations meet a constant matrix: what a low-precision engine quantises. Level 1."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn


class Product(nn.Module):
    """x @ weight, as a module of its own, so that a hook can see or replace both operands.

    It owns no parameter: the weight stays with the module that has the bias, under the name that checkpoints map to.
    """

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """[L, inputs] @ [inputs, outputs] -> [L, outputs]; half operands are added up in float32 and rounded once."""
        if x.dtype in _HALF and x.device.type == "cpu" and not torch.compiler.is_compiling():
            # PyTorch's own product of these types adds up in float32 too, but on a CPU without instructions for them it
            # takes 36 to 50 times as long as this (409 x 512 x 2048): most of the time of verifying a float16 build.
            return (x.float() @ weight.float()).to(x.dtype)
        return x @ weight


_HALF = (torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class ProductSite:
    """One product of a model.

    Attributes:
        name: such as layers.0.uvqk or item_mlp.hidden; calibration tables and options use it.
        weight_name: of the parameter, such as layers.0.uvqk_weight; the exported graph's constant ends with it.
        module: takes x and the weight.
    """

    name: str
    weight_name: str
    module: Product = dataclasses.field(repr=False)


def product_sites(model: nn.Module) -> dict[str, ProductSite]:
    """Every product of a model by its name, in the order in which the modules were made."""
    sites = {}
    for path, module in model.named_modules():
        if isinstance(module, Product):
            name = path.removesuffix("product")
            sites[name[:-1]] = ProductSite(name[:-1], f"{name}weight", module)
    return sites


def product_sizes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """The inputs and outputs of every product of a model by its name."""
    shapes = {name: model.get_parameter(site.weight_name).shape for name, site in product_sites(model).items()}
    return {name: (shape[0], shape[1]) for name, shape in shapes.items()}
