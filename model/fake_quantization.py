"""The eager model with the rounding of a quantised engine: what such an engine is compared with. Level 1."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hstu_compile.config import Quantization
from hstu_compile.model.attention import compute_dtype
from hstu_compile.model.product import product_sites
from hstu_compile.quantized import LARGEST, ProductWeight, QuantizationPlan, SiteScales

_LOWEST_EXPONENT, _MANTISSA_BITS = -6, 3  # of e4m3fn
_HALF_UNIT = 2.0**-11  # of float16, relative


def product_weights(model: nn.Module) -> dict[str, ProductWeight]:
    """The constant matrix of every product of a model, by the site's name, in float32."""
    return {
        name: ProductWeight(site.weight_name, model.get_parameter(site.weight_name).detach().float().cpu().numpy())
        for name, site in product_sites(model).items()
    }


@contextlib.contextmanager
def fake_quantized(model: nn.Module, plan: QuantizationPlan, jitter: int | None = None) -> Iterator[nn.Module]:
    """Quantise and dequantise both operands of the planned products of a model, while the context lasts.

    The model's parameters stay as they are. Weights become the values of the same codes that a float16 graph of the
    plan holds, whatever the type of the model. Activations are rounded like ONNX's QuantizeLinear: divided in float32
    (float64 in a float64 model), ties to even, saturated to [-128, 127] or [-448, 448].

    Args:
        model: in evaluation mode, in any float type.
        plan: of the same model.
        jitter: seed of a move of every activation in front of its rounding, by up to half a unit in the last place of
            float16; None moves nothing. Rounding is a step: which values end on its other side is decided by their last
            bit, and every evaluation in float16 has other last bits. Runs with different seeds show how much that is.

    Raises:
        ValueError: if the plan has a site that the model lacks.
    """
    sites = product_sites(model)
    if unknown := sorted(set(plan.sites) - set(sites)):
        raise ValueError(f"the plan quantises {', '.join(unknown)}; the model has {', '.join(sites)}")
    with contextlib.ExitStack() as hooks:
        for number, (name, scales) in enumerate(plan.sites.items()):
            site = sites[name]
            generator = None
            if jitter is not None:
                generator = torch.Generator().manual_seed(jitter * len(plan.sites) + number)
            operands = _Operands(model.get_parameter(site.weight_name), scales, plan.kind, generator)
            hooks.callback(site.module.register_forward_pre_hook(operands).remove)
        yield model


class _Operands:
    """The hook of one product: replaces both operands."""

    def __init__(
        self, weight: Tensor, scales: SiteScales, kind: Quantization, generator: torch.Generator | None
    ) -> None:
        self.kind, self.scale, self.generator = kind, scales.input_scale, generator
        values = scales.weight(weight.detach().to(torch.float16).cpu().numpy(), kind).values()
        self.weight = torch.from_numpy(values).to(weight)
        self.factors: Tensor | None = None
        if scales.smoothing is not None:
            self.factors = 1.0 / torch.from_numpy(scales.smoothing).to(weight)

    def __call__(self, module: nn.Module, operands: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x = operands[0] if self.factors is None else operands[0] * self.factors
        wide = x.to(compute_dtype(x.dtype))
        if self.generator is not None:
            # Drawn on the CPU: the same seed moves the same values on every device.
            move = torch.rand(wide.shape, generator=self.generator, dtype=wide.dtype).to(wide.device)
            wide = wide * (1 + _HALF_UNIT * (2 * move - 1))
        levels = _rounded_to_grid(wide / self.scale, self.kind)
        return (levels * self.scale).to(x.dtype), self.weight


def _rounded_to_grid(steps: Tensor, kind: Quantization) -> Tensor:
    """`quantized.rounded_to_grid` in torch. A float8 type of torch would turn what is too large into NaN."""
    if kind == "int8":
        return steps.round().clamp(-128, 127)
    limited = steps.clamp(-LARGEST[kind], LARGEST[kind])
    exponent = torch.frexp(limited).exponent - 1
    spacing = torch.ldexp(torch.ones_like(limited), exponent.clamp(min=_LOWEST_EXPONENT) - _MANTISSA_BITS)
    return (limited / spacing).round() * spacing
