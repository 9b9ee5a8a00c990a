#include "hstuNormCore.h"

#include <limits>
#include <set>
#include <sstream>
#include <utility>

#include "contentHash.h"
#include "pluginError.h"

namespace hstu::norm
{
namespace
{

constexpr int32_t kTactic = 1;
constexpr int32_t kMinBlock = 16;
constexpr int64_t kVectorElements = 16;

int64_t segmentOf(HstuNormAttributes const& attributes, int64_t width) noexcept
{
    return width / attributes.numGroups;
}

int32_t paddedWidth(int64_t segment) noexcept
{
    int32_t block = kMinBlock;
    while (block < segment)
    {
        block *= 2;
    }
    return block;
}

bool fitsNode(HstuNormImage const& image, HstuNormAttributes const& attributes, int64_t width) noexcept
{
    int64_t const segment = segmentOf(attributes, width);
    return image.inputType == attributes.inputType && image.outputType == attributes.outputType
           && image.activation == attributes.activation && image.gateSilu == attributes.gateSilu
           && image.concat == attributes.concat && image.block == paddedWidth(segment)
           && (image.aligned == 0 || segment % kVectorElements == 0);
}

//! Exact code before compatible code before code that the driver must compile.
void keepBetter(HstuNormImage const*& slot, HstuNormImage const& image) noexcept
{
    bool const isBetter
        = slot == nullptr || (image.isPtx != slot->isPtx ? image.isPtx < slot->isPtx : image.sm > slot->sm);
    slot = isBetter ? &image : slot;
}

std::string computeBuildId()
{
    ContentHash hash;
    for (size_t i = 0; i < kHstuNbNormImages; ++i)
    {
        HstuNormImage const& image = kHstuNormImages[i];
        int32_t const facts[] = {image.sm, image.isPtx, image.segments, image.threads, image.sharedBytes};
        hash.add(facts, sizeof(facts));
        hash.add(image.data, image.size);
    }
    return hash.text();
}

std::string kindOf(int32_t inputType, int32_t outputType, int32_t activation, int32_t gateSilu, int32_t concat)
{
    constexpr char const* kActivations[] = {"norm", "gate", "swish"};
    std::ostringstream text;
    text << elementTypeName(static_cast<ElementType>(inputType)) << " to "
         << elementTypeName(static_cast<ElementType>(outputType)) << ", " << kActivations[activation]
         << (gateSilu != 0 ? " by SiLU" : "");
    if (concat != 0)
    {
        text << ", concat " << concat;
    }
    return text.str();
}

//! Whether the framework has said how wide every tensor is: it may ask for types before it knows.
bool areWidthsKnown(HstuNormAttributes const& attributes, NodeTensors const& tensors) noexcept
{
    auto isKnown = [](TensorSpec const& spec, TensorView const& tensor)
    { return tensor.rank == spec.rank && tensor.dims[static_cast<size_t>(spec.rank) - 1] > 0; };
    bool known = isKnown(kOutputs[0], tensors.output);
    for (int32_t input = 0; input < kNbInputs; ++input)
    {
        known = known
                && (!isInputPresent(attributes, input)
                    || isKnown(kInputs[input], tensors.inputs[static_cast<size_t>(input)]));
    }
    return known;
}

bool isAligned(NodeSizes const& sizes, DevicePointers const& pointers) noexcept
{
    constexpr uintptr_t kAlignment = 16;
    if (sizes.xStride % kVectorElements != 0 || sizes.gateStride % kVectorElements != 0)
    {
        return false;
    }
    uintptr_t bits = reinterpret_cast<uintptr_t>(pointers.output);
    for (void const* const pointer : pointers.inputs)
    {
        bits |= reinterpret_cast<uintptr_t>(pointer);
    }
    return bits % kAlignment == 0;
}

void launch(LoadedImage<HstuNormImage> const& kernel, HstuNormAttributes const& attributes, NodeSizes const& sizes,
    DevicePointers const& pointers, CUstream stream)
{
    HstuNormImage const& image = kernel.image();
    auto pointer = [&pointers](Input input)
    { return reinterpret_cast<CUdeviceptr>(pointers.inputs[static_cast<size_t>(input)]); };

    // Segments are counted in 32 bits on the device, where the last block's may lie behind the end.
    int64_t const allSegments = sizes.rows * attributes.numGroups;
    HSTU_CHECK(allSegments <= std::numeric_limits<int32_t>::max() - image.segments, kPluginName, ": ", sizes.rows,
        " rows of ", attributes.numGroups, " groups are more than 2^31 groups");
    CUdeviceptr x = pointer(Input::kX);
    CUdeviceptr shift = pointer(Input::kShift);
    CUdeviceptr scale = pointer(Input::kScale);
    CUdeviceptr bias = pointer(Input::kBias);
    CUdeviceptr gate = pointer(Input::kGate);
    CUdeviceptr out = reinterpret_cast<CUdeviceptr>(pointers.output);
    float epsilon = attributes.epsilon;
    int32_t segments = static_cast<int32_t>(allSegments);
    int32_t segment = static_cast<int32_t>(segmentOf(attributes, sizes.width));
    int32_t groups = attributes.numGroups;
    int32_t xStride = static_cast<int32_t>(sizes.xStride);
    int32_t gateStride = static_cast<int32_t>(sizes.gateStride);
    int32_t hasShift = attributes.hasShift;
    int32_t hasBias = attributes.hasBias;
    // Triton appends two scratch pointers to every kernel; the images are built with zero scratch bytes.
    CUdeviceptr globalScratch = 0;
    CUdeviceptr profileScratch = 0;
    void* arguments[] = {&x, &shift, &scale, &bias, &gate, &out, &epsilon, &segments, &segment, &groups, &xStride,
        &gateStride, &hasShift, &hasBias, &globalScratch, &profileScratch};

    int64_t const blocks = (allSegments + image.segments - 1) / image.segments;
    CUresult const result = cudaDriver().launchKernel(kernel.function(), static_cast<unsigned>(blocks), 1, 1,
        static_cast<unsigned>(image.threads), 1, 1, static_cast<unsigned>(image.sharedBytes), stream, arguments,
        nullptr);
    if (result != CUDA_SUCCESS)
    {
        std::ostringstream what;
        what << kPluginName << ": launch of " << image.name << " (sm_" << image.sm << ", " << sizes.rows << " rows of "
             << sizes.width << ", groups " << groups << ")";
        checkCuda(result, what.str().c_str());
    }
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

HstuNormAttributes readAttributes(
    char const* nodeName, std::vector<FieldView> const& fields, EngineSignature* signature)
{
    return readFields<HstuNormAttributes>(kIdentity, kAttributes, kSignatureFields, nodeName, fields, signature);
}

FittingImages findImages(HstuNormAttributes const& attributes, int64_t width, GpuTraits const& gpu)
{
    FittingImages found;
    for (size_t i = 0; i < kHstuNbNormImages; ++i)
    {
        HstuNormImage const& image = kHstuNormImages[i];
        if (fitsNode(image, attributes, width) && (gpu.sm == 0 || runsOnCapability(image.sm, image.isPtx != 0, gpu)))
        {
            keepBetter(image.aligned != 0 ? found.aligned : found.unaligned, image);
        }
    }
    return found;
}

std::string describeMissingKernel(HstuNormAttributes const& attributes, int64_t width, GpuTraits const& gpu)
{
    std::set<std::string> kinds;
    for (size_t i = 0; i < kHstuNbNormImages; ++i)
    {
        HstuNormImage const& image = kHstuNormImages[i];
        std::ostringstream kind;
        kind << kindOf(image.inputType, image.outputType, image.activation, image.gateSilu, image.concat) << ", up to "
             << image.block << " columns" << (image.aligned != 0 ? " aligned" : "") << ", "
             << (image.isPtx != 0 ? "PTX of " : "") << "sm_" << image.sm;
        kinds.insert(kind.str());
    }
    std::ostringstream text;
    text << kPluginName << ": this library has no kernel for "
         << kindOf(attributes.inputType, attributes.outputType, attributes.activation, attributes.gateSilu,
                attributes.concat)
         << ", " << segmentOf(attributes, width) << " columns";
    if (gpu.sm != 0)
    {
        text << " on sm_" << gpu.sm;
    }
    text << ". It has:";
    for (std::string const& kind : kinds)
    {
        text << " [" << kind << "]";
    }
    text << (kinds.empty() ? " none" : "")
         << ". Fix: rebuild it for this model and GPU with `hstu-compile plugin build --onnx MODEL.onnx`";
    return text.str();
}

HstuNormCore::HstuNormCore(
    std::string nodeName, HstuNormAttributes const& attributes, EngineSignature const& signature)
    : mNodeName(std::move(nodeName))
    , mAttributes(attributes)
    , mSignature(signature)
{
    checkAttributes(kIdentity, kAttributes, mNodeName.c_str(), attributes);
    HSTU_CHECK(attributes.activation == 1 || (attributes.gateSilu == 0 && attributes.concat == 0), kPluginName,
        " node '", mNodeName, "': gate_silu is ", attributes.gateSilu, " and concat ", attributes.concat,
        " with activation ", attributes.activation, "; allowed: 0 and 0 unless activation is 1");
    HSTU_CHECK(signature.width >= 0 && signature.width <= kMaxWidth, kPluginName, " node '", mNodeName,
        "': the engine stores width ", signature.width, "; allowed: 0 to ", kMaxWidth, ". Fix: rebuild the engine");
}

std::string HstuNormCore::problemOf(NodeTensors const& tensors) const
{
    if (!areWidthsKnown(mAttributes, tensors))
    {
        return {}; // configure, which sees every extent, decides
    }
    try
    {
        int64_t const width = resolveSizes(mAttributes, tensors, /* requireStatic = */ false).width;
        GpuTraits const gpu = gpuOrAny();
        return findImages(mAttributes, width, gpu).isEmpty() ? describeMissingKernel(mAttributes, width, gpu)
                                                             : std::string();
    }
    catch (PluginError const& error)
    {
        return error.what();
    }
}

void HstuNormCore::configure(NodeTensors const& tensors)
{
    int32_t const width
        = static_cast<int32_t>(resolveSizes(mAttributes, tensors, /* requireStatic = */ false).width);
    if (width != mSignature.width)
    {
        GpuTraits const gpu = gpuOrAny();
        HSTU_CHECK(!findImages(mAttributes, width, gpu).isEmpty(), describeMissingKernel(mAttributes, width, gpu));
        unload();
        mSignature.width = width;
    }
}

std::vector<int32_t> HstuNormCore::tactics() const
{
    return mSignature.width == 0 ? std::vector<int32_t>() : std::vector<int32_t>{kTactic};
}

void HstuNormCore::setTactic(int32_t tactic) const
{
    HSTU_CHECK(tactic == 0 || tactic == kTactic, kPluginName, " node '", mNodeName, "': tactic ", tactic,
        " does not exist; allowed: ", kTactic, ". Fix: rebuild the engine");
}

void HstuNormCore::load()
{
    if (mAligned != nullptr || mUnaligned != nullptr || mSignature.width == 0)
    {
        return;
    }
    GpuTraits const gpu = currentGpu();
    FittingImages const images = findImages(mAttributes, mSignature.width, gpu);
    HSTU_CHECK(!images.isEmpty(), describeMissingKernel(mAttributes, mSignature.width, gpu));
    std::shared_ptr<LoadedNorm const> const aligned
        = images.aligned != nullptr ? acquireKernel(*images.aligned) : nullptr;
    mUnaligned = images.unaligned != nullptr ? acquireKernel(*images.unaligned) : nullptr;
    mAligned = aligned;
}

HstuNormCore HstuNormCore::attached() const
{
    HstuNormCore copy(*this);
    copy.unload(); // the source may hold kernels of another CUDA context
    copy.load();
    return copy;
}

void HstuNormCore::unload() noexcept
{
    mAligned.reset();
    mUnaligned.reset();
}

void HstuNormCore::enqueue(NodeTensors const& tensors, DevicePointers const& pointers, CUstream stream) const
{
    NodeSizes const sizes = resolveSizes(mAttributes, tensors, /* requireStatic = */ true);
    if (sizes.rows == 0)
    {
        return; // the pointers of empty tensors mean nothing
    }
    HSTU_CHECK(mAligned != nullptr || mUnaligned != nullptr, kPluginName, " node '", mNodeName,
        "': enqueue before the plugin was attached to a context");
    HSTU_CHECK(sizes.width == mSignature.width, kPluginName, " node '", mNodeName, "': x has ", sizes.width,
        " columns; the kernels were loaded for ", mSignature.width);
    LoadedNorm const* const kernel = mAligned != nullptr && isAligned(sizes, pointers) ? mAligned.get() : mUnaligned.get();
    HSTU_CHECK(kernel != nullptr, kPluginName, " node '", mNodeName,
        "': a tensor is not 16-byte aligned, or the rows of x or gate are ", sizes.xStride, " and ", sizes.gateStride,
        " elements apart, not a multiple of 16, and the library has aligned kernels only. Fix: bind I/O buffers that are "
        "16-byte aligned, or build a library with NormVariant(aligned=False)");
    launch(*kernel, mAttributes, sizes, pointers, stream);
}

} // namespace hstu::norm
