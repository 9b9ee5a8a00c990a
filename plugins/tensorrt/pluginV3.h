#ifndef HSTU_PLUGIN_V3_H
#define HSTU_PLUGIN_V3_H

#include <string>
#include <utility>
#include <vector>

#include "hostLogger.h"
#include "tensorRtTypes.h"

namespace hstu
{

//! IPluginV3OneBuildV2, which can state aliasing, exists from TensorRT 10.3.
#if NV_TENSORRT_MAJOR > 10 || NV_TENSORRT_MINOR >= 3
using BuildCapability = nvinfer1::IPluginV3OneBuildV2;
#else
using BuildCapability = nvinfer1::IPluginV3OneBuild;
#endif

//! An operator for TensorRT 10 and 11: translates between TensorRT's interfaces and Operator::Core, which knows none.
template <typename Operator>
class PluginV3 final : public nvinfer1::IPluginV3,
                       public nvinfer1::IPluginV3OneCore,
                       public BuildCapability,
                       public nvinfer1::IPluginV3OneRuntime
{
public:
    using Core = typename Operator::Core;

    explicit PluginV3(Core core)
        : mCore(std::move(core))
        , mTimingCacheId(described() + " kernels=" + Operator::buildId())
        , mMetadata("{\"plugin\": \"" + std::string(Operator::kId.space) + "::" + Operator::kId.name + " "
                    + Operator::kId.version + "\", \"attributes\": \"" + described() + "\", \"kernels\": \""
                    + Operator::buildId() + "\"}")
    {
    }

    ~PluginV3() override = default;

    // IPluginV3
    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override
    {
        switch (type)
        {
        case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
        case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<BuildCapability*>(this);
        case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }

    nvinfer1::IPluginV3* clone() noexcept override
    {
        return guarded("clone", static_cast<PluginV3*>(nullptr), [this] { return new PluginV3(mCore); });
    }

    // IPluginV3OneCore
    nvinfer1::AsciiChar const* getPluginName() const noexcept override
    {
        return Operator::kId.name;
    }

    nvinfer1::AsciiChar const* getPluginVersion() const noexcept override
    {
        return Operator::kId.version;
    }

    nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override
    {
        return Operator::kId.space;
    }

    // IPluginV3OneBuild
    int32_t getNbOutputs() const noexcept override
    {
        return Operator::kNbOutputs;
    }

    int32_t getOutputDataTypes(nvinfer1::DataType* outputTypes, int32_t nbOutputs,
        nvinfer1::DataType const* inputTypes, int32_t nbInputs) const noexcept override
    {
        return guarded("getOutputDataTypes", kFailure,
            [&]
            {
                checkCounts(nbInputs, 0, nbOutputs);
                outputTypes[0] = Operator::outputType(mCore.attributes(), inputTypes);
                return kSuccess;
            });
    }

    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs,
        nvinfer1::DimsExprs const* /* shapeInputs */, int32_t nbShapeInputs, nvinfer1::DimsExprs* outputs,
        int32_t nbOutputs, nvinfer1::IExprBuilder& expressions) noexcept override
    {
        return guarded("getOutputShapes", kFailure,
            [&]
            {
                checkCounts(nbInputs, nbShapeInputs, nbOutputs);
                outputs[0] = Operator::outputDims(mCore, inputs, expressions);
                return kSuccess;
            });
    }

    bool supportsFormatCombination(int32_t pos, nvinfer1::DynamicPluginTensorDesc const* inOut, int32_t nbInputs,
        int32_t nbOutputs) noexcept override
    {
        return guarded("supportsFormatCombination", false,
            [&]
            {
                auto const& attributes = mCore.attributes();
                if (!Operator::isFormatSupported(attributes, pos, inOut, nbInputs))
                {
                    return false;
                }
                bool const isComplete = pos == nbInputs; // the output comes last
                return !isComplete
                       || mCore.canRun(Operator::tensorsOf(attributes, inOut, nbInputs, inOut + nbInputs, nbOutputs),
                           [](std::string const& text)
                           { logMessage(nvinfer1::ILogger::Severity::kWARNING, "[hstu] " + text); });
            });
    }

    int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t nbInputs,
        nvinfer1::DynamicPluginTensorDesc const* out, int32_t nbOutputs) noexcept override
    {
        return guarded("configurePlugin", kFailure,
            [&]
            {
                mCore.configure(Operator::tensorsOf(mCore.attributes(), in, nbInputs, out, nbOutputs));
                return kSuccess;
            });
    }

    size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* /* inputs */, int32_t /* nbInputs */,
        nvinfer1::DynamicPluginTensorDesc const* /* outputs */, int32_t /* nbOutputs */) const noexcept override
    {
        return 0; // a program of either operator owns its output rows: nothing is carried between programs
    }

    int32_t getNbTactics() noexcept override
    {
        return guarded("getNbTactics", 0, [this] { return static_cast<int32_t>(mCore.tactics().size()); });
    }

    int32_t getValidTactics(int32_t* tactics, int32_t nbTactics) noexcept override
    {
        return guarded("getValidTactics", kFailure,
            [&]
            {
                std::vector<int32_t> const ids = mCore.tactics();
                HSTU_CHECK(static_cast<size_t>(nbTactics) == ids.size(), Operator::kId.name, " was asked for ",
                    nbTactics, " tactics; it has ", ids.size());
                for (size_t i = 0; i < ids.size(); ++i)
                {
                    tactics[i] = ids[i];
                }
                return kSuccess;
            });
    }

    char const* getTimingCacheID() noexcept override
    {
        return mTimingCacheId.c_str();
    }

    char const* getMetadataString() noexcept override
    {
        return mMetadata.c_str();
    }

#if NV_TENSORRT_MAJOR > 10 || NV_TENSORRT_MINOR >= 3
    int32_t getAliasedInput(int32_t /* outputIndex */) noexcept override
    {
        return -1; // out never shares memory with an input: other programs may read that after a row is written
    }
#endif

    // IPluginV3OneRuntime
    int32_t setTactic(int32_t tactic) noexcept override
    {
        return guarded("setTactic", kFailure,
            [&]
            {
                mCore.setTactic(tactic);
                return kSuccess;
            });
    }

    int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t nbInputs,
        nvinfer1::PluginTensorDesc const* out, int32_t nbOutputs) noexcept override
    {
        return guarded("onShapeChange", kFailure,
            [&]
            {
                // Cheap when nothing changed: TensorRT calls this on every new shape or address. Kernels are loaded by
                // attachToContext; only an object that the builder times without attaching it loads them here.
                mCore.configure(Operator::tensorsOf(mCore.attributes(), in, nbInputs, out, nbOutputs));
                mCore.load();
                return kSuccess;
            });
    }

    int32_t enqueue(nvinfer1::PluginTensorDesc const* inputDesc, nvinfer1::PluginTensorDesc const* outputDesc,
        void const* const* inputs, void* const* outputs, void* /* workspace */, cudaStream_t stream) noexcept override
    {
        return guarded("enqueue", kFailure,
            [&]
            {
                auto const& attributes = mCore.attributes();
                mCore.enqueue(Operator::tensorsOf(attributes, inputDesc, Operator::countInputs(attributes), outputDesc,
                                  Operator::kNbOutputs),
                    Operator::pointersOf(attributes, inputs, outputs), stream);
                return kSuccess;
            });
    }

    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* /* context */) noexcept override
    {
        return guarded("attachToContext", static_cast<PluginV3*>(nullptr),
            [this] { return new PluginV3(mCore.attached()); });
    }

    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override
    {
        return guarded("getFieldsToSerialize", static_cast<nvinfer1::PluginFieldCollection*>(nullptr),
            [this]
            {
                mSerializedFields.clear();
                for (auto const& spec : Operator::kAttributes)
                {
                    nvinfer1::PluginField field = announcedField(spec);
                    field.data = spec.isFloat ? static_cast<void const*>(&(mCore.attributes().*spec.floatMember))
                                              : static_cast<void const*>(&(mCore.attributes().*spec.intMember));
                    mSerializedFields.push_back(field);
                }
                for (auto const& field : Operator::kSignatureFields)
                {
                    mSerializedFields.emplace_back(
                        field.name, &(mCore.signature().*field.member), nvinfer1::PluginFieldType::kINT32, 1);
                }
                mSerializedCollection.nbFields = static_cast<int32_t>(mSerializedFields.size());
                mSerializedCollection.fields = mSerializedFields.data();
                return &mSerializedCollection;
            });
    }

private:
    static constexpr int32_t kSuccess = 0;
    static constexpr int32_t kFailure = -1;

    std::string described() const
    {
        return describeFields(Operator::kAttributes, mCore.attributes());
    }

    //! Throws PluginError unless the numbers of tensors are those of the node's attributes.
    void checkCounts(int32_t nbInputs, int32_t nbShapeInputs, int32_t nbOutputs) const
    {
        int32_t const wanted = Operator::countInputs(mCore.attributes());
        HSTU_CHECK(nbInputs == wanted && nbOutputs == Operator::kNbOutputs && nbShapeInputs == 0, Operator::kId.name,
            " node '", mCore.nodeName(), "' has ", nbInputs, " inputs, ", nbShapeInputs, " shape inputs and ",
            nbOutputs, " outputs; its attributes ask for ", wanted, ", 0 and ", Operator::kNbOutputs);
    }

    Core mCore;
    std::string mTimingCacheId;
    std::string mMetadata;
    std::vector<nvinfer1::PluginField> mSerializedFields; //!< points into mCore; rebuilt on every request
    nvinfer1::PluginFieldCollection mSerializedCollection{};
};

//! Makes PluginV3 from the fields of an ONNX node or of a serialised engine.
template <typename Operator>
class PluginCreatorV3 final : public nvinfer1::IPluginCreatorV3One
{
public:
    using Plugin = PluginV3<Operator>;

    PluginCreatorV3()
    {
        for (auto const& spec : Operator::kAttributes)
        {
            mFields.push_back(announcedField(spec));
        }
        mCollection.nbFields = static_cast<int32_t>(mFields.size());
        mCollection.fields = mFields.data();
    }

    nvinfer1::IPluginV3* createPlugin(nvinfer1::AsciiChar const* name, nvinfer1::PluginFieldCollection const* fc,
        nvinfer1::TensorRTPhase phase) noexcept override
    {
        return guarded("createPlugin", static_cast<Plugin*>(nullptr),
            [&]
            {
                typename Operator::Signature signature;
                bool const fromEngine = phase == nvinfer1::TensorRTPhase::kRUNTIME;
                auto const attributes
                    = Operator::read(name, viewsOf(fc, Operator::kId.name), fromEngine ? &signature : nullptr);
                return new Plugin(typename Operator::Core(name != nullptr ? name : "", attributes, signature));
            });
    }

    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override
    {
        return &mCollection;
    }

    nvinfer1::AsciiChar const* getPluginName() const noexcept override
    {
        return Operator::kId.name;
    }

    nvinfer1::AsciiChar const* getPluginVersion() const noexcept override
    {
        return Operator::kId.version;
    }

    nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override
    {
        return Operator::kId.space;
    }

private:
    std::vector<nvinfer1::PluginField> mFields;
    nvinfer1::PluginFieldCollection mCollection{};
};

} // namespace hstu

#endif // HSTU_PLUGIN_V3_H
