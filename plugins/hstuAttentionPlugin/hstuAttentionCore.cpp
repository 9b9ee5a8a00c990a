#include "hstuAttentionCore.h"

#include <utility>

#include "pluginError.h"

namespace hstu
{
namespace
{

//! 64-bit FNV-1a over everything that decides what a launch executes.
uint64_t hashBytes(uint64_t hash, void const* data, size_t size) noexcept
{
    constexpr uint64_t kPrime = 1099511628211ULL;
    auto const* const bytes = static_cast<unsigned char const*>(data);
    for (size_t i = 0; i < size; ++i)
    {
        hash = (hash ^ bytes[i]) * kPrime;
    }
    return hash;
}

std::string computeBuildId()
{
    uint64_t hash = 14695981039346656037ULL;
    for (size_t i = 0; i < kHstuNbKernelImages; ++i)
    {
        HstuKernelImage const& image = kHstuKernelImages[i];
        int32_t const facts[] = {image.sm, image.isPtx, image.tactic, image.blockM, image.numWarps, image.sharedBytes};
        hash = hashBytes(hash, facts, sizeof(facts));
        hash = hashBytes(hash, image.data, image.size);
    }
    std::ostringstream text;
    text << std::hex << hash;
    return text.str();
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
    int32_t const sm = computeCapabilityOrZero();
    return findTactics(mAttributes, signature, sm).empty() ? describeMissingKernel(mAttributes, signature, sm)
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
        int32_t const sm = computeCapabilityOrZero();
        HSTU_CHECK(!findTactics(mAttributes, signature, sm).empty(), describeMissingKernel(mAttributes, signature, sm));
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
        for (TacticImages const& images : findTactics(mAttributes, mSignature, computeCapabilityOrZero()))
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
        if (mTactic == 0 || mLoaded[i].tactic == mTactic)
        {
            mChosen = i;
            return;
        }
    }
    std::ostringstream ids;
    for (LoadedTactic const& loaded : mLoaded)
    {
        ids << " " << loaded.tactic;
    }
    fail(kPluginName, " node '", mNodeName, "': tactic ", mTactic,
        " is not in this library for this GPU; allowed:", ids.str(),
        ". The engine was built with another build of the plugin. Fix: rebuild the engine");
}

void HstuAttentionCore::load()
{
    if (!mLoaded.empty() || !isConfigured())
    {
        return;
    }
    int32_t const sm = currentComputeCapability();
    std::vector<TacticImages> const tactics = findTactics(mAttributes, mSignature, sm);
    HSTU_CHECK(!tactics.empty(), describeMissingKernel(mAttributes, mSignature, sm));
    std::vector<LoadedTactic> loaded;
    for (TacticImages const& images : tactics)
    {
        LoadedTactic& entry = loaded.emplace_back();
        entry.tactic = images.tactic;
        entry.aligned = images.aligned != nullptr ? acquireKernel(*images.aligned) : nullptr;
        entry.unaligned = images.unaligned != nullptr ? acquireKernel(*images.unaligned) : nullptr;
    }
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
    mChosen = 0;
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
    LoadedTactic const& tactic = mLoaded[mChosen];
    bool const aligned = tactic.aligned != nullptr && isAligned(pointers);
    std::shared_ptr<LoadedKernel const> const& kernel = aligned ? tactic.aligned : tactic.unaligned;
    HSTU_CHECK(kernel != nullptr, kPluginName, " node '", mNodeName,
        "': a tensor is not 16-byte aligned and the library has aligned kernels only. Fix: bind I/O buffers that are "
        "16-byte aligned, or build a library with KernelVariant(aligned=False)");
    launchHstuAttention(*kernel, mAttributes, sizes, pointers, stream);
}

} // namespace hstu
