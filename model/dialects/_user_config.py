"""The user's configuration of a family, read field by field with the family's own names."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from hstu_compile.model.dialects._base import DialectError

# Above this likeness an unknown field is a slip of the pen; "item_embedding_dim" and "embedding_dim" are at 0.84.
_MISSPELT_LIKENESS = 0.88


class UserConfig:
    """Values by name, each checked when it is read.

    Other fields are notes to people, unless they look like one of the known ones misspelt: a switch that is silently
    left at its default gives a model that runs and recommends wrongly.

    Args:
        values: parsed JSON.
        fields: the names that the family reads.
        ignored: names that the family knows and does not need.
    """

    def __init__(self, values: Mapping[str, Any], fields: Collection[str], ignored: Collection[str] = ()) -> None:
        slips = [
            f"{name} (nearest: {near[0]})"
            for name in values
            if name not in fields
            and name not in ignored
            and (near := difflib.get_close_matches(str(name), fields, 1, _MISSPELT_LIKENESS))
        ]
        if slips:
            raise DialectError("config", f"unknown fields: {', '.join(slips)}", "correct or remove them")
        self._values = values

    def integer(self, name: str) -> int | None:
        """A non-negative integer, or None if the field is absent."""
        value = self._values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise DialectError("config", f"{name} is {value!r}; it must be a non-negative integer", f"correct {name}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """A boolean."""
        value = self._values.get(name, default)
        if not isinstance(value, bool):
            raise DialectError("config", f"{name} is {value!r}; allowed: true or false", f"correct {name}")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """A string; required without a default."""
        value = self._values.get(name, default)
        if not isinstance(value, str):
            raise DialectError(
                "config", f"{name} is {value!r}; it must be a string", f"add {name} to the configuration"
            )
        return value

    def texts(self, name: str) -> list[str]:
        """A list of strings; empty if absent."""
        value = self._values.get(name, [])
        if not isinstance(value, (list, tuple)) or not all(isinstance(each, str) for each in value):
            raise DialectError("config", f"{name} is {value!r}; it must be a list of strings", f"correct {name}")
        return list(value)

    def integers(self, name: str) -> dict[str, int]:
        """An object of non-negative integers; empty if absent."""
        value = self._values.get(name, {})
        legal = isinstance(value, Mapping) and all(
            isinstance(key, str) and isinstance(each, int) and not isinstance(each, bool) and each >= 0
            for key, each in value.items()
        )
        if not legal:
            raise DialectError(
                "config", f"{name} is {value!r}; it must map names to non-negative integers", f"correct {name}"
            )
        return dict(value)

    def raw(self, name: str, default: Any = None) -> Any:
        """The value as it stands."""
        value = self._values.get(name)
        return default if value is None else value

    def choice(self, name: str, choices: Mapping[str, str], default: str) -> str:
        """One of the keys of `choices`, as the value that it maps to."""
        value = self._values.get(name, default)
        if not isinstance(value, str):
            raise DialectError("config", f"{name} is {value!r}; allowed: {', '.join(choices)}", f"correct {name}")
        if value not in choices:
            raise DialectError(
                "unsupported",
                f"{name} {value!r} is not supported; supported: {', '.join(choices)}",
                "train with a supported value, or correct the configuration",
            )
        return choices[value]
