"""What the sessions that compute on the host share: resident tensors, and their own type at the ends. Level 3."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hstu_compile.artifacts import TensorSpec
from hstu_compile.errors import InternalError
from hstu_compile.runtime._bfloat16 import bits_of_values, values_of_bits
from hstu_compile.runtime._feeds import matched_feeds
from hstu_compile.runtime._resident_io import Copies, Feeds, check_copies, check_residents, check_target, split_feeds
from hstu_compile.runtime.resident import HostPool, HostTensor, ResidentTensor

if TYPE_CHECKING:
    from typing_extensions import Self


class HostSession(abc.ABC):
    """A `Session` whose feeds and answers are host arrays; a subclass says what it computes.

    Attributes:
        name: runtime and version.
        inputs: what `run` takes, bfloat16 as float32.
        outputs: what `run` gives, likewise.
        resident_inputs: the same with the graph's own types, which resident tensors have.
        resident_outputs: likewise.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    resident_inputs: tuple[TensorSpec, ...]
    resident_outputs: tuple[TensorSpec, ...]

    @abc.abstractmethod
    def execute(self, arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Outputs of matched inputs.

        Raises:
            EngineError: HSTU-E404 if the runtime fails.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """See `Session.close`."""

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """See `Session.run`."""
        return self.execute(matched_feeds(feeds, self.inputs))

    def run_resident(
        self,
        feeds: Feeds,
        outputs: Mapping[str, ResidentTensor],
        *,
        before: Copies = (),
        after: Copies = (),
    ) -> dict[str, NDArray[Any]]:
        """See `Session.run_resident`. Outputs are copied to their targets once all are known to fit."""
        check_copies((*before, *after), HostTensor)
        _copy(before)
        arrays, residents = split_feeds(feeds)
        check_residents(residents, outputs, inputs=self.resident_inputs, outputs=self.resident_outputs, kind=HostTensor)
        for name, tensor in residents.items():
            assert isinstance(tensor, HostTensor)  # check_residents saw to that
            arrays[name] = values_of_bits(tensor.array) if tensor.dtype == "bfloat16" else tensor.array
        results = self.execute(matched_feeds(arrays, self.inputs))
        for name, target in outputs.items():
            check_target(name, results[name].shape, target, self.resident_outputs)
        for name, target in outputs.items():
            assert isinstance(target, HostTensor)  # as above
            result = results.pop(name)
            target.array[...] = _narrowed(name, result) if target.dtype == "bfloat16" else result
        _copy(after)
        return results

    @property
    def graph_stats(self) -> None:
        """See `Session.graph_stats`."""
        return None

    def most_rows(self, name: str) -> None:
        """See `Session.most_rows`; there are no profiles."""
        return None

    def memory_pool(self, capacity_bytes: int) -> HostPool:
        """See `Session.memory_pool`. Host memory, also with `use_gpu`: feeds of ONNX Runtime are host arrays here."""
        return HostPool(capacity_bytes)

    def __enter__(self) -> Self:
        """Return the session."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the session."""
        self.close()


def _copy(copies: Copies) -> None:
    for source, target in copies:
        assert isinstance(source, HostTensor)  # check_copies saw to that
        assert isinstance(target, HostTensor)
        target.array[...] = source.array


def _narrowed(name: str, values: NDArray[Any]) -> NDArray[np.uint16]:
    bits = bits_of_values(values)
    if bits is None:
        raise InternalError(f"the widened graph gave {name} values that bfloat16 cannot hold")
    return bits
