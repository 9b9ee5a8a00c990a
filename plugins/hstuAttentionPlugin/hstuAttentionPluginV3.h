#ifndef HSTU_ATTENTION_PLUGIN_V3_H
#define HSTU_ATTENTION_PLUGIN_V3_H

#include <array>
#include <string>
#include <vector>

#include <NvInferRuntime.h>

#include "hstuAttentionCore.h"

namespace hstu
{

//! IPluginV3OneBuildV2, which can state aliasing, exists from TensorRT 10.3.
#if NV_TENSORRT_MAJOR > 10 || NV_TENSORRT_MINOR >= 3
using BuildCapability = nvinfer1::IPluginV3OneBuildV2;
#else
using BuildCapability = nvinfer1::IPluginV3OneBuild;
#endif

//! HstuAttention for TensorRT 10 and 11: translates between TensorRT's interfaces and HstuAttentionCore.
class HstuAttentionPluginV3 final : public nvinfer1::IPluginV3,
                                    public nvinfer1::IPluginV3OneCore,
                                    public BuildCapability,
                                    public nvinfer1::IPluginV3OneRuntime
{
public:
    explicit HstuAttentionPluginV3(HstuAttentionCore core);
    ~HstuAttentionPluginV3() override = default;

    // IPluginV3
    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3* clone() noexcept override;

    // IPluginV3OneCore
    nvinfer1::AsciiChar const* getPluginName() const noexcept override;
    nvinfer1::AsciiChar const* getPluginVersion() const noexcept override;
    nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override;

    // IPluginV3OneBuild
    int32_t getNbOutputs() const noexcept override;
    int32_t getOutputDataTypes(nvinfer1::DataType* outputTypes, int32_t nbOutputs, nvinfer1::DataType const* inputTypes,
        int32_t nbInputs) const noexcept override;
    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs, nvinfer1::DimsExprs const* shapeInputs,
        int32_t nbShapeInputs, nvinfer1::DimsExprs* outputs, int32_t nbOutputs,
        nvinfer1::IExprBuilder& exprBuilder) noexcept override;
    bool supportsFormatCombination(int32_t pos, nvinfer1::DynamicPluginTensorDesc const* inOut, int32_t nbInputs,
        int32_t nbOutputs) noexcept override;
    int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t nbInputs,
        nvinfer1::DynamicPluginTensorDesc const* out, int32_t nbOutputs) noexcept override;
    size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t nbInputs,
        nvinfer1::DynamicPluginTensorDesc const* outputs, int32_t nbOutputs) const noexcept override;
    int32_t getNbTactics() noexcept override;
    int32_t getValidTactics(int32_t* tactics, int32_t nbTactics) noexcept override;
    char const* getTimingCacheID() noexcept override;
    char const* getMetadataString() noexcept override;
#if NV_TENSORRT_MAJOR > 10 || NV_TENSORRT_MINOR >= 3
    int32_t getAliasedInput(int32_t outputIndex) noexcept override;
#endif

    // IPluginV3OneRuntime
    int32_t setTactic(int32_t tactic) noexcept override;
    int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t nbInputs, nvinfer1::PluginTensorDesc const* out,
        int32_t nbOutputs) noexcept override;
    int32_t enqueue(nvinfer1::PluginTensorDesc const* inputDesc, nvinfer1::PluginTensorDesc const* outputDesc,
        void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override;

private:
    HstuAttentionCore mCore;
    std::string mTimingCacheId;
    std::string mMetadata;
    std::vector<nvinfer1::PluginField> mSerializedFields; //!< points into mCore; rebuilt on every request
    nvinfer1::PluginFieldCollection mSerializedCollection{};
};

//! Makes HstuAttentionPluginV3 from the fields of an ONNX node or of a serialised engine.
class HstuAttentionPluginCreatorV3 final : public nvinfer1::IPluginCreatorV3One
{
public:
    HstuAttentionPluginCreatorV3();

    nvinfer1::IPluginV3* createPlugin(nvinfer1::AsciiChar const* name, nvinfer1::PluginFieldCollection const* fc,
        nvinfer1::TensorRTPhase phase) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override;
    nvinfer1::AsciiChar const* getPluginName() const noexcept override;
    nvinfer1::AsciiChar const* getPluginVersion() const noexcept override;
    nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override;

private:
    std::vector<nvinfer1::PluginField> mFields;
    nvinfer1::PluginFieldCollection mCollection{};
};

} // namespace hstu

#endif // HSTU_ATTENTION_PLUGIN_V3_H
