//! Entry of libhstu_trt_plugin_vc.so, for IPluginRegistry::loadLibrary: exports the two functions that TensorRT looks
//! up and does not link to libnvinfer, so it can be packed into an engine. Loading it with dlopen registers nothing.

#include <array>
#include <atomic>

#include <dlfcn.h>

#include "creators.h"
#include "hostLogger.h"
#include "hostVersion.h"

//! Everything else in the library is hidden; the version script says the same to the linker.
#define HSTU_EXPORT extern "C" __attribute__((visibility("default")))

namespace hstu
{
namespace
{

std::atomic<nvinfer1::ILoggerFinder*> loggerFinder{nullptr};
std::atomic<bool> hostRefused{false};

//! \return getInferLibVersion() of the library that implements the object, found through the object's own vtable
//! because this library links to no TensorRT; 0 when that library does not export it (a test's own implementation).
int32_t versionOfImplementer(void const* object) noexcept
{
    void const* const vtable = *static_cast<void const* const*>(object);
    Dl_info info{};
    if (dladdr(vtable, &info) == 0 || info.dli_fname == nullptr)
    {
        return 0;
    }
    void* const library = dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    if (library == nullptr)
    {
        return 0;
    }
    auto const getVersion = reinterpret_cast<int32_t (*)()>(dlsym(library, "getInferLibVersion"));
    int32_t const version = getVersion != nullptr ? getVersion() : 0;
    dlclose(library);
    return version;
}

} // namespace

nvinfer1::ILogger* findHostLogger() noexcept
{
    nvinfer1::ILoggerFinder* const finder = loggerFinder.load();
    return finder != nullptr ? finder->findLogger() : nullptr;
}

} // namespace hstu

//! \param finder gives the logger of the calling thread's builder or runtime; owned by TensorRT.
HSTU_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder)
{
    if (finder != nullptr)
    {
        int32_t const version = hstu::versionOfImplementer(finder);
        if (version != 0 && !hstu::isHostCompatible(version))
        {
            hstu::hostRefused = true;
            return;
        }
    }
    hstu::hostRefused = false;
    hstu::loggerFinder = finder;
}

//! \param nbCreators receives 2, or 0 when the TensorRT that asks is not the one this library was built for.
//! \return the creators; owned by the library.
#if NV_TENSORRT_MAJOR >= 10
HSTU_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators)
#else
HSTU_EXPORT nvinfer1::IPluginCreator* const* getPluginCreators(int32_t& nbCreators)
#endif
{
    static std::array<hstu::CreatorInterface*, 2> const creators = hstu::allCreators();
    nbCreators = hstu::hostRefused ? 0 : static_cast<int32_t>(creators.size());
    return creators.data();
}
