from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hstu_compile.bundle import (
    FORMAT_VERSION,
    MANIFEST,
    Bundle,
    BundleFiles,
    BundleWriter,
    check_destination,
    is_bundle,
    load_bundle,
    read_bundle,
)
from hstu_compile.errors import BundleError
from hstu_compile.npz import save_npz

MANIFEST_FACTS: dict[str, Any] = {
    "status": "PASS",
    "precision": {"requested": "fp32"},
    "inputs": [],
    "outputs": [],
    "limits": {},
    "graphs": [],
}


def write(path: Path, content: str = "graph", force: bool = False) -> Path:
    with BundleWriter(path, force) as writer:
        writer.add("model.onnx", content)
        return writer.commit(MANIFEST_FACTS)


def everything_under(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def refused(path: Path, code: str, force: bool = False) -> BundleError:
    before = everything_under(path.parent) if path.parent.is_dir() else []
    with pytest.raises(BundleError) as caught:
        check_destination(path, force)
    assert (caught.value.code, caught.value.exit_code) == (code, 8)
    assert str(path) in caught.value.what
    assert caught.value.why
    assert caught.value.fix
    assert (everything_under(path.parent) if path.parent.is_dir() else []) == before
    return caught.value


# --- Writing ----------------------------------------------------------------------------------------------------------


def test_bundle_vouches_for_every_file(tmp_path: Path) -> None:
    path = write(tmp_path / "b.hstu")
    files = read_bundle(path)
    assert files.manifest["format_version"] == FORMAT_VERSION
    assert set(files.manifest["files"]) == {"model.onnx"}
    assert files.manifest["files"]["model.onnx"]["bytes"] == 5
    assert not files.has_engine
    assert everything_under(tmp_path) == ["b.hstu", f"b.hstu/{MANIFEST}", "b.hstu/model.onnx"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, MemoryError])
def test_interrupted_write_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def interrupted() -> None:
        with BundleWriter(tmp_path / "new" / "deep" / "b.hstu", False) as writer:
            writer.add("model.onnx", "graph")
            raise error

    with pytest.raises(error):
        interrupted()
    assert everything_under(tmp_path) == []


def test_leaving_without_commit_leaves_nothing(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "b.hstu", False) as writer:
        writer.add("model.onnx", "graph")
    assert everything_under(tmp_path) == []


def test_folders_that_others_use_meanwhile_stay(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "new" / "b.hstu", False) as writer:
        writer.add("model.onnx", "graph")
        (tmp_path / "new" / "mine.txt").write_text("mine")
    assert everything_under(tmp_path) == ["new", "new/mine.txt"]


@pytest.mark.parametrize("step", ["before the old one moves", "between", "after the new one is in place"])
def test_interrupt_while_replacing_leaves_one_whole_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = write(tmp_path / "b.hstu", "old")
    real_rename, calls = os.rename, []

    def interrupted(source: Any, target: Any) -> None:
        calls.append(source)
        if step == "before the old one moves" and len(calls) == 1:
            raise KeyboardInterrupt
        real_rename(source, target)
        if (step == "between" and len(calls) == 1) or (step == "after the new one is in place" and len(calls) == 2):
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(path, "new", force=True)
    read_bundle(path)
    assert (path / "model.onnx").read_text() == ("new" if step == "after the new one is in place" else "old")
    assert everything_under(tmp_path) == ["b.hstu", f"b.hstu/{MANIFEST}", "b.hstu/model.onnx"]


def test_force_replaces_whole(tmp_path: Path) -> None:
    path = tmp_path / "b.hstu"
    with BundleWriter(path, False) as writer:
        writer.add("model.onnx", "old")
        writer.add("model.engine", b"engine")
        writer.commit(MANIFEST_FACTS)
    write(path, "new", force=True)
    assert everything_under(tmp_path) == ["b.hstu", f"b.hstu/{MANIFEST}", "b.hstu/model.onnx"]
    assert (path / "model.onnx").read_text() == "new"


def test_reader_of_the_old_bundle_never_sees_a_part_of_the_new(tmp_path: Path) -> None:
    path = write(tmp_path / "b.hstu", "old")
    with BundleWriter(path, True) as writer:
        writer.add("model.onnx", "new")
        read_bundle(path)
        assert (path / "model.onnx").read_text() == "old"
        writer.commit(MANIFEST_FACTS)
    read_bundle(path)


# --- Destinations -----------------------------------------------------------------------------------------------------


def test_existing_bundle_needs_force(tmp_path: Path) -> None:
    path = write(tmp_path / "b.hstu")
    assert "--force" in refused(path, "HSTU-E801").fix
    check_destination(path, force=True)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", ["file", "folder", "link", "dangling link"])
def test_what_is_not_a_bundle_is_never_replaced(tmp_path: Path, kind: str, force: bool) -> None:
    path = tmp_path / "precious"
    if kind == "file":
        path.write_text("thesis")
    elif kind == "folder":
        path.mkdir()
        (path / "thesis.txt").write_text("thesis")
    elif kind == "link":
        path.symlink_to(write(tmp_path / "elsewhere"))
    else:
        path.symlink_to(tmp_path / "nowhere")
    assert "not a bundle" in refused(path, "HSTU-E801", force).what


def test_empty_folder_may_become_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "b.hstu").mkdir()
    read_bundle(write(tmp_path / "b.hstu"))


def test_destination_is_checked_without_creating_folders(tmp_path: Path) -> None:
    check_destination(tmp_path / "a" / "b" / "c.hstu", False)
    assert everything_under(tmp_path) == []
    read_bundle(write(tmp_path / "a" / "b" / "c.hstu"))


def test_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file" / "b.hstu", "HSTU-E802")


def test_name_that_no_file_system_takes(tmp_path: Path) -> None:
    refused(tmp_path / ("x" * 300), "HSTU-E802")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc, a folder that not even root writes to")
def test_unwritable_parent() -> None:
    with pytest.raises(BundleError) as caught:
        check_destination(Path("/proc/b.hstu"), False)
    assert caught.value.code == "HSTU-E802"
    assert "that you can write" in caught.value.fix


def test_permission_denied_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*args: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", denied)
    assert refused(tmp_path / "b.hstu", "HSTU-E802").why == "Permission denied"


def test_mount_point_is_refused_before_the_build_and_not_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b.hstu").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda self: True)
    assert "mount point" in refused(tmp_path / "b.hstu", "HSTU-E802").why


# --- Full disks -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, where mounting is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(path: Path) -> None:
    with BundleWriter(path, False) as writer:
        for index in range(64):
            writer.add(f"part{index}", bytes(4096))
        writer.commit(MANIFEST_FACTS)


def test_full_disk(small_disk: Path) -> None:
    with pytest.raises(BundleError) as caught:
        fill(small_disk / "b.hstu")
    assert (caught.value.code, caught.value.fix) == ("HSTU-E802", "free some disk space")
    assert everything_under(small_disk) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_disk_that_fills_up_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    real = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if self.name == "part7":
            real(self, data[:100])
            raise OSError(code, os.strerror(code))
        return real(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(BundleError) as caught:
        fill(tmp_path / "b.hstu")
    assert (caught.value.code, caught.value.fix) == ("HSTU-E802", "free some disk space")
    assert caught.value.why == os.strerror(code)
    assert everything_under(tmp_path) == []


# --- Signals ----------------------------------------------------------------------------------------------------------

SLOW_WRITER = """
import signal, sys
from pathlib import Path
from hstu_compile.bundle import BundleWriter

# Not what was inherited: a shell's background job ignores SIGINT.
for kind in (signal.SIGINT, signal.SIGTERM):
    signal.signal(kind, signal.default_int_handler)
path = Path(sys.argv[1])
facts = {"status": "PASS", "precision": {"requested": "fp32"}, "inputs": [], "outputs": [], "limits": {}, "graphs": []}
print("ready", flush=True)
while True:
    with BundleWriter(path, True) as writer:
        for index in range(20):
            writer.add(f"part{index}", bytes(1 << 16))
        writer.commit(facts)
"""


def test_interrupt_while_the_replaced_bundle_is_removed_leaves_only_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "b.hstu", "old")
    real_rmtree, calls = shutil.rmtree, []

    def interrupted(folder: Path, **options: Any) -> None:
        calls.append(folder)
        if len(calls) == 1:
            raise KeyboardInterrupt
        real_rmtree(folder, **options)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(path, "new", force=True)
    assert (path / "model.onnx").read_text() == "new"
    assert everything_under(tmp_path) == ["b.hstu", f"b.hstu/{MANIFEST}", "b.hstu/model.onnx"]


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_signal_at_any_moment_leaves_a_whole_bundle_or_nothing(tmp_path: Path, kind: signal.Signals) -> None:
    delays = np.random.default_rng(int(kind)).uniform(0.0, 0.05, 6)
    for index, delay in enumerate(delays):
        folder = tmp_path / str(index)
        folder.mkdir()
        command = [sys.executable, "-c", SLOW_WRITER, str(folder / "b.hstu")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(delay)
            process.send_signal(kind)
            try:
                assert process.wait(20) != 0
            finally:
                process.kill()
        names = [path.name for path in folder.iterdir()]
        assert names in ([], ["b.hstu"]), f"after {delay:.4f} s"
        if names:
            read_bundle(folder / "b.hstu")


# --- Reading ----------------------------------------------------------------------------------------------------------


def damaged(path: Path, *seen: str) -> None:
    with pytest.raises(BundleError) as caught:
        read_bundle(path)
    assert (caught.value.code, caught.value.exit_code) == ("HSTU-E803", 8)
    assert caught.value.fix
    for text in seen:
        assert text in str(caught.value)


def edit_manifest(path: Path, **changes: Any) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps({**manifest, **changes}))


def test_every_tampered_and_missing_file_is_listed(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "b", False) as writer:
        for name in ("model.onnx", "model.engine", "report.html", "feeds.json"):
            writer.add(name, name)
        path = writer.commit(MANIFEST_FACTS)
    (path / "model.onnx").write_text("model.onny")
    (path / "report.html").write_bytes(b"report.htm")
    (path / "model.engine").unlink()
    damaged(path, "model.onnx has another sha256", "report.html has another sha256", "model.engine is missing")
    assert read_bundle(path, check_files=False).has_engine


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "sub/file", "..", ".", ""])
def test_manifest_cannot_point_outside_the_folder(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "b")
    (tmp_path / "outside").write_text("x")
    edit_manifest(path, files={name: {"sha256": "0" * 64}})
    damaged(path, "is not a plain file name" if "/" in name or name == "." else "is missing")


def test_link_to_other_content_is_damage(tmp_path: Path) -> None:
    path = write(tmp_path / "b")
    (tmp_path / "other").write_text("other")
    (path / "model.onnx").unlink()
    (path / "model.onnx").symlink_to(tmp_path / "other")
    damaged(path, "model.onnx has another sha256")
    (path / "model.onnx").unlink()
    (path / "model.onnx").symlink_to(tmp_path / "nowhere")
    damaged(path, "model.onnx is missing")


@pytest.mark.parametrize("version", [0, FORMAT_VERSION + 1, "1", None])
def test_other_format_versions_are_named(tmp_path: Path, version: object) -> None:
    path = write(tmp_path / "b")
    edit_manifest(path, format_version=version)
    damaged(path, f"format {version}", f"reads format {FORMAT_VERSION}")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"{}", b'{"format_version": 1}', b'{"format_version": 1, "files": 3}', b"\xff",
     b'{"format_version": 1, "files": {"a": {}}}', b'{"format_version": 1, "files": {"a": 1}}', b"[" * 200_000],
)  # fmt: skip
def test_manifest_that_is_not_one(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path / "b")
    (path / MANIFEST).write_bytes(content)
    damaged(path, MANIFEST)


def test_manifest_without_what_every_bundle_has(tmp_path: Path) -> None:
    path = write(tmp_path / "b")
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["inputs"], manifest["limits"], manifest["graphs"]
    (path / MANIFEST).write_text(json.dumps(manifest))
    damaged(path, "inputs is missing; limits is missing; graphs is missing")


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        (("inputs",), {"a": 1}, "inputs is {'a': 1}, not a list"),
        (("inputs", 0, "shape"), ["L", 1.5], "inputs[0].shape[1] is 1.5, not an integer or text"),
        (("limits", "max_batch"), True, "limits.max_batch is True, not an integer"),
        (("precision",), "fp32", "precision is 'fp32', not an object"),
        (("precision", "requested"), "fp8", "precision.requested is 'fp8', not one of fp32, fp16, bf16"),
        (("graphs",), [3], "graphs[0] is 3, not an object"),
        (("graphs",), [{"name": "retrieval", "onnx": "../x"}], "graphs[0].onnx is '../x', not a plain file name"),
        (("backend",), {}, "backend.name is missing"),
        (("ranking",), [1], "ranking is [1], not an object"),
        (("kernels",), {"file": None}, "kernels.file is None, not a plain file name"),
        (("verification",), {"session": {"eager_error": {"logits": "1"}}}, "eager_error.logits is '1', not a number"),
    ],
)
def test_a_manifest_that_was_edited_is_refused_by_the_name_of_what_is_wrong(
    tmp_path: Path, where: tuple[str | int, ...], value: object, said: str
) -> None:
    """It ended in a traceback, wherever the value was used first."""
    path = write(tmp_path / "b")
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["inputs"] = [{"name": "item_ids", "dtype": "int32", "shape": ["L"]}]
    entry = manifest
    for key in where[:-1]:
        entry = entry[key]
    entry[where[-1]] = value
    (path / MANIFEST).write_text(json.dumps(manifest))
    damaged(path, said)


@pytest.mark.parametrize(
    ("entry", "facts", "said"),
    [
        ({"engine": "model.engine"}, {}, "backend is missing, and a graph has an engine"),
        ({}, {"verification": {}, "backend": {"name": "onnx"}}, ""),
        ({}, {"verification": {"session": None}}, "graphs[0].verification is missing"),
        (
            {
                "fused": {"schedule": "s.json", "engines": []},
                "profiles": [{"name": "p", "min": {}, "opt": {}, "max": {}}],
            },
            {"backend": {"name": "tensorrt-rtx"}},
            "kernels is missing, and a graph is in segments",
        ),
    ],
)
def test_a_manifest_whose_entries_need_others_that_are_gone(
    tmp_path: Path, entry: dict[str, Any], facts: dict[str, Any], said: str
) -> None:
    """`inspect` and `verify` ended in a traceback."""
    path = write(tmp_path / "b")
    manifest = json.loads((path / MANIFEST).read_text())
    graph = {"name": "retrieval", "onnx": "model.onnx", "inputs": [], "outputs": [], **entry}
    (path / MANIFEST).write_text(json.dumps({**manifest, "graphs": [graph], **facts}))
    if said:
        damaged(path, said)
    else:
        assert read_bundle(path).manifest["graphs"] == [graph]


def test_a_manifest_that_is_wrong_everywhere_is_told_shortly(tmp_path: Path) -> None:
    path = write(tmp_path / "b")
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["inputs"] = list(range(30))
    (path / MANIFEST).write_text(json.dumps(manifest))
    damaged(path, "inputs[9] is 9, not an object; and 20 more")


def test_folders_and_files_that_are_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "absent", tmp_path / "file"):
        assert not is_bundle(path)
        damaged(path, "has no manifest.json")
    with pytest.raises(BundleError):
        load_bundle(tmp_path)


def test_bundle_closes_a_session_only_if_it_opened_one(tmp_path: Path) -> None:
    files = BundleFiles(tmp_path, {"files": {}})
    with Bundle(files, "onnxruntime") as bundle:
        pass
    bundle.close()


# --- Answers ----------------------------------------------------------------------------------------------------------


def test_answers_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.npz"
    save_npz(path, {"a": np.arange(3)})
    np.testing.assert_array_equal(np.load(path)["a"], [0, 1, 2])

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(BundleError, match="No space left"):
        save_npz(path, {"a": np.arange(4)})
    np.testing.assert_array_equal(np.load(path)["a"], [0, 1, 2])
    assert everything_under(tmp_path) == ["out.npz"]


def test_answers_to_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    for path in (tmp_path / "absent" / "out.npz", tmp_path):
        with pytest.raises(BundleError) as caught:
            save_npz(path, {"a": np.arange(3)})
        assert caught.value.code == "HSTU-E802"
    assert everything_under(tmp_path) == []
