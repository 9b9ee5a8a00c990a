"""Compiles the loader's program, its fakes and its unit programs, once per test session."""

from __future__ import annotations

import fcntl
import hashlib
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from hstu_compile.plugin_library import KERNELS_LIBRARY, find_cuda_headers
from tests.cpp_loader.rtx_headers import headers_version

HERE = Path(__file__).parent
SAMPLE = HERE.parents[1] / "samples" / "cpp_loader"
KERNELS_API = HERE.parents[1] / "plugins" / "api"
WARNINGS = ("-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion", "-Werror")
#: Without the checks of every pointer that take a third of the compiler's time: the address sanitizer stops at what is
#: no object. `SANITIZE_POINTERS` behind them has those.
SANITIZE = (
    "-fsanitize=address,undefined",
    "-fno-sanitize=alignment,null,object-size,vptr",
    "-fno-sanitize-recover=undefined",
    "-g1",
)
#: For what makes numbers of a file's bytes in every run, and for the whole program in slow tests.
SANITIZE_POINTERS = ("-fsanitize=alignment,null,object-size",)
#: Interface with virtual functions, and the class of stubs for it; the last one came with TensorRT 10.
_STUBBED = {
    "VRuntime": "RuntimeStub",
    "VCudaEngine": "EngineStub",
    "VExecutionContext": "ContextStub",
    "IPluginRegistry": "RegistryStub",
    "VRuntimeConfig": "RuntimeConfigStub",
}
_NOT_EVERYWHERE = "VRuntimeConfig"


def built(cache: Path, include_dir: Path, options: Sequence[str], build: Callable[[Path], object]) -> Path:
    """A folder that `build` filled, made once for its sources: by one of several test processes, or earlier.

    Args:
        cache: folder that outlives the run.
        include_dir: headers of TensorRT.
        options: all else that the result depends on.
        build: fills a folder.
    """
    content = hashlib.sha256(repr([str(include_dir), headers_version(include_dir), *options]).encode())
    content.update(subprocess.run(["g++", "--version"], capture_output=True, check=True).stdout)
    for folder in (SAMPLE / "include", SAMPLE / "src", HERE / "fakes", HERE / "unit", KERNELS_API):
        for path in sorted(folder.rglob("*.[ch]pp")) + sorted(folder.rglob("*.h")):
            content.update(path.name.encode() + path.read_bytes())
    for path in (Path(__file__), Path(__file__).with_name("rtx_headers.py")):
        content.update(path.read_bytes())
    target = cache / content.hexdigest()[:16]
    with (cache / f"{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            # Under another name until it is complete: an interrupted build is no result.
            work = cache / f"{target.name}.partial"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            build(work)
            work.rename(target)
    return target


def run(command: Sequence[object]) -> None:
    """Run a tool; its output is the failure's text."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"


def compile_cpp(target: Path, sources: Sequence[Path], include_dir: Path, *options: str) -> Path:
    """Compile with every warning an error; the headers of TensorRT and CUDA are exempt."""
    command = [
        "g++",
        "-std=c++17",
        "-O1",
        *WARNINGS,
        "-I",
        SAMPLE / "include",
        "-I",
        SAMPLE / "src",
        "-I",
        KERNELS_API,
        "-I",
        target.parent,
    ]
    command += ["-isystem", include_dir, "-isystem", find_cuda_headers(), *options, *sources]
    run([*command, "-o", target, "-pthread", "-ldl"])
    return target


def write_stubs(path: Path, include_dir: Path) -> None:
    """A class for each interface whose every function ends the process: what a fake lacks must not be called."""
    headers = "\n".join((include_dir / name).read_text("utf-8") for name in sorted(_header_names(include_dir)))
    text = "#include <cstdio>\n#include <cstdlib>\n"
    text += "namespace nvinfer1\n{\nnamespace apiv\n{\n[[noreturn]] inline void unexpected(char const* name)\n{\n"
    text += (
        '    std::fprintf(stderr, "the fake TensorRT has no %s\\n", name);\n    std::abort();\n}\n} // namespace apiv\n'
    )
    for interface, stub in _STUBBED.items():
        found = re.search(rf"^class {interface}\b(?!;)[^;{{]*\{{(.*?)^\}};", headers, re.MULTILINE | re.DOTALL)
        if found is None and interface == _NOT_EVERYWHERE:
            continue
        assert found is not None, f"{include_dir} declares no {interface}"
        space = "apiv::" if interface.startswith("V") else ""
        body = re.sub(r"#if ENABLE_FEATURE_DISABLE_RUNTIME_ALLOCATION.*?#endif[^\n]*", "", found[1], flags=re.DOTALL)
        text += "namespace apiv\n{\n" if space else ""
        text += f"class {stub} : public {space}{interface}\n{{\npublic:\n"
        for declaration in re.findall(r"virtual ([^;{]*?\))( const)?\s*(noexcept)?\s*= 0;", body):
            signature = re.sub(r"//[^\n]*|\bTRT_NODISCARD\b", "", declaration[0])
            name = re.search(r"(~?\w+)\(", signature)
            assert name is not None
            if name[1].startswith("~"):
                continue
            head = " ".join([*signature.split(), *declaration[1:], "override"])
            text += f'    {head} {{ apiv::unexpected("{name[1]}"); }}\n'
        text += "};\n" + ("} // namespace apiv\n" if space else "")
    path.write_text(text + "} // namespace nvinfer1\n", "utf-8")


def _header_names(include_dir: Path) -> list[str]:
    # What NvInferRuntime.h includes; those of builders and parsers are not part of it.
    wanted = ("NvInferImpl.h", "NvInferRuntime.h", "NvInferRuntimeCommon.h", "NvInferRuntimeBase.h")
    return [name for name in wanted if (include_dir / name).is_file()]


def build_fakes(folder: Path, include_dir: Path, *options: str) -> None:
    """libcuda.so.1, TensorRT's library, two plugin libraries and one of kernels, which LD_LIBRARY_PATH leads to."""
    folder.mkdir(parents=True, exist_ok=True)
    write_stubs(folder / "stubs.inc", include_dir)
    fakes, major = HERE / "fakes", headers_version(include_dir)[0]
    # Interfaces of TensorRT hide functions of their implementations by design, and deprecate some that must be there.
    shared = (
        "-shared",
        "-fPIC",
        "-Wno-deprecated-declarations",
        "-Wno-unused-parameter",
        "-Wno-conversion",
        "-Wno-shadow",
    )
    cuda = folder / "libcuda.so.1"
    compile_cpp(cuda, [fakes / "fakeDriver.cpp"], include_dir, *shared, *options, "-Wl,-soname,libcuda.so.1")
    # TensorRT-RTX counts from 1.
    nvinfer = folder / (f"libtensorrt_rtx.so.{major}" if major < 8 else f"libnvinfer.so.{major}")
    sources = [fakes / "fakeTensorRt.cpp", cuda]
    compile_cpp(nvinfer, sources, include_dir, *shared, *options, f"-Wl,-soname,{nvinfer.name}", "-Wl,-rpath,$ORIGIN")
    kernels = [fakes / "fakeKernels.cpp", cuda]
    # Stripped, because every run of the program hashes it.
    compile_cpp(folder / KERNELS_LIBRARY, kernels, include_dir, *shared, *options, "-s", "-Wl,-rpath,$ORIGIN")
    for name, creator in (("libfake_plugin.so", "HstuAttention"), ("libother_plugin.so", "Another")):
        plugin = [fakes / "fakePlugin.cpp", nvinfer]
        compile_cpp(folder / name, plugin, include_dir, *shared, *options, f'-DNAME="{creator}"', "-Wl,-rpath,$ORIGIN")


def build_program(folder: Path, include_dir: Path, *options: str) -> Path:
    """hstu_score, as CMakeLists.txt compiles it but for the optimisation."""
    folder.mkdir(parents=True, exist_ok=True)
    return compile_cpp(folder / "hstu_score", [SAMPLE / "src" / "hstuScore.cpp"], include_dir, *options)


def build_readers(folder: Path, include_dir: Path) -> Path:
    """The readers' program, with the address and undefined-behaviour sanitizers.

    It has two translation units with every header in them: what is not inline would be there twice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    options, unit = (*SANITIZE, "-O0"), HERE / "unit"
    readers = compile_cpp(folder / "readers.o", [unit / "readers.cpp"], include_dir, *options, *SANITIZE_POINTERS, "-c")
    sources = [readers, unit / "sessionRules.cpp"]
    return compile_cpp(folder / "readers", sources, include_dir, *options, "-include", str(unit / "cacheRules.cpp"))
