"""Ahead-of-time compiler of the Triton kernels: variants -> cubins and PTX -> one C++ source of the plugin library.

Needs no GPU, no driver and no CUDA toolkit (Triton carries ptxas).  The Hopper kernel, which nvcc compiles, is in
hopper/compile.py; the C++ source holds the images of both.  Level: kernels; imports neither triton nor torch itself.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from hstu_compile.plugins.kernels.hopper.compile import KERNEL_NAME, HopperImage
from hstu_compile.plugins.kernels.hopper.variants import HOPPER_ARCH, SPLITS
from hstu_compile.plugins.kernels.norm_variants import NormTask, NormVariant, norm_tasks
from hstu_compile.plugins.kernels.variants import (
    ARCHS,
    DTYPE_CODES,
    CompileTask,
    KernelVariant,
    compile_tasks,
    default_variants,
    variants_for,
)

__all__ = [
    "ARCHS",
    "KernelImage",
    "KernelVariant",
    "NormImage",
    "compile_norms",
    "compile_variants",
    "default_variants",
    "variants_for",
    "write_cpp_source",
]

#: Tactic id that all Hopper images share: the plugin chooses a split by itself. Above any tile table's ids; with a
#: split added, the id of a fixed one.
HOPPER_TACTIC = 64
#: ``HstuKernelKind``.
_PORTABLE, _HOPPER = 0, 1
_THREADS_PER_WARP = 32
_KINDS = {CompileTask: "attention", NormTask: "norm"}

#: Files whose text decides the machine code of a task (with the task itself, Triton and its ptxas, which one wheel
#: pins).
_SOURCES = {CompileTask: ("hstu_attention.py", "compile_worker.py"), NormTask: ("hstu_norm.py", "compile_worker.py")}


_Task = CompileTask | NormTask


@dataclass(frozen=True)
class _Compiled:
    """What the compiler gives for a task."""

    name: str
    num_warps: int
    shared_bytes: int
    data: bytes


@dataclass(frozen=True)
class KernelImage:
    """One compiled portable attention kernel with what a launch needs to know.

    Attributes:
        variant: its compile-time switches.
        sm: compute capability it was compiled for; with ``is_ptx`` the lowest one it can be compiled for at load time.
        is_ptx: ``data`` is NUL-terminated PTX text, else a cubin.
        tactic: id of its tile configuration, from 1.
        block_m: query rows of one block, which decide the grid.
        num_warps: warps of one block.
        shared_bytes: dynamic shared memory of one block.
        name: of the kernel in the module.
        data: the module.
    """

    variant: KernelVariant
    sm: int
    is_ptx: bool
    tactic: int
    block_m: int
    num_warps: int
    shared_bytes: int
    name: str
    data: bytes


@dataclass(frozen=True)
class NormImage:
    """One compiled norm kernel with what a launch needs to know.

    Attributes:
        variant: its compile-time switches.
        sm: as in `KernelImage`, like is_ptx, num_warps, shared_bytes, name and data.
        segments: groups of rows that one block takes, which decide the grid.
    """

    variant: NormVariant
    sm: int
    is_ptx: bool
    segments: int
    num_warps: int
    shared_bytes: int
    name: str
    data: bytes


def compile_variants(
    variants: Sequence[KernelVariant],
    archs: Sequence[int] = ARCHS,
    cache_dir: Path | None = None,
    jobs: int | None = None,
    *,
    with_ptx: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[KernelImage]:
    """Compile every (variant, architecture, tactic) and the PTX of each variant's first tactic; no GPU is needed.

    Args:
        variants: what to compile; duplicates are compiled once.
        archs: compute capabilities, each of ``ARCHS``.
        cache_dir: compiled kernels are kept here under a hash of source, options and Triton's version; None keeps
            nothing.
        jobs: compiler processes; None takes one per usable core.
        with_ptx: also make the PTX that newer GPUs compile at load time.
        progress: called with (done, total) after each kernel, from compiler threads, one at a time.

    Returns:
        The images, in the order of the tasks (stable between runs).

    Raises:
        ValueError: if an architecture has no kernels or ``variants`` is empty.
        RuntimeError: if a kernel does not compile; names the variant, the architecture and Triton's message.
    """
    tasks = compile_tasks(tuple(variants), tuple(archs), with_ptx=with_ptx)
    if not tasks:
        raise ValueError("no kernel variants to compile; see variants_for and default_variants")
    return [
        KernelImage(
            task.variant,
            task.arch,
            task.is_ptx,
            task.tile.tactic,
            task.tile.block_m,
            found.num_warps,
            found.shared_bytes,
            found.name,
            found.data,
        )
        for task, found in _compiled(tasks, cache_dir, jobs, progress).items()
    ]


def compile_norms(
    variants: Sequence[NormVariant],
    archs: Sequence[int] = ARCHS,
    cache_dir: Path | None = None,
    jobs: int | None = None,
    *,
    with_ptx: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[NormImage]:
    """Compile every (variant, architecture) of the norm kernel and the PTX of each variant; no GPU is needed.

    Arguments, result and errors are those of `compile_variants`, but that there may be no variants.
    """
    tasks = norm_tasks(tuple(variants), tuple(archs), with_ptx=with_ptx)
    return [
        NormImage(
            task.variant,
            task.arch,
            task.is_ptx,
            task.tile.segments,
            found.num_warps,
            found.shared_bytes,
            found.name,
            found.data,
        )
        for task, found in _compiled(tasks, cache_dir, jobs, progress).items()
    ]


_AnyTask = TypeVar("_AnyTask", CompileTask, NormTask)


def _compiled(
    tasks: Sequence[_AnyTask], cache_dir: Path | None, jobs: int | None, progress: Callable[[int, int], None] | None
) -> dict[_AnyTask, _Compiled]:
    """Compile what the cache does not hold; in the order of the tasks."""
    with tempfile.TemporaryDirectory(prefix="hstu-kernels-") as scratch:
        store = Path(scratch) if cache_dir is None else Path(cache_dir)
        store.mkdir(parents=True, exist_ok=True)
        keys: dict[_Task, str] = {task: _key(task) for task in tasks}
        found = {task: _load(store, keys[task]) for task in tasks}
        missing = [task for task, image in found.items() if image is None]
        done = len(tasks) - len(missing)
        if progress is not None:
            progress(done, len(tasks))
        lock = threading.Lock()

        def finished() -> None:
            nonlocal done
            with lock:
                done += 1
                if progress is not None:
                    progress(done, len(tasks))

        _compile(
            {task: keys[task] for task in missing}, store, Path(scratch), jobs or len(os.sched_getaffinity(0)), finished
        )
        for task in missing:
            found[task] = _load(store, keys[task])
        lost = [_describe(task) for task, image in found.items() if image is None]
        if lost:
            raise RuntimeError(f"compiled kernels vanished from {store}: {'; '.join(lost)}")
    return {task: image for task, image in found.items() if image is not None}


def _compile(keys: dict[_Task, str], store: Path, scratch: Path, jobs: int, finished: Callable[[], None]) -> None:
    """Compile the tasks of ``keys`` into ``store`` with ``jobs`` workers on one queue; the first failure stops all."""
    pending: queue.SimpleQueue[_Task] = queue.SimpleQueue()
    # Slowest first (wide float32 tiles, many rows), so that no worker ends on a long one.
    for task in sorted(keys, key=lambda t: -_cost(t)):
        pending.put(task)
    errors: list[str] = []

    def work(number: int) -> None:
        log = scratch / f"worker{number}.log"
        # Line information would put this machine's paths into the library.
        env = {
            **os.environ,
            "TRITON_INTERPRET": "0",
            "TRITON_DISABLE_LINE_INFO": "1",
            "TRITON_CACHE_DIR": str(scratch / "triton"),
        }
        command = [sys.executable, "-m", "hstu_compile.plugins.kernels.compile_worker"]
        with (
            log.open("w") as stderr,
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, env=env, text=True
            ) as worker,
        ):
            assert worker.stdin is not None
            assert worker.stdout is not None
            while not errors:
                try:
                    task = pending.get_nowait()
                except queue.Empty:
                    break
                data_path = scratch / f"worker{number}.bin"
                request = {**asdict(task), "kind": type(task).__name__, "data_path": str(data_path)}
                try:
                    worker.stdin.write(json.dumps(request) + "\n")
                    worker.stdin.flush()
                    line = worker.stdout.readline()
                except OSError:
                    line = ""
                ended = {"error": f"the compiler process ended; its log: {log.read_text()[-2000:]}"}
                reply: dict[str, Any] = json.loads(line) if line else ended
                if "error" in reply:
                    errors.append(f"{_describe(task)}: {reply['error']}")
                    break
                if _key(task) != keys[task]:
                    # What was compiled may be either text: storing it under one of them would poison the cache.
                    errors.append(f"{_describe(task)}: the kernel's sources changed while it was compiled; build again")
                    break
                _save(store, task, keys[task], data_path.read_bytes(), reply["metadata"])
                finished()
            worker.stdin.close()

    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(min(jobs, len(keys)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise RuntimeError(f"{_KINDS[type(next(iter(keys)))]} kernel did not compile for " + "; ".join(errors))


def _describe(task: _Task) -> str:
    target = f"PTX {task.arch}" if task.is_ptx else f"sm_{task.arch}"
    if isinstance(task, NormTask):
        return f"{target}, {task.variant}"
    variant = task.variant
    dims = f"padded head dims {variant.block_dqk} and {variant.block_dv}"
    return f"{target}, {variant.dtype}, {dims}, tactic {task.tile.tactic}"


def _cost(task: _Task) -> int:
    if isinstance(task, NormTask):
        return task.variant.block
    tile, variant = task.tile, task.variant
    rate = 8 if variant.dtype == "float32" else 1
    return (
        rate
        * tile.block_m
        * tile.block_n
        * (variant.block_dqk + variant.block_dv + 128 * variant.time_bias)
        // tile.num_warps
    )


def _key(task: _Task) -> str:
    """Return the content hash of what a task compiles to."""
    content = hashlib.sha256()
    for name in _SOURCES[type(task)]:
        content.update((Path(__file__).parent / name).read_bytes())
    content.update(importlib.metadata.version("triton").encode())
    description = asdict(task)
    if isinstance(task, CompileTask):
        # A tile's reason is prose: changing it must not recompile.
        description["tile"]["reason"] = ""
    content.update(json.dumps(description, sort_keys=True).encode())
    return content.hexdigest()


def _load(store: Path, key: str) -> _Compiled | None:
    """Return what is stored under a key; None when there is nothing or its files do not agree."""
    try:
        metadata: dict[str, Any] = json.loads((store / f"{key}.json").read_text())
        data = (store / f"{key}.bin").read_bytes()
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    if metadata.get("sha256") != hashlib.sha256(data).hexdigest():
        return None
    return _Compiled(metadata["name"], metadata["num_warps"], metadata["shared_bytes"], data)


def _save(store: Path, task: _Task, key: str, data: bytes, metadata: dict[str, Any]) -> None:
    """Write both files of an image so that a reader sees all of each or nothing, also with other builds at work."""
    described = {**metadata, "sha256": hashlib.sha256(data).hexdigest(), "task": asdict(task)}
    for suffix, content in ((".bin", data), (".json", json.dumps(described, indent=1).encode())):
        handle, temporary = tempfile.mkstemp(dir=store, prefix=".", suffix=suffix)
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        os.replace(temporary, store / f"{key}{suffix}")


def write_cpp_source(
    images: Sequence[KernelImage],
    path: Path,
    hopper_images: Sequence[HopperImage] = (),
    norm_images: Sequence[NormImage] = (),
) -> tuple[Path, Path]:
    """Write the table of all images as C++ and their bytes beside it; return both paths (source, data).

    The source takes the bytes in through the assembler (.incbin), so that g++ needs no time for them.  It names the
    data file by its
    absolute path: compile it where it was written.

    Args:
        images: at least one.
        path: of the C++ file, which includes ``hstuKernelImages.h`` and ``hstuNormImages.h``; the data file is
            ``path`` with the suffix ``.bin``.
        hopper_images: behind them in the table.
        norm_images: in a table of their own.

    Raises:
        ValueError: if ``images`` is empty, or the path has a character the assembler cannot quote.
    """
    if not images:
        raise ValueError("no kernel images: a plugin library without kernels cannot run anything")
    source, blob = Path(path).resolve(), Path(path).resolve().with_suffix(".bin")
    if any(c in str(blob) for c in '"\\\n'):
        raise ValueError(
            f"kernel image path {str(blob)!r} has a quote, backslash or line break, which the assembler cannot quote"
        )
    content = bytearray()

    def row(numbers: tuple[int, ...], name: str, data: bytes, *more: int) -> str:
        nonlocal content
        # 64-byte alignment: the driver reads a cubin as an ELF file in place.
        content += b"\0" * (-len(content) % 64)
        fields = ", ".join(map(str, numbers))
        tail = "".join(f", {number}" for number in more)
        line = f'    {{{fields}, "{name}", hstuKernelImageData + {len(content)}, {len(data)}{tail}}},'
        content += data
        return line

    rows = [row(_portable_fields(image), image.name, image.data, 0, int(image.variant.has_cache)) for image in images]
    rows += [
        row(
            _hopper_fields(image),
            KERNEL_NAME,
            image.data,
            int(image.variant.is_accurate),
            int(image.variant.has_cache),
        )
        for image in hopper_images
    ]
    norm_rows = [row(_norm_fields(image), image.name, image.data) for image in norm_images]
    blob.write_bytes(bytes(content))
    source.write_text(
        "\n".join(
            [
                "// Generated by hstu_compile.plugins.kernels.aot: the compiled kernels. Do not edit.",
                '#include "hstuKernelImages.h"',
                '#include "hstuNormImages.h"',
                "",
                "// clang-format off",
                '__asm__(".pushsection .rodata\\n"',
                '        ".balign 64\\n"',
                '        ".globl hstuKernelImageData\\n"',
                '        ".hidden hstuKernelImageData\\n"',
                '        "hstuKernelImageData:\\n"',
                f'        ".incbin \\"{blob}\\"\\n"',
                '        ".popsection\\n");',
                'extern "C" __attribute__((visibility("hidden"))) unsigned char const hstuKernelImageData[];',
                "",
                "// Fields in the order of the structs.",
                "HstuKernelImage const kHstuKernelImages[] = {",
                *rows,
                "};",
                f"size_t const kHstuNbKernelImages = {len(rows)};",
                "",
                *(["static HstuNormImage const normImages[] = {", *norm_rows, "};"] if norm_rows else []),
                f"HstuNormImage const* const kHstuNormImages = {'normImages' if norm_rows else 'nullptr'};",
                f"size_t const kHstuNbNormImages = {len(norm_rows)};",
                "// clang-format on",
                "",
            ]
        )
    )
    return source, blob


def _portable_fields(image: KernelImage) -> tuple[int, ...]:
    """Return the numbers of ``HstuKernelImage`` in the order of the struct."""
    variant = image.variant
    return (
        image.sm,
        int(image.is_ptx),
        _PORTABLE,
        DTYPE_CODES[variant.dtype],
        variant.timestamp_bits,
        variant.block_dqk,
        variant.block_dv,
        int(variant.aligned),
        int(variant.pos_bias),
        int(variant.time_bias),
        variant.mask_kind,
        image.tactic,
        image.block_m,
        0,  # blockN
        _THREADS_PER_WARP * image.num_warps,
        1,  # split
        image.shared_bytes,
        0,  # leastDriver
    )


def _hopper_fields(image: HopperImage) -> tuple[int, ...]:
    variant = image.variant
    return (
        HOPPER_ARCH,
        0,  # isPtx
        _HOPPER,
        DTYPE_CODES[variant.dtype],
        variant.timestamp_bits,
        variant.block_dim,
        variant.block_dim,
        1,  # aligned
        int(variant.pos_bias),
        int(variant.timestamp_bits > 0),
        int(not variant.plain_causal),
        HOPPER_TACTIC,
        image.block_m,
        image.tile.block_n,
        image.threads,
        SPLITS[-1] if variant.shares else SPLITS[0],
        image.shared_bytes,
        image.least_driver,
    )


def _norm_fields(image: NormImage) -> tuple[int, ...]:
    """Return the numbers of ``HstuNormImage`` in the order of the struct."""
    variant = image.variant
    return (
        image.sm,
        int(image.is_ptx),
        DTYPE_CODES[variant.input_type],
        DTYPE_CODES[variant.output_type],
        variant.block,
        int(variant.aligned),
        variant.activation,
        int(variant.gate_silu),
        variant.concat,
        image.segments,
        _THREADS_PER_WARP * image.num_warps,
        image.shared_bytes,
    )
