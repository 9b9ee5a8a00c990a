"""The parts of prepare_job.py for the end-to-end benchmark: bundles of whole models, packed. Needs no GPU.

Bundles are built without engines, which are built where they run, and without verification: what they answer is
compared on the GPU. Their graphs are packed, those of a type together, as they have weights in common, with the tables
that lie beside them.
"""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import onnx

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests" / "bench")]

from end_to_end_retrieval_reference import save_retrieval_checkpoint  # noqa: E402
from end_to_end_retrieval_workload import RETRIEVAL  # noqa: E402
from end_to_end_workload import FULL, GROWN_LAYERS  # noqa: E402
from m_falcon_prepare import save_checkpoint  # noqa: E402

from hstu_compile.graph_plugin import kernels_request_of  # noqa: E402
from hstu_compile.plugin_library import build_kernels_library  # noqa: E402

#: Parts: the ranking model, and the same with other numbers of layers; RETRIEVAL is one as well.
END_TO_END, GROWTH = "end_to_end", "end_to_end-growth"
PRECISIONS = ("fp16", "bf16")
#: Options of the bundles without "-unpruned" and with it.
OPTIONS = {"": ("--m-falcon", "micro-batch=256"), "-unpruned": ("--no-prune",)}
RETRIEVAL_OPTIONS = {"": ("--prune",), "-unpruned": ("--no-prune",)}
#: What engines are built from.
GRAPHS = ("model.onnx", "score.onnx")


def build_bundle(folder: Path, checkpoint: Path, precision: str, max_batch: int, options: Sequence[str]) -> Path:
    """A bundle of a folder with a checkpoint and its configuration; returns its folder."""
    program = Path(sys.executable).with_name("hstu-compile")
    command = [program, "build", checkpoint / "ckpt.pt", "--config", checkpoint / "config.json", f"--{precision}"]
    command += ["--max-batch", max_batch, "--no-verify", *options, "--backend", "onnx", "-o", folder, "--force"]
    subprocess.run([str(word) for word in command], check=True, stdin=subprocess.DEVNULL)
    return folder


def save_end_to_end(place: Path, archs: Sequence[int], jobs: int) -> None:
    """The ranking model's bundles, packed, and the kernels that all of them are cut at.

    Args:
        place: folder of the bundles, the archives and the library.
        archs: compute capabilities.
        jobs: compiler processes.
    """
    save_checkpoint(place / "checkpoint", FULL.ranking)
    for precision in PRECISIONS:
        name = f"{END_TO_END}-{precision}"
        folders = [
            build_bundle(place / f"{name}{suffix}", place / "checkpoint", precision, 32, options)
            for suffix, options in OPTIONS.items()
        ]
        save_packed(place / f"{name}.tar.xz", graphs_in(folders))
    save_kernels(place, [path for name in GRAPHS for path in sorted(place.glob(f"{END_TO_END}-*/{name}"))], archs, jobs)


def save_growth(place: Path, precisions: Sequence[str]) -> None:
    """The ranking model with other numbers of layers, packed; their kernels are those of `save_end_to_end`."""
    for precision in precisions:
        folders = []
        for layers in GROWN_LAYERS:
            checkpoint = place / f"checkpoint-layers{layers}"
            save_checkpoint(checkpoint, dataclasses.replace(FULL.ranking, num_layers=layers))
            folder = place / f"{END_TO_END}-{precision}-layers{layers}"
            folders.append(build_bundle(folder, checkpoint, precision, 32, ()))
        save_packed(place / f"{GROWTH}-{precision}.tar.xz", graphs_in(folders))


def save_retrieval(place: Path, precisions: Sequence[str], archs: Sequence[int], jobs: int) -> None:
    """The retrieval model's bundles, packed with the kernels that they are cut at.

    Args:
        place: folder of the bundles and the archives.
        precisions: an archive of each.
        archs: compute capabilities.
        jobs: compiler processes.
    """
    save_retrieval_checkpoint(place / "checkpoint", FULL.retrieval)
    for precision in precisions:
        name = f"{RETRIEVAL}-{precision}"
        folders = [
            build_bundle(place / f"{name}{suffix}", place / "checkpoint", precision, 128, options)
            for suffix, options in RETRIEVAL_OPTIONS.items()
        ]
        graphs = graphs_in(folders)
        libraries = [save_kernels(folder, graphs, archs, jobs) for folder in folders]
        save_packed(place / f"{name}.tar.xz", [*graphs, *libraries, *tables_in(folders)])


def graphs_in(folders: Iterable[Path]) -> list[Path]:
    """The graphs of some bundles."""
    return [folder / name for folder in folders for name in GRAPHS if (folder / name).exists()]


def tables_in(folders: Iterable[Path]) -> list[Path]:
    """The files of large tables that the graphs of some bundles name."""
    return [path for folder in folders for path in sorted(folder.glob("*.bin"))]


def save_kernels(place: Path, graphs: Sequence[Path], archs: Sequence[int], jobs: int) -> Path:
    """The library of the kernels that run between the segments of some graphs; returns its file."""
    requests = [kernels_request_of([onnx.load(path)]) for path in graphs]
    request = dataclasses.replace(
        requests[0],
        variants=tuple(dict.fromkeys(each for request in requests for each in request.variants)),
        norm_variants=tuple(dict.fromkeys(each for request in requests for each in request.norm_variants or ())),
        hopper_variants=tuple(dict.fromkeys(each for request in requests for each in request.hopper_variants or ())),
        archs=tuple(archs),
        with_ptx=False,
        jobs=jobs,
    )
    library = build_kernels_library(request)
    print(f"{library.path.name}: {library.hopper}")
    return Path(shutil.copy2(library.path, place))


def save_packed(path: Path, files: Iterable[Path]) -> None:
    """Pack files of folders beside the archive so that weights that several have in common are there once."""
    names = [str(file.relative_to(path.parent)) for file in files]
    partial = path.with_suffix(".partial")
    # tar and xz themselves: a Python may have been built without lzma. The window has to span graphs of 80 MB; what a
    # slower preset gains on random weights is a tenth, for twenty times the time.
    packer = "xz -T1 --lzma2=preset=1,dict=256MiB"
    subprocess.run(
        ["tar", f"--use-compress-program={packer}", "-cf", str(partial), "-C", str(path.parent), *names], check=True
    )
    partial.replace(path)
    print(f"{path.name}: {path.stat().st_size / 2**20:.1f} MiB")
