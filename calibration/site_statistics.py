"""What one product's activations were on recorded requests. Level 2; no torch."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_compile.calibration.histogram import Histogram
from hstu_compile.calibration.observers import Observer, Quantization, clipping_bound
from hstu_compile.calibration.sealed_json import require_keys


@dataclasses.dataclass(frozen=True)
class SiteStatistics:
    """The activations that one product took.

    Attributes:
        name: of the site, such as layers.0.uvqk.
        inputs: columns of the activations, rows of the weight.
        outputs: columns of the weight.
        rows: rows of activations seen.
        channel_amax: [inputs] -- largest magnitude of each column, 0 where there was none.
        histogram: of the magnitudes of all elements.
    """

    name: str
    inputs: int
    outputs: int
    rows: int
    channel_amax: tuple[float, ...] = dataclasses.field(repr=False)
    histogram: Histogram = dataclasses.field(repr=False)

    def __post_init__(self) -> None:
        if min(self.inputs, self.outputs) < 1 or self.rows < 0:
            raise ValueError(f"the product is {self.rows} x {self.inputs} x {self.outputs}")
        if len(self.channel_amax) != self.inputs:
            raise ValueError(f"channel_amax has {len(self.channel_amax)} numbers for {self.inputs} inputs")
        if not all(math.isfinite(value) and value >= 0 for value in self.channel_amax):
            raise ValueError("channel_amax has a number that is negative or not finite")
        if self.histogram.total != self.rows * self.inputs:
            raise ValueError(
                f"the histogram counts {self.histogram.total} values; {self.rows} rows of {self.inputs} have "
                f"{self.rows * self.inputs}"
            )
        used = np.flatnonzero(self.histogram.counts)
        expected = int(used[-1]) if used.size else None
        seen = int(self.amax / self.histogram.width) if self.amax else None
        if seen != expected:
            raise ValueError(f"the largest channel_amax {self.amax} is not in the last bin of the histogram")

    @classmethod
    def empty(cls, name: str, inputs: int, outputs: int) -> SiteStatistics:
        """Of a product that took nothing yet."""
        return cls(name, inputs, outputs, 0, (0.0,) * inputs, Histogram.empty())

    @classmethod
    def of(cls, name: str, activations: NDArray[Any], outputs: int) -> SiteStatistics:
        """Statistics of activations [rows, inputs] float32.

        Raises:
            ValueError: if one is NaN or infinite.
        """
        rows, inputs = activations.shape
        if not rows:
            return cls.empty(name, inputs, outputs)
        # Two reductions instead of one of the magnitudes, which would be a copy.
        channel_amax = np.maximum(activations.max(axis=0), -activations.min(axis=0)).astype(np.float32)
        return cls(name, inputs, outputs, rows, tuple(np.abs(channel_amax).tolist()), Histogram.of(activations))

    @property
    def amax(self) -> float:
        """Largest magnitude; 0 where every value is zero."""
        return max(self.channel_amax)

    @functools.cached_property
    def _bounds(self) -> dict[tuple[Observer, Quantization], float]:
        return {}

    def bound(self, observer: Observer, quantization: Quantization) -> float:
        """Where to clip: above 0 and at most amax, or 0 where every value is zero."""
        key = (observer, quantization)
        if key not in self._bounds:
            self._bounds[key] = clipping_bound(self.histogram, self.amax, observer, quantization)
        return self._bounds[key]

    def merged(self, other: SiteStatistics) -> SiteStatistics:
        """Statistics of the activations of both.

        Raises:
            ValueError: if they are of different products.
        """
        if (self.name, self.inputs, self.outputs) != (other.name, other.inputs, other.outputs):
            raise ValueError(
                f"{self.name} [{self.inputs}, {self.outputs}] and {other.name} [{other.inputs}, {other.outputs}] are "
                "different products"
            )
        return dataclasses.replace(
            self,
            rows=self.rows + other.rows,
            channel_amax=tuple(map(max, self.channel_amax, other.channel_amax)),
            histogram=self.histogram.merged(other.histogram),
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; the name is its key in the table."""
        return {
            "inputs": self.inputs,
            "outputs": self.outputs,
            "rows": self.rows,
            "amax": self.amax,
            "channel_amax": list(self.channel_amax),
            "histogram": self.histogram.to_dict(),
        }

    @classmethod
    def from_dict(cls, name: str, values: Mapping[str, Any]) -> SiteStatistics:
        """Parse the JSON form. Raises ValueError, KeyError or TypeError where it is not what `to_dict` writes."""
        require_keys(values, {"inputs", "outputs", "rows", "amax", "channel_amax", "histogram"})
        inputs, outputs, rows = values["inputs"], values["outputs"], values["rows"]
        if any(type(size) is not int for size in (inputs, outputs, rows)):
            raise ValueError(f"inputs, outputs and rows are {inputs}, {outputs}, {rows}; they must be whole numbers")
        channels = values["channel_amax"]
        if not all(type(value) in (int, float) for value in [values["amax"], *channels]):
            raise ValueError("amax and channel_amax must be numbers")
        histogram = Histogram.from_dict(values["histogram"])
        statistics = cls(name, inputs, outputs, rows, tuple(map(float, channels)), histogram)
        if statistics.amax != values["amax"]:
            raise ValueError(f"amax is {values['amax']} and the largest channel_amax {statistics.amax}")
        return statistics
