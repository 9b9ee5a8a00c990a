"""Where tensors of known size and lifetime lie in one block of memory. Pure arithmetic. Level 3; private to runtime.

A tensor is alive from the step that makes it to the last step that reads it, both included: what a step writes never
lies where it still reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from hstu_compile.runtime._free_list import aligned


@dataclasses.dataclass(frozen=True)
class Lifetime:
    """One tensor.

    Attributes:
        name: of the tensor.
        nbytes: its size; 0 is legal and takes a place all the same: an engine wants a real address.
        first: the step that makes it.
        last: the last step that reads it, >= first.
    """

    name: str
    nbytes: int
    first: int
    last: int

    def meets(self, other: Lifetime) -> bool:
        """Whether both are alive in some step."""
        return self.first <= other.last and other.first <= self.last


@dataclasses.dataclass(frozen=True)
class BufferPlan:
    """The places.

    Attributes:
        offsets: bytes from the start of the block, a multiple of 256, by name.
        nbytes: size of the block, a multiple of 256.
        least_nbytes: what the fullest step needs, which no plan can undercut.
    """

    offsets: Mapping[str, int]
    nbytes: int
    least_nbytes: int


def planned_buffers(lifetimes: Iterable[Lifetime]) -> BufferPlan:
    """Find a place for every tensor.

    Three orders are tried, largest first, earliest first and longest-lived first, each tensor taking the lowest place
    that fits; the smallest block wins. Largest first is never more than twice the bytes of all tensors that are alive
    together with some one tensor: below the place that a tensor takes, every gap is smaller than the tensor and so than
    the earlier one above the gap. On the schedules of our graphs the result is the least that is possible, or within a
    few per cent of it, which a test holds it to.

    Args:
        lifetimes: of the tensors, each name once.

    Raises:
        ValueError: for a name that comes twice, a negative size, or a life that ends before it begins.
    """
    tensors = list(lifetimes)
    _check(tensors)
    orders = [
        sorted(tensors, key=lambda each: (-each.nbytes, each.first)),
        sorted(tensors, key=lambda each: (each.first, -each.nbytes)),
        sorted(tensors, key=lambda each: (each.first - each.last, -each.nbytes)),
    ]
    offsets, nbytes = min((_placed(order) for order in orders), key=lambda plan: plan[1])
    steps = {each.first for each in tensors}
    least = max((sum(aligned(t.nbytes) for t in tensors if t.first <= step <= t.last) for step in steps), default=0)
    return BufferPlan(offsets, nbytes, least)


def _check(tensors: Sequence[Lifetime]) -> None:
    if len({each.name for each in tensors}) != len(tensors):
        raise ValueError("a tensor comes twice")
    for each in tensors:
        if each.nbytes < 0 or each.last < each.first:
            raise ValueError(f"{each.name} has {each.nbytes} bytes and lives from step {each.first} to {each.last}")


def _placed(order: Sequence[Lifetime]) -> tuple[dict[str, int], int]:
    """Each tensor at the lowest place that is free throughout its life, in this order."""
    placed: list[tuple[int, Lifetime]] = []
    offsets: dict[str, int] = {}
    for each in order:
        start, size = 0, aligned(each.nbytes)
        for offset, other in sorted(placed, key=lambda pair: pair[0]):
            if not other.meets(each):
                continue
            if start + size <= offset:
                break
            start = max(start, offset + aligned(other.nbytes))
        offsets[each.name] = start
        placed.append((start, each))
    return offsets, max((offset + aligned(each.nbytes) for offset, each in placed), default=0)
