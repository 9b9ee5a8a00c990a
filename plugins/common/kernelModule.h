#ifndef HSTU_KERNEL_MODULE_H
#define HSTU_KERNEL_MODULE_H

#include <memory>

#include "cudaDriver.h"
#include "hstuKernelImages.h"

namespace hstu
{

//! A kernel image loaded into one CUDA context, ready to launch without further driver work. Immutable; unloaded when
//! the last owner lets go.
class LoadedKernel
{
public:
    //! Loads the image into the current context, forces the code onto the device and raises the shared memory limit.
    //! Throws PluginError with the image's name and the driver's reason.
    explicit LoadedKernel(HstuKernelImage const& image);
    ~LoadedKernel();
    LoadedKernel(LoadedKernel const&) = delete;
    LoadedKernel& operator=(LoadedKernel const&) = delete;

    CUfunction function() const noexcept
    {
        return mFunction;
    }

    HstuKernelImage const& image() const noexcept
    {
        return *mImage;
    }

private:
    HstuKernelImage const* mImage;
    CUcontext mContext{};
    CUmodule mModule{};
    CUfunction mFunction{};
};

//! \return the image loaded into the current context, shared by all layers and execution contexts of that CUDA
//! context. Takes a lock: for attach and shape changes, never for enqueue. Throws PluginError.
std::shared_ptr<LoadedKernel const> acquireKernel(HstuKernelImage const& image);

} // namespace hstu

#endif // HSTU_KERNEL_MODULE_H
