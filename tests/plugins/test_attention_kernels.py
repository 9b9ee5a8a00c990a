"""The interface of the kernels' library, against a library in C that checks what it is given."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hstu_compile.artifacts import KernelCall, TensorSpec
from hstu_compile.errors import PluginError
from hstu_compile.op_schema import attention_contract, norm_contract
from hstu_compile.runtime.attention_kernels import API_VERSION, KernelLibrary, Launch, Placed

ROOT = Path(__file__).resolve().parents[2]
HEADER = ROOT / "plugins" / "api" / "hstuAttentionKernels.h"

# Copies q to out, multiplied by alpha, where everything it is given is what the test gives.
SOURCE = r"""
#include "hstuAttentionKernels.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct HstuAttention { double alpha; int32_t nbInputs; };
static int32_t failed(char* error, size_t capacity, char const* what, double seen)
{
    snprintf(error, capacity, "%s: %g", what, seen);
    return 7;
}
static HstuTensor const* find(HstuTensor const* tensors, int32_t count, char const* name)
{
    for (int32_t i = 0; i < count; ++i)
        if (strcmp(tensors[i].name, name) == 0) return &tensors[i];
    return NULL;
}
int32_t hstuAttentionKernelsApiVersion(void) { return VERSION; }
char const* hstuAttentionKernelsBuildId(void) { return "build-17"; }
int32_t hstuAttentionCreate(char const* nodeName, HstuAttribute const* attributes, int32_t nbAttributes,
    HstuTensor const* inputs, int32_t nbInputs, HstuTensor const* output, HstuAttention** attention, char* error,
    size_t errorCapacity)
{
    HstuTensor const* q = find(inputs, nbInputs, "q");
    *attention = NULL;
    if (strcmp(nodeName, "layer 3") != 0) return failed(error, errorCapacity, "node name", 0);
    if (q == NULL || q->type != kHSTU_FLOAT16) return failed(error, errorCapacity, "type of q", q ? q->type : -1);
    if (q->rank != 3 || q->dims[0] != -1 || q->dims[1] != 2 || q->dims[2] != 4)
        return failed(error, errorCapacity, "dims of q", q->dims[0]);
    if (strcmp(output->name, "out") != 0 || output->type != kHSTU_FLOAT16)
        return failed(error, errorCapacity, "output", output->type);
    for (int32_t i = 0; i < nbAttributes; ++i)
        if (strcmp(attributes[i].name, "alpha") == 0)
        {
            if (attributes[i].value < 0)
                return failed(error, errorCapacity, "no kernel for alpha", attributes[i].value);
            *attention = malloc(sizeof(HstuAttention));
            (*attention)->alpha = attributes[i].value;
            (*attention)->nbInputs = nbInputs;
            return 0;
        }
    return failed(error, errorCapacity, "alpha is missing", 0);
}
int32_t hstuAttentionWorkspace(HstuAttention const* attention, HstuTensor const* inputs, int32_t nbInputs,
    size_t* bytes, char* error, size_t errorCapacity)
{
    if (nbInputs != attention->nbInputs) return failed(error, errorCapacity, "inputs", nbInputs);
    *bytes = 100 * (size_t) find(inputs, nbInputs, "q")->dims[0];
    return 0;
}
int32_t hstuAttentionEnqueue(HstuAttention* attention, HstuTensor const* inputs, int32_t nbInputs,
    HstuTensor const* output, void* workspace, size_t workspaceBytes, void* stream, char* error, size_t errorCapacity)
{
    HstuTensor const* q = find(inputs, nbInputs, "q");
    if (stream != (void*) 0x1234) return failed(error, errorCapacity, "stream", 0);
    if (workspace == NULL || workspaceBytes != 100 * (size_t) q->dims[0])
        return failed(error, errorCapacity, "workspace", (double) workspaceBytes);
    uint16_t const* from = q->data;
    uint16_t* to = output->data;
    int64_t const width = q->dims[1] * q->dims[2];
    int64_t const stride = q->rowStride ? q->rowStride : width;
    if (find(inputs, nbInputs, "k")->rowStride != 0) return failed(error, errorCapacity, "rows of k", 0);
    for (int64_t i = 0; i < q->dims[0] * width; ++i)
        to[i] = (uint16_t) (from[i / width * stride + i % width] + attention->alpha);
    return 0;
}
void hstuAttentionDestroy(HstuAttention* attention) { free(attention); }

/* Adds x and gate. */
struct HstuNorm { int32_t nbInputs; };
int32_t hstuNormCreate(char const* nodeName, HstuAttribute const* attributes, int32_t nbAttributes,
    HstuTensor const* inputs, int32_t nbInputs, HstuTensor const* output, HstuNorm** norm, char* error,
    size_t errorCapacity)
{
    HstuTensor const* x = find(inputs, nbInputs, "x");
    *norm = NULL;
    if (x == NULL || x->rank != 2 || x->dims[0] != -1 || x->dims[1] != 8)
        return failed(error, errorCapacity, "dims of x", x ? x->dims[1] : -1);
    if (strcmp(output->name, "out") != 0 || find(inputs, nbInputs, "scale")->type != kHSTU_FLOAT32)
        return failed(error, errorCapacity, "output", output->type);
    if (strcmp(nodeName, "norm 3") != 0 || nbAttributes != 9 || strcmp(attributes[0].name, "epsilon") != 0)
        return failed(error, errorCapacity, "attributes", nbAttributes);
    *norm = malloc(sizeof(HstuNorm));
    (*norm)->nbInputs = nbInputs;
    return 0;
}
int32_t hstuNormEnqueue(HstuNorm* norm, HstuTensor const* inputs, int32_t nbInputs, HstuTensor const* output,
    void* stream, char* error, size_t errorCapacity)
{
    if (stream != (void*) 0x1234) return failed(error, errorCapacity, "stream", 0);
    if (nbInputs != norm->nbInputs) return failed(error, errorCapacity, "inputs", nbInputs);
    HstuTensor const* x = find(inputs, nbInputs, "x");
    HstuTensor const* gate = find(inputs, nbInputs, "gate");
    uint16_t const *left = x->data, *right = gate->data;
    uint16_t* to = output->data;
    for (int64_t i = 0; i < x->dims[0] * 8; ++i)
        to[i] = (uint16_t) (left[i] + right[i / 8 * gate->rowStride + i % 8]);
    return 0;
}
void hstuNormDestroy(HstuNorm* norm) { free(norm); }
"""


@pytest.fixture(scope="module")
def compiler() -> str:
    found = shutil.which("cc") or shutil.which("gcc")
    if found is None:
        pytest.skip("no C compiler (cc or gcc)")
    return found


def built(compiler: str, folder: Path, version: int) -> Path:
    source, library = folder / f"kernels{version}.c", folder / f"libkernels{version}.so"
    source.write_text(SOURCE)
    flags = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", f"-DVERSION={version}", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, f"-I{HEADER.parent}", str(source), "-o", str(library)], check=True)
    return library


@pytest.fixture(scope="module")
def library(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(compiler, tmp_path_factory.mktemp("kernels"), API_VERSION)


def call_of(alpha: float = 3.0, name: str = "layer 3") -> tuple[KernelCall, dict[str, TensorSpec]]:
    attributes = {
        each.name: {"alpha": alpha, "scaling_seq_len": 1.0}.get(each.name, each.min if each.min is not None else 0)
        for each in attention_contract().attributes
    }
    names = [each.name for each in attention_contract().present_inputs(attributes)]
    tensors = {name: TensorSpec(name, "int32", ("B + 1",)) for name in names}
    tensors |= {name: TensorSpec(name, "float16", ("L", 2, 4)) for name in ("q", "k", "v", "out")}
    return KernelCall("HstuAttention", name, attributes, {name: f"t_{name}" for name in names}, "t_out"), tensors


def test_a_call_goes_through_the_interface_by_name(library: Path) -> None:
    kernels = KernelLibrary(library)
    assert kernels.name == "kernels build-17"
    call, tensors = call_of()
    kernel = kernels.prepare(call, tensors)
    q, out, workspace = np.arange(40, dtype=np.uint16), np.zeros(40, np.uint16), ctypes.create_string_buffer(500)
    shapes: dict[str, Any] = dict.fromkeys(call.inputs, (3,)) | dict.fromkeys(("q", "k", "v"), (5, 2, 4))
    assert kernel.workspace_bytes(shapes) == 500
    places = {name: Placed(q.ctypes.data, shape) for name, shape in shapes.items()}
    target = Placed(out.ctypes.data, (5, 2, 4))
    kernel.enqueue(Launch(places, target, ctypes.addressof(workspace), 500), 0x1234)
    assert out.tolist() == (q + 3).tolist()
    # The same as columns 3 to 10 of 13.
    wide = np.full((5, 13), 999, np.uint16)
    wide[:, 3:11] = q.reshape(5, 8)
    places["q"] = Placed(wide.ctypes.data + 6, (5, 2, 4), 13)
    out[:] = 0
    kernel.enqueue(Launch(places, target, ctypes.addressof(workspace), 500), 0x1234)
    assert out.tolist() == (q + 3).tolist()
    kernel.close()
    kernel.close()


def norm_call(width: int = 8) -> tuple[KernelCall, dict[str, TensorSpec]]:
    contract = norm_contract()
    attributes = {each.name: 1 for each in contract.attributes} | {"epsilon": 1e-6, "has_shift": 0, "concat": 0}
    names = [each.name for each in contract.present_inputs(attributes)]
    tensors = {name: TensorSpec(name, "float32", (width,)) for name in names}
    tensors |= {name: TensorSpec(name, "float16", ("L", width)) for name in ("x", "gate", "out")}
    return KernelCall("HstuNorm", "norm 3", attributes, {name: f"t_{name}" for name in names}, "t_out"), tensors


def test_a_norm_goes_through_the_interface_by_name(library: Path) -> None:
    kernels = KernelLibrary(library)
    kernel = kernels.prepare(*norm_call())
    rows, wide, out = np.arange(40, dtype=np.uint16), np.zeros((5, 13), np.uint16), np.zeros(40, np.uint16)
    wide[:, 3:11] = 100 * np.arange(1, 6)[:, None]
    places = {"x": Placed(rows.ctypes.data, (5, 8)), "gate": Placed(wide.ctypes.data + 6, (5, 8), 13)}
    places |= {name: Placed(rows.ctypes.data, (8,)) for name in ("scale", "bias")}
    assert kernel.workspace_bytes({name: place.shape for name, place in places.items()}) == 0
    launch = Launch(places, Placed(out.ctypes.data, (5, 8)), 0, 0)
    kernel.enqueue(launch, 0x1234)
    np.testing.assert_array_equal(out, rows + np.repeat(100 * np.arange(1, 6), 8))
    with pytest.raises(PluginError, match=r"HSTU-E505.*the norm norm 3 could not run[\s\S]*hstuNormEnqueue: stream: 0"):
        kernel.enqueue(launch, 1)
    kernel.close()
    kernel.close()
    with pytest.raises(PluginError, match=r"hstuNormCreate: dims of x: 9"):
        kernels.prepare(*norm_call(9))


def test_a_refusal_is_told_in_the_librarys_words(library: Path) -> None:
    kernels = KernelLibrary(library)
    with pytest.raises(PluginError, match=r"HSTU-E505.*layer 3[\s\S]*no kernel for alpha: -2"):
        kernels.prepare(*call_of(alpha=-2.0))
    kernel = kernels.prepare(*call_of())
    with pytest.raises(PluginError, match=r"hstuAttentionEnqueue: stream: 0"):
        kernel.enqueue(Launch({"q": Placed(0, (0, 2, 4))}, Placed(0, (0, 2, 4)), 0, 0), 1)
    kernel.close()


def test_another_version_of_the_interface_is_refused(compiler: str, tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=r"HSTU-E504.*version 3[\s\S]*speaks version 2"):
        KernelLibrary(built(compiler, tmp_path, API_VERSION + 1))


def test_a_file_that_is_no_such_library_is_refused(tmp_path: Path) -> None:
    nothing = tmp_path / "libnothing.so"
    nothing.write_bytes(b"no ELF")
    with pytest.raises(PluginError, match=r"HSTU-E504.*libnothing.so cannot be loaded"):
        KernelLibrary(nothing)


def test_the_header_says_what_this_side_assumes() -> None:
    text = HEADER.read_text()
    assert f"#define HSTU_ATTENTION_KERNELS_API_VERSION {API_VERSION}\n" in text
    assert "#define HSTU_MAX_RANK 8\n" in text
    for name, code in (("FLOAT32", 0), ("FLOAT16", 1), ("BFLOAT16", 2), ("INT32", 3), ("INT64", 4)):
        assert f"kHSTU_{name} = {code}" in text
