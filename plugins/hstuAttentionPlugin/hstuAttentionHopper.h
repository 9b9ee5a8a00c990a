#ifndef HSTU_ATTENTION_HOPPER_H
#define HSTU_ATTENTION_HOPPER_H

#include <cstdint>

#include "hstuAttentionKernel.h"

namespace hstu
{

//! \return whether the Hopper kernel takes a call of a node that it fits: q, k, v and out are 16-byte aligned, as are the
//! rows of q, k and v among themselves, rows and tiles are few enough to be counted in 32 bits, and the time tables of all heads have room in shared memory.
bool takesHopper(NodeSizes const& sizes, DevicePointers const& pointers) noexcept;

//! Chooses by how many blocks each tile of a launch is shared, by what the host knows of a call, which is its dims: the
//! offsets are on the device. The same dims always give the same split, hence the same bits.
//!
//! \param image whose tiles can be shared.
//! \param maxSeqLen most keys of a sequence with queries; a cache may have more rows than those of the call's sequences.
//! \param numSms multiprocessors of the device.
//! \return one of kSplits.
int32_t chooseSplit(HstuKernelImage const& image, NodeSizes const& sizes, int32_t maxSeqLen, int32_t numSms) noexcept;

//! \return blocks of a launch: persistent ones, at most one an SM, in whole clusters of `split` that run at once, and none
//! without a tile.
int32_t hopperGrid(HstuKernelImage const& image, int32_t split, NodeSizes const& sizes, int32_t numSms) noexcept;

//! Launches a Hopper kernel on the stream. Does nothing else: no allocation, no synchronisation, no loading, so it may be
//! captured into a CUDA graph.
//!
//! \param split blocks that share a tile: one of kSplits, 1 exactly where the image's is.
//! \param sizes all known, at least one query row; with pointers, what takesHopper accepts.
//! \param progress two counters on the device that are zero, that no other launch uses until this one is done, and that
//!     this one leaves zero.
//! Throws PluginError with the shape when the driver refuses a tensor map or the launch.
void launchHopper(LoadedKernel const& kernel, int32_t split, HstuAttentionAttributes const& attributes, NodeSizes const& sizes,
    DevicePointers const& pointers, int32_t* progress, int32_t numSms, CUstream stream);

} // namespace hstu

#endif // HSTU_ATTENTION_HOPPER_H
