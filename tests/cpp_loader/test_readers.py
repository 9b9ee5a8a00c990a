"""The loader's own readers of JSON, .npz, .npy and hashes: what Python writes is read, what is hostile is refused."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import struct
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hstu_compile.polygraphy_files import save_feeds, save_outputs
from hstu_compile.runtime.schedule_file import schedule_text
from tests.cpp_loader.fake_bundle import graphs_of, retrieval_answers, retrieval_feeds, write_bundle
from tests.cpp_loader.fake_fused import schedule_of

REFUSED = 3


def run(readers: Path, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(readers), *map(str, words)], capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.parametrize("size", [0, 1, 55, 56, 63, 64, 65, 119, 120, (1 << 20) + 3])
def test_sha256_equals_hashlib(readers: Path, tmp_path: Path, size: int) -> None:
    content = random.Random(size).randbytes(size)
    (tmp_path / "file").write_bytes(content)
    assert run(readers, "sha256", tmp_path / "file").stdout.strip() == hashlib.sha256(content).hexdigest()


def random_json(source: random.Random, depth: int = 0) -> Any:
    kind = source.randrange(7 if depth < 4 else 5)
    if kind == 5:
        return [random_json(source, depth + 1) for _ in range(source.randrange(4))]
    if kind == 6:
        return {f"k{source.randrange(99)}é\n": random_json(source, depth + 1) for _ in range(source.randrange(4))}
    return [
        None,
        source.random() < 0.5,
        source.randrange(-(2**52), 2**52),
        source.uniform(-1e30, 1e30),
        "".join(source.choice('a"\\/\b\té€😀\x1f') for _ in range(source.randrange(8))),
    ][kind]


def test_json_reads_what_python_writes(readers: Path, tmp_path: Path) -> None:
    source = random.Random(0)
    values = [random_json(source) for _ in range(400)] + [float("inf"), -float("inf"), {"a": []}, {}, ""]
    lines = [json.dumps(value, ensure_ascii=source.random() < 0.5) for value in values]
    (tmp_path / "lines").write_text("\n".join(lines) + "\n", "utf-8")
    shown = run(readers, "json-lines", tmp_path / "lines").stdout.splitlines()
    assert len(shown) == len(values)
    for value, line in zip(values, shown, strict=True):
        assert line.startswith("ok "), f"{value!r} was refused"
        text = line.removeprefix("ok ").replace("inf", "Infinity")
        assert json.loads(text) == value


def test_a_locale_with_a_decimal_comma_changes_no_number(readers: Path, tmp_path: Path) -> None:
    """With strtod, 0.5 is read as 0, and an error bound of 1.5e-3 as 1, which nearly every answer is within."""
    if shutil.which("localedef") is None:
        pytest.skip("localedef is not installed")
    made = subprocess.run(["localedef", "-i", "de_DE", "-f", "UTF-8", str(tmp_path / "de_DE.UTF-8")], check=False)
    if made.returncode != 0:
        pytest.skip("the sources of the locale de_DE are not installed")
    (tmp_path / "lines").write_text("[0.5,-1.25e-3]\n", "utf-8")
    environment = {**os.environ, "LOCPATH": str(tmp_path), "LC_ALL": "de_DE.UTF-8"}
    done = subprocess.run(
        [str(readers), "json-lines", str(tmp_path / "lines")],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert json.loads(done.stdout.removeprefix("ok ")) == [0.5, -1.25e-3]


HOSTILE_JSON = [
    *(
        "",
        " ",
        "{",
        "[",
        "[1,]",
        "{,}",
        '{"a"}',
        '{"a":}',
        '{"a":1,}',
        "[1 2]",
        "1 2",
        "01",
        "-",
        "1.",
        ".5",
        "1e",
        "+1",
    ),
    *("1e999", "nul", "True", "'a'", '"', '"\\x"', '"\\u12"', '"\\ud800"', '"\\udc00"', '"\\ud800\\u0041"', '"\x01"'),
    *('{"a":1,"a":2}', "[" * 100_000, '{"a":' * 70 + "1" + "}" * 70, "9" * 500, "\ufeff1", "// 1"),
]


def test_json_refuses_what_is_no_json(readers: Path, tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("\n".join(HOSTILE_JSON) + "\n", "utf-8")
    done = run(readers, "json-lines", tmp_path / "lines")
    assert done.returncode == 0, done.stderr
    taken = [text for text, line in zip(HOSTILE_JSON, done.stdout.splitlines(), strict=True) if line != "refused"]
    assert taken == []


ARRAYS = {
    "f8": np.linspace(-1, 1, 6).reshape(2, 3),
    "f4": np.arange(4, dtype=np.float32),
    "f2": np.array([[1.5], [-2.25]], np.float16),
    "i8": np.array([-(2**40), 2**40]),
    "i4": np.zeros((3, 0, 2), np.int32),
    "i1": np.array([-1, 5], np.int8),
    "u1": np.array([0, 255], np.uint8),
    "b1": np.array([True, False]),
    "scalar": np.array(3.0),
    "fortran": np.asfortranarray(np.arange(3.0)),
}


def test_npz_of_every_type_comes_back_unchanged(readers: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", **ARRAYS)  # type: ignore[arg-type]
    done = run(readers, "npz", tmp_path / "in.npz", tmp_path / "out.npz")
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out.npz") as out:
        assert set(out.files) == set(ARRAYS)
        for name, array in ARRAYS.items():
            assert out[name].dtype == array.dtype
            assert np.array_equal(out[name], array)
    # What it wrote itself it reads again, and writes the same bytes.
    assert run(readers, "npz", tmp_path / "out.npz", tmp_path / "again.npz").returncode == 0
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "out.npz").read_bytes()


def npy(array: np.ndarray[Any, Any]) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def archive(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as file:
        for name, data in entries.items():
            file.writestr(name, data)
    return content.getvalue()


def patched(content: bytes, offset: int, layout: str, value: int, mark: bytes = b"PK\x01\x02") -> bytes:
    """Change a number of the first record with that mark."""
    at = content.index(mark) + offset
    return content[:at] + struct.pack(layout, value) + content[at + struct.calcsize(layout) :]


GOOD = archive({"a.npy": npy(np.arange(50)), "b.npy": npy(np.ones((2, 2), np.float32))})
END = b"PK\x05\x06"
HOSTILE_NPZ = {
    "is compressed": archive({"a.npy": npy(np.zeros(100_000))}, zipfile.ZIP_DEFLATED),
    "is not an .npz archive": b"not a zip",
    "or it is cut off": GOOD[:-5],
    "is encrypted": patched(GOOD, 8, "<H", 1),
    "another checksum": patched(GOOD, 16, "<I", 1),
    "is damaged": patched(GOOD, 42, "<I", 2**31),
    "lies outside the file": patched(patched(GOOD, 20, "<I", 2**30), 24, "<I", 2**30),
    "its directory lies outside": patched(GOOD, 16, "<I", 2**31, END),
    "zip64": patched(GOOD, 16, "<I", 2**32 - 1, END),
    "several files": patched(GOOD, 4, "<H", 1, END),
    "its directory is damaged": patched(patched(GOOD, 8, "<H", 3, END), 10, "<H", 3, END),
    "is not a .npy array": archive({"a.txt": b"hello"}),
    "does not begin as one": archive({"a.npy": b"hello world"}),
    "its header is cut off": archive({"a.npy": npy(np.arange(3))[:30]}),
    "its type is '|O'": archive({"a.npy": npy(np.arange(3)).replace(b"'<i8'", b"'|O' ")}),
    "little-endian": archive({"a.npy": npy(np.arange(3, dtype=">i4"))}),
    "Fortran order": archive({"a.npy": npy(np.asfortranarray(np.ones((2, 2))))}),
    "and it holds": archive({"a.npy": npy(np.arange(3)).replace(b"(3,)", b"(9,)")}),
    "at most 8 sizes": archive({"a.npy": npy(np.arange(3)).replace(b"(3,)", b"(-3,)")}),
    "unexpected key": archive({"a.npy": npy(np.arange(3)).replace(b"'descr'", b"'other'")}),
}


@pytest.mark.parametrize("text", HOSTILE_NPZ)
def test_hostile_npz_is_refused_with_the_reason(readers: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "in.npz").write_bytes(HOSTILE_NPZ[text])
    done = run(readers, "npz", tmp_path / "in.npz", tmp_path / "out.npz")
    assert done.returncode == REFUSED, done.stderr
    assert text in done.stderr
    assert not (tmp_path / "out.npz").exists()


def test_entries_that_share_bytes_are_refused(readers: Path, tmp_path: Path) -> None:
    """The quoted zip bomb: many entries of one large piece of data."""
    data = npy(np.zeros(1000))
    content = archive({f"{i:03d}.npy": data for i in range(200)})
    first = content.index(b"PK\x01\x02")
    directory = bytearray(content[first:])
    at = 0
    while (at := directory.find(b"PK\x01\x02", at)) >= 0:
        directory[at + 42 : at + 46] = struct.pack("<I", 0)
        at += 4
    # The shared data once, then a directory that names it two hundred times.
    local = content[: 30 + 7 + len(data)]
    directory[-6:-2] = struct.pack("<I", len(local))
    (tmp_path / "in.npz").write_bytes(local + bytes(directory))
    done = run(readers, "npz", tmp_path / "in.npz", tmp_path / "out.npz")
    assert done.returncode == REFUSED, done.stderr
    assert "over another array" in done.stderr


def test_numpys_compressed_archive_names_the_fix(readers: Path, tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "in.npz", a=np.zeros(1000))
    done = run(readers, "npz", tmp_path / "in.npz", tmp_path / "out.npz")
    assert done.returncode == REFUSED
    assert "numpy.savez instead of numpy.savez_compressed" in done.stderr


@pytest.mark.parametrize("path", ["missing", "."])
def test_a_path_that_is_no_file_is_refused(readers: Path, tmp_path: Path, path: str) -> None:
    done = run(readers, "npz", tmp_path / path, tmp_path / "out.npz")
    assert done.returncode == REFUSED
    assert "cannot be read" in done.stderr


@pytest.mark.parametrize("kind", ["manifest", "schedule", "npz", "feeds", "outputs"])
def test_mutated_files_are_read_or_refused_and_nothing_else(readers: Path, tmp_path: Path, kind: str) -> None:
    """Mutations under the sanitizers; both outcomes must come up, or the mutations show nothing.

    Archives have a reader alone; four kinds share that of JSON.
    """
    feeds = [retrieval_feeds([3, 2], 0)]
    if kind == "manifest":
        file = write_bundle(tmp_path / "bundle", "ranking", (10, 14, 1)) / "manifest.json"
    elif kind == "schedule":
        file = tmp_path / "schedule.json"
        file.write_text(schedule_text(schedule_of(graphs_of("retrieval")[0])), "utf-8")
    elif kind == "npz":
        file = tmp_path / "feeds.npz"
        np.savez(file, **feeds[0])  # type: ignore[arg-type]
    else:
        file = tmp_path / "file.json"
        save_feeds(file, feeds) if kind == "feeds" else save_outputs(file, "r", [retrieval_answers(feeds[0])])
    count = 10_000 if kind == "npz" else 2_000
    done = run(readers, "fuzz", kind, file, count, 7)
    assert done.returncode == 0, done.stderr[-3000:]
    taken, refused = (int(word) for word in done.stdout.split() if word.isdigit())
    assert taken + refused == count
    assert taken > 0
    assert refused > count // 10
