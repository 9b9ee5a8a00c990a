#include "hstuAttentionCore.h"

#include <algorithm>
#include <utility>

#include "contentHash.h"
#include "hstuAttentionHopper.h"
#include "pluginError.h"

namespace hstu
{
namespace
{

std::string computeBuildId()
{
    ContentHash hash;
    for (size_t i = 0; i < kHstuNbKernelImages; ++i)
    {
        HstuKernelImage const& image = kHstuKernelImages[i];
        int32_t const facts[] = {image.sm, image.isPtx, image.kind, image.tactic, image.blockM, image.blockN,
            image.threads, image.split, image.sharedBytes, image.silu, image.hasCache};
        hash.add(facts, sizeof(facts));
        hash.add(image.data, image.size);
    }
    return hash.text();
}

} // namespace

char const* kernelBuildId() noexcept
{
    try
    {
        static std::string const id = computeBuildId();
        return id.c_str();
    }
    catch (...)
    {
        return "";
    }
}

EngineSignature signatureOf(
    HstuAttentionAttributes const& attributes, NodeTensors const& tensors, NodeSizes const& sizes)
{
    EngineSignature signature;
    signature.elementType = static_cast<int32_t>(tensors.inputs[static_cast<size_t>(Input::kQ)].type);
    if (attributes.timeBias != 0)
    {
        ElementType const type = tensors.inputs[static_cast<size_t>(Input::kRowTimestamps)].type;
        signature.timestampBits = type == ElementType::kInt64 ? 64 : 32;
    }
    signature.numHeads = static_cast<int32_t>(sizes[Symbol::kH]);
    signature.attentionDim = static_cast<int32_t>(sizes[Symbol::kDqk]);
    signature.linearDim = static_cast<int32_t>(sizes[Symbol::kDv]);
    return signature;
}

HstuAttentionCore::HstuAttentionCore(
    std::string nodeName, HstuAttentionAttributes const& attributes, EngineSignature const& signature)
    : mNodeName(std::move(nodeName))
    , mAttributes(attributes)
    , mSignature(signature)
{
    validateAttributes(mNodeName.c_str(), attributes);
}

bool HstuAttentionCore::isConfigured() const noexcept
{
    return mSignature.elementType >= 0;
}

std::string HstuAttentionCore::missingKernel(NodeTensors const& tensors) const
{
    TensorView const& q = tensors.inputs[static_cast<size_t>(Input::kQ)];
    TensorView const& v = tensors.inputs[static_cast<size_t>(Input::kV)];
    NodeSizes sizes;
    bool const known = q.rank == 3 && v.rank == 3 && q.dims[2] > 0 && v.dims[2] > 0;
    if (!known)
    {
        return {}; // configure, which sees every extent, decides
    }
    sizes[Symbol::kDqk] = q.dims[2];
    sizes[Symbol::kDv] = v.dims[2];
    EngineSignature const signature = signatureOf(mAttributes, tensors, sizes);
    GpuTraits const gpu = gpuOrAny();
    return findTactics(mAttributes, signature, gpu).empty() ? describeMissingKernel(mAttributes, signature, gpu)
                                                            : std::string();
}

void HstuAttentionCore::configure(NodeTensors const& tensors)
{
    NodeSizes const sizes = resolveSizes(mAttributes, tensors, /* requireStatic = */ false);
    EngineSignature const signature = signatureOf(mAttributes, tensors, sizes);
    bool const changed =
        signature.elementType != mSignature.elementType || signature.timestampBits != mSignature.timestampBits
        || signature.numHeads != mSignature.numHeads || signature.attentionDim != mSignature.attentionDim
        || signature.linearDim != mSignature.linearDim;
    if (changed)
    {
        GpuTraits const gpu = gpuOrAny();
        HSTU_CHECK(
            !findTactics(mAttributes, signature, gpu).empty(), describeMissingKernel(mAttributes, signature, gpu));
        unload();
        mTactic = 0;
        mSignature = signature;
    }
}

std::vector<int32_t> HstuAttentionCore::tactics() const
{
    std::vector<int32_t> ids;
    if (isConfigured())
    {
        for (TacticImages const& images : findTactics(mAttributes, mSignature, gpuOrAny()))
        {
            ids.push_back(images.tactic);
        }
    }
    return ids;
}

void HstuAttentionCore::setTactic(int32_t tactic)
{
    mTactic = tactic;
    if (!mLoaded.empty())
    {
        chooseLoaded();
    }
}

void HstuAttentionCore::chooseLoaded()
{
    for (size_t i = 0; i < mLoaded.size(); ++i)
    {
        LoadedTactic const& loaded = mLoaded[i];
        int32_t const split = mTactic == 0 ? 0 : mTactic - loaded.tactic;
        bool const isKnown = std::find(kSplits.begin(), kSplits.end(), split) != kSplits.end();
        bool const isSplit = isKnown && loaded.hopper[split > 1 ? 1 : 0] != nullptr;
        if (split == 0 || isSplit)
        {
            mChosen = i;
            mSplit = split;
            return;
        }
    }
    std::ostringstream ids;
    for (LoadedTactic const& loaded : mLoaded)
    {
        ids << " " << loaded.tactic;
    }
    fail(kPluginName, " node '", mNodeName, "': tactic ", mTactic,
        " is not in this library for this GPU and driver; allowed:", ids.str(),
        ". The engine was built with another build of the plugin, or beside a newer driver. Fix: rebuild the engine");
}

void HstuAttentionCore::load()
{
    if (!mLoaded.empty() || !isConfigured())
    {
        return;
    }
    GpuTraits const gpu = currentGpu();
    std::vector<TacticImages> const tactics = findTactics(mAttributes, mSignature, gpu);
    HSTU_CHECK(!tactics.empty(), describeMissingKernel(mAttributes, mSignature, gpu));
    auto acquire = [](HstuKernelImage const* image) { return image != nullptr ? acquireKernel(*image) : nullptr; };
    std::vector<LoadedTactic> loaded;
    for (TacticImages const& images : tactics)
    {
        LoadedTactic& entry = loaded.emplace_back();
        entry.tactic = images.tactic;
        entry.aligned = acquire(images.aligned);
        entry.unaligned = acquire(images.unaligned);
        for (size_t i = 0; i < images.hopper.size(); ++i)
        {
            entry.hopper[i] = acquire(images.hopper[i]);
        }
    }
    if (isHopper(tactics.front()))
    {
        mProgress.allocate();
    }
    mNumSms = gpu.numSms;
    mLoaded = std::move(loaded);
    chooseLoaded();
}

HstuAttentionCore HstuAttentionCore::attached() const
{
    HstuAttentionCore copy(*this);
    copy.unload(); // the source may hold kernels of another CUDA context
    copy.load();
    return copy;
}

void HstuAttentionCore::unload() noexcept
{
    mLoaded.clear();
    mProgress.release();
    mChosen = 0;
    mSplit = 0;
}

HstuAttentionCore::HopperChoice HstuAttentionCore::hopperKernelFor(
    NodeSizes const& sizes, DevicePointers const& pointers) const
{
    LoadedTactic const& tactic = mLoaded[mChosen];
    LoadedKernel const* const whole = tactic.hopper[0].get();
    LoadedKernel const* const shared = tactic.hopper[1].get();
    if ((whole == nullptr && shared == nullptr) || !takesHopper(sizes, pointers))
    {
        return {};
    }
    if (shared == nullptr)
    {
        return {whole, 1};
    }
    int32_t const chosen = mSplit != 0 ? mSplit : chooseSplit(shared->image(), sizes, mAttributes.maxSeqLen, mNumSms);
    // Without an image of its own, a tile that one block would do best is shared by as few as can be.
    return chosen == 1 && whole != nullptr ? HopperChoice{whole, 1} : HopperChoice{shared, std::max(chosen, kSplits[1])};
}

void HstuAttentionCore::enqueue(NodeTensors const& tensors, DevicePointers const& pointers, CUstream stream) const
{
    NodeSizes const sizes = resolveSizes(mAttributes, tensors, /* requireStatic = */ true);
    if (sizes[Symbol::kLq] == 0)
    {
        return; // no output row; the pointers of empty tensors mean nothing
    }
    HSTU_CHECK(
        !mLoaded.empty(), kPluginName, " node '", mNodeName, "': enqueue before the plugin was attached to a context");
    EngineSignature const signature = signatureOf(mAttributes, tensors, sizes);
    HSTU_CHECK(signature.elementType == mSignature.elementType && signature.timestampBits == mSignature.timestampBits
                   && signature.attentionDim == mSignature.attentionDim && signature.linearDim == mSignature.linearDim,
        kPluginName, " node '", mNodeName, "': types or head dims differ from those the kernels were loaded for");
    HopperChoice const hopper = hopperKernelFor(sizes, pointers);
    if (hopper.kernel != nullptr)
    {
        launchHopper(*hopper.kernel, hopper.split, mAttributes, sizes, pointers, mProgress.data(), mNumSms, stream);
        return;
    }
    LoadedTactic const& tactic = mLoaded[mChosen];
    DevicePointers read = pointers;
    if (sizes[Symbol::kLc] == 0)
    {
        // The addresses of an empty cache mean nothing, least of all their alignment.
        read.inputs[static_cast<size_t>(Input::kKCached)] = nullptr;
        read.inputs[static_cast<size_t>(Input::kVCached)] = nullptr;
    }
    bool const aligned = tactic.aligned != nullptr && isAligned(sizes, read);
    std::shared_ptr<LoadedKernel const> const& kernel = aligned ? tactic.aligned : tactic.unaligned;
    HSTU_CHECK(kernel != nullptr, kPluginName, " node '", mNodeName,
        "': a tensor is not 16-byte aligned, or the rows of q, k or v are ", sizes.rowStride(Input::kQ), ", ",
        sizes.rowStride(Input::kK), " and ", sizes.rowStride(Input::kV), " elements apart, not a multiple of 16, "
        "and the library has aligned kernels only. Fix: bind I/O buffers that are 16-byte aligned, or build a library with "
        "KernelVariant(aligned=False)");
    launchHstuAttention(*kernel, mAttributes, sizes, read, stream);
}

} // namespace hstu
