#include "progressCounters.h"

#include <utility>

namespace hstu
{
namespace
{

constexpr size_t kNbCounters = 2;

} // namespace

ProgressCounters::ProgressCounters(ProgressCounters const& other)
{
    if (other.mAddress != 0)
    {
        allocate();
    }
}

ProgressCounters::ProgressCounters(ProgressCounters&& other) noexcept
    : mAddress(std::exchange(other.mAddress, CUdeviceptr{}))
    , mContext(other.mContext)
{
}

ProgressCounters::~ProgressCounters()
{
    release();
}

void ProgressCounters::allocate()
{
    if (mAddress != 0)
    {
        return;
    }
    ensureCurrentContext();
    CudaDriver const& driver = cudaDriver();
    checkCuda(driver.ctxGetCurrent(&mContext), "cuCtxGetCurrent");
    checkCuda(driver.memAlloc(&mAddress, kNbCounters * sizeof(int32_t)), "cuMemAlloc of the progress counters");
    try
    {
        // Launches come on streams that wait for no other, so the zeros must be there before this returns.
        checkCuda(driver.memsetD32Async(mAddress, 0, kNbCounters, CU_STREAM_PER_THREAD), "cuMemsetD32Async");
        checkCuda(driver.streamSynchronize(CU_STREAM_PER_THREAD), "cuStreamSynchronize");
    }
    catch (...)
    {
        release();
        throw;
    }
}

void ProgressCounters::release() noexcept
{
    if (mAddress == 0)
    {
        return;
    }
    // At process exit or after the context is gone the driver has freed the memory already.
    if (ScopedContext const context(mContext); context.isCurrent())
    {
        cudaDriver().memFree(mAddress);
    }
    mAddress = 0;
}

} // namespace hstu
