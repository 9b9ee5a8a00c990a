"""Sizes of dynamic axes as linear expressions of the axes' names: `T + 4*B_plus_1 + L - 4`. Level 0.

The exporter writes one size in several ways, because B, B_plus_1 and B_times_k count the same sequences. Here they are
one: an expression has a single form, so that two axes of equal size have equal names in every engine that reads them.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Mapping

_BATCH = "B"
_PLUS_ONE = "B_plus_1"
_TIMES = re.compile(r"B_times_(\d+)")


@dataclasses.dataclass(frozen=True)
class AxisSize:
    """A constant and a whole multiple of each name.

    Attributes:
        terms: (name, factor) in the order of the names; no factor is 0.
        constant: the rest.
    """

    terms: tuple[tuple[str, int], ...]
    constant: int = 0

    def __str__(self) -> str:
        parts = [name if factor == 1 else f"{factor}*{name}" for name, factor in self.terms]
        text = " + ".join(parts)
        if self.constant or not parts:
            sign = " - " if self.constant < 0 else " + "
            text = f"{text}{sign}{abs(self.constant)}" if parts else str(self.constant)
        return text

    def at(self, values: Mapping[str, int]) -> int:
        """The size where the names have these values.

        Raises:
            KeyError: for a name without a value.
        """
        return self.constant + sum(factor * values[name] for name, factor in self.terms)


def axis_size(text: str) -> AxisSize | None:
    """The size that an axis' name stands for, or None if it is no linear expression of names.

    >>> str(axis_size("T + 4*B_plus_1 + L - 4")), str(axis_size("(B_times_3//3)")), str(axis_size("B_plus_1"))
    ('4*B + L + T', 'B', 'B + 1')
    >>> axis_size("B*L") is None
    True
    """
    try:
        found = _evaluated(ast.parse(text, mode="eval").body)
    except SyntaxError:
        return None
    if found is None:
        return None
    terms, constant = found
    return AxisSize(tuple(sorted((name, factor) for name, factor in terms.items() if factor)), constant)


_Linear = tuple[dict[str, int], int]


def _evaluated(node: ast.expr) -> _Linear | None:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return {}, node.value
    if isinstance(node, ast.Name):
        if node.id == _PLUS_ONE:
            return {_BATCH: 1}, 1
        times = _TIMES.fullmatch(node.id)
        return ({_BATCH: int(times[1])}, 0) if times else ({node.id: 1}, 0)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        operand = _evaluated(node.operand)
        return None if operand is None else _scaled(operand, -1)
    if not isinstance(node, ast.BinOp):
        return None
    left, right = _evaluated(node.left), _evaluated(node.right)
    if left is None or right is None:
        return None
    if isinstance(node.op, ast.Add):
        return _sum(left, right)
    if isinstance(node.op, ast.Sub):
        return _sum(left, _scaled(right, -1))
    if isinstance(node.op, ast.Mult) and not (left[0] and right[0]):
        linear, number = (right, left[1]) if not left[0] else (left, right[1])
        return _scaled(linear, number)
    if isinstance(node.op, ast.FloorDiv) and not right[0] and right[1] > 0:
        return _divided(left, right[1])
    return None


def _sum(left: _Linear, right: _Linear) -> _Linear:
    terms = dict(left[0])
    for name, factor in right[0].items():
        terms[name] = terms.get(name, 0) + factor
    return terms, left[1] + right[1]


def _scaled(linear: _Linear, number: int) -> _Linear:
    return {name: factor * number for name, factor in linear[0].items()}, linear[1] * number


def _divided(linear: _Linear, divisor: int) -> _Linear | None:
    """Only where it comes out even for every value of the names."""
    terms, constant = linear
    if constant % divisor or any(factor % divisor for factor in terms.values()):
        return None
    return {name: factor // divisor for name, factor in terms.items()}, constant // divisor


def axis_values(shapes: Mapping[str, tuple[int, ...]], declared: Mapping[str, tuple[int | str, ...]]) -> dict[str, int]:
    """The value of each name, from the shapes of tensors whose dynamic axes are one name each.

    Args:
        shapes: of the tensors.
        declared: their shapes with dynamic axes by name.

    Raises:
        ValueError: if two axes give one name two values, or an axis' name gives none.

    >>> axis_values({"offsets": (5,), "ids": (7,)}, {"offsets": ("B_plus_1",), "ids": ("L",)})
    {'B': 4, 'L': 7}
    """
    values: dict[str, int] = {}
    for tensor, axes in declared.items():
        for axis, size in zip(axes, shapes[tensor], strict=True):
            if not isinstance(axis, str):
                continue
            expression = axis_size(axis)
            if expression is None or len(expression.terms) != 1:
                raise ValueError(f"the axis {axis} of {tensor} is not a multiple of one name")
            (name, factor), rest = expression.terms[0], size - expression.constant
            if rest % factor or values.setdefault(name, rest // factor) != rest // factor:
                raise ValueError(f"{tensor} of shape {list(shapes[tensor])} does not fit {name} = {values.get(name)}")
    return values
