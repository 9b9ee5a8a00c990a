"""The deliverable: a folder whose manifest vouches for every file in it. Level 4.

Written beside its destination under a name that is not a bundle's, manifest last, then renamed in one step. A build
that is interrupted at any moment leaves either the old bundle, the new one, or nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_compile.artifacts import TensorSpec
from hstu_compile.errors import BundleError
from hstu_compile.plugin_library import SELF_REGISTERING
from hstu_compile.runtime.request import RequestLimits, check_request
from hstu_compile.runtime.session import Session, open_session

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
ONNX_FILE = "model.onnx"
ENGINE_FILE = "model.engine"
FEEDS_FILE = "feeds.json"
EAGER_FILE = "eager_outputs.json"
EXACT_FILE = "reference_outputs.json"
REPORT_JSON = "report.json"
REPORT_HTML = "report.html"


def _unwritable(path: Path, error: OSError) -> BundleError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return BundleError(
        "HSTU-E802",
        f"cannot write {path}",
        error.strerror or str(error),
        "free some disk space" if full else "choose a folder that you can write with -o DIR",
    )


@contextlib.contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turn an OSError of the block, which writes to `path`, into HSTU-E802."""
    try:
        yield
    except OSError as error:
        raise _unwritable(path, error) from error


def check_destination(path: Path, force: bool) -> None:
    """Refuse, before any work, a destination that cannot be written or must not be replaced.

    Raises:
        BundleError: HSTU-E801 if something is there that `force` does not cover; HSTU-E802 if it cannot be written.
    """
    if path.is_symlink() or path.exists():
        is_bundle = path.is_dir() and not path.is_symlink() and (path / MANIFEST).is_file()
        if not is_bundle and not (path.is_dir() and not path.is_symlink() and not any(path.iterdir())):
            raise BundleError(
                "HSTU-E801", f"{path} exists and is not a bundle", "it would be overwritten", "choose another -o DIR"
            )
        if is_bundle and not force:
            raise BundleError(
                "HSTU-E801", f"the bundle {path} exists", "it would be overwritten", "pass --force, or another -o DIR"
            )
    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass


class BundleWriter:
    """Collects files in a temporary folder; `commit` makes them a bundle, leaving the block without it removes them."""

    def __init__(self, path: Path, force: bool) -> None:
        self._path, self._force = path.absolute(), force
        self._folder: Path | None = None
        self._committed = False

    def __enter__(self) -> BundleWriter:
        check_destination(self._path, self._force)
        with writing_to(self._path):
            self._folder = Path(
                tempfile.mkdtemp(prefix=f".{self._path.name}.", suffix=".partial", dir=self._path.parent)
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._folder is not None and not self._committed:
            shutil.rmtree(self._folder, ignore_errors=True)

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

    def files(self) -> dict[str, dict[str, Any]]:
        """Size and sha256 of every file so far."""
        return {
            file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(self.folder.iterdir())
        }

    def commit(self, manifest: Mapping[str, Any]) -> Path:
        """Write the manifest and move the folder into place."""
        content = {"format_version": FORMAT_VERSION, **manifest, "files": self.files()}
        self.add(MANIFEST, json.dumps(content, indent=1) + "\n")
        with self.writing() as folder:
            folder.chmod(0o755)
            old = folder.with_suffix(".old")
            if self._path.exists():
                os.rename(self._path, old)
            os.rename(folder, self._path)
            self._committed = True
            shutil.rmtree(old, ignore_errors=True)
        return self._path


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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
        """What a request may hold."""
        return RequestLimits(**self.manifest["limits"])

    @property
    def plugin_library(self) -> Path | None:
        """The self-registering plugin library, where the bundle has one."""
        return self.path / SELF_REGISTERING if SELF_REGISTERING in self.manifest["files"] else None

    @property
    def has_engine(self) -> bool:
        """Whether an engine was built."""
        return ENGINE_FILE in self.manifest["files"]


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
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
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
    if check_files:
        problems = []
        for name, sha256 in hashes.items():
            if Path(name).name != name:
                problems.append(f"{name} is not a plain file name")
            elif not (path / name).is_file():
                problems.append(f"{name} is missing")
            elif _sha256(path / name) != sha256:
                problems.append(f"{name} has another sha256 than the manifest records")
        if problems:
            raise BundleError("HSTU-E803", f"{path} is damaged", "; ".join(problems), "build the bundle again")
    return BundleFiles(path, manifest)


class Bundle:
    """A bundle that can be run. Close it, or use it as a context manager, to free the runtime's memory."""

    def __init__(self, files: BundleFiles, runtime: str) -> None:
        self.files, self.runtime = files, runtime

    @functools.cached_property
    def session(self) -> Session:
        """The runtime session, opened on first use."""
        return open_session(
            self.runtime,
            onnx=self.files.path / ONNX_FILE,
            engine=self.files.path / ENGINE_FILE if self.files.has_engine else None,
            plugin_library=self.files.plugin_library if self.runtime == "tensorrt" else None,
        )

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Answer one request batch.

        Args:
            feeds: input name to array; `files.inputs` lists names, dtypes and shapes.

        Returns:
            Output name to array.

        Raises:
            RequestError: HSTU-E701 to E705, naming everything that is wrong with the request.
        """
        arrays = {name: np.asarray(array) for name, array in feeds.items()}
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


def load_bundle(path: str | Path, runtime: str = "onnxruntime") -> Bundle:
    """Open a bundle for running.

    Args:
        path: folder that `hstu-compile build` wrote.
        runtime: onnxruntime, tensorrt or tensorrt-rtx.

    Raises:
        BundleError: HSTU-E803, if it is not a bundle or a file was altered.
    """
    return Bundle(read_bundle(Path(path)), runtime)
