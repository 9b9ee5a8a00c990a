"""The ladder of --mixed auto: as text for a terminal, and as tables and a picture of the report. Level 2.

All are made from the dict that manifest and report hold as the quantisation's `sensitivity`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hstu_compile._report_html import Column, Html, code, element, joined, simple_table, svg
from hstu_compile._report_text import aligned, one_line, plural, scientific

_WIDTH, _LABELS, _RIGHT = 640, 210, 70
_BAR, _PITCH, _TOP = 13, 22, 26


def ladder_table(ladder: Mapping[str, Any]) -> str:
    """First what each site does, then the steps, in columns."""
    names = list(ladder["reference"])
    sites = [
        (
            one_line(site["site"]),
            f"{site['alone']['scores']:.2%}",
            f"{site['others']['scores']:.2%}",
            *(f"{site['alone']['change'][name]:+.4f}" for name in names),
        )
        for site in ladder["sites"]
    ]
    header = ("product", "scores, alone", "all but it", *(f"{name}, alone" for name in names))
    steps = [
        (
            _step(rung),
            dtype,
            *(f"{values[name]:.4f}" for name in names),
            f"{rung['worst']:.4f}",
            "within" if rung["worst"] <= ladder["budget"] else "over",
        )
        for rung in ladder["rungs"]
        for dtype, values in rung["quality"].items()
    ]
    reference = ("not quantised", "fp32", *(f"{ladder['reference'][name]:.4f}" for name in names), "", "")
    return "\n".join(
        [
            f"{ladder['kind']}, {_data(ladder)}",
            *aligned([header, *sites]),
            "",
            *aligned([("step", "type", *names, "change", f"of {ladder['budget']:g}"), reference, *steps]),
        ]
    )


def ladder_section(ladder: Mapping[str, Any]) -> Html:
    """What each product does to quality, and how the ladder came within the budget."""
    names = list(ladder["reference"])
    kept = ladder["kept"]
    said = (
        f"--mixed auto left {plural(len(kept), 'product')} in float16, measured on {_data(ladder)}. The budget limits "
        "the change against the float32 model, to the better or to the worse: absolute for HR@10 and NDCG@10, relative "
        "for AUC and NE. A step is measured in both types and, where it is within the budget in both, in the graph "
        "that ships; it must be within the budget in all three. Products are left out in the order in which that "
        "brings the scores closest to those of the float32 model."
    )
    sites = simple_table(
        "What quantising does: relative root mean square difference of the scores, and change of the metrics",
        [
            Column("product"),
            Column("scores, it alone", numeric=True),
            Column("scores, all but it", numeric=True),
            *(Column(f"{name}, it alone", numeric=True) for name in names),
            *(Column(f"{name}, all but it", numeric=True) for name in names),
        ],
        [
            (
                code(site["site"]),
                scientific(site["alone"]["scores"]),
                scientific(site["others"]["scores"]),
                *(f"{site['alone']['change'][name]:+.4f}" for name in names),
                *(f"{site['others']['change'][name]:+.4f}" for name in names),
            )
            for site in ladder["sites"]
        ],
    )
    steps = simple_table(
        "The ladder",
        [
            Column("step"),
            Column("type"),
            *(Column(name, numeric=True) for name in names),
            Column("largest change", numeric=True),
        ],
        [
            ("not quantised", "fp32", *(f"{ladder['reference'][name]:.4f}" for name in names), ""),
            *(
                (_step(rung), dtype, *(f"{values[name]:.4f}" for name in names), f"{rung['worst']:.4f}")
                for rung in ladder["rungs"]
                for dtype, values in rung["quality"].items()
            ),
        ],
    )
    return joined((element("p", said), element("figure", _figure(ladder)), sites, steps))


def _figure(ladder: Mapping[str, Any]) -> Html:
    """A bar for each step, as long as its largest change, and a line where the budget is."""
    rungs, budget = ladder["rungs"], ladder["budget"]
    finite = [rung["worst"] for rung in rungs if math.isfinite(rung["worst"])]
    longest = max([*finite, budget]) or 1.0
    room = _WIDTH - _LABELS - _RIGHT
    parts = []
    for place, rung in enumerate(rungs):
        y = _TOP + place * _PITCH
        share = min(rung["worst"] / longest, 1.0) if math.isfinite(rung["worst"]) else 1.0
        width = round(max(room * share, 1.0), 1)
        kind = "artifact" if rung["worst"] <= budget else "eager"
        label = element("text", _step(rung), text_anchor="end", x=_LABELS - 8, y=y + _BAR - 2)
        bar = element("rect", class_=f"mark {kind}", x=_LABELS, y=y, width=width, height=_BAR)
        value = element("text", f"{rung['worst']:.4f}", class_="tick", x=_LABELS + width + 6, y=y + _BAR - 2)
        parts.append(element("g", element("title", f"{_step(rung)}: {rung['worst']:.4g}"), label, bar, value))
    x = round(_LABELS + room * budget / longest, 1)
    bottom = _TOP + len(rungs) * _PITCH
    parts.append(element("path", class_="line bound", d=f"M{x} {_TOP - 6}V{bottom}"))
    parts.append(element("text", f"budget {budget:g}", class_="tick", text_anchor="middle", x=x, y=_TOP - 11))
    described = "; ".join(f"{_step(rung)}: {rung['worst']:.4g}" for rung in rungs)
    title = "Largest change of a metric at each step of the ladder"
    return svg("ladder", title, f"{described}; budget {budget:g}", _WIDTH, bottom + 6, "plot", parts)


def _step(rung: Mapping[str, Any]) -> str:
    return "all quantised" if rung["kept"] is None else f"+ {one_line(rung['kept'])} in fp16"


def _data(ladder: Mapping[str, Any]) -> str:
    data = ladder["data"]
    return f"{plural(data['requests'], 'request')} of {one_line(data['file'])} with a budget of {ladder['budget']:g}"
