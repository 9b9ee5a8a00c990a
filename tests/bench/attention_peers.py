"""Attention kernels of others, as shared libraries with one C function, and Meta's Triton kernels from their sources.

A library offers, for whatever it has kernels of,

  const char *hstu_peer_version(void);                           what it was built from
  int hstu_peer_forward(const struct PeerArguments *arguments);  enqueue one forward

with the members of `PeerArguments` below in that order, no synchronisation and no allocation. It returns 0, a CUDA
error, or -1 for what it does not offer. All rows lie [rows, H, D] without gaps; queries are the last rows of each
sequence. What the library needs beside the kernel, such as a counter set to zero, is part of its time.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from attention_grid import NUM_HEADS
from attention_reference import Inputs, bias_rows
from torch import Tensor

VERSION = 1
NOT_OFFERED = -1
ELEMENTS = {torch.float16: 1, torch.bfloat16: 2}
_WORKSPACE_BYTES = 1024


class NotOfferedError(Exception):
    """A backend has nothing for a case; the text says why."""


class PeerArguments(ctypes.Structure):
    """One call. Pointers are device addresses; those that may be null are num_targets and bias.

    is_dense: all sequences have max_k_len rows, q_offsets and k_offsets need not be read. scaling_seq_len divides the
    weights. bias is [B, bias_heads, max_k_len, max_k_len] of the element type, added to <q, k> before alpha multiplies
    both. q_offsets and k_offsets are one address where all rows ask.
    """

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("version", "element", "is_dense", "batch", "num_heads", "head_dim")),
        *((name, ctypes.c_int32) for name in ("total_q", "total_k", "max_q_len", "max_k_len", "scaling_seq_len")),
        *((name, ctypes.c_int32) for name in ("bias_heads", "num_sms")),
        ("alpha", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "q_offsets", "k_offsets", "num_targets")),
        *((name, ctypes.c_void_p) for name in ("bias", "workspace", "stream")),
    )


class PeerLibrary:
    """A loaded library.

    Attributes:
        forward: the C function.
        version: what the library was built from.

    Raises:
        OSError: it cannot be loaded.
        AttributeError: it lacks one of the two functions.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path.resolve()))
        library.hstu_peer_version.restype = ctypes.c_char_p
        library.hstu_peer_forward.argtypes = [ctypes.POINTER(PeerArguments)]
        self.forward = library.hstu_peer_forward
        self.version = str(library.hstu_peer_version().decode())

    def caller(self, inputs: Inputs, *, is_dense: bool, bias: Tensor | None = None) -> Callable[[], Tensor]:
        """A function that enqueues one forward on the current stream and returns its output [Lq, H, D].

        The output is one tensor for all calls, made at the first one, and NaN before it.
        """
        case, device = inputs.case, inputs.q.device
        workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        # These live as long as the function that has their addresses.
        out: Tensor | None = None
        tensors: dict[str, Tensor | None] = {
            "q": inputs.q,
            "k": inputs.k,
            "v": inputs.v,
            "q_offsets": inputs.q_offsets,
            "k_offsets": inputs.k_offsets,
            "num_targets": inputs.num_targets,
            "bias": bias,
            "workspace": workspace,
        }
        arguments = PeerArguments(
            version=VERSION,
            element=ELEMENTS[inputs.q.dtype],
            is_dense=int(is_dense),
            batch=len(case.lengths),
            num_heads=NUM_HEADS,
            head_dim=case.dim,
            total_q=inputs.q.shape[0],
            total_k=inputs.k.shape[0],
            max_q_len=max(case.query_lengths),
            max_k_len=case.max_len,
            scaling_seq_len=case.max_len,
            bias_heads=0 if bias is None else bias.shape[1],
            num_sms=multiprocessors(device),
            alpha=case.alpha,
            **{name: None if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()},
        )

        def run() -> Tensor:
            nonlocal out
            if out is None:
                out = torch.full_like(inputs.q, torch.nan)
                arguments.out = out.data_ptr()
            arguments.stream = current_stream(device)
            status = self.forward(ctypes.byref(arguments))
            if status == NOT_OFFERED:
                raise NotOfferedError("the library has no kernel for it")
            if status:
                raise RuntimeError(f"the library failed with CUDA error {status}")
            return out

        return run


def multiprocessors(device: torch.device) -> int:
    """How many a GPU has; 0 without one."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 0


def current_stream(device: torch.device) -> int | None:
    """Address of PyTorch's current stream; None without a GPU."""
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else None


def dense_bias(inputs: Inputs) -> Tensor:
    """[B, 1, N, N] of q's type: what a kernel that adds a tensor before it multiplies by alpha needs.

    Sequences must be of one length. Filling it is no part of that kernel's time.
    """
    case, n = inputs.case, inputs.case.max_len
    bias = torch.empty((len(case.lengths), 1, n, n), dtype=inputs.q.dtype, device=inputs.q.device)
    rows = torch.arange(n, device=inputs.q.device)
    for b in range(len(case.lengths)):
        for part in rows.split(1024):
            bias[b, 0, part] = (bias_rows(inputs, b, part) / case.alpha).to(bias.dtype)
    return bias


def meta_triton_module(repository: Path) -> Any:
    """Meta's module of Triton attention kernels, from a checkout of generative-recommenders.

    Raises:
        FileNotFoundError: it is no such folder.
    """
    from m_falcon_meta import provide_fbgemm, provide_torchrec

    name = "generative_recommenders.ops.triton.triton_hstu_attention"
    if not (repository / f"{name.replace('.', '/')}.py").is_file():
        raise FileNotFoundError(f"{repository} has no {name.replace('.', '/')}.py")
    provide_torchrec()
    provide_fbgemm()
    if str(repository) not in sys.path:
        sys.path.insert(0, str(repository))
    return importlib.import_module(name)


def meta_triton_caller(module: Any, inputs: Inputs, *, has_tma: bool) -> Callable[[], Tensor]:
    """One call of Meta's Triton kernel; with fewer queries than keys, of its form for cached keys."""
    case = inputs.case
    arguments = (case.max_len, case.alpha, inputs.q, inputs.k, inputs.v, inputs.k_offsets)
    keywords = {"num_targets": inputs.num_targets, "enable_tma": has_tma}
    function = module.triton_cached_hstu_mha if case.queries else module.triton_hstu_mha
    return lambda: function(*arguments, **keywords)
