#ifndef HSTU_PROGRESS_COUNTERS_H
#define HSTU_PROGRESS_COUNTERS_H

#include <cstdint>

#include "cudaDriver.h"

namespace hstu
{

//! The two counters on the device by which the blocks of a Hopper launch share out tiles.
//!
//! They are zeroed once, here; every launch finds zeros and leaves zeros, so no launch needs a reset before it, also not
//! when a CUDA graph replays it. That holds as long as no two launches use them at once, hence one object per node and
//! execution context: TensorRT enqueues a context once at a time, and a copy of this object has counters of its own.
//! A launch that the driver refuses has not touched them. A kernel that dies takes its CUDA context along, and a new
//! context gets new counters.
class ProgressCounters
{
public:
    //! No counters yet.
    ProgressCounters() noexcept = default;

    //! Counters of its own where the other has some, in the calling thread's context. Throws PluginError.
    ProgressCounters(ProgressCounters const& other);
    ProgressCounters(ProgressCounters&& other) noexcept;
    ~ProgressCounters();
    ProgressCounters& operator=(ProgressCounters const&) = delete;
    ProgressCounters& operator=(ProgressCounters&&) = delete;

    //! Allocates and zeroes the counters in the current context unless they are there. Waits for the device: for
    //! attach, never for enqueue. Throws PluginError.
    void allocate();

    void release() noexcept;

    //! \return their device address, null before allocate.
    int32_t* data() const noexcept
    {
        return reinterpret_cast<int32_t*>(mAddress);
    }

private:
    CUdeviceptr mAddress{};
    CUcontext mContext{};
};

} // namespace hstu

#endif // HSTU_PROGRESS_COUNTERS_H
