#include "hstuAttentionKernel.h"

#include <algorithm>
#include <set>
#include <sstream>

#include "pluginError.h"

namespace hstu
{
namespace
{

constexpr int32_t kMinBlock = 16; // smallest tile of the tensor core instructions
constexpr int32_t kVectorElements = 16;
constexpr int32_t kTensorCopyElements = 8; // 16 bytes, to which the tensor copy engine wants rows aligned
constexpr int32_t kPlainCausal = 0;
constexpr int32_t kGeneralMask = 1;

int32_t paddedHeadDim(int32_t dim) noexcept
{
    int32_t block = kMinBlock;
    while (block < dim)
    {
        block *= 2;
    }
    return block;
}

//! Whether the node's mask is plain causal, for which cheaper kernels exist.
int32_t neededMaskKind(HstuAttentionAttributes const& attributes) noexcept
{
    bool const plain = attributes.hasNumTargets == 0 && attributes.hasContextualSeqLens == 0
                       && attributes.contextualSeqLen == 0 && attributes.maxAttnLen == 0;
    return plain ? kPlainCausal : kGeneralMask;
}

bool fitsDims(HstuKernelImage const& image, EngineSignature const& signature) noexcept
{
    if (image.kind == kHstuKernelHopper)
    {
        // The tensor copies fill what lies beyond the real head dims with zeros.
        return signature.attentionDim % kTensorCopyElements == 0 && signature.linearDim % kTensorCopyElements == 0
               && signature.attentionDim <= image.blockDqk && signature.linearDim <= image.blockDv;
    }
    bool const alignable = signature.attentionDim % kVectorElements == 0 && signature.linearDim % kVectorElements == 0;
    return image.blockDqk == paddedHeadDim(signature.attentionDim)
           && image.blockDv == paddedHeadDim(signature.linearDim) && (image.aligned == 0 || alignable);
}

//! The portable kernel's SiLU is accurate and serves every node. A Hopper image serves one form alone: an accurate node must
//! not get the fast one, and the results of a fast node must not depend on what else the library holds.
bool fitsSilu(HstuKernelImage const& image, HstuAttentionAttributes const& attributes) noexcept
{
    return image.kind != kHstuKernelHopper || image.silu == attributes.silu;
}

bool fitsNode(
    HstuKernelImage const& image, HstuAttentionAttributes const& attributes, EngineSignature const& signature) noexcept
{
    return image.dtype == signature.elementType && fitsDims(image, signature) && fitsSilu(image, attributes)
           && image.hasCache == attributes.hasCache && image.posBias == attributes.posBias && image.timeBias == attributes.timeBias
           && (attributes.timeBias == 0 || image.timestampBits == signature.timestampBits)
           && image.maskKind >= neededMaskKind(attributes);
}

//! Orders images that all run on the device: exact code before compatible code before code the driver must compile,
//! then the newest, then the least padding, then the cheaper mask.
bool isBetter(HstuKernelImage const& a, HstuKernelImage const& b) noexcept
{
    if (a.isPtx != b.isPtx)
    {
        return a.isPtx < b.isPtx;
    }
    if (a.sm != b.sm)
    {
        return a.sm > b.sm;
    }
    return a.blockDqk != b.blockDqk ? a.blockDqk < b.blockDqk : a.maskKind < b.maskKind;
}

void keepBetter(HstuKernelImage const*& slot, HstuKernelImage const& image) noexcept
{
    if (slot == nullptr || isBetter(image, *slot))
    {
        slot = &image;
    }
}

HstuKernelImage const*& slotOf(TacticImages& images, HstuKernelImage const& image) noexcept
{
    if (image.kind == kHstuKernelHopper)
    {
        return images.hopper[image.split > 1 ? 1 : 0];
    }
    return image.aligned != 0 ? images.aligned : images.unaligned;
}

std::string smList(std::set<int32_t> const& architectures)
{
    std::ostringstream text;
    for (int32_t const sm : architectures)
    {
        text << (text.tellp() == 0 ? "" : ", ") << "sm_" << sm;
    }
    return text.str();
}

} // namespace

bool isHopper(TacticImages const& images) noexcept
{
    return std::any_of(images.hopper.begin(), images.hopper.end(), [](auto const* image) { return image != nullptr; });
}

bool runsOn(HstuKernelImage const& image, GpuTraits const& gpu) noexcept
{
    if (gpu.driverVersion < image.leastDriver || (image.kind == kHstuKernelHopper && !gpu.hasTensorMaps))
    {
        return false;
    }
    return runsOnCapability(image.sm, image.isPtx != 0, gpu);
}

std::vector<TacticImages> findTactics(
    HstuAttentionAttributes const& attributes, EngineSignature const& signature, GpuTraits const& gpu)
{
    std::vector<TacticImages> tactics;
    for (size_t i = 0; i < kHstuNbKernelImages; ++i)
    {
        HstuKernelImage const& image = kHstuKernelImages[i];
        if (!fitsNode(image, attributes, signature) || (gpu.sm != 0 && !runsOn(image, gpu)))
        {
            continue;
        }
        auto const found = std::find_if(
            tactics.begin(), tactics.end(), [&image](TacticImages const& t) { return t.tactic == image.tactic; });
        TacticImages& entry = found != tactics.end() ? *found : tactics.emplace_back();
        entry.tactic = image.tactic;
        keepBetter(slotOf(entry, image), image);
    }
    std::sort(tactics.begin(), tactics.end(),
        [](TacticImages const& a, TacticImages const& b)
        { return isHopper(a) != isHopper(b) ? isHopper(a) : a.tactic < b.tactic; });
    auto const portable = std::find_if(
        tactics.begin(), tactics.end(), [](TacticImages const& images) { return !isHopper(images); });
    for (auto hopper = tactics.begin(); portable != tactics.end() && hopper != portable; ++hopper)
    {
        hopper->aligned = portable->aligned;
        hopper->unaligned = portable->unaligned;
    }
    return tactics;
}

std::string describeMissingKernel(
    HstuAttentionAttributes const& attributes, EngineSignature const& signature, GpuTraits const& gpu)
{
    int32_t const sm = gpu.sm;
    std::ostringstream needed;
    needed << elementTypeName(static_cast<ElementType>(signature.elementType)) << ", q/k head dim "
           << signature.attentionDim << ", v head dim " << signature.linearDim << ", pos_bias " << attributes.posBias
           << ", time_bias " << attributes.timeBias;
    if (attributes.timeBias != 0)
    {
        needed << " with " << signature.timestampBits << "-bit timestamps";
    }
    needed << ", " << (neededMaskKind(attributes) == kPlainCausal ? "causal" : "general") << " mask"
           << (attributes.hasCache != 0 ? ", with a cache" : "");

    std::set<int32_t> fitting;
    std::set<int32_t> architectures;
    std::set<std::string> kinds;
    for (size_t i = 0; i < kHstuNbKernelImages; ++i)
    {
        HstuKernelImage const& image = kHstuKernelImages[i];
        architectures.insert(image.sm);
        if (fitsNode(image, attributes, signature))
        {
            fitting.insert(image.sm);
        }
        std::ostringstream kind;
        kind << elementTypeName(static_cast<ElementType>(image.dtype)) << " " << image.blockDqk << "x" << image.blockDv
             << (image.posBias != 0 ? " pos" : "") << (image.timeBias != 0 ? " time" : "");
        if (image.timeBias != 0)
        {
            kind << image.timestampBits;
        }
        kind << (image.maskKind == kPlainCausal ? " causal" : " general") << (image.aligned != 0 ? " aligned" : "")
             << (image.hasCache != 0 ? " cache" : "") << (image.kind == kHstuKernelHopper ? " hopper" : "") << (image.silu != 0 ? " accurate" : "");
        kinds.insert(kind.str());
    }

    std::ostringstream text;
    text << kPluginName << ": this library has no kernel for " << needed.str();
    if (sm != 0)
    {
        text << " on sm_" << sm;
    }
    text << ". It was built for " << smList(architectures);
    if (!fitting.empty())
    {
        text << " and fits this node on " << smList(fitting) << " only";
    }
    else
    {
        text << " with these kernels (dtype, padded head dims, bias, mask):";
        for (std::string const& kind : kinds)
        {
            text << " [" << kind << "]";
        }
    }
    text << ". Fix: rebuild it for this model and GPU with `hstu-compile plugin build --onnx MODEL.onnx";
    if (sm != 0)
    {
        text << " --arch " << sm / 10 << "." << sm % 10;
    }
    text << "`";
    return text.str();
}

bool isAligned(NodeSizes const& sizes, DevicePointers const& pointers) noexcept
{
    constexpr uintptr_t kAlignment = 16;
    for (Input const input : {Input::kQ, Input::kK, Input::kV})
    {
        if (sizes.rowStride(input) % kVectorElements != 0)
        {
            return false;
        }
    }
    uintptr_t bits = reinterpret_cast<uintptr_t>(pointers.output);
    for (void const* const pointer : pointers.inputs)
    {
        bits |= reinterpret_cast<uintptr_t>(pointer);
    }
    return bits % kAlignment == 0;
}

void launchHstuAttention(LoadedKernel const& kernel, HstuAttentionAttributes const& attributes, NodeSizes const& sizes,
    DevicePointers const& pointers, CUstream stream)
{
    HstuKernelImage const& image = kernel.image();
    auto pointer = [&pointers](Input input)
    { return reinterpret_cast<CUdeviceptr>(pointers.inputs[static_cast<size_t>(input)]); };
    auto size = [&sizes](Symbol symbol) { return static_cast<int32_t>(sizes[symbol]); };

    CUdeviceptr q = pointer(Input::kQ);
    CUdeviceptr k = pointer(Input::kK);
    CUdeviceptr v = pointer(Input::kV);
    CUdeviceptr out = reinterpret_cast<CUdeviceptr>(pointers.output);
    CUdeviceptr qOffsets = pointer(Input::kQOffsets);
    CUdeviceptr kOffsets = pointer(Input::kKOffsets);
    CUdeviceptr numTargets = pointer(Input::kNumTargets);
    CUdeviceptr contextualSeqLens = pointer(Input::kContextualSeqLens);
    CUdeviceptr scalingSeqLens = pointer(Input::kScalingSeqLens);
    CUdeviceptr rowTimestamps = pointer(Input::kRowTimestamps);
    CUdeviceptr colTimestamps = pointer(Input::kColTimestamps);
    CUdeviceptr posTable = pointer(Input::kPosTable);
    CUdeviceptr tsTable = pointer(Input::kTsTable);
    CUdeviceptr tsThresholds = pointer(Input::kTsThresholds);
    CUdeviceptr kCached = pointer(Input::kKCached);
    CUdeviceptr vCached = pointer(Input::kVCached);
    CUdeviceptr cacheOffsets = pointer(Input::kCacheOffsets);
    float alpha = attributes.alpha;
    float scalingSeqLen = attributes.scalingSeqLen;
    int32_t lq = size(Symbol::kLq);
    int32_t lk = size(Symbol::kLk);
    int32_t lc = size(Symbol::kLc);
    int32_t batch = size(Symbol::kB);
    int32_t heads = size(Symbol::kH);
    int32_t dqk = size(Symbol::kDqk);
    int32_t dv = size(Symbol::kDv);
    auto stride = [&sizes](Input input) { return static_cast<int32_t>(sizes.rowStride(input)); };
    int32_t qStride = stride(Input::kQ);
    int32_t kStride = stride(Input::kK);
    int32_t vStride = stride(Input::kV);
    int32_t posTableLen = size(Symbol::kPosTableLen);
    int32_t posHeads = size(Symbol::kHp);
    int32_t tsHeads = size(Symbol::kHt);
    int32_t numBuckets = size(Symbol::kNumBuckets);
    int32_t targetGroupSize = attributes.targetGroupSize;
    int32_t contextualSeqLen = attributes.contextualSeqLen;
    int32_t maxAttnLen = attributes.maxAttnLen;
    int32_t minFullAttnSeqLen = attributes.minFullAttnSeqLen;
    // Triton appends two scratch pointers to every kernel; the images are built with zero scratch bytes.
    CUdeviceptr globalScratch = 0;
    CUdeviceptr profileScratch = 0;

    void* arguments[] = {&q, &k, &v, &out, &qOffsets, &kOffsets, &numTargets, &contextualSeqLens, &scalingSeqLens,
        &rowTimestamps, &colTimestamps, &posTable, &tsTable, &tsThresholds, &kCached, &vCached, &cacheOffsets, &alpha,
        &scalingSeqLen, &lq, &lk, &lc, &batch, &heads, &dqk, &dv, &qStride, &kStride, &vStride, &posTableLen,
        &posHeads, &tsHeads, &numBuckets, &targetGroupSize, &contextualSeqLen, &maxAttnLen, &minFullAttnSeqLen,
        &globalScratch, &profileScratch};

    // A sequence's tiles start at slot q_offsets[b] / blockM + b, so this many slots hold every tile of any offsets:
    // the launch depends on nothing but dims. In 64 bits because Lq + B may pass 2^31.
    int64_t const slots = int64_t{lq} / image.blockM + batch + 1;
    HSTU_CHECK(slots <= std::numeric_limits<int32_t>::max(), kPluginName, ": ", slots,
        " tiles exceed the launch grid (Lq ", lq, ", B ", batch, ")");
    CUresult const result = cudaDriver().launchKernel(kernel.function(), static_cast<unsigned>(slots),
        static_cast<unsigned>(heads), 1, static_cast<unsigned>(image.threads), 1, 1,
        static_cast<unsigned>(image.sharedBytes), stream, arguments, nullptr);
    if (result != CUDA_SUCCESS)
    {
        std::ostringstream what;
        what << kPluginName << ": launch of " << image.name << " (sm_" << image.sm << ", tactic " << image.tactic
             << ", Lq " << lq << ", Lk " << lk << ", Lc " << lc << ", B " << batch << ", H " << heads << ", Dqk " << dqk << ", Dv " << dv
             << ")";
        checkCuda(result, what.str().c_str());
    }
}

} // namespace hstu
