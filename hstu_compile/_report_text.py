"""Numbers and foreign text as the report prints them, in HTML and on a terminal alike. Level 0, standard library only.

Measured numbers get three significant digits. Errors are always in scientific notation with a two-digit exponent, so
that a column of them aligns. Settings are not measurements and keep every digit (`exact`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

NOT_APPLICABLE = "n/a"

# Control characters reach a terminal as commands, lone surrogates cannot be encoded, and bidirectional overrides make a
# name read as another one. A checkpoint's file name or a layer's name may hold any of them.
_UNPRINTABLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def printable(value: object) -> str:
    """`str(value)` with each character that could act instead of being seen as U+FFFD; tab and newline stay."""
    return _UNPRINTABLE.sub("\ufffd", str(value))


def one_line(value: object) -> str:
    """`printable`, with each run of white space made one space."""
    return " ".join(printable(value).split())


def number(value: float | None) -> str:
    """A count in full, or a measured number with three significant digits.

    >>> number(12345), number(0.012345), number(1234.5), number(3.2e-7), number(0.0), number(None)
    ('12,345', '0.0123', '1,230', '3.20e-07', '0', 'n/a')
    """
    if value is None:
        return NOT_APPLICABLE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value) or value == 0 or not 1e-3 <= abs(value) < 1e6:
        return scientific(value)
    return format(Decimal(f"{value:.2e}"), ",f")


def scientific(value: float | None) -> str:
    """An error or a bound: three significant digits and an exponent, whatever the magnitude.

    >>> scientific(0.00123), scientific(0), scientific(float("nan")), scientific(float("inf"))
    ('1.23e-03', '0', 'NaN', 'infinite')
    """
    if value is None:
        return NOT_APPLICABLE
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "infinite" if value > 0 else "-infinite"
    return "0" if value == 0 else f"{value:.2e}"


def decimal4(value: float | None) -> str:
    """A ranking metric or a rank correlation, to the fourth decimal: the digit that two precisions may differ in."""
    if value is None:
        return NOT_APPLICABLE
    return f"{value:.4f}" if math.isfinite(value) else scientific(value)


def mebibytes(num_bytes: int | None) -> str:
    """A size in MiB.

    >>> mebibytes(1_572_864)
    '1.50'
    """
    return NOT_APPLICABLE if num_bytes is None else number(num_bytes / 2**20)


def exact(value: object) -> str:
    """A setting or a version as it is: no rounding, no separators.

    >>> exact(1e-06), exact(65536), exact(None), exact(True), exact([1, "a"]), exact([])
    ('1e-06', '65536', 'none', 'yes', '1, a', 'empty')
    """
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {exact(item)}" for key, item in value.items()) or "empty"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(exact(item) for item in value) or "empty"
    return printable(value)


def shape(dims: Sequence[int | str] | None) -> str:
    """A tensor's shape; dynamic axes by name.

    >>> shape(["B", 50])
    '[B, 50]'
    """
    return NOT_APPLICABLE if dims is None else f"[{', '.join(exact(dim) for dim in dims)}]"


def share_of_bound(error: float | None, bound: float | None) -> float:
    """`error / bound` in percent; infinite where no finite share can be given, so that a NaN ranks as the worst.

    >>> share_of_bound(1.0, 4.0), share_of_bound(0.0, 0.0), share_of_bound(1.0, 0.0), share_of_bound(float("nan"), 1.0)
    (25.0, 0.0, inf, inf)
    """
    if error is None or bound is None or math.isnan(error) or math.isnan(bound):
        return math.inf
    if bound == 0:
        return 0.0 if error == 0 else math.inf
    return 100.0 * error / bound


def flattened(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Leaves of a nested mapping as (dotted name, exact value), in order.

    >>> list(flattened({"a": {"b": 1, "c": [1, 2]}, "d": [{"e": 0.5}]}))
    [('a.b', '1'), ('a.c', '1, 2'), ('d[0].e', '0.5')]
    """
    for key, value in tree.items():
        name = f"{prefix}{printable(key)}"
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{name}.")
        elif isinstance(value, Sequence) and not isinstance(value, str) and any(isinstance(v, Mapping) for v in value):
            yield from flattened({f"{name}[{index}]": item for index, item in enumerate(value)})
        else:
            yield name, exact(value)


def plural(count: int, noun: str) -> str:
    """A count with its noun.

    >>> plural(1, "layer"), plural(12345, "layer"), plural(2, "pass")
    ('1 layer', '12,345 layers', '2 passes')
    """
    suffix = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{number(count)} {noun}{suffix}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table in columns: the first flush left, the others flush right.

    >>> aligned([("step", "ms"), ("a", "1.5")])
    ['step   ms', 'a     1.5']
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
