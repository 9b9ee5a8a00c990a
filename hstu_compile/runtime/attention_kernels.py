"""Kernels that run between engines, attentions and norms, and the library that brings them. Level 3; no torch.

`plugins/api/hstuAttentionKernels.h` is the interface of that library; this module is its other side.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from hstu_compile.artifacts import KernelCall, TensorSpec
from hstu_compile.errors import PluginError
from hstu_compile.op_schema import attention_contract, contract_of, norm_contract

API_VERSION = 2

_MAX_RANK = 8
_ERROR_BYTES = 4096
_ELEMENT_TYPES = {"float32": 0, "float16": 1, "bfloat16": 2, "int32": 3, "int64": 4}

Shape = tuple[int, ...]


class Placed(NamedTuple):
    """Where a tensor lies.

    Attributes:
        address: on the device; 0 is legal where the tensor is empty.
        shape: of the tensor.
        row_stride: elements from a row to the next; 0: contiguous. Of `strided_inputs` it may be another.
    """

    address: int
    shape: Shape
    row_stride: int = 0


@dataclasses.dataclass(frozen=True)
class Launch:
    """What one pass of a kernel reads and writes.

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


class PreparedKernel(Protocol):
    """One call of a graph, loaded. The CUDA context is current in every call."""

    def workspace_bytes(self, shapes: Mapping[str, Shape]) -> int:
        """Device memory that a launch of these input shapes needs beside its tensors."""

    def enqueue(self, launch: Launch, stream: int) -> None:
        """Queue the kernel on a stream, and nothing else: it may be recorded into a CUDA graph."""

    def close(self) -> None:
        """Free it. A second call does nothing."""


class Kernels(Protocol):
    """Where kernels come from."""

    @property
    def name(self) -> str:
        """What runs, for messages and reports."""

    def prepare(self, call: KernelCall, tensors: Mapping[str, TensorSpec]) -> PreparedKernel:
        """Load the kernel of one call into the current CUDA context.

        Args:
            call: an attention or a norm.
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
    """`Kernels` of a shared library.

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
            if version == API_VERSION:  # another one may lack them
                self._lib.hstuAttentionDestroy.restype = self._lib.hstuNormDestroy.restype = None
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

    @property
    def name(self) -> str:
        """Kernels by their build."""
        return f"kernels {self._lib.hstuAttentionKernelsBuildId().decode()}"

    def prepare(self, call: KernelCall, tensors: Mapping[str, TensorSpec]) -> PreparedKernel:
        """See `Kernels.prepare`."""
        kinds: dict[str, type[_LoadedAttention | _LoadedNorm]] = {
            attention_contract().name: _LoadedAttention,
            norm_contract().name: _LoadedNorm,
        }
        return kinds[call.operator](self._lib, call, tensors)


class _Loaded:
    """An object of the library that runs one call.

    Args:
        library: the library.
        call: the call.
        tensors: see `Kernels.prepare`.
    """

    _family = ""  # what the names of the library's functions for such calls begin with
    _kind = ""  # of call, for messages

    def __init__(self, library: Any, call: KernelCall, tensors: Mapping[str, TensorSpec]) -> None:
        self._lib, self._call = library, call
        self._types = {name: _ELEMENT_TYPES[spec.dtype] for name, spec in tensors.items()}
        self._out = contract_of(call.operator).output.name
        self._handle = ctypes.c_void_p()
        # A dynamic axis is -1.
        shapes = {n: tuple(s if isinstance(s, int) else -1 for s in spec.shape) for n, spec in tensors.items()}
        inputs, count = self._inputs({name: Placed(0, shapes[name]) for name in call.inputs})
        attributes = (_Attribute * len(call.attributes))(
            *(_Attribute(name.encode(), float(value)) for name, value in call.attributes.items())
        )
        self._checked(
            "Create",
            call.name.encode(),
            attributes,
            ctypes.c_int32(len(attributes)),
            inputs,
            count,
            ctypes.byref(self._tensor(self._out, Placed(0, shapes[self._out]))),
            ctypes.byref(self._handle),
        )

    def close(self) -> None:
        handle, self._handle = self._handle, ctypes.c_void_p()
        if handle.value:
            getattr(self._lib, f"{self._family}Destroy")(handle)

    def _enqueue(self, launch: Launch, *others: Any) -> None:
        inputs, count = self._inputs(launch.inputs)
        output = ctypes.byref(self._tensor(self._out, launch.output))
        self._checked("Enqueue", self._handle, inputs, count, output, *others)

    def _inputs(self, given: Mapping[str, Placed]) -> tuple[Any, ctypes.c_int32]:
        tensors = (_Tensor * len(given))(*(self._tensor(name, place) for name, place in given.items()))
        return tensors, ctypes.c_int32(len(given))

    def _tensor(self, name: str, place: Placed) -> _Tensor:
        address, shape, row_stride = place
        dims = (ctypes.c_int64 * _MAX_RANK)(*shape)
        return _Tensor(name.encode(), self._types[name], len(shape), dims, address or None, row_stride)

    def _checked(self, function: str, *arguments: Any) -> None:
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        name = f"{self._family}{function}"
        if getattr(self._lib, name)(*arguments, error, ctypes.c_size_t(_ERROR_BYTES)):
            raise PluginError(
                "HSTU-E505",
                f"the {self._kind} {self._call.name} could not run",
                f"{name}: {error.value.decode(errors='replace')}",
                "build the bundle for this GPU and these shapes, or use --runtime onnxruntime",
                {self._kind: self._call.name},
            )


class _LoadedAttention(_Loaded):
    """An HstuAttention of the library."""

    _family, _kind = "hstuAttention", "attention"

    def workspace_bytes(self, shapes: Mapping[str, Shape]) -> int:
        inputs, count = self._inputs({name: Placed(0, shapes[name]) for name in self._call.inputs})
        found = ctypes.c_size_t()
        self._checked("Workspace", self._handle, inputs, count, ctypes.byref(found))
        return int(found.value)

    def enqueue(self, launch: Launch, stream: int) -> None:
        workspace = ctypes.c_void_p(launch.workspace or None), ctypes.c_size_t(launch.workspace_bytes)
        self._enqueue(launch, *workspace, ctypes.c_void_p(stream))


class _LoadedNorm(_Loaded):
    """An HstuNorm of the library."""

    _family, _kind = "hstuNorm", "norm"

    def workspace_bytes(self, shapes: Mapping[str, Shape]) -> int:
        return 0

    def enqueue(self, launch: Launch, stream: int) -> None:
        self._enqueue(launch, ctypes.c_void_p(stream))
