"""The deliverable: a folder whose manifest vouches for every file in it. Level 4.

Written beside its destination under a name that is not a bundle's, manifest last, then renamed in one step. A build
that is interrupted at any moment leaves either the old bundle, the new one, or nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_compile.artifacts import TensorSpec
from hstu_compile.errors import BundleError, UsageError
from hstu_compile.files import file_sha256, writing_to
from hstu_compile.manifest_form import manifest_problems
from hstu_compile.plugin_library import SELF_REGISTERING
from hstu_compile.runtime._manifest_entry import with_names
from hstu_compile.runtime.bucketed_session import BucketedSession
from hstu_compile.runtime.ladder import Buckets
from hstu_compile.runtime.open_fused import FUSED_BACKEND, open_fused_session
from hstu_compile.runtime.packed_request import check_packed_request
from hstu_compile.runtime.ranking_spec import RankingSpec
from hstu_compile.runtime.request import RequestLimits, check_request
from hstu_compile.runtime.retrieval_spec import RetrievalSpec
from hstu_compile.runtime.session import Session, open_session

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
ONNX_FILE = "model.onnx"
ENGINE_FILE = "model.engine"
REPORT_JSON = "report.json"
REPORT_HTML = "report.html"
_MOST_LISTED = 10

# Graphs that answer a request by themselves: theirs are the plain file names.
_MAIN_GRAPHS = ("retrieval", "packed")


@dataclasses.dataclass(frozen=True)
class ReferenceFiles:
    """File names of what one graph is compared with.

    Attributes:
        feeds: the requests.
        eager: outputs of the eager model in the build's precision.
        exact: its outputs in float64.
        onnxruntime: outputs of ONNX Runtime, where Polygraphy cannot run the graph itself.
    """

    feeds: str
    eager: str
    exact: str
    onnxruntime: str


@dataclasses.dataclass(frozen=True)
class FusedFiles:
    """What runs a graph that was cut at its attentions.

    Attributes:
        schedule: file of what runs in which order.
        engines: files of the segments' engines, in order.
        kernels: library of the attention kernels.
    """

    schedule: Path
    engines: tuple[Path, ...]
    kernels: Path


def model_files(graph: str) -> tuple[str, str]:
    """File names of a graph and of its engine."""
    return (ONNX_FILE, ENGINE_FILE) if graph in _MAIN_GRAPHS else (f"{graph}.onnx", f"{graph}.engine")


def reference_files(graph: str) -> ReferenceFiles:
    """File names of a graph's reference."""
    prefix = "" if graph in _MAIN_GRAPHS else f"{graph}_"
    names = ("feeds", "eager_outputs", "reference_outputs", "onnxruntime_outputs")
    return ReferenceFiles(*(f"{prefix}{name}.json" for name in names))


def _missing_parents(path: Path) -> list[Path]:
    """Folders above `path` that do not exist yet, innermost first."""
    return [parent for parent in path.absolute().parents if not parent.exists()]


def check_destination(path: Path, force: bool) -> None:
    """Refuse, before any work, a destination that cannot be written or must not be replaced. Creates nothing.

    Raises:
        BundleError: HSTU-E801 if something is there that `force` does not cover; HSTU-E802 if it cannot be written.
    """
    with writing_to(path):
        if path.is_symlink() or path.exists():
            is_folder = path.is_dir() and not path.is_symlink()
            has_manifest = is_folder and (path / MANIFEST).is_file()
            if not has_manifest and not (is_folder and not any(path.iterdir())):
                raise BundleError(
                    "HSTU-E801",
                    f"{path} exists and is not a bundle",
                    "it would be overwritten",
                    "choose another -o DIR",
                )
            if has_manifest and not force:
                raise BundleError(
                    "HSTU-E801",
                    f"the bundle {path} exists",
                    "it would be overwritten",
                    "pass --force, or another -o DIR",
                )
            if path.is_mount():
                raise OSError(errno.EBUSY, "it is a mount point, which no finished folder can be renamed to")
        above = [path.absolute().parent, *path.absolute().parent.parents]
        with tempfile.TemporaryFile(dir=next(parent for parent in above if parent.exists())):
            pass


class BundleWriter:
    """Collects files in a temporary folder; `commit` makes them a bundle, leaving the block without it removes them."""

    def __init__(self, path: Path, force: bool) -> None:
        self._path, self._force = path.absolute(), force
        self._folder: Path | None = None
        self._created: list[Path] = []
        self._digests: dict[str, tuple[tuple[int, int], str]] = {}
        self._committed = False

    def __enter__(self) -> BundleWriter:
        check_destination(self._path, self._force)
        self._created = _missing_parents(self._path)
        try:
            with writing_to(self._path):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                # Named before it is made: an interrupt between the two must not leave a folder that nobody knows of.
                self._folder = self._path.with_name(f".{self._path.name}.{secrets.token_hex(4)}.partial")
                self._folder.mkdir()
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._committed:
            shutil.rmtree(self._replaced, ignore_errors=True)
        else:
            self._discard()

    def _discard(self) -> None:
        """Undo everything so far; an interrupt may have come between any two steps of `commit`."""
        if self._folder is not None:
            if self._replaced.exists() and not self._path.exists():
                os.rename(self._replaced, self._path)
            shutil.rmtree(self._folder, ignore_errors=True)
            shutil.rmtree(self._replaced, ignore_errors=True)
        for parent in self._created:
            # A folder that someone else has put something into stays.
            with contextlib.suppress(OSError):
                parent.rmdir()

    @property
    def _replaced(self) -> Path:
        """Where the bundle that is being replaced waits until the new one is in place."""
        return self.folder.with_suffix(".old")

    @property
    def folder(self) -> Path:
        """Where the files are until `commit`."""
        assert self._folder is not None
        return self._folder

    @contextlib.contextmanager
    def writing(self) -> Iterator[Path]:
        """The folder, for code that writes files itself; turns OSError into HSTU-E802."""
        with writing_to(self._path):
            yield self.folder

    def add(self, name: str, content: bytes | str) -> None:
        """Write one file."""
        with self.writing() as folder:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))

    def vouch(self, sha256: Mapping[str, str]) -> None:
        """Take the digests of files that were just written into the folder: gigabytes are not read again for them."""
        for name, digest in sha256.items():
            self._digests[name] = _stamp(self.folder / name), digest

    def files(self) -> dict[str, dict[str, Any]]:
        """Size and sha256 of every file so far."""
        for file in self.folder.iterdir():
            stamp, _ = self._digests.get(file.name, (None, ""))
            if stamp != _stamp(file):
                self._digests[file.name] = _stamp(file), file_sha256(file)
        return {
            file.name: {"bytes": file.stat().st_size, "sha256": self._digests[file.name][1]}
            for file in sorted(self.folder.iterdir())
        }

    def commit(self, manifest: Mapping[str, Any]) -> Path:
        """Write the manifest and move the folder into place.

        Raises:
            BundleError: HSTU-E801 if something came there since, that must not be replaced; E802 if it cannot be moved.
        """
        check_destination(self._path, self._force)
        content = {"format_version": FORMAT_VERSION, **manifest, "files": self.files()}
        self.add(MANIFEST, json.dumps(content, indent=1) + "\n")
        with self.writing() as folder:
            if self._path.exists():
                os.rename(self._path, self._replaced)
            os.rename(folder, self._path)
            self._committed = True
            shutil.rmtree(self._replaced, ignore_errors=True)
        return self._path


def _stamp(file: Path) -> tuple[int, int]:
    """What changes when a file is written again: its size and time."""
    facts = file.stat()
    return facts.st_size, facts.st_mtime_ns


@dataclasses.dataclass(frozen=True)
class BundleFiles:
    """An existing bundle whose manifest was read and whose files were checked."""

    path: Path
    manifest: Mapping[str, Any] = dataclasses.field(repr=False)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Graph inputs in order."""
        return tuple(TensorSpec(i["name"], i["dtype"], tuple(i["shape"])) for i in self.manifest["inputs"])

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Graph outputs in order."""
        return tuple(TensorSpec(o["name"], o["dtype"], tuple(o["shape"])) for o in self.manifest["outputs"])

    @property
    def limits(self) -> RequestLimits:
        """What a request may hold.

        Raises:
            BundleError: HSTU-E803, if the manifest's entry is that of another family.
        """
        try:
            return RequestLimits(**with_names(self.manifest["limits"], RequestLimits))
        except ValueError as error:
            raise BundleError(
                "HSTU-E803", "the manifest's limits cannot be used", str(error), "build the bundle again"
            ) from error

    @property
    def plugin_library(self) -> Path | None:
        """The self-registering plugin library, where the bundle has one."""
        return self.path / SELF_REGISTERING if SELF_REGISTERING in self.manifest["files"] else None

    @property
    def contextual_len(self) -> int:
        """Rows in front of every history: the contextual tokens of a ranking model."""
        return self.ranking.contextual_len if self.ranking is not None else 0

    @functools.cached_property
    def ranking(self) -> RankingSpec | None:
        """What a ranking model takes; None for a retrieval model."""
        entry = self.manifest.get("ranking")
        return RankingSpec.from_manifest(entry) if entry is not None else None

    @functools.cached_property
    def retrieval(self) -> RetrievalSpec | None:
        """What a retrieval model built with --incremental takes; None for every other."""
        entry = self.manifest.get("retrieval")
        return RetrievalSpec.from_manifest(entry) if entry is not None else None

    @property
    def has_engine(self) -> bool:
        """Whether an engine was built of the graph that answers a request by itself, in one piece."""
        return ENGINE_FILE in self.manifest["files"]

    @property
    def kernels_library(self) -> Path | None:
        """The library of kernels that run between the engines of graphs that were cut, where the bundle has one."""
        entry = self.manifest.get("kernels")
        return None if entry is None else self.path / entry["file"]

    def graph_ends(self, graph: str) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """Inputs and outputs of a graph in order, dynamic axes by name.

        Raises:
            BundleError: HSTU-E803, if the manifest has no such graph.
        """
        entries = {entry["name"]: entry for entry in self.manifest["graphs"]}
        if graph not in entries:
            raise BundleError(
                "HSTU-E803",
                f"the manifest has no graph {graph}",
                f"its graphs are {', '.join(entries)}",
                "build the bundle again",
            )
        entry = entries[graph]
        inputs, outputs = (
            tuple(TensorSpec(each["name"], each["dtype"], tuple(each["shape"])) for each in entry[side])
            for side in ("inputs", "outputs")
        )
        return inputs, outputs

    def fused_graph(self, graph: str) -> FusedFiles | None:
        """The files of a graph that was cut at its attentions; None for any other graph."""
        entries = {entry["name"]: entry.get("fused") for entry in self.manifest["graphs"]}
        entry = entries.get(graph)
        if entry is None:
            return None
        kernels = self.kernels_library
        assert kernels is not None  # whoever writes the one writes the other
        return FusedFiles(self.path / entry["schedule"], tuple(self.path / name for name in entry["engines"]), kernels)


def is_bundle(path: Path) -> bool:
    """Whether a folder claims to be a bundle."""
    return path.is_dir() and (path / MANIFEST).is_file()


def read_bundle(path: Path, check_files: bool = True) -> BundleFiles:
    """Read and check a bundle.

    Args:
        path: the folder.
        check_files: compare the sha256 of every file with the manifest.

    Raises:
        BundleError: HSTU-E803, listing every file that is missing or altered.
    """
    if not is_bundle(path):
        raise BundleError(
            "HSTU-E803",
            f"{path} is not a bundle",
            f"it has no {MANIFEST}",
            "pass the folder that `hstu-compile build` wrote",
        )
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version, files = manifest["format_version"], dict(manifest["files"])
        hashes = {name: str(facts["sha256"]) for name, facts in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(
            "HSTU-E803",
            f"{path / MANIFEST} cannot be read",
            f"{type(error).__name__}: {error}",
            "build the bundle again",
        ) from error
    if version != FORMAT_VERSION:
        raise BundleError(
            "HSTU-E803",
            f"{path} has bundle format {version}",
            f"this hstu-compile reads format {FORMAT_VERSION}",
            "build the bundle again with this version",
        )
    if wrong := manifest_problems(manifest):
        more = f"; and {len(wrong) - _MOST_LISTED} more" if len(wrong) > _MOST_LISTED else ""
        raise BundleError(
            "HSTU-E803",
            f"{path / MANIFEST} is not what a build writes",
            "; ".join(wrong[:_MOST_LISTED]) + more,
            "build the bundle again",
        )
    if check_files:
        problems = []
        for name, sha256 in hashes.items():
            if Path(name).name != name:
                problems.append(f"{name} is not a plain file name")
            elif not (path / name).is_file():
                problems.append(f"{name} is missing")
            elif file_sha256(path / name) != sha256:
                problems.append(f"{name} has another sha256 than the manifest records")
        if problems:
            raise BundleError("HSTU-E803", f"{path} is damaged", "; ".join(problems), "build the bundle again")
    return BundleFiles(path, manifest)


def open_graph(
    files: BundleFiles,
    graph: str,
    runtime: str,
    plugin_library: Path | None = None,
    use_gpu: bool = False,
    cuda_graphs: int = 0,
    graph_budget_bytes: int | None = None,
    buckets: Buckets | None = None,
) -> Session:
    """Open one graph of a bundle.

    Args:
        files: the bundle.
        graph: retrieval, packed, prefill, score or append.
        runtime: onnxruntime, tensorrt or tensorrt-rtx.
        plugin_library: plugin that the engine needs (tensorrt only); None takes the bundle's own.
        use_gpu: ONNX Runtime's CUDA provider.
        cuda_graphs: see `open_session`; also for graphs that were cut at their attentions.
        graph_budget_bytes: device memory that the CUDA graphs of a graph that was cut may take together; None sets no
            limit.
        buckets: sizes that requests are padded to, so that few sets of shapes come again and again: see
            `BucketedSession`. None runs every request at its own shapes.

    Raises:
        EngineError: HSTU-E401 or E404 if the runtime cannot be used.
        UsageError: HSTU-E901 for a plugin or CUDA graphs where there are none, or without an engine for the runtime, or
            for buckets that are none.
    """
    if buckets is None:
        return _open_exact(files, graph, runtime, plugin_library, use_gpu, cuda_graphs, graph_budget_bytes)
    if not isinstance(buckets, Buckets):
        raise UsageError(
            "HSTU-E901",
            "there are no such buckets",
            f"buckets is {buckets!r}",
            "pass hstu_compile.Buckets(), or None for exact shapes",
        )
    with contextlib.ExitStack() as opened:
        session = opened.enter_context(
            _open_exact(files, graph, runtime, plugin_library, use_gpu, cuda_graphs, graph_budget_bytes)
        )
        bucketed = BucketedSession(session, *files.graph_ends(graph), buckets)
        opened.pop_all()
        return bucketed


def _open_exact(
    files: BundleFiles,
    graph: str,
    runtime: str,
    plugin_library: Path | None,
    use_gpu: bool,
    cuda_graphs: int,
    graph_budget_bytes: int | None,
) -> Session:
    """One graph of a bundle, at the shapes that it is asked."""
    if plugin_library is not None and runtime != "tensorrt":
        raise UsageError(
            "HSTU-E901",
            f"{runtime} takes no plugins",
            f"{plugin_library} was given",
            "leave the plugin out, or use the runtime tensorrt",
        )
    allow_tf32 = files.manifest["precision"]["requested"] != "fp32"
    fused = files.fused_graph(graph)
    if fused is not None and runtime == FUSED_BACKEND:
        return open_fused_session(
            fused.schedule,
            fused.engines,
            fused.kernels,
            allow_tf32=allow_tf32,
            cuda_graphs=cuda_graphs,
            graph_budget_bytes=graph_budget_bytes,
        )
    if graph_budget_bytes is not None:
        raise UsageError(
            "HSTU-E901",
            f"{runtime} keeps no budget for CUDA graphs",
            f"graph_budget_bytes is {graph_budget_bytes}, and {graph} is not a graph that was cut at its attentions",
            "leave graph_budget_bytes out, or build with --attention fused",
        )
    onnx, engine = model_files(graph)
    arguments: dict[str, Any] = {"use_gpu": use_gpu} if runtime == "onnxruntime" else {}
    if runtime == "tensorrt":
        arguments["plugin_library"] = plugin_library or files.plugin_library
    if cuda_graphs:
        arguments["cuda_graphs"] = cuda_graphs
    return open_session(
        runtime,
        onnx=files.path / onnx,
        engine=files.path / engine if engine in files.manifest["files"] else None,
        allow_tf32=allow_tf32,
        **arguments,
    )


class Bundle:
    """A bundle that can be run. Close it, or use it as a context manager, to free the runtime's memory."""

    def __init__(self, files: BundleFiles, runtime: str, cuda_graphs: int = 0, buckets: Buckets | None = None) -> None:
        self.files, self.runtime, self._cuda_graphs, self._buckets = files, runtime, cuda_graphs, buckets

    @functools.cached_property
    def session(self) -> Session:
        """The runtime session, opened on first use."""
        main = "retrieval" if self.files.ranking is None else "packed"
        return open_graph(self.files, main, self.runtime, cuda_graphs=self._cuda_graphs, buckets=self._buckets)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Answer one request batch.

        Args:
            feeds: input name to array; `files.inputs` lists names, dtypes and shapes. A ranking bundle runs the graph
                `packed`; for cached histories see `open_ranking_session` and `open_retrieval_session`.

        Returns:
            Output name to array.

        Raises:
            RequestError: HSTU-E701 to E705, naming everything that is wrong with the request.
        """
        arrays = {name: np.asarray(array) for name, array in feeds.items()}
        if self.files.ranking is not None:
            return self.session.run(check_packed_request(arrays, self.files.ranking))
        return self.session.run(check_request(arrays, self.files.limits))

    def close(self) -> None:
        """Free the runtime."""
        if "session" in self.__dict__:
            self.session.close()
            del self.__dict__["session"]

    def __enter__(self) -> Bundle:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def load_bundle(
    path: str | os.PathLike[str],
    runtime: str = "onnxruntime",
    *,
    cuda_graphs: int = 0,
    buckets: Buckets | None = None,
) -> Bundle:
    """Open a bundle for running.

    Args:
        path: folder that `hstu-compile build` wrote.
        runtime: onnxruntime, tensorrt or tensorrt-rtx.
        cuda_graphs: see `open_graph`.
        buckets: likewise.

    Raises:
        BundleError: HSTU-E803, if it is not a bundle or a file was altered.
    """
    return Bundle(read_bundle(Path(path)), runtime, cuda_graphs, buckets)
