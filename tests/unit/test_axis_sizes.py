"""Sizes of axes as expressions: one form for one size, and values from shapes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hstu_compile.axis_sizes import AxisSize, axis_size, axis_values

NAMES = ("L", "T", "B", "Lc", "A")


@st.composite
def sums(draw: st.DrawFn) -> tuple[str, dict[str, int], int]:
    """A sum as the exporter might write it, its factors, and its constant."""
    factors: dict[str, int] = {}
    constant, text = 0, ""
    for _ in range(draw(st.integers(1, 6))):
        name, factor = draw(st.sampled_from([*NAMES, "1"])), draw(st.integers(1, 9))
        sign = draw(st.sampled_from([1, -1])) if text else 1
        if name == "1":
            constant += sign * factor
            term = str(factor)
        else:
            factors[name] = factors.get(name, 0) + sign * factor
            term = name if factor == 1 else draw(st.sampled_from([f"{factor}*{name}", f"{name}*{factor}"]))
        text += f" {'+' if sign > 0 else '-'} {term}" if text else term
    return text, factors, constant


@given(sums(), st.lists(st.integers(0, 10_000), min_size=len(NAMES), max_size=len(NAMES)))
def test_an_expression_has_its_value_and_is_read_back_from_its_text(
    case: tuple[str, dict[str, int], int], drawn: list[int]
) -> None:
    text, factors, constant = case
    size, values = axis_size(text), dict(zip(NAMES, drawn, strict=True))
    assert size is not None
    assert size.at(values) == constant + sum(factor * values[name] for name, factor in factors.items())
    assert axis_size(str(size)) == size


@pytest.mark.parametrize(
    ("texts", "normal"),
    [
        (("T + 4*B_plus_1 + L - 4", "T + L + 4*B", "L + (4*B + T)"), "4*B + L + T"),
        (("B_times_3", "3*B", "3*(B_plus_1 - 1)"), "3*B"),
        (("(B_times_3//3)", "B", "B_plus_1 - 1"), "B"),
        (("-1 + L", "L - 1"), "L - 1"),
    ],
)
def test_equal_sizes_have_one_text(texts: tuple[str, ...], normal: str) -> None:
    assert {str(axis_size(text)) for text in texts} == {normal}


@pytest.mark.parametrize("text", ["B*L", "L//2", "L**2", "L +", "f(L)", "L if T else B", "1.5*L", "Max(L, T)"])
def test_what_is_no_linear_expression_is_none(text: str) -> None:
    assert axis_size(text) is None


def test_a_size_without_names_is_its_number() -> None:
    assert axis_size("4 - 1") == AxisSize((), 3)
    assert str(AxisSize((), 3)) == "3"


def test_values_follow_from_shapes_and_have_to_agree() -> None:
    declared: dict[str, tuple[int | str, ...]] = {"offsets": ("B_plus_1",), "genres": ("B_times_3",), "k": ("Lc", 2)}
    assert axis_values({"offsets": (5,), "genres": (12,), "k": (9, 2)}, declared) == {"B": 4, "Lc": 9}
    for genres, why in ((11, "does not fit B"), (15, "does not fit B = 4")):
        with pytest.raises(ValueError, match=why):
            axis_values({"offsets": (5,), "genres": (genres,), "k": (9, 2)}, declared)
    with pytest.raises(ValueError, match="not a multiple of one name"):
        axis_values({"x": (5,)}, {"x": ("L + T",)})
