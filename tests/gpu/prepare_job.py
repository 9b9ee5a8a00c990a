"""Makes the folder that the GPU steps need (job.sh): bundles, references, requests, plugin libraries. Needs no GPU.

Usage: python tests/gpu/prepare_job.py OUT --tensorrt8-include-dir DIR [--fixture DIR] [--archs 90] [--jobs N]

The bundles of two benchmarks are large: that of M-FALCON lies in OUT-m_falcon, those of the quantised products in
OUT-calibration, and beside them archives, each small enough to be carried alone; job.sh unpacks those that lie there.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
BENCH = REPOSITORY / "tests" / "bench"
GPU_TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(REPOSITORY), str(BENCH), str(GPU_TESTS), str(REPOSITORY / "samples" / "01_movielens_demo")]

import bench_calibration  # noqa: E402
import prepare_end_to_end  # noqa: E402
import prepare_fused  # noqa: E402
import prepare_quantised  # noqa: E402
from archives import save_archive  # noqa: E402

from hstu_compile.checkpoint import config_from_file, model_from_spec, spec_from_checkpoint  # noqa: E402
from hstu_compile.export import TORCH_DTYPES  # noqa: E402
from hstu_compile.graph_plugin import plugin_request_of  # noqa: E402
from hstu_compile.model.config import RetrievalConfig  # noqa: E402
from hstu_compile.op_schema import is_attention  # noqa: E402
from hstu_compile.plugin_library import (  # noqa: E402
    PluginBuildRequest,
    build_plugin_library,
    find_cuda_headers,
)
from hstu_compile.plugins.kernels.variants import KernelVariant, variants_for  # noqa: E402
from hstu_compile.serving.local_server import find_installation  # noqa: E402
from tests.exported_models import small_model  # noqa: E402

import prepare_data  # noqa: E402

TENSORRT8 = "8.5.3"
RESEARCH_PRECISIONS = ("fp32", "fp16", "bf16")
DEEP_PRECISIONS = ("fp32", "fp16")
DEEP_LAYERS = 8
#: Precisions of each model.
MODELS = {"research": RESEARCH_PRECISIONS, "deep": DEEP_PRECISIONS, "cycled": DEEP_PRECISIONS}
DLRM_PRECISIONS = ("fp32", "fp16")
DLRM_OPTIONS = ("--m-falcon", "micro-batch=16", "--max-batch", "8")
M_FALCON = "m_falcon-fp16"
#: Part, folder and archives of bench_calibration.py.
CALIBRATION = "calibration"
M_FALCON_OPTIONS = prepare_fused.M_FALCON_OPTIONS
#: Parts of prepare_fused.py.
FUSED, FUSED_M_FALCON = "fused", "fused-m_falcon"
#: Parts of prepare_end_to_end.py.
END_TO_END, GROWTH, RETRIEVAL = prepare_end_to_end.END_TO_END, prepare_end_to_end.GROWTH, prepare_end_to_end.RETRIEVAL
RANKING_GRAPHS = ("model.onnx", "prefill.onnx", "score.onnx")
#: Files of a bundle that no check reads.
UNREAD = ("report.html", "report.json", "*onnxruntime_outputs.json")
#: The builder of TensorRT 8.5 crashes on a retrieval graph whose last layer is pruned.
UNPRUNED = ("--no-prune",)
#: Of the Python that TensorRT 8.5 has.
TENSORRT8_PYTHON = "3.10"
TRITON_ARCHIVE = "tritonserver.tar.xz"
#: Pure-Python packages that the engine stage needs and a bare GPU machine may lack.
CARRIED_PACKAGES = {"PyYAML": "yaml", "click": "click", "polygraphy": "polygraphy"}


def command_line(*arguments: object) -> None:
    """Run hstu-compile as a user does; its own message says what is wrong when it fails."""
    program = Path(sys.executable).with_name("hstu-compile")
    subprocess.run([str(program), *map(str, arguments)], check=True, stdin=subprocess.DEVNULL)


def build_bundles(
    job: Path,
    checkpoint: Path,
    config: Path | None,
    name: str,
    precisions: Sequence[str],
    options: Sequence[str] = (),
) -> None:
    """Build one bundle without an engine per precision."""
    for precision in precisions:
        folder = job / "models" / f"{name}-{precision}"
        given = () if config is None else ("--config", config)
        command_line(
            "build", checkpoint, *given, f"--{precision}", "--backend", "onnx", *options, "-o", folder, "--force"
        )
        remove_unread(folder)


def remove_unread(folder: Path) -> None:
    """Drop what no check reads: all of it would have to be carried."""
    for pattern in UNREAD:
        for path in folder.glob(pattern):
            path.unlink()


def save_native(path: Path, config: RetrievalConfig, state: Mapping[str, torch.Tensor]) -> None:
    """Write a checkpoint in our own format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"format": "hstu-compile/1", "config": config.to_dict(), "state_dict": dict(state)}, path)


def save_deep_checkpoint(path: Path, fixture: Path) -> None:
    """The research model's sizes with eight layers and seeded random weights."""
    spec = spec_from_checkpoint(fixture / "ckpt.pt", config_from_file(fixture / "config.json"))
    config = dataclasses.replace(spec.config, dialect="native", num_layers=DEEP_LAYERS)
    save_native(path, config, small_model(config, seed=8).state_dict())


def save_cycled_checkpoint(path: Path, fixture: Path) -> None:
    """Eight layers out of the fixture's trained ones, in turn: the conditioning of real weights at that depth."""
    spec = spec_from_checkpoint(fixture / "ckpt.pt", config_from_file(fixture / "config.json"))
    config = dataclasses.replace(spec.config, dialect="native", num_layers=DEEP_LAYERS)
    state: dict[str, torch.Tensor] = {}
    for key, tensor in model_from_spec(spec).state_dict().items():
        prefix, _, rest = key.partition(".")
        if prefix != "layers":
            state[key] = tensor
            continue
        trained, _, parameter = rest.partition(".")
        for layer in range(int(trained), DEEP_LAYERS, spec.config.num_layers):
            state[f"layers.{layer}.{parameter}"] = tensor.clone()
    save_native(path, config, state)


def save_leave_one_out(job: Path, fixture: Path) -> None:
    """Requests of every MovieLens user, the targets, and what eager float32 answers."""
    spec = spec_from_checkpoint(fixture / "ckpt.pt", config_from_file(fixture / "config.json"))
    histories = prepare_data.load_histories(prepare_data.fetch())
    arrays: dict[str, Any] = {}
    users = []
    model = model_from_spec(spec)
    for count, (feeds, targets) in enumerate(prepare_data.evaluation_feeds(histories), start=1):
        for name, values in feeds.items():
            arrays[f"{name}_{count - 1}"] = values
        arrays[f"targets_{count - 1}"] = targets
        with torch.inference_mode():
            users.append(model(**{name: torch.from_numpy(values) for name, values in feeds.items()}).numpy())
        arrays["num_batches"] = count
    for precision in RESEARCH_PRECISIONS:
        vectors = model_from_spec(spec, TORCH_DTYPES[precision]).item_vectors()  # type: ignore[index]
        arrays[f"item_vectors_{precision}"] = vectors.float().numpy()
    np.savez_compressed(job / "leave_one_out.npz", **arrays, eager_users=np.concatenate(users))


def bench_variants() -> list[KernelVariant]:
    """Kernels of tests/bench/bench_plugin.py: causal float16, with and without both biases."""
    return [
        variant
        for dim in (64, 128)
        for bias in (False, True)
        for variant in variants_for(
            "float16", dim, dim, pos_bias=bias, time_bias=bias, timestamp_bits=32, mask_kinds=(0,)
        )
    ]


def save_m_falcon(place: Path, bundle: Path | None) -> None:
    """The benchmark's bundle and two archives of it: the graphs, and what they are compared with.

    Args:
        place: folder of the bundle and the archives.
        bundle: a bundle that was built from the benchmark's checkpoint before; None builds one, in minutes.
    """
    place.mkdir(exist_ok=True)
    folder = place / M_FALCON
    if bundle is not None:
        shutil.copytree(bundle, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*UNREAD))
    else:
        checkpoint = place / "checkpoint"
        command = [sys.executable, str(BENCH / "m_falcon_prepare.py"), "--checkpoint", str(checkpoint)]
        subprocess.run(command, check=True)
        given = ("build", checkpoint / "ckpt.pt", "--config", checkpoint / "config.json", "--fp16", *M_FALCON_OPTIONS)
        command_line(*given, "--backend", "onnx", "-o", folder, "--force")
        remove_unread(folder)
    files = sorted(folder.iterdir())
    save_archive(place / f"{M_FALCON}-graphs.tar.gz", place, [path for path in files if path.suffix == ".onnx"])
    save_archive(place / f"{M_FALCON}-references.tar.gz", place, [path for path in files if path.suffix != ".onnx"])


def save_calibration(place: Path) -> None:
    """The bundles of bench_calibration.py, an archive for each, and one of the requests."""
    folder = place / CALIBRATION
    folder.mkdir(parents=True, exist_ok=True)
    bench_calibration.prepare(folder, bench_calibration.KINDS, tiny=False)
    for kind in bench_calibration.KINDS:
        remove_unread(folder / kind)
        save_archive(place / f"{CALIBRATION}-{kind}.tar.gz", place, sorted((folder / kind).iterdir()))
    save_archive(place / f"{CALIBRATION}-requests.tar.gz", place, sorted(folder.glob("requests-*.npz")))


def graphs_of(job: Path) -> list[Path]:
    """Every graph that gets an engine of TensorRT 8.5, of all bundles that were prepared; no bfloat16, no float8."""
    folders = [path for path in (job / "models").glob("*") if path.name not in prepare_fused.SMALL]
    folders += beside(job, "m_falcon").glob(M_FALCON)
    folders += beside(job, END_TO_END).glob(f"{END_TO_END}-*/")
    folders += beside(job, RETRIEVAL).glob(f"{RETRIEVAL}-*-unpruned/")
    found = [folder / name for folder in sorted(folders) for name in RANKING_GRAPHS]
    quantised = [*(job / "quantised").glob("*-int8/*.onnx"), *beside(job, CALIBRATION).glob(f"{CALIBRATION}/*/*.onnx")]
    found += [path for path in sorted(quantised) if path.parent.name != "fp8"]
    return [path for path in found if path.exists() and "bf16" not in path.parent.name]


def beside(job: Path, name: str) -> Path:
    """A folder beside the job folder, which is carried whole at each run."""
    return job.with_name(f"{job.name}-{name}")


def build_tensorrt8_plugin(job: Path, graphs: Sequence[Path], headers: Path, archs: Sequence[int], jobs: int) -> None:
    """One library with the kernels of every graph and of the benchmark."""
    requests = [plugin_request_of([onnx.load(path)], TENSORRT8) for path in graphs]
    variants = dict.fromkeys([*bench_variants(), *(each for request in requests for each in request.variants)])
    norms = dict.fromkeys(each for request in requests for each in request.norm_variants or ())
    library = build_plugin_library(
        PluginBuildRequest(
            variants=tuple(variants),
            norm_variants=tuple(norms),
            archs=tuple(archs),
            with_ptx=False,
            tensorrt_include_dir=headers,
            runtime_version=TENSORRT8,
            jobs=jobs,
        )
    )
    (job / "plugin").mkdir(exist_ok=True)
    shutil.copy2(library.self_registering, job / "plugin")


def prepare_conformance(job: Path, headers: Path, archs: Sequence[int], jobs: int) -> None:
    """The C++ conformance program with its cases."""
    command = [sys.executable, "-m", "tests.plugins.conformance.prepare_conformance", str(job / "conformance")]
    command += ["--tensorrt8-include-dir", str(headers), "--archs", *map(str, archs), "--jobs", str(jobs)]
    subprocess.run(command, check=True, cwd=REPOSITORY)


def build_cpp_loader(job: Path, headers: Path, name: str = "hstu_score") -> None:
    """The C++ loader's program for the TensorRT of these headers, as its README builds it; libstdc++ comes with it."""
    source = REPOSITORY / "samples" / "cpp_loader"
    with tempfile.TemporaryDirectory() as folder:
        configure = ["cmake", "-S", str(source), "-B", folder, "-D", "HSTU_STATIC_RUNTIME=ON"]
        configure += ["-D", f"HSTU_TENSORRT_INCLUDE_DIR={headers.resolve()}"]
        configure += ["-D", f"HSTU_CUDA_INCLUDE_DIR={find_cuda_headers().resolve()}"]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", folder], check=True)
        (job / "cpp_loader").mkdir(exist_ok=True)
        shutil.copy2(Path(folder) / "hstu_score", job / "cpp_loader" / name)


def pack_triton(job: Path) -> None:
    """The installed tritonserver with its Python backend, the stub of TensorRT's Python, and the libraries they need.

    Raises:
        SystemExit: saying what to install.
    """
    found = find_installation()
    if isinstance(found, str):
        raise SystemExit(f"error: {found}")
    root = found.libraries.parent
    stub = found.stub.parents[1] / TENSORRT8_PYTHON / found.stub.name
    backend = [path for path in sorted(found.backend.iterdir()) if path.is_file()]
    linked = [found.binary, stub, *(path for path in backend if path.suffix == ".so")]
    scripts = [path for path in backend if path not in linked]
    files = [*linked, *scripts, *needed_libraries(linked, found.libraries)]
    (job / "triton").mkdir(exist_ok=True)
    archive = job / "triton" / TRITON_ARCHIVE
    partial = archive.with_suffix(".partial")
    names = [str(path.relative_to(root)) for path in files]
    # tar and xz themselves: a Python may have been built without lzma.
    subprocess.run(["tar", "-cJf", str(partial), "-C", str(root), *names], check=True)
    partial.replace(archive)
    size = sum(path.stat().st_size for path in files)
    print(f"{archive.name}: {archive.stat().st_size / 2**20:.1f} MiB of {size / 2**20:.0f} MiB, {len(files)} files")


def needed_libraries(programs: Sequence[Path], folder: Path) -> list[Path]:
    """Shared libraries of a folder that the programs need, and those that these need."""
    found: dict[Path, None] = {}
    waiting = list(programs)
    while waiting:
        command = ["readelf", "-d", str(waiting.pop())]
        table = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        for name in re.findall(r"\(NEEDED\).*\[(.+)\]", table):
            library = folder / name
            if library.is_file() and library not in found:
                found[library] = None
                waiting.append(library)
    return sorted(found)


def layers_of(job: Path, names: Sequence[str]) -> dict[str, int]:
    """Attention nodes of each bundle that is there; of the others, what an earlier run counted."""
    record = job / "job.json"
    layers: dict[str, int] = json.loads(record.read_text(encoding="utf-8"))["num_layers"] if record.exists() else {}
    for name in names:
        graph = job / "models" / name / "model.onnx"
        if graph.exists():
            layers[name] = sum(is_attention(node) for node in onnx.load(graph).graph.node)
    return layers


def copy_packages(job: Path) -> None:
    """The carried packages' Python files; their compiled parts are optional and fit one interpreter only."""
    for distribution, package in CARRIED_PACKAGES.items():
        source = importlib.metadata.distribution(distribution).locate_file(package)
        ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.pyc")
        shutil.copytree(Path(str(source)), job / "site" / package, ignore=ignore, dirs_exist_ok=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tensorrt8-include-dir", type=Path, required=True, help="folder of TensorRT 8.5's NvInfer.h")
    fixtures = REPOSITORY.parent / "shared" / "fixtures"
    parser.add_argument(
        "--fixture", type=Path, default=fixtures / "meta_research_ml100k", help="folder of ckpt.pt and config.json"
    )
    parser.add_argument(
        "--dlrm-fixture",
        type=Path,
        default=fixtures / "meta_dlrm_ml100k",
        help="folder of a ranking ckpt.pt, config.json and golden.npz",
    )
    parser.add_argument("--m-falcon-bundle", type=Path, metavar="DIR", help="copy this one instead of building it")
    parser.add_argument("--archs", type=int, nargs="+", default=[90], help="compute capabilities, 10 * major + minor")
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=prepare_end_to_end.PRECISIONS,
        default=prepare_end_to_end.PRECISIONS,
        help=f"of {GROWTH} and {RETRIEVAL}",
    )
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parts = [
        *MODELS,
        "dlrm",
        "m_falcon",
        END_TO_END,
        GROWTH,
        RETRIEVAL,
        "quantised",
        CALIBRATION,
        FUSED,
        FUSED_M_FALCON,
        "plugin",
        "conformance",
        "cpp-loader",
        "cpp-loader-fused",
        "triton",
    ]
    parser.add_argument("--rtx-include-dir", type=Path, help="folder of TensorRT-RTX's NvInfer.h, for cpp-loader-fused")
    parser.add_argument("--only", nargs="+", choices=parts, help="parts to make again (default: all that can be made)")
    arguments = parser.parse_args()
    if arguments.only is None:
        arguments.only = [part for part in parts if part != "cpp-loader-fused" or arguments.rtx_include_dir is not None]
    job: Path = arguments.out.resolve()
    job.mkdir(parents=True, exist_ok=True)
    names = [f"{model}-{precision}" for model, precisions in MODELS.items() for precision in precisions]
    checkpoints = job / "checkpoints"
    copy_packages(job)
    if "research" in arguments.only:
        checkpoints.mkdir(exist_ok=True)
        for name in ("ckpt.pt", "config.json"):
            shutil.copyfile(arguments.fixture / name, checkpoints / name)
        build_bundles(
            job, checkpoints / "ckpt.pt", checkpoints / "config.json", "research", RESEARCH_PRECISIONS, UNPRUNED
        )
        save_leave_one_out(job, arguments.fixture)
    for model, save in (("deep", save_deep_checkpoint), ("cycled", save_cycled_checkpoint)):
        if model in arguments.only:
            save(checkpoints / f"{model}.pt", arguments.fixture)
            build_bundles(job, checkpoints / f"{model}.pt", None, model, MODELS[model], UNPRUNED)
    if "dlrm" in arguments.only:
        given = arguments.dlrm_fixture
        build_bundles(job, given / "ckpt.pt", given / "config.json", "dlrm", DLRM_PRECISIONS, DLRM_OPTIONS)
        shutil.copyfile(given / "golden.npz", job / "golden_dlrm.npz")
    if "m_falcon" in arguments.only:
        save_m_falcon(beside(job, "m_falcon"), arguments.m_falcon_bundle)
    if "quantised" in arguments.only:
        for model in prepare_quantised.MODELS:
            prepare_quantised.prepare_quantised(job, model, prepare_quantised.KINDS)
        for bundle in (job / "quantised").glob("*/"):
            remove_unread(bundle)
    if CALIBRATION in arguments.only:
        save_calibration(beside(job, CALIBRATION))
    if FUSED in arguments.only:
        prepare_fused.prepare_small(job)
    if FUSED_M_FALCON in arguments.only:
        prepare_fused.prepare_m_falcon(beside(job, "m_falcon"))
    if END_TO_END in arguments.only:
        prepare_end_to_end.save_end_to_end(beside(job, END_TO_END), arguments.archs, arguments.jobs)
    if GROWTH in arguments.only:
        prepare_end_to_end.save_growth(beside(job, END_TO_END), arguments.precisions)
    if RETRIEVAL in arguments.only:
        prepare_end_to_end.save_retrieval(beside(job, RETRIEVAL), arguments.precisions, arguments.archs, arguments.jobs)
    if "plugin" in arguments.only:
        build_tensorrt8_plugin(job, graphs_of(job), arguments.tensorrt8_include_dir, arguments.archs, arguments.jobs)
    if "conformance" in arguments.only:
        prepare_conformance(job, arguments.tensorrt8_include_dir, arguments.archs, arguments.jobs)
    if "cpp-loader" in arguments.only:
        build_cpp_loader(job, arguments.tensorrt8_include_dir)
    if "cpp-loader-fused" in arguments.only:
        # Its headers are part of TensorRT-RTX's SDK and not of its wheel, so they are not everywhere.
        if arguments.rtx_include_dir is None:
            parser.error("cpp-loader-fused needs --rtx-include-dir, the folder of TensorRT-RTX's NvInfer.h")
        build_cpp_loader(job, arguments.rtx_include_dir, "hstu_score_rtx")
    if "triton" in arguments.only:
        pack_triton(job)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.strip()
    (job / "job.json").write_text(json.dumps({"commit": commit, "num_layers": layers_of(job, names)}, indent=1) + "\n")
    size = sum(path.stat().st_size for path in job.rglob("*") if path.is_file())
    print(f"{job}: {size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
