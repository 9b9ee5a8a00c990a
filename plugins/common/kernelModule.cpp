#include "kernelModule.h"

#include <map>
#include <mutex>
#include <utility>

#include "pluginError.h"

namespace hstu
{
namespace
{

//! Above this a kernel must opt in to its dynamic shared memory (CUDA programming guide, "Shared memory").
constexpr int32_t kDefaultSharedBytes = 48 * 1024;

//! Identifies a context for the life of the process: a destroyed context's address may be reused, its id is not.
unsigned long long contextKey(CudaDriver const& driver, CUcontext context)
{
    unsigned long long id = 0;
    if (driver.ctxGetId != nullptr && driver.ctxGetId(context, &id) == CUDA_SUCCESS)
    {
        return id;
    }
    return reinterpret_cast<unsigned long long>(context);
}

struct ModuleCache
{
    std::mutex mutex;
    std::map<std::pair<unsigned long long, void const*>, std::weak_ptr<KernelModule const>> modules;
};

//! Leaked on purpose: plugins may be destroyed by static destructors that run after this file's.
ModuleCache& moduleCache()
{
    static ModuleCache* const cache = new ModuleCache;
    return *cache;
}

} // namespace

KernelModule::KernelModule(char const* name, unsigned char const* data, bool isPtx, int32_t sharedBytes)
{
    CudaDriver const& driver = cudaDriver();
    checkCuda(driver.ctxGetCurrent(&mContext), "cuCtxGetCurrent");
    CUresult const loaded = driver.moduleLoadData(&mModule, data);
    if (loaded != CUDA_SUCCESS)
    {
        checkCuda(loaded, isPtx ? "cuModuleLoadData of the PTX kernel" : "cuModuleLoadData of the kernel");
    }
    try
    {
        checkCuda(driver.moduleGetFunction(&mFunction, mModule, name), "cuModuleGetFunction");
        if (sharedBytes > kDefaultSharedBytes)
        {
            checkCuda(
                driver.funcSetAttribute(mFunction, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, sharedBytes),
                "cuFuncSetAttribute(MAX_DYNAMIC_SHARED_SIZE_BYTES)");
        }
        // CUDA 12 loads lazily by default; a first launch inside a stream capture must not be what loads the code.
        if (driver.funcLoad != nullptr)
        {
            checkCuda(driver.funcLoad(mFunction), "cuFuncLoad");
        }
    }
    catch (...)
    {
        driver.moduleUnload(mModule);
        throw;
    }
}

KernelModule::~KernelModule()
{
    // At process exit or after the context is gone the driver has freed the module already.
    if (ScopedContext const context(mContext); context.isCurrent())
    {
        cudaDriver().moduleUnload(mModule);
    }
}

std::shared_ptr<KernelModule const> acquireModule(
    void const* image, std::function<std::shared_ptr<KernelModule const>()> const& make)
{
    ensureCurrentContext();
    CudaDriver const& driver = cudaDriver();
    CUcontext context = nullptr;
    checkCuda(driver.ctxGetCurrent(&context), "cuCtxGetCurrent");
    ModuleCache& cache = moduleCache();
    std::lock_guard<std::mutex> const lock(cache.mutex);
    std::weak_ptr<KernelModule const>& slot = cache.modules[{contextKey(driver, context), image}];
    std::shared_ptr<KernelModule const> found = slot.lock();
    if (found == nullptr)
    {
        found = make();
        slot = found;
    }
    return found;
}

bool runsOnCapability(int32_t sm, bool isPtx, GpuTraits const& gpu) noexcept
{
    if (isPtx)
    {
        return sm <= gpu.sm;
    }
    constexpr int32_t kFirstArchitectureSpecific = 90;
    return sm >= kFirstArchitectureSpecific ? sm == gpu.sm : sm / 10 == gpu.sm / 10 && sm <= gpu.sm;
}

} // namespace hstu
