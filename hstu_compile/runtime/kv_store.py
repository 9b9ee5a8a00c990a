"""Where the entries of a KV cache lie: each in one piece, or all as rows of the same tensors. Level 3; no torch.

`KvBlocks` gives each entry a region of its own. `KvRows` keeps one tensor of keys and one of values per layer, and an
entry is the same range of rows in all of them: a pass that is given these tensors whole, and told which rows are whose,
reads any users where they lie, at addresses that never change.
"""

from __future__ import annotations

import math
from typing import Protocol

from hstu_compile.runtime._bfloat16 import storage_dtype
from hstu_compile.runtime._free_list import ALIGNMENT, FreeList
from hstu_compile.runtime.kv_layout import KvLayout
from hstu_compile.runtime.resident import MemoryPool, Region, ResidentTensor


class KvStore(Protocol):
    """Memory for entries, under a byte budget. The cache's lock guards it."""

    @property
    def bytes_per_row(self) -> int:
        """Bytes of one row over all layers."""

    @property
    def capacity_bytes(self) -> int:
        """The budget, as far as entries can use it."""

    def entry_bytes(self, rows: int) -> int:
        """Bytes of the budget that an entry of `rows` rows takes."""

    def allocate(self, rows: int) -> Region | None:
        """Memory for an entry, or None if no hole is large enough; `offset` and `nbytes` count bytes of the budget."""

    def free(self, region: Region) -> None:
        """Give it back."""

    def tensors(self, region: Region, rows: int) -> dict[str, ResidentTensor]:
        """`k_0`, `v_0`, `k_1`, ... of an entry."""


class KvBlocks:
    """Entries of a region each, whose layers follow one another.

    Args:
        pool: the memory; the store is its only user, and its owner closes it.
        layout: of a row.
    """

    def __init__(self, pool: MemoryPool, layout: KvLayout) -> None:
        self._pool, self._layout = pool, layout

    @property
    def bytes_per_row(self) -> int:
        """See `KvStore.bytes_per_row`; without the padding between layers."""
        return self._layout.bytes_per_row

    @property
    def capacity_bytes(self) -> int:
        """See `KvStore.capacity_bytes`."""
        return self._pool.capacity_bytes

    def entry_bytes(self, rows: int) -> int:
        """See `KvStore.entry_bytes`."""
        return self._layout.entry_bytes(rows)

    def allocate(self, rows: int) -> Region | None:
        """See `KvStore.allocate`."""
        return self._pool.allocate(self.entry_bytes(rows))

    def free(self, region: Region) -> None:
        """See `KvStore.free`."""
        self._pool.free(region)

    def tensors(self, region: Region, rows: int) -> dict[str, ResidentTensor]:
        """See `KvStore.tensors`."""
        return self._layout.tensors(self._pool, region, rows)


def _step(layout: KvLayout) -> int:
    """Fewest rows of which keys and values are multiples of 256 bytes."""
    itemsize = storage_dtype(layout.dtype).itemsize
    row_bytes = [layout.num_heads * width * itemsize for width in (layout.attention_dim, layout.linear_dim)]
    return math.lcm(*(ALIGNMENT // math.gcd(ALIGNMENT, each) for each in row_bytes))


def whole_rows(layout: KvLayout, nbytes: int) -> int:
    """Rows that a `KvRows` of so many bytes has.

    >>> whole_rows(KvLayout(5, 4, 128, 128, "float16"), 2**30), whole_rows(KvLayout(1, 1, 50, 50, "float16"), 20_000)
    (104857, 64)
    """
    step = _step(layout)
    return nbytes // layout.bytes_per_row // step * step


class KvRows:
    """Entries that are ranges of rows of the same tensors.

    Runtimes write and read tensors at multiples of 256 bytes only, and an entry is written where it lies. So it begins
    at a row whose keys and values do in every layer, a multiple of `step`: 1 where a row of keys and one of values are
    multiples of 256 bytes, as four heads of 128 in float16 are.

    Args:
        pool: the memory; the store takes all of it, and the pool's owner closes it.
        layout: of a row.

    Attributes:
        step: rows that entries begin at multiples of, and are rounded up to.
        capacity_rows: of each tensor; those that the pool holds of all layers together.
        tensors_of_all: `k_0`, `v_0`, `k_1`, ...: [capacity_rows, H, attention_dim] and [capacity_rows, H, linear_dim].
            Empty where the pool has not the memory for one step.
    """

    def __init__(self, pool: MemoryPool, layout: KvLayout) -> None:
        self._bytes_per_row, self.step = layout.bytes_per_row, _step(layout)
        self.capacity_rows = whole_rows(layout, pool.capacity_bytes)
        self._list = FreeList(self.capacity_bytes)
        self.tensors_of_all: dict[str, ResidentTensor] = {}
        if self.capacity_rows:
            # A multiple of `step` rows takes no padding between layers.
            region = pool.allocate(self.capacity_bytes)
            if region is None:
                raise ValueError("the store of a KV cache is not the only user of its pool")
            self.tensors_of_all = layout.tensors(pool, region, self.capacity_rows)

    @property
    def bytes_per_row(self) -> int:
        """See `KvStore.bytes_per_row`."""
        return self._bytes_per_row

    @property
    def capacity_bytes(self) -> int:
        """See `KvStore.capacity_bytes`."""
        return self.capacity_rows * self._bytes_per_row

    def entry_bytes(self, rows: int) -> int:
        """See `KvStore.entry_bytes`."""
        return max(-(-rows // self.step), 1) * self.step * self._bytes_per_row

    def allocate(self, rows: int) -> Region | None:
        """See `KvStore.allocate`."""
        size = self.entry_bytes(rows)
        offset = self._list.take(size)
        return None if offset is None else Region(offset, size)

    def free(self, region: Region) -> None:
        """See `KvStore.free`."""
        self._list.give_back(region.offset, region.nbytes)

    def first_row(self, region: Region) -> int:
        """Of the entry, in every tensor."""
        return region.offset // self._bytes_per_row

    def tensors(self, region: Region, rows: int) -> dict[str, ResidentTensor]:
        """See `KvStore.tensors`."""
        first = self.first_row(region)
        return {name: tensor.rows(first, first + rows) for name, tensor in self.tensors_of_all.items()}
