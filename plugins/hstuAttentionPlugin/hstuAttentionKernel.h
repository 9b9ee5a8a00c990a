#ifndef HSTU_ATTENTION_KERNEL_H
#define HSTU_ATTENTION_KERNEL_H

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "hstuAttentionContract.h"
#include "hstuAttentionFields.h"
#include "hstuAttentionShapes.h"
#include "hstuKernelImages.h"
#include "kernelModule.h"

namespace hstu
{

//! By how many blocks a tile of query rows can be shared; more than one by the same image.
constexpr std::array<int32_t, 4> kSplits{1, 2, 4, 8};

//! The images of one tactic that fit a node on a device. At least one is set.
struct TacticImages
{
    int32_t tactic{0};
    HstuKernelImage const* aligned{nullptr};   //!< portable, only for 16-byte-aligned pointers
    HstuKernelImage const* unaligned{nullptr}; //!< portable, for any pointers
    //! Where the tactic is Hopper's: the image whose blocks have tiles of their own, and that whose blocks share them. The
    //! portable images beside them are those of the first portable tactic, for calls that the Hopper kernel does not take.
    std::array<HstuKernelImage const*, 2> hopper{};
};

//! \return whether the tactic has a Hopper image.
bool isHopper(TacticImages const& images) noexcept;

//! \return whether code of this image runs on a device: by runsOnCapability, and if the driver knows the image's CUDA
//! version and, for Hopper images, tensor maps.
bool runsOn(HstuKernelImage const& image, GpuTraits const& gpu) noexcept;

//! Picks the images for a node from the table that is compiled into the library.
//!
//! \param gpu the device; one without a compute capability stands for any (no GPU here).
//! \return one entry per tactic: Hopper's first, for a runtime that always takes the first, then the portable ones
//! ascending by id; empty when the library has none that fits.
std::vector<TacticImages> findTactics(
    HstuAttentionAttributes const& attributes, EngineSignature const& signature, GpuTraits const& gpu);

//! \return what to tell a user for whom findTactics found nothing: what is needed, what the library holds, the fix.
std::string describeMissingKernel(
    HstuAttentionAttributes const& attributes, EngineSignature const& signature, GpuTraits const& gpu);

//! Device pointers of one call, indexed as kInputs; null where the input is absent.
struct DevicePointers
{
    std::array<void const*, kNbInputs> inputs{};
    void* output{nullptr};
};

//! \return whether a portable kernel that reads and writes in vectors takes a call: every pointer is 16-byte aligned, and
//! the rows of q, k and v are a multiple of 16 elements apart.
bool isAligned(NodeSizes const& sizes, DevicePointers const& pointers) noexcept;

//! Launches a portable kernel on the stream. Does nothing else: no allocation, no synchronisation, no loading, so it may be
//! captured into a CUDA graph.
//!
//! \param sizes all known; pointers must not be null where the tensor is not empty.
//! Throws PluginError with the shape when the driver refuses the launch.
void launchHstuAttention(LoadedKernel const& kernel, HstuAttentionAttributes const& attributes, NodeSizes const& sizes,
    DevicePointers const& pointers, CUstream stream);

} // namespace hstu

#endif // HSTU_ATTENTION_KERNEL_H
