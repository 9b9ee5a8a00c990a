"""The small feed-forward parts of a ranking model. Level 1.

In half precision the products are half; what is elementwise in between is float32 and rounded once, as in the layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hstu_compile.model.attention import compute_dtype
from hstu_compile.model.layer import Norm
from hstu_compile.model.product import Product

NORM_EPS = 1e-5


class Affine(nn.Module):
    """x @ weight + bias, with the bias added in float32 for half inputs."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(inputs, outputs)))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.product = Product()

    def forward(self, x: Tensor) -> Tensor:
        """[L, inputs] -> [L, outputs] in `compute_dtype`."""
        wide = compute_dtype(x.dtype)
        product: Tensor = self.product(x, self.weight)
        return product.to(wide) + self.bias.to(wide)


class SwishNormMlp(nn.Module):
    """Affine, x * sigmoid(LN(x)), affine, and a last LN where `final_norm`.

    The gate is the normed value, what it gates is the value itself: this is not SiLU(LN(x)).
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, *, final_norm: bool) -> None:
        super().__init__()
        self.hidden = Affine(inputs, hidden)
        self.hidden_norm = Norm(hidden, 1, affine=True, eps=NORM_EPS)
        self.output = Affine(hidden, outputs)
        self.output_norm = Norm(outputs, 1, affine=True, eps=NORM_EPS) if final_norm else None

    def forward(self, x: Tensor) -> Tensor:
        """[L, inputs] -> [L, outputs] in `compute_dtype`."""
        hidden = self.hidden(x)
        gated = hidden * torch.sigmoid(self.hidden_norm(hidden))
        out: Tensor = self.output(gated.to(x.dtype))
        return out if self.output_norm is None else self.output_norm(out)
