"""How often magnitudes occur, counted so that histograms of parts add up to that of the whole. Level 2; no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Bins of a histogram. At least half of them are in use, so an INT8 step of the largest value is 8 to 16 bins wide.
NUM_BINS = 2048

# Ranges end at powers of two between these: below, everything lies in the first bin; above, float32 ends.
_MIN_EXPONENT = -110
_MAX_EXPONENT = 128


@dataclasses.dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of |x| in equal bins [i * width, (i + 1) * width), zeros apart.

    The range ends at the smallest power of two above the largest value. It depends on the values alone, and a range of
    twice the size has bins of two: merging histograms of any parts, in any order, gives exactly that of the whole.

    Attributes:
        exponent: the range ends at 2 ** exponent.
        counts: [NUM_BINS] int64 -- values other than zero; read-only.
        zeros: values that are exactly zero.
    """

    exponent: int
    counts: NDArray[np.int64] = dataclasses.field(repr=False)
    zeros: int = 0

    def __post_init__(self) -> None:
        counts = np.array(self.counts)
        if counts.shape != (NUM_BINS,) or counts.dtype != np.int64 or bool((counts < 0).any()) or self.zeros < 0:
            raise ValueError(
                f"counts are {counts.dtype} {list(counts.shape)}; expected int64 [{NUM_BINS}], none below 0"
            )
        if not _MIN_EXPONENT <= self.exponent <= _MAX_EXPONENT:
            raise ValueError(
                f"the range ends at 2 ** {self.exponent}; it must be 2 ** {_MIN_EXPONENT} to {_MAX_EXPONENT}"
            )
        counts.setflags(write=False)
        object.__setattr__(self, "counts", counts)

    @classmethod
    def empty(cls) -> Histogram:
        """Of no values: merging it changes nothing."""
        return cls(_MIN_EXPONENT, np.zeros(NUM_BINS, np.int64))

    @classmethod
    def of(cls, values: NDArray[Any]) -> Histogram:
        """Count values.

        Args:
            values: float32 of any shape, finite.

        Raises:
            ValueError: if a value is NaN or infinite.
        """
        magnitudes = np.abs(np.asarray(values, np.float32)).reshape(-1)
        if not magnitudes.size:
            return cls.empty()
        largest = float(magnitudes.max())
        if not math.isfinite(largest):
            raise ValueError("a histogram holds finite values; there is a NaN or an infinity")
        # frexp: largest = m * 2 ** e with 0.5 <= m < 1, so 2 ** e is above it even where it is a power of two.
        exponent = max(math.frexp(largest)[1], _MIN_EXPONENT) if largest else _MIN_EXPONENT
        zeros = int(magnitudes.size - np.count_nonzero(magnitudes))
        # A product with a power of two is exact, so every value falls into the bin that its bits say.
        bins = (magnitudes * np.float32(NUM_BINS * 2.0**-exponent)).astype(np.intp)
        counts = np.bincount(bins, minlength=NUM_BINS).astype(np.int64)
        counts[0] -= zeros
        return cls(exponent, counts, zeros)

    @property
    def upper(self) -> float:
        """End of the range, a power of two above every value."""
        return 2.0**self.exponent

    @property
    def width(self) -> float:
        """Of a bin."""
        return 2.0**self.exponent / NUM_BINS

    @property
    def total(self) -> int:
        """Values counted, zeros among them."""
        return int(self.counts.sum()) + self.zeros

    def merged(self, other: Histogram) -> Histogram:
        """The histogram of the values of both."""
        exponent = max(self.exponent, other.exponent)
        return Histogram(exponent, self._widened(exponent) + other._widened(exponent), self.zeros + other.zeros)

    def _widened(self, exponent: int) -> NDArray[np.int64]:
        """The counts in a range that ends at 2 ** exponent, which is no smaller than this one."""
        joined = min(1 << (exponent - self.exponent), NUM_BINS)
        counts = np.zeros(NUM_BINS, np.int64)
        counts[: NUM_BINS // joined] = self.counts.reshape(-1, joined).sum(axis=1)
        return counts

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Histogram):
            return NotImplemented
        same = (self.exponent, self.zeros) == (other.exponent, other.zeros)
        return same and bool(np.array_equal(self.counts, other.counts))

    def __hash__(self) -> int:
        return hash((self.exponent, self.zeros, self.counts.tobytes()))

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, without the empty bins at the end."""
        used = np.flatnonzero(self.counts)
        end = int(used[-1]) + 1 if used.size else 0
        return {"exponent": self.exponent, "zeros": self.zeros, "counts": self.counts[:end].tolist()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Histogram:
        """Parse the JSON form.

        Raises:
            ValueError: if a field is missing or unknown, or not what `to_dict` writes.
        """
        if set(values) != {"exponent", "zeros", "counts"}:
            raise ValueError(
                f"a histogram has exponent, zeros and counts; found {', '.join(map(str, values)) or 'none'}"
            )
        listed = values["counts"]
        numbers = [values["exponent"], values["zeros"], *(listed if isinstance(listed, list) else [listed])]
        for number in numbers:
            if type(number) is not int or abs(number) >= 1 << 62:
                raise ValueError(f"a histogram holds whole numbers; found {str(number)[:40]}")
        if not isinstance(listed, list) or len(listed) > NUM_BINS:
            raise ValueError(f"a histogram lists at most {NUM_BINS} counts")
        counts = np.zeros(NUM_BINS, np.int64)
        counts[: len(listed)] = listed
        return cls(values["exponent"], counts, values["zeros"])
