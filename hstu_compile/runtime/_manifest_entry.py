"""Read a record of the manifest into a dataclass, and check its numbers. Private to the specifications."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

_SHA256 = re.compile(r"[0-9a-f]{64}")


def with_names(entry: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    """The entry's values, if it has exactly the fields of the dataclass `kind` (those with defaults may be absent).

    Raises:
        ValueError: naming the fields that are absent or unknown.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    needed = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
    if lacking := sorted(needed - set(entry)):
        raise ValueError(f"{kind.__name__} lacks {', '.join(lacking)}")
    if unknown := sorted(set(entry) - set(fields)):
        raise ValueError(f"{kind.__name__} has no {', '.join(unknown)}")
    return dict(entry)


def is_count(size: object, least: int = 1) -> bool:
    """Whether it is an integer, and not a bool, of at least so much."""
    return isinstance(size, int) and not isinstance(size, bool) and size >= least


def is_sha256(value: object) -> bool:
    """Whether it is a sha256 in hexadecimal."""
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None
