#include "cudaDriver.h"

#include <dlfcn.h>

#include <string>

#include "pluginError.h"

namespace hstu
{
namespace
{

struct DriverState
{
    CudaDriver driver{};
    bool usable{false};
    std::string reason;
};

template <typename Function>
bool resolve(void* library, char const* name, Function& function)
{
    function = reinterpret_cast<Function>(dlsym(library, name));
    return function != nullptr;
}

DriverState loadDriver()
{
    DriverState state;
    void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr)
    {
        char const* const error = dlerror();
        state.reason = error != nullptr ? error : "libcuda.so.1 cannot be opened";
        return state;
    }
    CudaDriver& d = state.driver;
    CUresult (*init)(unsigned) = nullptr;
    // The _v2 names are what cuda.h's macros map to since CUDA 4; they are spelled out because dlsym sees no macros.
    bool const complete =
        resolve(library, "cuInit", init) && resolve(library, "cuGetErrorName", d.getErrorName)
        && resolve(library, "cuGetErrorString", d.getErrorString)
        && resolve(library, "cuDriverGetVersion", d.driverGetVersion)
        && resolve(library, "cuDeviceGetAttribute", d.deviceGetAttribute)
        && resolve(library, "cuDevicePrimaryCtxRetain", d.devicePrimaryCtxRetain)
        && resolve(library, "cuCtxGetCurrent", d.ctxGetCurrent) && resolve(library, "cuCtxSetCurrent", d.ctxSetCurrent)
        && resolve(library, "cuCtxGetDevice", d.ctxGetDevice) && resolve(library, "cuModuleLoadData", d.moduleLoadData)
        && resolve(library, "cuModuleUnload", d.moduleUnload)
        && resolve(library, "cuModuleGetFunction", d.moduleGetFunction)
        && resolve(library, "cuFuncSetAttribute", d.funcSetAttribute)
        && resolve(library, "cuMemAlloc_v2", d.memAlloc) && resolve(library, "cuMemFree_v2", d.memFree)
        && resolve(library, "cuMemsetD32Async", d.memsetD32Async)
        && resolve(library, "cuStreamSynchronize", d.streamSynchronize)
        && resolve(library, "cuLaunchKernel", d.launchKernel);
    if (!complete)
    {
        state.reason = "libcuda.so.1 lacks a function that every driver since CUDA 7 has";
        return state;
    }
    resolve(library, "cuCtxGetId", d.ctxGetId);
    resolve(library, "cuFuncLoad", d.funcLoad);
    resolve(library, "cuTensorMapEncodeTiled", d.tensorMapEncodeTiled);
    resolve(library, "cuLaunchKernelEx", d.launchKernelEx);
    CUresult const result = init(0);
    if (result != CUDA_SUCCESS)
    {
        char const* name = nullptr;
        d.getErrorName(result, &name);
        state.reason = std::string("cuInit returned ") + (name != nullptr ? name : "an unknown error");
        return state;
    }
    state.usable = true;
    return state;
}

DriverState const& driverState()
{
    static DriverState const state = loadDriver();
    return state;
}

} // namespace

CudaDriver const* findCudaDriver() noexcept
{
    try
    {
        DriverState const& state = driverState();
        return state.usable ? &state.driver : nullptr;
    }
    catch (...)
    {
        return nullptr;
    }
}

CudaDriver const& cudaDriver()
{
    DriverState const& state = driverState();
    HSTU_CHECK(state.usable, "the CUDA driver is not usable: ", state.reason,
        ". Fix: install the NVIDIA driver, or run where a GPU is visible");
    return state.driver;
}

void checkCuda(CUresult result, char const* what)
{
    if (result == CUDA_SUCCESS)
    {
        return;
    }
    char const* name = nullptr;
    char const* text = nullptr;
    CudaDriver const& driver = cudaDriver();
    driver.getErrorName(result, &name);
    driver.getErrorString(result, &text);
    fail(what, ": ", name != nullptr ? name : "unknown CUDA error", " (", static_cast<int>(result),
        "): ", text != nullptr ? text : "no text");
}

void ensureCurrentContext()
{
    CudaDriver const& driver = cudaDriver();
    CUcontext context = nullptr;
    checkCuda(driver.ctxGetCurrent(&context), "cuCtxGetCurrent");
    if (context == nullptr)
    {
        // Retained and not released: the primary context belongs to the process and outlives this library.
        checkCuda(driver.devicePrimaryCtxRetain(&context, 0), "cuDevicePrimaryCtxRetain of device 0");
        checkCuda(driver.ctxSetCurrent(context), "cuCtxSetCurrent");
    }
}

ScopedContext::ScopedContext(CUcontext context) noexcept
{
    CudaDriver const* const driver = findCudaDriver();
    if (driver == nullptr || driver->ctxGetCurrent(&mPrevious) != CUDA_SUCCESS)
    {
        return;
    }
    mSwitched = mPrevious != context;
    mIsCurrent = !mSwitched || driver->ctxSetCurrent(context) == CUDA_SUCCESS;
}

ScopedContext::~ScopedContext()
{
    if (mIsCurrent && mSwitched)
    {
        findCudaDriver()->ctxSetCurrent(mPrevious);
    }
}

GpuTraits currentGpu()
{
    ensureCurrentContext();
    CudaDriver const& driver = cudaDriver();
    CUdevice device = 0;
    checkCuda(driver.ctxGetDevice(&device), "cuCtxGetDevice");
    auto attribute = [&](CUdevice_attribute which)
    {
        int value = 0;
        checkCuda(driver.deviceGetAttribute(&value, which, device), "cuDeviceGetAttribute");
        return static_cast<int32_t>(value);
    };
    GpuTraits gpu;
    gpu.sm = 10 * attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)
             + attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
    gpu.numSms = attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
    int version = 0;
    checkCuda(driver.driverGetVersion(&version), "cuDriverGetVersion");
    gpu.driverVersion = version;
    gpu.hasTensorMaps = driver.tensorMapEncodeTiled != nullptr;
    return gpu;
}

GpuTraits gpuOrAny() noexcept
{
    try
    {
        return findCudaDriver() == nullptr ? GpuTraits{} : currentGpu();
    }
    catch (...)
    {
        return GpuTraits{};
    }
}

} // namespace hstu
