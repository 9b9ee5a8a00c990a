"""Where tensors of known size and lifetime lie in one block of memory. Pure arithmetic. Level 3; private to runtime.

A tensor is alive from the step that makes it to the last step that reads it, both included: what a step writes never
lies where it still reads. Where a step may write over an operand, the two are planned as one.
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


def planned_buffers(lifetimes: Iterable[Lifetime], in_place: Mapping[str, str] | None = None) -> BufferPlan:
    """Find a place for every tensor.

    Three orders are tried, largest first, earliest first and longest-lived first, each tensor taking the lowest place
    that fits; the smallest block wins. Largest first is never more than twice the bytes of all tensors that are alive
    together with some one tensor: below the place that a tensor takes, every gap is smaller than the tensor and so than
    the earlier one above the gap. On the schedules of our graphs the result is the least that is possible, or within a
    few per cent of it, which a test holds it to.

    Args:
        lifetimes: of the tensors, each name once.
        in_place: tensor to the operand that it may be written over. Used where that operand is read for the last time
            by the step that makes the tensor, and takes as many bytes; else the two lie apart.

    Raises:
        ValueError: for a name that comes twice, a negative size, or a life that ends before it begins.
    """
    tensors = list(lifetimes)
    _check(tensors)
    blocks, owner = _merged(tensors, in_place or {})
    orders = [
        sorted(blocks, key=lambda each: (-each.nbytes, each.first)),
        sorted(blocks, key=lambda each: (each.first, -each.nbytes)),
        sorted(blocks, key=lambda each: (each.first - each.last, -each.nbytes)),
    ]
    offsets, nbytes = min((_placed(order) for order in orders), key=lambda plan: plan[1])
    steps = {each.first for each in blocks}
    least = max((sum(aligned(b.nbytes) for b in blocks if b.first <= step <= b.last) for step in steps), default=0)
    return BufferPlan({each.name: offsets[owner[each.name]] for each in tensors}, nbytes, least)


def _check(tensors: Sequence[Lifetime]) -> None:
    if len({each.name for each in tensors}) != len(tensors):
        raise ValueError("a tensor comes twice")
    for each in tensors:
        if each.nbytes < 0 or each.last < each.first:
            raise ValueError(f"{each.name} has {each.nbytes} bytes and lives from step {each.first} to {each.last}")


def _merged(tensors: Sequence[Lifetime], in_place: Mapping[str, str]) -> tuple[list[Lifetime], dict[str, str]]:
    """One block for a tensor and what is written over it; the block of every tensor."""
    by_name = {each.name: each for each in tensors}
    blocks = dict(by_name)
    owner = {each.name: each.name for each in tensors}
    # Who was last written to each block: only over that one may be written.
    holder = dict(owner)
    # In the order in which they are made: an operand's block is final when something is written over it.
    for each in sorted(tensors, key=lambda tensor: tensor.first):
        operand = by_name.get(in_place.get(each.name, ""))
        if operand is None or operand.first >= each.first:
            continue
        block = blocks[owner[operand.name]]
        if holder[block.name] != operand.name or operand.last != each.first or block.nbytes != each.nbytes:
            continue
        blocks[block.name] = dataclasses.replace(block, last=each.last)
        owner[each.name], holder[block.name] = block.name, each.name
        del blocks[each.name]
    return list(blocks.values()), owner


def _placed(order: Sequence[Lifetime]) -> tuple[dict[str, int], int]:
    """Each block at the lowest place that is free throughout its life, in this order."""
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
