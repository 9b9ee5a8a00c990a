"""Headers like those of TensorRT-RTX, made from TensorRT 10's: the SDK that has the real ones is not everywhere.

What the loader uses of TensorRT-RTX and TensorRT 10 lacks is added to a copy. Fakes and program are compiled with the
same headers, so the order of virtual functions is of no matter; a program for the real library needs the real headers.
"""

from __future__ import annotations

import re
from pathlib import Path

#: What is added: header, the text that it goes in front of, and the text.
_ADDED = (
    (
        "NvInferImpl.h",
        "enum class ActivationType : int32_t;",
        "enum class DynamicShapesKernelSpecializationStrategy : int32_t;\nenum class CudaGraphStrategy : int32_t;\n",
    ),
    (
        "NvInferImpl.h",
        "    virtual void setExecutionContextAllocationStrategy("
        "ExecutionContextAllocationStrategy strategy) noexcept = 0;",
        "    virtual void setDynamicShapesKernelSpecializationStrategy(\n"
        "        DynamicShapesKernelSpecializationStrategy strategy) noexcept = 0;\n"
        "    virtual bool setCudaGraphStrategy(CudaGraphStrategy strategy) noexcept = 0;\n",
    ),
    (
        "NvInferImpl.h",
        "    virtual size_t updateDeviceMemorySizeForShapes() noexcept = 0;",
        "    virtual bool isStreamCapturable(cudaStream_t stream) const noexcept = 0;\n",
    ),
    (
        "NvInferRuntime.h",
        "class IRuntimeConfig : public INoCopy",
        "enum class DynamicShapesKernelSpecializationStrategy : int32_t\n{\n    kLAZY = 0,\n    kEAGER = 1,\n"
        "    kNONE = 2\n};\n"
        "enum class CudaGraphStrategy : int32_t\n{\n    kDISABLED = 0,\n    kWHOLE_GRAPH_CAPTURE = 1\n};\n",
    ),
    (
        "NvInferRuntime.h",
        "protected:\n    apiv::VRuntimeConfig* mImpl;",
        "    void setDynamicShapesKernelSpecializationStrategy(DynamicShapesKernelSpecializationStrategy s) noexcept\n"
        "    {\n        mImpl->setDynamicShapesKernelSpecializationStrategy(s);\n    }\n"
        "    bool setCudaGraphStrategy(CudaGraphStrategy s) noexcept\n"
        "    {\n        return mImpl->setCudaGraphStrategy(s);\n    }\n",
    ),
    (
        "NvInferRuntime.h",
        "protected:\n    apiv::VExecutionContext* mImpl;",
        "    bool isStreamCapturable(cudaStream_t stream) const noexcept\n"
        "    {\n        return mImpl->isStreamCapturable(stream);\n    }\n",
    ),
)
_VERSION = {"MAJOR": 1, "MINOR": 6, "PATCH": 1, "BUILD": 120}


def headers_version(include_dir: Path) -> tuple[int, int, int]:
    """(major, minor, patch) of headers of TensorRT or TensorRT-RTX."""
    text = (include_dir / "NvInferVersion.h").read_text("utf-8")
    found = [
        re.search(rf"^#define (?:NV_TENSORRT_{part}|TRT_{part}_\w+) (\d+)", text, re.MULTILINE)
        for part in ("MAJOR", "MINOR", "PATCH")
    ]
    major, minor, patch = (int(each[1]) for each in found if each is not None)
    return major, minor, patch


def write_rtx_headers(folder: Path, tensorrt10: Path) -> Path:
    """Make the headers; the version is that of the TensorRT-RTX which the loader was run with."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {path.name: path.read_text("utf-8") for path in sorted(tensorrt10.glob("*.h"))}
    for name, place, added in _ADDED:
        assert texts[name].count(place) == 1, f"{tensorrt10 / name} has {texts[name].count(place)} of {place!r}"
        texts[name] = texts[name].replace(place, added + place)
    version = texts["NvInferVersion.h"].replace("_ENTERPRISE", "_RTX")
    for part, number in _VERSION.items():
        version = re.sub(rf"(#define TRT_{part}_RTX) \d+", rf"\1 {number}", version)
    texts["NvInferVersion.h"] = version
    for name, text in texts.items():
        (folder / name).write_text(text, "utf-8")
    assert headers_version(folder)[0] == 1
    return folder
