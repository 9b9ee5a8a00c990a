#ifndef HSTU_ATTENTION_CORE_H
#define HSTU_ATTENTION_CORE_H

#include <memory>
#include <string>
#include <vector>

#include "hstuAttentionKernel.h"
#include "progressCounters.h"

namespace hstu
{

//! One HstuAttention node without any TensorRT type: what both adapters wrap. A copy shares the loaded kernels and has
//! progress counters of its own. Not thread-safe; each execution context has its own copy, and copies share only
//! immutable state.
class HstuAttentionCore
{
public:
    HstuAttentionCore(
        std::string nodeName, HstuAttentionAttributes const& attributes, EngineSignature const& signature);

    HstuAttentionAttributes const& attributes() const noexcept
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

    //! \return whether the library has a kernel for tensors of these types on this device. Head dims count where they
    //! are known. Says once, as a warning through `warn`, what is missing.
    template <typename Warn>
    bool canRun(NodeTensors const& tensors, Warn const& warn)
    {
        std::string const missing = missingKernel(tensors);
        if (!missing.empty() && !mWarned)
        {
            mWarned = true;
            warn(missing);
        }
        return missing.empty();
    }

    //! Checks the node's tensors and fixes the engine's signature. Extents may be -1 where they may vary.
    //! Throws PluginError, also when the library has no kernel for the node.
    void configure(NodeTensors const& tensors);

    //! \return ids of the tactics that fit the configured node on this device, not zero. Hopper's comes first, then the
    //! portable ones in ascending order.
    std::vector<int32_t> tactics() const;

    //! Chooses a tactic for the launches that follow; 0 means the first. The Hopper tactic chooses a split for each
    //! launch; its id plus one of kSplits always takes that. Those are for tests and measurements, and not in tactics():
    //! the builder times one shape, and would fix for all shapes what is best for that one.
    //! Throws PluginError for an id that the library does not have on this device.
    void setTactic(int32_t tactic);

    //! Loads the kernels of every tactic into the current CUDA context, and allocates what launches need there, once. A
    //! node that was never configured has nothing to load yet. Throws PluginError.
    void load();

    //! \return a copy that is bound to the current CUDA context.
    HstuAttentionCore attached() const;

    //! Drops this object's hold on the loaded kernels, and the progress counters.
    void unload() noexcept;

    //! Checks the tensors of one call and launches the kernel. Extents must all be known.
    //! Throws PluginError; on return the work is queued on the stream.
    void enqueue(NodeTensors const& tensors, DevicePointers const& pointers, CUstream stream) const;

private:
    //! A Hopper kernel, and by how many blocks each tile of a launch is shared.
    struct HopperChoice
    {
        LoadedKernel const* kernel{nullptr};
        int32_t split{1};
    };

    struct LoadedTactic
    {
        int32_t tactic{0};
        std::shared_ptr<LoadedKernel const> aligned;
        std::shared_ptr<LoadedKernel const> unaligned;
        std::array<std::shared_ptr<LoadedKernel const>, 2> hopper; //!< as in TacticImages
    };

    bool isConfigured() const noexcept;
    std::string missingKernel(NodeTensors const& tensors) const;
    void chooseLoaded();

    //! \return the Hopper kernel for a call, null where the portable kernel has to do.
    HopperChoice hopperKernelFor(NodeSizes const& sizes, DevicePointers const& pointers) const;

    std::string mNodeName;
    HstuAttentionAttributes mAttributes;
    EngineSignature mSignature;
    int32_t mTactic{0};
    bool mWarned{false};
    std::vector<LoadedTactic> mLoaded;
    size_t mChosen{0}; //!< index into mLoaded of the tactic in use
    int32_t mSplit{0}; //!< of the Hopper kernel; 0: chosen for each launch
    int32_t mNumSms{0};
    ProgressCounters mProgress;
};

//! \return the signature of these tensors under these attributes.
EngineSignature signatureOf(
    HstuAttentionAttributes const& attributes, NodeTensors const& tensors, NodeSizes const& sizes);

//! \return identifier of the kernels in this library: changes whenever any of their bytes does. Stable storage.
char const* kernelBuildId() noexcept;

} // namespace hstu

#endif // HSTU_ATTENTION_CORE_H
