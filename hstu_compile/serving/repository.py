"""`hstu-compile triton`: a bundle to a model in a Triton model repository. Level 5; no torch.

REPOSITORY/
  launch.sh                 checks every model's files and plugin, then starts tritonserver
  NAME/
    config.pbtxt            what the server reads
    deployment.json         what it was made from, and how
    SHA256SUMS              of all below
    1/                      the model: model.py and the bundle, or the engine
    warmup/                 requests that run before the model is ready
    client_http.py          examples of clients, and their requests in the form that perf_analyzer takes
        client_grpc.py
        requests.json
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

import hstu_compile
from hstu_compile.bundle import ENGINE_FILE, MANIFEST, ONNX_FILE, BundleFiles, read_bundle
from hstu_compile.errors import BundleError, UsageError
from hstu_compile.files import write_whole, writing_to
from hstu_compile.plugin_library import SELF_REGISTERING
from hstu_compile.serving.pbtxt import Message, Word, pbtxt
from hstu_compile.serving.python_config import MODEL_PY, python_config
from hstu_compile.serving.samples import Sample, sample_requests
from hstu_compile.serving.settings import RuntimeSettings, Scheduling
from hstu_compile.serving.tensorrt_config import PLAN_FILE, tensorrt_config
from hstu_compile.serving.tensors import DATATYPES, most_users

Backend = Literal["auto", "python", "tensorrt"]

CONFIG, DEPLOYMENT, CHECKSUMS, LAUNCHER = "config.pbtxt", "deployment.json", "SHA256SUMS", "launch.sh"
_VERSION = "1"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_NUM_SAMPLES, _NUM_WARMUPS = 32, 3


@dataclasses.dataclass(frozen=True)
class RepositoryRequest:
    """What to write.

    Attributes:
        bundle: the bundle.
        repository: the model repository; made if it is absent, other models in it stay.
        backend: Triton's backend; "auto" takes tensorrt for a bundle with a TensorRT engine, and python otherwise.
        name: of the model; None takes the bundle's.
        scheduling: batching, instances, CUDA graphs.
        settings: how the Python backend answers.
        execution_env: of the Python backend; None is the server's own Python.
        force: replace a model of that name.
    """

    bundle: Path
    repository: Path
    backend: Backend = "auto"
    name: str | None = None
    scheduling: Scheduling = dataclasses.field(default_factory=Scheduling)
    settings: RuntimeSettings = dataclasses.field(default_factory=RuntimeSettings)
    execution_env: PurePosixPath | None = None
    force: bool = False


def write_repository(request: RepositoryRequest) -> dict[str, Any]:
    """Write the model, whole or not at all.

    Returns:
        The facts of deployment.json, and `path`, `launch`, and `notes`: what is still to be done or to be known.

    Raises:
        BundleError: HSTU-E803 for a bundle that is none, E804 for a graph that the backend cannot serve, E801 if the
            model is there already, E802 if it cannot be written.
        UsageError: HSTU-E901 for options that do not go together.
    """
    files = read_bundle(request.bundle)
    backend = request.backend
    if backend == "auto":
        backend = "tensorrt" if _has_tensorrt_engine(files) else "python"
    name = _model_name(request)
    if backend == "python":
        _check_python(request, files)
    elif request.execution_env is not None:
        raise UsageError(
            "HSTU-E901",
            "--execution-env and --backend tensorrt exclude each other",
            "the TensorRT backend runs no Python",
            "leave one of them out",
        )
    samples = sample_requests(files, _NUM_SAMPLES)
    warmup = _warmup(samples[:_NUM_WARMUPS])
    if backend == "python":
        config = python_config(name, files, request.scheduling, request.settings, warmup, request.execution_env)
    else:
        config = tensorrt_config(name, files, request.scheduling, warmup)
    deployment = {
        "model": name,
        "backend": backend,
        "hstu_compile": hstu_compile.__version__,
        "bundle_sha256": hashlib.sha256((files.path / MANIFEST).read_bytes()).hexdigest(),
        "built_with": files.manifest.get("versions"),
        "engine": files.manifest["backend"],
        "precision": files.manifest["precision"]["requested"],
        "status": files.manifest["status"],
    }
    repository = request.repository
    with _new_model(repository, name, request.force) as folder:
        (folder / CONFIG).write_text(pbtxt(config), encoding="utf-8")
        (folder / DEPLOYMENT).write_text(json.dumps(deployment, indent=1) + "\n", encoding="utf-8")
        (folder / _VERSION).mkdir()
        if backend == "python":
            _write_python_model(folder, files, request.settings)
        else:
            _write_tensorrt_model(folder, files)
        _write_warmup(folder / "warmup", samples[:_NUM_WARMUPS])
        _write_clients(folder, name, samples)
        _write_checksums(folder)
    launcher = repository / LAUNCHER
    write_whole(launcher, _template("launch.sh").encode())
    launcher.chmod(0o755)
    notes = _notes(files, backend, repository / name)
    return {**deployment, "path": str(repository / name), "launch": str(launcher), "notes": notes}


def _has_tensorrt_engine(files: BundleFiles) -> bool:
    return files.has_engine and files.manifest["backend"]["name"] == "tensorrt"


def _model_name(request: RepositoryRequest) -> str:
    name = request.name if request.name is not None else request.bundle.absolute().name.removesuffix(".hstu")
    if _NAME.fullmatch(name) is None:
        raise UsageError(
            "HSTU-E901",
            f"a model cannot be named {name!r}",
            "a name is made of letters, digits, '_', '.' and '-', and begins with a letter or a digit",
            "pass --name NAME",
        )
    return name


def _check_python(request: RepositoryRequest, files: BundleFiles) -> None:
    """Refuse what could only fail when the model is loaded."""

    def refuse(what: str, why: str, fix: str) -> None:
        raise UsageError("HSTU-E901", what, why, fix)

    settings = request.settings
    if request.scheduling.cuda_graphs:
        refuse(
            "--cuda-graphs and --backend python exclude each other",
            "the Python backend's runtime records its graphs itself",
            "leave --cuda-graphs out",
        )
    if settings.runtime != "onnxruntime" and files.manifest["backend"]["name"] != settings.runtime:
        refuse(
            f"--runtime {settings.runtime} has nothing to run",
            f"the bundle's engine is of the backend {files.manifest['backend']['name']}",
            "leave --runtime out, or build the bundle with that --backend",
        )
    if settings.runtime != "onnxruntime" and settings.device == "gpu":
        refuse("--device is ONNX Runtime's", f"{settings.runtime} always runs on a GPU", "leave --device out")
    if settings.unknown_ids != "refuse" and files.ranking is None:
        refuse("--unknown-ids is for ranking models", "this is a retrieval model", "leave --unknown-ids out")


def _template(name: str) -> str:
    return resources.files("hstu_compile").joinpath(f"templates/triton/{name}").read_text(encoding="utf-8")


@contextlib.contextmanager
def _new_model(repository: Path, name: str, force: bool) -> Iterator[Path]:
    """A folder that becomes the model when the block ends, and is removed if it fails.

    Raises:
        BundleError: HSTU-E801 if the model exists and is not to be replaced, E802 if it cannot be written.
    """
    target = repository / name
    if target.exists() and not (force and (target / DEPLOYMENT).is_file()):
        whose = "it is a model that hstu-compile wrote" if (target / DEPLOYMENT).is_file() else "it is not ours"
        fix = "pass --force, or another --name" if (target / DEPLOYMENT).is_file() else "pass another --name or -o DIR"
        raise BundleError("HSTU-E801", f"{target} exists", whose, fix)
    mark = secrets.token_hex(4)
    # A server that looks for new models at this moment must not find half of one: names with a dot are no models.
    folder, replaced = (repository / f".{name}.{mark}.{state}" for state in ("partial", "old"))
    with writing_to(target):
        repository.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir()
            yield folder
            if target.exists():
                os.rename(target, replaced)
            os.rename(folder, target)
        finally:
            if replaced.exists() and not target.exists():
                os.rename(replaced, target)
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(replaced, ignore_errors=True)


def _write_python_model(folder: Path, files: BundleFiles, settings: RuntimeSettings) -> None:
    version = folder / _VERSION
    (version / "model.py").write_text(MODEL_PY, encoding="utf-8")
    bundle = version / "bundle"
    bundle.mkdir()
    for name in (MANIFEST, *files.manifest["files"]):
        shutil.copy2(files.path / name, bundle / name)
    extra = "[cpu]" if settings.runtime == "onnxruntime" and settings.device == "cpu" else ""
    extra = "[gpu]" if settings.on_gpu and settings.runtime != "tensorrt-rtx" else extra or "[rtx]"
    (folder / "requirements.txt").write_text(
        "# For the Python that Triton's Python backend uses.\n"
        f"hstu-compile{extra}=={hstu_compile.__version__}\n"
        "# Backends built against NumPy 1 read wrong values under NumPy 2; the model refuses to load there.\n"
        "numpy>=1.26,<2\n",
        encoding="utf-8",
    )


def _write_tensorrt_model(folder: Path, files: BundleFiles) -> None:
    shutil.copy2(files.path / ONNX_FILE, folder / ONNX_FILE)
    if _has_tensorrt_engine(files):
        shutil.copy2(files.path / ENGINE_FILE, folder / _VERSION / PLAN_FILE)
    if files.plugin_library is not None:
        shutil.copy2(files.plugin_library, folder / SELF_REGISTERING)


def _warmup(samples: Sequence[Sample]) -> list[Message]:
    return [
        {
            "name": f"request_{index}",
            "batch_size": 1,
            "inputs": [
                {
                    "key": name,
                    "value": {
                        "data_type": Word(f"TYPE_{DATATYPES[str(array.dtype)]}"),
                        "dims": list(array.shape),
                        "input_data_file": _warmup_file(index, name),
                    },
                }
                for name, array in sample.items()
            ],
        }
        for index, sample in enumerate(samples)
    ]


def _warmup_file(index: int, name: str) -> str:
    return f"request_{index}_{name}"


def _write_warmup(folder: Path, samples: Sequence[Sample]) -> None:
    folder.mkdir()
    for index, sample in enumerate(samples):
        for name, array in sample.items():
            (folder / _warmup_file(index, name)).write_bytes(np.ascontiguousarray(array).tobytes())


def _write_clients(folder: Path, name: str, samples: Sequence[Sample]) -> None:
    for protocol, port in (("http", 8000), ("grpc", 8001)):
        text = _template("client.py.txt")
        for mark, value in (
            ("@PROTOCOL@", protocol),
            ("@PORT@", str(port)),
            ("@MODEL@", name),
            ("@AS_JSON@", ", as_json=True" if protocol == "grpc" else ""),
        ):
            text = text.replace(mark, value)
        (folder / f"client_{protocol}.py").write_text(text, encoding="utf-8")
    # The form that perf_analyzer takes with --input-data: shapes without the axis of the batch.
    data = [
        {name: {"content": array.reshape(-1).tolist(), "shape": list(array.shape)} for name, array in sample.items()}
        for sample in samples
    ]
    (folder / "requests.json").write_text(json.dumps({"data": data}) + "\n", encoding="utf-8")


def _write_checksums(folder: Path) -> None:
    """Of what nobody has a reason to edit: the configuration is left out."""
    names = sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != CONFIG
    )
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def _notes(files: BundleFiles, backend: str, model: Path) -> list[str]:
    notes = []
    if files.manifest["status"] != "PASS":
        notes.append(f"the bundle's verification says {files.manifest['status']}")
    if backend == "python":
        return [*notes, f"the server's Python needs {model / 'requirements.txt'}"]
    if not _has_tensorrt_engine(files):
        notes.append(
            "the bundle has no TensorRT engine; on the machine that serves: hstu-compile engine "
            f"{model / ONNX_FILE} -o {model / _VERSION / PLAN_FILE} --max-batch {most_users(files)}"
        )
    if files.plugin_library is None:
        notes.append(
            "the bundle has no plugin library; an engine with plugin layers needs it at "
            f"{model / SELF_REGISTERING}: hstu-compile plugin build --onnx {model / ONNX_FILE} -o {model}"
        )
    ranking = files.ranking
    if ranking is not None and ranking.scaling == "batch":
        notes.append(
            "one request a batch: with scaling_seq_len: batch an answer would depend on who is asked about beside it"
        )
    notes.append("the TensorRT backend checks no ids, times or lengths; --backend python does")
    return notes
