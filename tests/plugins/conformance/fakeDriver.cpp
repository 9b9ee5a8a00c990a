//! A libcuda.so.1 for a machine without a GPU: an H100 that launches nothing and records what it was asked. Device memory
//! is host memory. FAKE_CUDA_VERSION is the driver's version.

#include "fakeDriver.h"

#include <cstdlib>
#include <cstring>
#include <map>

namespace
{

fake::Calls calls;
std::map<CUfunction, std::pair<std::string, unsigned char const*>> functions;
int primary = 0;
CUcontext const primaryContext = reinterpret_cast<CUcontext>(&primary);
CUcontext currentContext = primaryContext;

} // namespace

extern "C" fake::Calls* fakeCalls()
{
    return &calls;
}

extern "C" CUresult cuInit(unsigned)
{
    return CUDA_SUCCESS;
}

extern "C" CUresult cuGetErrorName(CUresult, char const** text)
{
    *text = "FAKE_ERROR";
    return CUDA_SUCCESS;
}

extern "C" CUresult cuGetErrorString(CUresult, char const** text)
{
    *text = "an error of the fake driver";
    return CUDA_SUCCESS;
}

extern "C" CUresult cuDriverGetVersion(int* version)
{
    char const* const named = std::getenv("FAKE_CUDA_VERSION");
    *version = named != nullptr ? std::atoi(named) : 13000;
    return CUDA_SUCCESS;
}

extern "C" CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice)
{
    *value = which == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR  ? 9
             : which == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT ? 132
                                                                  : 0;
    return CUDA_SUCCESS;
}

extern "C" CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice)
{
    *context = primaryContext;
    return CUDA_SUCCESS;
}

extern "C" CUresult cuCtxGetCurrent(CUcontext* context)
{
    *context = currentContext;
    return CUDA_SUCCESS;
}

extern "C" CUresult cuCtxSetCurrent(CUcontext context)
{
    currentContext = context;
    return CUDA_SUCCESS;
}

extern "C" CUresult cuCtxGetDevice(CUdevice* device)
{
    *device = 0;
    return CUDA_SUCCESS;
}

extern "C" CUresult cuModuleLoadData(CUmodule* module, void const* image)
{
    ++calls.waits;
    *module = static_cast<CUmodule>(const_cast<void*>(image));
    return CUDA_SUCCESS;
}

extern "C" CUresult cuModuleUnload(CUmodule)
{
    ++calls.waits;
    return CUDA_SUCCESS;
}

extern "C" CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, char const* name)
{
    *function = reinterpret_cast<CUfunction>(module);
    functions[*function] = {name, reinterpret_cast<unsigned char const*>(module)};
    return calls.result;
}

extern "C" CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int)
{
    return CUDA_SUCCESS;
}

extern "C" CUresult cuMemAlloc_v2(CUdeviceptr* address, size_t bytes)
{
    ++calls.allocations;
    ++calls.waits;
    void* const memory = std::malloc(bytes);
    std::memset(memory, 0xFF, bytes);
    *address = reinterpret_cast<CUdeviceptr>(memory);
    return CUDA_SUCCESS;
}

extern "C" CUresult cuMemFree_v2(CUdeviceptr address)
{
    --calls.allocations;
    ++calls.waits;
    std::free(reinterpret_cast<void*>(address));
    return CUDA_SUCCESS;
}

extern "C" CUresult cuMemsetD32Async(CUdeviceptr address, unsigned value, size_t count, CUstream)
{
    for (size_t i = 0; i < count; ++i)
    {
        reinterpret_cast<unsigned*>(address)[i] = value;
    }
    return CUDA_SUCCESS;
}

extern "C" CUresult cuStreamSynchronize(CUstream)
{
    ++calls.waits;
    return CUDA_SUCCESS;
}

// Under another name, because cuda.h declares this one with types that CUDA 11's lacks.
extern "C" CUresult fakeTensorMapEncodeTiled(hstu::TensorMap* map, int type, uint32_t rank, void* address,
    uint64_t const* dims, uint64_t const* strides, uint32_t const* box, uint32_t const* steps, int interleave,
    int swizzle, int promotion, int fill) __asm__("cuTensorMapEncodeTiled");

extern "C" CUresult fakeTensorMapEncodeTiled(hstu::TensorMap* map, int type, uint32_t rank, void* address,
    uint64_t const* dims, uint64_t const* strides, uint32_t const* box, uint32_t const* steps, int interleave,
    int swizzle, int promotion, int fill)
{
    calls.maps.push_back({type, address, {dims, dims + rank}, {strides, strides + rank - 1}, {box, box + rank},
        {steps, steps + rank}, {interleave, swizzle, promotion, fill}});
    bool const isAligned = reinterpret_cast<uintptr_t>(map) % 64 == 0 && reinterpret_cast<uintptr_t>(address) % 16 == 0;
    map->words[0] = calls.maps.size() - 1;
    return isAligned && address != nullptr ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

extern "C" CUresult fakeLaunchKernelEx(hstu::LaunchConfig const* config, CUfunction function, void** arguments,
    void**) __asm__("cuLaunchKernelEx");

extern "C" CUresult fakeLaunchKernelEx(
    hstu::LaunchConfig const* config, CUfunction function, void** arguments, void**)
{
    auto const& [name, image] = functions.at(function);
    hstu::LaunchConfig const& c = *config;
    bool const isCluster = c.numAttributes == 1 && c.attributes->id == 4 && c.attributes->blocks[1] == 1
                           && c.attributes->blocks[2] == 1;
    if (c.numAttributes != 0 && !isCluster)
    {
        return CUDA_ERROR_INVALID_VALUE;
    }
    fake::Launch launch{name, image, {c.grid[0], c.grid[1], c.grid[2]}, {c.block[0], c.block[1], c.block[2]},
        isCluster ? c.attributes->blocks[0] : 1, c.sharedBytes, c.stream, {}, {}, {}};
    for (int const i : name == "hopperCache" ? std::vector<int>{0, 1, 2, 4, 5} : std::vector<int>{0, 1, 2})
    {
        launch.maps.push_back(calls.maps.at(static_cast<hstu::TensorMap const*>(arguments[i])->words[0]));
    }
    launch.parameters = *static_cast<hstu::AttentionParameters const*>(arguments[3]);
    calls.launches.push_back(launch);
    return c.grid[0] % launch.cluster == 0 ? calls.result : CUDA_ERROR_INVALID_VALUE;
}

extern "C" CUresult cuLaunchKernel(CUfunction function, unsigned gridX, unsigned gridY, unsigned gridZ, unsigned blockX,
    unsigned blockY, unsigned blockZ, unsigned sharedBytes, CUstream stream, void** arguments, void**)
{
    auto const& [name, image] = functions.at(function);
    bool const isNorm = name.find("norm") != std::string::npos;
    size_t const firstRowStride = isNorm ? 10 : 26;
    std::vector<int32_t> rowStrides;
    for (size_t i = 0; i < (isNorm ? 2 : 3); ++i)
    {
        rowStrides.push_back(*static_cast<int32_t const*>(arguments[firstRowStride + i]));
    }
    std::vector<uint64_t> addresses;
    for (size_t i = 0; i < (isNorm ? 6 : 0); ++i)
    {
        addresses.push_back(*static_cast<uint64_t const*>(arguments[i]));
    }
    calls.launches.push_back({name, image, {gridX, gridY, gridZ}, {blockX, blockY, blockZ}, 1, sharedBytes, stream, {},
        {}, rowStrides, addresses});
    return CUDA_SUCCESS;
}
