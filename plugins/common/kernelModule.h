#ifndef HSTU_KERNEL_MODULE_H
#define HSTU_KERNEL_MODULE_H

#include <functional>
#include <memory>

#include "cudaDriver.h"
#include "hstuKernelImages.h"

namespace hstu
{

//! Machine code loaded into one CUDA context, ready to launch without further driver work. Immutable; unloaded when the
//! last owner lets go.
class KernelModule
{
public:
    //! Loads the code into the current context, forces it onto the device and raises the shared memory limit.
    //!
    //! \param name of the function inside.
    //! \param data cubin, or NUL-terminated PTX.
    //! \param sharedBytes dynamic shared memory of one block.
    //! Throws PluginError with the driver's reason.
    KernelModule(char const* name, unsigned char const* data, bool isPtx, int32_t sharedBytes);
    ~KernelModule();
    KernelModule(KernelModule const&) = delete;
    KernelModule& operator=(KernelModule const&) = delete;

    CUfunction function() const noexcept
    {
        return mFunction;
    }

private:
    CUcontext mContext{};
    CUmodule mModule{};
    CUfunction mFunction{};
};

//! The module of one image of a library's tables.
template <typename Image>
class LoadedImage : public KernelModule
{
public:
    explicit LoadedImage(Image const& image)
        : KernelModule(image.name, image.data, image.isPtx != 0, image.sharedBytes)
        , mImage(&image)
    {
    }

    Image const& image() const noexcept
    {
        return *mImage;
    }

private:
    Image const* mImage;
};

using LoadedKernel = LoadedImage<HstuKernelImage>;

//! \return the module of the image in the current context, made by `make` unless somebody holds it.
//! \param image address of the image, which identifies it.
std::shared_ptr<KernelModule const> acquireModule(
    void const* image, std::function<std::shared_ptr<KernelModule const>()> const& make);

//! \return the image loaded into the current context, shared by all layers and execution contexts of that CUDA
//! context. Takes a lock: for attach and shape changes, never for enqueue. Throws PluginError.
template <typename Image>
std::shared_ptr<LoadedImage<Image> const> acquireKernel(Image const& image)
{
    return std::static_pointer_cast<LoadedImage<Image> const>(
        acquireModule(&image, [&image] { return std::make_shared<LoadedImage<Image> const>(image); }));
}

//! \return whether code for a compute capability runs on a device, by CUDA's compatibility rules: a cubin of 8.x runs on
//! a higher 8.y, one of 9.0 and later is architecture-specific, PTX runs on all later ones.
bool runsOnCapability(int32_t sm, bool isPtx, GpuTraits const& gpu) noexcept;

} // namespace hstu

#endif // HSTU_KERNEL_MODULE_H
