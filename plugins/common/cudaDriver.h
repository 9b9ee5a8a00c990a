#ifndef HSTU_CUDA_DRIVER_H
#define HSTU_CUDA_DRIVER_H

#include <cstdint>

#include <cuda.h>

namespace hstu
{

//! CUtensorMap of CUDA 12, opaque: how the tensor copy engine finds the boxes of a tensor. Declared here because the
//! library also builds with the headers of CUDA 11.
struct alignas(64) TensorMap
{
    uint64_t words[16];
};

//! CUlaunchAttribute with the size of a cluster, and CUlaunchConfig, of CUDA 11.8.
struct ClusterAttribute
{
    static constexpr int kClusterDimension = 4; // CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    int id{kClusterDimension};
    int padding{0};
    unsigned blocks[16]{1, 1, 1}; //!< x, y and z; the rest of a value's 64 bytes
};

struct LaunchConfig
{
    unsigned grid[3]{1, 1, 1};
    unsigned block[3]{1, 1, 1};
    unsigned sharedBytes{0};
    CUstream stream{};
    ClusterAttribute* attributes{nullptr};
    unsigned numAttributes{0};
};

//! The few functions of the CUDA driver that the library calls, found in libcuda.so.1 at run time. Nothing links to
//! the driver or to cudart, so the library loads on a machine without a GPU and beside any CUDA version.
struct CudaDriver
{
    CUresult (*getErrorName)(CUresult, char const**);
    CUresult (*getErrorString)(CUresult, char const**);
    CUresult (*driverGetVersion)(int*);
    CUresult (*deviceGetAttribute)(int*, CUdevice_attribute, CUdevice);
    CUresult (*devicePrimaryCtxRetain)(CUcontext*, CUdevice);
    CUresult (*ctxGetCurrent)(CUcontext*);
    CUresult (*ctxSetCurrent)(CUcontext);
    CUresult (*ctxGetDevice)(CUdevice*);
    CUresult (*ctxGetId)(CUcontext, unsigned long long*); //!< null before CUDA 12
    CUresult (*moduleLoadData)(CUmodule*, void const*);
    CUresult (*moduleUnload)(CUmodule);
    CUresult (*moduleGetFunction)(CUfunction*, CUmodule, char const*);
    CUresult (*funcLoad)(CUfunction); //!< null before CUDA 12.4
    CUresult (*funcSetAttribute)(CUfunction, CUfunction_attribute, int);
    CUresult (*memAlloc)(CUdeviceptr*, size_t);
    CUresult (*memFree)(CUdeviceptr);
    CUresult (*memsetD32Async)(CUdeviceptr, unsigned, size_t, CUstream);
    CUresult (*streamSynchronize)(CUstream);
    //! cuTensorMapEncodeTiled, its enumerations as int; null before CUDA 12.
    CUresult (*tensorMapEncodeTiled)(TensorMap*, int, uint32_t, void*, uint64_t const*, uint64_t const*,
        uint32_t const*, uint32_t const*, int, int, int, int);
    CUresult (*launchKernelEx)(LaunchConfig const*, CUfunction, void**, void**); //!< null before CUDA 11.8
    CUresult (*launchKernel)(
        CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream, void**, void**);
};

//! \return the driver, loaded and initialised on the first call, or nullptr when there is none or it finds no device.
//! Thread-safe. The library stays loaded for the life of the process.
CudaDriver const* findCudaDriver() noexcept;

//! \return the driver. Throws PluginError with the loader's or the driver's reason when it is not usable.
CudaDriver const& cudaDriver();

//! Throws PluginError "<what>: CUDA_ERROR_...: <driver's text>" unless the result is CUDA_SUCCESS.
void checkCuda(CUresult result, char const* what);

//! Makes sure that the calling thread has a current context: device 0's primary context when it has none, which is
//! what the CUDA runtime would take. Throws PluginError when that fails.
void ensureCurrentContext();

//! Makes a context current for a scope; destructors of what lives in one use it.
class ScopedContext
{
public:
    explicit ScopedContext(CUcontext context) noexcept;
    ~ScopedContext();
    ScopedContext(ScopedContext const&) = delete;
    ScopedContext& operator=(ScopedContext const&) = delete;

    //! \return false when the context is gone or the driver is shutting down: what lived in it is freed already.
    bool isCurrent() const noexcept
    {
        return mIsCurrent;
    }

private:
    CUcontext mPrevious{};
    bool mIsCurrent{false};
    bool mSwitched{false};
};

//! What decides which kernels run on a device, and how they are launched.
struct GpuTraits
{
    int32_t sm{0};            //!< 10 * major + minor of the compute capability; 0: no GPU here, which stands for any
    int32_t driverVersion{0}; //!< CUDA version of the driver, 1000 * major + 10 * minor
    int32_t numSms{0};        //!< multiprocessors
    bool hasTensorMaps{false};
};

//! \return the current context's device. Throws PluginError on failure.
GpuTraits currentGpu();

//! \return as above, or default traits when the machine has no usable driver or GPU.
GpuTraits gpuOrAny() noexcept;

} // namespace hstu

#endif // HSTU_CUDA_DRIVER_H
