"""The report's section on quantised products. Level 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hstu_compile._report_html import Column, Group, Html, code, element, joined, table
from hstu_compile._report_ladder import ladder_section
from hstu_compile._report_text import plural, scientific


def quantization_section(quantization: Mapping[str, Any]) -> Html:
    """Scales of each quantised product, the reason of each that is not, and what the quantisation itself changes.

    Args:
        quantization: the report's part of that name.
    """
    sites, kept, calibration = quantization["sites"], quantization["kept"], quantization["calibration"]
    smoothing = quantization["smooth_quant"]
    said = (
        f"{plural(len(sites), 'product')} in {quantization['kind']}, {len(kept)} left in float16. Activations are "
        f"bounded by the rule {quantization['observer']}, weights by the largest value of each column"
        + (f"; smoothing with alpha {smoothing:g}" if smoothing is not None else "")
        + f". Statistics of {plural(calibration['samples'], 'request')} from "
    )
    columns = (
        Column("product"),
        Column("computed in"),
        Column("scale of the activation", numeric=True),
        Column("scales of the weight", numeric=True),
        Column("smoothing", numeric=True),
        Column("why"),
    )
    rows = [
        (
            code(name),
            quantization["kind"],
            scientific(scales["input_scale"]),
            " to ".join(map(scientific, scales["weight_scales"])),
            "" if scales["smoothing"] is None else " to ".join(f"{factor:g}" for factor in scales["smoothing"]),
            "",
        )
        for name, scales in sites.items()
    ]
    rest = [(code(name), "fp16", "", "", "", reason) for name, reason in kept.items()]
    groups = [Group(None, rows), *([Group("left in float16", rest)] if rest else [])]
    return joined(
        (
            element("p", said, code(calibration["file"]), "."),
            table("Products with a constant matrix", columns, groups),
            _cost(quantization["cost"]),
            *([ladder_section(quantization["sensitivity"])] if quantization.get("sensitivity") else []),
        )
    )


def _cost(cost: Mapping[str, float] | None) -> Html:
    if not cost:
        return element("p", "What the quantisation changes was not measured: the build was not verified.")
    listed = ", ".join(f"{name} {scientific(error)}" for name, error in cost.items())
    return element(
        "p",
        "What the quantisation itself changes, in float64, by the measure of the verification and over its requests: "
        f"{listed}. This decides nothing about PASS: the verification compares an artifact with the eager model that "
        "rounds to the same numbers. Quality on recorded requests is a question of its own.",
    )
