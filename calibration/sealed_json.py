"""JSON files that say what they are and notice when they were changed. Level 2; standard library only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from hstu_compile.files import write_whole

Parsed = TypeVar("Parsed")


class SealError(ValueError):
    """A file that is not as `write_sealed` wrote it."""


def write_sealed(path: Path, form: str, values: Mapping[str, Any]) -> None:
    """Write an object with its form in front and the sha256 of all of it at the end, whole or not at all.

    Args:
        path: of the file.
        form: name and version of what `values` are.
        values: without the keys `format` and `sha256`; numbers are finite.

    Raises:
        BundleError: HSTU-E802, if the file cannot be written.
    """
    whole = {"format": form, **values}
    sealed = {**whole, "sha256": _digest(whole)}
    write_whole(path, ("\n".join(_lines(sealed)) + "\n").encode())


def read_sealed(
    path: Path, form: str, parse: Callable[[dict[str, Any]], Parsed], earlier: Mapping[str, str] | None = None
) -> Parsed:
    """Read such a file.

    Args:
        path: of the file.
        form: the only one accepted.
        parse: of the values without `format` and `sha256`. It may raise ValueError, TypeError, KeyError, AttributeError
            or OverflowError; as it says where the fault is, it is asked before the sha256.
        earlier: forms that are known and not read any more, and why.

    Raises:
        SealError: with the reason.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SealError(error.strerror or str(error)) from error
    except (ValueError, RecursionError) as error:
        raise SealError(f"it is truncated or not JSON: {error}") from error
    seen = values.get("format") if isinstance(values, dict) else f"a {type(values).__name__}"
    if seen != form:
        why = (earlier or {}).get(str(seen))
        raise SealError(f"its format is {seen!r}{f', {why}' if why else ''}; this version reads {form!r}")
    digest = values.pop("sha256", None)
    try:
        parsed = parse({key: value for key, value in values.items() if key != "format"})
        if digest != _digest(values):
            raise ValueError(f"it was changed after it was written: its content does not have the sha256 {digest!r}")
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise SealError(str(error)) from error
    return parsed


def require_keys(values: Any, wanted: set[str]) -> None:
    """Raises ValueError where `values` is not an object of exactly these keys."""
    if not isinstance(values, dict):
        raise ValueError(f"expected an object, found {str(values)[:40]!r}")
    wrong = [f"{key} is missing" for key in sorted(wanted - set(values))]
    wrong += [f"{key} is unknown" for key in sorted(set(values) - wanted)]
    if wrong:
        raise ValueError(", ".join(wrong))


def _digest(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _lines(values: Mapping[str, Any], indent: int = 1) -> Iterator[str]:
    """JSON with a line for every number and every list of numbers; a list of objects has a line for each."""
    pad = " " * indent
    yield "{"
    for position, (key, value) in enumerate(values.items(), 1):
        start, comma = f"{pad}{json.dumps(key)}: ", "," if position < len(values) else ""
        if isinstance(value, Mapping):
            inner = list(_lines(value, indent + 1))
            yield from (start + inner[0], *inner[1:-1], inner[-1] + comma)
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            rows = [json.dumps(row) for row in value]
            yield start + "["
            yield from (f"{pad} {row}{',' if index < len(rows) else ''}" for index, row in enumerate(rows, 1))
            yield f"{pad}]{comma}"
        else:
            yield start + json.dumps(value, allow_nan=False) + comma
    yield pad[1:] + "}"
