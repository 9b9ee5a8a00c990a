"""What Triton's TensorRT backend does with a batch of requests, in NumPy, by the configuration alone.

Written from the backend's sources (tensorrt_backend instance_state.cc, backend backend_input_collector.cc and
backend_output_responder.cc): how inputs are joined and offsets made, which CUDA graph a batch is run by and what its
inputs hold beyond the batch, how outputs are split again, and what the backend refuses when it loads a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_compile.artifacts import TensorSpec

Arrays = Mapping[str, NDArray[Any]]

_DTYPES = {"TYPE_INT32": "int32", "TYPE_INT64": "int64", "TYPE_FP32": "float32", "TYPE_FP16": "float16"}


def parse_config(path: Path) -> Any:
    """A config.pbtxt as the message of model_config.proto.

    Raises:
        google.protobuf.text_format.ParseError: for a field that the message has not.
    """
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    return text_format.Parse(path.read_text(encoding="utf-8"), ModelConfig())


def datatype(field: Any) -> str:
    """NumPy's name of a field's data_type."""
    from tritonclient.grpc.model_config_pb2 import DataType

    return _DTYPES[DataType.Name(field.data_type)]


class RaggedBackend:
    """The backend around one engine.

    Args:
        config: message of model_config.proto.
        inputs: of the engine, in its order; dynamic axes by name.
        outputs: of the engine.

    Raises:
        ValueError: where the backend would refuse to load the model.
    """

    def __init__(self, config: Any, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        self._config, self._inputs = config, tuple(inputs)
        self._declared = {each.name: each for each in config.input}
        self._made = {each.target_name[0]: each for each in config.batch_input}
        self._scattered = {each.target_name[0]: each for each in config.batch_output}
        self._check({each.name: each for each in inputs}, {each.name: each for each in outputs})

    def _check(self, inputs: Mapping[str, TensorSpec], outputs: Mapping[str, TensorSpec]) -> None:
        named = [*self._declared, *self._made]
        if sorted(named) != sorted(inputs):
            raise ValueError(f"the engine takes {sorted(inputs)} and the configuration gives {sorted(named)}")
        if sorted(each.name for each in self._config.output) != sorted(outputs):
            raise ValueError("outputs of the configuration and of the engine differ")
        for name, field in self._declared.items():
            spec = inputs[name]
            shape = [-1 if isinstance(size, str) else size for size in spec.shape]
            if datatype(field) != spec.dtype:
                raise ValueError(f"{name} is {spec.dtype}, and {datatype(field)} in the configuration")
            dims = list(field.reshape.shape) if field.HasField("reshape") else list(field.dims)
            if field.allow_ragged_batch and (len(shape) != 1 or dims[0] != shape[0]):
                raise ValueError(f"ragged {name} is {shape} in the engine and {dims} in the configuration")
            if not field.allow_ragged_batch and [-1, *dims] != shape:
                raise ValueError(f"{name} is {shape} in the engine and [-1, *{dims}] in the configuration")
        for name, made in self._made.items():
            spec = inputs[name]
            if (spec.dtype, len(spec.shape)) != ("int32", 1) or datatype(made) != "int32":
                raise ValueError(f"offsets {name} are {spec.dtype} {list(spec.shape)}")
            if made.source_input[0] not in self._declared:
                raise ValueError(f"{name} counts {made.source_input[0]}, which is no input")
        for field in self._config.output:
            if field.name in self._scattered:
                continue
            shape = [-1 if isinstance(size, str) else size for size in outputs[field.name].shape]
            if [-1, *field.dims] != shape:
                raise ValueError(f"{field.name} is {shape} in the engine and [-1, *{list(field.dims)}] here")

    def engine_feeds(self, requests: Sequence[Arrays]) -> dict[str, NDArray[Any]]:
        """The engine's inputs for requests of one user each, without the batch axis."""
        if len(requests) > self._config.max_batch_size:
            raise ValueError(f"{len(requests)} requests in a batch of {self._config.max_batch_size}")
        feeds: dict[str, NDArray[Any]] = {}
        for spec in self._inputs:
            if spec.name in self._made:
                source = self._made[spec.name].source_input[0]
                feeds[spec.name] = np.cumsum([0, *(each[source].size for each in requests)], dtype=np.int32)
            else:
                feeds[spec.name] = np.concatenate([each[spec.name].reshape(-1) for each in requests])
        return feeds

    def graph_shapes(self, feeds: Arrays) -> dict[str, int] | None:
        """Sizes of the CUDA graph that such a batch is run by; None if it is run without one."""
        batch = self._batch(feeds)
        key = (batch, *(feeds[spec.name].size for spec in self._inputs))
        graphs = sorted((self._key(spec), self._key(spec.graph_lower_bound)) for spec in self._specs())
        for upper, lower in graphs:
            if all(low <= actual <= high for low, actual, high in zip(lower, key, upper, strict=True)):
                return dict(zip((spec.name for spec in self._inputs), upper[1:], strict=True))
        return None

    def _specs(self) -> Sequence[Any]:
        specs: Sequence[Any] = self._config.optimization.cuda.graph_spec
        return specs

    def _batch(self, feeds: Arrays) -> int:
        offsets = next(iter(self._made))
        return feeds[offsets].size - 1

    def _key(self, spec: Any) -> tuple[int, ...]:
        """A graph's sizes in the engine's order; the batch axis is in front of dims that are not ragged."""
        sizes = [spec.batch_size]
        for each in self._inputs:
            dims = list(spec.input[each.name].dim)
            ragged = each.name in self._made or self._declared[each.name].allow_ragged_batch
            full = dims if ragged else [spec.batch_size, *dims]
            if len(full) != 1:
                raise ValueError(f"graph_spec gives {each.name} the shape {full}")
            sizes += full
        return tuple(sizes)

    def graph_feeds(self, feeds: Arrays, sizes: Mapping[str, int], rng: np.random.Generator) -> dict[str, NDArray[Any]]:
        """The inputs of a larger graph: offsets filled up with their last entry, all else with what was there."""
        larger = {}
        for name, array in feeds.items():
            extra = sizes[name] - array.size
            if name in self._made:
                rest = np.full(extra, array[-1], array.dtype)
            else:
                # Any bits at all: an earlier batch's values, or none that ever was a legal one.
                rest = rng.integers(0, 256, extra * array.itemsize, dtype=np.uint8).view(array.dtype)
            larger[name] = np.concatenate([array, rest])
        return larger

    def responses(self, outputs: Arrays, requests: Sequence[Arrays]) -> list[dict[str, NDArray[Any]]]:
        """Each request's part of the outputs, with the batch axis."""
        found: list[dict[str, NDArray[Any]]] = [{} for _ in requests]
        for field in self._config.output:
            values, start = outputs[field.name].reshape(-1), 0
            for answer, request in zip(found, requests, strict=True):
                shape = [1, *field.dims]
                if field.name in self._scattered:
                    # "the dynamic dimension in output is mapped to the same dimension in the input"
                    source = (1, *request[self._scattered[field.name].source_input[0]].shape)
                    shape = [source[axis] if size == -1 else size for axis, size in enumerate(shape)]
                stop = start + int(np.prod(shape))
                answer[field.name] = values[start:stop].reshape(shape)
                start = stop
        return found
