"""Gathers everything that the conformance run on a GPU machine needs into one folder; needs no GPU.

The folder holds the programs, the plugin library and the kernels' library for sm_90 with the Hopper kernels (so nvcc is
needed), the cases with the float64 oracle's answers and the run script; where TensorRT 8.5 headers are given, also the
TensorRT 8 library for the large cases. On the GPU machine: `run_gpu.sh RESULTS_DIR`.

Usage: python -m tests.plugins.conformance.prepare_conformance OUT_DIR [--tensorrt8-include-dir DIR] [--archs 90]
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np
from numpy.typing import NDArray

from hstu_compile.plugin_library import (
    PluginBuildRequest,
    build_kernels_library,
    build_plugin_library,
    find_cuda_headers,
    find_tensorrt_headers,
)
from hstu_compile.plugins import generate_contract
from hstu_compile.plugins.kernels.aot import HOPPER_TACTIC
from hstu_compile.plugins.kernels.hopper.variants import (
    HOPPER_ARCH,
    SPLITS,
    HopperVariant,
    hopper_variants_for,
    silu_code,
)
from hstu_compile.plugins.kernels.norm_variants import NormVariant
from hstu_compile.plugins.kernels.variants import KernelVariant, variants_for
from tests import tolerances
from tests.attention_cases import (
    attention_grid,
    bias_cases,
    build_case,
    cached_cases,
    hostile_cases,
    mask_cases,
    with_cache,
    with_dtype,
)
from tests.norm_cases import NormCase, all_norm_cases, norm_bounds, norm_oracle
from tests.oracle import ELEMENT_INPUTS, AttentionCase, oracle_of

HERE = Path(__file__).parent
SHARED_SOURCES = ("caseFile.cpp", "compare.cpp", "device.cpp")
FLOAT_ATTRIBUTES = ("alpha", "scaling_seq_len", "epsilon")


def large_cases() -> Iterator[AttentionCase]:
    """Cases of several tiles a sequence at a real head width, where interior tiles and tile boundaries differ."""
    lengths = [0, 1, 63, 64, 65, 129, 300]
    targets = [0, 1, 7, 64, 1, 100, 33]
    wide: dict[str, Any] = {"num_heads": 1, "dqk": 64, "dv": 64}
    yield build_case(lengths, name="large-causal", seed=500, **wide)
    yield build_case(lengths, name="large-targets", num_targets=targets, target_group_size=5, seed=501, **wide)
    yield build_case(lengths, name="large-context", contextual_seq_len=70, num_targets=targets, seed=502, **wide)
    yield build_case(lengths, name="large-window", max_attn_len=90, min_full_attn_seq_len=20, seed=503, **wide)
    yield build_case(
        lengths,
        name="large-delta",
        query_lengths=[0, 1, 5, 64, 60, 70, 131],
        num_targets=targets,
        max_attn_len=100,
        per_sequence_scale=True,
        seed=504,
        **wide,
    )
    # Keys in two segments: boundaries on a tile, one behind it, at both ends; a score pass and an append.
    caches = [0, 1, 63, 63, 65, 128, 260]
    delta = [0, 0, 0, 1, 0, 1, 40]
    score = build_case(lengths, query_lengths=delta, num_targets=delta, seed=510, **wide)
    yield with_cache(score, caches, tail=70, name="large-cached-score")
    yield with_cache(build_case(lengths, query_lengths=delta, seed=511, **wide), caches, name="large-cached-append")
    # More tiles than any GPU has multiprocessors, so that persistent blocks take several and count what is left.
    many = np.random.default_rng(507).integers(0, 41, 80).tolist()
    yield build_case(many, name="large-many-tiles", num_heads=4, dqk=64, dv=64, seed=507)
    fixture: dict[str, Any] = {
        "num_heads": 1,
        "dqk": 50,
        "dv": 50,
        "num_buckets": 128,
        "bucket_ratio": float(np.exp(0.301)),
    }
    bias = {"pos_bias": "shared", "time_bias": "shared", "next_timestamp": True, "pos_table_len": 300}
    yield build_case(lengths, name="large-research", seed=505, **fixture, **bias)
    yield build_case(lengths, name="large-research-int32", seed=506, timestamp_bits=32, **fixture, **bias)
    append = build_case(lengths, query_lengths=delta, seed=512, timestamp_bits=32, **fixture, **bias)
    yield with_cache(append, caches, tail=9, name="large-cached-research-int32")
    # Biases at head dims of the Hopper kernel, and tables of more heads than it has room for.
    yield build_case(lengths, name="large-bias", seed=508, num_targets=targets, **wide, **bias)
    per_head: dict[str, Any] = {"num_heads": 9, "dqk": 16, "dv": 16, "pos_bias": "per_head", "time_bias": "per_head"}
    yield build_case([70, 3, 65], name="large-time-heads", pos_table_len=70, seed=509, **per_head)


def all_cases() -> list[AttentionCase]:
    """Return the grid: whole in float16; masks, biases, hostile data and two large cases in the other types."""
    large = list(large_cases())
    some = [*mask_cases(), *bias_cases(), *hostile_cases(), *cached_cases(), *large[:2]]
    cases = [with_dtype(case, "float16") for case in [*attention_grid(), *large]]
    cases += [with_dtype(case, dtype) for dtype in ("bfloat16", "float32") for case in some]
    # The other form of SiLU, under the same bounds: a case of several tiles and masks in each half type.
    cases += [
        dataclasses.replace(
            with_dtype(case, dtype),
            name=f"{case.name}-accurate",
            attrs=dataclasses.replace(case.attrs, silu="accurate"),
        )
        for dtype in ("float16", "bfloat16")
        for case in large[1:2]
    ]
    int32 = next(case for case in large if case.name == "large-research-int32")
    return [*cases, with_dtype(int32, "float32")]


def variants_of(cases: Iterable[AttentionCase]) -> tuple[KernelVariant, ...]:
    """Return the kernels that the cases need, each once; with unaligned and causal-only ones for the large cases."""
    found: dict[KernelVariant, None] = {}
    for case in cases:
        bits = 0 if case.row_timestamps is None else 8 * case.row_timestamps.dtype.itemsize
        general = variants_for(
            case.dtype,
            case.q.shape[2],
            case.v.shape[2],
            pos_bias=case.pos_table is not None,
            time_bias=bits > 0,
            timestamp_bits=bits or 64,
            has_cache=case.cache_offsets is not None,
        )
        found.update(dict.fromkeys(general))
        if case.name == "large-causal":
            for variant in general:
                found.update(
                    {dataclasses.replace(variant, aligned=False): None, dataclasses.replace(variant, mask_kind=0): None}
                )
    return tuple(found)


def hopper_variants_of_cases(cases: Iterable[AttentionCase]) -> tuple[HopperVariant, ...]:
    """Return the Hopper kernels that the cases can use, each once; with causal-only ones for the large cases."""
    found: dict[HopperVariant, None] = {}
    for case in cases:
        bits = 0 if case.row_timestamps is None else 8 * case.row_timestamps.dtype.itemsize
        for is_plain in (False, True)[: 2 if case.name == "large-causal" else 1]:
            fitting = hopper_variants_for(
                case.dtype,
                case.q.shape[2],
                case.v.shape[2],
                plain_causal=is_plain,
                pos_bias=case.pos_table is not None,
                time_bias=bits > 0,
                timestamp_bits=bits,
                silu=case.attrs.silu,
                has_cache=case.cache_offsets is not None,
            )
            found.update(dict.fromkeys(fitting))
    return tuple(found)


def attributes_of(case: AttentionCase) -> dict[str, float | int]:
    """Return the node's attributes in the contract's order."""

    def longest(offsets: NDArray[Any]) -> int:
        return int(np.clip(np.diff(offsets.astype(np.int64)), 1, 1 << 20).max(initial=1))

    joined = case.k_offsets.astype(np.int64) + (0 if case.cache_offsets is None else case.cache_offsets)
    return {
        "alpha": case.attrs.alpha,
        "scaling_seq_len": case.attrs.scaling_seq_len,
        "max_query_len": longest(case.q_offsets),
        "max_seq_len": longest(joined),
        "target_group_size": case.attrs.target_group_size,
        "contextual_seq_len": case.attrs.contextual_seq_len,
        "max_attn_len": case.attrs.max_attn_len,
        "min_full_attn_seq_len": case.attrs.min_full_attn_seq_len,
        "silu": silu_code(case.attrs.silu),
        "has_num_targets": int(case.num_targets is not None),
        "has_contextual_seq_lens": int(case.contextual_seq_lens is not None),
        "has_scaling_seq_lens": int(case.scaling_seq_lens is not None),
        "pos_bias": int(case.pos_table is not None),
        "time_bias": int(case.row_timestamps is not None),
        "has_cache": int(case.cache_offsets is not None),
    }


def encoded(values: NDArray[Any], dtype: str) -> bytes:
    """Return values that are exact in `dtype` as its little-endian bytes."""
    if dtype == "bfloat16":
        return (np.ascontiguousarray(values, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return np.ascontiguousarray(values, dtype=dtype).tobytes()


def norm_variants_of(cases: Iterable[NormCase]) -> tuple[NormVariant, ...]:
    """Return the norm kernels that the cases need, each once; those of the large cases for any pointers as well."""
    found: dict[NormVariant, None] = {}
    for case in cases:
        found[case.variant] = None
        if case.name.startswith("large-norm-layer"):
            found[dataclasses.replace(case.variant, aligned=False)] = None
    return tuple(found)


class CaseWriter:
    """Writes facts of cases into one file and their bytes into another."""

    def __init__(self, index: TextIO, data: BinaryIO) -> None:
        self._index, self._data = index, data

    def write(self, case: AttentionCase | NormCase) -> None:
        """Append one case."""
        if isinstance(case, NormCase):
            self._write_norm(case)
        else:
            self._write_attention(case)

    def _write_attention(self, case: AttentionCase) -> None:
        required = {name: getattr(case, name) for name in ("q", "k", "v", "q_offsets", "k_offsets")}
        inputs = {
            name: (case.dtype if name in ELEMENT_INPUTS else str(values.dtype), values)
            for name, values in {**required, **case.optional_inputs()}.items()
            if values is not None
        }
        result = oracle_of(case)
        divisor = result.scale + tolerances.SCORE_WEIGHT[case.dtype] * result.score_scale
        bounds = (
            tolerances.COMPONENTWISE[case.dtype],
            tolerances.RMS[case.dtype],
            tolerances.SUBNORMAL_STEP[case.dtype],
        )
        head = f"{case.name} HstuAttention {case.dtype} {case.dtype}"
        self._append(head, attributes_of(case), inputs, result.out, divisor, bounds)

    def _write_norm(self, case: NormCase) -> None:
        result = norm_oracle(case)
        head = f"{case.name} HstuNorm {case.input_type} {case.output_type}"
        self._append(head, case.attributes(), case.inputs(), result.out, result.divisor, norm_bounds(case, result))

    def _append(
        self,
        head: str,
        attributes: dict[str, float | int],
        inputs: dict[str, tuple[str, NDArray[Any]]],
        out: NDArray[Any],
        divisor: NDArray[Any],
        bounds: tuple[float, float, float],
    ) -> None:
        def dims(values: NDArray[Any]) -> str:
            return " ".join(map(str, [values.ndim, *values.shape]))

        self._index.write(f"case {head}\n")
        for name, value in attributes.items():
            kind = "float" if name in FLOAT_ATTRIBUTES else "int"
            self._index.write(f"attribute {name} {kind} {value!r}\n")
        for name, (dtype, values) in inputs.items():
            self._index.write(f"input {name} {dtype} {dims(values)} {self._placed(encoded(values, dtype))}\n")
        reference = self._placed(encoded(out, "float64"))
        self._index.write(f"output {dims(out)} {reference} {self._placed(encoded(divisor, 'float32'))}\n")
        self._index.write(f"bounds {' '.join(map(repr, bounds))}\n")

    def _placed(self, content: bytes) -> str:
        offset = self._data.tell()
        self._data.write(content)
        return f"{offset} {len(content)}"


def write_cases(cases: Iterable[AttentionCase | NormCase], out: Path) -> None:
    """Write cases.txt and cases.bin."""
    with (out / "cases.txt").open("w") as index, (out / "cases.bin").open("wb") as data:
        writer = CaseWriter(index, data)
        for case in cases:
            writer.write(case)


def build_program(out: Path) -> Path:
    """Compile the conformance program against TensorRT 10 headers; it is linked to neither TensorRT nor CUDA."""
    headers = find_tensorrt_headers()
    if headers.version < (10, 3, 0) or headers.version >= (11, 0, 0):
        raise SystemExit(f"the conformance program is written for TensorRT 10.3 to 10.x headers, found {headers}")
    return _compile("conformance.cpp", headers.include_dir, out / "conformance")


def build_columns_program(out: Path) -> Path:
    """Compile the program that gives the kernels' library q, k and v as columns of wider tensors."""
    api = Path(generate_contract.__file__).parent / "api"
    return _compile("columns.cpp", api, out / "columns")


def build_program_v2(out: Path, include_dir: Path) -> Path:
    """Compile TensorRT 8's part, and the stand-in for libnvinfer.so.8 that lets the loader load the library beside it.

    Returns:
        The program; its folder must be on LD_LIBRARY_PATH, and on nothing else's.
    """
    folder = out / "v2"
    folder.mkdir(exist_ok=True)
    (folder / "standIn.c").write_text("int hstuStandIn;\n")
    stand_in = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libnvinfer.so.8", str(folder / "standIn.c")]
    subprocess.run([*stand_in, "-o", str(folder / "libnvinfer.so.8")], check=True)
    (folder / "standIn.c").unlink()
    # The program itself answers to getPluginRegistry and its like, hence -rdynamic. TensorRT 8 deprecates IPluginV2.
    return _compile(
        "conformanceV2.cpp", include_dir, folder / "conformanceV2", "-rdynamic", "-Wno-deprecated-declarations"
    )


def _compile(main_source: str, include_dir: Path, program: Path, *options: str) -> Path:
    command = [
        "g++",
        "-std=c++17",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-static-libstdc++",
        "-static-libgcc",
        "-pthread",
    ]
    command += ["-isystem", str(include_dir), "-isystem", str(find_cuda_headers()), *options]
    sources = [str(HERE / name) for name in (main_source, *SHARED_SOURCES)]
    subprocess.run([*command, *sources, "-o", str(program), "-ldl"], check=True)
    return program


def fixture_variants() -> tuple[KernelVariant, ...]:
    """Return the kernels of the large cases in TensorRT 8: the retrieval fixture, and wide heads without a bias.

    Those of the fixture for aligned and for any pointers.
    """
    fixture = tuple(
        dataclasses.replace(variant, aligned=aligned)
        for dtype in ("float16", "float32")
        for variant in variants_for(dtype, 50, 50, pos_bias=True, time_bias=True, timestamp_bits=32)
        for aligned in (False, True)
    )
    cached = variants_for("float16", 50, 50, pos_bias=True, time_bias=True, timestamp_bits=32, has_cache=True)
    wide = [variants_for(dtype, 64, 64) for dtype in ("float16", "float32")]
    return (*fixture, *cached, *wide[0], *wide[1], *variants_for("float16", 64, 64, has_cache=True))


def print_progress(stage: str, done: int, total: int) -> None:
    """Show one line that rewrites itself."""
    sys.stderr.write(f"\r{stage} {done}/{total}   ")
    sys.stderr.flush()


def main() -> None:
    """Prepare the folder named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tensorrt8-include-dir", type=Path, help="TensorRT 8.5 headers, for the TensorRT 8 library")
    parser.add_argument("--archs", type=int, nargs="+", default=[90])
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)

    cases, norms = all_cases(), all_norm_cases()
    write_cases([*cases, *norms], out)
    build_program(out)
    has_hopper = HOPPER_ARCH in arguments.archs
    common: dict[str, Any] = {
        "archs": tuple(arguments.archs),
        "with_ptx": False,
        "jobs": arguments.jobs,
        "hopper": "require" if has_hopper else "off",
    }
    # What the program must have run, beside whatever the library offers: the Hopper kernel and all of its splits.
    required = [HOPPER_TACTIC + split for split in (0, *SPLITS)] if has_hopper else []
    (out / "required_tactics").write_text(" ".join(map(str, required)) + "\n")
    request = PluginBuildRequest(
        variants=variants_of(cases),
        norm_variants=norm_variants_of(norms),
        hopper_variants=hopper_variants_of_cases(cases),
        **common,
    )
    library = build_plugin_library(request, print_progress)
    if library.version_compatible is None:
        raise SystemExit("the headers are of TensorRT 8.5, which has no loadable plugin libraries")
    shutil.copy2(library.version_compatible, out)
    build_columns_program(out)
    shutil.copy2(build_kernels_library(request, print_progress).path, out)
    shutil.copy2(HERE / "run_gpu.sh", out)
    if arguments.tensorrt8_include_dir is not None:
        request = PluginBuildRequest(
            variants=fixture_variants(),
            norm_variants=norm_variants_of(case for case in norms if case.name.startswith("large-")),
            tensorrt_include_dir=arguments.tensorrt8_include_dir,
            runtime_version="8.5",
            **common,
        )
        (out / "tensorrt85").mkdir(exist_ok=True)
        shutil.copy2(build_plugin_library(request, print_progress).self_registering, out / "tensorrt85")
        build_program_v2(out, arguments.tensorrt8_include_dir)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 2**20
    kernels = f"{len(library.variants)} attention and {len(library.norm_variants)} norm variants, {library.hopper}"
    print(f"\n{out}: {len(cases)} attention and {len(norms)} norm cases, {kernels}, {size:.1f} MiB")


if __name__ == "__main__":
    main()
