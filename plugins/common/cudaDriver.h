#ifndef HSTU_CUDA_DRIVER_H
#define HSTU_CUDA_DRIVER_H

#include <cstdint>

#include <cuda.h>

namespace hstu
{

//! The few functions of the CUDA driver that the library calls, found in libcuda.so.1 at run time. Nothing links to
//! the driver or to cudart, so the library loads on a machine without a GPU and beside any CUDA version.
struct CudaDriver
{
    CUresult (*getErrorName)(CUresult, char const**);
    CUresult (*getErrorString)(CUresult, char const**);
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

//! \return 10 * major + minor of the current context's device (90 on Hopper). Throws PluginError on failure.
int32_t currentComputeCapability();

//! \return as above, or 0 when the machine has no usable driver or GPU.
int32_t computeCapabilityOrZero() noexcept;

} // namespace hstu

#endif // HSTU_CUDA_DRIVER_H
