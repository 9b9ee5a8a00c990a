"""Which bytes of a fixed arena are free. Pure arithmetic: touches no memory. Level 3; private to the pools."""

from __future__ import annotations

import bisect

ALIGNMENT = 256


def aligned(nbytes: int) -> int:
    """The bytes that a block of `nbytes` takes: a multiple of 256, never 0, so that every block has its own place.

    >>> aligned(0), aligned(256), aligned(257)
    (256, 256, 512)
    """
    return max(-(-nbytes // ALIGNMENT), 1) * ALIGNMENT


class FreeList:
    """First-fit, address-ordered free list over [0, capacity); neighbouring holes are merged when a block is freed.

    First fit keeps live blocks at low offsets and large holes at high ones. Blocks never move, so free bytes may lie in
    several holes of which none is large enough: `take` then returns None although `capacity - used` would suffice.

    Args:
        capacity: bytes, a multiple of 256.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self._starts: list[int] = [0] if capacity else []
        self._sizes: list[int] = [capacity] if capacity else []

    def take(self, size: int) -> int | None:
        """Offset of a block of `size` bytes (a positive multiple of 256), or None if no hole is large enough."""
        for index, hole in enumerate(self._sizes):
            if hole < size:
                continue
            offset = self._starts[index]
            if hole == size:
                del self._starts[index], self._sizes[index]
            else:
                self._starts[index] += size
                self._sizes[index] -= size
            self.used += size
            return offset
        return None

    def give_back(self, offset: int, size: int) -> None:
        """Free a block that `take` returned."""
        self.used -= size
        index = bisect.bisect(self._starts, offset)
        if index < len(self._starts) and offset + size == self._starts[index]:
            size += self._sizes[index]
            del self._starts[index], self._sizes[index]
        if index and self._starts[index - 1] + self._sizes[index - 1] == offset:
            self._sizes[index - 1] += size
        else:
            self._starts.insert(index, offset)
            self._sizes.insert(index, size)

    def holes(self) -> list[tuple[int, int]]:
        """(offset, size) of every hole, ascending."""
        return list(zip(self._starts, self._sizes, strict=True))
