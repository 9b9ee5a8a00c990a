"""Runs the Triton kernels on CPU, in processes with TRITON_INTERPRET=1 (read at Triton's first import)."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from concurrent.futures import Future, ProcessPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from tests.attention_cases import round_to_dtype
from tests.norm_cases import NormCase
from tests.oracle import Array, AttentionCase

if TYPE_CHECKING:
    import torch

#: (BLOCK_M, BLOCK_N) of the tests: the smallest legal tile meets most boundaries per row computed.
SMALL_TILE = (16, 16)


def _start_worker() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    torch.set_num_threads(1)
    _repair_bfloat16()
    _spare_repeated_work()


def _repair_bfloat16() -> None:
    """Give Triton 3.6's interpreter the GPU's bfloat16.

    It holds a bfloat16 as its 16 bits.  ``tl.dot`` multiplies those bits as integers, and the conversion from float32
    cuts bits off where the GPU rounds to nearest even.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot = InterpreterBuilder.create_dot

    def widen(operand: TensorHandle) -> TensorHandle:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):  # type: ignore[no-untyped-def]
        return dot(self, widen(a), widen(b), d, input_precision, max_num_imprecise_acc)

    cast = InterpreterBuilder.cast_impl

    def cast_impl(self, src, dst_type):  # type: ignore[no-untyped-def]
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            bits = round_to_dtype(np.ascontiguousarray(src.data), "bfloat16").view(np.uint32)
            return TensorHandle((bits >> 16).astype(np.uint16), tl.bfloat16)
        return cast(self, src, dst_type)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl


def _spare_repeated_work() -> None:
    """Let Triton 3.6's interpreter do once what it does anew for each operation; what it computes stays.

    On tiles of 16 by 16 it is two thirds of the time.
    """
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set()

    def patch_once(fn):  # type: ignore[no-untyped-def]
        """Each call of a function patches the language; nothing but the interpreter runs here, so it stays patched."""
        modules = frozenset(m.__name__ for m in (tl, tl.core) if any(x is m for x in fn.__globals__.values()))
        if modules not in patched:
            patch(fn)
            patched.add(modules)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_once

    numpy_type, numpy_types = interpreter._get_np_dtype, {}

    def numpy_type_once(dtype):  # type: ignore[no-untyped-def]
        scalar = dtype.scalar
        if scalar.name not in numpy_types:
            numpy_types[scalar.name] = numpy_type(scalar)
        return numpy_types[scalar.name]

    interpreter._get_np_dtype = numpy_type_once

    # Whether integers overflow takes a dozen operations each time, and without debug nobody looks at the answer.
    TritonSemantic.binary_op_sanitize_overflow_impl = lambda *_: None

    create, shapes = tl.core.tensor.__init__, {}

    def create_tensor(self, handle, type):  # type: ignore[no-untyped-def]
        """The shape of a tensor is a dozen objects: one set for all of that shape."""
        shape = tuple(map(int, type.shape)) if type.is_block() else ()
        if shape not in shapes:
            create(self, handle, type)
            shapes[shape] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[shape]

    tl.core.tensor.__init__ = create_tensor


def run_kernel(
    case: AttentionCase,
    tile: tuple[int, int] = SMALL_TILE,
    mask_kind: int | None = None,
    columns: tuple[int, int, int] | None = None,
) -> Array:
    """Return the kernel's output [Lq, H, Dv] as float32; the output buffer starts as NaN, so an unwritten row shows.

    With ``columns``, q, k and v are columns of wider tensors, with so many columns of NaN on either side of each.

    Only for a worker process of :class:`KernelInterpreter`.
    """
    import torch

    from hstu_compile.plugins.kernels import launch
    from hstu_compile.plugins.kernels.tiles import TileConfig

    dtype = getattr(torch, case.dtype)

    def tensor(values: Array | None) -> torch.Tensor | None:
        return None if values is None else torch.from_numpy(np.ascontiguousarray(values))

    def poisoned(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.full(shape, float("nan"), dtype=dtype, device=device)

    inputs = {name: tensor(values) for name, values in case.optional_inputs().items()}
    for name in ("k_cached", "v_cached"):
        rows = inputs[name]
        inputs[name] = None if rows is None else rows.to(dtype)
    attributes = {
        field.name: getattr(case.attrs, field.name)
        for field in dataclasses.fields(case.attrs)
        if field.name not in ("pos_table_len", "silu")  # this kernel has one SiLU
    }
    allocate = torch.empty
    q, k, v = (torch.from_numpy(np.ascontiguousarray(values)).to(dtype) for values in (case.q, case.k, case.v))
    if columns is not None:
        q, k, v = (_among_nans(x, count) for x, count in zip((q, k, v), columns, strict=True))
        assert all(launch._with_whole_rows(x) is x for x in (q, k, v)), "columns were copied"
    out_shape = (q.shape[0], q.shape[1], v.shape[2])
    torch.empty = lambda *size, **options: (  # type: ignore[assignment]
        poisoned(out_shape, **options) if size == (out_shape,) else allocate(*size, **options)
    )
    try:
        out = launch.hstu_attention_triton(
            q,
            k,
            v,
            torch.from_numpy(case.q_offsets),
            torch.from_numpy(case.k_offsets),
            **inputs,
            **attributes,
            config=TileConfig(1, tile[0], tile[1], 4, 1, "interpreter"),
            mask_kind=mask_kind,
        )
    finally:
        torch.empty = allocate
    return out.float().numpy()


def _among_nans(x: torch.Tensor, count: int) -> torch.Tensor:
    """The same [L, H, D] or [L, D], its rows between ``count`` columns of NaN."""
    import torch

    rows = x.flatten(1)
    wide = torch.nn.functional.pad(rows, (count, count), value=float("nan"))
    return wide[:, count : count + rows.shape[1]].unflatten(1, x.shape[1:])


def run_norm_kernel(case: NormCase, columns: tuple[int, int] = (0, 0)) -> Array:
    """Return the norm kernel's output as float32, by the tile that ships; unwritten numbers are NaN.

    x and gate are columns of wider tensors with so many columns of NaN on either side of each as ``columns`` says.
    Only for a worker process of :class:`KernelInterpreter`.
    """
    import torch

    from hstu_compile.plugins.kernels.hstu_norm import hstu_norm
    from hstu_compile.plugins.kernels.norm_variants import norm_tile

    variant, (rows, width) = case.variant, case.x.shape
    tile, segments = norm_tile(variant.block), rows * case.num_groups
    given = {
        name: torch.from_numpy(np.ascontiguousarray(values)).to(getattr(torch, kind))
        for name, (kind, values) in case.inputs().items()
    }
    for name, count in zip(("x", "gate"), columns, strict=True):
        if name in given:
            given[name] = _among_nans(given[name], count)
    nothing = torch.empty(0, dtype=torch.float32)
    parts = width * (3 if case.concat else 1)
    # More rows than there are: a store behind the end would show.
    out = torch.full((rows + 2, parts), float("nan"), dtype=getattr(torch, case.output_type))
    if segments:
        hstu_norm[(-(-segments // tile.segments),)](
            given["x"],
            given.get("shift", nothing),
            given["scale"],
            given.get("bias", nothing),
            given.get("gate", given["x"]),
            out,
            case.epsilon,
            segments,
            width // case.num_groups,
            case.num_groups,
            given["x"].stride(0),
            given.get("gate", given["x"]).stride(0),
            int(case.shift is not None),
            int(case.bias is not None),
            SEGMENTS=tile.segments,
            BLOCK=variant.block,
            ACTIVATION=case.activation,
            GATE_SILU=case.gate_silu,
            CONCAT=case.concat,
            num_warps=tile.num_warps,
        )
    assert bool(out[rows:].isnan().all()), "rows behind the end were written"
    return out[:rows].float().numpy()


class KernelInterpreter:
    """An interpreter in a process of its own; use as a context manager."""

    def __init__(self) -> None:
        """Start nothing yet: the process starts with the first case."""
        # One: a second costs another import of torch and Triton, and the tests beside these have the other core.
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker)

    def __enter__(self) -> KernelInterpreter:
        """Return self."""
        return self

    def __exit__(self, *_: object) -> None:
        """Drop the cases that nobody waits for and end the process."""
        self._pool.shutdown(cancel_futures=True)

    def submit(
        self,
        case: AttentionCase,
        tile: tuple[int, int] = SMALL_TILE,
        mask_kind: int | None = None,
        columns: tuple[int, int, int] | None = None,
    ) -> Future[Array]:
        """Start ``case``; the future's result is the output [Lq, H, Dv]."""
        return self._pool.submit(run_kernel, case, tile, mask_kind, columns)

    def run(self, case: AttentionCase, tile: tuple[int, int] = SMALL_TILE, mask_kind: int | None = None) -> Array:
        """Return the output [Lq, H, Dv] of ``case``."""
        return self.submit(case, tile, mask_kind).result()

    def submit_norm(self, case: NormCase, columns: tuple[int, int] = (0, 0)) -> Future[Array]:
        """Start a norm; the future's result is its output. See `run_norm_kernel` for ``columns``."""
        return self._pool.submit(run_norm_kernel, case, columns)
