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

An engine with a check in front of it is three models: NAME, which clients ask, NAME_check and NAME_engine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NoReturn

import numpy as np
import onnx

import hstu_compile
from hstu_compile.bundle import ENGINE_FILE, MANIFEST, ONNX_FILE, BundleFiles, read_bundle
from hstu_compile.errors import UsageError
from hstu_compile.files import file_sha256, write_whole
from hstu_compile.plugin_library import SELF_REGISTERING
from hstu_compile.serving.ensemble_config import CHECK_PY, check_config, ensemble_config, step_names
from hstu_compile.serving.new_models import DEPLOYMENT, new_models
from hstu_compile.serving.pbtxt import Message, Word, pbtxt
from hstu_compile.serving.python_config import MODEL_PY, python_config
from hstu_compile.serving.samples import Sample, sample_requests
from hstu_compile.serving.settings import RuntimeSettings, Scheduling
from hstu_compile.serving.tensorrt_config import PLAN_FILE, tensorrt_config
from hstu_compile.serving.tensors import DATATYPES, most_users
from hstu_compile.table_files import table_names

Backend = Literal["auto", "python", "tensorrt"]

CONFIG, CHECKSUMS, LAUNCHER = "config.pbtxt", "SHA256SUMS", "launch.sh"
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
        settings: how the Python backend answers, or what the check refuses.
        execution_env: of the Python backend; None is the server's own Python.
        force: replace a model of that name.
        checked: put our checks in front of the TensorRT backend, which has none. The Python backend always checks.
    """

    bundle: Path
    repository: Path
    backend: Backend = "auto"
    name: str | None = None
    scheduling: Scheduling = dataclasses.field(default_factory=Scheduling)
    settings: RuntimeSettings = dataclasses.field(default_factory=RuntimeSettings)
    execution_env: PurePosixPath | None = None
    force: bool = False
    checked: bool = True


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
    _check_options(request, backend, files)
    samples = sample_requests(files, _NUM_SAMPLES)
    steps = step_names(name) if backend == "tensorrt" and request.checked else ()
    deployment = {
        "model": name,
        "backend": backend,
        "steps": list(steps),
        "hstu_compile": hstu_compile.__version__,
        "bundle_sha256": hashlib.sha256((files.path / MANIFEST).read_bytes()).hexdigest(),
        "built_with": files.manifest.get("versions"),
        "engine": files.manifest["backend"],
        "precision": files.manifest["precision"]["requested"],
        "status": files.manifest["status"],
    }
    configs = _configs(request, backend, (name, *steps), files, _warmup(samples[:_NUM_WARMUPS]))
    repository = request.repository
    with new_models(repository, (name, *steps), request.force) as folders:
        for folder, (model, config) in zip(folders, configs.items(), strict=True):
            (folder / CONFIG).write_text(pbtxt(config), encoding="utf-8")
            own = {} if model == name else {"model": model, "backend": config["backend"], "steps": []}
            text = json.dumps({**deployment, **own}, indent=1) + "\n"
            (folder / DEPLOYMENT).write_text(text, encoding="utf-8")
            (folder / _VERSION).mkdir()
            if "model_warmup" in config:
                _write_warmup(folder / "warmup", samples[:_NUM_WARMUPS])
        if steps:
            _write_ensemble(folders[0])
            _write_check(folders[1], files)
        if backend == "python":
            _write_python_model(folders[0], files, request.settings)
        else:
            _write_tensorrt_model(folders[-1], files)
        _write_clients(folders[0], name, samples)
        for folder in folders:
            _write_checksums(folder)
    launcher = repository / LAUNCHER
    write_whole(launcher, _template("launch.sh").encode())
    launcher.chmod(0o755)
    notes = _notes(files, backend, [repository / model for model in configs])
    return {**deployment, "path": str(repository / name), "launch": str(launcher), "notes": notes}


def _configs(
    request: RepositoryRequest,
    backend: str,
    names: Sequence[str],
    files: BundleFiles,
    warmup: Sequence[Message],
) -> dict[str, Message]:
    """Model to configuration; first what clients ask, last what runs the graph."""
    settings, env = request.settings, request.execution_env
    if backend == "python":
        return {names[0]: python_config(names[0], files, request.scheduling, settings, warmup, env)}
    engine = tensorrt_config(names[-1], files, request.scheduling, warmup)
    if len(names) == 1:
        return {names[0]: engine}
    name, check, _ = names
    return {
        name: ensemble_config(name, files),
        check: check_config(check, files, settings, warmup, env),
        names[-1]: engine,
    }


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


def _check_options(request: RepositoryRequest, backend: str, files: BundleFiles) -> None:
    """Refuse what could only fail when the model is loaded, and options of what is not written."""
    settings, tensorrt = request.settings, backend == "tensorrt"
    if tensorrt and not request.checked and request.execution_env is not None:
        _refuse(
            "--execution-env and --unchecked exclude each other",
            "without its check the TensorRT backend runs no Python",
            "leave one of them out",
        )
    if settings.unknown_ids != "refuse" and files.ranking is None:
        _refuse("--unknown-ids is for ranking models", "this is a retrieval model", "leave --unknown-ids out")
    if tensorrt:
        return
    if not request.checked:
        _refuse(
            "--unchecked and --backend python exclude each other",
            "the Python backend's runtime checks every request itself",
            "leave --unchecked out",
        )
    if request.scheduling.cuda_graphs:
        _refuse(
            "--cuda-graphs and --backend python exclude each other",
            "the Python backend's runtime records its graphs itself",
            "leave --cuda-graphs out",
        )
    if settings.runtime != "onnxruntime" and files.manifest["backend"]["name"] != settings.runtime:
        _refuse(
            f"--runtime {settings.runtime} has nothing to run",
            f"the bundle's engine is of the backend {files.manifest['backend']['name']}",
            "leave --runtime out, or build the bundle with that --backend",
        )
    if settings.runtime != "onnxruntime" and settings.device == "gpu":
        _refuse("--device is ONNX Runtime's", f"{settings.runtime} always runs on a GPU", "leave --device out")


def _refuse(what: str, why: str, fix: str) -> NoReturn:
    raise UsageError("HSTU-E901", what, why, fix)


def _template(name: str) -> str:
    return resources.files("hstu_compile").joinpath(f"templates/triton/{name}").read_text(encoding="utf-8")


def _write_python_model(folder: Path, files: BundleFiles, settings: RuntimeSettings) -> None:
    version = folder / _VERSION
    (version / "model.py").write_text(MODEL_PY, encoding="utf-8")
    bundle = version / "bundle"
    bundle.mkdir()
    for name in (MANIFEST, *files.manifest["files"]):
        shutil.copy2(files.path / name, bundle / name)
    extra = "[cpu]" if settings.runtime == "onnxruntime" and settings.device == "cpu" else ""
    extra = "[gpu]" if settings.on_gpu and settings.runtime != "tensorrt-rtx" else extra or "[rtx]"
    _write_requirements(folder, extra)


def _write_requirements(folder: Path, extra: str) -> None:
    (folder / "requirements.txt").write_text(
        "# For the Python that Triton's Python backend uses.\n"
        f"hstu-compile{extra}=={hstu_compile.__version__}\n"
        "# Backends built against NumPy 1 read wrong values under NumPy 2; the model refuses to load there.\n"
        "numpy>=1.26,<2\n",
        encoding="utf-8",
    )


def _write_ensemble(folder: Path) -> None:
    """An ensemble is its configuration, but the server wants a folder of its version."""
    (folder / _VERSION / "README").write_text(
        "An ensemble has no files of its own. This one keeps its folder: object stores have no empty ones.\n",
        encoding="utf-8",
    )


def _write_check(folder: Path, files: BundleFiles) -> None:
    (folder / _VERSION / "model.py").write_text(CHECK_PY, encoding="utf-8")
    shutil.copy2(files.path / MANIFEST, folder / _VERSION / MANIFEST)
    _write_requirements(folder, "")


def _write_tensorrt_model(folder: Path, files: BundleFiles) -> None:
    tables = table_names(onnx.load(str(files.path / ONNX_FILE), load_external_data=False))
    # Names that the manifest vouches for are of files in the bundle.
    for name in (ONNX_FILE, *(name for name in tables if name in files.manifest["files"])):
        shutil.copy2(files.path / name, folder / name)
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
    lines = [f"{file_sha256(folder / name)}  {name}\n" for name in names]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def _notes(files: BundleFiles, backend: str, models: Sequence[Path]) -> list[str]:
    """What is still to be done or to be known about the models, of which the last one runs the graph."""
    notes, model = [], models[-1]
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
    if len(models) == 1:
        notes.append("the TensorRT backend checks no ids, times or lengths: a wrong request changes others' answers")
        return notes
    notes.append(f"the server's Python needs {models[1] / 'requirements.txt'}")
    notes.append(f"{model.name} checks nothing: let clients reach {models[0].name} alone")
    return notes
