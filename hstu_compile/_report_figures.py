"""The two pictures of the report, as inline SVG: the pipeline, and the error of each layer. Level 2.

Colours come from the page's style sheet by class, so both pictures follow the light and the dark scheme. Every picture
has a title and a description; every number in it is in a table of the page too.
"""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from hstu_compile._report_html import Html, element, svg
from hstu_compile._report_text import mebibytes, number, one_line, plural, scientific

# --- pipeline ---------------------------------------------------------------------------------------------------------

_BOX_WIDTH = 152
_BOX_GAP = 20
_LINE_HEIGHT = 16
_BOX_PADDING = 9
#: Letters of the 11.5 px text that fit between the paddings in DejaVu Sans, the widest of the usual fonts: 6.6 px each.
_BOX_CHARS = 20
_MAX_FACT_LINES = 6

#: Names that a stage may have in the report, for each box of the picture.
_STAGE_NAMES = {
    "Checkpoint": ("checkpoint",),
    "Eager model": ("eager", "model"),
    "ONNX": ("export", "onnx"),
    "Passes": ("rewrite", "passes"),
    "Engine": ("engine",),
    "Verification": ("verify", "verification"),
    "Bundle": ("bundle",),
}


@dataclasses.dataclass(frozen=True)
class _Box:
    title: str
    facts: Sequence[str]
    seconds: float | None
    kind: str = ""


def pipeline_figure(report: Mapping[str, Any]) -> Html:
    """The stages from checkpoint to bundle, each with its facts and its time."""
    boxes = _pipeline_boxes(report)
    wrapped = [_fact_lines(box.facts) for box in boxes]
    lines = max(len(facts) for facts in wrapped)
    height = 2 * _BOX_PADDING + (lines + 2) * _LINE_HEIGHT + 6
    parts = []
    for index, (box, facts) in enumerate(zip(boxes, wrapped, strict=True)):
        x = 1 + index * (_BOX_WIDTH + _BOX_GAP)
        if index:
            y, tip = height / 2, x - 3
            parts.append(
                element(
                    "path",
                    class_="arrow",
                    d=f"M{x - _BOX_GAP + 2} {y}H{tip}M{tip - 5} {y - 4}L{tip} {y}L{tip - 5} {y + 4}",
                )
            )
        rect = element("rect", class_=f"box {box.kind}".strip(), x=x, y=1, width=_BOX_WIDTH, height=height - 2, rx=3)
        baseline = _BOX_PADDING + 12
        texts = [element("text", box.title, class_="box-title", x=x + _BOX_PADDING, y=baseline)]
        texts += [
            element("text", line, x=x + _BOX_PADDING, y=baseline + 3 + (place + 1) * _LINE_HEIGHT)
            for place, line in enumerate(facts)
        ]
        time = "no time of its own" if box.seconds is None else f"{number(box.seconds)} s"
        texts.append(
            element("text", time, class_="box-time", x=x + _BOX_WIDTH - _BOX_PADDING, y=height - _BOX_PADDING - 2)
        )
        parts.append(element("g", element("title", "; ".join((box.title, *box.facts, time))), rect, *texts))
    width = 2 + len(boxes) * _BOX_WIDTH + (len(boxes) - 1) * _BOX_GAP
    description = "; ".join(f"{box.title}: {', '.join(box.facts)}" for box in boxes)
    return svg("pipeline", "From the checkpoint to the bundle", description, width, height, "pipeline", parts)


def _pipeline_boxes(report: Mapping[str, Any]) -> list[_Box]:
    stages = {stage["name"]: stage for stage in report["stages"] or ()}

    def box(title: str, facts: Sequence[str], kind: str = "") -> _Box:
        found = [stages[name]["seconds"] for name in _STAGE_NAMES[title] if name in stages]
        seconds = [value for value in found if value is not None]
        return _Box(title, [one_line(fact) for fact in facts], sum(seconds) if seconds else None, kind)

    return [
        box("Checkpoint", _checkpoint_facts(report, stages)),
        box("Eager model", _eager_facts(report)),
        box("ONNX", *_onnx_facts(report["graphs"] or ())),
        box("Passes", *_pass_facts(report["graphs"] or ())),
        box("Engine", *_engine_facts(report)),
        box("Verification", *_verification_facts(report)),
        box("Bundle", *_bundle_facts(report["files"] or ())),
    ]


def _checkpoint_facts(report: Mapping[str, Any], stages: Mapping[str, Mapping[str, Any]]) -> list[str]:
    checkpoint = report["checkpoint"]
    if checkpoint is None:
        return ["not recorded"]
    facts = [_shortened(PurePath(one_line(checkpoint["file"])).name), f"dialect {checkpoint['dialect']}"]
    summary = stages.get("checkpoint", {}).get("summary")
    return [*facts, str(summary)] if summary else facts


def _eager_facts(report: Mapping[str, Any]) -> list[str]:
    facts = [f"PyTorch, {report['precision']}"]
    layers = [layer for run in (report["verification"] or {}).get("runs") or () for layer in run["layers"] or ()]
    if layers:
        facts.append("checked in float64")
        facts.append(f"error ≤ {scientific(_worst(layer['eager_error'] for layer in layers))}")
    return facts


def _onnx_facts(graphs: Sequence[Mapping[str, Any]]) -> tuple[list[str], str]:
    if not graphs:
        return ["not exported"], "absent"
    operators = [item for graph in graphs for item in (graph["operators"] or {}).items()]
    attention = sum(count for name, count in operators if name.endswith("HstuAttention"))
    facts = [
        f"{number(attention)} HstuAttention",
        f"{plural(sum(graph['nodes'] for graph in graphs), 'node')} in all",
        f"{mebibytes(sum(graph['initializers_bytes'] for graph in graphs))} MiB weights",
    ]
    return ([plural(len(graphs), "graph"), *facts] if len(graphs) > 1 else facts), ""


def _pass_facts(graphs: Sequence[Mapping[str, Any]]) -> tuple[list[str], str]:
    """Passes by name, what each counted summed over the graphs."""
    counted: Counter[str] = Counter()
    for graph in graphs:
        for record in graph["passes"] or ():
            # Not `update`, which forgets a pass that counted nothing.
            counted[record["name"]] += sum(record["counts"].values())
    if not counted:
        return ["not run"], "absent"
    facts = [plural(len(counted), "pass")]
    facts += [f"{name} {number(count)}" for name, count in list(counted.items())[:3]]
    return facts + ([f"and {len(counted) - 3} more"] if len(counted) > 3 else []), ""


def _engine_facts(report: Mapping[str, Any]) -> tuple[list[str], str]:
    backend = report["backend"]
    engines = [graph["engine"] for graph in report["graphs"] or () if graph["engine"] is not None]
    if not engines:
        return ["not built"] + ([str(backend["reason"])] if backend and backend["reason"] else []), "absent"
    facts = [f"{backend['name']} {backend['version']}"] if backend else []
    if len(engines) > 1:
        facts.append(plural(len(engines), "engine"))
    facts.append(f"{mebibytes(sum(engine['bytes'] for engine in engines))} MiB")
    facts.append(plural(sum(len(engine["profiles"] or ()) for engine in engines), "profile"))
    if backend and backend["compute_capabilities"]:
        facts.append("for " + ", ".join(str(item) for item in backend["compute_capabilities"]))
    return facts, ""


def _verification_facts(report: Mapping[str, Any]) -> tuple[list[str], str]:
    verification = report["verification"] or {}
    runs = verification.get("runs") or ()
    ran = sum(run["status"] != "NOT RUN" for run in runs)
    facts = [str(report["status"])]
    if verification.get("worst_error") is not None:
        facts.append(f"worst error {scientific(verification['worst_error'])}")
    if runs:
        facts.append(f"{number(ran)} of {plural(len(runs), 'artifact')} run")
    return facts, {"PASS": "pass", "FAIL": "fail"}.get(report["status"], "absent")


def _bundle_facts(files: Sequence[Mapping[str, Any]]) -> tuple[list[str], str]:
    if not files:
        return ["no files listed"], "absent"
    return [plural(len(files), "file"), f"{mebibytes(sum(item['bytes'] for item in files))} MiB"], ""


def _shortened(name: str) -> str:
    """A file name in the width of a box: what is cut is its middle, since names differ at their ends."""
    if len(name) <= _BOX_CHARS:
        return name
    tail = _BOX_CHARS // 2
    return f"{name[: _BOX_CHARS - tail - 1]}…{name[-tail:]}"


def _fact_lines(facts: Sequence[str]) -> list[str]:
    """Facts broken to the width of a box; one that needs more than two lines is cut, with an ellipsis."""
    lines: list[str] = []
    for fact in facts:
        lines += textwrap.wrap(fact, _BOX_CHARS, max_lines=2, placeholder=" …", break_on_hyphens=False) or [""]
    return lines if len(lines) <= _MAX_FACT_LINES else [*lines[: _MAX_FACT_LINES - 1], "…"]


# --- error of each layer ----------------------------------------------------------------------------------------------

_PLOT_WIDTH, _PLOT_HEIGHT = 560, 310
_LEFT, _RIGHT, _TOP, _BOTTOM = 74, 16, 40, 46
#: Height of the band outside the logarithmic scale that holds zeros (below) or values that are not finite (above).
_BAND = 32
_MAX_DECADE_LABELS = 7
_MAX_LAYER_LABELS = 16


@dataclasses.dataclass(frozen=True)
class _Scale:
    """Logarithmic y scale over whole decades, with bands for what a logarithm cannot show."""

    low: int
    high: int
    has_zero: bool
    has_nonfinite: bool

    @classmethod
    def covering(cls, values: Sequence[float]) -> _Scale:
        positive = [value for value in values if math.isfinite(value) and value > 0]
        low = math.floor(math.log10(min(positive))) if positive else -1
        high = math.ceil(math.log10(max(positive))) if positive else 0
        return cls(
            low, max(high, low + 1), any(value == 0 for value in values), any(not math.isfinite(v) for v in values)
        )

    @property
    def top(self) -> float:
        return _TOP + (_BAND if self.has_nonfinite else 0)

    @property
    def bottom(self) -> float:
        return _PLOT_HEIGHT - _BOTTOM - (_BAND if self.has_zero else 0)

    def y(self, value: float) -> float:
        if not math.isfinite(value):
            return self.top - _BAND / 2
        if value <= 0:
            return self.bottom + _BAND / 2
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return round(self.bottom - share * (self.bottom - self.top), 1)

    def ticks(self) -> list[float]:
        decades = self.high - self.low
        if decades <= 2:
            steps = [m * 10.0**e for e in range(self.low, self.high) for m in (1, 2, 5)]
            return [*steps, 10.0**self.high]
        step = math.ceil(decades / (_MAX_DECADE_LABELS - 1))
        return [10.0**e for e in range(self.low, self.high + 1, step)]


@dataclasses.dataclass(frozen=True)
class LayerBounds:
    """What the errors of a run's layers are measured against.

    Attributes:
        recorded: the run has a bound for every layer; otherwise twice eager's error stands in as a guide.
        values: one for each layer.
    """

    recorded: bool
    values: Sequence[float]

    @property
    def label(self) -> str:
        """Name of the values in a legend or a column's header."""
        return "bound" if self.recorded else "twice eager's error"


def layer_bounds(layers: Sequence[Mapping[str, Any]]) -> LayerBounds:
    """The bounds of a run's layers: as recorded under `bound`, else twice the error of eager in the same precision."""
    if all(layer.get("bound") is not None for layer in layers):
        return LayerBounds(True, [layer["bound"] for layer in layers])
    return LayerBounds(False, [2 * layer["eager_error"] for layer in layers])


def layer_error_figures(runs: Sequence[Mapping[str, Any]]) -> list[Html]:
    """One picture for each run, all on one scale so that they can be compared by eye; every run has layers."""
    values = [v for run in runs for layer in run["layers"] for v in (layer["error"], layer["eager_error"])]
    values += [bound for run in runs for bound in layer_bounds(run["layers"]).values]
    scale = _Scale.covering(values)
    return [_layer_error_figure(index, run, scale) for index, run in enumerate(runs)]


def _layer_error_figure(index: int, run: Mapping[str, Any], scale: _Scale) -> Html:
    layers, bounds = run["layers"], layer_bounds(run["layers"])
    slot = (_PLOT_WIDTH - _LEFT - _RIGHT) / len(layers)
    # A layer sits in the middle of its slot: one layer is then in the middle of the plot, and none on the frame.
    xs = [round(_LEFT + slot * (place + 0.5), 1) for place in range(len(layers))]
    errors, eager = [layer["error"] for layer in layers], [layer["eager_error"] for layer in layers]
    # In the order of drawing: the artifact's marks lie on top.
    series = (
        ("bound", bounds.label, bounds.values),
        ("eager", "eager, same precision", eager),
        ("artifact", one_line(run["artifact"]), errors),
    )
    parts = [*_axes(layers, xs, scale), _legend([(kind, label) for kind, label, _ in reversed(series)])]
    radius = 3.5 if slot > 16 else 1.6
    for kind, label, values in series:
        points = list(zip(xs, values, strict=True))
        path = _steps(points, slot / 2, scale) if kind == "bound" else _polyline(points, scale)
        parts.append(element("path", class_=f"line {kind}", d=path))
        for layer, (x, value) in zip(layers, points, strict=True):
            title = element("title", f"layer {layer['layer']}, {label}: {scientific(value)}")
            parts.append(element("g", title, _marker(kind, x, scale.y(value), radius)))
    name = f"{run['runtime']}, {run['artifact']}"
    description = (
        f"Logarithmic plot over {plural(len(layers), 'layer')}. Largest error of the artifact: "
        f"{scientific(_worst(errors))}; of eager in the same precision: {scientific(_worst(eager))}."
    )
    headline = f"Error of each layer, {name}"
    picture = svg(f"layers-{index}", headline, description, _PLOT_WIDTH, _PLOT_HEIGHT, "plot", parts)
    return element("figure", element("figcaption", name), picture)


def _axes(layers: Sequence[Mapping[str, Any]], xs: Sequence[float], scale: _Scale) -> list[Html]:
    left, right, floor = _LEFT, _PLOT_WIDTH - _RIGHT, _PLOT_HEIGHT - _BOTTOM
    parts = []
    for tick in scale.ticks():
        y = scale.y(tick)
        parts.append(element("path", class_="grid", d=f"M{left} {y}H{right}"))
        parts.append(element("text", f"{tick:.0e}", class_="tick", text_anchor="end", x=left - 7, y=y + 4))
    if scale.has_zero:
        parts.append(element("path", class_="frame", d=f"M{left} {scale.bottom}H{right}"))
        parts.append(element("text", "0", class_="tick", text_anchor="end", x=left - 7, y=scale.bottom + _BAND / 2 + 4))
    if scale.has_nonfinite:
        parts.append(element("path", class_="frame", d=f"M{left} {scale.top}H{right}"))
        parts.append(
            element("text", "not finite", class_="tick", text_anchor="end", x=left - 7, y=scale.top - _BAND / 2 + 4)
        )
    every = math.ceil(len(layers) / _MAX_LAYER_LABELS)
    for place in range(0, len(layers), every):
        parts.append(element("path", class_="frame", d=f"M{xs[place]} {floor}v4"))
        parts.append(
            element("text", layers[place]["layer"], class_="tick", text_anchor="middle", x=xs[place], y=floor + 17)
        )
    parts.append(element("rect", class_="frame", x=left, y=_TOP, width=right - left, height=floor - _TOP))
    parts.append(
        element("text", "layer", class_="axis", text_anchor="middle", x=(left + right) / 2, y=_PLOT_HEIGHT - 8)
    )
    middle = (_TOP + floor) / 2
    label = "error against float64"
    parts.append(
        element(
            "text", label, class_="axis", text_anchor="middle", transform=f"rotate(-90 14 {middle})", x=14, y=middle
        )
    )
    return parts


def _legend(entries: Sequence[tuple[str, str]]) -> Html:
    parts, x = [], float(_LEFT)
    for kind, label in entries:
        shown = (
            textwrap.shorten(label, 30, placeholder=" …")
            if " " in label
            else label
            if len(label) <= 30
            else label[:29] + "…"
        )
        parts.append(element("path", class_=f"line {kind}", d=f"M{x} 18h26"))
        parts.append(_marker(kind, x + 13, 18, 3.5))
        parts.append(element("text", shown, class_="legend", x=x + 32, y=22))
        x += 32 + 6.3 * len(shown) + 18
    return element("g", *parts)


def _marker(kind: str, x: float, y: float, radius: float) -> Html:
    """Artifact: a disc. Eager: an open square, so that the two differ without colour and when they coincide.

    The bound's is invisible and gives the pointer something to rest on.
    """
    if kind == "eager":
        size = 2 * radius + (2 if radius > 3 else 1)
        corner = size / 2
        return element("rect", class_="mark eager", x=x - corner, y=y - corner, width=size, height=size)
    return element("circle", class_=f"mark {kind}", cx=x, cy=y, r=radius)


def _polyline(points: Sequence[tuple[float, float]], scale: _Scale) -> str:
    """A path through the points, broken at zeros and at values that are not finite: they have no place on the scale."""
    commands, joined_before = [], False
    for x, value in points:
        on_scale = math.isfinite(value) and value > 0
        if on_scale:
            commands.append(f"{'L' if joined_before else 'M'}{x} {scale.y(value)}")
        joined_before = on_scale
    return "".join(commands)


def _steps(points: Sequence[tuple[float, float]], half: float, scale: _Scale) -> str:
    """One horizontal stroke for each slot: a bound belongs to its layer and has no values between two of them."""
    return "".join(f"M{round(x - half, 1)} {scale.y(value)}H{round(x + half, 1)}" for x, value in points)


def _worst(values: Iterable[float]) -> float | None:
    """The largest value; a NaN is larger than any."""
    listed = list(values)
    return max(listed, key=lambda value: math.inf if math.isnan(value) else value) if listed else None
