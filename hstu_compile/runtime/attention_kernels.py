"""Attention kernels that run between engines, and the library that brings them. Level 3; no torch.

`plugins/api/hstuAttentionKernels.h` is the interface of that library; this module is its other side.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from hstu_compile.artifacts import AttentionCall, TensorSpec
from hstu_compile.errors import PluginError
from hstu_compile.op_schema import attention_contract

API_VERSION = 1

_MAX_RANK = 8
_ERROR_BYTES = 4096
_ELEMENT_TYPES = {"float32": 0, "float16": 1, "bfloat16": 2, "int32": 3, "int64": 4}

Shape = tuple[int, ...]


class Placed(NamedTuple):
    """Where a tensor lies.

    Attributes:
        address: on the device; 0 is legal where the tensor is empty.
        shape: of the tensor.
        row_stride: elements from a row to the next; 0: contiguous. Of q, k and v it may be another.
    """

    address: int
    shape: Shape
    row_stride: int = 0


@dataclasses.dataclass(frozen=True)
class Launch:
    """What one pass of an attention reads and writes.

    Attributes:
        inputs: place of every input, by the contract's names.
        output: place of the output.
        workspace: device address, or 0 where none is needed.
        workspace_bytes: bytes there.
    """

    inputs: Mapping[str, Placed]
    output: Placed
    workspace: int
    workspace_bytes: int


class AttentionKernel(Protocol):
    """One attention of a graph, loaded. The CUDA context is current in every call."""

    def workspace_bytes(self, shapes: Mapping[str, Shape]) -> int:
        """Device memory that a launch of these input shapes needs beside its tensors."""

    def enqueue(self, launch: Launch, stream: int) -> None:
        """Queue the kernels on a stream, and nothing else: it may be recorded into a CUDA graph."""

    def close(self) -> None:
        """Free it. A second call does nothing."""


class AttentionKernels(Protocol):
    """Where attentions come from."""

    @property
    def name(self) -> str:
        """What runs, for messages and reports."""

    def prepare(self, call: AttentionCall, tensors: Mapping[str, TensorSpec]) -> AttentionKernel:
        """Load one attention into the current CUDA context.

        Args:
            call: the attention.
            tensors: type and shape of every input, by the contract's names, and of the output by its name there.

        Raises:
            PluginError: HSTU-E505 if no kernel fits it on this device.
        """


class _Attribute(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("value", ctypes.c_double))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("type", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("dims", ctypes.c_int64 * _MAX_RANK),
        ("data", ctypes.c_void_p),
        ("rowStride", ctypes.c_int64),
    )


class KernelLibrary:
    """`AttentionKernels` of a shared library.

    Args:
        path: the library.

    Raises:
        PluginError: HSTU-E504 if it cannot be loaded, or is of another version of the interface.
    """

    def __init__(self, path: Path) -> None:
        fix = "use the library of the bundle that the engines are from"
        try:
            # ctypes takes a bare name for one to be looked up.
            self._lib = ctypes.CDLL(str(path.resolve()))
            self._lib.hstuAttentionKernelsBuildId.restype = ctypes.c_char_p
            version = int(self._lib.hstuAttentionKernelsApiVersion())
        except (OSError, AttributeError) as error:
            raise PluginError(
                "HSTU-E504", f"{path} cannot be loaded", str(error), fix, {"library": str(path)}
            ) from error
        if version != API_VERSION:
            raise PluginError(
                "HSTU-E504",
                f"{path} has version {version} of the kernels' interface",
                f"this hstu-compile speaks version {API_VERSION}",
                fix,
                {"library": str(path), "version": version},
            )
        self._lib.hstuAttentionDestroy.restype = None

    @property
    def name(self) -> str:
        """Kernels by their build."""
        return f"kernels {self._lib.hstuAttentionKernelsBuildId().decode()}"

    def prepare(self, call: AttentionCall, tensors: Mapping[str, TensorSpec]) -> AttentionKernel:
        """See `AttentionKernels.prepare`."""
        return _LoadedAttention(self._lib, call, tensors)


class _LoadedAttention:
    """An HstuAttention of the library."""

    def __init__(self, library: Any, call: AttentionCall, tensors: Mapping[str, TensorSpec]) -> None:
        self._lib, self._call = library, call
        self._types = {name: _ELEMENT_TYPES[spec.dtype] for name, spec in tensors.items()}
        self._out = attention_contract().output.name
        self._handle = ctypes.c_void_p()
        # A dynamic axis is -1.
        shapes = {n: tuple(s if isinstance(s, int) else -1 for s in spec.shape) for n, spec in tensors.items()}
        inputs, count = self._inputs({name: Placed(0, shapes[name]) for name in call.inputs})
        attributes = (_Attribute * len(call.attributes))(
            *(_Attribute(name.encode(), float(value)) for name, value in call.attributes.items())
        )
        self._checked(
            "hstuAttentionCreate",
            call.name.encode(),
            attributes,
            ctypes.c_int32(len(attributes)),
            inputs,
            count,
            ctypes.byref(self._tensor(self._out, Placed(0, shapes[self._out]))),
            ctypes.byref(self._handle),
        )

    def workspace_bytes(self, shapes: Mapping[str, Shape]) -> int:
        inputs, count = self._inputs({name: Placed(0, shapes[name]) for name in self._call.inputs})
        found = ctypes.c_size_t()
        self._checked("hstuAttentionWorkspace", self._handle, inputs, count, ctypes.byref(found))
        return int(found.value)

    def enqueue(self, launch: Launch, stream: int) -> None:
        inputs, count = self._inputs(launch.inputs)
        self._checked(
            "hstuAttentionEnqueue",
            self._handle,
            inputs,
            count,
            ctypes.byref(self._tensor(self._out, launch.output)),
            ctypes.c_void_p(launch.workspace or None),
            ctypes.c_size_t(launch.workspace_bytes),
            ctypes.c_void_p(stream),
        )

    def close(self) -> None:
        handle, self._handle = self._handle, ctypes.c_void_p()
        if handle.value:
            self._lib.hstuAttentionDestroy(handle)

    def _inputs(self, given: Mapping[str, Placed]) -> tuple[Any, ctypes.c_int32]:
        tensors = (_Tensor * len(given))(*(self._tensor(name, place) for name, place in given.items()))
        return tensors, ctypes.c_int32(len(given))

    def _tensor(self, name: str, place: Placed) -> _Tensor:
        address, shape, row_stride = place
        dims = (ctypes.c_int64 * _MAX_RANK)(*shape)
        return _Tensor(name.encode(), self._types[name], len(shape), dims, address or None, row_stride)

    def _checked(self, function: str, *arguments: Any) -> None:
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        if getattr(self._lib, function)(*arguments, error, ctypes.c_size_t(_ERROR_BYTES)):
            raise PluginError(
                "HSTU-E505",
                f"the attention {self._call.name} could not run",
                f"{function}: {error.value.decode(errors='replace')}",
                "build the bundle for this GPU and these shapes, or use --runtime onnxruntime",
                {"attention": self._call.name},
            )
