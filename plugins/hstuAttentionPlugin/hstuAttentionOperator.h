#ifndef HSTU_ATTENTION_OPERATOR_H
#define HSTU_ATTENTION_OPERATOR_H

#include "hstuAttentionCore.h"
#include "tensorRtTypes.h"

namespace hstu
{

//! Lays the node's inputs, of which absent ones are not in the list, out in the contract's positions.
//! Throws PluginError when their number is not what the attributes say.
template <typename Desc>
NodeTensors tensorsOf(
    HstuAttentionAttributes const& attributes, Desc const* in, int32_t nbInputs, Desc const* out, int32_t nbOutputs)
{
    HSTU_CHECK(nbInputs == countInputs(attributes), kPluginName, ": the node has ", nbInputs,
        " inputs; its attributes ask for ", countInputs(attributes));
    HSTU_CHECK(nbOutputs == kNbOutputs, kPluginName, ": the node has ", nbOutputs, " outputs; allowed: ", kNbOutputs);
    NodeTensors tensors;
    for (int32_t position = 0; position < nbInputs; ++position)
    {
        tensors.inputs[static_cast<size_t>(inputAt(attributes, position))] = viewOf(staticDesc(in[position]));
    }
    tensors.output = viewOf(staticDesc(out[0]));
    return tensors;
}

//! Whether the type of tensor `position` is legal, given only the tensors before it: inputs first, then the output.
template <typename Desc>
bool isFormatSupported(HstuAttentionAttributes const& attributes, int32_t position, Desc const* inOut, int32_t nbInputs)
{
    nvinfer1::PluginTensorDesc const& desc = staticDesc(inOut[position]);
    if (desc.format != nvinfer1::TensorFormat::kLINEAR || nbInputs != countInputs(attributes))
    {
        return false;
    }
    ElementType const type = elementTypeOf(desc.type);
    auto isOneOf = [type](auto const& allowed)
    {
        for (ElementType const candidate : allowed)
        {
            if (candidate == type)
            {
                return true;
            }
        }
        return false;
    };
    auto sameAs = [inOut, type](int32_t other) { return type == elementTypeOf(staticDesc(inOut[other]).type); };

    constexpr int32_t kQPosition = 0; // q is always present
    int32_t const input = position < nbInputs ? inputAt(attributes, position) : -1;
    TypeClass const typeClass = input >= 0 ? kInputs[input].type : kOutputs[0].type;
    switch (typeClass)
    {
    case TypeClass::kElement: return position == kQPosition ? isOneOf(kElementTypes) : sameAs(kQPosition);
    case TypeClass::kTimestamp:
        if (input == static_cast<int32_t>(Input::kRowTimestamps))
        {
            return isOneOf(kTimestampTypes);
        }
        for (int32_t other = 0; other < position; ++other)
        {
            if (inputAt(attributes, other) == static_cast<int32_t>(Input::kRowTimestamps))
            {
                return sameAs(other);
            }
        }
        return false;
    case TypeClass::kInt32: return type == ElementType::kInt32;
    case TypeClass::kFloat32: return type == ElementType::kFloat32;
    }
    return false;
}

//! \return the device pointers in the contract's positions.
inline DevicePointers pointersOf(
    HstuAttentionAttributes const& attributes, void const* const* inputs, void* const* outputs) noexcept
{
    DevicePointers pointers;
    int32_t const nbInputs = countInputs(attributes);
    for (int32_t position = 0; position < nbInputs; ++position)
    {
        pointers.inputs[static_cast<size_t>(inputAt(attributes, position))] = inputs[position];
    }
    pointers.output = outputs[0];
    return pointers;
}

//! What the adapters ask of HstuAttention.
struct AttentionOperator
{
    using Core = HstuAttentionCore;
    using Attributes = HstuAttentionAttributes;
    using Signature = EngineSignature;

    static constexpr OperatorIdentity kId = kIdentity;
    static constexpr int32_t kNbOutputs = hstu::kNbOutputs;
    static constexpr auto& kAttributes = hstu::kAttributes;
    static constexpr auto& kSignatureFields = hstu::kSignatureFields;
    static constexpr uint32_t kTag = 0x31555348; //!< "HSU1" in little-endian bytes

    static int32_t countInputs(Attributes const& attributes) noexcept
    {
        return hstu::countInputs(attributes);
    }

    static Attributes read(char const* nodeName, std::vector<FieldView> const& fields, Signature* signature)
    {
        return readAttributes(nodeName, fields, signature);
    }

    static char const* buildId() noexcept
    {
        return kernelBuildId();
    }

    static nvinfer1::DataType outputType(Attributes const& /* attributes */, nvinfer1::DataType const* inputTypes)
    {
        return inputTypes[static_cast<int32_t>(Input::kQ)];
    }

    //! Throws PluginError when q or v has another rank than 3.
    static nvinfer1::DimsExprs outputDims(
        Core const& core, nvinfer1::DimsExprs const* inputs, nvinfer1::IExprBuilder& /* expressions */)
    {
        nvinfer1::DimsExprs const& q = inputs[static_cast<int32_t>(Input::kQ)];
        nvinfer1::DimsExprs const& v = inputs[static_cast<int32_t>(Input::kV)];
        HSTU_CHECK(q.nbDims == 3 && v.nbDims == 3, kPluginName, " node '", core.nodeName(), "': q has rank ", q.nbDims,
            " and v ", v.nbDims, "; allowed: 3");
        nvinfer1::DimsExprs output{};
        output.nbDims = 3;
        output.d[0] = q.d[0];
        output.d[1] = q.d[1];
        output.d[2] = v.d[2];
        return output;
    }

    template <typename Desc>
    static bool isFormatSupported(
        Attributes const& attributes, int32_t position, Desc const* inOut, int32_t nbInputs)
    {
        return hstu::isFormatSupported(attributes, position, inOut, nbInputs);
    }

    template <typename Desc>
    static NodeTensors tensorsOf(
        Attributes const& attributes, Desc const* in, int32_t nbInputs, Desc const* out, int32_t nbOutputs)
    {
        return hstu::tensorsOf(attributes, in, nbInputs, out, nbOutputs);
    }

    static DevicePointers pointersOf(
        Attributes const& attributes, void const* const* inputs, void* const* outputs) noexcept
    {
        return hstu::pointersOf(attributes, inputs, outputs);
    }
};

} // namespace hstu

#endif // HSTU_ATTENTION_OPERATOR_H
