"""The ahead-of-time compiler: plans, compiles without a GPU, caches, and writes C++ that a compiler accepts."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from hstu_compile.plugins.kernels import aot
from hstu_compile.plugins.kernels.aot import (
    ARCHS,
    KernelImage,
    compile_variants,
    default_variants,
    variants_for,
    write_cpp_source,
)
from hstu_compile.plugins.kernels.tiles import SHARED_LIMIT, tile_configs
from hstu_compile.plugins.kernels.variants import compile_tasks, padded_dim

HEADER_DIR = Path(__file__).resolve().parents[2] / "plugins" / "common"
#: The cheapest half-precision variant, on every architecture.
CHEAP = variants_for("float16", 16, 16)


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(scope="module")
def images(cache_dir: Path) -> list[KernelImage]:
    return compile_variants(CHEAP, cache_dir=cache_dir)


def _ptx_of(image: KernelImage) -> str:
    return image.data.rstrip(b"\0").decode()


def test_every_architecture_gets_a_cubin_per_tactic(images: list[KernelImage]) -> None:
    cubins = [(i.sm, i.tactic) for i in images if not i.is_ptx]
    assert cubins == [(arch, tactic) for arch in ARCHS for tactic in (1, 2)]
    for image in images:
        assert image.name == "hstu_attention"
        if not image.is_ptx:
            assert image.data[:4] == b"\x7fELF"


def test_ptx_is_generic_and_readable_by_old_drivers(images: list[KernelImage]) -> None:
    (ptx,) = [i for i in images if i.is_ptx]
    assert (ptx.sm, ptx.data[-1:]) == (80, b"\0")
    text = _ptx_of(ptx)
    assert ".target sm_80\n" in text, "an 'a' target would not compile forward"
    assert ".version 7.8" in text
    assert "\0" not in text


def test_parameters_of_the_kernel_are_the_documented_abi(images: list[KernelImage]) -> None:
    text = _ptx_of(images[-1])
    head = text[text.index(".visible .entry hstu_attention(") : text.index(".reqntid")]
    kinds = [line.split()[1] for line in head.splitlines() if line.strip().startswith(".param")]
    pointers, scalars = [".u64"] * 17, [".f32"] * 2 + [".u32"] * 18
    scratch = [".u64"] * 2
    normal = {".b64": ".u64", ".b32": ".u32"}
    assert [normal.get(kind, kind) for kind in kinds] == pointers + scalars + scratch


def test_rows_that_may_be_columns_of_a_wider_tensor_are_still_copied_in_vectors(images: list[KernelImage]) -> None:
    text = _ptx_of(images[-1])
    assert set(re.findall(r"cp\.async\.c[ag]\.shared\.global .*, (0x[0-9a-f]+), ", text)) == {"0x10"}
    assert "ld.global.v4.b32" in text, "queries"
    assert "ld.global.b16" not in text, "keys and values one by one"


def test_no_image_names_this_machine(images: list[KernelImage], cache_dir: Path) -> None:
    here = str(Path(aot.__file__).parent).encode()
    for image in images:
        assert here not in image.data
        assert b"hstu_attention.py" not in image.data


def test_second_build_comes_from_the_cache(
    images: list[KernelImage], cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("compiled although cached")

    monkeypatch.setattr(aot.subprocess, "Popen", refuse)
    steps: list[tuple[int, int]] = []
    again = compile_variants(CHEAP, cache_dir=cache_dir, progress=lambda done, total: steps.append((done, total)))
    assert again == images
    assert steps == [(len(images), len(images))]


def test_damaged_cache_entry_is_compiled_again(images: list[KernelImage], cache_dir: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(cache_dir, store)
    task = next(t for t in compile_tasks(CHEAP, (80,)) if not t.is_ptx)
    (store / f"{aot._key(task)}.bin").write_bytes(b"cut short")
    again = compile_variants(CHEAP, cache_dir=store, jobs=1)
    assert again == images


def test_sources_edited_during_a_build_are_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    counter = iter(range(1000))
    monkeypatch.setattr(aot, "_key", lambda task: f"key{next(counter)}")
    with pytest.raises(RuntimeError, match=r"sources changed while it was compiled"):
        compile_variants(CHEAP, archs=(80,), cache_dir=tmp_path, jobs=1, with_ptx=False)
    assert not list(tmp_path.glob("key*"))


def test_image_lost_between_compiling_and_reading_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(aot, "_compile", lambda *_: None)
    with pytest.raises(RuntimeError, match=r"vanished from .*sm_80, float16"):
        compile_variants(CHEAP, archs=(80,), cache_dir=tmp_path, with_ptx=False)


def test_cache_key_follows_the_options_and_not_the_prose() -> None:
    task = compile_tasks(CHEAP, (90,))[0]
    reworded = dataclasses.replace(task, tile=dataclasses.replace(task.tile, reason="other words"))
    deeper = dataclasses.replace(task, tile=dataclasses.replace(task.tile, num_stages=task.tile.num_stages + 1))
    assert aot._key(task) == aot._key(reworded)
    assert aot._key(task) != aot._key(deeper)


#: Of which a test reads the PTX that nothing else makes: dtype and architecture.
PTX_READ = [("float16", 90), ("float16", 100), ("float16", 120), ("float32", 90)]


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], str]:
    """PTX of the cheapest variant of these, from a worker's own compile function in one fresh process."""
    script = (
        "import json\n"
        "from dataclasses import replace\n"
        "from hstu_compile.plugins.kernels import compile_worker, variants\n"
        "compile_worker._PTX_VERSION = None\n"
        "texts = []\n"
        f"for dtype, arch in {PTX_READ!r}:\n"
        "    variant = variants.variants_for(dtype, 16, 16)[0]\n"
        "    task = replace(variants.compile_tasks((variant,), (arch,), with_ptx=False)[0], is_ptx=True)\n"
        "    texts.append(compile_worker.compile_kernel(task)[0].decode())\n"
        "print(json.dumps(texts))\n"
    )
    folder = tmp_path_factory.mktemp("ptx")
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(PTX_READ, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize(
    ("arch", "instruction"),
    [(80, "mma.sync.aligned"), (90, "wgmma.mma_async"), (100, "tcgen05.mma"), (120, "mma.sync.aligned")],
)
def test_tensor_cores_of_each_generation_are_used(
    arch: int, instruction: str, ptx: dict[tuple[str, int], str], images: list[KernelImage]
) -> None:
    text = _ptx_of(images[-1]) if arch == 80 else ptx["float16", arch]
    assert f".target sm_{arch}" in text
    assert instruction in text


def test_float32_never_uses_tf32(ptx: dict[tuple[str, int], str]) -> None:
    text = ptx["float32", 90]
    assert "fma.rn.f32" in text
    assert "tf32" not in text


def test_cpp_source_compiles_and_holds_the_images(images: list[KernelImage], tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    source, data = write_cpp_source(images, tmp_path / "kernelImages.cpp")
    main = tmp_path / "main.cpp"
    main.write_text(
        '#include "hstuKernelImages.h"\n#include <cstdio>\n'
        "int main() {\n"
        "    for (size_t i = 0; i < kHstuNbKernelImages; ++i) {\n"
        "        HstuKernelImage const& m = kHstuKernelImages[i];\n"
        "        unsigned long sum = 0;\n"
        "        for (size_t j = 0; j < m.size; ++j) { sum = sum * 31 + m.data[j]; }\n"
        '        std::printf("%d %d %d %d %d %d %d %s %zu %lu\\n",\n'
        "            m.sm, m.isPtx, m.dtype, m.blockDqk, m.tactic, m.blockM, m.sharedBytes, m.name, m.size, sum);\n"
        "    }\n}\n"
    )
    program = tmp_path / "main"
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{HEADER_DIR}"]
    subprocess.run([compiler, *flags, str(source), str(main), "-o", str(program)], check=True)
    lines = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout.splitlines()
    expected = []
    for image in images:
        total = 0
        for byte in image.data:
            total = (total * 31 + byte) % 2**64
        numbers = (image.sm, int(image.is_ptx), 1, 16, image.tactic, image.block_m, image.shared_bytes)
        expected.append(f"{' '.join(map(str, numbers))} {image.name} {len(image.data)} {total}")
    assert lines == expected
    assert data.stat().st_size < sum(len(i.data) for i in images) + 64 * len(images)


def test_compile_failure_names_the_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = dataclasses.replace(compile_tasks(CHEAP, (80,), with_ptx=False)[0])
    broken = dataclasses.replace(broken, tile=dataclasses.replace(broken.tile, block_m=48))
    monkeypatch.setattr(aot, "compile_tasks", lambda *_, **__: (broken,))
    with pytest.raises(
        RuntimeError, match=r"did not compile for sm_80, float16, padded head dims 16 and 16, tactic 1: "
    ):
        compile_variants(CHEAP, archs=(80,), cache_dir=tmp_path)
    assert not list(tmp_path.glob("*.bin"))


def test_nothing_to_compile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no kernel variants"):
        compile_variants((), cache_dir=tmp_path)
    with pytest.raises(ValueError, match=r"compute capability \[75\]"):
        compile_variants(CHEAP, archs=(75, 80), cache_dir=tmp_path)
    with pytest.raises(ValueError, match="no kernel images"):
        write_cpp_source([], tmp_path / "x.cpp")
    quoted = tmp_path / 'a"b'
    with pytest.raises(ValueError, match="quote"):
        write_cpp_source([KernelImage(CHEAP[0], 80, False, 1, 64, 4, 0, "k", b"x")], quoted / "x.cpp")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "int8"}, "got 'int8'"),
        ({"block_dqk": 48}, "got 48 and 16"),
        ({"timestamp_bits": 64}, "with time_bias=False"),
        ({"time_bias": True, "timestamp_bits": 16}, "got 16"),
        ({"mask_kind": 2}, "got 2"),
    ],
)
def test_impossible_variants_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CHEAP[0], **change)  # type: ignore[arg-type]


def test_variants_of_a_model() -> None:
    (fixture,) = variants_for("float16", 50, 25, pos_bias=True, time_bias=True, timestamp_bits=32)
    assert (fixture.block_dqk, fixture.block_dv, fixture.aligned, fixture.timestamp_bits) == (64, 32, False, 32)
    both = variants_for("bfloat16", 128, 128, mask_kinds=(0, 1))
    assert [(v.mask_kind, v.aligned, v.timestamp_bits) for v in both] == [(0, True, 0), (1, True, 0)]
    for dim in (0, 257):
        with pytest.raises(ValueError, match=f"got {dim}"):
            padded_dim(dim)


def test_default_library_is_small_enough_to_build_cold() -> None:
    tasks = compile_tasks(default_variants(), ARCHS)
    assert len(set(tasks)) == len(tasks)
    assert len(tasks) <= 60, "about 2 s of one core each; the build has 2 cores and 2 minutes"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_tile_table_is_complete_and_reasoned(arch: int, dtype: str) -> None:
    assert arch in SHARED_LIMIT
    size = 4 if dtype == "float32" else 2
    for dqk in (16, 32, 64, 128, 256):
        for dv in (16, 32, 64, 128, 256):
            for pos_bias, time_bias in ((False, False), (True, False), (False, True), (True, True)):
                configs = tile_configs(arch, dtype, dqk, dv, pos_bias=pos_bias, time_bias=time_bias)
                assert [c.tactic for c in configs] == list(range(1, len(configs) + 1))
                assert len(configs) >= 2
                for c in configs:
                    assert c.reason
                    # One stage of every operand must fit; the compiled sizes are checked where kernels are compiled.
                    assert size * (c.block_m * dqk + c.block_n * (dqk + dv)) <= SHARED_LIMIT[arch]


# The widest tiles where there is the least shared memory, and in slow runs those of Hopper.
@pytest.mark.parametrize("arch", [86, pytest.param(90, marks=pytest.mark.slow)])
def test_compiled_kernels_fit_the_shared_memory_of_their_gpu(
    images: list[KernelImage], tmp_path: Path, arch: int
) -> None:
    widest = compile_variants(
        variants_for("float16", 256, 256, pos_bias=True), archs=(arch,), cache_dir=tmp_path, with_ptx=False
    )
    for image in [*images, *widest]:
        assert image.shared_bytes <= SHARED_LIMIT[image.sm], (image.sm, image.tactic)
