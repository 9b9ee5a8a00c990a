#include "hstuAttentionPluginV3.h"

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

} // namespace

HstuAttentionPluginV3::HstuAttentionPluginV3(HstuAttentionCore core)
    : mCore(std::move(core))
    , mTimingCacheId(describeAttributes(mCore.attributes()) + " kernels=" + kernelBuildId())
    , mMetadata("{\"plugin\": \"hstu::HstuAttention 1\", \"attributes\": \"" + describeAttributes(mCore.attributes())
                + "\", \"kernels\": \"" + kernelBuildId() + "\"}")
{
}

nvinfer1::IPluginCapability* HstuAttentionPluginV3::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept
{
    switch (type)
    {
    case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<BuildCapability*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

nvinfer1::IPluginV3* HstuAttentionPluginV3::clone() noexcept
{
    return guarded(
        "clone", static_cast<HstuAttentionPluginV3*>(nullptr), [this] { return new HstuAttentionPluginV3(mCore); });
}

nvinfer1::AsciiChar const* HstuAttentionPluginV3::getPluginName() const noexcept
{
    return kPluginName;
}

nvinfer1::AsciiChar const* HstuAttentionPluginV3::getPluginVersion() const noexcept
{
    return kPluginVersion;
}

nvinfer1::AsciiChar const* HstuAttentionPluginV3::getPluginNamespace() const noexcept
{
    return kPluginNamespace;
}

int32_t HstuAttentionPluginV3::getNbOutputs() const noexcept
{
    return kNbOutputs;
}

int32_t HstuAttentionPluginV3::getOutputDataTypes(nvinfer1::DataType* outputTypes, int32_t nbOutputs,
    nvinfer1::DataType const* inputTypes, int32_t nbInputs) const noexcept
{
    return guarded("getOutputDataTypes", kFailure,
        [&]
        {
            HSTU_CHECK(nbInputs == countInputs(mCore.attributes()), kPluginName, " node '", mCore.nodeName(), "' has ",
                nbInputs, " inputs; its attributes ask for ", countInputs(mCore.attributes()));
            HSTU_CHECK(nbOutputs == kNbOutputs, kPluginName, " has ", kNbOutputs, " output, not ", nbOutputs);
            outputTypes[0] = inputTypes[static_cast<int32_t>(Input::kQ)];
            return kSuccess;
        });
}

int32_t HstuAttentionPluginV3::getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs,
    nvinfer1::DimsExprs const* /* shapeInputs */, int32_t nbShapeInputs, nvinfer1::DimsExprs* outputs,
    int32_t nbOutputs, nvinfer1::IExprBuilder& /* exprBuilder */) noexcept
{
    return guarded("getOutputShapes", kFailure,
        [&]
        {
            HSTU_CHECK(nbInputs == countInputs(mCore.attributes()) && nbOutputs == kNbOutputs && nbShapeInputs == 0,
                kPluginName, " node '", mCore.nodeName(), "' has ", nbInputs, " inputs, ", nbShapeInputs,
                " shape inputs and ", nbOutputs, " outputs; allowed: ", countInputs(mCore.attributes()), ", 0 and ",
                kNbOutputs);
            nvinfer1::DimsExprs const& q = inputs[static_cast<int32_t>(Input::kQ)];
            nvinfer1::DimsExprs const& v = inputs[static_cast<int32_t>(Input::kV)];
            HSTU_CHECK(q.nbDims == 3 && v.nbDims == 3, kPluginName, " node '", mCore.nodeName(), "': q has rank ",
                q.nbDims, " and v ", v.nbDims, "; allowed: 3");
            outputs[0].nbDims = 3;
            outputs[0].d[0] = q.d[0];
            outputs[0].d[1] = q.d[1];
            outputs[0].d[2] = v.d[2];
            return kSuccess;
        });
}

bool HstuAttentionPluginV3::supportsFormatCombination(
    int32_t pos, nvinfer1::DynamicPluginTensorDesc const* inOut, int32_t nbInputs, int32_t nbOutputs) noexcept
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

int32_t HstuAttentionPluginV3::configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t nbInputs,
    nvinfer1::DynamicPluginTensorDesc const* out, int32_t nbOutputs) noexcept
{
    return guarded("configurePlugin", kFailure,
        [&]
        {
            mCore.configure(tensorsOf(mCore.attributes(), in, nbInputs, out, nbOutputs));
            return kSuccess;
        });
}

size_t HstuAttentionPluginV3::getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* /* inputs */,
    int32_t /* nbInputs */, nvinfer1::DynamicPluginTensorDesc const* /* outputs */,
    int32_t /* nbOutputs */) const noexcept
{
    // SiLU needs no row maximum or row sum, so a program owns its output rows from first key to last and nothing is
    // carried between programs, whatever the profile's largest shape.
    return 0;
}

int32_t HstuAttentionPluginV3::getNbTactics() noexcept
{
    return guarded("getNbTactics", 0, [this] { return static_cast<int32_t>(mCore.tactics().size()); });
}

int32_t HstuAttentionPluginV3::getValidTactics(int32_t* tactics, int32_t nbTactics) noexcept
{
    return guarded("getValidTactics", kFailure,
        [&]
        {
            std::vector<int32_t> const ids = mCore.tactics();
            HSTU_CHECK(static_cast<size_t>(nbTactics) == ids.size(), kPluginName, " was asked for ", nbTactics,
                " tactics; it has ", ids.size());
            for (size_t i = 0; i < ids.size(); ++i)
            {
                tactics[i] = ids[i];
            }
            return kSuccess;
        });
}

char const* HstuAttentionPluginV3::getTimingCacheID() noexcept
{
    return mTimingCacheId.c_str();
}

char const* HstuAttentionPluginV3::getMetadataString() noexcept
{
    return mMetadata.c_str();
}

#if NV_TENSORRT_MAJOR > 10 || NV_TENSORRT_MINOR >= 3
int32_t HstuAttentionPluginV3::getAliasedInput(int32_t /* outputIndex */) noexcept
{
    return -1; // out never shares memory with an input: q may be read by other programs after a row is written
}
#endif

int32_t HstuAttentionPluginV3::setTactic(int32_t tactic) noexcept
{
    return guarded("setTactic", kFailure,
        [&]
        {
            mCore.setTactic(tactic);
            return kSuccess;
        });
}

int32_t HstuAttentionPluginV3::onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t nbInputs,
    nvinfer1::PluginTensorDesc const* out, int32_t nbOutputs) noexcept
{
    return guarded("onShapeChange", kFailure,
        [&]
        {
            // Cheap when nothing changed: TensorRT calls this on every new shape or address. Kernels are loaded by
            // attachToContext; only an object that the builder times without attaching it loads them here.
            mCore.configure(tensorsOf(mCore.attributes(), in, nbInputs, out, nbOutputs));
            mCore.load();
            return kSuccess;
        });
}

int32_t HstuAttentionPluginV3::enqueue(nvinfer1::PluginTensorDesc const* inputDesc,
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

nvinfer1::IPluginV3* HstuAttentionPluginV3::attachToContext(nvinfer1::IPluginResourceContext* /* context */) noexcept
{
    return guarded("attachToContext", static_cast<HstuAttentionPluginV3*>(nullptr),
        [this] { return new HstuAttentionPluginV3(mCore.attached()); });
}

nvinfer1::PluginFieldCollection const* HstuAttentionPluginV3::getFieldsToSerialize() noexcept
{
    return guarded("getFieldsToSerialize", static_cast<nvinfer1::PluginFieldCollection*>(nullptr),
        [this]
        {
            mSerializedFields.clear();
            for (AttributeSpec const& spec : kAttributes)
            {
                nvinfer1::PluginField field = announcedField(spec);
                field.data = spec.isFloat ? static_cast<void const*>(&(mCore.attributes().*spec.floatMember))
                                          : static_cast<void const*>(&(mCore.attributes().*spec.intMember));
                mSerializedFields.push_back(field);
            }
            for (SignatureField const& field : kSignatureFields)
            {
                mSerializedFields.emplace_back(
                    field.name, &(mCore.signature().*field.member), nvinfer1::PluginFieldType::kINT32, 1);
            }
            mSerializedCollection.nbFields = static_cast<int32_t>(mSerializedFields.size());
            mSerializedCollection.fields = mSerializedFields.data();
            return &mSerializedCollection;
        });
}

HstuAttentionPluginCreatorV3::HstuAttentionPluginCreatorV3()
{
    for (AttributeSpec const& spec : kAttributes)
    {
        mFields.push_back(announcedField(spec));
    }
    mCollection.nbFields = static_cast<int32_t>(mFields.size());
    mCollection.fields = mFields.data();
}

nvinfer1::IPluginV3* HstuAttentionPluginCreatorV3::createPlugin(
    nvinfer1::AsciiChar const* name, nvinfer1::PluginFieldCollection const* fc, nvinfer1::TensorRTPhase phase) noexcept
{
    return guarded("createPlugin", static_cast<HstuAttentionPluginV3*>(nullptr),
        [&]
        {
            EngineSignature signature;
            bool const fromEngine = phase == nvinfer1::TensorRTPhase::kRUNTIME;
            HstuAttentionAttributes const attributes =
                readAttributes(name, viewsOf(fc), fromEngine ? &signature : nullptr);
            return new HstuAttentionPluginV3(HstuAttentionCore(name != nullptr ? name : "", attributes, signature));
        });
}

nvinfer1::PluginFieldCollection const* HstuAttentionPluginCreatorV3::getFieldNames() noexcept
{
    return &mCollection;
}

nvinfer1::AsciiChar const* HstuAttentionPluginCreatorV3::getPluginName() const noexcept
{
    return kPluginName;
}

nvinfer1::AsciiChar const* HstuAttentionPluginCreatorV3::getPluginVersion() const noexcept
{
    return kPluginVersion;
}

nvinfer1::AsciiChar const* HstuAttentionPluginCreatorV3::getPluginNamespace() const noexcept
{
    return kPluginNamespace;
}

CreatorInterface& attentionCreator() noexcept
{
    static HstuAttentionPluginCreatorV3 creator;
    return creator;
}

} // namespace hstu
