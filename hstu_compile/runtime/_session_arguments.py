"""Refuse arguments of the sessions with a KV cache that have no meaning. Level 3; private to the runtime."""

from __future__ import annotations

import numbers
from collections.abc import Sequence

from hstu_compile.errors import UsageError


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Refuse a value that is none of the choices.

    Raises:
        UsageError: HSTU-E901.
    """
    if value not in allowed:
        raise UsageError(
            "HSTU-E901",
            f"there is no {name} choice {value!r}",
            f"it is not one of {', '.join(allowed)}",
            "choose one of these",
        )


def checked_budget(kv_budget_bytes: object, session: str) -> int:
    """The bytes of a cache; `session` is the class that tells what a user takes.

    Raises:
        UsageError: HSTU-E901 for what is no whole number above 0.
    """
    fix = f"give it the bytes of the users that are to be kept; {session}.entry_bytes tells a user's"
    budget = _whole("kv_budget_bytes", kv_budget_bytes, fix)
    if budget <= 0:
        raise UsageError("HSTU-E901", "the KV cache has no memory", f"kv_budget_bytes is {budget}", fix)
    return budget


def checked_staging(staging_rows: object) -> int | None:
    """The rows of the staging memory; None if it is left to the session.

    Raises:
        UsageError: HSTU-E901 for what is no whole number of 0 or more.
    """
    if staging_rows is None:
        return None
    rows = _whole("staging_rows", staging_rows, "pass 0 or more, or None")
    if rows < 0:
        raise UsageError(
            "HSTU-E901", "the staging memory cannot be negative", f"staging_rows is {rows}", "pass 0 or more"
        )
    return rows


def _whole(name: str, value: object, fix: str) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        hint = f"write int({value!r}), or " if isinstance(value, float) else ""
        raise UsageError(
            "HSTU-E901", f"{name} is not a whole number", f"{value!r} is a {type(value).__name__}", f"{hint}{fix}"
        )
    return int(value)
