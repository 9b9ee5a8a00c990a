"""What one row of cached keys and values holds, and how a block of rows lies in memory. Level 3; no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from hstu_compile.runtime._bfloat16 import storage_dtype
from hstu_compile.runtime._free_list import aligned
from hstu_compile.runtime.resident import MemoryPool, Region, ResidentTensor


@dataclasses.dataclass(frozen=True)
class KvLayout:
    """What one cached row holds.

    Attributes:
        num_layers: attention layers.
        num_heads: H.
        attention_dim: width of a head's key.
        linear_dim: width of a head's value.
        dtype: element type as the graph declares it; bfloat16 is two bytes in every runtime.
    """

    num_layers: int
    num_heads: int
    attention_dim: int
    linear_dim: int
    dtype: str

    @property
    def bytes_per_row(self) -> int:
        """Bytes of one row over all layers, without the padding between blocks."""
        width = self.num_heads * (self.attention_dim + self.linear_dim)
        return self.num_layers * width * storage_dtype(self.dtype).itemsize

    def entry_bytes(self, rows: int) -> int:
        """Bytes of the budget that an entry of `rows` rows takes: each of its blocks starts at a multiple of 256."""
        return sum(aligned(nbytes) for _, _, nbytes in self._blocks(rows))

    def rows_within(self, nbytes: int) -> int:
        """Most rows of an entry that takes no more than that many bytes; 0 if not even one fits."""
        rows = nbytes // self.bytes_per_row
        while rows and self.entry_bytes(rows) > nbytes:
            rows -= 1
        return rows

    def tensors(self, pool: MemoryPool, region: Region, rows: int) -> dict[str, ResidentTensor]:
        """`k_i` [rows, H, attention_dim] and `v_i` [rows, H, linear_dim] inside a region of `entry_bytes(rows)`."""
        tensors, offset = {}, 0
        for name, shape, nbytes in self._blocks(rows):
            tensors[name] = pool.tensor(region, offset, shape, self.dtype)
            offset += aligned(nbytes)
        return tensors

    def _blocks(self, rows: int) -> Iterator[tuple[str, tuple[int, ...], int]]:
        """(name, shape, bytes) of `k_0`, `v_0`, `k_1`, ..."""
        itemsize = storage_dtype(self.dtype).itemsize
        for layer in range(self.num_layers):
            for letter, width in (("k", self.attention_dim), ("v", self.linear_dim)):
                shape = (rows, self.num_heads, width)
                yield f"{letter}_{layer}", shape, rows * self.num_heads * width * itemsize
