"""Panels of an SVG drawing: one plot with two logarithmic axes each. Standard library alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

PANEL, MARGIN, GAP = (360, 240), 60, 90
COLOURS = (
    "#1b6ca8",
    "#c8553d",
    "#2a9d5c",
    "#8a5a9e",
    "#8c8c2f",
    "#555555",
    "#0f8b8d",
    "#b5446e",
    "#222222",
    "#d9a441",
    "#7a3b12",
)

Points = Sequence[tuple[float, float]]


class Panel:
    """One plot, at a place of the drawing.

    Args:
        left: of the frame; top likewise.
        points: what has to fit inside.
        ticks: values marked on the two axes; None marks powers of ten.
    """

    def __init__(
        self,
        left: float,
        top: float,
        points: Points,
        ticks: tuple[Sequence[float] | None, Sequence[float] | None] = (None, None),
    ) -> None:
        self._left, self._top = left, top
        (width, height) = PANEL
        xs, ys = [x for x, _ in points], [y for _, y in points]
        self._x = _scale(xs, left, left + width)
        self._y = _scale(ys, top + height, top)
        self._x_ticks, self._y_ticks = (
            _powers(min(values), max(values)) if given is None else _inside(given, min(values), max(values))
            for given, values in zip(ticks, (xs, ys), strict=True)
        )

    def frame(self, title: str, unit: str, axis: str) -> Iterator[str]:
        """Border, ticks and labels; `unit` is the vertical axis's, `axis` names the horizontal one."""
        width, height = PANEL
        left, top = self._left, self._top
        yield f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#999"/>'
        yield text(left, top - 12, title, size=13)
        yield text(left + width / 2, top + height + 36, axis, anchor="middle")
        yield text(left - 46, top - 12, unit)
        for value in self._x_ticks:
            yield text(self._x(value), top + height + 16, f"{value:g}", anchor="middle")
        for value in self._y_ticks:
            y = self._y(value)
            yield f'<line x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#eee"/>'
            yield text(left - 6, y + 4, f"{value:g}", anchor="end")

    def line(self, points: Points, colour: str) -> str:
        """One series."""
        shown = " ".join(f"{self._x(x):.1f},{self._y(y):.1f}" for x, y in sorted(points))
        return f'<polyline points="{shown}" fill="none" stroke="{colour}" stroke-width="1.8"/>'


def _scale(values: Sequence[float], start: float, end: float) -> Callable[[float], float]:
    low, high = math.log(min(values)) - 0.1, math.log(max(values)) + 0.1
    return lambda value: start + (end - start) * (math.log(value) - low) / (high - low)


def _inside(ticks: Sequence[float], low: float, high: float) -> list[float]:
    return [value for value in ticks if low * 0.9 <= value <= high * 1.1]


def _powers(low: float, high: float) -> list[float]:
    inside = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    kept = _inside(inside, low, high)
    return kept if len(kept) > 1 else sorted({low, high})


def legend(left: float, top: float, colours: dict[str, str]) -> Iterator[str]:
    """One line per series, by name."""
    for index, (name, colour) in enumerate(colours.items()):
        y = top + 15 * index
        yield f'<line x1="{left}" x2="{left + 18}" y1="{y - 4}" y2="{y - 4}" stroke="{colour}" stroke-width="3"/>'
        yield text(left + 24, y, name)


def drawing(width: float, height: float, body: Sequence[str]) -> str:
    """The SVG."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height:.0f}" font-family="sans-serif">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *body, "</svg>"]) + "\n"


def text(x: float, y: float, content: str, *, anchor: str = "start", size: int = 11) -> str:
    """One label."""
    escaped = content.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="#333">{escaped}</text>'
