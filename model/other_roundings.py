"""The eager model as another evaluation in its type would round it: what an artifact may differ by. Level 1."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hstu_compile.model.product import product_sites


@contextlib.contextmanager
def other_roundings(model: nn.Module, seed: int) -> Iterator[nn.Module]:
    """Move what every product of a model gives by up to half a unit in the last place, while the context lasts.

    The model's parameters stay as they are. A product is where evaluations of one model differ: each adds up in an
    order of its own, and all that follows takes the difference on.

    Args:
        model: in evaluation mode, in any float type. Half a unit is that of the type a product gives; a result that
            ends between two numbers of it is rounded to the nearer one.
        seed: runs with different seeds show how much of an answer is rounding.
    """
    with contextlib.ExitStack() as hooks:
        moved = _Moved(torch.Generator().manual_seed(seed))
        for site in product_sites(model).values():
            hooks.callback(site.module.register_forward_hook(moved).remove)
        yield model


class _Moved:
    """The hook of every product: replaces its result."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def __call__(self, module: nn.Module, operands: tuple[Tensor, Tensor], result: Tensor) -> Tensor:
        # Drawn on the CPU: the same seed moves the same values on every device.
        share = torch.rand(result.shape, generator=self.generator, dtype=torch.float32).to(result.device)
        half_unit = torch.finfo(result.dtype).eps / 2
        # In float64: in the result's own type a factor this near to one would itself be rounded.
        return (result.double() * (1 + half_unit * (2 * share.double() - 1))).to(result.dtype)
