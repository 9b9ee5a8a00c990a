"""Worker process of the ahead-of-time compiler: compiles one kernel per line of standard input, without a GPU.

A process of its own, because TRITON_INTERPRET decides at import what ``@triton.jit`` makes, and because Triton prints
its failures.
Input: one JSON object per line, a :class:`CompileTask` or :class:`NormTask`, which of the two, and the path to write.
Output: one JSON line each, ``{}`` or ``{"error"}``.
Level: kernels; imports triton, not torch.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

# Triton ships no type information.
# mypy: disable-error-code="import-untyped"
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hstu_compile.plugins.kernels.hstu_attention import hstu_attention
from hstu_compile.plugins.kernels.hstu_norm import hstu_norm
from hstu_compile.plugins.kernels.norm_variants import NormTask, NormTile, NormVariant
from hstu_compile.plugins.kernels.tiles import TileConfig
from hstu_compile.plugins.kernels.variants import CompileTask, KernelVariant

_ELEMENT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
#: PTX 7.8 is what drivers since CUDA 11.8 read; Triton's default is the newest, which needs the newest driver.
_PTX_VERSION = 78


def signature_of(variant: KernelVariant) -> dict[str, str]:
    """Return the Triton type of every parameter of the kernel, in order; the C++ launcher passes exactly these."""
    data, times = f"*{_ELEMENT[variant.dtype]}", f"*i{variant.timestamp_bits or 64}"
    types = {
        **dict.fromkeys(("q", "k", "v", "k_cached", "v_cached", "out"), data),
        **dict.fromkeys(("q_offsets", "k_offsets", "cache_offsets", "num_targets", "contextual_seq_lens"), "*i32"),
        **dict.fromkeys(("scaling_seq_lens", "pos_table", "ts_table"), "*fp32"),
        **dict.fromkeys(("row_timestamps", "col_timestamps", "ts_thresholds"), times),
        **dict.fromkeys(("alpha", "scaling_seq_len"), "fp32"),
    }
    constants = ("BLOCK_M", "BLOCK_N", "BLOCK_DQK", "BLOCK_DV", "POS_BIAS", "TIME_BIAS", "MASK_KIND", "HAS_CACHE")
    return {name: "constexpr" if name in constants else types.get(name, "i32") for name in hstu_attention.arg_names}


def norm_signature_of(variant: NormVariant) -> dict[str, str]:
    """Return the Triton type of every parameter of the norm kernel, in order; the C++ launcher passes exactly these."""
    types = {
        **dict.fromkeys(("x", "gate"), f"*{_ELEMENT[variant.input_type]}"),
        **dict.fromkeys(("shift", "scale", "bias"), "*fp32"),
        "out": f"*{_ELEMENT[variant.output_type]}",
        "epsilon": "fp32",
    }
    constants = ("SEGMENTS", "BLOCK", "ACTIVATION", "GATE_SILU", "CONCAT")
    return {name: "constexpr" if name in constants else types.get(name, "i32") for name in hstu_norm.arg_names}


def compile_kernel(task: CompileTask | NormTask) -> tuple[bytes, dict[str, Any]]:
    """Compile one kernel; return its cubin or NUL-terminated PTX and its launch metadata.

    Raises:
        RuntimeError: if Triton asks for scratch memory, which the plugin's launch does not provide.
    """
    kernel = triton.compile(
        _norm_source(task) if isinstance(task, NormTask) else _attention_source(task),
        target=GPUTarget("cuda", task.arch, 32),
        options=_options(task),
    )
    metadata = kernel.metadata
    scratch = (metadata.global_scratch_size, metadata.profile_scratch_size)
    if scratch != (0, 0):
        raise RuntimeError(f"the kernel wants {scratch} bytes of global and profile scratch; the plugin passes none")
    data = kernel.asm["ptx"].encode() + b"\0" if task.is_ptx else kernel.asm["cubin"]
    return data, {"name": metadata.name, "shared_bytes": metadata.shared, "num_warps": metadata.num_warps}


def _options(task: CompileTask | NormTask) -> dict[str, int]:
    options = {"num_warps": task.tile.num_warps}
    if isinstance(task, CompileTask):
        options["num_stages"] = task.tile.num_stages
    if task.is_ptx:
        options["ptx_version"] = _PTX_VERSION
    return options


def _attention_source(task: CompileTask) -> ASTSource:
    variant, tile = task.variant, task.tile
    signature = signature_of(variant)
    constants = {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_DQK": variant.block_dqk,
        "BLOCK_DV": variant.block_dv,
        "POS_BIAS": int(variant.pos_bias),
        "TIME_BIAS": int(variant.time_bias),
        "MASK_KIND": variant.mask_kind,
        "HAS_CACHE": int(variant.has_cache),
    }
    vectors = ("Dqk", "Dv", "q_stride", "k_stride", "v_stride")
    aligned = [n for n, kind in signature.items() if kind.startswith("*") or n in vectors] if variant.aligned else []
    hints = {(hstu_attention.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    return ASTSource(fn=hstu_attention, signature=signature, constexprs=constants, attrs=hints)


def _norm_source(task: NormTask) -> ASTSource:
    variant = task.variant
    signature = norm_signature_of(variant)
    constants = {
        "SEGMENTS": task.tile.segments,
        "BLOCK": variant.block,
        "ACTIVATION": variant.activation,
        "GATE_SILU": int(variant.gate_silu),
        "CONCAT": variant.concat,
    }
    vectors = ("P", "x_stride", "gate_stride")
    aligned = [n for n, kind in signature.items() if kind.startswith("*") or n in vectors] if variant.aligned else []
    hints = {(hstu_norm.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    return ASTSource(fn=hstu_norm, signature=signature, constexprs=constants, attrs=hints)


def _task_of(request: dict[str, Any]) -> CompileTask | NormTask:
    arch, is_ptx = request["arch"], request["is_ptx"]
    if request["kind"] == NormTask.__name__:
        return NormTask(NormVariant(**request["variant"]), NormTile(**request["tile"]), arch, is_ptx)
    return CompileTask(KernelVariant(**request["variant"]), TileConfig(**request["tile"]), arch, is_ptx)


def _serve() -> None:
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # Triton prints to standard output when ptxas fails; the replies must stay readable.
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        task = _task_of(request)
        reply: dict[str, Any] = {}
        try:
            data, metadata = compile_kernel(task)
            Path(request["data_path"]).write_bytes(data)
            reply["metadata"] = metadata
        except Exception as error:
            # Whatever it was, the parent reports it with the kernel's name.
            reply["error"] = f"{type(error).__name__}: {error}"
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    _serve()
