#ifndef HSTU_NORM_OPERATOR_H
#define HSTU_NORM_OPERATOR_H

#include "hstuNormCore.h"
#include "tensorRtTypes.h"

namespace hstu::norm
{

//! What the adapters ask of HstuNorm.
struct NormOperator
{
    using Core = HstuNormCore;
    using Attributes = HstuNormAttributes;
    using Signature = EngineSignature;

    static constexpr OperatorIdentity kId = kIdentity;
    static constexpr int32_t kNbOutputs = norm::kNbOutputs;
    static constexpr auto& kAttributes = norm::kAttributes;
    static constexpr auto& kSignatureFields = norm::kSignatureFields;
    static constexpr uint32_t kTag = 0x314E5348; //!< "HSN1" in little-endian bytes

    static int32_t countInputs(Attributes const& attributes) noexcept
    {
        return norm::countInputs(attributes);
    }

    static Attributes read(char const* nodeName, std::vector<FieldView> const& fields, Signature* signature)
    {
        return readAttributes(nodeName, fields, signature);
    }

    static char const* buildId() noexcept
    {
        return kernelBuildId();
    }

    //! What the attribute says, whatever type the framework would rather have.
    static nvinfer1::DataType outputType(Attributes const& attributes, nvinfer1::DataType const* /* inputTypes */)
    {
        switch (typeOf(attributes, -1))
        {
        case ElementType::kFloat16: return nvinfer1::DataType::kHALF;
#if NV_TENSORRT_MAJOR >= 10
        case ElementType::kBfloat16: return nvinfer1::DataType::kBF16;
#endif
        default: return nvinfer1::DataType::kFLOAT;
        }
    }

    //! Throws PluginError when x has another rank than 2, or a width that is not fixed and must be multiplied.
    static nvinfer1::DimsExprs outputDims(
        Core const& core, nvinfer1::DimsExprs const* inputs, nvinfer1::IExprBuilder& expressions)
    {
        nvinfer1::DimsExprs const& x = inputs[static_cast<int32_t>(Input::kX)];
        HSTU_CHECK(x.nbDims == 2, kPluginName, " node '", core.nodeName(), "': x has rank ", x.nbDims, "; allowed: 2");
        nvinfer1::DimsExprs output = x;
        if (core.attributes().concat != 0)
        {
            HSTU_CHECK(x.d[1]->isConstant(), kPluginName, " node '", core.nodeName(),
                "': axis 1 of x is dynamic; allowed: an extent that is fixed when the engine is built");
            int64_t const width = outputWidth(core.attributes(), x.d[1]->getConstantValue());
#if NV_TENSORRT_MAJOR >= 10
            output.d[1] = expressions.constant(width);
#else
            output.d[1] = expressions.constant(static_cast<int32_t>(width));
#endif
        }
        return output;
    }

    //! Whether the type of tensor `position` is the one of the attributes: inputs first, then the output.
    template <typename Desc>
    static bool isFormatSupported(Attributes const& attributes, int32_t position, Desc const* inOut, int32_t nbInputs)
    {
        nvinfer1::PluginTensorDesc const& desc = staticDesc(inOut[position]);
        int32_t const input = position < nbInputs ? inputAt(attributes, position) : -1;
        return desc.format == nvinfer1::TensorFormat::kLINEAR && nbInputs == norm::countInputs(attributes)
               && elementTypeOf(desc.type) == typeOf(attributes, input);
    }

    //! Lays the node's inputs, of which absent ones are not in the list, out in the contract's positions.
    //! Throws PluginError when their number is not what the attributes say.
    template <typename Desc>
    static NodeTensors tensorsOf(
        Attributes const& attributes, Desc const* in, int32_t nbInputs, Desc const* out, int32_t nbOutputs)
    {
        HSTU_CHECK(nbInputs == norm::countInputs(attributes), kPluginName, ": the node has ", nbInputs,
            " inputs; its attributes ask for ", norm::countInputs(attributes));
        HSTU_CHECK(
            nbOutputs == kNbOutputs, kPluginName, ": the node has ", nbOutputs, " outputs; allowed: ", kNbOutputs);
        NodeTensors tensors;
        for (int32_t position = 0; position < nbInputs; ++position)
        {
            tensors.inputs[static_cast<size_t>(inputAt(attributes, position))] = viewOf(staticDesc(in[position]));
        }
        tensors.output = viewOf(staticDesc(out[0]));
        return tensors;
    }

    static DevicePointers pointersOf(
        Attributes const& attributes, void const* const* inputs, void* const* outputs) noexcept
    {
        DevicePointers pointers;
        int32_t const nbInputs = norm::countInputs(attributes);
        for (int32_t position = 0; position < nbInputs; ++position)
        {
            pointers.inputs[static_cast<size_t>(inputAt(attributes, position))] = inputs[position];
        }
        pointers.output = outputs[0];
        return pointers;
    }
};

} // namespace hstu::norm

#endif // HSTU_NORM_OPERATOR_H
