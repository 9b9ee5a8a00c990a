"""Cast a model's weights where not all of them take the model's type. Level 1."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def cast_weights(model: nn.Module, type_of: Callable[[Tensor], torch.dtype]) -> None:
    """Cast every parameter and buffer of a float type in place; what has its type already is not copied.

    Args:
        model: the module.
        type_of: type that a parameter or buffer takes.
    """

    # What Module.to does, with one type for all.
    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(type_of(tensor)) if tensor.is_floating_point() else tensor

    model._apply(cast)  # type: ignore[no-untyped-call]


def table_type(table: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Type of an embedding table in a model of type `dtype`: the model's, unless that is wider than the table's.

    Rows that are looked up and then widened are the same numbers, and a float64 copy of a table of gigabytes would be
    the largest thing in the memory of whoever makes it.
    """
    return table.dtype if torch.finfo(table.dtype).bits < torch.finfo(dtype).bits else dtype


def rows_in(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a table in the model's type."""
    return rows if rows.dtype == dtype else rows.to(dtype)
