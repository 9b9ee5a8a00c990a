"""Validation that every configuration shares: field types from annotations, JSON with all faults at once. Level 1."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

_Config = TypeVar("_Config")

# Largest id, offset and length: int32 inputs.
MAX_LENGTH = (1 << 31) - 1
# Widest row and most heads: far beyond any model, and no product of sizes overflows.
MAX_WIDTH = 1 << 16
# Buckets are found by comparing with a list of thresholds that is made when a model is.
MAX_TIME_BUCKETS = 1 << 20
# Factors and epsilons are float32 in the graphs.
MAX_FLOAT = 3.4028234663852886e38


def require(condition: bool, message: str) -> None:
    """Raise ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def require_choices(config: Any) -> None:
    """Check every Literal, int, float and bool field of a config dataclass against its annotation."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(hint) is Literal:
            require(value in get_args(hint), f"{name} is {value!r}; allowed: {', '.join(map(repr, get_args(hint)))}")
        elif hint is bool:
            require(isinstance(value, bool), f"{name} is {value!r}; allowed: true or false")
        elif hint is int:
            require(
                isinstance(value, int) and not isinstance(value, bool), f"{name} is {value!r}; it must be an integer"
            )
            owner = f" of {config.name}" if hasattr(config, "name") else ""
            require(value <= MAX_LENGTH, f"{name}{owner} is {value}; it must be at most {MAX_LENGTH}")
        elif hint is float:
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            require(
                is_number and math.isfinite(value) and abs(value) <= MAX_FLOAT,
                f"{name} is {value!r}; it must be a finite number, at most {MAX_FLOAT:.4g}",
            )


def from_mapping(
    cls: type[_Config], values: Mapping[str, Any], nested: Mapping[str, Callable[[Any], Any]] | None = None
) -> _Config:
    """Build a config dataclass from parsed JSON, listing all unknown and missing fields at once.

    Args:
        cls: the dataclass.
        values: parsed JSON.
        nested: how to parse the fields that are not plain values.

    Raises:
        ValueError: naming every unknown and every missing field.
    """
    require(isinstance(values, Mapping), f"{cls.__name__} must be a JSON object, got {type(values).__name__}")
    known = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(known))
    missing = sorted(
        name
        for name, field in known.items()
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    )
    require(not unknown, f"{cls.__name__} has no field {', '.join(unknown)}; fields: {', '.join(known)}")
    require(not missing, f"{cls.__name__} lacks {', '.join(missing)}")
    kwargs = dict(values)
    for name, parse in (nested or {}).items():
        if name in kwargs:
            kwargs[name] = parse(kwargs[name])
    return cls(**kwargs)
