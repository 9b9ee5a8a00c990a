#ifndef HSTU_PLUGIN_V2_H
#define HSTU_PLUGIN_V2_H

#include <cstring>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "cudaDriver.h"
#include "hostLogger.h"
#include "tensorRtTypes.h"

namespace hstu
{

//! An operator for TensorRT 8.5 and 8.6: translates between TensorRT's interfaces and Operator::Core, which knows none.
//!
//! TensorRT 8 has neither int64 tensors nor bfloat16 nor plugin tactics: the first tactic is used.
template <typename Operator>
class PluginV2 final : public nvinfer1::IPluginV2DynamicExt
{
public:
    using Core = typename Operator::Core;

    explicit PluginV2(Core core)
        : mCore(std::move(core))
        , mNamespace(Operator::kId.space)
    {
    }

    //! What an engine stores of one node. The tag is the operator's and changes with the layout, so bytes of another
    //! build are refused.
    struct SerializedNode
    {
        uint32_t tag{Operator::kTag};
        uint32_t size{sizeof(SerializedNode)};
        typename Operator::Attributes attributes{};
        typename Operator::Signature signature{};
    };

    // IPluginV2
    nvinfer1::AsciiChar const* getPluginType() const noexcept override
    {
        return Operator::kId.name;
    }

    nvinfer1::AsciiChar const* getPluginVersion() const noexcept override
    {
        return Operator::kId.version;
    }

    int32_t getNbOutputs() const noexcept override
    {
        return Operator::kNbOutputs;
    }

    int32_t initialize() noexcept override
    {
        return loadKernels();
    }

    void terminate() noexcept override
    {
        mCore.unload();
    }

    size_t getSerializationSize() const noexcept override
    {
        return sizeof(SerializedNode);
    }

    void serialize(void* buffer) const noexcept override
    {
        SerializedNode node;
        node.attributes = mCore.attributes();
        node.signature = mCore.signature();
        std::memcpy(buffer, &node, sizeof(node));
    }

    void destroy() noexcept override
    {
        delete this;
    }

    void setPluginNamespace(nvinfer1::AsciiChar const* pluginNamespace) noexcept override
    {
        guarded("setPluginNamespace", false,
            [&]
            {
                mNamespace = pluginNamespace != nullptr ? pluginNamespace : "";
                return true;
            });
    }

    nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override
    {
        return mNamespace.c_str();
    }

    // IPluginV2Ext
    nvinfer1::DataType getOutputDataType(
        int32_t /* index */, nvinfer1::DataType const* inputTypes, int32_t /* nbInputs */) const noexcept override
    {
        return Operator::outputType(mCore.attributes(), inputTypes);
    }

    void attachToContext(
        cudnnContext* /* cudnn */, cublasContext* /* cublas */, nvinfer1::IGpuAllocator* /* allocator */) noexcept override
    {
        loadKernels(); // enqueue reports a failure: this method cannot
    }

    // IPluginV2DynamicExt
    nvinfer1::IPluginV2DynamicExt* clone() const noexcept override
    {
        return guarded("clone", static_cast<PluginV2*>(nullptr),
            [this]
            {
                auto* const copy = new PluginV2(mCore);
                copy->setPluginNamespace(mNamespace.c_str());
                return copy;
            });
    }

    nvinfer1::DimsExprs getOutputDimensions(int32_t /* outputIndex */, nvinfer1::DimsExprs const* inputs,
        int32_t nbInputs, nvinfer1::IExprBuilder& expressions) noexcept override
    {
        nvinfer1::DimsExprs invalid{};
        invalid.nbDims = -1; // how this interface reports an error
        return guarded("getOutputDimensions", invalid,
            [&]
            {
                int32_t const wanted = Operator::countInputs(mCore.attributes());
                HSTU_CHECK(nbInputs == wanted, Operator::kId.name, " node '", mCore.nodeName(), "' has ", nbInputs,
                    " inputs; its attributes ask for ", wanted);
                return Operator::outputDims(mCore, inputs, expressions);
            });
    }

    bool supportsFormatCombination(
        int32_t pos, nvinfer1::PluginTensorDesc const* inOut, int32_t nbInputs, int32_t nbOutputs) noexcept override
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

    void configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t nbInputs,
        nvinfer1::DynamicPluginTensorDesc const* out, int32_t nbOutputs) noexcept override
    {
        guarded("configurePlugin", kFailure,
            [&]
            {
                mCore.configure(Operator::tensorsOf(mCore.attributes(), in, nbInputs, out, nbOutputs));
                if (findCudaDriver() != nullptr)
                {
                    // Called before the builder times the node, and at run time on every change of shape: then already
                    // loaded.
                    mCore.load();
                }
                return kSuccess;
            });
    }

    size_t getWorkspaceSize(nvinfer1::PluginTensorDesc const* /* inputs */, int32_t /* nbInputs */,
        nvinfer1::PluginTensorDesc const* /* outputs */, int32_t /* nbOutputs */) const noexcept override
    {
        return 0; // a program of either operator owns its output rows: nothing is carried between programs
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

    //! Reads what an engine stores. An engine from before an attribute with a default was there lacks its bytes, which are
    //! the last ones of the attributes: the node then keeps the default.
    //! Throws PluginError for any other bytes.
    static SerializedNode nodeFrom(char const* name, void const* data, size_t length)
    {
        size_t lacking = 0;
        for (auto const& spec : Operator::kAttributes)
        {
            lacking += spec.hasDefault ? sizeof(int32_t) : 0;
        }
        HSTU_CHECK(data != nullptr && length <= sizeof(SerializedNode) && length + lacking >= sizeof(SerializedNode)
                && length % sizeof(int32_t) == 0,
            Operator::kId.name, " node '", name, "': the engine stores ", length, " bytes; this library reads ",
            sizeof(SerializedNode), ". The engine was built with another version of the plugin. Fix: rebuild the engine");
        SerializedNode node;
        char const* source = static_cast<char const*>(data);
        auto const take = [&source](void* target, size_t bytes)
        {
            std::memcpy(target, source, bytes);
            source += bytes;
        };
        take(&node.tag, sizeof(node.tag));
        take(&node.size, sizeof(node.size));
        HSTU_CHECK(node.tag == Operator::kTag && node.size == length, Operator::kId.name, " node '", name,
            "': the engine's bytes are not those of this plugin. Fix: rebuild the engine");
        take(&node.attributes, sizeof(node.attributes) - (sizeof(SerializedNode) - length));
        take(&node.signature, sizeof(node.signature));
        return node;
    }

private:
    static_assert(sizeof(SerializedNode) == 2 * sizeof(uint32_t) + sizeof(typename Operator::Attributes)
                      + sizeof(typename Operator::Signature),
        "the parts are stored one behind the other");
    static_assert(std::is_trivially_copyable<typename Operator::Attributes>::value
                      && std::is_trivially_copyable<typename Operator::Signature>::value,
        "the node is stored byte by byte");

    static constexpr int32_t kSuccess = 0;
    static constexpr int32_t kFailure = -1;

    //! Loads the kernels when a GPU is there and the node was configured. \return 0 on success.
    int32_t loadKernels() noexcept
    {
        return guarded("load", kFailure,
            [this]
            {
                mCore.load();
                return kSuccess;
            });
    }

    Core mCore;
    std::string mNamespace;
};

//! Makes PluginV2 from the fields of an ONNX node or from the bytes of a serialised engine.
template <typename Operator>
class PluginCreatorV2 final : public nvinfer1::IPluginCreator
{
public:
    using Plugin = PluginV2<Operator>;

    PluginCreatorV2()
        : mNamespace(Operator::kId.space)
    {
        for (auto const& spec : Operator::kAttributes)
        {
            mFields.push_back(announcedField(spec));
        }
        mCollection.nbFields = static_cast<int32_t>(mFields.size());
        mCollection.fields = mFields.data();
    }

    nvinfer1::AsciiChar const* getPluginName() const noexcept override
    {
        return Operator::kId.name;
    }

    nvinfer1::AsciiChar const* getPluginVersion() const noexcept override
    {
        return Operator::kId.version;
    }

    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override
    {
        return &mCollection;
    }

    nvinfer1::IPluginV2* createPlugin(
        nvinfer1::AsciiChar const* name, nvinfer1::PluginFieldCollection const* fc) noexcept override
    {
        return guarded("createPlugin", static_cast<Plugin*>(nullptr),
            [&]
            {
                auto const attributes
                    = Operator::read(name, viewsOf(fc, Operator::kId.name), /* signature = */ nullptr);
                return new Plugin(typename Operator::Core(name != nullptr ? name : "", attributes, {}));
            });
    }

    nvinfer1::IPluginV2* deserializePlugin(
        nvinfer1::AsciiChar const* name, void const* serialData, size_t serialLength) noexcept override
    {
        return guarded("deserializePlugin", static_cast<Plugin*>(nullptr),
            [&]
            {
                char const* const label = name != nullptr ? name : "";
                auto const node = Plugin::nodeFrom(label, serialData, serialLength);
                return new Plugin(typename Operator::Core(label, node.attributes, node.signature));
            });
    }

    void setPluginNamespace(nvinfer1::AsciiChar const* pluginNamespace) noexcept override
    {
        guarded("setPluginNamespace", false,
            [&]
            {
                mNamespace = pluginNamespace != nullptr ? pluginNamespace : "";
                return true;
            });
    }

    nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override
    {
        return mNamespace.c_str();
    }

private:
    std::vector<nvinfer1::PluginField> mFields;
    nvinfer1::PluginFieldCollection mCollection{};
    std::string mNamespace;
};

} // namespace hstu

#endif // HSTU_PLUGIN_V2_H
