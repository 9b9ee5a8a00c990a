"""Ahead-of-time compiler of the Hopper attention kernel: variants -> cubins, with nvcc and without a GPU.

Level: kernels; imports neither torch nor triton.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from hstu_compile.plugins.kernels.hopper.variants import (
    ELEMENT_TYPES,
    HopperTile,
    HopperVariant,
    shared_bytes,
    tile_of,
)

KERNEL_NAME = "hstu_attention_sm90"
#: Names a compiler that is not on PATH.
NVCC_VARIABLE = "HSTU_NVCC"
#: First release whose assembler knows everything that the source uses.
LEAST_NVCC = (12, 3)
_SOURCE = "hstu_attention_sm90.cu"
_ALIGNED_THREADS = 128


@dataclass(frozen=True)
class HopperImage:
    """One compiled kernel with what a launch needs to know.

    Attributes:
        variant: its compile-time switches.
        tile: how it divides its work.
        data: the cubin, for sm_90a.
        usage: what the assembler said of registers, stack and spills.
        release: of the compiler, such as (13, 0).
    """

    variant: HopperVariant
    tile: HopperTile
    data: bytes
    usage: str
    release: tuple[int, int]

    @property
    def block_m(self) -> int:
        """Query rows of one block."""
        return 64 * self.tile.warpgroups

    @property
    def threads(self) -> int:
        """Threads of one block: a producer warpgroup and those that multiply."""
        return _ALIGNED_THREADS * (1 + self.tile.warpgroups)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of one block."""
        return shared_bytes(self.variant)

    @property
    def least_driver(self) -> int:
        """CUDA version that a driver must have: machine code runs on every driver of its compiler's major version."""
        return 1000 * self.release[0]


@functools.cache
def find_nvcc() -> Path | None:
    """Return the CUDA compiler: $HSTU_NVCC, the one on PATH, one of the usual folders, or that of the pip packages."""
    named = os.environ.get(NVCC_VARIABLE)
    if named:
        return Path(named)
    found = shutil.which("nvcc")
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    places = [Path("/usr/local/cuda/bin/nvcc"), *sorted(packages.glob("*/bin/nvcc"), reverse=True)]
    return Path(found) if found else next((place for place in places if place.is_file()), None)


def nvcc_version(nvcc: Path) -> tuple[int, int]:
    """Return the compiler's release, such as (13, 0).

    Raises:
        RuntimeError: it does not start, or does not say.
    """
    try:
        text = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True).stdout
        major, minor = text.rsplit("release ", 1)[1].split(",", 1)[0].split(".")[:2]
        return int(major), int(minor)
    except (OSError, subprocess.CalledProcessError, IndexError, ValueError) as error:
        raise RuntimeError(
            f"{nvcc} does not say which release it is: {error}. Fix: set {NVCC_VARIABLE} to an nvcc that runs here"
        ) from error


def usable_nvcc(nvcc: Path | None = None) -> tuple[Path, tuple[int, int]]:
    """Return the compiler and its release, such as (13, 0).

    Args:
        nvcc: the compiler; None looks for one.

    Raises:
        RuntimeError: there is none, it does not start, or it is too old; with what to do.
    """
    compiler = nvcc or find_nvcc()
    if compiler is None:
        raise RuntimeError(
            "the Hopper attention kernel needs nvcc, and none was found on PATH or in the usual places. "
            f"Fix: install a CUDA toolkit, `pip install 'hstu-compile[hopper]'`, or set {NVCC_VARIABLE}"
        )
    release = nvcc_version(compiler)
    if release < LEAST_NVCC:
        raise RuntimeError(
            f"{compiler} is release {release[0]}.{release[1]}; the Hopper attention kernel needs "
            f"{LEAST_NVCC[0]}.{LEAST_NVCC[1]} or later. Fix: set {NVCC_VARIABLE} to a newer nvcc"
        )
    return compiler, release


def compile_hopper(
    variants: Sequence[HopperVariant],
    cache_dir: Path | None = None,
    *,
    nvcc: Path | None = None,
    jobs: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[HopperImage]:
    """Compile every variant for sm_90a, each once, in the order given.

    Args:
        variants: what to compile.
        cache_dir: compiled kernels are kept here under a hash of sources, switches and the compiler's release.
        nvcc: the compiler; None looks for one.
        jobs: compilers at a time; None takes one per usable core.
        progress: called with (done, total) after each kernel, from this thread.

    Raises:
        RuntimeError: there is no compiler, it is too old, or a kernel does not compile (with the compiler's words).
    """
    compiler, release = usable_nvcc(nvcc)
    unique = list(dict.fromkeys(variants))
    images = []
    with ThreadPoolExecutor(jobs or len(os.sched_getaffinity(0))) as pool:
        for image in pool.map(lambda variant: _compiled(variant, compiler, release, cache_dir), unique):
            images.append(image)
            if progress is not None:
                progress(len(images), len(unique))
    return images


def _compiled(variant: HopperVariant, nvcc: Path, release: tuple[int, int], cache_dir: Path | None) -> HopperImage:
    key = _key(variant, release)
    if cache_dir is not None:
        cached = _load(cache_dir, key)
        if cached is not None:
            return HopperImage(variant, tile_of(variant), *cached, release)
    with tempfile.TemporaryDirectory(prefix="hstu-hopper-") as scratch:
        output = Path(scratch) / "kernel.cubin"
        command = [str(nvcc), *_switches(variant), str(Path(__file__).parent / _SOURCE), "-o", str(output)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{variant} did not compile with {nvcc}: {(done.stdout + done.stderr)[-4000:]}")
        data, usage = output.read_bytes(), done.stderr
    if _key(variant, release) != key:
        # What was compiled may be either text: storing it under one of them would poison the cache.
        raise RuntimeError(f"{variant}: the kernel's sources changed while it was compiled; build again")
    if cache_dir is not None:
        _save(cache_dir, key, data, usage)
    return HopperImage(variant, tile_of(variant), data, usage, release)


def _switches(variant: HopperVariant) -> list[str]:
    tile = tile_of(variant)
    macros = {
        "TYPE": ELEMENT_TYPES[variant.dtype],
        "DIM": variant.block_dim,
        "WARPGROUPS": tile.warpgroups,
        "BLOCK_N": tile.block_n,
        "STAGES": tile.stages,
        "PLAIN_CAUSAL": int(variant.plain_causal),
        "TURNS": int(tile.turns),
        "HELD_STEPS": tile.held_steps,
        "SHARES": int(variant.shares),
        "POS_BIAS": int(variant.pos_bias),
        "TIMESTAMP_BITS": variant.timestamp_bits,
        "ACCURATE": int(variant.is_accurate),
        "CACHE": int(variant.has_cache),
        "SHARED_BYTES": shared_bytes(variant),
    }
    target = ["-gencode=arch=compute_90a,code=sm_90a", "-cubin", "-O3", "-std=c++17", "-Xptxas=-v"]
    return [*target, *(f"-DHSTU_{name}={value}" for name, value in macros.items())]


def _key(variant: HopperVariant, release: tuple[int, int]) -> str:
    content = hashlib.sha256(json.dumps([_switches(variant), release]).encode())
    for path in sorted(Path(__file__).parent.glob("*.cu*")):
        content.update(path.read_bytes())
    return content.hexdigest()


def _load(cache_dir: Path, key: str) -> tuple[bytes, str] | None:
    try:
        facts = json.loads((cache_dir / f"{key}.json").read_text())
        data = (cache_dir / f"{key}.cubin").read_bytes()
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return (data, facts["usage"]) if facts.get("sha256") == hashlib.sha256(data).hexdigest() else None


def _save(cache_dir: Path, key: str, data: bytes, usage: str) -> None:
    """Write both files so that a reader sees all of each or nothing."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    facts = {"sha256": hashlib.sha256(data).hexdigest(), "usage": usage}
    for suffix, content in ((".cubin", data), (".json", json.dumps(facts).encode())):
        handle, temporary = tempfile.mkstemp(dir=cache_dir, prefix=".", suffix=suffix)
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        os.replace(temporary, cache_dir / f"{key}{suffix}")


def resource_report(images: Sequence[HopperImage]) -> list[dict[str, object]]:
    """Return what each kernel takes: registers at launch, stack and spilled bytes, shared memory, threads.

    Raises:
        RuntimeError: the assembler's words lack one of the numbers.
    """
    patterns = {
        "registers": r"Used (\d+) registers",
        "stack_bytes": r"(\d+) bytes stack frame",
        "spill_store_bytes": r"(\d+) bytes spill stores",
        "spill_load_bytes": r"(\d+) bytes spill loads",
    }
    rows: list[dict[str, object]] = []
    for image in images:
        found = {name: re.search(pattern, image.usage) for name, pattern in patterns.items()}
        lost = sorted(name for name, match in found.items() if match is None)
        if lost:
            raise RuntimeError(f"the assembler said nothing of {', '.join(lost)} for {image.variant}: {image.usage!r}")
        rows.append(
            {
                **asdict(image.variant),
                **{name: int(match[1]) for name, match in found.items() if match is not None},
                "shared_bytes": image.shared_bytes,
                "threads": image.threads,
                # The assembler's remark when products wait for each other because of how registers are used.
                "is_serialized": "serialized" in image.usage,
            }
        )
    return rows
