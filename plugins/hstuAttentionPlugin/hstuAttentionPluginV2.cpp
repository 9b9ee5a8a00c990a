#include "hstuAttentionPluginV2.h"

#include <cstring>
#include <utility>

#include "creators.h"
#include "hostLogger.h"
#include "pluginError.h"
#include "tensorRtViews.h"

namespace hstu
{
namespace
{

constexpr int32_t kSuccess = 0;
constexpr int32_t kFailure = -1;

//! What an engine stores of one node. The tag changes with the layout, so bytes of another build are refused.
struct SerializedNode
{
    uint32_t tag{kTag};
    uint32_t size{sizeof(SerializedNode)};
    HstuAttentionAttributes attributes{};
    EngineSignature signature{};

    static constexpr uint32_t kTag = 0x31555348; // "HSU1" in little-endian bytes
};

static_assert(std::is_trivially_copyable<SerializedNode>::value, "the node is stored byte by byte");

} // namespace

HstuAttentionPluginV2::HstuAttentionPluginV2(HstuAttentionCore core)
    : mCore(std::move(core))
    , mNamespace(kPluginNamespace)
{
}

nvinfer1::AsciiChar const* HstuAttentionPluginV2::getPluginType() const noexcept
{
    return kPluginName;
}

nvinfer1::AsciiChar const* HstuAttentionPluginV2::getPluginVersion() const noexcept
{
    return kPluginVersion;
}

int32_t HstuAttentionPluginV2::getNbOutputs() const noexcept
{
    return kNbOutputs;
}

int32_t HstuAttentionPluginV2::loadKernels() noexcept
{
    return guarded("load", kFailure,
        [this]
        {
            mCore.load();
            return kSuccess;
        });
}

int32_t HstuAttentionPluginV2::initialize() noexcept
{
    return loadKernels();
}

void HstuAttentionPluginV2::terminate() noexcept
{
    mCore.unload();
}

size_t HstuAttentionPluginV2::getSerializationSize() const noexcept
{
    return sizeof(SerializedNode);
}

void HstuAttentionPluginV2::serialize(void* buffer) const noexcept
{
    SerializedNode node;
    node.attributes = mCore.attributes();
    node.signature = mCore.signature();
    std::memcpy(buffer, &node, sizeof(node));
}

void HstuAttentionPluginV2::destroy() noexcept
{
    delete this;
}

void HstuAttentionPluginV2::setPluginNamespace(nvinfer1::AsciiChar const* pluginNamespace) noexcept
{
    guarded("setPluginNamespace", false,
        [&]
        {
            mNamespace = pluginNamespace != nullptr ? pluginNamespace : "";
            return true;
        });
}

nvinfer1::AsciiChar const* HstuAttentionPluginV2::getPluginNamespace() const noexcept
{
    return mNamespace.c_str();
}

nvinfer1::DataType HstuAttentionPluginV2::getOutputDataType(
    int32_t /* index */, nvinfer1::DataType const* inputTypes, int32_t /* nbInputs */) const noexcept
{
    return inputTypes[static_cast<int32_t>(Input::kQ)];
}

void HstuAttentionPluginV2::attachToContext(
    cudnnContext* /* cudnn */, cublasContext* /* cublas */, nvinfer1::IGpuAllocator* /* allocator */) noexcept
{
    loadKernels(); // enqueue reports a failure: this method cannot
}

nvinfer1::IPluginV2DynamicExt* HstuAttentionPluginV2::clone() const noexcept
{
    return guarded("clone", static_cast<HstuAttentionPluginV2*>(nullptr),
        [this]
        {
            auto* const copy = new HstuAttentionPluginV2(mCore);
            copy->setPluginNamespace(mNamespace.c_str());
            return copy;
        });
}

nvinfer1::DimsExprs HstuAttentionPluginV2::getOutputDimensions(int32_t /* outputIndex */,
    nvinfer1::DimsExprs const* inputs, int32_t nbInputs, nvinfer1::IExprBuilder& /* exprBuilder */) noexcept
{
    nvinfer1::DimsExprs invalid{};
    invalid.nbDims = -1; // how this interface reports an error
    return guarded("getOutputDimensions", invalid,
        [&]
        {
            HSTU_CHECK(nbInputs == countInputs(mCore.attributes()), kPluginName, " node '", mCore.nodeName(), "' has ",
                nbInputs, " inputs; its attributes ask for ", countInputs(mCore.attributes()));
            nvinfer1::DimsExprs const& q = inputs[static_cast<int32_t>(Input::kQ)];
            nvinfer1::DimsExprs const& v = inputs[static_cast<int32_t>(Input::kV)];
            HSTU_CHECK(q.nbDims == 3 && v.nbDims == 3, kPluginName, " node '", mCore.nodeName(), "': q has rank ",
                q.nbDims, " and v ", v.nbDims, "; allowed: 3");
            nvinfer1::DimsExprs output{};
            output.nbDims = 3;
            output.d[0] = q.d[0];
            output.d[1] = q.d[1];
            output.d[2] = v.d[2];
            return output;
        });
}

bool HstuAttentionPluginV2::supportsFormatCombination(
    int32_t pos, nvinfer1::PluginTensorDesc const* inOut, int32_t nbInputs, int32_t nbOutputs) noexcept
{
    return guarded("supportsFormatCombination", false,
        [&]
        {
            if (!isFormatSupported(mCore.attributes(), pos, inOut, nbInputs))
            {
                return false;
            }
            bool const isComplete = pos == nbInputs; // the output comes last
            return !isComplete
                   || mCore.canRun(tensorsOf(mCore.attributes(), inOut, nbInputs, inOut + nbInputs, nbOutputs),
                       [](std::string const& text)
                       { logMessage(nvinfer1::ILogger::Severity::kWARNING, "[hstu] " + text); });
        });
}

void HstuAttentionPluginV2::configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t nbInputs,
    nvinfer1::DynamicPluginTensorDesc const* out, int32_t nbOutputs) noexcept
{
    guarded("configurePlugin", kFailure,
        [&]
        {
            mCore.configure(tensorsOf(mCore.attributes(), in, nbInputs, out, nbOutputs));
            if (findCudaDriver() != nullptr)
            {
                // Called before the builder times the node, and at run time on every change of shape: then already
                // loaded.
                mCore.load();
            }
            return kSuccess;
        });
}

size_t HstuAttentionPluginV2::getWorkspaceSize(nvinfer1::PluginTensorDesc const* /* inputs */, int32_t /* nbInputs */,
    nvinfer1::PluginTensorDesc const* /* outputs */, int32_t /* nbOutputs */) const noexcept
{
    // SiLU needs no row maximum or row sum, so a program owns its output rows from first key to last and nothing is
    // carried between programs, whatever the profile's largest shape.
    return 0;
}

int32_t HstuAttentionPluginV2::enqueue(nvinfer1::PluginTensorDesc const* inputDesc,
    nvinfer1::PluginTensorDesc const* outputDesc, void const* const* inputs, void* const* outputs,
    void* /* workspace */, cudaStream_t stream) noexcept
{
    return guarded("enqueue", kFailure,
        [&]
        {
            HstuAttentionAttributes const& attributes = mCore.attributes();
            mCore.enqueue(tensorsOf(attributes, inputDesc, countInputs(attributes), outputDesc, kNbOutputs),
                pointersOf(attributes, inputs, outputs), stream);
            return kSuccess;
        });
}

HstuAttentionPluginCreatorV2::HstuAttentionPluginCreatorV2()
    : mNamespace(kPluginNamespace)
{
    for (AttributeSpec const& spec : kAttributes)
    {
        mFields.push_back(announcedField(spec));
    }
    mCollection.nbFields = static_cast<int32_t>(mFields.size());
    mCollection.fields = mFields.data();
}

nvinfer1::AsciiChar const* HstuAttentionPluginCreatorV2::getPluginName() const noexcept
{
    return kPluginName;
}

nvinfer1::AsciiChar const* HstuAttentionPluginCreatorV2::getPluginVersion() const noexcept
{
    return kPluginVersion;
}

nvinfer1::PluginFieldCollection const* HstuAttentionPluginCreatorV2::getFieldNames() noexcept
{
    return &mCollection;
}

nvinfer1::IPluginV2* HstuAttentionPluginCreatorV2::createPlugin(
    nvinfer1::AsciiChar const* name, nvinfer1::PluginFieldCollection const* fc) noexcept
{
    return guarded("createPlugin", static_cast<HstuAttentionPluginV2*>(nullptr),
        [&]
        {
            HstuAttentionAttributes const attributes = readAttributes(name, viewsOf(fc), /* signature = */ nullptr);
            return new HstuAttentionPluginV2(
                HstuAttentionCore(name != nullptr ? name : "", attributes, EngineSignature{}));
        });
}

nvinfer1::IPluginV2* HstuAttentionPluginCreatorV2::deserializePlugin(
    nvinfer1::AsciiChar const* name, void const* serialData, size_t serialLength) noexcept
{
    return guarded("deserializePlugin", static_cast<HstuAttentionPluginV2*>(nullptr),
        [&]
        {
            SerializedNode node;
            HSTU_CHECK(serialData != nullptr && serialLength == sizeof(node), kPluginName, " node '",
                name != nullptr ? name : "", "': the engine stores ", serialLength, " bytes; this library reads ",
                sizeof(node), ". The engine was built with another version of the plugin. Fix: rebuild the engine");
            std::memcpy(&node, serialData, sizeof(node));
            HSTU_CHECK(node.tag == SerializedNode::kTag && node.size == sizeof(node), kPluginName, " node '",
                name != nullptr ? name : "",
                "': the engine's bytes are not those of this plugin. Fix: rebuild the engine");
            return new HstuAttentionPluginV2(
                HstuAttentionCore(name != nullptr ? name : "", node.attributes, node.signature));
        });
}

void HstuAttentionPluginCreatorV2::setPluginNamespace(nvinfer1::AsciiChar const* pluginNamespace) noexcept
{
    guarded("setPluginNamespace", false,
        [&]
        {
            mNamespace = pluginNamespace != nullptr ? pluginNamespace : "";
            return true;
        });
}

nvinfer1::AsciiChar const* HstuAttentionPluginCreatorV2::getPluginNamespace() const noexcept
{
    return mNamespace.c_str();
}

#if NV_TENSORRT_MAJOR < 10
CreatorInterface& attentionCreator() noexcept
{
    static HstuAttentionPluginCreatorV2 creator;
    return creator;
}
#endif

} // namespace hstu
