"""Runs attentions of a kernels' library through hstu_compile on the fake driver, and prints what was launched as JSON.

A program of its own, because a process has one libcuda.so.1: `kernels_probe.py LIBRARY`, with fakeDriver.cpp and
launchRecord.cpp, linked as libcuda.so.1, in a folder of LD_LIBRARY_PATH.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

from hstu_compile.artifacts import KernelCall, TensorSpec
from hstu_compile.errors import PluginError
from hstu_compile.op_schema import attention_contract
from hstu_compile.runtime.attention_kernels import KernelLibrary, Launch, Placed, Shape

ROWS, BATCH, HEADS, DIM = 300, 2, 2, 16
STREAM = 0x77


def call_of(dim: int) -> tuple[KernelCall, dict[str, TensorSpec]]:
    """A plain causal attention of float16, its rows and sequences open."""
    contract = attention_contract()
    given = {"alpha": 0.25, "scaling_seq_len": 200.0}
    attributes = {
        each.name: given.get(each.name, each.min if each.min is not None else 0) for each in contract.attributes
    }
    names = [each.name for each in contract.present_inputs(attributes)]
    tensors = {name: TensorSpec(name, "int32", ("B + 1",)) for name in names}
    tensors |= {name: TensorSpec(name, "float16", ("L", HEADS, dim)) for name in ("q", "k", "v", "out")}
    return KernelCall("HstuAttention", "layer 3", attributes, {name: name for name in names}, "out"), tensors


def main(library: Path) -> None:
    """Print kernels, launches (kernel, grid, stream, output), waits while enqueueing, a refusal, and what is left."""
    driver = ctypes.CDLL("libcuda.so.1")
    driver.recordedKernel.restype = ctypes.c_char_p
    driver.recordedStream.restype = driver.recordedOutput.restype = ctypes.c_void_p
    kernels = KernelLibrary(library)
    layers = [kernels.prepare(*call_of(DIM)) for _ in range(2)]
    waits, held = driver.recordedWaits(), driver.recordedAllocations()
    shapes: dict[str, Shape] = dict.fromkeys(("q", "k", "v"), (ROWS, HEADS, DIM))
    shapes |= dict.fromkeys(("q_offsets", "k_offsets"), (BATCH + 1,))
    places = {name: Placed(0x1000 * number, shape) for number, (name, shape) in enumerate(shapes.items(), 1)}
    # Columns of a tensor that is twice as wide.
    places["v"] = places["v"]._replace(row_stride=2 * HEADS * DIM)
    empty = {name: Placed(0, (0, HEADS, DIM)) if name in ("q", "k", "v") else place for name, place in places.items()}
    for number, layer in enumerate(layers):
        assert layer.workspace_bytes(shapes) == 0
        layer.enqueue(Launch(places, Placed(0x100000 * (number + 1), (ROWS, HEADS, DIM)), 0, 0), STREAM)
        layer.enqueue(Launch(empty, Placed(0, (0, HEADS, DIM)), 0, 0), STREAM)
    found = {
        "name": kernels.name,
        "launches": [
            [
                driver.recordedKernel(i).decode(),
                [driver.recordedGrid(i, axis) for axis in range(3)],
                driver.recordedStream(i),
                driver.recordedOutput(i),
            ]
            for i in range(driver.recordedLaunches())
        ],
        "waits": driver.recordedWaits() - waits,
        "held": held,
    }
    try:
        kernels.prepare(*call_of(200))
    except PluginError as error:
        found["refused"] = str(error)
    for layer in layers:
        layer.close()
    print(json.dumps({**found, "left": driver.recordedAllocations()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
