#ifndef HSTU_NORM_CORE_H
#define HSTU_NORM_CORE_H

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "fieldReader.h"
#include "hstuNormContract.h"
#include "hstuNormImages.h"
#include "kernelModule.h"
#include "tensorView.h"

namespace hstu::norm
{

//! What an engine stores beside the attributes, so that kernels can be loaded before any shape is known.
struct EngineSignature
{
    int32_t width{0}; //!< D; 0: not known yet
};

inline constexpr BasicSignatureField<EngineSignature> kSignatureFields[] = {
    {"engine_width", &EngineSignature::width},
};

//! Inputs and output of one node in the contract's positions; absent inputs stay default.
struct NodeTensors
{
    std::array<TensorView, kNbInputs> inputs{};
    TensorView output{};
    //! Elements from a row of x or gate to the next; 0: contiguous. Every other input is contiguous, and so is the output.
    std::array<int64_t, kNbInputs> rowStrides{};
};

//! Device pointers of one call, indexed as kInputs; null where the input is absent.
struct DevicePointers
{
    std::array<void const*, kNbInputs> inputs{};
    void* output{nullptr};
};

//! Extents of one node. \c rows is -1 while it is not known.
struct NodeSizes
{
    int64_t rows{-1};
    int64_t width{0};
    int64_t xStride{0};    //!< elements from a row of x to the next, at least the width
    int64_t gateStride{0}; //!< the same of gate
};

//! \return whether the attributes make this input part of the node.
bool isInputPresent(HstuNormAttributes const& attributes, int32_t input) noexcept;

//! \return how many inputs the node has.
int32_t countInputs(HstuNormAttributes const& attributes) noexcept;

//! \param position index in the node's own input list, in [0, countInputs).
//! \return its index in kInputs.
int32_t inputAt(HstuNormAttributes const& attributes, int32_t position) noexcept;

//! \return the type that the attributes want of an input, or of the output where `input` is -1.
ElementType typeOf(HstuNormAttributes const& attributes, int32_t input) noexcept;

//! \return D, or 3 * D where gate and rows stand in front of the result.
constexpr int64_t outputWidth(HstuNormAttributes const& attributes, int64_t width) noexcept
{
    return attributes.concat != 0 ? 3 * width : width;
}

//! Checks ranks, types, extents and row strides against the contract.
//!
//! \param requireStatic the number of rows must be known too (enqueue).
//! Throws PluginError naming the tensor, the value seen and the values allowed.
NodeSizes resolveSizes(HstuNormAttributes const& attributes, NodeTensors const& tensors, bool requireStatic);

//! The images that fit a node on a device.
struct FittingImages
{
    HstuNormImage const* aligned{nullptr};   //!< only for 16-byte-aligned pointers
    HstuNormImage const* unaligned{nullptr}; //!< for any pointers

    bool isEmpty() const noexcept
    {
        return aligned == nullptr && unaligned == nullptr;
    }
};

//! Picks the images for a node of this width from the library's table.
//! \param gpu the device; one without a compute capability stands for any (no GPU here).
FittingImages findImages(HstuNormAttributes const& attributes, int64_t width, GpuTraits const& gpu);

//! \return what to tell a user for whom findImages found nothing: what is needed, what the library holds, the fix.
std::string describeMissingKernel(HstuNormAttributes const& attributes, int64_t width, GpuTraits const& gpu);

//! \return identifier of the norm kernels in this library: changes whenever any of their bytes does. Stable storage.
char const* kernelBuildId() noexcept;

//! Reads and validates the attributes of one node; see hstu::readFields.
HstuNormAttributes readAttributes(
    char const* nodeName, std::vector<FieldView> const& fields, EngineSignature* signature);

//! One HstuNorm node without any TensorRT type: what both adapters wrap. A copy shares the loaded kernels. Not
//! thread-safe; each execution context has its own copy, and copies share only immutable state.
class HstuNormCore
{
public:
    //! Throws PluginError where the attributes are out of range or contradict each other.
    HstuNormCore(std::string nodeName, HstuNormAttributes const& attributes, EngineSignature const& signature);

    HstuNormAttributes const& attributes() const noexcept
    {
        return mAttributes;
    }

    EngineSignature const& signature() const noexcept
    {
        return mSignature;
    }

    std::string const& nodeName() const noexcept
    {
        return mNodeName;
    }

    //! \return whether the node's extents are legal and the library has a kernel for them on this device, as far as widths
    //! are known. Says once, as a warning through `warn`, what is wrong.
    template <typename Warn>
    bool canRun(NodeTensors const& tensors, Warn const& warn)
    {
        std::string const problem = problemOf(tensors);
        if (!problem.empty() && !mWarned)
        {
            mWarned = true;
            warn(problem);
        }
        return problem.empty();
    }

    //! Checks the node's tensors and fixes the engine's signature. The number of rows may be -1.
    //! Throws PluginError, also when the library has no kernel for the node.
    void configure(NodeTensors const& tensors);

    //! \return the one tactic: a width has one tile, whatever the number of rows.
    std::vector<int32_t> tactics() const;

    //! Throws PluginError for an id other than 0, the default, and the one of tactics().
    void setTactic(int32_t tactic) const;

    //! Loads the kernels into the current CUDA context, once. A node that was never configured has nothing to load yet.
    //! Throws PluginError.
    void load();

    //! \return a copy that is bound to the current CUDA context.
    HstuNormCore attached() const;

    //! Drops this object's hold on the loaded kernels.
    void unload() noexcept;

    //! Checks the tensors of one call and launches the kernel. Does nothing else: no allocation, no synchronisation, no
    //! loading, so it may be captured into a CUDA graph.
    //! Throws PluginError; on return the work is queued on the stream.
    void enqueue(NodeTensors const& tensors, DevicePointers const& pointers, CUstream stream) const;

private:
    using LoadedNorm = LoadedImage<HstuNormImage>;

    std::string problemOf(NodeTensors const& tensors) const;

    std::string mNodeName;
    HstuNormAttributes mAttributes;
    EngineSignature mSignature;
    bool mWarned{false};
    std::shared_ptr<LoadedNorm const> mAligned;
    std::shared_ptr<LoadedNorm const> mUnaligned;
};

} // namespace hstu::norm

#endif // HSTU_NORM_CORE_H
